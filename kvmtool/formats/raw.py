"""Raw memory: the file is physical memory from one address on, and says nothing of itself.

Holes that were written as zeros read as zeros: nobody can tell them from memory that was zero.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.memory import RunMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.source import Source


class Raw:
    """A raw image, its first byte at physical address `base`."""

    name = "raw"
    live = False

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`: any bytes may be one, so none are taken for one."""
        return False

    def __init__(self, source: Source, base: int = 0) -> None:
        """Raises `FormatError` for an empty file."""
        if not source.size:
            raise FormatError(source.name, 0, "the file is empty")
        self.source, self.base = source, base
        self.container: Any = None
        self.facts = Facts(UNSAID, 0)
        self.notes: tuple[Note, ...] = ()
        self.warnings: list[str] = []

    def runs(self) -> Iterator[Run]:
        """See `Format.runs`."""
        yield Run("physical", self.base, self.source.size, 0)

    def virtual(self) -> None:
        """See `Format.virtual`: a kernel's address space has to be found in here."""

    def physical(self) -> RunMemory:
        """The machine's memory."""
        starts, ends = array("Q", [self.base]), array("Q", [self.base + self.source.size])
        return RunMemory(self.source, starts, ends, array("Q", [0]), space="physical")
