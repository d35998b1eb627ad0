"""The container of the compiled resources in kvmtool/data: packed streams by number.

A magic of eight bytes, a count n, n packed lengths (u32, little-endian), n zlib streams. A stream
is unpacked when it is asked for.
"""

from __future__ import annotations

import itertools
import os
import zlib
from struct import error as StructError
from struct import unpack_from

from kvmtool.errors import FormatError

DATA = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")


class Resource:
    """One such file, with every stream still packed."""

    def __init__(self, path: str, magic: bytes) -> None:
        """Raises OSError, or `FormatError` for another file or a cut one."""
        self.path = path
        with open(path, "rb") as resource:
            self._packed = resource.read()
        if not self._packed.startswith(magic):
            start = self._packed[: len(magic)]
            raise FormatError(path, 0, f"expected {magic!r}, got {start!r}: reinstall kvmtool")
        try:
            self._spans = _spans(self._packed, len(magic))
        except StructError as exc:
            raise FormatError(path, len(magic), f"{exc}: reinstall kvmtool") from exc

    def stream(self, number: int) -> bytes:
        """Stream `number`, unpacked. Raises `FormatError` where it is damaged."""
        start, end = self._spans[number]
        try:
            return zlib.decompress(self._packed[start:end])
        except zlib.error as exc:
            what = f"stream {number} is damaged ({exc}): reinstall kvmtool"
            raise FormatError(self.path, start, what) from exc


def _spans(packed: bytes, at: int) -> list[tuple[int, int]]:
    """Start and end in the file of every stream."""
    (count,) = unpack_from("<I", packed, at)
    lengths = unpack_from(f"<{count}I", packed, at + 4)
    ends = list(itertools.accumulate(lengths, initial=at + 4 + 4 * count))
    return list(itertools.pairwise(ends))
