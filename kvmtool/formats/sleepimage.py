"""Hibernation images (/var/vm/sleepimage): recognised, their header read, and refused.

What follows the header is usually encrypted; where it is not, pages are compressed by WKdm. No real
image was there to hold a decoder against, and wrong memory is worse than none. What the header says
is in the error: the slide is worth having on its own.

Source: iokit/IOKit/IOHibernatePrivate.h of xnu 792 to 11417.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from kvmtool.source import Source

# IOHibernateImageHeader
_HEADER_SIZE = 512
_SIZES = Struct("<QQ")  # imageSize, image1Size
_SIGNATURES_AT = (0x58, 0x4C)  # signature; the second in 10.4
_PAGE_COUNT = Struct("<I")
_PAGE_COUNT_AT = 44
_ENCRYPT_START = Struct("<Q")
_ENCRYPT_START_AT = 120
_SLIDE = Struct("<Q")
_SLIDE_AT = 224  # kernVirtSlide, from xnu-7195 (macOS 11) on; reserved and 0 before
_STATES = {
    0x73696D65: "whole",  # kIOHibernateHeaderSignature
    0x7A7A7A7A: "used (the machine has woken from it)",  # kIOHibernateHeaderInvalidSignature
    0xF1E0BE9D: "not finished",  # kIOHibernateHeaderOpenSignature
    0xFCDDFCDD: "of debug data",  # kIOHibernateHeaderDebugDataSignature
}
_SIZE_LIMIT = 1 << 48


class Header(NamedTuple):
    """What the header says; sizes in bytes, `slide` 0 where it is not said."""

    state: str
    image_size: int
    page_count: int
    encrypt_start: int
    slide: int


def read_header(head: bytes) -> Header | None:
    """The header that `head` begins with, or None if it is none."""
    if len(head) < _HEADER_SIZE:
        return None
    image_size, image1_size = _SIZES.unpack_from(head)
    if not 0 < image1_size <= image_size < _SIZE_LIMIT:
        return None
    for at in _SIGNATURES_AT:
        state = _STATES.get(int.from_bytes(head[at : at + 4], "little"))
        if state is None:
            continue
        later = at == _SIGNATURES_AT[0]  # 10.4 has its fields elsewhere
        return Header(
            state,
            image_size,
            _PAGE_COUNT.unpack_from(head, _PAGE_COUNT_AT)[0] if later else 0,
            _ENCRYPT_START.unpack_from(head, _ENCRYPT_START_AT)[0] if later else 0,
            _SLIDE.unpack_from(head, _SLIDE_AT)[0] if later else 0,
        )
    return None


class SleepImage:
    """A hibernation image."""

    name = "sleepimage"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`."""
        return read_header(head) is not None

    def __init__(self, source: Source) -> None:
        """Raises `UnsupportedError` for an image, `FormatError` for what is none."""
        header = read_header(source.read_at(0, min(_HEADER_SIZE, source.size)))
        if header is None:
            raise FormatError(source.name, 0, "expected the header of a hibernation image")
        told = [f"{header.state}, {header.image_size:#x} bytes"]
        if header.page_count:
            told.append(f"{header.page_count:#x} pages")
        if header.encrypt_start:
            told.append(f"encrypted from offset {header.encrypt_start:#x}")
        if header.slide:
            told.append(f"kernel slide {header.slide:#x}")
        raise UnsupportedError(
            f"{source.name}: is a hibernation image ({', '.join(told)}), whose pages kvmtool "
            "cannot decode"
        )
