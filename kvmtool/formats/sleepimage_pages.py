"""The pages of a hibernation image: found by walking over all of them, decoded when they are read.

They come in runs, {first page number, count}, two words, and before each page a tag: 0x53000000 and
the bytes it takes, with which nothing but the walk tells where the next one is. A run of no pages
ends the list. A page of 4096 bytes is stored as it is; of 4, it is that word again and again; of 0,
zeros (xnu-2422 and xnu-2782 wrote those); any other is WKdm.

Source: hibernate_write_image and hibernate_machine_init in iokit/Kernel/IOHibernateIO.cpp,
kIOHibernateTag* in IOHibernateInternal.h, of xnu-792 (8.4) to xnu-8020 (21.4).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError
from kvmtool.formats import wkdm
from kvmtool.formats.wkdm import PAGE
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.source import Source

_RUN = Struct("<II")
_TAG = Struct("<I")
_TAG_SIGNATURE, _TAG_LENGTH = 0x53000000, 0x7FFF  # once 0x1FFF: no page takes more
_SIZE_BITS = 16  # of an entry of the index: its offset above, the bytes it takes below
_FILLED = 4
_WINDOW = 1 << 16  # bytes that a walk reads at a time
_KEEP = (32 << 20) // PAGE  # decoded pages
_ZEROS = bytes(PAGE)


class StoredRun(NamedTuple):
    """Pages [first, first + pages) of memory; `held` of them are stored, from the `number`th on."""

    first: int
    pages: int
    held: int
    number: int


class StoredPages:
    """The pages that were added, one after the other, as a `Source`.

    Safe to use from several threads. Does not own `parent`.
    """

    def __init__(self, parent: Source) -> None:
        """Without pages yet."""
        self.name = parent.name
        self.form: int | None = None  # that of WKdm, as the pages themselves tell it
        self._parent = parent
        self._index = array("Q")
        self._kept: dict[int, bytes] = {}  # by number, the one decoded first in front
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def size(self) -> int:
        """See `Source.size`."""
        return len(self._index) * PAGE

    def add(self, offset: int, size: int) -> None:
        """A page that takes `size` bytes at file offset `offset`."""
        self._index.append(offset << _SIZE_BITS | size)

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`; raises `FormatError` for a page that does not decode."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        if not size:
            return b""
        first, start = divmod(off, PAGE)
        last = (off + size - 1) // PAGE
        if first == last:
            return self._page(first)[start : start + size]
        pages = [self._page(number) for number in range(first, last + 1)]
        pages[0] = pages[0][start:]
        pages[-1] = pages[-1][: off + size - last * PAGE]
        return b"".join(pages)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        with self._lock:
            self._kept.clear()

    def _page(self, number: int) -> bytes:
        offset, size = divmod(self._index[number], 1 << _SIZE_BITS)
        if size == PAGE:
            return self._parent.read_at(offset, PAGE)
        if size == _FILLED:
            return self._parent.read_at(offset, _FILLED) * (PAGE // _FILLED)
        page = self._kept.get(number)
        if page is None:
            page = self._decode(offset, size)
            with self._lock:
                self._kept[number] = page
                if len(self._kept) > _KEEP:
                    del self._kept[next(iter(self._kept))]
        return page

    def _decode(self, offset: int, size: int) -> bytes:
        form = self.form
        if size == 0 and form != wkdm.FIRST:
            return _ZEROS
        if form is None:
            raise FormatError(
                self.name, offset, "the compressed pages do not tell which form of WKdm they have"
            )
        try:
            return wkdm.unpack(self._parent.read_at(offset, size), form)
        except ValueError as error:
            raise FormatError(self.name, offset, f"the page cannot be decoded ({error})") from error


class Banks:
    """The ranges of page numbers that a machine has memory at."""

    def __init__(self, banks: Iterable[tuple[int, int]]) -> None:
        """`banks` are pairs of the first page and the last."""
        ordered = sorted(banks)
        self._firsts = [first for first, _ in ordered]
        self._lasts = [last for _, last in ordered]

    def hold(self, first: int, count: int) -> bool:
        """Whether one of them holds all pages [first, first + count)."""
        at = bisect_right(self._firsts, first) - 1
        return at >= 0 and first + count - 1 <= self._lasts[at]


class Walk:
    """A walk over the runs of pages that lie before file offset `end`."""

    def __init__(self, parent: Source, pages: StoredPages, banks: Banks, end: int) -> None:
        """Stored pages are added to `pages`; `end` is no more than the size of `parent`."""
        self.torn: tuple[int, str] | None = None  # where the list stopped before its end, and why
        self._parent, self._pages, self._banks, self._end = parent, pages, banks, end
        self._buffer, self._base = b"", 0

    def runs(self, at: int) -> Iterator[StoredRun]:
        """The runs from file offset `at` on."""
        while self.torn is None:
            here = self._here(at, _RUN.size)
            if here < 0:
                self.torn = at, "the image ends before the run of no pages that closes the list"
                return
            first, count = _RUN.unpack_from(self._buffer, here)
            if not count:
                return
            if not self._banks.hold(first, count):
                self.torn = at, f"{count:#x} pages from page {first:#x} on are in no bank of memory"
                return
            number = len(self._pages)
            at = self._stored(at + _RUN.size, count)
            yield StoredRun(first, count, len(self._pages) - number, number)

    def _stored(self, at: int, count: int) -> int:
        """Takes in `count` pages with their tags from `at` on; returns where they end."""
        add = self._pages.add
        for _ in range(count):
            here = self._here(at, _TAG.size)
            if here < 0:
                self.torn = at, "the image ends inside a run"
                return at
            (tag,) = _TAG.unpack_from(self._buffer, here)
            size = tag & _TAG_LENGTH
            if tag - size != _TAG_SIGNATURE or size > PAGE:
                self.torn = at, f"{tag:#x} is no tag of a page"
                return at
            start = at + _TAG.size
            at = start + (size + 3 & ~3)
            if at > self._end:
                self.torn = start, f"the image ends inside a page of {size:#x} stored bytes"
                return start
            if self._pages.form is None and size not in (0, _FILLED, PAGE):
                self._note_form(start, size)
            add(start, size)
        return at

    def _note_form(self, at: int, size: int) -> None:
        head = self._parent.read_at(at, min(size, wkdm.PEEK))
        fitting = [form for form in wkdm.FORMS if wkdm.fits(head, size, form)]
        if len(fitting) == 1:
            self._pages.form = fitting[0]

    def _here(self, at: int, size: int) -> int:
        """Where the `size` bytes at file offset `at` are in the buffer; below 0 past the end."""
        here = at - self._base
        if here < 0 or here + size > len(self._buffer):
            if at + size > self._end:
                return -1
            self._base, here = at, 0
            self._buffer = self._parent.read_at(at, min(_WINDOW, self._end - at))
        return here
