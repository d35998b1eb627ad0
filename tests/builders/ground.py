"""What every part of a built kernel stands on, and what parts add to it.

A part is called when the processes stand in memory and before the kernel's file is written; it
plants its objects, names its variables, and returns its share of the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record

if TYPE_CHECKING:
    from tests.builders.heap import Memory, Region, Types
    from tests.builders.image import KernelImage
    from tests.builders.procs import Processes


class Ground(NamedTuple):
    """A kernel's memory under construction, with processes in it."""

    types: Types
    memory: Memory
    image: KernelImage
    zones: dict[str, Region]
    processes: Processes

    def record(self, tag: str, zone: str = "kalloc", address: int | None = None) -> Record:
        """A structure, newly allocated or at `address`."""
        return Record(self.types, self.zones[zone], tag, address)

    def region(self, name: str, number: int) -> Region:
        """A region of its own, the `number`th (from 1) behind the zones."""
        return self.memory.region(name, self.zones["kalloc"].base + 0x4000000 * number)

    def text(self, value: str) -> int:
        """The address of a C string."""
        data = value.encode() + b"\0"
        address = self.zones["kalloc"].alloc(len(data), 1)
        self.memory.write(address, data)
        return address

    def bytes(self, data: bytes, align: int = 16) -> int:
        """The address of some bytes."""
        address = self.zones["kalloc"].alloc(len(data), align)
        self.memory.write(address, data)
        return address

    def words(self, address: int, *values: int) -> None:
        """Pointer-sized numbers, one after the other."""
        mask = (1 << 8 * self.memory.width) - 1
        data = b"".join(self.memory.pointer(value & mask) for value in values)
        self.memory.write(address, data)

    def pointer_variable(self, name: str, value: int) -> None:
        """A kernel variable that holds a pointer."""
        self.memory.put_pointer(self.image.variable(name, self.memory.width), value)

    def int_variable(self, name: str, value: int) -> int:
        """A kernel variable that holds an int; its address."""
        at = self.image.variable(name, 4)
        self.memory.put_u32(at, value)
        return at

    def bits(self, tag: str, address: int, member: str, value: int) -> None:
        """A bit-field, or where the release has a whole number there, that."""
        found = self.types.layout.struct(tag).members[member]
        size = found.bit_size
        if found.bit_offset is None or size is None:
            self.memory.write(address + found.offset, bytes([value]))
            return
        room = -(-(found.bit_offset + size) // 8)
        at = address + found.offset
        before = int.from_bytes(self.memory.read(at, room), "little")
        mask = (1 << size) - 1 << found.bit_offset
        after = before & ~mask | value << found.bit_offset & mask
        self.memory.write(at, after.to_bytes(room, "little"))


Part = Callable[[Ground], dict[str, Any]]
