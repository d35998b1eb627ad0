"""A kernel of nothing but what a test plants: a layout, symbols, structures in a few regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool import macho
from kvmtool.arch import arch_for
from kvmtool.errors import NotFoundError
from kvmtool.symbols import Symbol
from kvmtool.target import Target
from kvmtool.types import layouts
from tests.builders.heap import Memory, Record, Signer, Types
from tests.builders.typed import memory_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.builders.heap import Region

_CPUTYPES = {
    "i386": macho.CPU_TYPE_I386,
    "x86_64": macho.CPU_TYPE_X86_64,
    "arm64": macho.CPU_TYPE_ARM64,
}
_BASES = {"i386": 0x25000000, "x86_64": 0xFFFFFF8015000000, "arm64": 0xFFFFFE2400000000}


class _Symbols:
    """What `Target` asks of a symbol table."""

    hint = "planted by a test"

    def __init__(self, places: Mapping[str, int]) -> None:
        self._places = places

    def get(self, name: str) -> Symbol | None:
        at = self._places.get(name)
        return None if at is None else Symbol(name, at, 0xF, 1, 0, at)

    def address(self, name: str) -> int:
        found = self.get(name)
        if found is None:
            raise NotFoundError("symbol", name)
        return found.address


class Sparse:
    """A kernel in the making: `variable` and `record` plant, `target` gives what can be read."""

    def __init__(self, name: str) -> None:
        """A kernel with the built-in layout `name` ("10.9.5 x86_64")."""
        arch = name.rpartition(" ")[2]
        self.arch = arch_for(_CPUTYPES[arch])
        self.layout = layouts.table(name)
        self.width = self.arch.pointer_size
        self.memory = Memory(self.width, self.arch.page_size)
        self.types = Types(self.layout, self.width, Signer(None), frozenset())
        self.region = self.memory.region("heap", _BASES[arch])
        self.symbols: dict[str, int] = {}

    def more(self, name: str, base: int) -> Region:
        """Another region."""
        return self.memory.region(name, base)

    def alloc(self, data: bytes, align: int = 16) -> int:
        """The bytes somewhere in memory."""
        at = self.region.alloc(len(data), align)
        self.region.write(at, data)
        return at

    def record(self, tag: str) -> Record:
        """A structure of zeros."""
        return Record(self.types, self.region, tag)

    def variable(self, name: str, data: bytes) -> int:
        """A variable with the symbol `name`."""
        self.symbols[name] = self.alloc(data)
        return self.symbols[name]

    def number(self, name: str, value: int, size: int = 4) -> int:
        """A variable that is an unsigned number of `size` bytes."""
        return self.variable(name, value.to_bytes(size, "little"))

    def pointer(self, name: str, value: int) -> int:
        """A variable that is a pointer."""
        return self.number(name, value, self.width)

    def bits(self, record: Record, tag: str, member: str, value: int) -> None:
        """Set a bit-field of a record; nothing where this release has not got it."""
        found = self.layout.struct(tag).members.get(member)
        if found is None:
            return
        if found.bit_size is None:
            self.region.write(record.address + found.offset, bytes([value]))
            return
        assert value >> found.bit_size == 0, f"{member} has {found.bit_size} bits"
        at, shift = record.address + found.offset, found.bit_offset or 0
        size = (shift + found.bit_size + 7) // 8
        mask = (1 << found.bit_size) - 1 << shift
        old = int.from_bytes(self.memory.read(at, size), "little")
        new = old & ~mask | value << shift
        self.region.write(at, new.to_bytes(size, "little"))

    def target(self, without: tuple[int, ...] = ()) -> Target:
        """The kernel; the pages that hold an address of `without` are not in its memory."""
        page = self.arch.page_size
        absent = {address // page for address in without}
        runs = {}
        for region in self.memory.regions:
            for at in range(0, len(region.data), page):
                if (region.base + at) // page not in absent:
                    runs[region.base + at] = bytes(region.data[at : at + page].ljust(page, b"\0"))
        va_bits = 47 if self.arch.name == "arm64" else None
        return Target(self.arch, memory_of(runs), _Symbols(self.symbols), self.layout, va_bits)  # type: ignore[arg-type]


def sparse_target(name: str, symbols: Mapping[str, int], runs: Mapping[int, bytes]) -> Target:
    """A kernel of layout `name` with these bytes at these addresses."""
    made = Sparse(name)
    made.symbols.update(symbols)
    return Target(made.arch, memory_of(runs), _Symbols(made.symbols), made.layout, 47)  # type: ignore[arg-type]
