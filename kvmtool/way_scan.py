"""Physical memory searched from end to end, a page at a time.

What is looked for stands at page boundaries or at a fixed place in a page (a page table's entry for
one address), so a pass looks at a few words of each page: it runs as fast as memory can be read.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmtool.memory import Memory

    Progress = Callable[[int, int], None]  # bytes done, bytes in all

PAGE = 4096
_WORDS = PAGE // 8
_CHUNK = 1 << 20


def chunks(physical: Memory, progress: Progress | None) -> Iterator[tuple[int, memoryview]]:
    """All whole pages of memory, as (physical address, the 64-bit words from there on).

    But for those that are holes in a sparse file: they are zeros, and nothing looked for is.
    """
    regions = list(physical.regions())
    total, done = sum(region.size for region in regions), 0
    for region in regions:
        end = region.start + region.size
        for at in _stored(physical, region.start, end):
            for piece in physical.read_pieces(at, min(_CHUNK, end - at)):
                if piece.data is not None:
                    first = -piece.address % PAGE
                    last = (piece.address + piece.size) // PAGE * PAGE - piece.address
                    if first < last:
                        yield piece.address + first, _words(piece.data[first:last])
            if progress is not None:
                progress(done + at - region.start, total)
        done += region.size
    if progress is not None:
        progress(total, total)


def _stored(physical: Memory, start: int, end: int) -> Iterator[int]:
    """Where the chunks of a region begin that are not holes altogether, each at a page."""
    parts = getattr(physical, "stored", None)
    at = start + -start % PAGE
    for first, last in ((start, end),) if parts is None else parts(start, end):
        if last > at:
            at += max(0, first - at) // PAGE * PAGE
            yield from range(at, last, _CHUNK)
            at += -(-(last - at) // _CHUNK) * _CHUNK


def _words(data: bytes) -> memoryview:
    if sys.byteorder == "little":
        return memoryview(data).cast("Q")
    swapped = array("Q", data)
    swapped.byteswap()
    return memoryview(swapped)


def word(text: bytes) -> int:
    """The first 8 bytes of `text` as `chunks` gives them."""
    return int.from_bytes(text[:8], "little")


def page_heads(
    physical: Memory, wanted: frozenset[int], progress: Progress | None
) -> Iterator[tuple[int, int]]:
    """Pages whose first 64-bit word is one of `wanted`, as (physical address, the word)."""
    for at, words in chunks(physical, progress):
        heads = words[::_WORDS].tolist()
        if not wanted.isdisjoint(heads):
            for index, head in enumerate(heads):
                if head in wanted:
                    yield at + index * PAGE, head


def column(
    physical: Memory, offset: int, step: int, progress: Progress | None
) -> Iterator[tuple[int, Sequence[int]]]:
    """The 64-bit words at `offset` bytes into each `step` bytes, as (address of the first, words).

    `step` divides the size of a page.
    """
    for at, words in chunks(physical, progress):
        yield at + offset, words[offset // 8 :: step // 8].tolist()
