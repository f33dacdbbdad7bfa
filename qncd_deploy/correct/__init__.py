"""Corrections of the sampling loop: the per-step record, and one published method per file that fits it."""
