"""kdump-compressed and flattened files, by diskdump_mod.h and makedumpfile.h of makedumpfile."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

ZLIB, LZO, SNAPPY, ZSTD = 1, 2, 4, 0x20
HEADER_OFFSETS = {64: 424, 32: 412}


class Stored(NamedTuple):
    """A page as its descriptor tells it; `data` is put where the writer is, `offset` moves it."""

    data: bytes
    flags: int
    offset: int | None = None
    size: int | None = None


def deflated(page: bytes) -> Stored:
    """A page as zlib stores it, or as it is where that is not shorter."""
    packed = zlib.compress(page)
    return Stored(packed, ZLIB) if len(packed) < len(page) else Stored(page, 0)


def kdump(
    pages: dict[int, bytes | Stored],
    *,
    bits: int = 64,
    version: int = 6,
    block: int = 4096,
    machine: bytes = b"x86_64",
    notes: bytes = b"",
    status: int = 1,
    split: tuple[int, int] | None = None,
    mapnr: int | None = None,
    one_bitmap: bool = False,
    share_zeros: bool = True,
) -> bytes:
    """A kdump of pages by frame number; bytes are deflated, a `Stored` is taken as it is."""
    frames = sorted(pages)
    mapnr = (frames[-1] + 1 if frames else 1) if mapnr is None else mapnr
    note_blocks = -(-len(notes) // block)
    bitmap = bytearray(-(-((mapnr + 7) // 8) // block) * block)
    for frame in frames:
        bitmap[frame // 8] |= 1 << frame % 8
    bitmaps = bytes(bitmap) if one_bitmap else b"\xff" * len(bitmap) + bytes(bitmap)
    sub_blocks = 1 + note_blocks
    counts = (status, block, sub_blocks, len(bitmaps) // block, min(mapnr, 2**32 - 1))
    head = b"KDUMP   " + struct.pack("<I", version) + bytes(4 * 65) + machine.ljust(65, b"\0")
    head = head.ljust(HEADER_OFFSETS[bits], b"\0") + struct.pack("<10I", *counts, 0, 0, 0, 0, 1)
    sub = sub_header(bits, version, split, mapnr, (2 * block if notes else 0, len(notes)))
    out = (
        head.ljust(block, b"\0") + sub.ljust(block, b"\0") + notes.ljust(note_blocks * block, b"\0")
    )
    out += bitmaps
    wanted = [f for f in frames if split is None or split[0] <= f < split[1]]
    at = len(out) + 24 * len(wanted)
    table, data, zeros = b"", b"", None
    for frame in wanted:
        page = pages[frame]
        shared = share_zeros and page == bytes(block)
        if shared and zeros is not None:
            table += zeros
            continue
        stored = page if isinstance(page, Stored) else deflated(page)
        offset = at + len(data) if stored.offset is None else stored.offset
        size = len(stored.data) if stored.size is None else stored.size
        row = struct.pack("<QIIQ", offset, size, stored.flags, 0)
        if shared:
            zeros = row
        table += row
        data += stored.data
    return out + table + data


def sub_header(
    bits: int, version: int, split: tuple[int, int] | None, mapnr: int, note: tuple[int, int]
) -> bytes:
    """kdump_sub_header as a 32-bit or 64-bit writer lays it out."""
    first, end = split or (0, 0)
    narrow = (first, end) if version < 6 else (0, 0)
    word = "Q" if bits == 64 else "I"
    out = struct.pack(f"<{word}ii", 0, 31, int(split is not None))
    out += struct.pack(f"<{word}{word}", *narrow)
    for offset, size in ((0, 0), note if version >= 4 else (0, 0), (0, 0)):
        out += struct.pack(f"<Q{word}", offset, size)
    return out + (struct.pack("<3Q", first, end, mapnr) if version >= 6 else b"")


def flattened(*records: tuple[int, bytes], end: bool = True) -> bytes:
    """makedumpfile's flattened form of (offset in the real file, bytes)."""
    out = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0")
    for offset, data in records:
        out += struct.pack(">qq", offset, len(data)) + data
    return out + (struct.pack(">qq", -1, -1) if end else b"")


def in_records(data: bytes, size: int) -> list[tuple[int, bytes]]:
    """`data` cut into records of `size` bytes."""
    return [(at, data[at : at + size]) for at in range(0, len(data), size)]
