"""Planning: the server's own scheduling on a simulated clock, and how many devices a load needs."""
