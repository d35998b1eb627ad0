"""llvm's tools as judges of what the builders write."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def run(tool: str, *arguments: str) -> str:
    """What an installed llvm tool prints."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
