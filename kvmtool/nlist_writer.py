"""The symbol table of one image, with a string table that holds its names and no others.

Kernel collections share a string table among hundreds of images; linkers let a name be the tail of
another. What is kept are stretches of the old table, so that nothing is stored twice that was
stored once, and the new table (but for padding) is no larger than the old one.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError
from kvmtool.nlist import N_INDR, N_STAB, N_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.macho import MachO
    from kvmtool.nlist import NlistTable

MOST_SYMBOLS = 1 << 21  # the largest kernels have some 200,000

_BLOCK = 1 << 15  # entries held at a time
_STEP = 1 << 14  # bytes looked at for the end of a name
_CHUNK = 1 << 20  # bytes of names held at a time
_INDIRECT = frozenset(t for t in range(256) if not t & N_STAB and t & N_TYPE == N_INDR)


class _Block(NamedTuple):
    """Entries from number `first` on: their bytes, and these as 32-bit words."""

    first: int
    raw: bytes
    words: array[int]


class NlistWriter:
    """`table` of `image`: all its entries in their order, only n_strx is new.

    `entries_size` and `strings_size` are bytes. (The n_value of an N_INDR entry is a name, too.)
    """

    def __init__(self, image: MachO, table: NlistTable) -> None:
        """Look at every entry. Raises `FormatError` for names outside of the string table."""
        self._source, self._table = image.source, table
        if len(table) > MOST_SYMBOLS:
            raise FormatError(
                self._source.name,
                table.symoff,
                f"symbol table: expected at most {MOST_SYMBOLS:#x} entries, got {len(table):#x}",
            )
        self._swap = (image.byteorder == "<") != (sys.byteorder == "little")
        self._entry = 16 if image.is64 else 12
        self._value = Struct(image.byteorder + ("Q" if image.is64 else "I"))
        self._starts, self._ends = array("I"), array("I")  # stretches of the old string table
        self._places = array("Q")  # where they begin in the new one
        self.entries_size = len(table) * self._entry
        self.strings_size = 1
        for strx in sorted(self._used()):
            self._keep(strx)
        self.strings_size = -(-self.strings_size // 8) * 8

    def entries(self) -> Iterator[bytes]:
        """The entries, in blocks. Raises `TruncatedError`."""
        for block in self._blocks():
            words, step = block.words, self._entry // 4
            words[::step] = array("I", map(self._moved, words[::step]))
            if self._swap:
                words.byteswap()
            out = bytearray(words.tobytes())
            for at, strx in self._indirect(block):
                self._value.pack_into(out, at + 8, self._moved(strx))
            yield bytes(out)

    def strings(self) -> Iterator[bytes]:
        """The names, in pieces. Raises `TruncatedError`."""
        yield b"\0"
        written = 1
        for start, end in zip(self._starts, self._ends, strict=True):
            for at in range(start, end, _CHUNK):
                yield self._source.read_at(self._table.stroff + at, min(_CHUNK, end - at))
            written += end - start
        yield bytes(self.strings_size - written)

    def _blocks(self) -> Iterator[_Block]:
        for first in range(0, len(self._table), _BLOCK):
            count = min(_BLOCK, len(self._table) - first)
            at = self._table.symoff + first * self._entry
            raw = self._source.read_at(at, count * self._entry)
            words = array("I", raw)
            if self._swap:
                words.byteswap()
            yield _Block(first, raw, words)

    def _indirect(self, block: _Block) -> Iterator[tuple[int, int]]:
        """(offset in the block, n_value) of the entries whose n_value is a name."""
        types = block.raw[4 :: self._entry]
        if _INDIRECT.isdisjoint(types):
            return
        for index, n_type in enumerate(types):
            if n_type in _INDIRECT:
                at = index * self._entry
                yield at, self._value.unpack_from(block.raw, at + 8)[0]

    def _used(self) -> array[int]:
        """Every index into the string table that an entry has."""
        used = array("I")
        for block in self._blocks():
            column = block.words[:: self._entry // 4]
            worst = max(column)
            if worst >= self._table.strsize and worst:
                raise self._bad(block.first + column.index(worst), "n_strx", worst)
            used.extend(column)
            for at, strx in self._indirect(block):
                if strx >= self._table.strsize and strx:
                    raise self._bad(block.first + at // self._entry, "n_value (N_INDR)", strx)
                used.append(strx)
        return used

    def _bad(self, index: int, field: str, strx: int) -> FormatError:
        return FormatError(
            self._source.name,
            self._table.symoff + index * self._entry,
            f"symbol: {field} {strx:#x}, expected less than strsize {self._table.strsize:#x}",
        )

    def _keep(self, strx: int) -> None:
        """The name at `strx` of the old table, which is not before any that was kept already."""
        last = self._ends[-1] if self._ends else 0
        if strx == 0 or strx < last:
            return
        end = self._name_end(strx)
        if self._ends and strx == last:
            self._ends[-1] = end
        else:
            self._starts.append(strx)
            self._ends.append(end)
            self._places.append(self.strings_size)
        self.strings_size += end - strx
        if end == self._table.strsize:
            self.strings_size += 1  # the last name may lack its NUL

    def _name_end(self, strx: int) -> int:
        base, size = self._table.stroff, self._table.strsize
        for at in range(strx, size, _STEP):
            found = self._source.find(b"\0", base + at, base + min(at + _STEP, size))
            if found >= 0:
                return found - base + 1
        return size

    def _moved(self, strx: int) -> int:
        if strx == 0:  # mach-o/nlist.h: no name
            return 0
        at = bisect_right(self._starts, strx) - 1
        return strx - self._starts[at] + self._places[at]
