"""The manual pages are made when a wheel is; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys

from setuptools import setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


def manual() -> list[tuple[str, list[str]]]:
    """Where the pages go, and their files; nothing unless a wheel is made."""
    if "bdist_wheel" not in sys.argv:
        return []
    from tools.man import write

    return [("share/man/man1", write("build/man"))]


setup(data_files=manual())
