"""Chained fixups: packed pointers of arm64e kernels and kernel collections, and how they chain.

Sources: EXTERNAL_HEADERS/mach-o/fixup-chains.h and osfmk/mach/dyld_kernel_fixups.h,
xnu-11417.121.6; dyld's AppCacheBuilder.cpp, which writes them.
"""

from __future__ import annotations

import sys
from array import array
from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.fileset import COLLECTIONS
from kvmtool.macho import LC_REQ_DYLD
from kvmtool.memory import read_partial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvmtool.macho import LoadCommand, MachO
    from kvmtool.memory import RunMemory

LC_DYLD_CHAINED_FIXUPS = LC_REQ_DYLD | 0x34

# mach-o/fixup-chains.h: dyld_chained_starts_in_segment.pointer_format
DYLD_CHAINED_PTR_ARM64E_KERNEL = 7
DYLD_CHAINED_PTR_64_KERNEL_CACHE = 8
DYLD_CHAINED_PTR_X86_64_KERNEL_CACHE = 11
OTHER_FORMATS = {
    1: "ARM64E",
    2: "64",
    3: "32",
    4: "32_CACHE",
    5: "32_FIRMWARE",
    6: "64_OFFSET",
    9: "ARM64E_USERLAND",
    10: "ARM64E_FIRMWARE",
    12: "ARM64E_USERLAND24",
    13: "ARM64E_SHARED_CACHE",
}
DYLD_CHAINED_PTR_START_NONE, DYLD_CHAINED_PTR_START_MULTI = 0xFFFF, 0x8000

WORD = Struct("<Q")
MASK = (1 << 64) - 1
_HEADER = Struct("<7I")  # dyld_chained_fixups_header
_SEGMENT = Struct("<IHHQIH")  # dyld_chained_starts_in_segment, up to page_start[]
_IMPORTS = {1: Struct("<I"), 2: Struct("<Ii"), 3: Struct("<QQ")}  # dyld_chained_import*
_PAGE_SIZES = (0x1000, 0x4000)
_BLOCK = 0x4000
_NAME_LIMIT = 4096


