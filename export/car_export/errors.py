"""What can go wrong while a plan is exported, verified or compiled, by kind.

Every message names the offending value, and the node where there is one, and ends after a semicolon with the remedy.
"""

from __future__ import annotations


class ExportError(ValueError):
    """A plan that can't be built; the message ends with the remedy."""


class VerificationError(ValueError):
    """The plan and the model disagree; the message lists every finding."""


class EngineError(ExportError):
    """An engine that can't be built."""

    def __init__(self, message: str, node: str | None = None):
        super().__init__(message)
        self.node = node
        """The ONNX node that the compiler names, if it names one."""


class TargetError(EngineError):
    """The machine that engines were asked for is none that this compiler builds for."""


class CompilerMissingError(EngineError):
    """The flavour of TensorRT is not installed, or can't be loaded."""


class NoGpuError(EngineError):
    """Classic TensorRT compiles on the GPU that will run the engine, and there is none."""


class GraphError(EngineError):
    """The compiler refuses the graph, for an operator or for what a node gets; or it can't be rewritten for one."""


class MixedTypesError(GraphError):
    """A node gets inputs of several types: networks are strongly typed, so precision is in the graph."""


class TopKError(GraphError):
    """A TopK of more elements than the compiler sorts."""


class ProfileError(EngineError):
    """A profile lacks a size, or its sizes contradict each other or the graph."""


class CompileError(EngineError):
    """The compiler gave up for another reason; the message has its words."""


class OutputError(EngineError):
    """A file of the plan could not be written."""
