"""Peers: other servers of the same bundle, compared with flashdiff."""
