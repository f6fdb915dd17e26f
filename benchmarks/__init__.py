"""Measurements whose numbers the documents quote. Each prints a table, then one JSON line (`benchmarks.machine`)."""
