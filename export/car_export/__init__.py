"""From a checkpoint to a plan: ONNX graphs, weights, INT8, engines for GPUs, and the verification of each."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime looks at it when it is first imported
