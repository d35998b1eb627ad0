"""What was costly to find out about a file, kept between runs.

Entries live in one directory of the user's: `$KVMTOOL_CACHE` (set but empty: no cache), else
`$XDG_CACHE_HOME/kvmtool`, else `~/Library/Caches/kvmtool` on macOS and `~/.cache/kvmtool`
elsewhere. Losing an entry costs time and nothing else, so whatever goes wrong here (no home, a
full disk, a damaged entry) means "not in the cache" and is no error. Importing this module touches
nothing on disk.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 1 << 30  # bytes that all entries may take together

_SUFFIX = ".kvmcache"  # files without it are not ours, and never removed
_HEADER = struct.Struct("<8sQI")  # magic and version, payload bytes, CRC-32 of the payload
_MAGIC = b"KVMCACH1"
_LETTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ._-")


_watcher: ContextVar[Callable[[str, bool], None] | None] = ContextVar("kvmtool.cache", default=None)


@contextmanager
def watching(watcher: Callable[[str, bool], None]) -> Iterator[None]:
    """Inside of this, `watcher` is told what kind of entry is looked for, and if it is there."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def directory() -> str | None:
    """The cache directory, which need not exist; None if the user wants no cache or has no home."""
    named = os.environ.get("KVMTOOL_CACHE")
    if named is not None:
        return named or None
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: relative ones are to be ignored
        base = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return os.path.join(base, "kvmtool") if os.path.isabs(base) else None


def path_for(kind: str, key: str) -> str | None:
    """Where the entry `key` of `kind` lies or would lie; None without a cache.

    Both words must be usable in a file name (letters, digits, dot, dash, underscore); ValueError.
    """
    if not (kind and key and _LETTERS.issuperset(kind + key)):
        raise ValueError(f"cache words {kind!r}, {key!r} are not fit for a file name")
    where = directory()
    return None if where is None else os.path.join(where, f"{kind}-{key}{_SUFFIX}")


def load(kind: str, key: str) -> bytes | None:
    """The bytes stored as `key` of `kind`, whole and undamaged, or None."""
    payload = _load(kind, key)
    watcher = _watcher.get()
    if watcher is not None:
        watcher(kind, payload is not None)
    return payload


def _load(kind: str, key: str) -> bytes | None:
    path = path_for(kind, key)
    if path is None:
        return None
    try:
        if os.path.getsize(path) > LIMIT:
            return None
        with open(path, "rb") as entry:
            content = entry.read()
    except OSError:
        return None
    if len(content) < _HEADER.size:
        return None
    magic, size, crc = _HEADER.unpack_from(content)
    payload = content[_HEADER.size :]
    if (magic, size, crc) != (_MAGIC, len(payload), zlib.crc32(payload)):
        return None
    return payload


def store(kind: str, key: str, payload: bytes) -> bool:
    """Store `payload` as `key` of `kind`, in one step; the oldest entries make room for it.

    False if it is not stored: no cache, not writable, or larger than the cache may be.
    """
    path = path_for(kind, key)
    if path is None or len(payload) + _HEADER.size > LIMIT:
        return False
    where = os.path.dirname(path)
    try:
        os.makedirs(where, mode=0o700, exist_ok=True)
        _write(where, path, payload)
    except OSError:
        return False
    _evict(where, keep=os.path.basename(path))
    return True


def _write(where: str, path: str, payload: bytes) -> None:
    import tempfile

    fd, temporary = tempfile.mkstemp(prefix=".new-", suffix=_SUFFIX, dir=where)
    try:
        with open(fd, "wb") as entry:
            entry.write(_HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload)))
            entry.write(payload)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def usage(where: str) -> tuple[int, int]:
    """How many entries there are in the directory `where`, and their bytes; (0, 0) without it."""
    try:
        found = _entries(where)
    except OSError:
        return 0, 0
    return len(found), sum(size for _, size, _ in found)


def _entries(where: str) -> list[tuple[float, int, str]]:
    """(time of change, bytes, name) of each of our files in `where`. Raises OSError."""
    entries: list[tuple[float, int, str]] = []
    with os.scandir(where) as found:
        for entry in found:
            if entry.name.endswith(_SUFFIX) and entry.is_file(follow_symlinks=False):
                status = entry.stat(follow_symlinks=False)
                entries.append((status.st_mtime, status.st_size, entry.name))
    return entries


def _evict(where: str, keep: str) -> None:
    """Remove our oldest files in `where` until all of them fit into LIMIT; never `keep`."""
    try:
        entries = _entries(where)
        excess = sum(size for _, size, _ in entries) - LIMIT
        for _, size, name in sorted(entries):
            if excess <= 0:
                break
            if name != keep:
                os.unlink(os.path.join(where, name))
                excess -= size
    except OSError:
        return  # somebody else is tidying up
