"""Text files of types, plain or packed with gzip, xz or zstd, read within bounds."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, KvmWarning, UnsupportedError
from kvmtool.peel.codecs import CODECS, decode
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtool.source import Source

_HEAD = 4096


class TextLimits(NamedTuple):
    """`size` bytes of text at most, and how often each of some bytes may be in it."""

    size: int
    counts: Mapping[bytes, int]


def first_bytes(source: Source) -> bytes:
    """The first bytes of the text, some thousand at most; b"" of a stream that is damaged."""
    pieces = _pieces(source)
    if pieces is None:
        return source.read_at(0, min(source.size, _HEAD))
    try:
        with warnings.catch_warnings(action="ignore", category=KvmWarning):
            return next(pieces, b"")[:_HEAD]
    except (FormatError, UnsupportedError):
        return b""


def unpacked(path: str, limits: TextLimits) -> bytes:
    """The text in the file at `path`.

    Raises OSError; `FormatError` for a damaged stream, or more than `limits` allow.
    """
    source = FileSource(path)
    try:
        pieces = _pieces(source)
        if pieces is None:
            pieces = iter([source.read_at(0, min(source.size, limits.size + 1))])
        parts, got = [], 0
        for piece in pieces:
            parts.append(piece)
            got += len(piece)
            if got > limits.size:
                message = f"expected at most {limits.size >> 20} MiB of types, there are more"
                raise FormatError(path, None, message)
        text = b"".join(parts)
    finally:
        source.close()
    for byte, most in limits.counts.items():
        count = text.count(byte)
        if count > most:
            what = f"expected at most {most} {byte.decode()!r}, got {count}"
            raise FormatError(path, None, f"{what}: more than any file of types has")
    return text


def _pieces(source: Source) -> Iterator[bytes] | None:
    """The text of a packed stream in pieces; None if it is not packed."""
    head = source.read_at(0, min(8, source.size))
    codec = next((codec for codec in CODECS if head.startswith(codec.magic)), None)
    return None if codec is None else decode(source, codec)
