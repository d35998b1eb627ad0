"""fat and fat64 files: one Mach-O (or whatever) for each architecture.

Source: EXTERNAL_HEADERS/mach-o/fat.h, xnu-11417.121.6. Big-endian on every machine.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, KvmError, NotFoundError, TruncatedError
from kvmtool.macho import CPU_SUBTYPE_MASK, CPU_TYPE_X86_64, arch_name
from kvmtool.peel.layer import Inside, Layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtool.source import Source

FAT_MAGIC, FAT_MAGIC_64 = b"\xca\xfe\xba\xbe", b"\xca\xfe\xba\xbf"
CPU_SUBTYPE_X86_64_H = 8  # mach/machine.h

_HEADER_SIZE = 8  # magic, nfat_arch
_FAT_ARCH = {FAT_MAGIC: Struct(">5I"), FAT_MAGIC_64: Struct(">2I2Q2I")}
# A Java class begins with the same magic; the version after it, 45 at least, reads as nfat_arch.
_MAX_SLICES = 29
# A kernel of one of these runs where the other does too
_FAMILY = {"x86_64h": "x86_64", "arm64e": "arm64"}


class Slice(NamedTuple):
    """One fat_arch: `size` bytes at file offset `offset`; `align` is a power of 2, as exponent."""

    name: str
    offset: int
    size: int
    align: int
    cputype: int
    cpusubtype: int


def probe(head: bytes) -> bool:
    """Whether `head` (a file's first bytes) begins like a fat file, and not like a Java class."""
    count = int.from_bytes(head[4:8], "big")
    return head[:4] in _FAT_ARCH and 0 < count <= _MAX_SLICES


def open_layer(source: Source, arch: str | None) -> Inside:
    """The slice for `arch`. Raises `FormatError`, `NotFoundError`, or `KvmError` for no choice."""
    found = slices(source)
    chosen = choose(found, arch, source.name)
    detail = f"slice {chosen.name} of {_names(found)}"
    return Inside(Layer("fat", detail), chosen.offset, chosen.size)


def choose(found: Sequence[Slice], arch: str | None, file: str) -> Slice:
    """A single slice; else the one named `arch`, else one of its family (arm64 for arm64e).

    Raises `NotFoundError`, or `KvmError` when there are several and `arch` is None; `file` is for
    the message.
    """
    if len(found) == 1:
        return found[0]
    if arch is None:
        raise KvmError(f"{file}: is a fat file with slices {_names(found)}: choose one with --arch")
    exact = [piece for piece in found if piece.name == arch]
    family = _FAMILY.get(arch, arch)
    related = [piece for piece in found if _FAMILY.get(piece.name, piece.name) == family]
    for piece in (*exact, *related):
        return piece
    raise NotFoundError("architecture", arch, hint=f"{file} has slices {_names(found)}")


def slices(source: Source) -> list[Slice]:
    """See `kvmtool.peel.slices`. No two overlap, and all lie in the file."""
    head = source.read_at(0, min(_HEADER_SIZE, source.size))
    if not probe(head):
        raise FormatError(
            source.name,
            0,
            f"expected cafebabe or cafebabf and 0x1 to {_MAX_SLICES:#x} slices, got {head.hex()}",
        )
    layout = _FAT_ARCH[head[:4]]
    size = int.from_bytes(head[4:8], "big") * layout.size
    if _HEADER_SIZE + size > source.size:
        left = source.size - _HEADER_SIZE
        raise TruncatedError(source.name, _HEADER_SIZE, size, left, "fat_arch table")
    table = source.read_at(_HEADER_SIZE, size)
    found = []
    for cputype, cpusubtype, offset, length, align, *_ in layout.iter_unpack(table):
        name = _slice_name(cputype, cpusubtype)
        found.append(Slice(name, offset, length, align, cputype, cpusubtype))
    _check(source, found, layout.size)
    return found


def _check(source: Source, found: list[Slice], step: int) -> None:
    """All slices lie behind the table, inside the file, apart, and have different machines."""
    names: set[str] = set()
    for index, piece in enumerate(found):
        where = _HEADER_SIZE + index * step
        if piece.offset + piece.size > source.size:
            left = max(0, source.size - piece.offset)
            what = f"fat_arch {index} at offset {where:#x} (slice {piece.name})"
            raise TruncatedError(source.name, piece.offset, piece.size, left, what)
        if not piece.size or piece.name in names:
            why = "is there twice" if piece.size else "is empty"
            raise FormatError(source.name, where, f"slice {piece.name} {why}")
        names.add(piece.name)
    end, before = _HEADER_SIZE + len(found) * step, "fat_arch table"
    for piece in sorted(found, key=lambda piece: piece.offset):
        if piece.offset < end:
            where = _HEADER_SIZE + found.index(piece) * step
            message = f"slice {piece.name} begins at {piece.offset:#x}, expected {end:#x} or more"
            raise FormatError(source.name, where, f"{message} (where the {before} ends)")
        end, before = piece.offset + piece.size, f"slice {piece.name}"


def _slice_name(cputype: int, cpusubtype: int) -> str:
    if cputype == CPU_TYPE_X86_64 and cpusubtype & CPU_SUBTYPE_MASK == CPU_SUBTYPE_X86_64_H:
        return "x86_64h"
    return arch_name(cputype, cpusubtype)


def _names(found: Sequence[Slice]) -> str:
    return ", ".join(piece.name for piece in found)
