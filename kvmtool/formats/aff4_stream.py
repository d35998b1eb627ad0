"""The bytes of AFF4 streams: chunks, compressed one by one, in segments that are called bevies.

A bevy is a member of the volume, its index another one. The standard's index has offset and length
of each chunk; that of pmem 2, which came before it, has the offsets alone, and there no chunk is
ever stored as it is.

Source: AFF4 Standard 1.0a, section 3; aff4_image.cc of c-aff4 (github.com/Velocidex/c-aff4) before
and after it took up the standard.
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.formats.aff4_codecs import decoder
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.formats.aff4_volume import Properties, Volume
    from kvmtool.source import Source

_ENTRY = Struct("<QI")  # offset in the bevy, bytes
_OLD_ENTRY = Struct("<I")  # offset in the bevy
_DIGITS = 8  # of a bevy's name
_STANDARD = ("chunkSize", "chunksInSegment", "compressionMethod")
_OLD = ("chunk_size", "chunks_per_segment", "compression")
_MIN_CHUNK, _MAX_CHUNK = 512, 1 << 20  # writers have 32 KiB
_MAX_PER_BEVY = 1 << 20  # writers have 1024
_MAX_SIZE = 1 << 56
_CACHE = 32 << 20  # bytes of decoded chunks that are kept
_INDICES = 16  # that are kept, of 12 KiB as writers make them


class Chunking(NamedTuple):
    """How a stream is cut up; sizes in bytes, `method` a URL. `old` is as pmem 2 wrote it."""

    size: int
    chunk_size: int
    per_bevy: int
    method: str
    old: bool


class _Bevy(NamedTuple):
    offset: int  # in the file
    size: int
    table: bytes  # its index


def chunking_of(name: str, urn: str, said: Properties, old: bool) -> Chunking:
    """What the metadata says of an image stream. Raises `FormatError` where it cannot be."""
    chunk, per_bevy, method = _OLD if old else _STANDARD

    def number(key: str, low: int, high: int) -> int:
        text = said.get(key, ["nothing"])[0]
        if text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise FormatError(
            name, None, f"{urn} has {key} {text[:64]}, expected from {low:#x} to {high:#x}"
        )

    return Chunking(
        number("size", 0, _MAX_SIZE),
        number(chunk, _MIN_CHUNK, _MAX_CHUNK),
        number(per_bevy, 1, _MAX_PER_BEVY),
        said.get(method, [""])[0],
        old,
    )


class ImageStream:
    """An image stream as a `Source`; safe to use from several threads."""

    def __init__(self, volume: Volume, urn: str, chunking: Chunking) -> None:
        """Nothing is read yet. Raises `UnsupportedError` for a compression there is no way for."""
        self.name, self.size, self._chunking = volume.source.name, chunking.size, chunking
        self._volume, self._urn = volume, urn
        self._decode = decoder(self.name, chunking.method)
        self._entry = _OLD_ENTRY if chunking.old else _ENTRY
        self._bevies: dict[int, _Bevy] = {}  # the one used last at the end, as in `_chunks`
        self._chunks: dict[int, bytes] = {}
        self._keep = max(1, _CACHE // chunking.chunk_size)
        self._lock = Lock()

    def missing(self) -> Iterator[tuple[int, int]]:
        """The ranges [start, end) whose chunks the volume does not hold, by its directory."""
        chunk_size, per_bevy, at = self._chunking.chunk_size, self._chunking.per_bevy, 0
        for number in sorted(self._held()):
            start = number * per_bevy * chunk_size
            if start >= self.size:
                break
            if start > at:
                yield at, start
            index = self._volume.size(self._members(number)[1])
            at = start + min(per_bevy, index // self._entry.size) * chunk_size
        if at < self.size:
            yield at, self.size

    def _held(self) -> Iterator[int]:
        """The bevies that are in the volume, and their indices."""
        for name in self._volume.below(self._urn):
            if len(name) >= _DIGITS and name.isascii() and name.isdigit():
                members = self._members(int(name))
                if members[0].endswith(f"/{name}") and members[1] in self._volume:
                    yield int(name)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`; raises `FormatError` for a chunk that does not decode."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        if not size:
            return b""
        chunk_size = self._chunking.chunk_size
        first, start = divmod(off, chunk_size)
        last = (off + size - 1) // chunk_size
        if first == last:
            return self._chunk(first)[start : start + size]
        chunks = [self._chunk(number) for number in range(first, last + 1)]
        chunks[0] = chunks[0][start:]
        chunks[-1] = chunks[-1][: off + size - last * chunk_size]
        return b"".join(chunks)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        with self._lock:
            self._chunks.clear()
            self._bevies.clear()

    def _members(self, number: int) -> tuple[str, str]:
        """The URNs of a bevy and its index."""
        bevy = f"{self._urn}/{number:0{_DIGITS}d}"
        return bevy, f"{bevy}/index" if self._chunking.old else f"{bevy}.index"

    def _chunk(self, number: int) -> bytes:
        """All of a chunk but the last, which may be shorter or padded."""
        with self._lock:
            chunk = self._chunks.pop(number, None)
            if chunk is not None:
                self._chunks[number] = chunk
                return chunk
        chunk = self._read(number)
        with self._lock:
            self._chunks[number] = chunk
            if len(self._chunks) > self._keep:
                del self._chunks[next(iter(self._chunks))]
        return chunk

    def _read(self, number: int) -> bytes:
        chunking = self._chunking
        at, size = self._place(number)
        stored = self._volume.source.read_at(at, size)
        if size == chunking.chunk_size and not chunking.old:
            return stored
        try:
            chunk = self._decode(stored, chunking.chunk_size)
        except ValueError as error:
            raise FormatError(
                self.name, at, f"chunk {number:#x} of {self._urn} cannot be decoded ({error})"
            ) from error
        needed = min(chunking.chunk_size, self.size - number * chunking.chunk_size)
        if not needed <= len(chunk) <= chunking.chunk_size:
            raise FormatError(
                self.name,
                at,
                f"chunk {number:#x} of {self._urn} decodes to {len(chunk):#x} bytes, not "
                f"{needed:#x}",
            )
        return chunk

    def _place(self, number: int) -> tuple[int, int]:
        """File offset and size of the stored bytes of a chunk."""
        which, within = divmod(number, self._chunking.per_bevy)
        bevy, entry = self._bevy(which), self._entry
        if (within + 1) * entry.size > len(bevy.table):
            raise FormatError(
                self.name,
                bevy.offset,
                f"the index of bevy {which} of {self._urn} has {len(bevy.table) // entry.size:#x} "
                f"chunks, expected {within + 1:#x} or more",
            )
        if self._chunking.old:
            bounds = bevy.table[within * entry.size : (within + 2) * entry.size]
            offset, *behind = (n for (n,) in entry.iter_unpack(bounds))
            size = (behind[0] if behind else bevy.size) - offset
        else:
            offset, size = entry.unpack_from(bevy.table, within * entry.size)
        if not 0 < size <= 2 * self._chunking.chunk_size or offset + size > bevy.size:
            raise FormatError(
                self.name,
                bevy.offset,
                f"chunk {number:#x} of {self._urn} takes {size:#x} bytes at {offset:#x} of a bevy "
                f"of {bevy.size:#x}",
            )
        return bevy.offset + offset, size

    def _bevy(self, number: int) -> _Bevy:
        with self._lock:
            bevy = self._bevies.pop(number, None)
            if bevy is not None:
                self._bevies[number] = bevy
                return bevy
        data, index = self._members(number)
        limit = (self._chunking.per_bevy + 1) * _ENTRY.size  # c-aff4 may end with an empty chunk
        table = self._volume.read(index, limit)
        whole = len(table) // self._entry.size * self._entry.size
        bevy = _Bevy(*self._volume.locate(data), table[:whole])
        with self._lock:
            self._bevies[number] = bevy
            if len(self._bevies) > _INDICES:
                del self._bevies[next(iter(self._bevies))]
        return bevy


class Constant:
    """`size` bytes of one value as a `Source`: a symbolic stream, as far as it is mapped."""

    def __init__(self, name: str, byte: int, size: int) -> None:
        self.name, self.size, self._byte = name, size, bytes([byte])

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        return self._byte * size

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        fits = needle == self._byte * len(needle) and start + len(needle) <= min(end, self.size)
        return start if fits else -1

    def close(self) -> None:
        """See `Source.close`."""


class Parts:
    """Sources one after the other as one; `starts` are the offsets at which they begin."""

    def __init__(self, name: str, parts: Sequence[Source]) -> None:
        self.name, self._parts, self.size = name, tuple(parts), 0
        self.starts: list[int] = []
        for part in self._parts:
            self.starts.append(self.size)
            self.size += part.size

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        read, at = [], bisect_right(self.starts, off) - 1
        while size:
            within = off - self.starts[at]
            held = min(size, self._parts[at].size - within)
            read.append(self._parts[at].read_at(within, held))
            off, size, at = off + held, size - held, at + 1
        return read[0] if len(read) == 1 else b"".join(read)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        for part in self._parts:
            part.close()
