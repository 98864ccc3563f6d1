"""flashdiff: distill diffusion models into few-step students, compile them, and serve them with low latency."""

__version__ = "0.2.0"
