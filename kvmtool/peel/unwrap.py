"""The list of all layers, and the loop that takes them off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FormatError
from kvmtool.macho import is_macho
from kvmtool.peel import codecs, comp, decoded, fat, im4p, lzfse_stream
from kvmtool.peel.layer import LIMIT, MAX_LAYERS, Inside, Layer, Packed, Peeled
from kvmtool.source import SliceSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.source import Source

_HEAD = 16  # bytes that are enough to recognise any layer

# What there is besides fat files: how it is recognised, and what opens it
KINDS: tuple[tuple[Callable[[bytes], bool], Callable[[Source], Inside | Packed]], ...] = (
    (im4p.probe, im4p.open_layer),
    (comp.probe, comp.open_layer),
    (lzfse_stream.probe, lzfse_stream.open_layer),
    (codecs.probe, codecs.open_layer),
)


class PeeledSource(SliceSource):
    """A part of the source that holds it; closing it closes everything it was taken out of."""

    def __init__(self, held: list[Source], off: int, size: int, name: str) -> None:
        """The part lies in the last source of `held`."""
        super().__init__(held[-1], off, size, name)
        self._held = held

    def close(self) -> None:
        """See `Source.close`."""
        for source in reversed(self._held):
            source.close()


def unwrap(source: Source, arch: str | None) -> Peeled:
    """See `kvmtool.peel.peel`."""
    held = [source]
    try:
        return _unwrap(held, arch)
    except BaseException:
        for opened in held[1:]:
            opened.close()
        raise


def _unwrap(held: list[Source], arch: str | None) -> Peeled:
    """Adds to `held` what is opened on the way."""
    file = held[0]
    view, base = file, 0  # what is looked at, and where it begins in the last of `held`
    origin = decoded.file_identity(file)  # of the last of `held`
    claim: int | None = None
    room = LIMIT
    layers: list[Layer] = []
    while (found := recognise(view, arch)) is not None:
        if len(layers) == MAX_LAYERS:
            raise FormatError(view.name, 0, f"expected at most {MAX_LAYERS} layers, found another")
        layers.append(found.layer)
        name = f"{file.name} ({', '.join(layer.name for layer in layers)})"
        if isinstance(found, Inside):
            base += found.off
            view = PeeledSource(held, base, found.size, name)
            claim = found.claim
            continue
        place = f"{origin}+{base + found.off:x}" if origin is not None else None
        opened = decoded.open_decoded(view, found, claim, room, place)
        held.append(opened.file)
        origin, base, claim = opened.identity, 0, None
        room -= opened.size
        detail = f"{found.layer.detail}, {opened.size:#x} bytes decoded"
        layers[-1] = found.layer._replace(detail=detail)
        view = PeeledSource(held, 0, opened.size, name)
    return Peeled(view, tuple(layers))


def recognise(view: Source, arch: str | None) -> Inside | Packed | None:
    """The outermost layer of `view`, by its first bytes; None for a Mach-O or what is unknown."""
    head = view.read_at(0, min(_HEAD, view.size))
    if is_macho(head):
        return None
    if fat.probe(head):
        return fat.open_layer(view, arch)
    for probe, open_layer in KINDS:
        if probe(head):
            return open_layer(view)
    return None
