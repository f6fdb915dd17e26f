"""Train the models in PyTorch: `model`, `data`, `training`, `evaluation`, and `interop` with published weights."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime looks at it when it is first imported
