"""A kernel of a few pages in physical memory, with whatever leads to its page table.

It has what a way in may hold on to (header, UUID, banner, low globals page, variables) and nothing
else. File and memory differ as real ones do: variables and low globals are filled in by the running
kernel, and its header is slid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tests.builders import macho
from tests.builders.macho import Sym

if TYPE_CHECKING:
    from collections.abc import Mapping

UNIT = 0x4000  # a page of the largest kind; each part of the kernel begins one
CONST, LOW, DATA, KLD, LINKEDIT, END = (number * UNIT for number in range(1, 7))
BANNER = (
    "Darwin Kernel Version 13.4.0: Wed Mar 18 16:20:14 PDT 2015; "
    "root:xnu-2422.115.14~1/RELEASE_X86_64"
)
EYES = {"x86_64": b"Catfish ", "i386": b"Catfish ", "arm64": b"Kraken  "}
UUID = bytes(range(16))


class TinyKernel(NamedTuple):
    """`file` is the kernel's, `image` its memory from the header on, `symbols` are unslid."""

    file: bytes
    image: bytes
    symbols: dict[str, int]
    address: int


def build(
    arch: str,
    link: int,
    slide: int = 0,
    *,
    variables: Mapping[str, int] | None = None,
    tables: Mapping[str, int] | None = None,
    stext: bool = True,
    linkedit: bool = False,
    uuid: bytes = UUID,
    banner: str = BANNER,
) -> TinyKernel:
    """A kernel linked at `link`.

    `variables` are names and values, put into __DATA; `tables` names and offsets from the header.
    `stext`: whether the low globals page tells where the kernel is. `linkedit`: whether the symbol
    table stays in memory, its values slid as Apple's booter leaves them.
    """
    width = macho.MACHINES[arch].width
    data = bytearray(UNIT)
    symbols = {"__mh_execute_header": link, "_version": link + CONST + 0x40, "_lowGlo": link + LOW}
    for number, (name, value) in enumerate((variables or {}).items()):
        at = 0x200 + 16 * number
        data[at : at + width] = value.to_bytes(width, "little")
        symbols[name] = link + DATA + at
    symbols.update({name: link + offset for name, offset in (tables or {}).items()})
    const = bytes(0x40) + banner.encode() + b"\0"
    low = bytearray(UNIT)
    low[:8] = EYES[arch]
    file = _file(arch, link, uuid, (const, bytes(low)), symbols)
    if stext:
        low[0x10:0x18] = (link + slide).to_bytes(8, "little")
    parts = (file.head(slide), const, bytes(low), bytes(data), b"")
    image = b"".join(part.ljust(UNIT, b"\0") for part in parts)
    if linkedit:
        slid = [Sym(name, value + slide) for name, value in symbols.items()]
        image += b"".join(macho.symbol_table(macho.MACHINES[arch], slid))
    return TinyKernel(file.build(), image.ljust(END, b"\0"), symbols, link + slide)


def _file(
    arch: str, link: int, uuid: bytes, text: tuple[bytes, bytes], symbols: Mapping[str, int]
) -> macho.MachO:
    file = macho.MachO(arch, macho.MH_EXECUTE)
    content = b"".join(part.ljust(UNIT, b"\0") for part in (b"", *text))
    file.segment("__TEXT", link, content, fileoff=0, prot=5)
    file.segment("__DATA", link + DATA, bytes(UNIT), prot=3)
    file.segment("__KLD", link + KLD, bytes(UNIT), prot=5)
    file.symtab([Sym(*item) for item in symbols.items()], linkedit=link + LINKEDIT, dysymtab=False)
    file.uuid(uuid)
    return file
