"""On-disk corefiles of all versions, and the streams in them, written field by field.

After osfmk/mach_debug/mach_debug_types.h (xnu-3248, 4570, 11417) and, for LZ4,
libkern/libkern/compression/compression.h (xnu-11417).
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

PAGE = 4096
AEA, ZLIB, LZ4 = 1, 1 << 8, 1 << 9


class Member(NamedTuple):
    """`stored`: the bytes as they lie in the file; the rest None unless the header is to lie."""

    name: bytes
    stored: bytes
    flags: int = 0
    offset: int | None = None
    length: int | None = None


def gzip_member(data: bytes, level: int = 1) -> bytes:
    """As XNU compresses: window of 4 KiB, no name, fastest (osfmk/kdp/kdp_core.c)."""
    packer = zlib.compressobj(level, zlib.DEFLATED, 12 + 16, 3)
    return packer.compress(data) + packer.flush()


def lz4_frame(data: bytes, block: int = 65536, linked: bool = True, end: bytes = b"bv4$") -> bytes:
    """Apple's frame; a block that does not get smaller is stored, as Apple's encoder does."""
    import lz4.block

    frame = bytearray()
    for at in range(0, len(data), block):
        plain = data[at : at + block]
        window = data[max(0, at - 65536) : at] if linked else b""
        packed = lz4.block.compress(plain, store_size=False, dict=window)
        if len(packed) < len(plain):
            frame += b"bv41" + struct.pack("<II", len(plain), len(packed)) + packed
        else:
            frame += b"bv4-" + struct.pack("<I", len(plain)) + plain
    return bytes(frame) + end


def _place(log: bytes, members: list[Member], log_at: int) -> tuple[list[tuple[int, int]], bytes]:
    """Where each member lies, and everything from the log on."""
    body = bytearray(log)
    places = []
    for member in members:
        body += bytes(-(log_at + len(body)) % PAGE)
        offset = log_at + len(body)
        body += member.stored
        places.append(
            (
                offset if member.offset is None else member.offset,
                len(member.stored) if member.length is None else member.length,
            )
        )
    return places, bytes(body)


def sad_mac(log: bytes, stored: bytes) -> bytes:
    """Version 0; `stored` is the core."""
    [(offset, length)], body = _place(log, [Member(b"kernel", stored)], PAGE)
    header = b"Sad Mac\0" + struct.pack("<QQQQ", PAGE, len(log), offset, length)
    return header.ljust(PAGE, b"\0") + body


def rad_mac(log: bytes, members: list[Member], count: int | None = None) -> bytes:
    """Version 1."""
    places, body = _place(log, members, PAGE)
    count = len(members) if count is None else count
    header = b"Rad Mac\0" + struct.pack("<QQQ", PAGE, len(log), count)
    for member, place in zip(members, places, strict=True):
        header += struct.pack("<QQ16s", *place, member.name)
    return header.ljust(PAGE, b"\0") + body


def boss_mac(
    log: bytes,
    members: list[Member],
    flags: int = 0,
    count: int | None = None,
    version: int = 2,
    key: tuple[int, int] = (0, 0),
) -> bytes:
    """Version 2, with two pages for keys as in kernels built with encryption."""
    log_at = 3 * PAGE
    places, body = _place(log, members, log_at)
    count = len(members) if count is None else count
    header = struct.pack("<8sI4xQQH6x", b"Boss Mac", version, flags, *key)
    header += struct.pack("<QQQ", log_at, len(log), count)
    for member, place in zip(members, places, strict=True):
        header += struct.pack("<QQQ16s", member.flags, *place, member.name)
    return header.ljust(log_at, b"\0") + body
