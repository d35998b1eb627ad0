"""LZSS as Apple packs kernels with it (`libkern/mkext.c`, xnu-1504): Okumura's, ring of 4096 bytes.

A flag byte announces eight items, lowest bit first: 1 is a literal byte, 0 a match, two bytes that
give a position in the ring and a length of 3 to 18. Plain Python, some 20 MB/s: the one library for
this format (pylzss) is LGPL, needs a compiler or a wheel, and cannot be told where to stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

RATIO = 9  # decoded bytes to a packed one: 8 matches of 18 bytes take 17, that is 8.5

_RING = 4096
_LONGEST_MATCH = 18  # so much of the ring is unset at first; all before it are spaces
_LONGEST_GROUP = 1 + 8 * 2  # packed bytes of a flag byte and its items
_PIECE = 1 << 20

_LENGTH = tuple((high & 0x0F) + 3 for high in range(256))  # by a match's second byte
_PAGE = tuple((high & 0xF0) << 4 for high in range(256))  # the upper bits of its position


def _runs(flags: int) -> tuple[int, ...]:
    """The items of a flag byte: n for n literals in a row, 0 for a match."""
    runs: list[int] = []
    for bit in range(8):
        if not flags >> bit & 1:
            runs.append(0)
        elif runs and runs[-1]:
            runs[-1] += 1
        else:
            runs.append(1)
    return tuple(runs)


_RUNS = tuple(_runs(flags) for flags in range(256))


def decode(source: Source, off: int, packed: int, size: int) -> Iterator[bytes]:
    """The `size` bytes that the `packed` bytes at `off` decode to, in pieces.

    Fewer if the packed bytes end before; any bytes say something, so nothing is an error here.
    """
    packed = min(packed, size + (size + 7) // 8)  # all of them literals
    data = source.read_at(off, packed) + bytes(_LONGEST_GROUP)
    # The ring lies flat: the byte at index i of `out` is at place i % _RING of it, so what is taken
    # away from its front are whole turns. The first two are the ring before anything is decoded.
    out = bytearray(2 * _RING - _LONGEST_MATCH)
    out[_RING:] = b" " * (_RING - _LONGEST_MATCH)
    at = 0
    while size > 0 and at < packed:
        start = len(out)
        at = _decode_groups(data, at, packed, out, start + min(size, _PIECE))
        piece = bytes(out[start : start + size])
        size -= len(piece)
        yield piece
        del out[: (len(out) - _RING) & -_RING]


def _decode_groups(data: bytes, at: int, packed: int, out: bytearray, end: int) -> int:
    """Decode groups of eight items from `at` on until `out` has `end` bytes, or a few more.

    Returns where the next group begins. `data` goes on with padding after `packed` bytes.
    """
    runs, lengths, pages = _RUNS, _LENGTH, _PAGE  # locals are faster
    here, group = len(out), at
    while at < packed and here < end:
        group = at
        at += 1
        for run in runs[data[group]]:
            if run:
                out += data[at : at + run]
                at += run
                here += run
                continue
            high = data[at + 1]
            length = lengths[high]
            start = here & -_RING | pages[high] | data[at]
            at += 2
            if start >= here:
                start -= _RING
            if start + length <= here:
                out += out[start : start + length]
            else:  # it overlaps itself: a repetition
                out += (out[start:here] * (length // (here - start) + 1))[:length]
            here += length
    if at > packed:
        del out[here - _surplus(data, group, packed) :]
    return at


def _surplus(data: bytes, group: int, packed: int) -> int:
    """Bytes decoded from items of the last group that are not, or not wholly, there."""
    at, surplus = group + 1, 0
    for bit in range(8):
        literal = data[group] >> bit & 1
        at += 1 if literal else 2
        if at > packed:
            surplus += 1 if literal else _LENGTH[data[at - 1]]
    return surplus
