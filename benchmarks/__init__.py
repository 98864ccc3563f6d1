"""Benchmarks: commands that measure and write result files. They may import everything; nothing but examples imports them."""
