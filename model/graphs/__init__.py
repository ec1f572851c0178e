"""The decoder's and the detokenizer's inference as ONNX graphs, built node by node from their weights."""
