"""A core read with struct alone, to hold the builders and kvmtool against."""

from __future__ import annotations

import struct

from tests.builders import macho


class Reader:
    """A core read with struct alone; the first segment that has an address answers."""

    def __init__(self, core: bytes, symbols: dict[str, int], slide: int) -> None:
        self.core = core
        magic, self.cputype, _, self.filetype, self.ncmds = struct.unpack_from("<5I", core)
        self.width = 8 if magic == 0xFEEDFACF else 4
        self.segments, self.commands = [], []
        at = 32 if self.width == 8 else 28
        for _ in range(self.ncmds):
            cmd, size = struct.unpack_from("<2I", core, at)
            if not cmd:
                break
            self.commands.append((cmd, core[at + 8 : at + size]))
            if cmd in (macho.LC_SEGMENT, macho.LC_SEGMENT_64):
                words = "<4Q" if self.width == 8 else "<4I"
                self.segments.append(struct.unpack_from(words, core, at + 24))
            at += size
        self._symbols = symbols
        self._slide = slide

    def symbol(self, name: str) -> int:
        return self._symbols[name] + self._slide

    def read(self, address: int, size: int) -> bytes:
        for vmaddr, vmsize, fileoff, _ in self.segments:
            if vmaddr <= address and address + size <= vmaddr + vmsize:
                return self.core[fileoff + address - vmaddr :][:size]
        raise LookupError(f"{address:#x} is in no segment")

    def number(self, address: int, size: int = 4) -> int:
        return int.from_bytes(self.read(address, size), "little")

    def raw(self, address: int) -> int:
        return self.number(address, self.width)

    def pointer(self, address: int) -> int:
        """A pointer without its signature: 47 address bits on arm64, kernel half."""
        value = self.raw(address)
        if self.cputype != 0x0100000C or not value >> 55 & 1:
            return value
        return value | ~((1 << 47) - 1) & (1 << 64) - 1

    def text(self, address: int) -> str:
        return self.read(address, 16).split(b"\0")[0].decode()

    def chain(self, head: int, link: int, end: int = 0, limit: int = 3000) -> list[int]:
        found = []
        at = self.pointer(head)
        while at != end:
            found.append(at)
            assert len(found) < limit
            at = self.pointer(at + link)
        return found
