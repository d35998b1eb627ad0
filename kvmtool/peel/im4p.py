"""IM4P payloads, alone or in an IMG4: how Apple ships kernelcaches since iOS 7 and macOS 11.

IM4P is SEQUENCE { "IM4P", type, description, OCTET STRING payload, [OCTET STRING keybag],
[SEQUENCE { INTEGER algorithm, INTEGER decoded size }], [[0] properties] }, the optional members in
any order; IMG4 is SEQUENCE { "IMG4", IM4P, [[0] manifest], ... }. There is no public specification.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FormatError, UnsupportedError
from kvmtool.peel import der
from kvmtool.peel.layer import Inside, Layer

if TYPE_CHECKING:
    from kvmtool.source import Source

_MAGICS = (b"\x16\x04IM4P", b"\x16\x04IMG4")  # IA5String of four
_ALGORITHMS = {0: "LZSS", 1: "LZFSE"}


def probe(head: bytes) -> bool:
    """Whether `head` (a file's first 16 bytes) begins like an IM4P or IMG4."""
    return head[:1] == b"\x30" and any(magic in head[2:] for magic in _MAGICS)


def open_layer(source: Source) -> Inside:
    """The payload of an IM4P, or the IM4P of an IMG4.

    Raises `FormatError`, or `UnsupportedError` when the payload is encrypted.
    """
    outer = der.element(source, 0, source.size)
    items = list(der.members(source, outer))
    if not items or items[0].tag != der.IA5_STRING:
        raise FormatError(source.name, outer.start, "expected the string IM4P or IMG4")
    kind = der.text(source, items[0])
    if kind == "IM4P":
        return _payload(source, outer, items)
    if kind == "IMG4":
        found = items[1] if len(items) > 1 else None
        im4p = der.expect(source, found, der.SEQUENCE, "IMG4 payload", items[0])
        signed = any(item.tag == der.CONTEXT_0 for item in items[2:])
        detail = "with a manifest" if signed else "without a manifest"
        return Inside(Layer("IMG4", detail), im4p.off, im4p.end - im4p.off)
    raise FormatError(source.name, items[0].start, f"expected IM4P or IMG4, got {kind}")


def _payload(source: Source, outer: der.Element, items: list[der.Element]) -> Inside:
    tags = (der.IA5_STRING, der.IA5_STRING, der.OCTET_STRING)
    names = ("IM4P type", "IM4P description", "IM4P payload")
    fixed = []
    for index, (tag, name) in enumerate(zip(tags, names, strict=True), 1):
        found = items[index] if index < len(items) else None
        fixed.append(der.expect(source, found, tag, name, items[min(index, len(items)) - 1]))
    kind, description, payload = fixed
    detail = f"type {der.text(source, kind)}, description {der.text(source, description)!r}"
    claim = None
    for item in items[4:]:
        if item.tag == der.OCTET_STRING and item.size:
            raise UnsupportedError(
                f"{source.name}: at offset {item.off:#x}: the IM4P has a keybag, so its payload "
                "is encrypted: decrypt it with its keys first"
            )
        if item.tag == der.SEQUENCE:
            algorithm, claim = _compression(source, item)
            known = _ALGORITHMS.get(algorithm, f"compression {algorithm:#x}")
            detail += f", {known}, {claim:#x} bytes decoded"
    return Inside(Layer("IM4P", detail), payload.start, payload.size, claim)


def _compression(source: Source, info: der.Element) -> tuple[int, int]:
    """The algorithm and the decoded size."""
    found = list(der.members(source, info))
    if len(found) != 2 or any(item.tag != der.INTEGER for item in found):
        got = ", ".join(f"{item.tag:#x}" for item in found) or "nothing"
        raise FormatError(source.name, info.off, f"IM4P compression: expected two integers, {got=}")
    return der.number(source, found[0]), der.number(source, found[1])
