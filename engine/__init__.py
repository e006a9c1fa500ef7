"""Run CPM-Bee models on ONNX Runtime."""

__version__ = "0.1.0"
