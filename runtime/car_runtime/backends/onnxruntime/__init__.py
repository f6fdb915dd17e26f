"""ONNX Runtime: `ort-cpu`, `ort-cuda` with CUDA graphs, and `cuda`, which runs the steps by own kernels."""
