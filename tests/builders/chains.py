"""Pointers of a kernel turned into chains: formats 7, 8 and 11, and the older threads.

Sources: <mach-o/loader.h>, <mach-o/fixup-chains.h>, osfmk/mach/dyld_kernel_fixups.h. Images are
thin 64-bit little-endian Mach-O files with __LINKEDIT last. A word that becomes a fixup is read
from the image itself, so that what is decoded later must be the image's own bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from tests.builders.macho import name16, up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LC_SEGMENT_64, LC_DYSYMTAB, LC_DYLD_CHAINED_FIXUPS = 0x19, 0xB, 0x80000034
START_NONE = 0xFFFF


class Seg(NamedTuple):
    """A segment command, at offset `at` of the file."""

    at: int
    name: str
    vmaddr: int
    vmsize: int
    fileoff: int
    filesize: int
    nsects: int


def commands(data: bytes, start: int = 0) -> list[tuple[int, int, int]]:
    """(offset, cmd, cmdsize) of each load command of the Mach-O that begins at `start`."""
    (ncmds,) = struct.unpack_from("<I", data, start + 16)
    found, at = [], start + 32
    for _ in range(ncmds):
        cmd, size = struct.unpack_from("<2I", data, at)
        found.append((at, cmd, size))
        at += size
    return found


def segments(data: bytes, start: int = 0) -> list[Seg]:
    """The segments of the Mach-O that begins at `start`."""
    return [_seg(data, at) for at, cmd, _ in commands(data, start) if cmd == LC_SEGMENT_64]


def _seg(data: bytes, at: int) -> Seg:
    name, *numbers = struct.unpack_from("<16s4Q", data, at + 8)
    return Seg(
        at, name.rstrip(b"\0").decode(), *numbers, struct.unpack_from("<I", data, at + 64)[0]
    )


def segment(data: bytes, name: str) -> Seg:
    """The segment of that name."""
    return next(found for found in segments(data) if found.name == name)


def add_command(data: bytearray, command: bytes) -> None:
    """One more load command, in the room before the first section."""
    ncmds, size = struct.unpack_from("<2I", data, 16)
    assert not any(data[32 + size : 32 + size + len(command)]), "no room for a command"
    data[32 + size : 32 + size + len(command)] = command
    struct.pack_into("<2I", data, 16, ncmds + 1, size + len(command))


# pointers


def local_relocations(kernel: bytes) -> list[int]:
    """The addresses of a kernel's local relocations: its pointers, as the linker knew them."""
    at = next(at for at, cmd, _ in commands(kernel) if cmd == LC_DYSYMTAB)
    locreloff, nlocrel = struct.unpack_from("<2I", kernel, at + 72)
    base = segments(kernel)[0].vmaddr
    words = struct.unpack_from(f"<{2 * nlocrel}I", kernel, locreloff)
    return sorted(base + address for address in words[::2])


def words_between(data: bytes, names: Iterable[str], low: int, high: int) -> list[int]:
    """Addresses, at any byte, of words in the segments `names` whose values are in [low, high)."""
    found = []
    for seg in segments(data):
        if seg.name not in names:
            continue
        content = data[seg.fileoff : seg.fileoff + seg.filesize]
        top = struct.pack("<Q", low)[5:]  # what all values share
        assert high - low <= 1 << 40
        at = content.find(top, 5)
        after = 0
        while at >= 0:
            start = at - 5
            if (
                start >= after
                and low <= int.from_bytes(content[start : start + 8], "little") < high
            ):
                found.append(seg.vmaddr + start)
                after = start + 8
            at = content.find(top, at + 1)
    return found


class Place(NamedTuple):
    """A pointer to encode: where it lies in memory and in the file, and its value."""

    address: int
    offset: int
    value: int


