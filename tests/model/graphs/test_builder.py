"""Weights' files and the checks on finished graphs."""

import io
import weakref

import numpy as np
import pytest

from kinetok.errors import UserError
from kinetok.model.graphs.builder import ALIGNMENT, Graph, WeightFile, check_model


def test_a_weight_is_made_once_written_at_once_and_forgotten() -> None:
    """A model larger than memory goes through one tensor at a time."""
    file, made, alive = io.BytesIO(), [], []

    def make(value: float, count: int):
        def values() -> np.ndarray:
            made.append(value)
            array = np.full(count, value, np.float32)
            alive.append(weakref.ref(array))
            return array

        return values

    weights = WeightFile(file, "w.bin")
    first = weights.put("a", make(1.0, 3))
    assert alive[0]() is None and file.tell() == 12
    second = weights.put("b", make(2.0, 5000))
    again = weights.put("a", make(3.0, 3))
    assert made == [1.0, 2.0] and again == first
    about = {entry.key: entry.value for entry in second.external_data}
    assert about == {"location": "w.bin", "offset": str(ALIGNMENT), "length": "20000"}
    assert np.frombuffer(file.getvalue(), np.float32, 5000, ALIGNMENT).tolist() == [2.0] * 5000


def test_an_operator_of_another_domain_does_not_pass(tmp_path) -> None:
    g = Graph("g", WeightFile(io.BytesIO(), "w.bin"))
    x = g.input("x", np.float32, ["n"])
    g.output(g.node("Relu", g.node("rms_norm", x, domain="kinetok")), "y", np.float32, ["n"])
    (tmp_path / "g.onnx").write_bytes(g.model().SerializeToString())
    with pytest.raises(RuntimeError, match="custom operators are left in the graph: kinetok::rms_norm"):
        check_model(tmp_path / "g.onnx")
    check_model(tmp_path / "g.onnx", ("", "kinetok"))


def test_an_opset_that_no_graph_is_written_for() -> None:
    with pytest.raises(UserError, match="expected one of 23, 24, 18, got 17"):
        Graph("g", WeightFile(io.BytesIO(), "w.bin"), 17)
