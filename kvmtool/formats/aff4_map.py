"""The map of an AFF4 volume: which addresses lie where in which of its streams.

What no range of the map has is not there, although the standard would read it as zeros; so is what
the writer calls unknown or unreadable, and what lies in another volume of a split or striped set.

Source: AFF4 Standard 1.0a, sections 4 and 7; aff4_map.h and lexicon.inc of c-aff4
(github.com/Velocidex/c-aff4), for pmem 2 as of 2015.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from kvmtool.errors import FormatError, UnsupportedError
from kvmtool.formats.aff4_stream import Constant, ImageStream, Parts, chunking_of
from kvmtool.formats.aff4_volume import SCHEMA
from kvmtool.memory import ZERO_FILL
from kvmtool.source import SliceSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.formats.aff4_volume import Volume
    from kvmtool.source import Source

# types; the second of each is pmem 2's
MAPS, STREAMS = (SCHEMA + "Map", SCHEMA + "map"), (SCHEMA + "ImageStream", SCHEMA + "image")
_ENCRYPTED = SCHEMA + "EncryptedStream"
_ZEROS = (SCHEMA + "Zero", SCHEMA + "SymbolicStream00")
_ABSENT = (SCHEMA + "UnknownData", SCHEMA + "UnreadableData")
_SYMBOL = re.compile(re.escape(SCHEMA) + r"(?:SymbolicStream([0-9A-Fa-f]{2})|(FF)Device)")
_ENTRY = Struct("<3QI")  # address, length, offset in the target, number of the target
_ENTRIES_LIMIT = 1 << 20  # a machine has dozens of ranges
_TARGETS_LIMIT = 1 << 20  # bytes
_ADDRESS_BITS = 52  # no processor has wider physical addresses
_OFFSET_BITS = 56
_SYMBOLIC_LIMIT = 1 << 40  # bytes of one value, which take no room in the file


class Entry(NamedTuple):
    """`length` bytes at `address` are those from `offset` on of the map's target `number`."""

    address: int
    length: int
    offset: int
    number: int


class _Target(NamedTuple):
    """What a map refers to: the bytes of `source` at `base` of all, zeros, or nothing."""

    source: Source | None
    base: int
    absent: bool
    missing: list[tuple[int, int]]  # ranges of `source` that the volume does not hold


class Runs:
    """The runs of a memory: addresses [starts[i], ends[i]) lie at offsets[i] of `source`."""

    def __init__(self) -> None:
        self.source: Source
        self.starts, self.ends, self.offsets = array("Q"), array("Q"), array("Q")
        self.lost: list[tuple[int, int]] = []
        self.warnings: list[str] = []

    def add(self, start: int, end: int, offset: int) -> None:
        """Take in a run; one of no bytes is none."""
        if start < end:
            self.starts.append(start)
            self.ends.append(end)
            self.offsets.append(offset)

    def lose(self, start: int, end: int) -> None:
        """Note a range that is promised and not there."""
        if start < end:
            self.lost.append((start, end))


def open_stream(volume: Volume, urn: str) -> Source:
    """The bytes of a stream that is no map. Raises `FormatError`, `UnsupportedError`."""
    said = volume.objects.get(urn, {})
    types = set(said.get("a", ()))
    name = volume.source.name
    if not types.isdisjoint(STREAMS):
        old = STREAMS[0] not in types
        return ImageStream(volume, urn, chunking_of(name, urn, said, old))
    if _ENCRYPTED in types:
        raise UnsupportedError(f"{name}: the stream {urn} is encrypted")
    if not types.isdisjoint(MAPS):
        raise UnsupportedError(f"{name}: the map refers to another map, {urn}")
    if urn in volume:  # a member that is the whole stream
        return SliceSource(volume.source, *volume.locate(urn))
    raise FormatError(name, None, f"the volume neither describes nor holds the stream {urn[:200]}")


def flat(volume: Volume, urn: str) -> Runs:
    """A stream that is memory from address 0 on."""
    runs = Runs()
    runs.source = open_stream(volume, urn)
    target = _Target(runs.source, 0, False, _missing(runs.source))
    _take(runs, Entry(0, runs.source.size, 0, 0), target)
    return runs


