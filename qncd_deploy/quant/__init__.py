"""Grids, ranges, the quantization plan, and the smoothing folded into the weights."""
