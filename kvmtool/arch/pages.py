"""Page tables: what every walk has in common.

A page table is a tree. Each level takes some bits of an address as an index, and the entry found
there leads to the next table, maps a page, or does not exist. The processors differ in the levels
and in what the bits of an entry mean (`x86_pages`, `arm64_pages`); the descent is the same.

Nothing here loops on what it reads: a descent ends after as many steps as there are levels, so a
table that points to itself is only one more table, and a listing stops at a limit.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.memory import Memory

WRITE, EXECUTE, USER = 1, 2, 4
ALL_RIGHTS = WRITE | EXECUTE | USER

UNMAPPED, ABSENT, COMPRESSED = "unmapped", "absent", "compressed"
MALFORMED, NON_CANONICAL = "malformed", "non-canonical"
TABLE, PAGE = "table", "page"  # what an entry leads to; any other word is why it leads nowhere

# A memory of n pages needs about n / 512 leaf tables for one address space, and few others.
_TABLES_PER_PAGE = 1 / 32
_TABLES_AT_LEAST = 16384
_PAGE = 4096


class Level(NamedTuple):
    """A level of the tree: its `name`, the lowest address bit it resolves, its index bits."""

    name: str
    shift: int
    bits: int


class Step(NamedTuple):
    """One lookup: entry number `slot` of the table at physical address `table` is `entry`.

    `entry` is None when the table is not in the dump; `flags` are its bits in words.
    """

    level: str
    table: int
    slot: int
    entry: int | None
    flags: str


class Walk(NamedTuple):
    """How an address is translated, and to what.

    `physical` is None, and `reason` says why, where there is no translation; `size` is the bytes
    of the page (or of the hole) from the address on; `permissions` as in `permissions()`.
    """

    steps: tuple[Step, ...]
    physical: int | None
    size: int
    permissions: str
    reason: str


class Window(NamedTuple):
    """Translations of neighbouring addresses: extent i is [starts[i], starts[i + 1]).

    `deltas[i]` is what to add for the physical address, None where there is none; `what[i]` is
    the rights of the mapping, or the reason there is none.
    """

    starts: list[int]
    deltas: list[int | None]
    what: list[int | str]


class _Place(NamedTuple):
    """Where a descent came to: (table, index, entry) of each step, and what the last leads to."""

    steps: list[tuple[int, int, int | None]]
    outcome: str
    target: int
    rights: int


def permissions(rights: int) -> str:
    """Rights as text: "r", then w, x and u (user) or a dash for each that is missing."""
    return (
        "r"
        + ("w" if rights & WRITE else "-")
        + ("x" if rights & EXECUTE else "-")
        + ("u" if rights & USER else "-")
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
    keep = 0  # bits that are equal, but for the address, in pages that are one piece

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
        window = Window([], [], [])
        starts, deltas, what = window
        try:
            entries = self.entries(table, self.levels[depth].bits)
        except FaultError:
            return Window([start, start + (1 << self.window_bits)], [None], [ABSENT])
        expected, stride = -1, 0
        for index, entry in enumerate(entries):
            if entry & keep == expected:  # goes on where the entry before it ended
                expected += stride
                continue
            outcome, target = self.decode(depth, entry)
            address = start + index * page
            if outcome == PAGE:
                expected, stride = (entry & keep) + page, page
                starts.append(address)
                deltas.append(target - address)
                what.append(rights & self.rights(depth, entry))
                continue
            expected, stride = (-1 if entry else 0), 0
            if not what or what[-1] != outcome:
                starts.append(address)
                deltas.append(None)
                what.append(outcome)
        starts.append(start + (1 << self.window_bits))
        return window

    def windows(self) -> Iterator[Window]:
        """Everything that is not plainly unmapped, in address order.

        Raises `FormatError` when there are more tables than the memory could need: they lead in
        circles, or are not page tables.
        """
        pages = sum(region.size for region in self.physical.regions()) // _PAGE
        left = [_TABLES_AT_LEAST + int(pages * _TABLES_PER_PAGE)]
        return self._below(0, self.root, ALL_RIGHTS, self.ranges[0][0], left)

    def _below(
        self, depth: int, table: int, rights: int, start: int, left: list[int]
    ) -> Iterator[Window]:
        left[0] -= 1
        if left[0] < 0:
            raise FormatError(
                f"page tables at {self.root:#x}",
                None,
                f"they go on at {start:#x} after more tables than this memory could need: "
                "they lead in circles, or this is no page table",
            )
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
                yield from self._entry(depth, entry, rights, address, left)

    def _entry(
        self, depth: int, entry: int, rights: int, start: int, left: list[int]
    ) -> Iterator[Window]:
        outcome, target = self.decode(depth, entry)
        span = 1 << self.levels[depth].shift
        if outcome == TABLE:
            both = rights & self.rights(depth, entry)
            yield from self._below(depth + 1, target, both, start, left)
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
