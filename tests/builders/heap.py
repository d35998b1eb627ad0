"""Kernel memory under construction: regions of bytes at addresses, structures poked into them.

Where a member lies is asked of a layout (anything with offset, size and has), so nothing here
knows a release. `Record` writes one structure; a member the layout lacks is an error unless the
caller says that only some releases have it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Protocol

from tests.builders.macho import up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MASK64 = (1 << 64) - 1


class Layout(Protocol):
    """What the builders need of kvmtool.types.model.TypeTable."""

    name: str

    def has(self, struct: str, member: str | None = None) -> bool: ...

    def offset(self, struct: str, member: str) -> int: ...

    def size(self, struct: str) -> int: ...

    def struct(self, name: str) -> Any: ...


class Region:
    """Bytes from address `base` on; `alloc` takes from its end, or from a gap before a pin."""

    def __init__(self, name: str, base: int) -> None:
        self.name = name
        self.base = base
        self.data = bytearray()
        self._next = 0
        self._pins: list[tuple[int, int]] = []

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.base + len(self.data)

    def pin(self, address: int, size: int) -> int:
        """Reserve [address, address + size) before anything is allocated there."""
        if address - self.base < self._next:
            raise ValueError(f"{address:#x} is not free in {self.name}")
        self._pins.append((address - self.base, address - self.base + size))
        self._grow(address - self.base + size)
        return address

    def alloc(self, size: int, align: int = 16) -> int:
        """The address of `size` zero bytes."""
        at = up(self._next, align)
        for start, end in sorted(self._pins):
            if at < end and start < at + size:
                at = up(end, align)
        self._next = at + size
        self._grow(self._next)
        return self.base + at

    def _grow(self, size: int) -> None:
        if size > len(self.data):
            self.data.extend(bytes(size - len(self.data)))

    def write(self, address: int, data: bytes) -> None:
        """Overwrite; the range must have been allocated."""
        at = address - self.base
        if at < 0 or at + len(data) > len(self.data):
            raise ValueError(f"{address:#x} is not wholly in {self.name}")
        self.data[at : at + len(data)] = data


class Memory:
    """All regions of a kernel; `width` bytes per pointer, little-endian as every kernel here."""

    def __init__(self, width: int, page: int) -> None:
        self.width = width
        self.page = page
        self.regions: list[Region] = []

    def region(self, name: str, base: int) -> Region:
        """A new empty region."""
        self.regions.append(Region(name, base))
        return self.regions[-1]

    def find(self, address: int) -> Region:
        """The region that holds `address`."""
        for region in self.regions:
            if region.base <= address < region.end:
                return region
        raise ValueError(f"{address:#x} is in no region")

    def write(self, address: int, data: bytes) -> None:
        """Overwrite allocated bytes."""
        self.find(address).write(address, data)

    def read(self, address: int, size: int) -> bytes:
        """Allocated bytes."""
        region = self.find(address)
        return bytes(region.data[address - region.base : address - region.base + size])

    def pointer(self, value: int) -> bytes:
        """A pointer as it lies in memory."""
        return value.to_bytes(self.width, "little")

    def put_pointer(self, address: int, value: int) -> None:
        """Store a pointer."""
        self.write(address, self.pointer(value))

    def put_u32(self, address: int, value: int) -> None:
        """Store a 32-bit number."""
        self.write(address, (value & 0xFFFFFFFF).to_bytes(4, "little"))

    def runs(self, pages: int) -> Iterator[tuple[int, bytes]]:
        """(address, bytes) of at most `pages` pages each, whole pages, ascending addresses."""
        step = pages * self.page
        end = 0
        for region in sorted(self.regions, key=lambda r: r.base):
            if region.base < end:
                raise ValueError(f"{region.name} overlaps what lies before it")
            end = up(region.end, self.page)
            content = bytes(region.data.ljust(up(len(region.data), self.page), b"\0"))
            for at in range(0, len(content), step):
                yield region.base + at, content[at : at + step]


class Signer:
    """Pointer authentication as it is seen from outside: noise above the address bits.

    `bits` is 64 minus T1SZ (47 on macOS); bit 55 selects the kernel half and is never touched
    (Arm ARM, D8.8). Without `bits` pointers stay as they are.
    """

    def __init__(self, bits: int | None) -> None:
        self._kept = (1 << bits) - 1 | 1 << 55 if bits else MASK64

    def __call__(self, pointer: int, place: int) -> int:
        """`pointer` as stored at address `place`; null is never signed."""
        if not pointer or self._kept == MASK64:
            return pointer
        noise = (pointer ^ place) * 0x9E3779B97F4A7C15 & MASK64
        signed = pointer & self._kept | noise & ~self._kept & MASK64
        return signed if signed != pointer else signed ^ 1 << 60


class Types:
    """A layout with what writing needs: cached offsets, and which members hold signed pointers."""

    def __init__(
        self, layout: Layout, width: int, signer: Signer, signed: frozenset[tuple[str, str]]
    ) -> None:
        self.layout = layout
        self.sign = signer
        self.signed = signed
        self.word = struct.Struct("<Q" if width == 8 else "<I")
        self.width = width
        self._offsets: dict[tuple[str, str], int | None] = {}

    def has(self, tag: str, member: str | None = None) -> bool:
        """Whether this release has it."""
        return self.layout.has(tag, member)

    def offset(self, tag: str, member: str) -> int:
        """Bytes from the start of the structure; the layout's error if there is no such member."""
        found = self.find(tag, member)
        return self.layout.offset(tag, member) if found is None else found

    def find(self, tag: str, member: str) -> int | None:
        """As `offset`, None if there is no such member."""
        key = (tag, member)
        if key not in self._offsets:
            has = self.layout.has(tag, member)
            self._offsets[key] = self.layout.offset(tag, member) if has else None
        return self._offsets[key]


