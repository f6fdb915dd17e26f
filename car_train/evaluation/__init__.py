"""How good a checkpoint is: metrics on held-out images, curves of runs, and tables that compare."""
