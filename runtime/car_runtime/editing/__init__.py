"""Editing (VAR section 6): the frame that is edited and what of it is kept, as tokens and as pixels."""
