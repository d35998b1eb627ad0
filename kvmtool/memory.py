"""Address spaces over runs of bytes.

A `Memory` answers as the `/dev/kmem` of Amit Singh's article does: every page of a request is
checked before any byte is returned, and the first bad address is named. `read_partial` gives the
readable prefix (libkvm's short read), `read_pieces` every readable piece. Holes are never filled.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from itertools import compress, islice
from operator import gt, lt
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmtool import progress
from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.source import Source

ADDRESS_LIMIT = 1 << 64
_FIND_PIECE = 64 << 20  # bytes searched between two words about how far it is
_SPARSE = 1 << 20  # bytes of a run in which holes of the file are worth a look
ZERO_FILL = (1 << 64) - 1  # the offset of bytes that the image defines as zero (its bss)


class Piece(NamedTuple):
    """`size` bytes at `address`: their `data`, or None and the `reason` they cannot be read."""

    address: int
    size: int
    data: bytes | None
    reason: str = ""


class Region(NamedTuple):
    """Addresses [start, start + size) that can be read."""

    start: int
    size: int


class Memory(Protocol):
    """An address space: `space` is "kernel", "physical" or names a process."""

    space: str

    def read(self, address: int, size: int) -> bytes:
        """All `size` bytes at `address`, or `FaultError` naming the first bad address."""
        ...

    def check(self, address: int, size: int) -> None:
        """Raises `FaultError` for the first bad address of the range; reads nothing."""
        ...

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """The range in address order, readable and unreadable pieces alternating."""
        ...

    def regions(self) -> Iterator[Region]:
        """Everything that can be read, in address order."""
        ...

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """Addresses of `needle` that are multiples of `step` bytes."""
        ...

    def __len__(self) -> int:
        """How many runs of addresses there are."""
        ...


def read_partial(memory: Memory, address: int, size: int) -> bytes:
    """The readable prefix of the range, as libkvm's short read; may be empty."""
    prefix = []
    for piece in memory.read_pieces(address, size):
        if piece.data is None:
            break
        prefix.append(piece.data)
    return b"".join(prefix)


def read_zero_filled(memory: Memory, address: int, size: int) -> bytes:
    """The range with zeros where nothing can be read: only for a user who asked for zeros."""
    return b"".join(
        bytes(piece.size) if piece.data is None else piece.data
        for piece in memory.read_pieces(address, size)
    )


def read_cstring(memory: Memory, address: int, limit: int, chunk: int = 64) -> bytes:
    """The bytes up to a NUL (not included), at most `limit`.

    Never reads past the page that holds the NUL; raises `FaultError` when it comes to a hole.
    """
    parts: list[bytes] = []
    left = limit
    while left > 0:
        part = memory.read(address, min(chunk - address % chunk, left))
        end = part.find(b"\0")
        if end >= 0:
            parts.append(part[:end])
            break
        parts.append(part)
        address += len(part)
        left -= len(part)
    return b"".join(parts)


