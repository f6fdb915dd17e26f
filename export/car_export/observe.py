"""ONNX Runtime that also reports what happens inside a plan's graphs, while the runtime's own loop runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from car_runtime.backends.base import Buffer
from car_runtime.backends.onnxruntime.cpu import OrtCpu
from car_runtime.format.manifest import Manifest


class ObservedOrtCpu(OrtCpu):
    """The backend `ort-cpu` with graphs that have more outputs, and perhaps inputs, than the plan's.

    A subclass says which: `edit` adds them to a graph, `buffers` allocates them for one run, `record` reads them.
    """

    def __init__(self, root: Path, manifest: Manifest, observed: Mapping[str, onnx.ModelProto]) -> None:
        """observed: graph → its ONNX model, without the weights; changed here."""
        self._content: dict[str, bytes] = {}
        for graph, model in observed.items():
            self.edit(graph, model)
            self._content[graph] = model.SerializeToString()
        super().__init__(root, manifest)
        for graph, model in observed.items():
            self._inputs[graph] = {value.name for value in model.graph.input}

    def edit(self, graph: str, model: onnx.ModelProto) -> None:
        """Add inputs and outputs to a graph, in place."""
        raise NotImplementedError

    def buffers(self, graph: str, inputs: Mapping[str, Buffer]) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """The added inputs and outputs of one run, by name; `inputs` are those that the loop gives."""
        raise NotImplementedError

    def record(self, graph: str, outputs: Mapping[str, Buffer]) -> None:
        """Take in what the added outputs hold after a run."""
        raise NotImplementedError

    def run(self, graph: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run a graph and record what it reports."""
        if graph not in self._content:
            super().run(graph, inputs, outputs)
            return
        more_inputs, more_outputs = self.buffers(graph, inputs)
        super().run(graph, {**inputs, **more_inputs}, {**outputs, **more_outputs})
        self.record(graph, more_outputs)

    def _source(self, graph: str) -> bytes | str:
        return self._content.get(graph) or super()._source(graph)

    def _options(self, graph: str) -> Any:
        options = super()._options(graph)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._root))
        return options


def load_graph(root: Path, manifest: Manifest, graph: str) -> onnx.ModelProto:
    """A graph of a plan, its weights left on disk."""
    return onnx.load(root / manifest.graphs[graph].file, load_external_data=False)
