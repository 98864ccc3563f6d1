"""Benchmarks: commands that measure and write rows. May import everything; nothing imports them."""
