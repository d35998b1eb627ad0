"""Decoded layers: written to a file once, mapped from then on.

What a layer decodes to is kept in the user's cache (`kvmtool.cache`) under the hash of its packed
bytes. Hashing 60 MB takes longer than a command may, so a second kind of entry leads there from
what is cheap to see: the file's device, inode, size and times, the place of the layer in it, and
samples of its bytes. Without a cache the file is a nameless one in the temporary directory. Memory
is not needed for more than a piece.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import cache, progress
from kvmtool.errors import FormatError
from kvmtool.source import FileSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.peel.layer import Packed
    from kvmtool.source import Source

KIND, BY_PLACE = "decoded", "decoded-from"  # of cache entries

_KEPT_FROM = 128 << 10  # packed bytes from which on decoding takes longer than the cache
_PAGE, _SAMPLES = 4096, 64
_CHUNK = 1 << 20
_TRAILER = Struct("<8sQ16s")  # magic and version, decoded bytes, samples of them
_MAGIC = b"KVMPEEL1"


class Decoded(NamedTuple):
    """The first `size` bytes of `file`; `identity` tells them from all others, if it is known."""

    file: FileSource
    size: int
    identity: str | None


def file_identity(source: Source) -> str | None:
    """What changes whenever the file does: device, inode, size, times. None for other sources."""
    if not isinstance(source, FileSource):
        return None
    try:
        status = os.stat(source.name)
    except OSError:
        return None
    if status.st_size != source.size:
        return None  # it has been replaced since it was mapped
    times = f"{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{times}"


def open_decoded(
    view: Source, packed: Packed, claim: int | None, room: int, place: str | None
) -> Decoded:
    """What `packed`, a layer of `view`, decodes to: from the cache, or decoded now.

    `claim` is the decoded size that the wrapper around it gives, `room` the most it may be; `place`
    tells where the packed bytes lie, None if they need not lie there the next time. Raises
    `FormatError` when the size is not the claimed one or beyond `room`, and whatever
    `packed.decode` raises.
    """
    size = _claimed(view, packed, claim, room)
    limit = room if size is None else size
    if packed.size < _KEPT_FROM or cache.directory() is None:
        found = _write(view, packed, limit, None)
    else:
        found = _cached(view, packed, limit, place)
    if found.size > limit or (size is not None and found.size != size):
        found.file.close()
        message = f"expected {limit:#x} decoded bytes, got {found.size:#x}"
        raise FormatError(view.name, packed.off, f"{packed.layer.name}: {message}")
    return found


def _cached(view: Source, packed: Packed, limit: int, place: str | None) -> Decoded:
    """What is in the cache, or is now."""
    origin = _hash_place(view, packed, place) if place is not None else None
    known = cache.load(BY_PLACE, origin) if origin is not None else None
    digest = known if known is not None else _hash_content(view, packed)
    found = _kept(digest.hex())
    decoded = found if found is not None else _decode(view, packed, limit, digest.hex())
    if found is None or (known is None and origin is not None):
        # after a big file this also makes the cache keep to its limit
        cache.store(BY_PLACE, origin or digest.hex(), digest)
    return decoded


def _claimed(view: Source, packed: Packed, claim: int | None, room: int) -> int | None:
    """The decoded size that is claimed, by the layer or the wrapper around it."""
    name = packed.layer.name
    if claim is not None and packed.claim is not None and claim != packed.claim:
        message = f"claims {packed.claim:#x} decoded bytes, the layer around it {claim:#x}"
        raise FormatError(view.name, packed.off, f"{name}: {message}")
    size = packed.claim if claim is None else claim
    if size is not None and size > room:
        message = f"claims {size:#x} decoded bytes, expected at most {room:#x}"
        raise FormatError(view.name, packed.off, f"{name}: {message}")
    return size


# files


def _decode(view: Source, packed: Packed, limit: int, key: str) -> Decoded:
    """Decode into the cache entry `key`, or where that cannot be into a nameless file."""
    path = cache.path_for(KIND, key)
    if path is not None:
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            return _write(view, packed, limit, path)._replace(identity=key)
        except OSError:
            pass  # no cache can be there, or it has no room: once more, elsewhere
    return _write(view, packed, limit, None)._replace(identity=key)


def _write(view: Source, packed: Packed, limit: int, final: str | None) -> Decoded:
    """Decode into a file that becomes `final` when it is complete, or loses its name then."""
    import tempfile

    folder, suffix = None, None
    if final is not None:
        folder, suffix = os.path.dirname(final), os.path.splitext(final)[1]
    fd, path = tempfile.mkstemp(prefix=".new-", suffix=suffix, dir=folder)
    try:
        with open(fd, "wb") as out:
            total = 0
            for piece in _limited(view, packed, limit):
                total += out.write(piece)
            out.flush()
            file = FileSource(path)
            if final is not None:
                out.write(_TRAILER.pack(_MAGIC, total, _samples(file, 0, total)))
        if final is not None:
            os.replace(path, final)
        else:
            os.unlink(path)
    except BaseException:
        os.unlink(path)
        raise
    return Decoded(file, total, None)


def _limited(view: Source, packed: Packed, limit: int) -> Iterator[bytes]:
    """The decoded pieces; raises `FormatError` before there is a byte too much."""
    total = 0
    for piece in packed.decode():
        total += len(piece)
        if total > limit:
            message = f"{packed.layer.name}: decodes to more than {limit:#x} bytes"
            raise FormatError(view.name, packed.off, message)
        progress.step("unpacking", total, packed.claim or 0)
        yield piece
    progress.end("unpacking")


def _kept(key: str) -> Decoded | None:
    """The cache entry `key`, mapped, if it is there and whole."""
    path = cache.path_for(KIND, key)
    if path is None:
        return None
    try:
        file = FileSource(path)
        os.utime(path)  # the cache lets go of the oldest first
    except (OSError, FormatError):
        return None
    size = file.size - _TRAILER.size
    if size >= 0:
        trailer = file.read_at(size, _TRAILER.size)
        if trailer == _TRAILER.pack(_MAGIC, size, _samples(file, 0, size)):
            return Decoded(file, size, key)
    file.close()
    return None


# hashes


def _samples(source: Source, off: int, size: int) -> bytes:
    """A hash of 64 pages spread over `size` bytes at `off`, both ends among them; of all if few."""
    from hashlib import blake2b

    if size <= _PAGE * _SAMPLES:
        return blake2b(source.read_at(off, size), digest_size=16).digest()
    digest = blake2b(digest_size=16)
    for index in range(_SAMPLES):
        start = (size - _PAGE) * index // (_SAMPLES - 1)
        digest.update(source.read_at(off + start, _PAGE))
    return digest.digest()


def _hash_place(view: Source, packed: Packed, place: str) -> str:
    """What tells these packed bytes from others without reading all of them."""
    from hashlib import blake2b

    text = f"{packed.layer.name} {place} {packed.size:x}"
    digest = blake2b(text.encode(), digest_size=16)
    digest.update(_samples(view, packed.off, packed.size))
    return digest.hexdigest()


def _hash_content(view: Source, packed: Packed) -> bytes:
    """The hash of the packed bytes, and of how they are packed."""
    from hashlib import blake2b

    digest = blake2b(packed.layer.name.encode() + b"\0", digest_size=16)
    end = packed.off + packed.size
    for at in range(packed.off, end, _CHUNK):
        digest.update(view.read_at(at, min(_CHUNK, end - at)))
    return digest.digest()
