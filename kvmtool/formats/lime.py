"""LiME: ranges of physical memory, each behind a header of its own.

Source: LiME's doc/README and src/lime.h (lime_mem_range_header, version 1).
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FormatError
from kvmtool.formats.run_table import RunTable

if TYPE_CHECKING:
    from kvmtool.source import Source

_HEADER = Struct("<IIQQ8x")  # magic, version, first address, last address (inclusive)
_MAGIC = 0x4C694D45
_VERSION = 1
_RANGES_LIMIT = 1 << 20  # a machine has dozens


class Lime(RunTable):
    """A LiME image."""

    name = "lime"
    piece = "range"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return len(head) >= _HEADER.size and _HEADER.unpack_from(head)[0] == _MAGIC

    def __init__(self, source: Source) -> None:
        """Read the headers of all ranges. Raises `FormatError`."""
        super().__init__(source)
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
        if last < first:
            raise FormatError(source.name, at, f"range from {first:#x} to {last:#x}")
        if len(self._starts) == _RANGES_LIMIT:
            raise FormatError(source.name, at, f"more than {_RANGES_LIMIT:#x} ranges")
        offset, size = at + _HEADER.size, last - first + 1
        self.add(first, size, offset, at=at)
        return int(offset + size)
