"""The real inputs in ../shared/data, decompressed once into a temporary folder per user."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import os
import tempfile
from typing import Any

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.environ.get("KVMTOOL_TEST_DATA", os.path.join(ROOT, "..", "shared", "data"))
DUMPS = ("i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6")


@functools.cache
def _folder() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"kvmtool-inputs-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder


def real(name: str) -> str:
    """Path of the real input `name` (as in data/README.md, without .xz); skips without it."""
    path = os.path.join(DATA, name)
    if os.path.exists(path):
        return os.path.abspath(path)
    if not os.path.exists(path + ".xz"):
        pytest.skip(f"real input {name} is not here (looked in {os.path.abspath(DATA)})")
    return unpacked(path + ".xz", lzma.open)


def plain_core(dump: str) -> str:
    """Path of the uncompressed core.macho of a folder in dumps/."""
    return unpacked(real(f"dumps/{dump}/core.macho.gz"), gzip.open)


def unpacked(path: str, opener: Any) -> str:
    """Path of the decompressed copy of `path`, made anew when the original is newer."""
    stem = os.path.relpath(os.path.abspath(path), os.path.abspath(DATA)).rsplit(".", 1)[0]
    copy = os.path.join(_folder(), stem)
    if not os.path.exists(copy) or os.path.getmtime(copy) < os.path.getmtime(path):
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with opener(path) as packed:
            content = packed.read()
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(copy), delete=False) as out:
            out.write(content)
        os.replace(out.name, copy)
    return copy


@functools.cache
def truth(dump: str) -> dict[str, Any]:
    """truth.json of a folder in dumps/."""
    with gzip.open(real(f"dumps/{dump}/truth.json.gz")) as packed:
        return json.load(packed)


@functools.cache
def oracle(name: str) -> dict[str, Any]:
    """machine/NAME.oracle.json."""
    with gzip.open(real(f"machine/{name}.oracle.json.gz")) as packed:
        return json.load(packed)
