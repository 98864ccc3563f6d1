"""The student's losses, one file each. `distill/terms.py` registers them."""
