"""gzip, xz and zstd around a kernel: the general packers, by the libraries everybody has."""

from __future__ import annotations

import sys
import warnings
import zlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvmtool.errors import FormatError, KvmWarning, TruncatedError, UnsupportedError
from kvmtool.peel.layer import Layer, Packed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from kvmtool.source import Source

_FEED = 64 << 10  # packed bytes a step; errors are no more precise than that
_PIECE = 1 << 20
_MAX_MEMBERS = 1 << 12  # streams one after the other; nobody packs a kernel in that many
_MEMORY = 256 << 20  # bytes a decoder may ask for (xz -9 asks for 65 MiB)
_WINDOW_LOG = 27  # zstd: 128 MiB, what its own tool accepts


class Decoder(Protocol):
    """One stream, as lzma and zstd have it: bytes after its end are left in `unused_data`."""

    @property
    def eof(self) -> bool:
        """Whether the end of the stream has been decoded."""
        ...

    @property
    def needs_input(self) -> bool:
        """Whether nothing more can be decoded without more packed bytes."""
        ...

    @property
    def unused_data(self) -> bytes:
        """The packed bytes that came after the end."""
        ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """At most `max_length` decoded bytes, after taking in `data`."""
        ...


class Codec(NamedTuple):
    """A packer: `decoder` gives a way to make decoders, and what these raise."""

    name: str
    magic: bytes
    decoder: Callable[[], tuple[Callable[[], Decoder], type[Exception]]]


def probe(head: bytes) -> bool:
    """Whether `head` (a file's first bytes) is the beginning of a packed stream."""
    return _codec(head) is not None


def open_layer(source: Source) -> Packed:
    """The stream that `source` begins with."""
    codec = _codec(source.read_at(0, min(8, source.size)))
    assert codec is not None
    layer = Layer(codec.name, f"{source.size:#x} bytes")
    return Packed(layer, 0, source.size, None, lambda: decode(source, codec))


def decode(source: Source, codec: Codec) -> Iterator[bytes]:
    """The decoded bytes of all streams in a row, in pieces. Warns of other bytes behind them.

    Raises `FormatError` with the packed offset (that of the 64 KiB in which the damage lies),
    `TruncatedError`, or `UnsupportedError` when the library is missing.
    """
    try:
        make, error = codec.decoder()
    except ImportError as missing:
        raise UnsupportedError(
            f"{source.name}: is packed with {codec.name} ({missing}): "
            "pip install 'kvmtool[kernelcache]'"
        ) from missing
    at = 0
    for _ in range(_MAX_MEMBERS):
        at = yield from _decode_one(source, codec.name, make(), error, at)
        at = _after_zeros(source, at)
        if at == source.size:
            return
        if source.read_at(at, min(len(codec.magic), source.size - at)) != codec.magic:
            message = f"what follows the {codec.name} stream is ignored"
            warnings.warn(f"{source.name}: at offset {at:#x}: {message}", KvmWarning, stacklevel=2)
            return
    raise FormatError(source.name, at, f"more than {_MAX_MEMBERS:#x} {codec.name} streams")


def _decode_one(
    source: Source, name: str, decoder: Decoder, error: type[Exception], at: int
) -> Generator[bytes, None, int]:
    """Yields what the stream at `at` decodes to; returns where it ends."""
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            data = source.read_at(at, min(_FEED, source.size - at))
            if not data:
                raise TruncatedError(source.name, at, 1, 0, f"{name} stream")
        try:
            piece = decoder.decompress(data, _PIECE)
        except error as damage:
            raise FormatError(source.name, at, f"{name} stream is corrupt ({damage})") from damage
        at += len(data)
        if piece:
            yield piece
    return at - len(decoder.unused_data)


def _after_zeros(source: Source, at: int) -> int:
    """The offset of the first byte from `at` on that is no padding."""
    while at < source.size:
        data = source.read_at(at, min(_FEED, source.size - at))
        rest = data.lstrip(b"\0")
        if rest:
            return at + len(data) - len(rest)
        at += len(data)
    return at


class _Inflater:
    """zlib's gzip decoder (which compares CRC-32 and size) in the manners of the others."""

    def __init__(self) -> None:
        self._z = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._z.eof

    @property
    def needs_input(self) -> bool:
        return not self._z.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._z.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._z.decompress(self._z.unconsumed_tail + data, max_length)


def _gzip() -> tuple[Callable[[], Decoder], type[Exception]]:
    return _Inflater, zlib.error


def _xz() -> tuple[Callable[[], Decoder], type[Exception]]:
    import lzma

    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY), lzma.LZMAError


def _zstd() -> tuple[Callable[[], Decoder], type[Exception]]:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError


CODECS = (
    Codec("gzip", b"\x1f\x8b", _gzip),
    Codec("xz", b"\xfd7zXZ\0", _xz),
    Codec("zstd", b"\x28\xb5\x2f\xfd", _zstd),
)


def _codec(head: bytes) -> Codec | None:
    return next((codec for codec in CODECS if head.startswith(codec.magic)), None)
