"""Pointers as they lie in a static image, and the addresses they will be.

From arm64e kernels and kernel collections on, a pointer on disk is a packed word: where it will
point, how it is to be signed, how far it is to the next such word. The kernel follows these chains
once at boot; here they are followed page by page, when bytes are read. The decoded value is the
address at slide 0, without a signature. `chains` and `threaded` know the formats.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from functools import cached_property
from heapq import merge
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.chains import LC_DYLD_CHAINED_FIXUPS, WORD, Payload
from kvmtool.errors import FaultError, FormatError
from kvmtool.memory import Piece
from kvmtool.threaded import Threads, thread_starts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from kvmtool.chains import Chains
    from kvmtool.macho import MachO
    from kvmtool.memory import Region, RunMemory

_CACHED_PAGES = 256  # decoded pages kept; at most 32 KiB each


class Fixup(NamedTuple):
    """A pointer at `address`: the word `raw` in the file, and the `value` it will be.

    The value is None when the file alone does not tell it; `reason` says why.
    """

    address: int
    raw: int
    value: int | None
    reason: str = ""


def has_fixups(image: MachO) -> bool:
    """Whether the image's pointers are chained on disk."""
    if next(image.commands(LC_DYLD_CHAINED_FIXUPS), None) is not None:
        return True
    return thread_starts(image) is not None


