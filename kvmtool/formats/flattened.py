"""makedumpfile's flattened form, in which QEMU writes kdumps, too: a file for a pipe.

Records say where in the real file their bytes belong, and may come in any order; a later one
overwrites what an earlier one wrote (the header, written again at the end). Nothing is rearranged
on disk: an index of the records presents the real file.

Source: makedumpfile.h of makedumpfile (makedumpfile_header, makedumpfile_data_header).
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError, TruncatedError, UnknownFormatError
from kvmtool.memory import RunMemory, read_zero_filled
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.formats import Format, Run
    from kvmtool.memory import Memory
    from kvmtool.source import Source

_SIGNATURE = b"makedumpfile\0\0\0\0"
_HEADER = Struct(">16s2q")  # signature, type, version
_TYPE = _VERSION = 1
_HEADER_SIZE = 4096
_RECORD = Struct(">2q")  # offset in the real file, bytes
_END = -1  # both, in the last record
_RECORDS_LIMIT = 1 << 24  # writers put 16 KiB and more into one
_SIZE_LIMIT = 1 << 56


class FlattenedSource:
    """The real file that a flattened one describes. Does not own `parent`.

    What no record wrote is zeros: it is what the real file would have there (a writer skips over
    the rest of a block).
    """

    def __init__(self, parent: Source) -> None:
        """Index the records. Raises `FormatError`."""
        self.name = parent.name
        self.cut = False  # whether the record that ends the file is missing
        self._parent = parent
        head = parent.read_at(0, _HEADER.size)
        signature, kind, version = _HEADER.unpack(head)
        if signature != _SIGNATURE or kind != _TYPE or version != _VERSION:
            raise FormatError(
                self.name, 0, f"expected a flattened header of type 1, version 1, got {head.hex()}"
            )
        starts, ends, offsets = self._index()
        for column in (starts, ends, offsets):
            column.reverse()  # the last record wins
        self._memory = RunMemory(parent, starts, ends, offsets, space="real file")
        self.size = max(ends, default=0)

    def _index(self) -> tuple[array[int], array[int], array[int]]:
        parent, at = self._parent, _HEADER_SIZE
        starts, ends, offsets = array("Q"), array("Q"), array("Q")
        while True:
            if at + _RECORD.size > parent.size:
                self.cut = True
                break
            offset, size = _RECORD.unpack(parent.read_at(at, _RECORD.size))
            if offset == size == _END:
                break
            if size <= 0 or not 0 <= offset < _SIZE_LIMIT or offset + size > _SIZE_LIMIT:
                raise FormatError(
                    self.name, at, f"a record of {size:#x} bytes for offset {offset:#x}"
                )
            if len(starts) == _RECORDS_LIMIT:
                raise FormatError(self.name, at, f"more than {_RECORDS_LIMIT:#x} records")
            at += _RECORD.size
            held = min(size, parent.size - at)
            starts.append(offset)
            ends.append(offset + held)
            offsets.append(at)
            at += size
        return starts, ends, offsets

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        return read_zero_filled(self._memory, off, size)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""


class Flattened:
    """A flattened kdump or ELF core: what is in it answers."""

    name = "flattened"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return head.startswith(_SIGNATURE)

    def __init__(self, source: Source) -> None:
        """Index the records and open what they make. Raises `FormatError`."""
        from kvmtool.formats import identify, load

        self.container: Any = None
        real = FlattenedSource(source)
        self.source: Source = real
        entry = identify(real)
        if entry.module == __name__:
            raise UnknownFormatError(source.name, 0, "a flattened file in a flattened file")
        self._inner: Format = load(entry)(real)
        self.name = f"{entry.name} (flattened)"
        self.facts, self.notes = self._inner.facts, self._inner.notes
        self.warnings = list(self._inner.warnings)
        if real.cut:
            self.warnings.insert(0, "the flattened file is cut off: its last record is missing")

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`; offsets are those in what the records make."""
        return self._inner.runs()

    def virtual(self) -> Memory | None:
        """See `Format.virtual`."""
        return self._inner.virtual()

    def physical(self) -> Memory | None:
        """See `Format.physical`."""
        return self._inner.physical()
