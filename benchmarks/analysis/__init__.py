"""What reports are computed from: results, counted work, hardware limits, and their tables and plots."""
