"""Export: checkpoint → plan."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime looks at it when it is first imported
