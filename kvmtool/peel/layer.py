"""What a layer is, for those who recognise one and for those who tell of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.source import Source

LIMIT = 384 << 20  # decoded bytes of all layers; the largest kernel collections take some 130 MiB
MAX_LAYERS = 8  # the deepest known is four: fat, IM4P, LZFSE, fat


class Layer(NamedTuple):
    """One layer that was taken off: its name, and what it says of itself, for a person."""

    name: str
    detail: str


class Peeled(NamedTuple):
    """What was inside, and the layers around it, outermost first. Closing `source` closes all."""

    source: Source
    layers: tuple[Layer, ...]


class Inside(NamedTuple):
    """A layer that holds its content as it is: `size` bytes at offset `off` of the wrapper.

    `claim` is what the wrapper says these bytes decode to, if they turn out to be packed.
    """

    layer: Layer
    off: int
    size: int
    claim: int | None = None


class Packed(NamedTuple):
    """A layer that must be decoded: `size` bytes at offset `off` of the wrapper, headers included.

    `claim` is the decoded size its header gives, None if it gives none. `decode` yields the decoded
    bytes in pieces, each time anew, and raises `FormatError` where they are damaged.
    """

    layer: Layer
    off: int
    size: int
    claim: int | None
    decode: Callable[[], Iterator[bytes]]
