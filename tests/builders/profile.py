"""Volatility 2 profiles of Macs: the zip, its vtypes and its symbol listing, as text."""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

RULE = "-" * 70


def listing(arch: str, entries: Sequence[tuple[str, int, str, int, int]]) -> str:
    """What `dsymutil -s` prints of (kind, n_type, name, n_sect, n_value)."""
    head = f"{RULE}\nSymbol table for: '/k/mach_kernel' ({arch})\n{RULE}\n"
    head += "Index    n_strx   n_type             n_sect n_desc n_value\n"
    head += "======== -------- ------------------ ------ ------ ----------------\n"
    lines = []
    for place, (kind, n_type, name, n_sect, n_value) in enumerate(entries):
        shown = f" '{name}'" if name else ""
        place_and_type = f"[{place:6d}] {place * 9:08x} {n_type:02x} ({kind:13})"
        lines.append(f"{place_and_type} {n_sect:02x}     0000   {n_value:016x}{shown}")
    return head + "\n".join(lines) + "\n\n\n"


def vtypes(structs: str) -> str:
    """The file around `structs`."""
    return f"mac_types = {{\n{structs}}}\n\nmac_gvars = {{\n}}\n"


def archive(files: dict[str, str], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of these files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as packed:
        for name, text in files.items():
            packed.writestr(name, text)
    return out.getvalue()


def profile(structs: str, symbols: str = "", name: str = "10.9.4.vtypes") -> bytes:
    """A profile of one file of types, and one of symbols if there are any."""
    files = {"10.9.4.symbol.dsymutil": symbols} if symbols else {}
    return archive({**files, name: vtypes(structs)})
