"""CTF as Darwin's ctfconvert and ctfmerge write it: header, body, and where each type's record is.

Versions 2 (Mac OS X 10.5 to 11), 3 (macOS 12 and 13, with kind 14, PTRAUTH) and 4 (from 14 on, with
32-bit type numbers). A header of 36 bytes, then a body that may be a zlib stream. Nothing in CTF
counts its types: they lie one after the other, so their places are found in one pass over the body
as an array of numbers. Source: compat/opensolaris/sys/ctf.h and tools/ctf of Apple's dtrace.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.types.near import one_line

if TYPE_CHECKING:
    from kvmtool.source import Source

MAGICS = {b"\xf1\xcf": "<", b"\xcf\xf1": ">"}
HEADER_SIZE = 36
_COMPRESSED = 1
BODY_LIMIT = 64 << 20  # inflated; a kernel's is some MiB
_TYPES_LIMIT = 1 << 20
_NAME_LIMIT = 4096
_SAME_STRINGS = 16
_HEADER = {order: Struct(order + "HBB8I") for order in "<>"}

(UNKNOWN, INTEGER, FLOAT, POINTER, ARRAY, FUNCTION, STRUCT, UNION, ENUM) = range(9)
(FORWARD, TYPEDEF, VOLATILE, CONST, RESTRICT, PTRAUTH) = range(9, 15)
_UNCOUNTED = frozenset(range(PTRAUTH + 1)) - {FUNCTION, STRUCT, UNION, ENUM}
MAX_VLEN = 0x3FF
LARGE_STRUCT = 8192  # from this size on a member's offset takes 64 bits

# Trailing data of the kinds without a count, in bytes, for 16- and for 32-bit type numbers
_TAIL = {
    False: {INTEGER: 4, FLOAT: 4, ARRAY: 8, PTRAUTH: 4},
    True: {INTEGER: 4, FLOAT: 4, ARRAY: 12, PTRAUTH: 4},
}


class Header(NamedTuple):
    """The header; offsets are bytes from the start of the body, which is the header's end."""

    magic: int
    version: int
    flags: int
    parlabel: int
    parname: int
    lbloff: int
    objtoff: int
    funcoff: int
    typeoff: int
    stroff: int
    strlen: int


class Record(NamedTuple):
    """The head of a type: `size` is its size or the type it leads to; `tail` where its data is."""

    name: int
    kind: int
    root: bool
    vlen: int
    size: int
    tail: int


