"""Dumps with some of their pages absent."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from tests.builders import macho

LC_SEGMENT, LC_SEGMENT_64 = 0x1, 0x19


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
