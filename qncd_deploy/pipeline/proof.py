"""The proof that goes with a bundle: its pictures beside the float twin's, in figures and as a page."""

from __future__ import annotations
