"""Bytes, and nothing about what they mean.

A `Source` is read by position: there is no cursor, no padding and no short answer. Files are
mapped, never slurped, so a 100 GB image costs what is touched.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from typing import TYPE_CHECKING, Protocol

from kvmtool.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIND_CHUNK = 1 << 20


class Source(Protocol):
    """Something that holds bytes: `name` for messages, `size` in bytes."""

    name: str

    @property
    def size(self) -> int:
        """Bytes there are."""
        ...

    def read_at(self, off: int, size: int) -> bytes:
        """Exactly `size` bytes at file offset `off`; raises `TruncatedError` otherwise."""
        ...

    def find(self, needle: bytes, start: int, end: int) -> int:
        """Lowest offset in [start, end) where `needle` lies wholly inside, or -1."""
        ...

    def close(self) -> None:
        """Give back what the source holds; reading afterwards is an error."""
        ...


class FileSource:
    """A regular file, mapped."""

    def __init__(self, path: str) -> None:
        """Map the file at `path`. Raises OSError, or `FormatError` for what is not a file."""
        self.name = path
        # O_NONBLOCK: a FIFO is refused below, not waited for
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                raise FormatError(path, None, f"is {kind}, expected a file")
            self.size = status.st_size
            self._identity = status.st_dev, status.st_ino
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if self.size else None
        finally:
            os.close(fd)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        return self._map[off : off + size] if self._map is not None and size else b""

    def view(self, off: int, size: int) -> memoryview | bytes:
        """As `read_at` without a copy; not to be kept: the file stays mapped as long as it."""
        if self._map is None or off < 0 or size < 0 or off + size > self.size:
            return self.read_at(off, size)
        return memoryview(self._map)[off : off + size]

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts (from, to) of [start, end) that the disk has: all between them is zeros.

        Everything is one part where the file system does not tell, or `name` is another file now.
        """
        end = min(end, self.size)
        fd = _opened_again(self.name, self._identity)
        if fd is None:
            yield start, end
            return
        try:
            while start < end:
                begin, stop = _next_part(fd, start, end)
                if begin < stop:
                    yield begin, stop
                start = stop
        finally:
            os.close(fd)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        if self._map is None or start >= self.size:
            return -1
        return self._map.find(needle, start, min(end, self.size))

    def close(self) -> None:
        """See `Source.close`."""
        if self._map is None:
            return
        try:
            self._map.close()
        except BufferError:  # a view is left, as in the traceback of an error: the map goes with it
            self._map = None


def _opened_again(path: str, identity: tuple[int, int]) -> int | None:
    """The file that was mapped: mmap keeps no descriptor that one could ask."""
    if not hasattr(os, "SEEK_DATA"):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != identity:
        os.close(fd)
        return None
    return fd


def _next_part(fd: int, start: int, end: int) -> tuple[int, int]:
    """What of [start, end) is stored first; (end, end) when nothing more is (lseek(2))."""
    try:
        begin = os.lseek(fd, start, os.SEEK_DATA)
        return (begin, min(os.lseek(fd, begin, os.SEEK_HOLE), end)) if begin < end else (end, end)
    except OSError as error:
        return (end, end) if error.errno == errno.ENXIO else (start, end)


class BytesSource:
    """Bytes that are already in memory."""

    def __init__(self, data: bytes, name: str = "<bytes>") -> None:
        self.name = name
        self.size = len(data)
        self._data = data

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        return self._data[off : off + size]

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return self._data.find(needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""


class SliceSource:
    """The `size` bytes of another source from its offset `off` on. Does not own the other."""

    def __init__(self, parent: Source, off: int, size: int, name: str | None = None) -> None:
        """Raises `TruncatedError` if the parent does not hold the whole slice."""
        if off < 0 or size < 0 or off + size > parent.size:
            raise TruncatedError(parent.name, off, size, max(0, min(size, parent.size - off)))
        self.name = parent.name if name is None else name
        self.size = size
        self._parent = parent
        self._off = off

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        return self._parent.read_at(self._off + off, size)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        end = min(end, self.size)
        if start > end:
            return -1
        found = self._parent.find(needle, self._off + start, self._off + end)
        return -1 if found < 0 else found - self._off

    def close(self) -> None:
        """See `Source.close`."""


def find_by_chunks(source: Source, needle: bytes, start: int, end: int) -> int:
    """`Source.find` for a source that can only be read: at most 1 MiB is held at a time."""
    end = min(end, source.size)
    while start + len(needle) <= end:
        size = min(_FIND_CHUNK + len(needle) - 1, end - start)
        found = source.read_at(start, size).find(needle)
        if found >= 0:
            return start + found
        start += _FIND_CHUNK
    return -1


def open_source(path: str) -> Source:
    """The bytes of the file at `path`; a gzip stream is seen through. The caller closes it.

    Raises OSError, or `FormatError` for what is not a regular file.
    """
    return see_through(FileSource(path))


def see_through(source: Source) -> Source:
    """What a gzip stream holds, or the source itself; closing it closes `source`."""
    if source.size >= 2 and source.read_at(0, 2) == b"\x1f\x8b":
        from kvmtool.gzip_source import GzipSource

        return GzipSource(source)
    return source
