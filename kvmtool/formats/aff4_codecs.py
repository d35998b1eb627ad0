"""How the chunks of AFF4 streams are compressed, by the URLs that stand for it.

Source: AFF4 Standard 1.0a, section 3.3; lexicon.inc and aff4_image.cc of c-aff4, aff4_image.py of
pyaff4 0.34.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from kvmtool.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    Decoder = Callable[[bytes, int], bytes]  # a chunk's stored bytes, the most it may decode to


def decoder(name: str, method: str) -> Decoder:
    """The decoder of a compression by its URL; it raises ValueError for what is damaged."""
    kind = _METHODS.get(method.removeprefix("https://").removeprefix("http://").rstrip("/"))
    if kind is None:
        raise UnsupportedError(
            f"{name}: the image stream is compressed by {method[:100]}, which kvmtool does not know"
        )
    try:
        return kind()
    except ImportError as error:
        raise UnsupportedError(
            f"{name}: the image stream is compressed with what needs a package ({error}): "
            "pip install 'kvmtool[aff4]'"
        ) from error


def _inflate(wbits: int) -> Decoder:
    def decode(stored: bytes, size: int) -> bytes:
        decoder = zlib.decompressobj(wbits)
        try:
            chunk = decoder.decompress(stored, size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if not decoder.eof and len(chunk) <= size:
            raise ValueError("the stream does not end")
        return chunk

    return decode


def _snappy() -> Decoder:
    from cramjam import DecompressionError, snappy

    def decode(stored: bytes, size: int) -> bytes:
        try:
            if (claimed := snappy.decompress_raw_len(stored)) > size:
                raise ValueError(f"it claims {claimed:#x} bytes")
            return bytes(snappy.decompress_raw(stored))
        except DecompressionError as error:
            raise ValueError(str(error)) from error

    return decode


def _lz4() -> Decoder:
    from cramjam import DecompressionError, lz4

    def decode(stored: bytes, size: int) -> bytes:
        # pyaff4 has the size before the block. No block begins so: its first token would say that
        # there are no literals, and a match before the first byte.
        block = stored[4:] if stored[:1] == b"\0" else stored
        room = bytearray(size)
        try:
            return bytes(room[: lz4.decompress_block_into(block, room)])
        except DecompressionError as error:
            raise ValueError(str(error)) from error

    return decode


def _stored() -> Decoder:
    return lambda stored, size: stored


# by URL without its scheme, which writers do not agree on
_METHODS: dict[str, Callable[[], Decoder]] = {
    "": _stored,
    "aff4.org/Schema#NullCompressor": _stored,
    "aff4.org/Schema#compression/stored": _stored,
    "www.ietf.org/rfc/rfc1950.txt": lambda: _inflate(zlib.MAX_WBITS),
    "tools.ietf.org/html/rfc1951": lambda: _inflate(-zlib.MAX_WBITS),
    "code.google.com/p/snappy": _snappy,
    "github.com/google/snappy": _snappy,
    "code.google.com/p/lz4": _lz4,
}
