"""Editing (VAR section 6): the frame that is edited, what of it is kept as tokens, and receipts in PNG files."""
