"""Page tables in a small physical memory, written by the manuals and not by our walkers.

Source: Intel SDM volume 3A chapter 4; Arm ARM D8. Physical memory is one bytearray; tables are
taken from its end downwards, pages are put where a test wants them.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from kvmtool.memory import RunMemory
from kvmtool.source import BytesSource

# mode -> (bits below the level's index, bits of the index) from the top, bytes of an entry
X86 = {
    "2-level": (((22, 10), (12, 10)), 4),
    "PAE": (((30, 2), (21, 9), (12, 9)), 8),
    "4-level": (((39, 9), (30, 9), (21, 9), (12, 9)), 8),
    "5-level": (((48, 9), (39, 9), (30, 9), (21, 9), (12, 9)), 8),
}
ARM64 = {
    "arm64 4K T1SZ 25": (((30, 9), (21, 9), (12, 9)), 8),
    "arm64 4K T1SZ 26": (((30, 8), (21, 9), (12, 9)), 8),
    "arm64 4K T1SZ 16": (((39, 9), (30, 9), (21, 9), (12, 9)), 8),
    "arm64 16K T1SZ 17": (((36, 11), (25, 11), (14, 11)), 8),
    "arm64 16K T1SZ 25": (((36, 3), (25, 11), (14, 11)), 8),
    "arm64 16K T1SZ 16": (((47, 1), (36, 11), (25, 11), (14, 11)), 8),
}
MODES = {**X86, **ARM64}

# the lowest kernel address of each mode that a test may use
KERNEL = {
    "2-level": 0,
    "PAE": 0,
    "4-level": 0xFFFFFF8000000000,
    "5-level": 0xFF00000000000000,
    "arm64 4K T1SZ 25": 0xFFFFFF8000000000,
    "arm64 4K T1SZ 26": 0xFFFFFFC000000000,
    "arm64 4K T1SZ 16": 0xFFFF000000000000,
    "arm64 16K T1SZ 17": 0xFFFF800000000000,
    "arm64 16K T1SZ 25": 0xFFFFFF8000000000,
    "arm64 16K T1SZ 16": 0xFFFF000000000000,
}


class Rights(NamedTuple):
    """What a mapping allows."""

    write: bool = True
    execute: bool = True
    user: bool = False


KERNEL_RIGHTS = Rights()


class Tables:
    """A page table of one mode, and the memory it lies in."""

    def __init__(
        self, mode: str, size: int, memory: bytearray | None = None, below: int | None = None
    ) -> None:
        """`size` bytes of physical memory from address 0 on; or another table's memory.

        Tables are taken from `below` downwards, by default from the end.
        """
        self.mode = mode
        self.levels, self.entry_size = MODES[mode]
        self.arm = mode in ARM64
        self.page = 1 << self.levels[-1][0]
        self.memory = bytearray(size) if memory is None else memory
        self.next = len(self.memory) if below is None else below
        self.root = self.table()

    def table(self) -> int:
        """Take a page for a table."""
        self.next -= self.page
        return self.next

    def slot(self, table: int, depth: int, address: int) -> int:
        """Where in memory the entry for `address` of a table at `depth` lies."""
        shift, bits = self.levels[depth]
        return table + (address >> shift & (1 << bits) - 1) * self.entry_size

    def get(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + self.entry_size], "little")

    def put(self, at: int, entry: int) -> None:
        self.memory[at : at + self.entry_size] = entry.to_bytes(self.entry_size, "little")

    def reach(self, address: int, depth: int) -> int:
        """Where the entry for `address` at `depth` lies; tables above are made as needed."""
        table = self.root
        for level in range(depth):
            at = self.slot(table, level, address)
            if not self.get(at):
                self.put(at, self.to_table(level, self.table()))
            table = self.get(at) & 0xFFFFFFFFF000
        return self.slot(table, depth, address)

    def to_table(self, depth: int, table: int) -> int:
        """An entry that leads to a table and takes no rights away."""
        if self.arm:
            return table | 3
        return table | (1 if self.mode == "PAE" and depth == 0 else 7)

    def map(
        self, address: int, physical: int, rights: Rights = KERNEL_RIGHTS, size: int | None = None
    ) -> None:
        """Map one page, or a larger one of `size` bytes."""
        size = size or self.page
        depth = next(n for n, (shift, _) in enumerate(self.levels) if 1 << shift == size)
        large = depth < len(self.levels) - 1
        self.put(self.reach(address, depth), self.to_page(physical, rights, large))

    def to_page(self, physical: int, rights: Rights, large: bool) -> int:
        """An entry that maps a page."""
        if self.arm:
            entry = physical | (1 if large else 3) | 1 << 10
            entry |= 0 if rights.write else 1 << 7
            entry |= 1 << 6 if rights.user else 0
            return entry | (0 if rights.execute else 1 << 53)
        entry = physical | 1 | (rights.write << 1) | (rights.user << 2) | (large << 7)
        return entry | (0 if rights.execute or self.entry_size == 4 else 1 << 63)

    def physical(self, *holes: tuple[int, int]) -> RunMemory:
        """The memory, without the addresses [start, end) of `holes`."""
        starts, ends, at = array("Q"), array("Q"), 0
        for start, end in (*sorted(holes), (len(self.memory), 0)):
            starts.append(at)
            ends.append(start)
            at = end
        source = BytesSource(bytes(self.memory), "physical")
        return RunMemory(source, starts, ends, array("Q", starts), space="physical")
