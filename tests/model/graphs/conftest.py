"""Graphs need the package onnx to be made and onnxruntime to be run."""

import pytest

pytest.importorskip("onnx", reason="needs the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
