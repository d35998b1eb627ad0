"""Memory that answers now: no file behind it, no cache, no table of what there is.

What a gdb stub and the real devices share. A live memory is asked piece by piece; where a request
fails it is halved at page boundaries until the first bad page is known.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from kvmtool.errors import FaultError
from kvmtool.memory import ADDRESS_LIMIT, Piece, Region

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096  # the smallest page of any machine XNU runs on: no boundary is missed
_PIECE = 1 << 16


class LiveMemory:
    """An address space of a live target; a subclass says how to `_fetch`.

    `extent` is what memory there is, in address order, where the target tells; None where it does
    not, and then only reading shows it. Outside a known extent nothing is asked of the target.
    """

    def __init__(self, space: str, extent: tuple[Region, ...] | None = None) -> None:
        self.space = space
        self.extent = extent
        self._starts = [region.start for region in extent or ()]

    def __len__(self) -> int:
        """Regions known of: none where the target does not tell."""
        return len(self._starts)

    def __bool__(self) -> bool:
        return True  # also where no region is known

    def _fetch(self, address: int, size: int) -> bytes:
        """The readable prefix of the range, in as few requests as can be.

        May end early, even with nothing, when a request that spans pages fails as a whole.
        """
        raise NotImplementedError

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        held = self._held(address, size)
        data = self._prefix(address, held) if held else b""
        if len(data) < size:
            bad = address + len(data)
            raise FaultError(self.space, bad, size, self._reason(bad))
        return data

    def check(self, address: int, size: int) -> None:
        """Raises `FaultError` for the first bad address: found by reading, there is no other way.

        The bytes are not kept, but the time is that of a read.
        """
        for piece in self.read_pieces(address, size):
            if piece.data is None:
                raise FaultError(self.space, piece.address, size, piece.reason)

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`; at most 64 KiB of data in a piece, bad pages joined."""
        end, bad = address + size, address  # [bad, address) cannot be read
        while address < end:
            # in a hole page by page: halving would only ask for the same bad pages again
            next_page = address - address % PAGE + PAGE
            stop = min(address + _PIECE if bad == address else next_page, end)
            held = self._held(address, stop - address)
            data = self._prefix(address, held) if held else b""
            if data:
                yield from self._hole(bad, address)
                yield Piece(address, len(data), data)
                bad = address = address + len(data)
            else:
                address = min(next_page, end) if held else self._next_region(address, end)
        yield from self._hole(bad, end)

    def regions(self) -> Iterator[Region]:
        """The known extent; nothing where it is not known (`extent` is None): there is more."""
        yield from self.extent or ()

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """Addresses of `needle` that are multiples of `step` bytes, in the known extent only.

        Where no extent is known nothing is searched. All memory goes over the line: slow.
        """
        for region in self.regions():
            tail = b""  # the end of the piece before: a needle may lie across
            for piece in self.read_pieces(region.start, region.size):
                if piece.data is None:
                    tail = b""
                    continue
                data = tail + piece.data
                start = piece.address - len(tail)
                at = data.find(needle)
                while at >= 0:
                    if (start + at) % step == 0:
                        yield start + at
                    at = data.find(needle, at + 1)
                tail = data[-(len(needle) - 1) :] if len(needle) > 1 else b""

    def _hole(self, start: int, end: int) -> Iterator[Piece]:
        if start < end:
            yield Piece(start, end - start, None, self._reason(start))

    def _reason(self, address: int) -> str:
        return "unmapped" if self.extent is None or self._held(address, 1) else "absent"

    def _prefix(self, address: int, size: int) -> bytes:
        """The readable prefix: what fails is halved at page boundaries down to one page."""
        good = []
        upto = failed = address + size  # what is asked for, and what is known to fail as a whole
        while address < upto:
            data = self._fetch(address, upto - address)
            good.append(data)
            address += len(data)
            if not data:
                failed = upto
            if not data or address == upto < failed:
                upto = _halfway(address, failed)
        return b"".join(good)

    def _held(self, address: int, size: int) -> int:
        """How many bytes from `address` on the extent allows to be asked for, at most `size`."""
        if self.extent is None:
            return max(0, min(size, ADDRESS_LIMIT - address)) if address >= 0 else 0
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return 0
        region = self.extent[at]
        return max(0, min(size, region.start + region.size - address))

    def _next_region(self, address: int, end: int) -> int:
        at = bisect_right(self._starts, address)
        return min(self._starts[at], end) if at < len(self._starts) else end


def _halfway(start: int, end: int) -> int:
    """The page boundary nearest to the middle of the range; `start` if it lies within one page."""
    middle = (start + end) // 2
    cut = middle - middle % PAGE
    if cut <= start:
        cut = start - start % PAGE + PAGE
    return cut if cut < end else start