class RunMemory:
    """Sorted runs of a source: addresses [starts[i], ends[i]) lie at file offset offsets[i]."""

    def __init__(
        self,
        source: Source,
        starts: array[int],
        ends: array[int],
        offsets: array[int],
        *,
        space: str = "kernel",
        lost: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Runs in any order; where they overlap, the earlier in the arrays wins.

        `lost` are address ranges that the file promises but does not hold: a fault in one of them
        is "absent", anywhere else "unmapped".
        """
        self.space = space
        self.source = source
        self._view: Callable[[int, int], memoryview | bytes] | None
        self._view = getattr(source, "view", None)
        if not all(map(lt, starts, ends)):  # a run of no bytes would cut a hole in two
            held = list(map(lt, starts, ends))
            starts, ends, offsets = (
                array("Q", compress(column, held)) for column in (starts, ends, offsets)
            )
        # a run that ends before the next begins comes before it: no run is empty any more
        if not _disjoint(starts, ends):
            starts, ends, offsets = _first_wins(starts, ends, offsets)
        self._starts, self._ends, self._offsets = starts, ends, offsets
        self._lost = sorted(lost)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address + size <= self._ends[at]:
            offset = self._offsets[at]
            if offset == ZERO_FILL:
                return bytes(size)
            return self.source.read_at(offset + address - self._starts[at], size)
        if size == 0:
            return b""
        self.check(address, size)
        spans = list(self.spans(address, size))
        return b"".join(self._get(offset, length) for _, length, offset in spans)

    def view(self, address: int, size: int) -> memoryview | bytes:
        """As `read`, without a copy where it can be; not to be kept (see `FileSource.view`)."""
        at = bisect_right(self._starts, address) - 1
        if self._view is None or at < 0 or address + size > self._ends[at]:
            return self.read(address, size)
        offset = self._offsets[at]
        if offset == ZERO_FILL:
            return bytes(size)
        return self._view(offset + address - self._starts[at], size)

    def mapped(self) -> memoryview | None:
        """The whole source, if it is a mapped file; not to be kept (see `FileSource.view`)."""
        whole = None if self._view is None else self._view(0, self.source.size)
        return whole if isinstance(whole, memoryview) else None

    def place(self, start: int, end: int) -> int | None:
        """What to add to the addresses [start, end) for offsets in the source, if in one run."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or end > self._ends[at] or self._offsets[at] == ZERO_FILL:
            return None
        return self._offsets[at] - self._starts[at]

    def check(self, address: int, size: int) -> None:
        """Raises `FaultError` for the first bad address of the range; reads nothing."""
        for start, _, held in self.spans(address, size):
            if held is None:
                raise FaultError(self.space, start, size, self._reason(start))

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`."""
        for start, length, offset in self.spans(address, size):
            if offset is None:
                yield Piece(start, length, None, self._reason(start))
            else:
                yield Piece(start, length, self._get(offset, length))

    def _get(self, offset: int | None, size: int) -> bytes:
        assert offset is not None
        return bytes(size) if offset == ZERO_FILL else self.source.read_at(offset, size)

    def spans(self, address: int, size: int) -> Iterator[tuple[int, int, int | None]]:
        """The range as (address, size, file offset or None), in address order."""
        end = address + size
        at = max(bisect_right(self._starts, address) - 1, 0)
        while address < end:
            while at < len(self._starts) and self._ends[at] <= address:
                at += 1
            start = self._starts[at] if at < len(self._starts) else end
            if start > address:  # so too where a wild pointer led past the last address of all
                stop = min(start, end)
                yield address, stop - address, None
            else:
                stop = min(self._ends[at], end)
                offset = self._offsets[at]
                inside = offset if offset == ZERO_FILL else offset + address - start
                yield address, stop - address, inside
            address = stop

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts (from, to) of the addresses [start, end) that the file holds bytes of.

        All others read as zeros, or not at all: a sparse file need not be read to know that.
        """
        for address, size, offset in self.spans(start, end - start):
            if offset is not None and offset != ZERO_FILL:
                for first, last in self._stored(offset, offset + size):
                    yield address + first - offset, address + last - offset

    def _stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """See `FileSource.stored`; what is read sooner than asked about counts as stored."""
        parts = getattr(self.source, "stored", None)
        if parts is None or end - start < _SPARSE:
            yield start, end
        else:
            yield from parts(start, end)

    def _reason(self, address: int) -> str:
        at = bisect_right(self._lost, (address, ADDRESS_LIMIT)) - 1
        return "absent" if at >= 0 and address < self._lost[at][1] else "unmapped"

    def regions(self) -> Iterator[Region]:
        """See `Memory.regions`; runs that touch are one region."""
        start = end = None
        for run_start, run_end in zip(self._starts, self._ends, strict=True):
            if run_start == end:
                end = run_end
                continue
            if start is not None and end is not None:
                yield Region(start, end - start)
            start, end = run_start, run_end
        if start is not None and end is not None:
            yield Region(start, end - start)

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """Addresses of `needle` inside single runs, those that are multiples of `step` bytes."""
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            if offset == ZERO_FILL:
                continue
            whole = offset, offset + end - start
            # what holds a zero may lie in a hole of the file
            for first, stop in (whole,) if 0 in needle else self._stored(*whole):
                at = self._find(needle, first, stop)
                while at >= 0:
                    address = start + at - offset
                    beside = -address % step
                    if beside == 0:
                        yield address
                        beside = step
                    at = self._find(needle, at + beside, stop)
        progress.end("searching")

    def _find(self, needle: bytes, start: int, stop: int) -> int:
        """`Source.find`, telling how far it is."""
        while start + len(needle) <= stop:
            progress.step("searching", start, self.source.size)
            end = min(start + _FIND_PIECE + len(needle) - 1, stop)
            at = self.source.find(needle, start, end)
            if at >= 0:
                return at
            start += _FIND_PIECE
        return -1


def _disjoint(starts: array[int], ends: array[int]) -> bool:
    return not any(map(gt, ends, islice(starts, 1, None)))


def _first_wins(
    starts: array[int], ends: array[int], offsets: array[int]
) -> tuple[array[int], array[int], array[int]]:
    """Sort the runs and cut overlaps so that the run first in the arrays keeps its addresses."""
    order = sorted(range(len(starts)), key=starts.__getitem__)
    out: tuple[array[int], array[int], array[int]] = (array("Q"), array("Q"), array("Q"))
    active: list[int] = []  # indices of runs that cover `at`, the first in the arrays on top
    at = following = 0
    while following < len(order) or active:
        if not active:
            at = starts[order[following]]
        while following < len(order) and starts[order[following]] <= at:
            heapq.heappush(active, order[following])
            following += 1
        while active and ends[active[0]] <= at:
            heapq.heappop(active)
        if not active:
            continue
        top = active[0]
        stop = ends[top]
        if following < len(order):
            stop = min(stop, starts[order[following]])
        base = offsets[top]
        _append(out, at, stop, base if base == ZERO_FILL else base + at - starts[top])
        at = stop
    return out


def _append(
    out: tuple[array[int], array[int], array[int]], start: int, end: int, offset: int
) -> None:
    starts, ends, offsets = out
    joins = bool(starts) and ends[-1] == start
    if joins and offset != ZERO_FILL and offsets[-1] + start - starts[-1] == offset:
        ends[-1] = end
        return
    starts.append(start)
    ends.append(end)
    offsets.append(offset)
