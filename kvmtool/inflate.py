"""gzip members (RFC 1952) decoded forwards, damage and all."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple, Self

from kvmtool.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from kvmtool.source import Source

MAGIC = b"\x1f\x8b"

_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0
_FIXED_HEADER = 10
_MAX_HEADER = 256 << 10  # FEXTRA holds 64 KiB at most; nobody's names are longer than the rest
_TRAILER = struct.Struct("<II")  # CRC-32, decoded size modulo 2^32

_FEED = 16 << 10  # compressed bytes a step: what a kept decoder state may hold on to
_SALVAGE_FEEDS = (256, 16, 1)
_PADDING_LOOKED_AT = 64 << 10


class Fault(NamedTuple):
    """What is wrong with a stream, at a compressed offset."""

    offset: int
    message: str


class Inflater:
    """A `Cursor` over the members of a gzip stream.

    Never raises for what is wrong with the stream: it ends there and says so in `faults`, shared
    by all copies: "cut", "corrupt", "checksum", "trailing" to the first of that kind.
    """

    __slots__ = ("crc", "ended", "faults", "member", "out", "parent", "pos", "z")

    def __init__(self, parent: Source, faults: dict[str, Fault]) -> None:
        self.parent = parent
        self.faults = faults
        self.pos = 0  # compressed offset of the next byte to decode
        self.out = 0
        self.member = 0  # decoded offset where the present member begins
        self.crc = 0  # of the present member so far
        self.z: zlib._Decompress | None = None  # None between members
        self.ended = False

    def copy(self) -> Self:
        new = type(self)(self.parent, self.faults)
        new._adopt(self)
        if self.z is not None:
            new.z = self.z.copy()
        return new

    def _adopt(self, other: Self) -> None:
        self.pos, self.out, self.member, self.crc = other.pos, other.out, other.member, other.crc
        self.z, self.ended = other.z, other.ended

    def take(self, size: int) -> bytes:
        good = self.copy()
        try:
            return self._steps(size, _FEED)
        except zlib.error as error:
            return self._salvage(good, size, str(error))
        except BaseException:  # an interrupt: stand where we stood
            self._adopt(good)
            raise

    def _steps(self, size: int, feed: int) -> bytes:
        pieces: list[bytes] = []
        while size and not self.ended:
            pieces.append(self._step(size, feed))
            size -= len(pieces[-1])
        return b"".join(pieces)

    def _step(self, size: int, feed: int) -> bytes:
        """Decode at most `feed` bytes into at most `size`; may return nothing and yet move on."""
        if self.z is None:
            self._open_member()
            return b""
        data = self.parent.read_at(self.pos, min(feed, self.parent.size - self.pos))
        piece = self.z.decompress(data, size)
        self.out += len(piece)
        self.crc = zlib.crc32(piece, self.crc)
        if self.z.eof:
            self.pos += len(data) - len(self.z.unused_data)
            self._close_member()
        else:
            self.pos += len(data) - len(self.z.unconsumed_tail)
            if not data and not piece:
                self._end("cut", "gzip stream is cut off inside its data")
        return piece

    def _open_member(self) -> None:
        left = self.parent.size - self.pos
        lead = self.parent.read_at(self.pos, min(left, _PADDING_LOOKED_AT))
        if self.pos and not lead.startswith(MAGIC):
            self.ended = True
            if lead.strip(b"\0"):
                self._end("trailing", "what follows the gzip stream is not gzip and is ignored")
            return
        try:
            self.pos = data_offset(self.parent, self.pos)
        except TruncatedError:
            self._end("cut", "gzip stream is cut off inside the header of a member")
        except FormatError as error:
            self._end("trailing", f"what follows the gzip stream is ignored ({error})")
        else:
            self.z = zlib.decompressobj(-zlib.MAX_WBITS)
            self.member, self.crc = self.out, 0

    def _close_member(self) -> None:
        self.z = None
        if self.parent.size - self.pos < _TRAILER.size:
            self._end("cut", "gzip stream is cut off inside its trailer")
            return
        crc, isize = _TRAILER.unpack(self.parent.read_at(self.pos, _TRAILER.size))
        size = self.out - self.member
        if crc != self.crc:
            message = f"CRC-32 of the decoded bytes: expected {crc:#x}, got {self.crc:#x}"
            self.faults.setdefault("checksum", Fault(self.pos, message))
        elif isize != size & 0xFFFFFFFF:
            message = f"decoded size: expected {isize:#x} (modulo 2^32), got {size:#x}"
            self.faults.setdefault("checksum", Fault(self.pos + 4, message))
        self.pos += _TRAILER.size

    def _end(self, kind: str, message: str) -> None:
        self.ended = True
        self.faults.setdefault(kind, Fault(self.pos, message))

    def _salvage(self, good: Self, size: int, reason: str) -> bytes:
        """The bytes before a fault, which zlib keeps to itself: again, in ever smaller pieces."""
        pieces: list[bytes] = []
        for feed in _SALVAGE_FEEDS:
            while size and not good.ended:
                before = good.copy()
                try:
                    pieces.append(good._step(size, feed))
                except zlib.error:
                    good = before
                    break
                size -= len(pieces[-1])
        self._adopt(good)
        if size and not good.ended:
            self._end("corrupt", f"deflate data is corrupt ({reason.rpartition(': ')[2]})")
        return b"".join(pieces)


def data_offset(parent: Source, off: int) -> int:
    """Where the deflate data of the gzip member at `off` begins.

    Raises `FormatError` for what is not a gzip header, `TruncatedError` for half of one.
    """
    header = parent.read_at(off, min(parent.size - off, _MAX_HEADER))
    if len(header) < _FIXED_HEADER:
        raise TruncatedError(parent.name, off, _FIXED_HEADER, len(header), "gzip header")
    if header[:2] != MAGIC:
        raise FormatError(parent.name, off, f"gzip magic: expected 1f8b, got {header[:2].hex()}")
    method, flags = header[2], header[3]
    if method != 8 or flags & _RESERVED:
        raise FormatError(
            parent.name, off + 2, f"gzip header: expected method 8, got {method:#x}, {flags=:#x}"
        )
    end = _FIXED_HEADER
    if flags & _FEXTRA:
        end += 2 + int.from_bytes(header[end : end + 2], "little")
    for flag in (_FNAME, _FCOMMENT):
        if flags & flag:
            nul = header.find(b"\0", end)
            end = nul + 1 if nul >= 0 else _MAX_HEADER + 1
    checked = end
    if flags & _FHCRC:
        end += 2
    if end > len(header):
        if len(header) == _MAX_HEADER:
            raise FormatError(parent.name, off, f"gzip header is longer than {_MAX_HEADER:#x}")
        raise TruncatedError(parent.name, off, end, len(header), "gzip header")
    crc16 = zlib.crc32(header[:checked]) & 0xFFFF
    if flags & _FHCRC and header[checked:end] != crc16.to_bytes(2, "little"):
        raise FormatError(parent.name, off + checked, f"gzip header CRC: expected {crc16:#x}")
    return off + end
