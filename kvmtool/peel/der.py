"""DER (X.690), as much as an IM4P takes: strict lengths, read where they lie.

A reader of our own because a payload of 60 MB must be found, not copied: the libraries take and
give bytes, this takes a `Source` and gives offsets. Each element costs one read of at most ten
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

INTEGER, OCTET_STRING, IA5_STRING, SEQUENCE = 0x02, 0x04, 0x16, 0x30
CONTEXT_0 = 0xA0  # [0], constructed

_HIGH_TAG = 0x1F  # the tag number goes on in the next bytes
_LONGEST_HEADER = 10  # tag, length of length, eight bytes of length
_MAX_MEMBERS = 16  # of a sequence; an IM4P has seven at most
_MAX_TEXT = 4096  # bytes


class Element(NamedTuple):
    """One element: its tag byte at offset `off`, its content of `size` bytes at `start`."""

    tag: int
    off: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """The offset after the element."""
        return self.start + self.size


def element(source: Source, off: int, end: int) -> Element:
    """The element at `off`, which must end at `end` or before.

    Raises `FormatError` or `TruncatedError`.
    """
    header = source.read_at(off, min(_LONGEST_HEADER, end - off))
    if len(header) < 2:
        raise TruncatedError(source.name, off, 2, len(header), "DER element")
    tag, first = header[0], header[1]
    if tag & _HIGH_TAG == _HIGH_TAG:
        raise FormatError(source.name, off, f"DER tag {tag:#x}, expected one of a single byte")
    size, start = first, off + 2
    if first & 0x80:
        count = first & 0x7F
        digits = header[2 : 2 + count]
        size, start = int.from_bytes(digits, "big"), start + count
        if not 0 < count <= 8 or (len(digits) == count and size < max(0x80, 1 << 8 * (count - 1))):
            raise FormatError(
                source.name, off + 1, f"DER length {header[1:].hex()}, expected the shortest form"
            )
        if len(digits) < count:
            raise TruncatedError(source.name, off + 2, count, len(digits), "DER length")
    if start + size > end:
        raise TruncatedError(source.name, start, size, max(0, end - start), f"DER element {tag:#x}")
    return Element(tag, off, start, size)


def members(source: Source, sequence: Element) -> Iterator[Element]:
    """The elements in `sequence`, which they must fill. Raises as `element` does."""
    off = sequence.start
    for _ in range(_MAX_MEMBERS):
        if off == sequence.end:
            return
        member = element(source, off, sequence.end)
        yield member
        off = member.end
    if off != sequence.end:
        raise FormatError(source.name, off, f"DER sequence of more than {_MAX_MEMBERS} members")


def expect(source: Source, found: Element | None, tag: int, what: str, after: Element) -> Element:
    """`found` if it has `tag`; raises `FormatError` for any other, or none behind `after`."""
    if found is None:
        raise FormatError(source.name, after.end, f"{what}: expected DER tag {tag:#x}, got none")
    if found.tag != tag:
        raise FormatError(
            source.name, found.off, f"{what}: expected DER tag {tag:#x}, got {found.tag:#x}"
        )
    return found


def text(source: Source, found: Element) -> str:
    """The content of a string, anything but ASCII escaped. Raises `FormatError` if it is long."""
    if found.size > _MAX_TEXT:
        raise FormatError(
            source.name, found.off, f"DER string of {found.size:#x} bytes, expected {_MAX_TEXT:#x}"
        )
    return source.read_at(found.start, found.size).decode("ascii", "backslashreplace")


def number(source: Source, found: Element) -> int:
    """The content of an INTEGER that is a size or a code: not negative, at most 8 bytes."""
    data = source.read_at(found.start, min(found.size, 9))
    if not 0 < found.size <= 9 or data[0] & 0x80 or (len(data) == 9 and data[0]):
        raise FormatError(
            source.name, found.off, f"DER integer {data.hex()}, expected one of 0 to 64 bits"
        )
    return int.from_bytes(data, "big")
