"""Several memories as one address space: an image and the kext files loaded beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError
from kvmtool.memory import Piece, Region

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmtool.memory import Memory


class JoinedMemory:
    """The first of `memories` that can read an address answers for it."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        """`memories` are not empty, and all of one space."""
        self._memories = tuple(memories)
        self.space = self._memories[0].space

    def __len__(self) -> int:
        return sum(len(memory) for memory in self._memories)

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        parts = []
        for piece in self.read_pieces(address, size):
            if piece.data is None:
                raise FaultError(self.space, piece.address, size, piece.reason)
            parts.append(piece.data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self, address: int, size: int) -> None:
        """See `Memory.check`."""
        for piece in self.read_pieces(address, size):
            if piece.data is None:
                raise FaultError(self.space, piece.address, size, piece.reason)

    def read_pieces(self, address: int, size: int) -> Iterator[Piece]:
        """See `Memory.read_pieces`."""
        return self._pieces(address, size, 0)

    def _pieces(self, address: int, size: int, which: int) -> Iterator[Piece]:
        for piece in self._memories[which].read_pieces(address, size):
            if piece.data is None and which + 1 < len(self._memories):
                yield from self._pieces(piece.address, piece.size, which + 1)
            else:
                yield piece

    def regions(self) -> Iterator[Region]:
        """See `Memory.regions`; where memories overlap, as one."""
        start = end = -1
        for region in sorted(r for memory in self._memories for r in memory.regions()):
            if start >= 0 and region.start <= end:
                end = max(end, region.start + region.size)
                continue
            if start >= 0:
                yield Region(start, end - start)
            start, end = region.start, region.start + region.size
        if start >= 0:
            yield Region(start, end - start)

    def find(self, needle: bytes, step: int = 1) -> Iterator[int]:
        """See `Memory.find`; an address that two memories hold may come twice."""
        for memory in self._memories:
            yield from memory.find(needle, step)
