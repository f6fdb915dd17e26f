"""ONNX Runtime: `ort-cpu`, and `ort-cuda` with CUDA graphs."""
