"""Hibernation images (/var/vm/sleepimage) of Intel machines, as far as they are not encrypted.

Behind a header of 512 bytes, from xnu-2422 on of a block of the disk, lie one after the other: what
the header has no room for of the file's extents; the kernel's __HIB section, which wakes the
machine, as it is but for its stack, which is zeros; the preview, a list of page numbers and those
pages as they are; the page list, bitmaps of the banks of memory; the wired pages. The other pages
come from `image1Size` on. Of a page that is there twice the last counts, as it does for the machine
that wakes (xnu-1699 to 3247 write the wired pages twice when they do not encrypt). What is in none
of these is absent.

So it is in the source of xnu-792 (8.4), 1228, 1456, 1699, 2422, 2782, 3247 and 8020 (21.4). What a
kernel between or behind them writes is read if it fits: the page list must begin with its own size
where these have it. Refused: encrypted images, which a kernel with encrypted swap writes unless
`hibernatemode` has the bit 4, and every one of xnu-2050, which says so whether it is or not; those
of PowerPC machines (other byte order) and of Apple silicon (other header, always encrypted). From
xnu-2050 on the writer also reads through a null pointer when it does not encrypt: images of later
kernels that can be read must be rare.

Source: hibernate_write_image and IOHibernateSystemSleep in iokit/Kernel/IOHibernateIO.cpp,
hibernate_kernel_entrypoint in IOHibernateRestoreKernel.c, iokit/IOKit/IOHibernatePrivate.h.
"""

from __future__ import annotations

import time
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FormatError, UnsupportedError
from kvmtool.formats import UNSAID, Facts
from kvmtool.formats.run_table import RunTable
from kvmtool.formats.sleepimage_pages import Banks, StoredPages, StoredRun, Walk
from kvmtool.formats.wkdm import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

_HEADER_SIZE = 512
# IOHibernateImageHeader: imageSize, image1Size; restore1CodePhysPage, restore1PageCount; pageCount,
# bitmapSize; encryptStart; previewSize, previewPageListSize; fileExtentMapSize; and from xnu-1699
# on restore1CodeVirt, options, sleepTime, kernVirtSlide (7195), deviceBlockSize (2422; before, half
# of deviceBase is there)
_FIRST = "2Q 2I8x 2I 68x Q8x 2I 344x I"
_SECOND = "2Q I4xQI8x 2I 68x Q8x 2I 32x 2I 40x Q 240x 2I"
_FIRST_SIGNATURE, _SECOND_SIGNATURE = 0x4C, 0x58  # xnu-792 to 1504, from 1699 on
_WHOLE, _VOID, _OPEN, _DEBUG = 0x73696D65, 0x7A7A7A7A, 0xF1E0BE9D, 0xFCDDFCDD
_STATES = {
    _WHOLE: "whole",
    _VOID: "void: the machine has woken from it, or never finished it",
    _OPEN: "not finished",
    _DEBUG: "of debug data",
}
_BY_THE_DISK = 0x10  # of options: kIOHibernateOptionHWEncrypt
_SIZE_LIMIT = 1 << 48
_EXTENTS = 32  # bytes of fileExtentMap that the header holds
_EXTENTS_LIMIT = 1 << 24
_BLOCK_LIMIT = 1 << 16
_LOW_PAGES = 0x3FFFF  # xnu-792 gives the section's virtual page: osfmk/i386/hibernate_i386.c
_X86_64 = 0xFFFFFF80  # upper half of an address of the kernel's; 0 on i386
_PAGE_LIST, _BANK = Struct("<3I"), Struct("<3I")  # hibernate_page_list_t, hibernate_bitmap_t
_BANKS_LIMIT = 4096  # XNU has room for 32
_PAIR = Struct("<2I")
_PREVIEW_LIMIT = 1 << 20  # pairs of page and count
_RUNS_LIMIT = 1 << 21


