"""Wire definitions and their generated stubs; `make stubs` writes them again, CI checks that they are current."""
