"""Models of real size with random weights of the public configurations, and what commands need on them."""
