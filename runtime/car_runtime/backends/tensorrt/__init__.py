"""TensorRT's compiled engines: `rtx` for RTX cards, and `trt`."""
