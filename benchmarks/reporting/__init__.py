"""The parts of report.py: reading result files, plots, sentences, the page, and the tables of README and docs."""
