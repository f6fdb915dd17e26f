"""TensorRT engines for the graphs of a plan: rewrites that it needs, compilation, and what is cached."""
