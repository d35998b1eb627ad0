"""VMware machine state, by vmware_vmss.h of crash 7.2."""

from __future__ import annotations

import struct
from typing import NamedTuple


class Tag(NamedTuple):
    """A value; `block` 62 or 63 writes it as a block behind `padding` bytes."""

    name: str
    data: bytes
    indices: tuple[int, ...] = ()
    block: int | None = None
    padding: int = 0


def number(name: str, value: int, *indices: int, size: int = 4) -> Tag:
    """A number."""
    return Tag(name, value.to_bytes(size, "little"), indices)


def regions(*found: tuple[int, int, int]) -> list[Tag]:
    """Regions of (page frame, page in the file, pages)."""
    out = [number("regionsCount", len(found))]
    for index, (ppn, page, size) in enumerate(found):
        out += [
            number("regionPageNum", page, index),
            number("regionPPN", ppn, index),
            number("regionSize", size, index),
        ]
    return out


def state(groups: dict[str, list[Tag]], magic: int = 0xBED2BED2) -> bytes:
    """A .vmss of groups of tags."""
    wide = "Q" if magic & 0xF else "I"
    at = 12 + 80 * len(groups)
    head, body = struct.pack("<3I", magic, 8, len(groups)), b""
    for name, tags in groups.items():
        packed = b"".join(_tag(tag, wide) for tag in tags) + b"\0\0"
        head += struct.pack("<64s2Q", name.encode(), at + len(body), len(packed))
        body += packed
    return head + body


def _tag(tag: Tag, wide: str) -> bytes:
    size = len(tag.data) if tag.block is None else tag.block
    out = bytes((len(tag.indices) << 6 | size, len(tag.name))) + tag.name.encode()
    out += struct.pack(f"<{len(tag.indices)}I", *tag.indices)
    if tag.block is not None:
        out += struct.pack(f"<2{wide}H", len(tag.data), len(tag.data), tag.padding)
        out += bytes(tag.padding)
    return out + tag.data