def read_map(volume: Volume, urn: str, old: bool) -> Runs:
    """The runs of a map; in pmem 2's, which is `old`, length and offset are swapped."""
    runs = Runs()
    entries = list(_entries(volume, urn, old, runs.warnings))
    listed = volume.read(f"{urn}/idx", _TARGETS_LIMIT).decode("utf-8", "replace")
    names = [unquote(line.strip()) for line in listed.splitlines()]
    used: dict[int, int] = {}  # number of a target: bytes of it that are mapped
    for entry in entries:
        if entry.number >= len(names):
            raise FormatError(
                volume.source.name,
                None,
                f"{urn}/map refers to stream {entry.number:#x}, {urn}/idx has {len(names):#x}",
            )
        used[entry.number] = max(used.get(entry.number, 0), entry.offset + entry.length)
    targets: dict[int, _Target] = {}
    base = 0
    for number, size in sorted(used.items()):
        target = targets[number] = _target(volume, names[number], size, base)
        base += target.source.size if target.source is not None else 0
    runs.source = Parts(
        volume.source.name, [t.source for t in targets.values() if t.source is not None]
    )
    for entry in entries:
        _take(runs, entry, targets[entry.number])
    return runs


def _entries(volume: Volume, urn: str, old: bool, warnings: list[str]) -> Iterator[Entry]:
    table = volume.read(f"{urn}/map", _ENTRIES_LIMIT * _ENTRY.size)
    if beside := len(table) % _ENTRY.size:
        warnings.append(f"{urn}/map ends with {beside:#x} bytes that are no entry")
    for fields in _ENTRY.iter_unpack(table[: len(table) - beside]):
        entry = Entry(*fields)
        if old:
            entry = entry._replace(length=entry.offset, offset=entry.length)
        end = max(entry.address, entry.length, entry.address + entry.length)
        if end >> _ADDRESS_BITS or entry.offset >> _OFFSET_BITS:
            raise FormatError(
                volume.source.name,
                None,
                f"{urn}/map has {entry.length:#x} bytes at address {entry.address:#x}, from "
                f"offset {entry.offset:#x} of a stream on: that cannot be",
            )
        yield entry


def _target(volume: Volume, urn: str, size: int, base: int) -> _Target:
    """The target `urn`, of which the first `size` bytes are mapped, as the part at `base`."""
    elsewhere = urn.startswith("aff4://") and urn not in volume.objects and urn not in volume
    if urn in _ABSENT or elsewhere:
        return _Target(None, 0, True, [])
    symbol = _SYMBOL.fullmatch(urn)
    if (symbol or urn in _ZEROS) and size > _SYMBOLIC_LIMIT:
        raise FormatError(
            volume.source.name, None, f"the map has {size:#x} bytes of {urn}, which cannot be"
        )
    if urn in _ZEROS:
        return _Target(None, 0, False, [])
    if symbol:
        byte = int(symbol[1] or symbol[2], 16)
        return _Target(Constant(volume.source.name, byte, size), base, False, [])
    source = open_stream(volume, urn)
    return _Target(source, base, False, _missing(source))


def _missing(source: Source) -> list[tuple[int, int]]:
    return list(source.missing()) if isinstance(source, ImageStream) else []


def _take(runs: Runs, entry: Entry, target: _Target) -> None:
    """Add the runs of an entry: what of it the target has."""
    start, end = entry.address, entry.address + entry.length
    if target.absent:
        runs.lose(start, end)
        return
    if target.source is None:
        runs.add(start, end, ZERO_FILL)
        return
    shift = start - entry.offset  # from the target's offsets to addresses
    at, stop = entry.offset, min(entry.offset + entry.length, target.source.size)
    for low, high in _within(target.missing, at, stop):
        runs.add(at + shift, low + shift, target.base + at)
        runs.lose(low + shift, high + shift)
        at = high
    if at < stop:
        runs.add(at + shift, stop + shift, target.base + at)
    runs.lose(max(at, stop) + shift, end)


def _within(ranges: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """The sorted `ranges` as far as they lie in [start, end)."""
    for number in range(max(0, bisect_right(ranges, (start, end)) - 1), len(ranges)):
        low, high = ranges[number]
        if low >= end:
            return
        if high > start:
            yield max(low, start), min(high, end)
