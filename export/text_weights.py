"""How a bundle stores the weights of a text encoder, which computes in fp32 whatever they are."""

import numpy as np

from kinetok.model.graphs.builder import Graph
from kinetok.model.graphs.precision import Precision, Tensors, linear, to_numpy

FLOAT, HALF = np.dtype(np.float32), np.dtype(np.float16)


class TextWeights:
    """fp16 halves the matrices; int8 and int4 store tables in fp16 and products in 8 bits. Vectors are always fp32."""

    def __init__(self, g: Graph, tensors: Tensors, precision: str) -> None:
        self.g, self.tensors = g, tensors
        self._half, self._bits = precision != "fp32", 8 if precision in ("int8", "int4") else 0

    def whole(self, name: str) -> str:
        """A table or a vector, fp32 when it is used."""
        return self._wide(name, name, transposed=False)

    def rows(self, name: str, ids: str) -> str:
        """Rows of a table, fp32."""
        kind = HALF if self._half else FLOAT
        held = self.g.weight(name, lambda: to_numpy(self.tensors(name), kind, name))
        chosen = self.g.node("Gather", held, ids)
        return self.g.cast(chosen, FLOAT) if self._half else chosen

    def product(self, x: str, name: str) -> str:
        """``x [..., K]`` times the weight ``name`` ``[N, K]``."""
        if self._half and not self._bits:
            return self.g.node("MatMul", x, self._wide(name, name, transposed=True))
        # Products take fp32 activations whatever the storage.
        rows, columns = self.tensors(name).shape
        products = Precision(name="int8" if self._bits else "fp32")
        return linear(self.g, x, name, self.tensors, products, (rows, columns), self._bits)

    def _wide(self, key: str, name: str, *, transposed: bool) -> str:
        value = self.tensors(name)
        kind = HALF if self._half and value.ndim == 2 else FLOAT
        held = self.g.weight(key, lambda: to_numpy(value.T if transposed else value, kind, name))
        return self.g.cast(held, FLOAT) if kind != FLOAT else held
