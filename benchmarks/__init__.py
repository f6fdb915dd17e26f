"""Measurements whose numbers the documents quote. Each prints a table, then one line of JSON (`harness.machine`)."""
