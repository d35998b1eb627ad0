"""`comp` images: prelinked kernels and kernelcaches packed with LZSS or LZVN, 10.4 to 10.15.

A big-endian header of 0x180 bytes (signature, type, Adler-32 and size of the decoded bytes, size of
the packed ones, then names), and the packed bytes behind it.
"""

from __future__ import annotations

import zlib
from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.peel import lzfse_stream, lzss
from kvmtool.peel.layer import Layer, Packed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

_HEADER_SIZE = 0x180
_HEADER = Struct(">4s4s3I")  # signature, type, adler32, uncompressed size, compressed size
_ADLER_AT, _SIZE_AT = 0x8, 0xC

_MAX_DECODED = 128 << 20  # twice the largest kernel of their time; LZVN is decoded in one go


def probe(head: bytes) -> bool:
    """Whether `head` (a file's first bytes) begins like a comp image of a known type."""
    return head[:8] in (b"complzss", b"complzvn")


def open_layer(source: Source) -> Packed:
    """The image, its sizes checked. Raises `FormatError` or `TruncatedError`."""
    if source.size < _HEADER_SIZE:
        raise TruncatedError(source.name, 0, _HEADER_SIZE, source.size, "comp header")
    _, kind, adler, size, packed = _HEADER.unpack(source.read_at(0, _HEADER.size))
    if packed > source.size - _HEADER_SIZE:
        left = source.size - _HEADER_SIZE
        raise TruncatedError(source.name, _HEADER_SIZE, packed, left, "comp data")
    lzvn = kind == b"lzvn"
    limit = min(_MAX_DECODED, packed * (lzfse_stream.LZVN_RATIO if lzvn else lzss.RATIO))
    if size > limit:
        message = f"{packed:#x} bytes are said to decode to {size:#x}, expected at most {limit:#x}"
        raise FormatError(source.name, _SIZE_AT, f"comp header: {message}")

    def decode() -> Iterator[bytes]:
        unpack = lzfse_stream.decode_lzvn if lzvn else lzss.decode
        return _checked(source, adler, unpack(source, _HEADER_SIZE, packed, size))

    layer = Layer(f"comp/{kind.decode()}", f"{packed:#x} bytes, adler32 {adler:#x}")
    return Packed(layer, 0, _HEADER_SIZE + packed, size, decode)


def _checked(source: Source, expected: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    adler = zlib.adler32(b"")
    for piece in pieces:
        adler = zlib.adler32(piece, adler)
        yield piece
    if adler != expected:
        raise FormatError(
            source.name,
            _ADLER_AT,
            f"Adler-32 of the decoded bytes: expected {expected:#x}, got {adler:#x}",
        )
