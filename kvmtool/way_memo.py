"""The ways that were costly to find, kept in the cache by the content of the memory."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import cache
from kvmtool.way_roots import Root

if TYPE_CHECKING:
    from kvmtool.memory import Memory

_KIND = "way"
_SAMPLES, _SAMPLE = 32, 4096  # how many parts of memory tell it from others, and their bytes
_REGIONS = 1000


class Remembered(NamedTuple):
    """What a search found: to be verified like anything else."""

    root: Root
    cputype: int
    kernel_address: int
    base: int = 0  # where memory begins


def key(physical: Memory, uuid: bytes | None) -> str:
    """What tells one memory from another (its regions, samples from all over it), and a kernel.

    `uuid` is that of the kernel's file, None without one. Two memories of one key cost a search.
    """
    regions = list(physical.regions())
    total = sum(region.size for region in regions)
    crc = adler = zlib.adler32(repr(regions[:_REGIONS]).encode())
    position, step = 0, max(total // _SAMPLES, _SAMPLE)
    for region in regions:
        while position < region.size:
            data = physical.read(region.start + position, min(_SAMPLE, region.size - position))
            crc, adler = zlib.crc32(data, crc), zlib.adler32(data, adler)
            position += step
        position -= region.size
    return f"{total:x}-{len(regions):x}-{crc:08x}{adler:08x}-{uuid.hex() if uuid else 'none'}"


def load(key: str) -> Remembered | None:
    """What is kept under `key`; None if nothing is, or nothing that can be understood."""
    stored = cache.load(_KIND, key)
    if stored is None:
        return None
    try:
        base, root, mode, cputype, header, how = stored.decode().split("\n", 5)
        found = Root(int(root, 16), (mode,), how)
        return Remembered(found, int(cputype, 16), int(header, 16), int(base, 16))
    except ValueError:
        return None


def store(key: str, found: Remembered) -> None:
    """Keep what was found under `key`; that there is no cache is no error."""
    root, cputype, header, base = found
    numbers = (f"{base:x}", f"{root.address:x}", root.modes[0], f"{cputype:x}", f"{header:x}")
    lines = (*numbers, root.how)
    cache.store(_KIND, key, "\n".join(lines).encode("utf-8", "backslashreplace"))
