"""Measurements whose numbers the documents quote: `python -m benchmarks.NAME --help` for each of the modules here."""
