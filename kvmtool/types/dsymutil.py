"""`dsymutil -s`, the listing of a symbol table that Volatility 2 profiles hold.

A line reads "[   10] 000000d3 24 (N_FUN ) 01     0000   ffffff80002021b0 '_vm_swap_create_file'":
place, n_strx, n_type, its name, n_sect, n_desc, n_value, the name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmtool.nlist import Nlist

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE = re.compile(
    r"^\[ *(\d{1,9})\] [0-9a-f]{8} ([0-9a-f]{2}) \([^)\n]{1,24}\) "
    r"([0-9a-f]{2}) {1,8}([0-9a-f]{4}) {1,8}([0-9a-f]{8,16}) '([^\n]*)'\r?$",
    re.MULTILINE,
)
_ARCH = re.compile(r"^Symbol table for: '[^\n]*' \((\w+)\)", re.MULTILINE)


def entries(text: str) -> Iterator[Nlist]:
    """Every entry that has a name, stabs and undefined ones too, as linked."""
    for found in _LINE.finditer(text):
        place, n_type, n_sect, n_desc, n_value, name = found.groups()
        desc = int(n_desc, 16)
        yield Nlist(
            name,
            int(n_type, 16),
            int(n_sect, 16),
            desc - 0x10000 if desc & 0x8000 else desc,
            int(n_value, 16),
            int(place),
        )


def addresses(text: str) -> dict[str, int]:
    """Link addresses by C name. Stabs (N_GSYM's have the value 0) and undefined ones are left out;
    of several of one name the first external one counts, as in `SymbolTable`.
    """
    found: dict[str, int] = {}
    seen: set[str] = set()
    for entry in entries(text):
        if not entry.defined:
            continue
        name = entry.name.removeprefix("_")
        if name not in found or (entry.n_type & 1 and name not in seen):
            found[name] = entry.n_value
            if entry.n_type & 1:
                seen.add(name)
    return found


def architecture(text: str) -> str | None:
    """The processor the listing says it is for: "x86_64"; None if it does not."""
    found = _ARCH.search(text, 0, 1 << 16)
    return None if found is None else found[1]
