"""An address space made of physical memory and a page table.

A read is translated in extents, physically contiguous pieces that may be many pages long, and each
extent is read at once. Nothing is filled in: an address without a translation and a page that the
dump does not hold are faults, and a read returns all of its bytes or none.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import progress
from kvmtool.arch.pages import ABSENT, permissions
from kvmtool.errors import FaultError
from kvmtool.memory import Piece, Region, RunMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.arch.pages import Window
    from kvmtool.arch.walker import Walker
    from kvmtool.memory import Memory

BUDGET = 64 << 20  # bytes that translations kept in memory may take
_EXTENT_COST = 164  # bytes a kept extent takes: three numbers, and their places in four lists
_WINDOW_COST = 400
_SLICED = 1 << 15  # bytes of a read from which on it pays to know where extents are in the file
_PIECE = 1 << 20  # bytes of one piece, and of one step of a search


class Mapping(NamedTuple):
    """[start, start + size) is mapped to `physical` on, with `permissions` ("rwxu").

    Where it cannot be read `reason` says why ("absent", "compressed", ...); of what is not even
    translated `physical` is None and `permissions` empty.
    """

    start: int
    size: int
    physical: int | None
    permissions: str
    reason: str


class PagedMemory:
    """`Memory` through page tables. `space` is "kernel", or names a process."""

    def __init__(
        self, physical: Memory, walker: Walker, *, space: str = "kernel", budget: int = BUDGET
    ) -> None:
        """`budget` bytes are for translations already made; with 0 each is made anew.

        A machine that runs changes its page tables: give 0 for one. One that can be let run has a
        `physical` with `watch`, and tells us to `forget`.
        """
        self.space = space
        self.physical, self.walker = physical, walker
        self._read = physical.read
        self._view: Callable[[int, int], memoryview | bytes]
        self._view = getattr(physical, "view", physical.read)
        self._runs = physical if isinstance(physical, RunMemory) else None
        self._places: dict[int, list[int | None]] = {}
        self._shift = walker.window_bits
        self._windows: dict[int, Window] = {}
        self._lock = Lock()  # for what changes `_windows`; looking there needs none
        self.budget = self._left = budget
        watch: Callable[[PagedMemory], None] | None = getattr(physical, "watch", None)
        if watch is not None:
            watch(self)

    def __repr__(self) -> str:
        return f"<PagedMemory {self.space} {self.walker!r}>"

    def __len__(self) -> int:
        """How many regions there are: walks all tables."""
        return sum(1 for _ in self.regions())

    def __bool__(self) -> bool:
        return True

    def forget(self) -> None:
        """Translate anew from here on: the page tables may have changed."""
        with self._lock:
            self._windows.clear()
            self._places.clear()
            self._left = self.budget

    def translate(self, address: int) -> tuple[int, int]:
        """(physical address, bytes up to the end of the page). Raises `FaultError`."""
        physical, size, reason = self.walker.lookup(address)
        if physical is None:
            raise FaultError(self.space, address, 1, reason)
        return physical, size

    # reading

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        window = self._windows.get(address >> self._shift)
        if window is not None:  # most reads lie in one extent of a window that is known
            starts = window.starts
            at = bisect_right(starts, address) - 1
            delta = window.deltas[at]
            if delta is not None and address + size <= starts[at + 1]:
                try:
                    return self._read(address + delta, size)
                except FaultError as fault:
                    raise self._absent(fault, delta, size) from None
        return self._gather(address, size)

    def _gather(self, address: int, size: int) -> bytes:
        """The range by its extents: all are translated before the first is read."""
        if size <= 0:
            return b""
        if size > _SLICED and self._runs is not None and self.budget:
            slices = self._slices(self._runs, address, address + size)
            if slices is not None:
                return b"".join(slices)
        extents = self._extents(address, size)
        parts: list[memoryview | bytes] = []
        try:
            for physical, length in extents:
                parts.append(self._view(physical, length))
        except FaultError as fault:
            count = len(parts)
            parts.clear()  # a view that a traceback keeps would keep the file open
            start = address + sum(length for _, length in extents[:count])
            raise self._absent(fault, extents[count][0] - start, size) from None
        return b"".join(parts)

    def _slices(self, runs: RunMemory, address: int, end: int) -> list[memoryview] | None:
        """The range as slices of the mapped file, if there is one and all of it lies there."""
        whole = runs.mapped()
        if whole is None:
            return None
        slices: list[memoryview] = []
        while True:
            window = self._window(address)
            places = self._places.get(address >> self._shift) or self._place(runs, address, window)
            at = bisect_right(window.starts, address)
            for stop, place in zip(
                islice(window.starts, at, None), islice(places, at - 1, None), strict=True
            ):
                if place is None:
                    return None
                if stop >= end:
                    slices.append(whole[address + place : end + place])
                    return slices
                slices.append(whole[address + place : stop + place])
                address = stop

    def _place(self, runs: RunMemory, address: int, window: Window) -> list[int | None]:
        """What leads from each extent of a window to the file; None where it is not in one run."""
        places: list[int | None] = []
        starts = window.starts
        for start, end, delta in zip(starts, islice(starts, 1, None), window.deltas, strict=False):
            place = None if delta is None else runs.place(start + delta, end + delta)
            places.append(None if place is None or delta is None else place + delta)
        index = address >> self._shift
        if index in self._windows:
            self._places[index] = places
        return places

    def _extents(self, address: int, size: int) -> list[tuple[int, int]]:
        """The range as (physical address, bytes). Raises `FaultError`."""
        extents: list[tuple[int, int]] = []
        at = address
        for stop, delta, reason in self._pieces(address, address + size):
            if delta is None:
                self._check(address, at, size)  # what is absent before it is the first bad one
                raise FaultError(self.space, at, size, reason)
            extents.append((at + delta, stop - at))
            at = stop
        return extents

    def check(self, address: int, size: int) -> None:
        """Raises `FaultError` for the first bad address of the range; reads only page tables."""
        self._check(address, address + size, size)

    def _check(self, address: int, end: int, size: int) -> None:
        for start, length, physical, reason in self._spans(address, end - address):
            if physical is None:
                raise FaultError(self.space, start, size, reason)
            try:
                self.physical.check(physical, length)
            except FaultError as fault:
                raise self._absent(fault, physical - start, size) from None

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`; a piece with data has at most 1 MiB."""
        for start, length, physical, reason in self._spans(address, size):
            if physical is None:
                yield Piece(start, length, None, reason)
                continue
            end = physical + length
            for begin in range(physical, end, _PIECE):
                for piece in self.physical.read_pieces(begin, min(_PIECE, end - begin)):
                    at = piece.address - physical + start
                    yield Piece(at, piece.size, piece.data, piece.reason and ABSENT)

    def _absent(self, fault: FaultError, delta: int, size: int) -> FaultError:
        """The fault at the virtual address."""
        return FaultError(self.space, fault.address - delta, size, ABSENT)

    # translation

    def _window(self, address: int) -> Window:
        index = address >> self._shift
        window = self._windows.get(index)
        return self._make_window(index, address) if window is None else window

    def _make_window(self, index: int, address: int) -> Window:
        with self._lock:
            window = self._windows.get(index)
            if window is not None:  # another thread was faster
                return window
            window = self.walker.window(address)
            cost = _WINDOW_COST + _EXTENT_COST * len(window.deltas)
            while self._left < cost and self._windows:
                oldest = next(iter(self._windows))
                gone = self._windows.pop(oldest)
                self._places.pop(oldest, None)
                self._left += _WINDOW_COST + _EXTENT_COST * len(gone.deltas)
            if cost <= self._left:
                self._left -= cost
                self._windows[index] = window
            return window

    def _spans(self, address: int, size: int) -> Iterator[tuple[int, int, int | None, str]]:
        """The range as (address, bytes, physical address or None, reason), in address order."""
        end = address + size
        start, stop, before, why = address, address, None, ""
        for piece_end, delta, reason in self._pieces(address, end):
            if stop > start and (delta, reason) != (before, why):
                yield start, stop - start, None if before is None else start + before, why
                start = stop
            stop, before, why = piece_end, delta, reason
        if stop > start:
            yield start, stop - start, None if before is None else start + before, why

    def _pieces(self, address: int, end: int) -> Iterator[tuple[int, int | None, str]]:
        """The range as (end, delta, reason), in address order."""
        return self._known(address, end) if self.budget else self._anew(address, end)

    def _known(self, address: int, end: int) -> Iterator[tuple[int, int | None, str]]:
        while address < end:
            starts, deltas, what = self._window(address)
            at = bisect_right(starts, address)
            while address < end and at < len(starts):
                address, delta = starts[at], deltas[at - 1]
                if address > end:
                    address = end
                yield address, delta, "" if delta is not None else str(what[at - 1])
                at += 1

    def _anew(self, address: int, end: int) -> Iterator[tuple[int, int | None, str]]:
        while address < end:
            physical, size, reason = self.walker.lookup(address)
            delta = None if physical is None else physical - address
            address = min(address + size, end)
            yield address, delta, reason

    # what there is

    @cached_property
    def _present(self) -> tuple[list[int], list[int]]:
        """Starts and ends of all physical memory there is."""
        regions = list(self.physical.regions())
        return [r.start for r in regions], [r.start + r.size for r in regions]

    def _held(self, physical: int, size: int) -> Iterator[tuple[int, int, bool]]:
        """A physical range as (start, end, whether it is there)."""
        starts, ends = self._present
        if not starts:  # a live machine that does not tell what memory it has
            yield physical, physical + size, True
            return
        end = physical + size
        at = max(bisect_right(starts, physical) - 1, 0)
        while physical < end:
            while at < len(starts) and ends[at] <= physical:
                at += 1
            following = starts[at] if at < len(starts) else end
            held = following <= physical
            stop = min(ends[at] if held else following, end)
            yield physical, stop, held
            physical = stop

    def mappings(self) -> Iterator[Mapping]:
        """All that the tables map, in address order, neighbours as one where they continue.

        What is mapped but absent from the dump, or compressed, is there with its reason. Raises
        `FormatError` when the tables lead in circles.
        """
        last: Mapping | None = None
        for mapping in self._mappings():
            if last is not None and _continues(last, mapping):
                last = last._replace(size=last.size + mapping.size)
                continue
            if last is not None:
                yield last
            last = mapping
        if last is not None:
            yield last

    def _mappings(self) -> Iterator[Mapping]:
        for starts, deltas, what in self.walker.windows():
            for at, delta in enumerate(deltas):
                start, end, said = starts[at], starts[at + 1], what[at]
                if delta is None:
                    if said != "unmapped":
                        yield Mapping(start, end - start, None, "", str(said))
                    continue
                assert isinstance(said, int)
                allowed = permissions(said)
                for begin, stop, held in self._held(start + delta, end - start):
                    reason = "" if held else ABSENT
                    yield Mapping(begin - delta, stop - begin, begin, allowed, reason)

    def regions(self) -> Iterator[Region]:
        """See `Memory.regions`."""
        start = end = 0
        for mapping in self._mappings():
            if mapping.reason:
                continue
            if mapping.start != end:
                if end > start:
                    yield Region(start, end - start)
                start = mapping.start
            end = mapping.start + mapping.size
        if end > start:
            yield Region(start, end - start)

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """Addresses of `needle` that are multiples of `step` bytes; pages may lie apart."""
        passed = 0
        for region in self.regions():
            carry = b""
            end = region.start + region.size
            for start in range(region.start, end, _PIECE):
                data = carry + self.read(start, min(_PIECE, end - start))
                passed += len(data)
                progress.step("searching", passed, 0)
                first = start - len(carry)
                at = data.find(needle)
                while at >= 0:
                    beside = -(first + at) % step
                    if beside == 0:
                        yield first + at
                        beside = step
                    at = data.find(needle, at + beside)
                carry = data[len(data) - len(needle) + 1 :] if len(needle) > 1 else b""
        progress.end("searching")


def _continues(before: Mapping, after: Mapping) -> bool:
    if before.start + before.size != after.start:
        return False
    if (before.permissions, before.reason) != (after.permissions, after.reason):
        return False
    if before.physical is None or after.physical is None:
        return before.physical is after.physical
    return before.physical + before.size == after.physical
