"""Dumps with some of their pages absent."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from tests.builders import macho

LC_SEGMENT, LC_SEGMENT_64 = 0x1, 0x19
LIME = 0x4C694D45
_LIME = struct.Struct("<2I2Q8x")  # magic, version, first and last address


class Core(NamedTuple):
    """A core taken apart: its machine, its segments, its other commands as they stand."""

    arch: str
    page: int
    segments: list[tuple[int, bytes]]  # address, content
    others: list[tuple[int, bytes]]  # cmd, body

    def pages(self) -> list[int]:
        """The address of every page."""
        return [
            address + at
            for address, content in self.segments
            for at in range(0, len(content), self.page)
        ]

    def without(self, absent: set[int]) -> bytes:
        """The core, the pages at those addresses left out."""
        file = macho.MachO(self.arch, macho.MH_CORE)
        for address, content in self.segments:
            start = 0
            for at in range(0, len(content), self.page):
                if address + at in absent:
                    if at > start:
                        file.segment("", address + start, content[start:at])
                    start = at + self.page
            if start < len(content):
                file.segment("", address + start, content[start:])
        for cmd, body in self.others:
            file.command(cmd, body)
        return file.build()


def taken_apart(data: bytes, page: int = 4096) -> Core:
    """A core without LC_NOTEs (their bytes lie elsewhere) as its parts."""
    magic, cputype, _, _, ncmds, _ = struct.unpack_from("<6I", data)
    wide = magic == 0xFEEDFACF
    arch = next(name for name, machine in macho.MACHINES.items() if machine.cputype == cputype)
    segments, others = [], []
    at = 32 if wide else 28
    for _ in range(ncmds):
        cmd, size = struct.unpack_from("<2I", data, at)
        if cmd in (LC_SEGMENT, LC_SEGMENT_64):
            place = struct.unpack_from("<4Q" if wide else "<4I", data, at + 24)
            address, _, offset, length = place
            segments.append((address, data[offset : offset + length]))
        else:
            others.append((cmd, data[at + 8 : at + size]))
        at += size
    return Core(arch, page, segments, others)


def chosen(pages: list[int], seed: int, share: float = 0.01) -> set[int]:
    """That share of the pages, at least one, at random."""
    count = max(1, round(share * len(pages)))
    return set(random.Random(seed).sample(pages, count))


class Lime(NamedTuple):
    """A dump of physical memory taken apart: its ranges."""

    page: int
    ranges: list[tuple[int, bytes]]  # physical address, content

    def pages(self) -> list[int]:
        """The address of every page."""
        return [
            start + at for start, content in self.ranges for at in range(0, len(content), self.page)
        ]

    def without(self, absent: set[int]) -> bytes:
        """The dump, the pages at those addresses left out."""
        parts = []
        for start, content in self.ranges:
            for at in range(0, len(content), self.page):
                if start + at not in absent:
                    data = content[at : at + self.page]
                    parts.append(_LIME.pack(LIME, 1, start + at, start + at + len(data) - 1) + data)
        return b"".join(parts)


def lime_taken_apart(data: bytes, page: int) -> Lime:
    """A LiME file as its ranges."""
    ranges, at = [], 0
    while at < len(data):
        _, _, first, last = _LIME.unpack_from(data, at)
        at += _LIME.size
        ranges.append((first, data[at : at + last + 1 - first]))
        at += last + 1 - first
    return Lime(page, ranges)
