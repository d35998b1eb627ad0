"""Hibernation images as hibernate_write_image writes them (IOHibernateIO.cpp of the named XNUs)."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, NamedTuple

from builders import wkdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PAGE = wkdm.PAGE
TAG = 0x53000000
WHOLE = 0x73696D65


class Era(NamedTuple):
    """What differs between kernels: `zeros` is how a page of one word is stored."""

    first_header: bool = False
    form: int = wkdm.SECOND
    block: int = 512
    twice: bool = True  # the wired pages, when nothing is encrypted
    zeros: str = "word"  # "word": four bytes; "empty": zeros in no bytes; "": like any page
    pairs: bool = True


ERAS = {
    "10.5": Era(first_header=True, form=wkdm.FIRST, twice=False, zeros="", pairs=False),  # 1228
    "10.7": Era(form=wkdm.FIRST, zeros="", pairs=False),  # xnu-1699
    "10.9": Era(block=4096, zeros="empty", pairs=False),  # xnu-2422
    "10.11": Era(),  # xnu-3247
    "12": Era(block=4096, twice=False),  # with AES in the processor: one pass for wired pages
}


class Span(NamedTuple):
    """`pages` pages of memory from page number `first` on."""

    first: int
    pages: int

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.pages)


NO_CODE = Span(0, 0)


def in_pages(ranges: Iterable[tuple[int, bytes]]) -> dict[int, bytes]:
    """The pages of (address, content), by number."""
    return {
        (address + at) // PAGE: content[at : at + PAGE]
        for address, content in ranges
        for at in range(0, len(content), PAGE)
    }


def image(
    memory: dict[int, bytes],
    era: Era = ERAS["10.11"],
    *,
    wired: Callable[[int], bool] = lambda number: number % 3 != 0,
    code: Span = NO_CODE,
    preview: tuple[Span, ...] = (),
    extents: int = 2,
    tail: bytes = b"",
    **fields: int,
) -> bytes:
    """An image of `memory` (pages by number); `fields` overwrite what the header says."""
    out = bytearray(era.block)
    out += bytes(16 * max(0, extents - 2))
    out += b"".join(memory[number] for number in code.numbers)
    shown = b"".join(struct.pack("<2I", *span) for span in (*preview, (0, 0)) if preview)
    pictures = b"".join(memory[number] for span in preview for number in span.numbers)
    out += shown + pictures
    bitmaps = page_list(memory)
    out += bitmaps
    kept = set(memory).difference(code.numbers, *(span.numbers for span in preview))
    first_pass = runs(number for number in kept if wired(number))
    wired_pages = b"".join(stored_run(memory, span, era) for span in first_pass)
    out += wired_pages * (2 if era.twice else 1) + struct.pack("<2I", 0, 0)
    out += b"\xa5" * (-len(out) % era.block)
    image1_size = len(out)
    for span in runs(number for number in kept if not wired(number)):
        out += stored_run(memory, span, era)
    out += struct.pack("<2I", 0, 0) + tail
    out += b"\xa5" * (-len(out) % era.block)
    said = {
        "image_size": len(out),
        "image1_size": image1_size,
        "code_page": code.first,
        "code_pages": code.pages,
        "page_count": len(kept),
        "bitmap_size": len(bitmaps),
        "preview_size": len(shown + pictures),
        "preview_list_size": len(shown),
        "extents_size": 16 * max(2, extents),
        "block_size": era.block if era.block > 512 or not era.form else 0,
    }
    out[:512] = header(era.first_header, **said | fields)
    return bytes(out)


def header(first_form: bool = False, *, order: str = "<", **said: int) -> bytes:
    """IOHibernateImageHeader, field by field; what is not `said` is 0."""
    said.setdefault("signature", WHOLE)
    out = bytearray(512)

    def put(at: int, layout: str, *names: str) -> None:
        struct.pack_into(order + layout, out, at, *(said.get(name, 0) for name in names))

    put(0, "QQ", "image_size", "image1_size")
    if first_form:
        put(16, "II", "code_page", "code_pages")
        put(32, "II", "page_count", "bitmap_size")
        put(76, "I", "signature")
        put(108, "Q", "encrypt_start")
        put(124, "II", "preview_size", "preview_list_size")
    else:
        put(16, "I", "code_page")
        put(24, "QI", "code_address", "code_pages")
        put(44, "II", "page_count", "bitmap_size")
        put(88, "I", "signature")
        put(120, "Q", "encrypt_start")
        put(136, "II", "preview_size", "preview_list_size")
        put(176, "IQ", "options", "slept")
        put(224, "Q", "slide")
        put(472, "I", "block_size")
    put(476, "I", "extents_size")
    return bytes(out)


def runs(numbers: Iterable[int]) -> list[Span]:
    """Runs of page numbers, ascending."""
    out: list[Span] = []
    for number in sorted(numbers):
        if out and number == out[-1].first + out[-1].pages:
            out[-1] = Span(out[-1].first, out[-1].pages + 1)
        else:
            out.append(Span(number, 1))
    return out


def page_list(memory: Iterable[int]) -> bytes:
    """hibernate_page_list_t with a bank for each run of memory."""
    banks = runs(memory)
    body = b""
    for bank in banks:
        words = (bank.pages + 31) // 32
        body += struct.pack("<3I", bank.first, bank.first + bank.pages - 1, words)
        body += bytes(4 * words)
    return struct.pack("<3I", 12 + len(body), sum(b.pages for b in banks), len(banks)) + body


def stored_run(memory: dict[int, bytes], span: Span, era: Era) -> bytes:
    """{first page, count} and each page behind its tag."""
    parts = [struct.pack("<2I", *span)]
    for number in span.numbers:
        data = stored(memory[number], era._replace(block=0))
        parts.append(struct.pack("<I", TAG | len(data)) + data + bytes(-len(data) % 4))
    return b"".join(parts)


@functools.lru_cache(maxsize=1 << 14)
def stored(page: bytes, era: Era) -> bytes:
    """The page as the kernel stores it."""
    if era.zeros == "word" and page == page[:4] * 1024:
        return page[:4]
    if era.zeros == "empty" and not any(page):
        return b""
    data = wkdm.packed(page, era.form)
    if era.pairs and len(sparse := wkdm.pairs(page)) < len(data):
        data = sparse
    return data if len(data) < PAGE - 4 else page