def little(typecode: str, data: bytes) -> array[int]:
    """`data` as an array of little-endian integers."""
    words = array(typecode, data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


class ChainReader:
    """An image whose pointers are chained: its bytes, and errors that name their place."""

    def __init__(self, image: MachO, memory: RunMemory) -> None:
        """`memory` has the image's bytes as they lie in the file. Raises `FormatError`."""
        self.image, self.memory = image, memory
        self.name = image.source.name
        if image.byteorder != "<" or not image.is64:
            raise UnsupportedError(f"{self.name}: fixups in a 32-bit or big-endian image")
        text = image.segment("__TEXT")
        if text is None:
            raise FormatError(self.name, 0, "fixups in an image without __TEXT")
        self.header = text.vmaddr  # offsets in fixups count from the mach_header
        self._base, self._data = 0, b""

    def bad(self, address: int, message: str) -> FormatError:
        """An error about the pointer at `address`, with its place in the file where it has one."""
        segment = self.image.segment_at(address)
        offset = None
        if segment is not None and address - segment.vmaddr < segment.filesize:
            offset = segment.fileoff + address - segment.vmaddr
        return FormatError(self.name, offset, f"pointer at {address:#x}: {message}")

    def follow(
        self, address: int, stop: int, distance: Callable[[int], int]
    ) -> Iterator[tuple[int, int]]:
        """(address, raw word) along the chain from `address` on, which must end before `stop`.

        `distance` is how many bytes after a raw word the next one lies, 0 at the end.
        """
        while True:
            at = address - self._base
            if not 0 <= at <= len(self._data) - 8:
                self._base, at = address, 0
                self._data = read_partial(self.memory, address, _BLOCK)
                if len(self._data) < 8:
                    raise self.bad(address, "the chain leaves the image")
            raw: int = WORD.unpack_from(self._data, at)[0]
            yield address, raw
            step = distance(raw)
            if step == 0:
                return
            if step < 8:
                raise self.bad(address, f"the next one is {step} bytes on, expected 8 or more")
            if address + step >= stop:
                raise self.bad(address, f"the chain leaves its page, which ends at {stop:#x}")
            address += step


class _Pages:
    """The pages of one segment; `starts` has where in each its chain begins, 0xFFFF for none."""

    stride = 4
    next_mask = 0xFFF

    def __init__(
        self, payload: Payload, address: int, page_size: int, starts: array[int], place: int
    ) -> None:
        """`place` is the file offset of page_start[]."""
        self.address, self.page_size, self.starts = address, page_size, starts
        self.end = address + page_size * len(starts)
        self._payload, self._place = payload, place

    def holds(self, page: int) -> bool:
        """Whether the page at address `page` has any fixups."""
        index = (page - self.address) // self.page_size
        return self.starts[index] != DYLD_CHAINED_PTR_START_NONE

    def walk(self, page: int) -> Iterator[tuple[int, int]]:
        """(address, raw word) of each fixup in the page, ascending."""
        index = (page - self.address) // self.page_size
        start = self.starts[index]
        if start >= self.page_size:
            several = " (several chains)" if start & DYLD_CHAINED_PTR_START_MULTI else ""
            raise FormatError(
                self._payload.name,
                self._place + 2 * index,
                f"chained fixups: page_start {start:#x}{several}, "
                f"expected less than {self.page_size:#x}",
            )
        mask, stride = self.next_mask, self.stride
        return self._payload.follow(
            page + start, page + self.page_size, lambda raw: (raw >> 51 & mask) * stride
        )


class KernelCache64(_Pages):
    """Format 8: target 30 bits, cacheLevel 2, diversity 16, addrDiv 1, key 2, next 12, isAuth 1."""

    def decode(self, address: int, raw: int) -> tuple[int | None, str]:
        """What `raw` at `address` will be; None and why, when the file does not tell."""
        level = raw >> 30 & 3
        base = self._payload.bases.get(level)
        if base is not None:
            return (base + (raw & 0x3FFFFFFF)) & MASK, ""
        if level not in COLLECTIONS:
            raise self._payload.bad(address, f"word {raw:#x} has cacheLevel {level}, which is none")
        return (
            None,
            f"a pointer into the {COLLECTIONS[level]} kernel collection, which is not given",
        )


class KernelCacheX86(KernelCache64):
    """Format 11: the same word, at any byte; the processor cannot sign."""

    stride = 1

    def decode(self, address: int, raw: int) -> tuple[int | None, str]:
        """See `KernelCache64.decode`."""
        if raw >> 63:
            raise self._payload.bad(address, f"word {raw:#x} is signed, which x86_64 cannot do")
        return super().decode(address, raw)


class Arm64eKernel(_Pages):
    """Format 7: target 43 bits, high8 8, next 11, bind 1, auth 1; when signed, target 32 bits.

    Both targets are offsets from the mach_header. Bound: ordinal 16 bits, zero 16, addend 19.
    """

    next_mask = 0x7FF

    def decode(self, address: int, raw: int) -> tuple[int | None, str]:
        """See `KernelCache64.decode`."""
        auth = raw >> 63
        if raw >> 62 & 1:
            addend = 0 if auth else (raw >> 32 & 0x7FFFF ^ 0x40000) - 0x40000
            return self._payload.bind(address, raw & 0xFFFF, addend)
        if auth:
            return (self._payload.header + (raw & 0xFFFFFFFF)) & MASK, ""
        target = (raw >> 43 & 0xFF) << 56 | raw & 0x7FFFFFFFFFF
        return (self._payload.header + target) & MASK, ""


Chains = KernelCache64 | Arm64eKernel
_CHAINS: dict[int, type[KernelCache64] | type[Arm64eKernel]] = {
    DYLD_CHAINED_PTR_ARM64E_KERNEL: Arm64eKernel,
    DYLD_CHAINED_PTR_64_KERNEL_CACHE: KernelCache64,
    DYLD_CHAINED_PTR_X86_64_KERNEL_CACHE: KernelCacheX86,
}


class Payload(ChainReader):
    """The payload of LC_DYLD_CHAINED_FIXUPS."""

    def __init__(
        self,
        image: MachO,
        command: LoadCommand,
        memory: RunMemory,
        bases: Mapping[int, int],
        symbol: Callable[[str], int | None] | None,
    ) -> None:
        """See `kvmtool.fixups.Fixups`. Raises `FormatError` or `TruncatedError`."""
        super().__init__(image, memory)
        self.bases, self._symbol = bases, symbol
        if command.cmdsize != 16:
            raise FormatError(
                self.name,
                command.offset,
                f"LC_DYLD_CHAINED_FIXUPS: cmdsize {command.cmdsize:#x}, expected 0x10",
            )
        self._off, self._size = Struct("<2I").unpack_from(command.data, 8)
        left = max(0, image.source.size - self._off)
        if self._size > left:
            raise TruncatedError(self.name, self._off, self._size, left, "LC_DYLD_CHAINED_FIXUPS")

    def _read(self, off: int, size: int, what: str) -> bytes:
        if off + size > self._size:
            raise FormatError(
                self.name,
                self._off + off,
                f"chained fixups: {what} of {size:#x} bytes, the payload ends after "
                f"{max(0, self._size - off):#x}",
            )
        return self.image.source.read_at(self._off + off, size)

    def segments(self) -> Iterator[Chains]:
        """The chains of every segment that has any, in the file's order."""
        if self._size == 0:  # a collection's header has the command even when nothing needs it
            return
        version, starts, *self._imports = _HEADER.unpack(self._read(0, _HEADER.size, "header"))
        if version != 0:
            raise UnsupportedError(f"{self.name}: chained fixups version {version:#x}, expected 0")
        count = little("I", self._read(starts, 4, "seg_count"))[0]
        self._unclaimed = self._size
        for offset in little("I", self._read(starts + 4, 4 * count, "seg_info_offset")):
            if offset:
                yield self._segment(starts + offset)

    def _segment(self, at: int) -> Chains:
        fields = _SEGMENT.unpack(self._read(at, _SEGMENT.size, "starts of a segment"))
        size, page_size, pointer_format, segment_offset, _, page_count = fields
        kind = _CHAINS.get(pointer_format)
        if kind is None:
            known = OTHER_FORMATS.get(pointer_format)
            what = f"DYLD_CHAINED_PTR_{known}" if known else "unknown"
            raise UnsupportedError(
                f"{self.name}: chained fixups of pointer format {pointer_format} ({what}), "
                "expected one of a kernel: 7, 8 or 11"
            )
        address = (self.header + segment_offset) & MASK
        problem = ""
        if page_size not in _PAGE_SIZES:
            problem = f"page_size {page_size:#x}, expected 0x1000 or 0x4000"
        elif size < _SEGMENT.size + 2 * page_count:
            problem = f"size {size:#x} is too small for page_count {page_count:#x}"
        elif address + page_size * page_count > 1 << 64:
            problem = f"segment_offset {segment_offset:#x} leaves the address space"
        if problem:
            raise FormatError(self.name, self._off + at, f"chained fixups: {problem}")
        at += _SEGMENT.size
        starts = little("H", self._read(at, 2 * page_count, "page_start"))
        self._unclaimed -= _SEGMENT.size + 2 * page_count
        if self._unclaimed < 0:  # each has its own: a few could claim any number of pages
            raise FormatError(self.name, self._off + at, "chained fixups: segments overlap")
        while starts and starts[-1] == DYLD_CHAINED_PTR_START_NONE:
            starts.pop()
        return kind(self, address, page_size, starts, self._off + at)

    def bind(self, address: int, ordinal: int, addend: int) -> tuple[int | None, str]:
        """The address of import number `ordinal` plus `addend`, when its symbol is known."""
        imports, symbols, count, kind, packed = self._imports
        if ordinal >= count:
            raise self.bad(address, f"import {ordinal:#x}, expected less than {count:#x}")
        if kind not in _IMPORTS or packed:
            raise UnsupportedError(f"{self.name}: imports of format {kind}, symbols of {packed}")
        layout = _IMPORTS[kind]
        entry = self._read(imports + ordinal * layout.size, layout.size, "import")
        word, *more = layout.unpack(entry)
        at = symbols + (word >> 32 if kind == 3 else word >> 9)
        text = self._read(at, min(_NAME_LIMIT, max(1, self._size - at)), "symbol name")
        name = text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        value = self._symbol(name) if self._symbol is not None else None
        if value is None:
            return None, f"a pointer to be bound to {name}"
        return (value + addend + sum(more)) & MASK, ""
