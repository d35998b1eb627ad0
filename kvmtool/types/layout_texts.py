"""What the members of the built-in layouts are: "proc*", "unsigned long[2]", "timeval".

tools/build_layout_types.py compiles them into data/layout_types.bin, to be read beside layouts.bin:
the same container, its first stream the structures' tags, a line each. Then a stream per structure:
the texts it uses, a line each; NUL; and per layout a row with a byte for each name in layouts.bin's
stream: the number of its text from 1, or 0 where nothing is known.

A text is a C type without the words struct, union and enum: a base type or a tag, stars, counts in
brackets. Nothing of this is loaded before a type is asked for by name.
"""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple

from kvmtool.errors import FormatError
from kvmtool.types.resource import DATA, Resource

MAGIC = b"KVMTEXT1"
PATH = os.path.join(DATA, "layout_types.bin")

_SHAPE = re.compile(r"([A-Za-z_][\w ]*?)(\**)((?:\[\d+\])*)")


class BaseForm(NamedTuple):
    """A base type: `size` in bytes, 0 being that of a pointer; `form` as `ctype.Base` has it."""

    size: int
    form: str
    signed: bool


BASES = {
    "void": BaseForm(1, "void", signed=False),
    "char": BaseForm(1, "char", signed=True),
    "signed char": BaseForm(1, "char", signed=True),
    "unsigned char": BaseForm(1, "char", signed=False),
    "_Bool": BaseForm(1, "bool", signed=False),
    "short": BaseForm(2, "int", signed=True),
    "unsigned short": BaseForm(2, "int", signed=False),
    "int": BaseForm(4, "int", signed=True),
    "unsigned int": BaseForm(4, "int", signed=False),
    "long": BaseForm(0, "int", signed=True),
    "unsigned long": BaseForm(0, "int", signed=False),
    "long long": BaseForm(8, "int", signed=True),
    "unsigned long long": BaseForm(8, "int", signed=False),
    "float": BaseForm(4, "float", signed=True),
    "double": BaseForm(8, "float", signed=True),
}


def shape(text: str) -> tuple[str, int, tuple[int, ...]]:
    """A text's name, number of stars, and counts, outermost first. Raises ValueError."""
    parts = _SHAPE.fullmatch(text)
    if parts is None:
        raise ValueError(f"{text!r} is no type's text")
    counts = tuple(int(count) for count in re.findall(r"\d+", parts.group(3)))
    return parts.group(1), len(parts.group(2)), counts


@functools.cache
def _resource() -> Resource:
    return Resource(PATH, MAGIC)


def texts_of(tag: str, number: int, layout: int, names: list[str]) -> dict[str, str]:
    """What is known of the members of `tag`, structure `number` of the database.

    `layout` is that of the kernel, from 0; `names` are all names of layouts.bin's stream. Raises
    `FormatError` where the two resources do not belong together.
    """
    lines, _, rows = _resource().stream(1 + number).partition(b"\0")
    if len(rows) % len(names) or (layout + 1) * len(names) > len(rows):
        what = f"struct {tag}: {len(rows)} bytes do not fit layouts.bin: reinstall kvmtool"
        raise FormatError(PATH, None, what)
    known = ["", *lines.decode().split("\n")]
    row = rows[layout * len(names) : (layout + 1) * len(names)]
    return {name: known[text] for name, text in zip(names, row, strict=True) if text}
