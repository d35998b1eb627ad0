"""A page walk over a raw image, written for these tests alone: nothing of kvmtool's is in it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_FRAME = 0x000FFFFFFFFFF000
_PRESENT, _WRITE, _LARGE = 1, 2, 0x80


class Page(NamedTuple):
    """One mapped page: `size` bytes at `address`, physically at `physical`."""

    address: int
    physical: int
    size: int
    writable: bool


class Tables:
    """The page tables of a raw image. `seen` collects the addresses of the tables themselves."""

    def __init__(self, raw: bytes, root: int, arch: str) -> None:
        """`root` is CR3."""
        self.raw, self.root = raw, root
        self._levels = (39, 30, 21, 12) if arch == "x86_64" else (30, 21, 12)
        self.seen: set[int] = set()

    def pages(self) -> Iterator[Page]:
        """Every mapped page, ascending."""
        yield from self._walk(self.root & ~0x1F, 0, 0)

    def _walk(self, table: int, level: int, base: int) -> Iterator[Page]:
        self.seen.add(table & ~0xFFF)
        shift = self._levels[level]
        count = 4 if shift == 30 and level == 0 else 512
        for n, entry in enumerate(struct.unpack_from(f"<{count}Q", self.raw, table)):
            if not entry & _PRESENT:
                continue
            address = base + (n << shift)
            if shift == 39 and n >= 256:
                address |= 0xFFFF << 48
            if shift == 12 or (shift == 21 and entry & _LARGE):
                size = 1 << shift
                yield Page(address, entry & _FRAME & ~(size - 1), size, bool(entry & _WRITE))
            else:
                yield from self._walk(entry & _FRAME, level + 1, address)

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel address. Raises `KeyError` where nothing is mapped."""
        at = {page.address: page for page in self.pages() if page.size == 4096}
        found = b""
        while size:
            page = at[address & ~0xFFF]
            inside = address & 0xFFF
            part = min(size, 4096 - inside)
            found += self.raw[page.physical + inside : page.physical + inside + part]
            address, size = address + part, size - part
        return found


def regions(pages: Iterator[Page]) -> list[tuple[int, int]]:
    """(start, end) of what is mapped in 4 KiB pages: all but XNU's window on physical memory."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if page.size != 4096:
            continue
        if found and found[-1][1] == page.address:
            found[-1] = (found[-1][0], page.address + page.size)
        else:
            found.append((page.address, page.address + page.size))
    return found
