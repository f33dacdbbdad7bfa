"""Checkpoints of known architectures, as diffusers modules with their schedule, condition and decoder."""
