"""The `cuda` backend's kernels in Triton, and how they are compiled ahead of time.

The runtime never imports this: it launches the cubins that `python -m car_kernels` writes (`make kernels`).
"""
