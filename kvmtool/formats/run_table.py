"""Containers whose memory is a table of runs: what they share behind the ways they tell it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.memory import RunMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source

ADDRESS_BITS = 52  # no processor has wider physical addresses
_VIRTUAL_BITS = 64
_LAST = (1 << 64) - 1


class RunTable:
    """Base of a `Format`: physical memory, unless `is_virtual` is set.

    A subclass calls `add` for each run that its file names; `memory_source` is what the offsets are
    in, where that is not the file itself.
    """

    live = False
    piece = "run"  # what its own documents call one

    def __init__(self, source: Source) -> None:
        """A container without any run, which says nothing of the kernel."""
        self.source = self.memory_source = source
        self.container: Any = None
        self.facts = Facts(UNSAID, 0)
        self.notes: tuple[Note, ...] = ()
        self.warnings: list[str] = []
        self.lost: list[tuple[int, int]] = []
        self.is_virtual = False
        self._starts, self._ends, self._offsets = array("Q"), array("Q"), array("Q")

    def add(
        self,
        start: int,
        size: int,
        offset: int,
        *,
        stored: int | None = None,
        end: int | None = None,
        at: int | None = None,
    ) -> None:
        """`size` bytes at address `start`, the first `stored` of them (all) at `offset`.

        The bytes past offset `end` (that of the source) are absent, with a warning; those beyond
        `stored` without one. `at` is the file offset of the record. Raises `FormatError` for what
        leaves the address space.
        """
        if start + size > 1 << (_VIRTUAL_BITS if self.is_virtual else ADDRESS_BITS):
            raise FormatError(
                self.source.name,
                at,
                f"{self.piece} {len(self._starts)}: {start:#x} + {size:#x} leaves the address "
                "space",
            )
        promised = size if stored is None else min(size, stored)
        held = min(promised, max(0, (self.memory_source.size if end is None else end) - offset))
        if held < size:
            self.lost.append((start + held, start + size))
        if held < promised:
            file = self.memory_source.name if self.memory_source is not self.source else "the file"
            self.warnings.append(
                f"{self.piece} {len(self._starts)} ({start:#x}) ends past the end of {file}: "
                f"{promised - held:#x} bytes of memory are absent"
            )
        self._starts.append(start)
        # no array holds the number 2^64: of a run that ends there the last byte is given up
        self._ends.append(min(start + held, _LAST))
        self._offsets.append(offset)

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`."""
        space = "virtual" if self.is_virtual else "physical"
        for start, end, offset in zip(self._starts, self._ends, self._offsets, strict=True):
            yield Run(space, start, end - start, offset)

    def virtual(self) -> RunMemory | None:
        """See `Format.virtual`; of physical memory, a kernel's address space has to be found."""
        return self._memory("kernel") if self.is_virtual else None

    def physical(self) -> RunMemory | None:
        """See `Format.physical`: where runs overlap the one added first wins."""
        return None if self.is_virtual else self._memory("physical")

    def _memory(self, space: str) -> RunMemory:
        return RunMemory(
            self.memory_source,
            self._starts,
            self._ends,
            self._offsets,
            space=space,
            lost=self.lost,
        )