def kernel_cache_word(base: int, level: int = 0, signed: bool = True) -> Callable[..., int]:
    """Formats 8 and 11: every third pointer is signed, if any may be."""

    def pack(index: int, value: int, distance: int) -> int:
        target = value - base
        assert 0 <= target < 1 << 30, f"target {target:#x}"
        word = target | level << 30 | distance << 51
        if signed and index % 3 == 0:
            word |= 0xBEEF << 32 | 1 << 48 | 2 << 49 | 1 << 63
        return word

    return pack


def arm64e_word(header: int) -> Callable[..., int]:
    """Format 7: every third pointer is signed, every fifth has a high byte of its own."""

    def pack(index: int, value: int, distance: int) -> int:
        if index % 3 == 0:
            target = value - header
            assert 0 <= target < 1 << 32
            return target | 0xBEEF << 32 | 1 << 48 | 2 << 49 | distance << 51 | 1 << 63
        target = (value - header) & 0xFFFFFFFFFFFFFFFF
        low, high8 = target & (1 << 43) - 1, target >> 56
        assert low | high8 << 56 == target
        return low | high8 << 43 | distance << 51

    return pack


def threaded_word(header: int) -> Callable[..., int]:
    """The older words: as format 7, but what is not signed is an address of 43 bits and a top."""

    def pack(index: int, value: int, distance: int) -> int:
        if index % 3 == 0 and 0 <= value - header < 1 << 32:
            return (value - header) | 0xBEEF << 32 | 1 << 48 | distance << 51 | 1 << 63
        return value & (1 << 43) - 1 | (value >> 56) << 43 | distance << 51

    return pack


