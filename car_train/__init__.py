"""Train the models in PyTorch: `model`, `data`, `training`, `evaluation`, and `interop` with published weights."""
