"""qncd bench: speed beside accuracy, measured interleaved on this machine."""

from __future__ import annotations
