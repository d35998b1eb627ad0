"""The pages of a kdump: compressed one by one, found through a table of descriptors.

Source: diskdump_mod.h of makedumpfile (page_desc_t, DUMP_DH_COMPRESSED_*), and
include/sysemu/dump.h of QEMU 7.2.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from itertools import islice
from struct import Struct
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FormatError, TruncatedError, UnsupportedError
from kvmtool.source import find_by_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmtool.source import Source

    Decoder = Callable[[bytes, int], bytes]  # stored bytes, size of a page

DESCRIPTOR = Struct("<QII8x")  # offset, size, flags; the last 8 bytes are the kernel's page flags
_ZLIB, _LZO, _SNAPPY, _ZSTD = 0x01, 0x02, 0x04, 0x20
_METHODS = _ZLIB | _LZO | _SNAPPY | _ZSTD  # other bits of the flags say nothing of compression
_CACHE = 32 << 20  # bytes of decoded pages that are kept
_BATCH = 1 << 20  # bytes of pages that are looked up together
_SPREAD = 2  # times their stored size, how far pages may lie apart to be read at once
_SCAN = 1 << 15  # descriptors that are looked at together


class Table(NamedTuple):
    """`pages` descriptors from file offset `offset` on, of pages of `page_size` bytes."""

    offset: int
    pages: int
    page_size: int


class PageSource:
    """The decoded pages one after the other, in the order of their descriptors, as a `Source`.

    Pages that share a descriptor's offset (writers store the page of zeros once) are decoded once.
    Safe to use from several threads. Does not own `parent`.
    """

    def __init__(self, parent: Source, table: Table) -> None:
        """`table` lies wholly in `parent`."""
        self.name, self.size = parent.name, table.pages * table.page_size
        self._parent, self._table = parent, table
        self._decoders: dict[int, Decoder] = {}
        self._kept: dict[int, bytes] = {}  # by file offset, the one decoded first in front
        self._limit = max(1, _CACHE // table.page_size)
        self._batch = max(1, _BATCH // table.page_size)
        self._lock = Lock()

    def read_at(self, off: int, size: int) -> bytes:
        """See `Source.read_at`; raises `FormatError` for a page that does not decode."""
        if off < 0 or size < 0 or off + size > self.size:
            raise TruncatedError(self.name, off, size, max(0, min(size, self.size - off)))
        if not size:
            return b""
        page_size = self._table.page_size
        first, start = divmod(off, page_size)
        end = (off + size - 1) // page_size + 1
        if end - first == 1:
            return self._page(first)[start : start + size]
        pages: list[bytes] = []
        for number in range(first, end, self._batch):
            pages += self._pages_of(number, min(self._batch, end - number))
        pages[0] = pages[0][start:]
        pages[-1] = pages[-1][: off + size - (end - 1) * page_size]
        return b"".join(pages)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `Source.find`."""
        return find_by_chunks(self, needle, start, end)

    def close(self) -> None:
        """See `Source.close`."""
        with self._lock:
            self._kept.clear()

    def _page(self, number: int) -> bytes:
        at = self._table.offset + number * DESCRIPTOR.size
        offset, size, flags = DESCRIPTOR.unpack(self._parent.read_at(at, DESCRIPTOR.size))
        page = self._kept.get(offset)
        if page is None:
            page = self._decode(at, size, flags, offset)
            self._keep({offset: page})
        return page

    def _pages_of(self, first: int, count: int) -> list[bytes]:
        """Pages one after the other; those that are kept already, and the others decoded."""
        at = self._table.offset + first * DESCRIPTOR.size
        rows = [*DESCRIPTOR.iter_unpack(self._parent.read_at(at, count * DESCRIPTOR.size))]
        kept = self._kept.get
        pages = {offset: page for offset, _, _ in rows if (page := kept(offset)) is not None}
        missing = {
            offset: (at + number * DESCRIPTOR.size, size, flags)
            for number, (offset, size, flags) in enumerate(rows)
            if offset not in pages
        }
        if missing:
            decoded = self._decode_all(missing)
            self._keep(decoded)
            pages |= decoded
        return [pages[offset] for offset, _, _ in rows]

    def _keep(self, decoded: dict[int, bytes]) -> None:
        with self._lock:
            self._kept |= decoded
            for offset in [*islice(self._kept, max(0, len(self._kept) - self._limit))]:
                del self._kept[offset]

    def _decode_all(self, rows: dict[int, tuple[int, int, int]]) -> dict[int, bytes]:
        """By file offset the pages of descriptors, each with where it is in the file.

        Writers store pages one after the other: what lies close together is read at once.
        """
        low = min(rows)
        high = max(offset + size for offset, (_, size, _) in rows.items())
        stored = sum(size for _, size, _ in rows.values())
        together = high <= self._parent.size and high - low <= _SPREAD * stored
        together = together and stored <= len(rows) * self._table.page_size
        if not together:
            return {offset: self._decode(*row, offset) for offset, row in rows.items()}
        chunk = self._parent.read_at(low, high - low)
        return {
            offset: self._decode(*row, offset, chunk[offset - low : offset - low + row[1]])
            for offset, row in rows.items()
        }

    def _decode(
        self, at: int, size: int, flags: int, offset: int, stored: bytes | None = None
    ) -> bytes:
        """The page of the descriptor at file offset `at`; its bytes are read unless given."""
        page_size, method = self._table.page_size, flags & _METHODS
        if not 0 < size <= page_size or (not method and size != page_size):
            raise FormatError(
                self.name, at, f"a page of {size:#x} stored bytes, expected {page_size:#x}"
            )
        if stored is None:
            stored = self._parent.read_at(offset, size)
        if not method:
            return stored
        decoder = self._decoders.get(method)
        if decoder is None:
            decoder = self._decoders[method] = _decoder(self.name, at, method)
        try:
            page = decoder(stored, page_size)
        except ValueError as error:
            raise FormatError(self.name, offset, f"the page cannot be decoded ({error})") from error
        if len(page) != page_size:
            raise FormatError(
                self.name, offset, f"the page decodes to {len(page):#x} bytes, not {page_size:#x}"
            )
        return page


