"""Calibration: the inputs a float sampler feeds the network, and streaming statistics of what flows through it."""
