"""A mini kernel of our own that really runs under QEMU: see README.md in this folder."""

from __future__ import annotations