_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")


class Record:
    """One structure in memory. `maybe=True` leaves out a member that this release lacks."""

    __slots__ = ("_at", "_data", "_tag", "_types", "address")

    def __init__(self, types: Types, region: Region, tag: str, address: int | None = None) -> None:
        """A structure `tag` at `address`, by default newly allocated from `region`."""
        if address is None:
            address = region.alloc(types.layout.size(tag))
        self.address = address
        self._at = address - region.base
        self._data = region.data
        self._tag = tag
        self._types = types

    def place(self, member: str) -> int:
        """The address of a member."""
        return self.address + self._types.offset(self._tag, member)

    def _pack(self, packer: struct.Struct, member: str, value: int, maybe: bool, at: int) -> None:
        offset = self._types.find(self._tag, member)
        if offset is None:
            if maybe:
                return
            offset = self._types.offset(self._tag, member)  # raises
        packer.pack_into(self._data, self._at + offset + at, value)

    def u8(self, member: str, value: int, *, maybe: bool = False) -> None:
        """One byte, signed or not."""
        self._pack(struct.Struct("<B"), member, value & 0xFF, maybe, 0)

    def u16(self, member: str, value: int, *, maybe: bool = False, at: int = 0) -> None:
        """Two bytes, `at` bytes into the member."""
        self._pack(_U16, member, value & 0xFFFF, maybe, at)

    def u32(self, member: str, value: int, *, maybe: bool = False, at: int = 0) -> None:
        """Four bytes, `at` bytes into the member."""
        self._pack(_U32, member, value & 0xFFFFFFFF, maybe, at)

    def u64(self, member: str, value: int, *, maybe: bool = False) -> None:
        """Eight bytes."""
        self._pack(_U64, member, value & MASK64, maybe, 0)

    def word(self, member: str, value: int, *, maybe: bool = False, at: int = 0) -> None:
        """An unsigned long."""
        self._pack(self._types.word, member, value, maybe, at)

    def ptr(self, member: str, value: int, *, maybe: bool = False, at: int = 0) -> None:
        """A pointer, signed where this release signs it."""
        if (self._tag, member) in self._types.signed:
            value = self._types.sign(value, self.address)
        self._pack(self._types.word, member, value, maybe, at)

    def timeval(self, member: str, start: tuple[int, int]) -> None:
        """struct timeval: long tv_sec, int tv_usec."""
        self.word(member, start[0])
        self.u32(member, start[1], at=self._types.width)

    def text(self, member: str, value: str, size: int, *, maybe: bool = False) -> None:
        """char[size]: cut to leave room for the NUL."""
        if maybe and self._types.find(self._tag, member) is None:
            return
        at = self._at + self._types.offset(self._tag, member)
        cut = value.encode()[: size - 1]
        self._data[at : at + len(cut)] = cut


def queue(memory: Memory, head: int, elements: Sequence[int], link: int) -> None:
    """A queue of osfmk/kern/queue.h, as queue_enter leaves it.

    `head` is the address of its {next, prev}; `elements` are addresses of structures, whose own
    {next, prev} lies `link` bytes in. The pointers are to structures, the head's address ends both
    directions.
    """
    places = [head, *(element + link for element in elements)]
    targets = [head, *elements]
    count = len(targets)
    for index, place in enumerate(places):
        memory.put_pointer(place, targets[(index + 1) % count])
        memory.put_pointer(place + memory.width, targets[index - 1])


def bsd_list(memory: Memory, head: int, elements: Sequence[int], link: int) -> None:
    """A LIST of <sys/queue.h>: `head` is lh_first's address, {le_next, le_prev} lies `link` in."""
    before = head
    for element in elements:
        memory.put_pointer(before, element)
        memory.put_pointer(element + link + memory.width, before)
        before = element + link
    memory.put_pointer(before, 0)


def tail_queue(memory: Memory, head: int, elements: Sequence[int], link: int) -> None:
    """A TAILQ of <sys/queue.h>: {tqh_first, tqh_last} at `head`, {tqe_next, tqe_prev} `link` in."""
    bsd_list(memory, head, elements, link)
    memory.put_pointer(head + memory.width, elements[-1] + link if elements else head)
