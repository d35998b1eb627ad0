"""gzip streams (RFC 1952), read at any offset.

XNU since 10.11 writes its cores as one gzip member (`osfmk/kdp/kdp_core.c`, later
`output_stages/out_zlib.c`): raw over the network, inside a container on disk. Small and damaged
streams are decoded by zlib with checkpoints; big sound ones by rapidgzip with a saved index.
"""

from __future__ import annotations

import os
import warnings
from threading import RLock
from typing import TYPE_CHECKING

from kvmtool import cache
from kvmtool.checkpoints import Checkpoints
from kvmtool.errors import FormatError, KvmWarning, TruncatedError
from kvmtool.inflate import Fault, Inflater, data_offset
from kvmtool.source import FileSource, Source, find_by_chunks

if TYPE_CHECKING:
    from kvmtool.gzip_index import IndexedGzip


_INDEX_FROM = 16 << 20  # compressed bytes from which on an index pays for loading rapidgzip
_CACHE_FROM = 1 << 20  # compressed bytes from which on the decoded size is worth keeping
_PLAIN_PREFIX = 4 << 20  # decoded bytes that are never worth an index
_PRINT = 64 << 10  # bytes of each end of a file that go into its fingerprint


class GzipSource:
    """The decoded bytes of the gzip stream that `parent` holds, as a `Source`.

    Padding after the stream is allowed, several members too. What a damaged stream still yields can
    be read: `size` counts what could be decoded, a `KvmWarning` names the file and the compressed
    offset of the damage, reads beyond it raise `TruncatedError` (cut off) or `FormatError`
    (corrupt). A wrong checksum only warns, as nothing tells which bytes are the wrong ones.

    `backing` is the file that `parent` is a slice of, if it is one: what has been found out about
    the stream is then kept in the user's cache. Closes `parent` when closed. Safe to use from
    several threads.
    """

    def __init__(self, parent: Source, backing: FileSource | None = None) -> None:
        """Raises `FormatError` if `parent` does not begin with a gzip header."""
        data_offset(parent, 0)
        self.name = parent.name
        self._parent = parent
        self._backing = parent if isinstance(parent, FileSource) else backing
        self._lock = RLock()
        self._faults: dict[str, Fault] = {}
        self._plain = Checkpoints(Inflater(parent, self._faults))
        self._indexed: IndexedGzip | None = None
        self._index_tried = False
        self._size: int | None = None
        self._key: str | None = None

    @property
    def size(self) -> int:
        """Decoded bytes there are. The first time, this decodes the whole stream."""
        with self._lock:
            if self._size is None:
                self._size = self._known_size()
            if self._size is None and (indexed := self._index()) is not None:
                self._size = indexed.size
                self._keep_size()
            return self._size if self._size is not None else self._run(None)

    @property
    def truncated(self) -> bool:
        """Whether the stream ends before it should. Looks at all of it, as `size` does."""
        return self.size >= 0 and "cut" in self._faults

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the stream, each with its compressed offset; none if it is sound."""
        there = self.size
        return tuple(_told(fault, there) for fault in self._faults.values())

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`; also raises `FormatError` (compressed offset) beyond damage."""
        with self._lock:
            if off < 0 or size < 0:
                raise TruncatedError(self.name, off, size, 0)
            if self._size is not None and off + size > self._size:
                raise self._beyond(off, size, self._size)
            if off + size > _PLAIN_PREFIX and self._index() is not None:
                data = self._read_indexed(off, size)
                if data is not None:
                    return data
            there = self._run(off + size)
            if there < off + size:
                raise self._beyond(off, size, there)
            return self._plain.read(off, size)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        with self._lock:
            if self._indexed is not None:
                self._indexed.close()
                self._indexed = None
            self._index_tried = True
            self._size = None
            self._plain = Checkpoints(Inflater(self._parent, self._faults))
            self._parent.close()

    def _beyond(self, off: int, size: int, there: int) -> FormatError:
        fault = self._faults.get("corrupt")
        if fault is not None:
            return FormatError(self.name, fault.offset, fault.message)
        return TruncatedError(self.name, off, size, max(0, min(size, there - off)))

    def _run(self, end: int | None) -> int:
        """`Checkpoints.run` of the plain decoder; tells what was found at the end of the stream."""
        ended = self._plain.ended
        there = self._plain.run(end)
        if self._plain.ended and not ended:
            self._size = there
            self._keep_size()
            for fault in self._faults.values():
                message = f"{self.name}: {_told(fault, there)}"
                warnings.warn(message, KvmWarning, stacklevel=4)
        return there

    def _index(self) -> IndexedGzip | None:
        """The stream by way of rapidgzip, if it is big and that works; says so if not."""
        if self._index_tried or self._parent.size < _INDEX_FROM or self._backing is None:
            return self._indexed
        self._index_tried = True
        from kvmtool.gzip_index import GzipIndexError, IndexedGzip

        try:
            self._indexed = IndexedGzip(self._parent, self._fingerprint())
        except ImportError as error:
            self._slow(f"{error}: pip install 'kvmtool[gzip]'")
        except GzipIndexError as error:
            self._slow(f"rapidgzip cannot read it: {error}")
        return self._indexed

    def _read_indexed(self, off: int, size: int) -> bytes | None:
        """The bytes by way of rapidgzip; None, after a warning, if it fails from here on."""
        from kvmtool.gzip_index import GzipIndexError

        assert self._indexed is not None
        self._size = self._indexed.size
        if off + size > self._size:
            raise self._beyond(off, size, self._size)
        try:
            return self._indexed.read(off, size)
        except GzipIndexError as error:
            self._indexed.close()
            self._indexed = self._size = None
            self._slow(f"rapidgzip cannot read it: {error}")
            return None

    def _slow(self, why: str) -> None:
        big = self._parent.size >> 20
        message = f"{self.name}: {big} MiB of gzip are read slowly, from the start ({why})"
        warnings.warn(message, KvmWarning, stacklevel=5)

    def _fingerprint(self) -> str | None:
        """What tells this stream from others, for the cache: size, both ends, time of change.

        None where there is no file whose time of change could be asked for.
        """
        if self._key is None and self._backing is not None:
            try:
                changed = os.stat(self._backing.name).st_mtime_ns
            except OSError:
                return None
            from hashlib import blake2b

            size = self._parent.size
            ends = blake2b(self._parent.read_at(0, min(size, _PRINT)), digest_size=16)
            ends.update(self._parent.read_at(max(0, size - _PRINT), min(size, _PRINT)))
            self._key = f"{size:x}-{changed:x}-{ends.hexdigest()}"
        return self._key

    def _known_size(self) -> int | None:
        key = self._fingerprint() if self._parent.size >= _CACHE_FROM else None
        saved = cache.load("gzip-size", key) if key is not None else None
        return int.from_bytes(saved, "little") if saved is not None else None

    def _keep_size(self) -> None:
        """Only of sound streams: the damage of others shall be told every time."""
        if self._size is None or self._faults or self._parent.size < _CACHE_FROM:
            return
        key = self._fingerprint()
        if key is not None:
            cache.store("gzip-size", key, self._size.to_bytes(8, "little"))


def _told(fault: Fault, there: int) -> str:
    return f"at offset {fault.offset:#x}: {fault.message}; {there:#x} bytes could be decoded"