def chain(
    data: bytearray, places: Sequence[Place], word: Callable[..., int], stride: int, most: int
) -> list[Place]:
    """Turn `places` (ascending) into words that chain; gives where a chain begins.

    A new one begins where the next place is more than `most` strides away, and where `data` has
    pages, at each page: the caller gives one page at a time.
    """
    heads = list(places[:1])
    for index, place in enumerate(places):
        gap = places[index + 1].address - place.address if index + 1 < len(places) else 0
        assert gap % stride == 0
        if gap // stride > most:
            heads.append(places[index + 1])
            gap = 0
        struct.pack_into("<Q", data, place.offset, word(index, place.value, gap // stride))
    return heads


class Starts(NamedTuple):
    """A segment with chains: `offset` from the header; where in each page its chain begins."""

    offset: int
    starts: tuple[int, ...]


def chain_pages(
    data: bytearray,
    spans: Iterable[tuple[int, int]],
    places: Sequence[Place],
    header: int,
    word: Callable[..., int],
    page_size: int,
    stride: int,
    most: int = 0xFFF,
) -> list[Starts | None]:
    """Chain `places` page by page through each (address, size) of `spans`."""
    result: list[Starts | None] = []
    for address, size in spans:
        pages: list[list[Place]] = [[] for _ in range(up(size, page_size) // page_size)]
        for place in places:
            if address <= place.address < address + size:
                pages[(place.address - address) // page_size].append(place)
        starts = []
        for index, inside in enumerate(pages):
            heads = chain(data, inside, word, stride, most)
            assert len(heads) < 2, "a page has one chain"
            page = address + index * page_size
            starts.append(heads[0].address - page if heads else START_NONE)
        some = any(start != START_NONE for start in starts)
        result.append(Starts(address - header, tuple(starts)) if some else None)
    return result


def chained_payload(
    chains: Sequence[Starts | None],
    page_size: int,
    pointer_format: int,
    imports: Sequence[str] = (),
) -> bytes:
    """The payload of LC_DYLD_CHAINED_FIXUPS; None is a segment without chains."""
    infos, offsets = b"", []
    at = up(4 + 4 * len(chains), 8)
    for found in chains:
        if found is None:
            offsets.append(0)
            continue
        offsets.append(at + len(infos))
        count, size = len(found.starts), 22 + 2 * len(found.starts)
        fields = (size, page_size, pointer_format, found.offset & (1 << 64) - 1, 0, count)
        info = struct.pack("<IHHQIH", *fields) + struct.pack(f"<{count}H", *found.starts)
        infos += info.ljust(up(size, 8), b"\0")
    head = struct.pack(f"<{1 + len(offsets)}I", len(offsets), *offsets).ljust(at, b"\0")
    entries, symbols = b"", b"\0"
    for name in imports:
        entries += struct.pack("<I", 0xFE | len(symbols) << 9)
        symbols += name.encode() + b"\0"
    imports_at = 32 + len(head) + len(infos)
    header = struct.pack(
        "<7I", 0, 32, imports_at, imports_at + len(entries), len(imports), 1, 0
    ).ljust(32, b"\0")
    return header + head + infos + entries + symbols


def append_linkedit(data: bytearray, more: bytes) -> int:
    """Put `more` at the end of __LINKEDIT, which ends the file; gives its file offset."""
    seg = segment(data, "__LINKEDIT")
    at = up(seg.fileoff + seg.filesize, 8)
    assert not any(data[seg.fileoff + seg.filesize :]), "more than padding after __LINKEDIT"
    del data[seg.fileoff + seg.filesize :]
    data += bytes(at - len(data)) + more
    size = len(data) - seg.fileoff
    struct.pack_into("<Q", data, seg.at + 32, max(seg.vmsize, up(size, 0x4000)))
    struct.pack_into("<Q", data, seg.at + 48, size)
    return at


def places_of(data: bytes, addresses: Iterable[int], low: int, high: int) -> list[Place]:
    """The pointers at `addresses` whose values lie in [low, high), 8 bytes or more apart."""
    found: list[Place] = []
    spans = [seg for seg in segments(data) if seg.filesize]
    for address in addresses:
        seg = next((s for s in spans if s.vmaddr <= address < s.vmaddr + s.filesize), None)
        if seg is None or (found and address < found[-1].address + 8):
            continue
        offset = seg.fileoff + address - seg.vmaddr
        (value,) = struct.unpack_from("<Q", data, offset)
        if low <= value < high:
            found.append(Place(address, offset, value))
    return found


def arm64e_kernel(kernel: bytes, addresses: Iterable[int], page_size: int = 0x1000) -> bytes:
    """A thin kernel whose pointers are chained in format 7."""
    data = bytearray(kernel)
    header = segment(kernel, "__TEXT").vmaddr
    places = places_of(kernel, addresses, header, header + (1 << 32))
    spans = [(seg.vmaddr, seg.filesize) for seg in segments(kernel)]
    chains = chain_pages(data, spans, places, header, arm64e_word(header), page_size, 4, 0x7FF)
    payload = chained_payload(chains, page_size, 7)
    at = append_linkedit(data, payload)
    add_command(data, struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, at, len(payload)))
    return bytes(data)


def threaded_kernel(kernel: bytes, addresses: Iterable[int], stride: int = 4) -> bytes:
    """A thin kernel whose pointers are threaded; __thread_starts goes behind the commands."""
    data = bytearray(kernel)
    text = segment(kernel, "__TEXT")
    places = places_of(kernel, addresses, text.vmaddr, text.vmaddr + (1 << 32))
    places = [place for place in places if place.address % stride == 0]
    heads = chain(data, places, threaded_word(text.vmaddr), stride, 0x7FF)
    offsets = [head.address - text.vmaddr for head in heads]
    words = [1 if stride == 8 else 0, *offsets, 0xFFFFFFFF]
    at = up(32 + struct.unpack_from("<I", data, 20)[0] + 16, 16)
    section = next(
        text.at + 72 + 80 * index
        for index in range(text.nsects)
        if data[text.at + 72 + 80 * index :].startswith(name16("__thread_starts"))
    )
    room = data[at : at + 4 * len(words)]
    assert not any(room), "no room for __thread_starts"
    struct.pack_into(f"<{len(words)}I", data, at, *words)
    struct.pack_into("<2QI", data, section + 32, text.vmaddr + at, 4 * len(words), at)
    return bytes(data)
