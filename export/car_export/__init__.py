"""From a checkpoint to a plan: ONNX graphs, weights, INT8, engines for GPUs, and the verification of each."""