class Header(NamedTuple):
    """What the header says; sizes in bytes. What it does not say is 0."""

    state: int
    big_endian: bool
    first_form: bool  # that of xnu-792 to 1504
    image_size: int
    image1_size: int
    code_page: int
    code_pages: int
    page_count: int
    bitmap_size: int
    encrypt_start: int
    preview_size: int
    preview_list_size: int
    extents_size: int
    code_address: int = 0
    options: int = 0
    slept: int = 0  # seconds since 1970
    slide: int = 0
    block_size: int = 0

    def __str__(self) -> str:
        told = [_STATES[self.state], f"{self.image_size:#x} bytes"]
        if self.page_count:
            told.append(f"{self.page_count:#x} pages")
        if self.slept:
            told.append(time.strftime("asleep since %Y-%m-%dT%H:%M:%SZ", time.gmtime(self.slept)))
        if self.encrypt_start:
            told.append(f"encrypted from offset {self.encrypt_start:#x}")
        if self.slide:
            told.append(f"kernel slide {self.slide:#x}")
        return ", ".join(told)


def read_header(head: bytes) -> Header | None:
    """The header that `head` begins with, or None if it is none."""
    if len(head) < _HEADER_SIZE:
        return None
    for at in (_SECOND_SIGNATURE, _FIRST_SIGNATURE):
        for order in ("<", ">"):
            state = int.from_bytes(head[at : at + 4], "little" if order == "<" else "big")
            if state not in _STATES:
                continue
            header = _unpack(head, state, order, at == _FIRST_SIGNATURE)
            least = 1 if state == _WHOLE else 0  # until an image is whole, its header has no sizes
            if least <= header.image1_size <= header.image_size < _SIZE_LIMIT:
                return header
    return None


def _unpack(head: bytes, state: int, order: str, first_form: bool) -> Header:
    big = order == ">"
    if first_form:
        return Header(state, big, True, *Struct(order + _FIRST).unpack_from(head))
    fields = Struct(order + _SECOND).unpack_from(head)
    size, size1, page, address, count, pages, bitmap, encrypt, *preview = fields[:10]
    return Header(
        *(state, big, False, size, size1, page, count, pages, bitmap, encrypt, *preview),
        *(fields[14], address, *fields[10:14]),
    )


