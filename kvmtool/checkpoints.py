"""Random access to what can only be decoded from its beginning.

Decoding is remembered in two ways, both bounded: states of the decoder at regular distances, to
start again from, and the chunks decoded last. A read anywhere in the part that has been passed once
costs at most the distance between two states.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from kvmtool import progress

if TYPE_CHECKING:
    from kvmtool.source import Source

CHUNK = 1 << 20  # decoded bytes that are cached together


class Cursor(Protocol):
    """A decoder at some place of its stream: at `pos` of `parent`, having decoded `out` bytes."""

    out: int
    pos: int
    parent: Source

    def copy(self) -> Self:
        """Another decoder at the same place."""
        ...

    def take(self, size: int) -> bytes:
        """The next `size` decoded bytes; fewer only where the stream ends, for whatever reason."""
        ...


C = TypeVar("C", bound=Cursor)


class Checkpoints(Generic[C]):
    """The decoded bytes of the stream that `start` stands at the beginning of.

    `states` bounds how many decoders are kept (their distance doubles when there are too many),
    `chunks` how many decoded chunks of 1 MiB.
    """

    def __init__(self, start: C, states: int = 512, chunks: int = 32) -> None:
        self.ended = False  # whether the end of the stream has been seen
        self._frontier = start
        self._states = [start.copy()]
        self._max_states = states
        self._spacing = CHUNK
        self._roamer: C | None = None
        self._chunks: dict[int, bytes] = {}
        self._max_chunks = chunks

    def run(self, end: int | None = None) -> int:
        """Decode on until `end` bytes (None: all) have been passed or the stream ends.

        Returns how many bytes are known to be there: the size of the stream once `ended` is set.
        """
        while not self.ended and (end is None or self._frontier.out < end):
            chunk = self._take(self._frontier)
            progress.step("decoding", self._frontier.pos, self._frontier.parent.size)
            if len(chunk) < CHUNK:
                self.ended = True
            elif self._frontier.out - self._states[-1].out >= self._spacing:
                self._states.append(self._frontier.copy())
                if len(self._states) > self._max_states:
                    del self._states[1::2]
                    self._spacing *= 2
        progress.end("decoding")
        return self._frontier.out

    def read(self, off: int, size: int) -> bytes:
        """At most `size` decoded bytes from `off` on; fewer only where the stream ends."""
        end = min(off + size, self.run(off + size))
        if off >= end:
            return b""
        first, last = off // CHUNK, (end - 1) // CHUNK
        if first == last:
            return self._chunk(first)[off - first * CHUNK : end - first * CHUNK]
        joined = bytearray()
        for index in range(first, last + 1):
            start = index * CHUNK
            joined += self._chunk(index)[max(0, off - start) : end - start]
        return bytes(joined)

    def _chunk(self, index: int) -> bytes:
        """Chunk number `index`, which has been decoded before."""
        chunk = self._chunks.pop(index, None)
        if chunk is not None:
            self._chunks[index] = chunk  # now the youngest
            return chunk
        cursor = self._nearest(index * CHUNK)
        while cursor.out < index * CHUNK:
            self._take(cursor)
        self._roamer = cursor
        return self._take(cursor)

    def _nearest(self, off: int) -> C:
        """A decoder at or before `off` that may be moved on."""
        state = self._states[bisect_right(self._states, off, key=lambda state: state.out) - 1]
        roamer = self._roamer
        if roamer is not None and state.out <= roamer.out <= off:
            return roamer
        return state.copy()

    def _take(self, cursor: C) -> bytes:
        index = cursor.out // CHUNK
        chunk = cursor.take(CHUNK)
        self._chunks.pop(index, None)
        self._chunks[index] = chunk
        if len(self._chunks) > self._max_chunks:
            del self._chunks[next(iter(self._chunks))]
        return chunk
