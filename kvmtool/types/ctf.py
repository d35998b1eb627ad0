"""C types from CTF: the `__CTF,__ctf` section of a kernel or object, or a file of it by itself.

Nothing is decoded before it is asked for: opening inflates the body and finds where each type is,
the first question by name makes an index of all names, a type's record is read when something
leads to it.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from kvmtool.errors import MismatchError
from kvmtool.types import ctf_format as ctf
from kvmtool.types.ctf_types import CtfTypes
from kvmtool.types.ctf_variables import symbols_of

if TYPE_CHECKING:
    from kvmtool.macho import MachO
    from kvmtool.source import Source
    from kvmtool.types.ctf_types import Symbols

__all__ = ["CtfTypes", "ctf_of", "is_ctf", "open_ctf", "symbols_of"]


def open_ctf(
    source: Source,
    start: int = 0,
    size: int | None = None,
    byteorder: str | None = None,
    pointer_size: int | None = None,
    symbols: Symbols | None = None,
    parent: CtfTypes | None = None,
) -> CtfTypes:
    """The types of the CTF in `size` bytes (all that is left) at `start` of `source`.

    `byteorder` ("<" or ">") is the kernel's, where one is known. For the rest see `CtfTypes`.

    Raises `FormatError`, `UnsupportedError` for a version other than 2 to 4, `MismatchError` for
    the other byte order.
    """
    body = ctf.CtfBody(source, start, source.size - start if size is None else size)
    if byteorder not in (None, body.byteorder):
        raise MismatchError(
            f"{source.name}: at offset {start:#x}: the CTF is of the other byte order"
        )
    origin = f"CTF {body.header.version} in {source.name}"
    return CtfTypes(body, os.path.basename(source.name), origin, pointer_size, symbols, parent)


def is_ctf(head: bytes) -> bool:
    """Whether `head`, a file's first bytes, are those of CTF by itself."""
    return head[:2] in ctf.MAGICS and len(head) > 3 and head[2] in (1, 2, 3, 4)


def ctf_of(macho: MachO, parent: CtfTypes | None = None) -> CtfTypes | None:
    """The types in a kernel, kext or object; None where it has no CTF.

    Raises what `open_ctf` raises.
    """
    place = _section(macho)
    if place is None:
        return None
    wide = 8 if macho.is64 else 4
    symbols = partial(symbols_of, macho)
    return open_ctf(macho.source, *place, macho.byteorder, wide, symbols, parent)


def _section(macho: MachO) -> tuple[int, int] | None:
    """Offset and size of the CTF in the file.

    ctfinsert and ctfmerge write the load command for `__CTF` after the others even where there is
    no room, over the first section's bytes; an object whose text was wiped has lost it. The CTF
    itself is the last thing in the file.
    """
    for section in macho.sections:
        if (section.segname, section.sectname) == ("__CTF", "__ctf") and section.size:
            return section.offset, section.size
    if not macho.warnings:
        return None
    ends = [segment.fileoff + segment.filesize for segment in macho.segments]
    table = macho.symtab
    if table is not None:
        ends.append(table.stroff + table.strsize)
    ends += [section.reloff + 8 * section.nreloc for section in macho.sections]
    end, size = max(ends, default=0), macho.source.size
    if end + ctf.HEADER_SIZE > size or not is_ctf(macho.source.read_at(end, ctf.HEADER_SIZE)):
        return None
    return end, size - end
