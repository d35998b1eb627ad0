"""LiME: ranges of physical memory, each behind a header of its own.

Source: LiME's doc/README and src/lime.h (lime_mem_range_header, version 1).
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.memory import RunMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

_HEADER = Struct("<IIQQ8x")  # magic, version, first address, last address (inclusive)
_MAGIC = 0x4C694D45
_VERSION = 1
_ADDRESS_BITS = 52  # no processor has wider physical addresses
_RANGES_LIMIT = 1 << 20  # a machine has dozens


class Lime:
    """A LiME image."""

    name = "lime"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return len(head) >= _HEADER.size and _HEADER.unpack_from(head)[0] == _MAGIC

    def __init__(self, source: Source) -> None:
        """Read the headers of all ranges. Raises `FormatError`."""
        self.source = source
        self.container: Any = None
        self.facts = Facts(UNSAID, 0)
        self.notes: tuple[Note, ...] = ()
        self.warnings: list[str] = []
        self.lost: list[tuple[int, int]] = []
        self._starts, self._ends, self._offsets = array("Q"), array("Q"), array("Q")
        at = 0
        while at < source.size:
            at = self._range(at)

    def _range(self, at: int) -> int:
        """Take in the range whose header is at `at`; returns where the next should be."""
        source = self.source
        if source.size - at < _HEADER.size:
            if not at:
                raise FormatError(source.name, 0, "the file ends inside the first range header")
            self.warnings.append(
                f"{source.size - at:#x} bytes at offset {at:#x} are no range header"
            )
            return source.size
        magic, version, first, last = _HEADER.unpack(source.read_at(at, _HEADER.size))
        if magic != _MAGIC:
            raise FormatError(source.name, at, f"range magic {magic:#x}, expected {_MAGIC:#x}")
        if version != _VERSION:
            raise FormatError(source.name, at, f"range version {version:#x}, expected {_VERSION}")
        if last < first or last >> _ADDRESS_BITS:
            raise FormatError(
                source.name, at, f"range from {first:#x} to {last:#x} cannot be one of addresses"
            )
        if len(self._starts) == _RANGES_LIMIT:
            raise FormatError(source.name, at, f"more than {_RANGES_LIMIT:#x} ranges")
        offset, size = at + _HEADER.size, int(last - first + 1)
        held = min(size, source.size - offset)
        if held < size:
            self.lost.append((first + held, last + 1))
            self.warnings.append(
                f"the range from {first:#x} to {last:#x} ends past the end of the file: "
                f"{size - held:#x} bytes of memory are absent"
            )
        self._starts.append(first)
        self._ends.append(first + held)
        self._offsets.append(offset)
        return offset + size

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`."""
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            yield Run("physical", start, end - start, offset)

    def virtual(self) -> None:
        """See `Format.virtual`: a kernel's address space has to be found in here."""

    def physical(self) -> RunMemory:
        """The machine's memory: where ranges overlap the first in the file wins."""
        return RunMemory(
            self.source, self._starts, self._ends, self._offsets, space="physical", lost=self.lost
        )
