"""Raw memory: the file is physical memory from one address on, and says nothing of itself.

Holes that were written as zeros read as zeros: nobody can tell them from memory that was zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FormatError
from kvmtool.formats.run_table import RunTable

if TYPE_CHECKING:
    from kvmtool.memory import RunMemory
    from kvmtool.source import Source


class Raw(RunTable):
    """A raw image, its first byte at physical address `base`.

    `movable` says that nobody has told so: it is 0 unless what is inside tells another.
    """

    name = "raw"

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """See `Format.probe`: any bytes may be one, so none are taken for one."""
        return False

    def __init__(self, source: Source, base: int | None = None) -> None:
        """Raises `FormatError` for an empty file."""
        if not source.size:
            raise FormatError(source.name, 0, "the file is empty")
        super().__init__(source)
        self.movable = base is None
        self.base = base or 0
        self.add(self.base, source.size, 0)

    def move(self, base: int) -> RunMemory:
        """The memory with its first byte at `base`, from now on. Raises `FormatError`."""
        self.base = base
        for column in (self._starts, self._ends, self._offsets):
            del column[:]
        self.add(base, self.source.size, 0)
        return self._memory("physical")
