"""The threaded rebase of static arm64e kernelcaches: chains of pointers through the whole image.

The words are those of pointer format 7, but a target that is not signed is an address; where the
chains begin is told by the section __TEXT,__thread_starts.
Source: `rebase_threaded_starts`, osfmk/arm/arm_init.c (xnu-6153) and
osfmk/mach/dyld_kernel_fixups.h (xnu-11417.121.6).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from kvmtool.chains import MASK, WORD, ChainReader, little
from kvmtool.macho import CPU_TYPE_ARM64
from kvmtool.memory import read_partial

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.macho import MachO
    from kvmtool.memory import RunMemory

_PAGE = 0x4000
_END = 0xFFFFFFFF


def thread_starts(image: MachO) -> array[int] | None:
    """The words of __TEXT,__thread_starts; None when the image has no threads."""
    if image.cputype != CPU_TYPE_ARM64:
        return None
    for section in image.sections:
        if section.sectname == "__thread_starts" and section.segname == "__TEXT":
            size = section.size // 4 * 4
            return little("I", image.source.read_at(section.offset, size)) if size > 4 else None
    return None


class Threads(ChainReader):
    """All threads of an image, as pages like those of `chains`."""

    page_size = _PAGE

    def __init__(self, image: MachO, memory: RunMemory, starts: array[int]) -> None:
        """`starts`: bit 0 of word 0 tells the stride, the others are offsets from the header."""
        super().__init__(image, memory)
        self._stride = 8 if starts[0] & 1 else 4
        end = starts.index(_END) if _END in starts else len(starts)
        self._heads = sorted(starts[1:end])
        self._limit = sum(segment.filesize for segment in image.segments) // 8

    @property
    def address(self) -> int:
        """Where the page of the first pointer begins."""
        return self._addresses[0] // _PAGE * _PAGE if self._addresses else self.header

    @property
    def end(self) -> int:
        """Where the page of the last pointer ends."""
        return self._addresses[-1] // _PAGE * _PAGE + _PAGE if self._addresses else self.header

    @cached_property
    def _addresses(self) -> array[int]:
        """Where the pointers lie, sorted. No page tells which chains run through it."""
        found = array("Q")
        for head in self._heads:
            for address, _ in self.follow(self.header + head, 1 << 64, self._distance):
                found.append(address)
                if len(found) > self._limit:
                    raise self.bad(address, "chains run into each other")
        found = array("Q", sorted(found))
        for before, after in pairwise(found):
            if after - before < 8:
                raise self.bad(after, f"overlaps the pointer at {before:#x}")
        return found

    def _distance(self, raw: int) -> int:
        return (raw >> 51 & 0x7FF) * self._stride

    def holds(self, page: int) -> bool:
        """Whether the page at address `page` has any fixups."""
        at = bisect_left(self._addresses, page)
        return at < len(self._addresses) and self._addresses[at] < page + _PAGE

    def walk(self, page: int) -> Iterator[tuple[int, int]]:
        """(address, raw word) of each fixup in the page, ascending."""
        found = self._addresses
        data = read_partial(self.memory, page, _PAGE + 7)
        for address in found[bisect_left(found, page) : bisect_left(found, page + _PAGE)]:
            yield address, WORD.unpack_from(data, address - page)[0]

    def decode(self, _address: int, raw: int) -> tuple[int | None, str]:
        """What `raw` will be. A word marked as bound stays as it is: xnu leaves it, too."""
        if raw >> 62 & 1:
            return raw, ""
        if raw >> 63:
            return (self.header + (raw & 0xFFFFFFFF)) & MASK, ""
        target = (raw & 0x7FFFFFFFFFF ^ 1 << 42) - (1 << 42)  # 43 bits, signed
        return (raw >> 43 & 0xFF) << 56 | target & 0x00FFFFFFFFFFFFFF, ""
