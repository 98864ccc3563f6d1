"""Other servers of the same bundle, to compare with."""
