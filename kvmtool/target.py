"""A kernel to look into: its processor, memory, symbols and types, in one handle."""

from __future__ import annotations

from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.memory import read_cstring
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtool.arch import Arch
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.types.model import TypeTable

_IOS_BASE = 0xFFFFFF8000000000  # lowest kernel address with T1SZ 25: osfmk/arm64/proc_reg.h


class Target:
    """Arch, memory, symbols and types. `va_bits` is how many bits of a pointer are address."""

    def __init__(
        self,
        arch: Arch,
        memory: Memory,
        symbols: SymbolTable,
        types: TypeTable | Callable[[], TypeTable],
        va_bits: int | None = None,
        kernel_address: int = 0,
    ) -> None:
        """Without `va_bits` they follow from where the kernel lies: 39 bits reach no lower.

        `types` may also be what gives them, once they are asked for.
        """
        self.arch, self.memory, self.symbols, self._types = arch, memory, symbols, types
        wide = kernel_address < _IOS_BASE
        self.va_bits = va_bits or (47 if wide else 39)
        self._pointer = Struct(arch.byteorder + ("Q" if arch.pointer_size == 8 else "I"))
        self._int = Struct(arch.byteorder + "i")

    @cached_property
    def types(self) -> TypeTable:
        """The kernel's types."""
        return self._types() if callable(self._types) else self._types

    def strip(self, pointer: int) -> int:
        """The address in a pointer that may be signed or tagged."""
        return self.arch.strip(pointer, self.va_bits)

    def pointer(self, address: int) -> int:
        """The pointer stored at `address`, stripped. Raises `FaultError`."""
        value: int = self._pointer.unpack(self.memory.read(address, self.arch.pointer_size))[0]
        return self.strip(value)

    def integer(self, address: int) -> int:
        """The C int stored at `address`. Raises `FaultError`."""
        value: int = self._int.unpack(self.memory.read(address, 4))[0]
        return value

    def unsigned(self, address: int, code: str) -> int:
        """The unsigned integer of `struct` code B, H, I or Q at `address`. Raises `FaultError`."""
        layout = Struct(self.arch.byteorder + code)
        value: int = layout.unpack(self.memory.read(address, layout.size))[0]
        return value

    def text(self, address: int, limit: int = 1024) -> str:
        """The C string at `address`; bytes that are not UTF-8 become lone surrogates."""
        return read_cstring(self.memory, address, limit).decode("utf-8", "surrogateescape")

    def variable(self, name: str) -> int | None:
        """The pointer in the kernel variable `name`; None if there is no such symbol."""
        symbol = self.symbols.get(name)
        return None if symbol is None else self.pointer(symbol.address)


class Record:
    """Some fields of one structure, read in one go by a precompiled `struct`.

    Codes are those of `struct`, with "P" for a kernel pointer (stripped) and "T" for a timeval (a
    pair of seconds and microseconds). A field that is not in this kernel is None in every record;
    one whose page cannot be read is `Unreadable`, and costs only itself.
    """

    def __init__(self, target: Target, fields: Mapping[str, tuple[int | None, str]]) -> None:
        """`fields` maps our name to (offset in bytes or None if absent, code)."""
        self._target = target
        self._absent = {name: None for name, (offset, _) in fields.items() if offset is None}
        present = [(at, name, code) for name, (at, code) in fields.items() if at is not None]
        present.sort()
        self._fields: list[tuple[str, str, int, Struct]] = []
        self._low = present[0][0] if present else 0
        end, layout = self._low, target.arch.byteorder
        for at, name, code in present:
            one = _codes(target.arch, code)
            size = Struct(target.arch.byteorder + one).size
            assert at >= end, f"field {name} overlaps the one before it"
            layout += f"{at - end}x{one}"
            self._fields.append((name, code, at, Struct(target.arch.byteorder + one)))
            end = at + size
        self._all = Struct(layout)
        self._names = [
            part
            for name, code, _, _ in self._fields
            for part in ((name, f"{name}_usec") if code == "T" else (name,))
        ]
        self._pointers = [name for name, code, _, _ in self._fields if code == "P"]
        self._times = [name for name, code, _, _ in self._fields if code == "T"]
        self.names = [*fields]
        self._strips = target.arch.strip.__name__ != "whole"

    def read(self, address: int) -> dict[str, Any]:
        """The record of the structure at `address`; never raises `FaultError`."""
        try:
            data = self._target.memory.read(address + self._low, self._all.size)
        except FaultError:
            return self._read_each(address)
        values: dict[str, Any] = dict(zip(self._names, self._all.unpack(data), strict=True))
        if self._strips:
            for name in self._pointers:
                values[name] = self._target.strip(values[name])
        for name in self._times:
            values[name] = (values[name], values.pop(f"{name}_usec"))
        values.update(self._absent)
        return values

    def _read_each(self, address: int) -> dict[str, Any]:
        values: dict[str, Any] = dict(self._absent)
        for name, code, at, layout in self._fields:
            try:
                parts = layout.unpack(self._target.memory.read(address + at, layout.size))
            except FaultError as fault:
                values[name] = Unreadable.of(fault)
                continue
            if code == "P":
                values[name] = self._target.strip(parts[0])
            else:
                values[name] = parts[0] if code != "T" else parts
        return values


_WIDTHS = ((8, "Q"), (4, "I"), (2, "H"), (1, "B"))


def _codes(arch: Arch, code: str) -> str:
    wide = arch.pointer_size == 8
    if code == "P":
        return "Q" if wide else "I"
    if code == "T":  # struct timeval: time_t is a long, suseconds_t an int (bsd/sys/_types.h)
        return "qi" if wide else "ii"
    return code


def record(
    target: Target, struct: str, wanted: Mapping[str, tuple[str, *tuple[str, ...]]]
) -> Record:
    """A `Record` of `struct`: our name -> (code, the member's names, newest first)."""
    return Record(
        target,
        {
            name: (offset_of(target.types, struct, *members), code)
            for name, (code, *members) in wanted.items()
        },
    )


def unsigned(types: TypeTable, struct: str, member: str) -> str:
    """The `struct` code of an unsigned member as wide as its room before the next one allows.

    For integers whose width changed from release to release. Raises `NotFoundError`.
    """
    members = types.struct(struct).members.values()
    at = types.offset(struct, member)
    end = min((m.offset for m in members if m.offset > at), default=types.size(struct))
    return next(code for size, code in _WIDTHS if size <= end - at or size == 1)


def offset_of(types: TypeTable, struct: str, *members: str) -> int | None:
    """Offset in bytes of the first of `members` that this kernel's `struct` has, or None."""
    for member in members:
        if types.has(struct, member):
            return types.offset(struct, member)
    return None
