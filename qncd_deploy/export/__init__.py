"""Torch modules and foreign ONNX files to clean float graphs, and those to quantized siblings on disk."""