class CtfBody:
    """The inflated body of one piece of CTF, checked so far that its parts lie inside."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        """Raises `FormatError` (`TruncatedError`) or `UnsupportedError` for what cannot be read."""
        self._name, self._start = source.name, start
        if size < HEADER_SIZE:
            raise TruncatedError(source.name, start, HEADER_SIZE, max(0, size), "CTF header")
        raw = source.read_at(start, HEADER_SIZE)
        if raw[:2] not in MAGICS:
            raise FormatError(source.name, start, f"expected CTF magic 0xcff1, got {raw[:2].hex()}")
        self.byteorder = MAGICS[raw[:2]]
        self.header = Header._make(_HEADER[self.byteorder].unpack(raw))
        if self.header.version not in (2, 3, 4):
            raise UnsupportedError(
                f"{source.name}: at offset {start:#x}: CTF version {self.header.version}, "
                "expected 2, 3 or 4"
            )
        self.wide = self.header.version >= 4
        self._check_order()
        self.data = self._read(source, size - HEADER_SIZE)
        self._head = Struct(self.byteorder + ("III" if self.wide else "IHH"))
        self._word = Struct(self.byteorder + "I")
        self._large = Struct(self.byteorder + "II")
        self._sentinel = 0xFFFFFFFF if self.wide else 0xFFFF
        self._info_at = 1 if self.wide else 2  # in units of a type's number

    def bad(self, offset: int, message: str) -> FormatError:
        """The error for what is wrong at `offset` of the body."""
        return FormatError(self._name, self._start, f"CTF body offset {offset:#x}: {message}")

    def _check_order(self) -> None:
        header = self.header
        parts = (header.lbloff, header.objtoff, header.funcoff, header.typeoff, header.stroff)
        if list(parts) != sorted(parts) or header.typeoff % 4 or header.objtoff % 2:
            shown = ", ".join(f"{part:#x}" for part in parts)
            raise self.bad(0, f"expected its parts in order and aligned, got offsets {shown}")
        if header.stroff + header.strlen > BODY_LIMIT:
            body = header.stroff + header.strlen
            raise self.bad(0, f"expected at most {BODY_LIMIT:#x} bytes of types, got {body:#x}")

    def _read(self, source: Source, packed: int) -> bytes:
        start, wanted = self._start + HEADER_SIZE, self.header.stroff + self.header.strlen
        if not self.header.flags & _COMPRESSED:
            if wanted > packed:
                raise TruncatedError(source.name, start, wanted, packed, "CTF body")
            return source.read_at(start, wanted)
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(source.read_at(start, packed), max(1, wanted))
        except zlib.error as exc:
            raise FormatError(source.name, start, f"CTF body does not inflate: {exc}") from exc
        if len(data) < wanted:
            raise FormatError(
                source.name, start, f"CTF body: expected {wanted:#x} bytes, {len(data):#x} inflated"
            )
        return data[:wanted]

    def record(self, at: int) -> Record:
        """The head of the type at body offset `at`, which `records` has found."""
        name, info, size = self._head.unpack_from(self.data, at)
        tail = at + self._head.size
        if size == self._sentinel:
            high, low = self._large.unpack_from(self.data, tail)
            size, tail = high << 32 | low, tail + 8
        return Record(name, info >> 11 & 31, bool(info & 0x400), info & MAX_VLEN, size, tail)

    def records(self) -> tuple[array[int], bytes]:
        """Body offset and kind of every type, in order; every record lies before the strings."""
        unit, code = (4, "I") if self.wide else (2, "H")
        start, end = self.header.typeoff, self.header.stroff
        if end & 3:
            raise self.bad(end, "expected types to end at a multiple of 4")
        words = array(code, self.data[start:end])
        if (self.byteorder == "<") != (sys.byteorder == "little"):
            words.byteswap()
        places = self._places(words)
        kinds = bytes([words[place + self._info_at] >> 11 & 31 for place in places])
        return array("I", [start + place * unit for place in places]), kinds

    def _places(self, words: array[int]) -> array[int]:
        """Where in `words` each type begins. One round a type: what is common is done in line."""
        unit, head, info_at = words.itemsize, self._info_at + 2, self._info_at
        plain = [
            head + _TAIL[self.wide].get(kind, 0) // unit if kind in _UNCOUNTED else 0
            for kind in range(32)
        ]
        member, large = (12 if self.wide else 8) // unit, min(self._sentinel, LARGE_STRUCT)
        places = array("I")
        at, count = 0, len(words)
        for _ in range(_TYPES_LIMIT):
            if at >= count - head:
                break
            places.append(at)
            info, size = words[at + info_at], words[at + info_at + 1]
            kind = info >> 11 & 31
            if size != self._sentinel and plain[kind]:
                at += plain[kind]
            elif size < large and kind in (STRUCT, UNION):
                at += head + (info & MAX_VLEN) * member
            else:
                at += head + self._length(info, size, words, at + head) // unit
        if at == count - head:  # the last type may have nothing behind its head
            places.append(at)
            info, size = words[at + info_at], words[at + info_at + 1]
            at += head + self._length(info, size, words, at + head) // unit
        if at != count:
            raise self.bad(self.header.typeoff + at * unit, self._no_end(len(places), at > count))
        return places

    def _no_end(self, seen: int, beyond: bool) -> str:
        if seen >= _TYPES_LIMIT:
            return f"expected at most {_TYPES_LIMIT:#x} types"
        what = f"type {seen}" if beyond else f"type {seen + 1}'s head"
        return f"{what} goes beyond the last type's end"

    def _length(self, info: int, size: int, words: array[int], at: int) -> int:
        """Bytes that follow the short head of a type; `at` is their place in `words`."""
        kind, vlen, more = info >> 11 & 31, info & MAX_VLEN, 0
        if size == self._sentinel:
            more = 8
            if kind in (STRUCT, UNION):
                size = self._large_size(words, at)
        if kind in (STRUCT, UNION):
            small = 12 if self.wide else 8
            return more + vlen * (small if size < LARGE_STRUCT else 16)
        if kind == ENUM:
            return more + vlen * 8
        if kind == FUNCTION:
            return more + (vlen + (vlen & 1)) * (4 if self.wide else 2)
        if kind > PTRAUTH:
            where = self.header.typeoff + at * words.itemsize
            raise self.bad(where, f"type of kind {kind}, expected 0 to {PTRAUTH}")
        return more + _TAIL[self.wide].get(kind, 0)

    def _large_size(self, words: array[int], at: int) -> int:
        """The 64-bit size at `at`; large enough if it is cut off, which the caller sees."""
        offset = self.header.typeoff + at * words.itemsize
        if offset + 8 > self.header.stroff:
            return LARGE_STRUCT
        high, low = self._large.unpack_from(self.data, offset)
        return int(high) << 32 | int(low)

    def names(self, offsets: array[int]) -> list[int]:
        """The place in the string table of the name of each type at these body offsets."""
        words = memoryview(self.data)[: self.header.stroff].cast("I").tolist()
        if (self.byteorder == "<") != (sys.byteorder == "little"):
            return [self._word.unpack_from(self.data, at)[0] for at in offsets]
        return [words[at >> 2] for at in offsets]

    def places_of(self, name: str) -> list[int]:
        """Where a string of the table is `name`, a few at most."""
        needle = b"\0" + name.encode("utf-8", "replace") + b"\0"
        found: list[int] = []
        start = self.header.stroff
        at = self.data.find(needle, start)
        while at >= 0 and len(found) < _SAME_STRINGS:
            found.append(at + 1 - start)
            at = self.data.find(needle, at + 1)
        return found

    def count(self, at: int) -> int:
        """What the type at body offset `at` counts: members, values, parameters."""
        return int(self._head.unpack_from(self.data, at)[1]) & MAX_VLEN

    def string(self, name: int) -> str:
        """The name at `name` of the string table; "" where it is in the kernel's own table."""
        if name >> 31:
            return ""
        start = self.header.stroff + name
        end = self.data.find(b"\0", start, start + _NAME_LIMIT)
        if name >= self.header.strlen or end < 0:
            if name == 0:
                return ""
            raise self.bad(start, f"a name at {name:#x} of {self.header.strlen:#x} bytes of names")
        return one_line(self.data[start:end].decode("utf-8", "backslashreplace"))
