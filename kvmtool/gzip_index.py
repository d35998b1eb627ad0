"""gzip with an index: rapidgzip (extra `kvmtool[gzip]`), and the index kept in the user's cache.

rapidgzip decodes with all processors and needs no decoding at all to come back to a file it has
indexed. It is trusted with sound streams only: 0.16 says nothing about a stream that is cut off
(mxmlnkn/rapidgzip issue 71) and does not compare ISIZE, so that is done here, and whatever it
finds to object to is told to the caller, who has zlib.
"""

from __future__ import annotations

import io
import os
import weakref
from typing import TYPE_CHECKING, Any

from kvmtool import cache, progress

if TYPE_CHECKING:
    from kvmtool.source import Source

KIND = "gzip-index"

_CHUNK = 1 << 20  # compressed bytes between two points of the index: about 3 ms of decoding
_THREADS = 4  # each holds a few decoded chunks; more threads cost memory and gain little

# What Cython makes of C++ exceptions, bad_alloc aside.
FAILURES = (RuntimeError, ValueError, IndexError, ArithmeticError, OSError, EOFError)


class GzipIndexError(Exception):
    """rapidgzip cannot be used for this stream; the text says why."""


class IndexedGzip:
    """A single-member gzip stream that fills the whole of `parent`, by rapidgzip.

    `size` is the decoded size. Raises ImportError without rapidgzip, `GzipIndexError` for streams
    that it refuses or that it may be wrong about. `key` names the index in the cache (None: the
    index is made and forgotten).
    """

    def __init__(self, parent: Source, key: str | None) -> None:
        import rapidgzip

        # Over the parent, not its path: always the bytes that were mapped, and slices work too.
        file = rapidgzip.RapidgzipFile(
            _File(parent), min(_THREADS, os.cpu_count() or 1), chunk_size=_CHUNK
        )
        # An unclosed one aborts the interpreter when it exits, hence a finalizer, not __del__.
        self.close = weakref.finalize(self, file.close)
        self._file: Any = file
        try:
            saved = cache.load(KIND, key) if key is not None else None
            if saved is not None:
                file.import_index(io.BytesIO(saved))
                self.size = int(file.size())
            else:
                self.size = int(file.seek(0, io.SEEK_END))
                progress.end("indexing gzip")
                _compare_isize(parent, self.size)
                if key is not None:
                    index = io.BytesIO()
                    file.export_index(index, rapidgzip.IndexFormat.GZTOOL)
                    cache.store(KIND, key, index.getvalue())
        except FAILURES as error:
            self.close()
            raise GzipIndexError(str(error)) from error
        except BaseException:
            self.close()
            raise

    def read(self, off: int, size: int) -> bytes:
        """`size` decoded bytes at `off`, all inside of `self.size`; raises `GzipIndexError`."""
        try:
            self._file.seek(off)
            data = bytes(self._file.read(size))
            while len(data) < size:
                more = self._file.read(size - len(data))
                if not more:
                    raise GzipIndexError(f"decoded {len(data):#x} of {size:#x} bytes at {off:#x}")
                data += more
        except FAILURES as error:
            raise GzipIndexError(str(error)) from error
        return data


def _compare_isize(parent: Source, size: int) -> None:
    """Raise `GzipIndexError` unless the last four bytes are the decoded size, modulo 2^32."""
    isize = int.from_bytes(parent.read_at(parent.size - 4, 4), "little")
    if isize != size & 0xFFFFFFFF:
        raise GzipIndexError(
            f"decoded size {size:#x} is not what the last four bytes say ({isize:#x})"
        )


class _File(io.RawIOBase):
    """A source as the seekable binary file that rapidgzip takes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0
        self._listener = progress.listener()  # rapidgzip reads in threads of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._source.size - self._at)
        data = self._source.read_at(self._at, left if size < 0 else min(size, left))
        self._at += len(data)
        if self._listener is not None:
            self._listener(progress.Step("indexing gzip", self._at, self._source.size))
        return data