class SleepImage(RunTable):
    """A hibernation image; offsets are those of the decoded pages, one after the other."""

    name = "sleepimage"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return read_header(head) is not None

    def __init__(self, source: Source) -> None:
        """Walk over all pages once. Raises `UnsupportedError`, `FormatError`."""
        super().__init__(source)
        header = read_header(source.read_at(0, min(_HEADER_SIZE, source.size)))
        if header is None:
            raise FormatError(source.name, 0, "expected the header of a hibernation image")
        self.header = header
        why = _refusal(header)
        if why:
            raise UnsupportedError(f"{source.name}: is a hibernation image ({header}), {why}")
        self.facts = _facts(header)
        self._pages = self.memory_source = StoredPages(source)
        code_at, bitmap_at = self._places()
        banks = Banks(self._banks(bitmap_at))
        for run in self._runs(bitmap_at + header.bitmap_size, banks):
            self.add(run.first * PAGE, run.pages * PAGE, run.number * PAGE, stored=run.held * PAGE)
        for column in (self._starts, self._ends, self._offsets):
            column.reverse()  # where runs overlap the first in these wins
        for first, offset, count in self._plain(code_at, bitmap_at, banks):
            number = len(self._pages)
            for at in range(offset, offset + count * PAGE, PAGE):
                self._pages.add(at, PAGE)
            self.add(first * PAGE, count * PAGE, number * PAGE)

    def _places(self) -> tuple[int, int]:
        """Where the __HIB section and the page list are: where the list says its own size."""
        header, source = self.header, self.source
        if not _EXTENTS <= header.extents_size <= _EXTENTS_LIMIT:
            at = _HEADER_SIZE - _EXTENTS - 4
            raise FormatError(source.name, at, f"fileExtentMapSize {header.extents_size:#x}")
        starts = [_HEADER_SIZE]
        block = header.block_size
        if _HEADER_SIZE < block <= _BLOCK_LIMIT and block & block - 1 == 0:
            starts.append(block)
        end = min(header.image1_size, source.size)
        for start in reversed(starts):
            code_at = start + header.extents_size - _EXTENTS
            bitmap_at = code_at + header.code_pages * PAGE + header.preview_size
            if _PAGE_LIST.size <= header.bitmap_size <= end - bitmap_at:
                list_size = _PAGE_LIST.unpack(source.read_at(bitmap_at, _PAGE_LIST.size))[0]
                if list_size == header.bitmap_size:
                    return code_at, bitmap_at
        raise FormatError(
            source.name,
            bitmap_at,
            f"expected a page list of {header.bitmap_size:#x} bytes that begins with its size "
            f"(the wired pages end at {header.image1_size:#x}, the file at {source.size:#x})",
        )

    def _banks(self, bitmap_at: int) -> Iterator[tuple[int, int]]:
        """First and last page of each bank of memory."""
        source, end = self.source, bitmap_at + self.header.bitmap_size
        count = _PAGE_LIST.unpack(source.read_at(bitmap_at, _PAGE_LIST.size))[2]
        at = bitmap_at + _PAGE_LIST.size
        for number in range(min(count, _BANKS_LIMIT + 1)):
            if number == _BANKS_LIMIT or at + _BANK.size > end:
                raise FormatError(source.name, at, f"{count:#x} banks of memory in the page list")
            first, last, words = _BANK.unpack(source.read_at(at, _BANK.size))
            if last < first or words * 32 <= last - first:
                raise FormatError(
                    source.name,
                    at,
                    f"a bank of pages {first:#x} to {last:#x} with {words:#x} words of bitmap",
                )
            yield first, last
            at += _BANK.size + 4 * words

    def _runs(self, pages_at: int, banks: Banks) -> Iterator[StoredRun]:
        """The runs of both parts of the image, in the order they were written."""
        header, source, count = self.header, self.source, 0
        parts = ((pages_at, header.image1_size), (header.image1_size, header.image_size))
        for at, end in parts:
            walk = Walk(source, self._pages, banks, min(end, source.size))
            for run in walk.runs(at):
                count += 1
                if count > _RUNS_LIMIT:
                    raise FormatError(source.name, at, f"more than {_RUNS_LIMIT:#x} runs of pages")
                yield run
            if walk.torn is None:
                continue
            torn_at, why = walk.torn
            what = "wired" if at == pages_at else "other"
            if not len(self._pages):
                raise FormatError(source.name, torn_at, f"no page is there: {why}")
            self.warnings.append(
                f"the list of {what} pages is torn at offset {torn_at:#x}: {why}; what it had "
                "behind that is absent"
            )

    def _plain(self, code_at: int, bitmap_at: int, banks: Banks) -> Iterator[tuple[int, int, int]]:
        """The pages stored as they are: (first page, file offset, count)."""
        header, source = self.header, self.source
        first = header.code_page & _LOW_PAGES if header.first_form else header.code_page
        if header.code_pages:
            yield first, code_at, header.code_pages
        list_at, size = bitmap_at - header.preview_size, header.preview_list_size
        if size > min(header.preview_size, _PREVIEW_LIMIT * _PAIR.size) or size % _PAIR.size:
            self.warnings.append(f"a list of {size:#x} bytes for the pages of the preview")
            return
        at = list_at + size
        for first, count in _PAIR.iter_unpack(source.read_at(list_at, size)):
            count = min(count, (bitmap_at - at) // PAGE)
            if not count or not banks.hold(first, count):
                return
            yield first, at, count
            at += count * PAGE


def _refusal(header: Header) -> str:
    """Why no page of the image can be read, or nothing."""
    if header.big_endian:
        return "of a PowerPC machine: kvmtool reads those of Intel machines"
    if header.state != _WHOLE:
        return "whose pages are not to be relied on"
    if header.code_address >> 32 not in (0, _X86_64):
        return f"whose kernel at {header.code_address:#x} is none of an Intel machine"
    if header.options & _BY_THE_DISK:
        return "which the disk's controller has encrypted"
    if header.encrypt_start:
        return "whose pages cannot be read without the key, which the machine kept to itself"
    return ""


def _facts(header: Header) -> Facts:
    cputype, said = UNSAID, {}
    if header.code_address:
        cputype = macho.CPU_TYPE_X86_64 if header.code_address >> 32 else macho.CPU_TYPE_I386
        said["cputype"] = f"restore1CodeVirt {header.code_address:#x}"
    if header.slide:
        said["slide"] = "kernVirtSlide"
    return Facts(cputype, 0, slide=header.slide or None, said=said)
