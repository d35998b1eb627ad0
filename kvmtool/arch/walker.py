"""The descent through a page table, which is the same on every processor.

A page table is a tree. Each level takes some bits of an address as an index, and the entry found
there leads to the next table, maps a page, or does not exist. The processors differ in the levels
and in what the bits of an entry mean: that is in the subclasses (`x86_pages`, `arm64_pages`).

Nothing here loops on what it reads: a descent ends after as many steps as there are levels, so a
table that points to itself is only one more table, and a listing stops at a limit.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.arch.pages import (
    ABSENT,
    ALL_RIGHTS,
    NON_CANONICAL,
    PAGE,
    TABLE,
    UNMAPPED,
    Level,
    Step,
    Walk,
    Window,
    permissions,
)
from kvmtool.errors import FaultError, FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.memory import Memory

# A memory of n pages needs about n / 512 tables for one address space; each has one place in it,
# unless halves share tables (i386 in long mode) or a table maps itself.
_PAGES_PER_TABLE = 64
_TABLES_AT_LEAST = 4096
_VISITS = 64
_PAGE = 4096


class _Place(NamedTuple):
    """Where a descent came to: (table, index, entry) of each step, and what the last leads to."""

    steps: list[tuple[int, int, int | None]]
    outcome: str
    target: int
    rights: int


class _Visits:
    """How often tables were visited in one listing, against what is plausible."""

    def __init__(self, root: int, limit: int) -> None:
        self._root, self._left = root, limit
        self._of: dict[int, int] = {}

    def visit(self, table: int, start: int) -> None:
        """Count a visit, for the address `start` on. Raises `FormatError`."""
        self._left -= 1
        count = self._of[table] = self._of.get(table, 0) + 1
        if self._left < 0 or count > _VISITS:
            raise FormatError(
                f"page tables at {self._root:#x}",
                None,
                f"the table at {table:#x} comes up {count} times by {start:#x}, "
                f"{sum(self._of.values())} tables in all: they lead in circles, or are no tables",
            )


class Walker:
    """A page table in physical memory; a subclass says what its entries mean.

    `mode` names the kind of table, `root` is the physical address of its top, `levels` go from the
    top down to the pages; `ranges` are the addresses [start, end) the top table stands for, in the
    order of its entries (what lies between them is not canonical).
    """

    mode: str
    levels: tuple[Level, ...]
    ranges: tuple[tuple[int, int], ...]
    entry_size = 8
    frame = 0  # bits of a last level's entry that are the page's address
    keep = 0  # those, and the bits that are equal in pages that are one piece

    def __init__(self, physical: Memory, root: int) -> None:
        self.physical, self.root = physical, root
        last = self.levels[-1]
        self.page_size = 1 << last.shift
        self.window_bits = last.shift + last.bits

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.mode} root={self.root:#x}>"

    # what a subclass says

    def decode(self, depth: int, entry: int) -> tuple[str, int]:
        """What an entry at `depth` leads to: (TABLE or PAGE, physical address) or (reason, 0)."""
        raise NotImplementedError

    def rights(self, depth: int, entry: int) -> int:
        """What an entry allows; a mapping allows what all its entries allow."""
        raise NotImplementedError

    def flags(self, depth: int, entry: int) -> str:
        """The bits of an entry in words."""
        raise NotImplementedError

    # one address

    def holds(self, address: int) -> bool:
        """Whether `address` is canonical: the tables can have an entry for it."""
        return any(start <= address < end for start, end in self.ranges)

    def _gap(self, address: int) -> tuple[int, int]:
        """The addresses around one that is not canonical which are not, either."""
        start = max((end for _, end in self.ranges if end <= address), default=0)
        return start, min((begin for begin, _ in self.ranges if begin > address), default=2 << 64)

    def lookup(self, address: int) -> tuple[int | None, int, str]:
        """(physical address, bytes up to the end of its page, ""), or (None, bytes, reason)."""
        place = self._descend(address, len(self.levels))
        if place.outcome == NON_CANONICAL:
            return None, self._gap(address)[1] - address, NON_CANONICAL
        span = self._span(place)
        inside = address & (span - 1)
        if place.outcome != PAGE:
            return None, span - inside, place.outcome
        return place.target + inside, span - inside, ""

    def translate(self, address: int) -> tuple[int, int]:
        """(physical address, bytes up to the end of its page).

        Raises `FaultError`. The page itself may still be absent from the dump.
        """
        physical, size, reason = self.lookup(address)
        if physical is None:
            raise FaultError("kernel", address, 1, reason)
        return physical, size

    def walk(self, address: int) -> Walk:
        """Every step of the translation. Raises nothing: `Walk.reason` says what is wrong."""
        place = self._descend(address, len(self.levels))
        steps = tuple(
            Step(
                self.levels[depth].name,
                table,
                index,
                entry,
                "" if entry is None else self.flags(depth, entry),
            )
            for depth, (table, index, entry) in enumerate(place.steps)
        )
        physical, size, reason = self.lookup(address)
        allowed = "" if physical is None else permissions(place.rights)
        return Walk(steps, physical, size, allowed, reason)

    def _span(self, place: _Place) -> int:
        """Bytes that the answer of a descent stands for."""
        level = self.levels[len(place.steps) - 1]
        absent = place.steps[-1][2] is None
        return 1 << (level.shift + level.bits if absent else level.shift)

    def _descend(self, address: int, depths: int) -> _Place:
        """Go down at most `depths` levels."""
        steps: list[tuple[int, int, int | None]] = []
        if not self.holds(address):
            return _Place(steps, NON_CANONICAL, 0, 0)
        table, rights = self.root, ALL_RIGHTS
        for depth in range(depths):
            level = self.levels[depth]
            index = address >> level.shift & (1 << level.bits) - 1
            try:
                data = self.physical.read(table + index * self.entry_size, self.entry_size)
            except FaultError:
                steps.append((table, index, None))
                return _Place(steps, ABSENT, 0, 0)
            entry = int.from_bytes(data, "little")
            steps.append((table, index, entry))
            outcome, target = self.decode(depth, entry)
            if outcome != TABLE:
                rights &= self.rights(depth, entry) if outcome == PAGE else 0
                return _Place(steps, outcome, target, rights)
            rights &= self.rights(depth, entry)
            table = target
        return _Place(steps, TABLE, table, rights)

    # many addresses

    def window(self, address: int) -> Window:
        """The translations around `address`: those of its leaf table, or of one larger page."""
        place = self._descend(address, len(self.levels) - 1)
        if place.outcome == TABLE:
            start = address & -(1 << self.window_bits)
            return self.leaf(place.target, place.rights, start)
        if place.outcome == NON_CANONICAL:
            return Window([*self._gap(address)], [None], [NON_CANONICAL])
        span = self._span(place)
        start = address & -span
        if place.outcome == PAGE:
            return Window([start, start + span], [place.target - start], [place.rights])
        return Window([start, start + span], [None], [place.outcome])

    def entries(self, table: int, bits: int) -> Sequence[int]:
        """The 2**bits entries of the table at physical address `table`. Raises `FaultError`."""
        entries = array("Q" if self.entry_size == 8 else "I")
        entries.frombytes(self.physical.read(table, self.entry_size << bits))
        if sys.byteorder == "big":
            entries.byteswap()
        return entries

    def leaf(self, table: int, rights: int, start: int) -> Window:
        """The translations of the leaf table at physical address `table`, `start` the first."""
        page, keep, depth = self.page_size, self.keep, len(self.levels) - 1
        frame, flags = self.frame, self.keep ^ self.frame
        window = Window([], [], [])
        starts, deltas, what = window
        try:
            entries = self.entries(table, self.levels[depth].bits)
        except FaultError:
            return Window([start, start + (1 << self.window_bits)], [None], [ABSENT])
        expected, stride, same = -1, 0, -1
        for index, entry in enumerate(entries):
            if entry & keep == expected:  # goes on where the entry before it ended
                expected += stride
                continue
            address = start + index * page
            if entry & flags == same:  # a page like the one before it, but elsewhere
                starts.append(address)
                deltas.append((entry & frame) - address)
                what.append(what[-1])
                expected = (entry & keep) + page
                continue
            outcome, target = self.decode(depth, entry)
            if outcome == PAGE:
                expected, stride, same = (entry & keep) + page, page, entry & flags
                starts.append(address)
                deltas.append(target - address)
                what.append(rights & self.rights(depth, entry))
                continue
            expected, stride, same = (-1 if entry else 0), 0, -1
            if not what or what[-1] != outcome:
                starts.append(address)
                deltas.append(None)
                what.append(outcome)
        starts.append(start + (1 << self.window_bits))
        return window

    def windows(self) -> Iterator[Window]:
        """Everything that is not plainly unmapped, in address order.

        Raises `FormatError` when tables come again and again, or are more than the memory could
        need: they lead in circles, or are not page tables.
        """
        pages = sum(region.size for region in self.physical.regions()) // _PAGE
        visits = _Visits(self.root, _TABLES_AT_LEAST + pages // _PAGES_PER_TABLE)
        return self._below(0, self.root, ALL_RIGHTS, self.ranges[0][0], visits)

    def _below(
        self, depth: int, table: int, rights: int, start: int, visits: _Visits
    ) -> Iterator[Window]:
        visits.visit(table, start)
        if depth == len(self.levels) - 1:
            yield self.leaf(table, rights, start)
            return
        level = self.levels[depth]
        try:
            entries = self.entries(table, level.bits)
        except FaultError:
            yield Window([start, start + (1 << level.shift + level.bits)], [None], [ABSENT])
            return
        for index, entry in enumerate(entries):
            if entry:
                address = self._top(index) if depth == 0 else start + (index << level.shift)
                yield from self._entry(depth, entry, rights, address, visits)

    def _entry(
        self, depth: int, entry: int, rights: int, start: int, visits: _Visits
    ) -> Iterator[Window]:
        outcome, target = self.decode(depth, entry)
        span = 1 << self.levels[depth].shift
        if outcome == TABLE:
            both = rights & self.rights(depth, entry)
            yield from self._below(depth + 1, target, both, start, visits)
        elif outcome == PAGE:
            both = rights & self.rights(depth, entry)
            yield Window([start, start + span], [target - start], [both])
        elif outcome != UNMAPPED:
            yield Window([start, start + span], [None], [outcome])

    def _top(self, index: int) -> int:
        """The address that entry `index` of the top table stands for."""
        offset = index << self.levels[0].shift
        for start, end in self.ranges:
            if offset < end - start:
                return start + offset
            offset -= end - start
        raise AssertionError("the ranges are as long as the table")