class Fixups:
    """Every fixup of images that share one memory. Nothing is read before it is asked for."""

    def __init__(
        self,
        images: Iterable[MachO],
        memory: RunMemory,
        bases: Mapping[int, int],
        symbol: Callable[[str], int | None] | None = None,
    ) -> None:
        """`memory` gives the images' bytes as they lie in the file, by address.

        `bases` are the lowest addresses of the kernel collections, by cacheLevel, as far as they
        are known. `symbol` gives the address of a name that a kext is yet to be bound to.

        Every method raises `FormatError` for tables that do not hold together, and
        `UnsupportedError`, naming it, for a pointer format that kernels do not have.
        """
        self._images, self._memory, self._bases = tuple(images), memory, bases
        self._symbol = symbol

    @cached_property
    def _regions(self) -> list[Chains | Threads]:
        regions: list[Chains | Threads] = []
        for image in self._images:
            command = next(image.commands(LC_DYLD_CHAINED_FIXUPS), None)
            if command is not None:
                payload = Payload(image, command, self._memory, self._bases, self._symbol)
                regions += (chains for chains in payload.segments() if chains.starts)
            elif (starts := thread_starts(image)) is not None:
                regions.append(Threads(image, self._memory, starts))
        regions.sort(key=lambda region: region.address)
        for before, after in pairwise(regions):
            if after.address < before.end:
                raise FormatError(
                    self._memory.source.name,
                    None,
                    f"chained fixups: pages {before.address:#x} to {before.end:#x} overlap those "
                    f"from {after.address:#x} on",
                )
        return regions

    @cached_property
    def _starts(self) -> array[int]:
        return array("Q", [region.address for region in self._regions])

    def __iter__(self) -> Iterator[Fixup]:
        """Every fixup in address order."""
        for page, _ in self.pages(0, 1 << 64):
            yield from self.page_fixups(page)

    def pages(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the pages with fixups that overlap the range, in address order."""
        stop = address + size
        for at in range(max(bisect_right(self._starts, address) - 1, 0), len(self._starts)):
            region = self._regions[at]
            if region.address >= stop:
                break
            step = region.page_size
            first = region.address + max(address - region.address, 0) // step * step
            for page in range(first, min(stop, region.end), step):
                if region.holds(page):
                    yield page, page + step

    def page_fixups(self, address: int) -> Iterator[Fixup]:
        """The fixups of the page that holds `address`, in address order.

        The last may reach up to 7 bytes into the next page. A chain that leaves its page or the
        image, overlaps itself, or holds what its format does not have is a `FormatError`.
        """
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._regions[at].end:
            return
        region = self._regions[at]
        page = address - (address - region.address) % region.page_size
        if region.holds(page):
            for location, raw in region.walk(page):
                yield Fixup(location, raw, *region.decode(location, raw))


class _Page(NamedTuple):
    """A page's fixups as columns; `unknown` are those without a value, and why."""

    addresses: array[int]
    values: array[int]
    unknown: dict[int, str]


class FixedMemory:
    """An image's memory with its pointers decoded, a page at a time as they are read.

    It has all methods of `RunMemory`; `raw` is the memory as it lies in the file. A pointer whose
    value cannot be known is a `FaultError` (an unreadable piece of 8 bytes) with the reason.
    """

    def __init__(self, raw: RunMemory, fixups: Fixups) -> None:
        """`fixups` are those of `raw`. Raises nothing: see `Fixups` for what reading raises."""
        self.raw, self.fixups = raw, fixups
        self.space, self.source = raw.space, raw.source
        self._cache: dict[int, _Page] = {}

    def __len__(self) -> int:
        return len(self.raw)

    def check(self, address: int, size: int) -> None:
        """See `RunMemory.check`; a pointer that has no value is a bad address, too."""
        self.raw.check(address, size)
        for location, _, reason in self._pointers(address, size):
            if reason:
                raise FaultError(self.space, max(location, address), size, reason)

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        data = self.raw.read(address, size)
        decoded: bytearray | None = None
        for location, value, reason in self._pointers(address, size):
            if reason:
                raise FaultError(self.space, max(location, address), size, reason)
            if decoded is None:
                decoded = bytearray(data)
            _put(decoded, location - address, value)
        return data if decoded is None else bytes(decoded)

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`."""
        for start, length, data, reason in self.raw.read_pieces(address, size):
            if data is None:
                yield Piece(start, length, None, reason)
            else:
                yield from self._decoded_pieces(start, data)

    def _decoded_pieces(self, start: int, data: bytes) -> Iterator[Piece]:
        decoded, at, end = bytearray(data), start, start + len(data)
        for location, value, reason in self._pointers(start, len(data)):
            if not reason:
                _put(decoded, location - start, value)
                continue
            if at < location:
                yield Piece(at, location - at, bytes(decoded[at - start : location - start]))
            at = max(at, location)
            stop = min(location + WORD.size, end)
            yield Piece(at, stop - at, None, reason)
            at = stop
        if at < end:
            yield Piece(at, end - at, bytes(decoded[at - start :]))

    def regions(self) -> Iterator[Region]:
        """See `Memory.regions`."""
        return self.raw.regions()

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """See `RunMemory.find`: pointers are found by their decoded values."""
        plain = (at for at in self.raw.find(needle, step) if not self._touches(at, len(needle)))
        return merge(plain, self._find_in_pages(needle, step))

    def _touches(self, address: int, size: int) -> bool:
        return next(self._pointers(address, size), None) is not None

    def _find_in_pages(self, needle: bytes, step: int) -> Iterator[int]:
        """Addresses of `needle` where it covers some of a decoded pointer."""
        after = 0
        for page, page_end in self.fixups.pages(0, 1 << 64):
            start = max(after, page - len(needle) + 1)
            after = page_end + WORD.size - 1
            for piece in self.read_pieces(start, after - start + len(needle) - 1):
                at = piece.data.find(needle) if piece.data is not None else -1
                while at >= 0 and piece.data is not None:
                    address = piece.address + at
                    if address % step == 0 and self._touches(address, len(needle)):
                        yield address
                    at = piece.data.find(needle, at + 1)

    def _pointers(self, address: int, size: int) -> Iterator[tuple[int, int, str]]:
        """(address, value, "") or (address, 0, reason) of the pointers that overlap the range."""
        reach = WORD.size - 1  # bytes a pointer may reach into the range from before it
        for start, _ in self.fixups.pages(address - reach, size + reach if size else 0):
            page = self._page(start)
            low = bisect_left(page.addresses, max(address - reach, 0))
            high = bisect_left(page.addresses, address + size)
            for at in range(low, high):
                location = page.addresses[at]
                yield location, page.values[at], page.unknown.get(location, "")

    def _page(self, start: int) -> _Page:
        page = self._cache.pop(start, None)
        if page is None:
            page = _Page(array("Q"), array("Q"), {})
            for address, _, value, reason in self.fixups.page_fixups(start):
                page.addresses.append(address)
                page.values.append(value or 0)
                if value is None:
                    page.unknown[address] = reason
            if len(self._cache) >= _CACHED_PAGES:
                del self._cache[next(iter(self._cache))]
        self._cache[start] = page  # last: the most recently used
        return page


def _put(data: bytearray, at: int, value: int) -> None:
    """The pointer `value` at offset `at` of `data`, or as much of it as lies inside."""
    if 0 <= at <= len(data) - WORD.size:
        WORD.pack_into(data, at, value)
        return
    start, stop = max(at, 0), min(at + WORD.size, len(data))
    data[start:stop] = WORD.pack(value)[start - at : stop - at]
