"""A file that is read, not mapped: for a process that must outlive its file.

Who touches a mapped page that the file no longer has is killed by SIGBUS. A server of a mount must
not be: the mount would be dead. Here a file that was cut is an error like any other.
"""

from __future__ import annotations

import os
import stat

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.source import find_by_chunks


class PreadSource:
    """A regular file; `size` is what it had when it was opened."""

    def __init__(self, path: str) -> None:
        """Open the file at `path`. Raises OSError, or `FormatError` for what is not a file."""
        self.name = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise FormatError(path, None, f"is {kind}, expected a file")
        self.size = status.st_size

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        data = os.pread(self._fd, size, off)
        while len(data) < size:  # a signal may cut a read short, and 2 GiB is the most at a time
            more = os.pread(self._fd, size - len(data), off + len(data))
            if not more:
                raise TruncatedError(self.name, off, size, len(data))
            data += more
        return data

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