def lost_pages(parent: Source, table: Table, suspect: bool) -> Iterator[tuple[int, int]]:
    """The descriptors [first, end) whose pages the file does not hold, in order.

    Writers store pages in the order of the table (but for the one page of zeros), so the end of the
    table tells whether the file is whole; only if not, or if it is `suspect`, all is looked at.
    """
    if not suspect and _whole(parent, table):
        return
    lost: tuple[int, int] | None = None
    for first, fields in _columns(parent, table, range(0, table.pages, _SCAN)):
        offsets, low = fields[::3], table.offset
        if min(offsets) >= low and max(offsets) + table.page_size <= parent.size:
            continue
        for number, offset in enumerate(offsets, first):
            size = fields[(number - first) * 3 + 1] & 0xFFFFFFFF
            if offset >= low and offset + size <= parent.size:
                continue
            if lost is not None and lost[1] == number:
                lost = (lost[0], number + 1)
                continue
            if lost is not None:
                yield lost
            lost = (number, number + 1)
    if lost is not None:
        yield lost


def _whole(parent: Source, table: Table) -> bool:
    """Whether the last page that is stored for itself lies in the file."""
    data = table.offset + table.pages * DESCRIPTOR.size
    starts = range((table.pages - 1) // _SCAN * _SCAN, -1, -_SCAN)
    for _, fields in _columns(parent, table, starts):
        offsets = fields[::3]
        if min(offsets) < table.offset:
            return False
        highest = max(offsets)
        if highest > data:  # where the page of zeros is
            size = fields[offsets.index(highest) * 3 + 1] & 0xFFFFFFFF
            return highest + size <= parent.size
    return True


def _columns(parent: Source, table: Table, starts: range) -> Iterator[tuple[int, array[int]]]:
    """For each start its number and up to `_SCAN` descriptors as 64-bit words, three of each."""
    for first in starts:
        count = min(_SCAN, table.pages - first)
        at = table.offset + first * DESCRIPTOR.size
        fields = array("Q", parent.read_at(at, count * DESCRIPTOR.size))
        if _SWAP:
            fields.byteswap()
        yield first, fields


_SWAP = array("H", b"\x01\x00")[0] != 1


def _decoder(name: str, at: int, method: int) -> Decoder:
    """The decoder of a method; raises ValueError when used on what is damaged."""
    loaders = {_ZLIB: _zlib, _LZO: _lzo, _SNAPPY: _snappy, _ZSTD: _zstd}
    loader = loaders.get(method)
    if loader is None:
        raise FormatError(name, at, f"page flags {method:#x} name more than one compression")
    try:
        return loader()
    except ImportError as error:
        raise UnsupportedError(
            f"{name}: its pages are compressed with what needs a package "
            f"({error}): pip install 'kvmtool[kdump]'"
        ) from error


def _zlib() -> Decoder:
    """libdeflate's where it is installed: twice as fast at pages."""
    try:
        from deflate import DeflateError, zlib_decompress
    except ImportError:
        return _inflate

    def decode(stored: bytes, size: int) -> bytes:
        try:
            return bytes(zlib_decompress(stored, size))
        except DeflateError as error:
            raise ValueError(str(error)) from error

    return decode


def _inflate(stored: bytes, size: int) -> bytes:
    decoder = zlib.decompressobj()
    try:
        page = decoder.decompress(stored, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not decoder.eof:
        raise ValueError("the zlib stream does not end with the page")
    return page


def _lzo() -> Decoder:
    from lzallright import LZOCompressor, LZOError

    def decode(stored: bytes, size: int) -> bytes:
        try:
            return bytes(LZOCompressor.decompress(stored, size))
        except LZOError as error:  # its text may hold everything that was decoded
            raise ValueError(str(error.args[0])) from error

    return decode


def _snappy() -> Decoder:
    from cramjam import DecompressionError, snappy

    def decode(stored: bytes, size: int) -> bytes:
        try:
            if (claimed := snappy.decompress_raw_len(stored)) != size:
                raise ValueError(f"it claims {claimed:#x} bytes")
            return bytes(snappy.decompress_raw(stored))
        except DecompressionError as error:
            raise ValueError(str(error)) from error

    return decode


def _zstd() -> Decoder:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    def decode(stored: bytes, size: int) -> bytes:
        decoder = zstd.ZstdDecompressor()
        try:
            page: bytes = decoder.decompress(stored, size + 1)
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
        return page

    return decode
