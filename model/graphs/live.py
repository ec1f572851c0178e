"""Graphs of loaded modules, for ONNX Runtime in the same process: nothing is written, weights are not copied."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kinetok.model.decoder import MotionDecoder
from kinetok.model.graphs.builder import ELEMENTS, Make, TensorProto
from kinetok.model.graphs.decoder import DecoderExport, module_tensors
from kinetok.model.graphs.detokenizer import DetokenizerExport
from kinetok.model.graphs.precision import Precision
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion.features import FEATURES


class HeldWeights:
    """``WeightFile``'s counterpart in memory: arrays by name, which the graph refers to as external."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, make: Make, element: int | None = None, shape: Sequence[int] | None = None) -> Any:
        """The TensorProto that refers to a weight; arguments of ``WeightFile.put``."""
        array = self.arrays.setdefault(name, np.ascontiguousarray(make()))
        tensor = TensorProto(name=name, data_type=ELEMENTS[array.dtype], dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="memory")
        return tensor


def decoder_graph(decoder: MotionDecoder) -> tuple[bytes, dict[str, np.ndarray]]:
    """Prefill and decode step in fp32 (``DecoderExport.extend``), serialised, and the weights that it refers to."""
    held = HeldWeights()
    export = DecoderExport(
        config=decoder.config,
        tensors=module_tensors(decoder),
        precision=Precision(name="fp32"),
        kv_dtype=np.dtype(np.float32),
        contrib=True,
    )
    return export.extend(held).model().SerializeToString(), held.arrays


def stream_graph(tokenizer: MotionTokenizer) -> tuple[bytes, dict[str, np.ndarray]]:
    """The streaming detokenizer (``DetokenizerExport.stream``), whose frames stay normalised, and its weights."""
    held = HeldWeights()
    export = DetokenizerExport(tokenizer=tokenizer, mean=np.zeros(FEATURES), std=np.ones(FEATURES))
    return export.stream(held).graph.model().SerializeToString(), held.arrays
