"""A mutator that needs nothing: bytes, words and blocks changed at random from a seed."""

from __future__ import annotations

import random
import struct

_EDGES = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000)
_WIDE = (*_EDGES, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)
_WORDS = tuple(struct.Struct(order + code) for order in "<>" for code in "HIQ")


def mutated(data: bytes, seed: int) -> bytes:
    """`data` with a few things changed; the same for the same seed."""
    chance = random.Random(seed)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not out:
            return bytes(out)
        reach = min(len(out), chance.choice((64, 512, 4096, len(out))))
        chance.choice((_byte, _byte, _word, _word, _link, _block, _text))(out, chance, reach)
    if chance.random() < 0.1:
        del out[chance.randrange(len(out) + 1) :]
    return bytes(out)


def _byte(out: bytearray, chance: random.Random, reach: int) -> None:
    at = chance.randrange(reach)
    out[at] = chance.choice((0, 0x7F, 0x80, 0xFF, chance.randrange(256), out[at] ^ 1 << at % 8))


def _word(out: bytearray, chance: random.Random, reach: int) -> None:
    """An edge in the place of a number, or the number a little off."""
    word = chance.choice(_WORDS)
    at = chance.randrange(reach) & ~3
    if at + word.size > len(out):
        return
    near = word.unpack_from(out, at)[0] + chance.choice((-8, -1, 1, 8, 0x1000))
    value = chance.choice((chance.choice(_WIDE), near))
    word.pack_into(out, at, value & (1 << 8 * word.size) - 1)


def _link(out: bytearray, chance: random.Random, reach: int) -> None:
    """A word in the place of another: a pointer that leads to what is there, but elsewhere."""
    size = chance.choice((4, 8))
    if len(out) >= 2 * size:
        places = [chance.randrange(len(out) // size) * size for _ in range(64)]
        words = [at for at in places if any(out[at : at + size])] or places
        to, origin = chance.choice(words), chance.choice(words)
        out[to : to + size] = out[origin : origin + size]


def _block(out: bytearray, chance: random.Random, reach: int) -> None:
    """A part taken out, put somewhere else, or written twice."""
    at, size = chance.randrange(reach), chance.choice((1, 4, 16, 64, 256))
    part = bytes(out[at : at + size])
    if chance.random() < 0.6:
        del out[at : at + size]
    if chance.random() < 0.6:
        to = chance.randrange(len(out) + 1)
        out[to:to] = part * chance.choice((1, 1, 2, 64))


def _text(out: bytearray, chance: random.Random, reach: int) -> None:
    at = chance.randrange(reach)
    out[at : at + 1] = chance.choice(
        (b"%s", b"\0", b"\n", b"\x1b[", b"-1", b"0x", b"[", b"{", b"<")
    )
