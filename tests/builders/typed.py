"""C types and memory put together by hand, for tests of what looks at memory through types."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from kvmtool.memory import RunMemory
from kvmtool.source import BytesSource
from kvmtool.symbols import SymbolTable
from kvmtool.target import Target
from kvmtool.types.ctype import Base
from kvmtool.types.model import TypeTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtool.arch import Arch
    from kvmtool.types.ctype import CType

CHAR = Base("char", 1, "char")
UCHAR = Base("unsigned char", 1, "char", signed=False)
SHORT = Base("short", 2)
INT = Base("int", 4)
UINT = Base("unsigned int", 4, signed=False)
LONG = Base("long", 8)
ULONG = Base("unsigned long", 8, signed=False)
BOOL = Base("_Bool", 1, "bool", signed=False)
FLOAT = Base("float", 4, "float")
DOUBLE = Base("double", 8, "float")


class HandTypes:
    """A `TypeSource` of what it is given."""

    name, origin = "made by hand", "a test"

    def __init__(
        self,
        arch: Arch,
        tags: Mapping[str, CType] | None = None,
        typedefs: Mapping[str, CType] | None = None,
        variables: Mapping[str, CType] | None = None,
    ) -> None:
        self.byteorder, self.pointer_size = arch.byteorder, arch.pointer_size
        self.kinds = {"tag": dict(tags or {}), "typedef": dict(typedefs or {})}
        self.variables = dict(variables or {})

    def find(self, kind: str, name: str) -> CType | None:
        return self.kinds.get(kind, {}).get(name)

    def names(self, kind: str) -> Iterable[str]:
        return list(self.kinds.get(kind, {}))

    def variable(self, name: str) -> CType | None:
        return self.variables.get(name)


class CountingMemory(RunMemory):
    """Memory that counts how often it was read."""

    reads = 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        return super().read(address, size)


def memory_of(runs: Mapping[int, bytes]) -> CountingMemory:
    """The bytes at their addresses, and nothing else."""
    starts, ends, offsets = array("Q"), array("Q"), array("Q")
    blob = b""
    for address, data in runs.items():
        starts.append(address)
        ends.append(address + len(data))
        offsets.append(len(blob))
        blob += data
    return CountingMemory(BytesSource(blob, "memory"), starts, ends, offsets)


def target_of(arch: Arch, runs: Mapping[int, bytes], types: HandTypes | None = None) -> Target:
    """A kernel of `arch` with these bytes in its memory."""
    table = TypeTable(types or HandTypes(arch))
    return Target(arch, memory_of(runs), SymbolTable(None, 0), table, 47)
