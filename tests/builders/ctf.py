"""CTF as Darwin's tools write it, from <sys/ctf.h> of dtrace (versions 2 to 4) alone.

Types get their numbers in the order they are added; anything hostile can be put into a record by
hand with `Ctf.raw`.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SIGNED, CHAR, BOOL = 1, 2, 4
INTEGER, FLOAT, POINTER, ARRAY, FUNCTION, STRUCT, UNION, ENUM = range(1, 9)
FORWARD, TYPEDEF, VOLATILE, CONST, RESTRICT, PTRAUTH = range(9, 15)


class Ctf:
    """The types of one piece; every method that adds one returns its number."""

    def __init__(self, version: int = 2, order: str = "<", parent: str = "") -> None:
        self.version, self.order, self.parent = version, order, parent
        self.wide = version >= 4
        self.strings = bytearray(b"\0")
        self.types = bytearray()
        self.objects: list[int] = []
        self.functions: list[tuple[int, Sequence[int]] | None] = []
        self._next = 1 | ((0x80000000 if self.wide else 0x8000) if parent else 0)

    def name(self, text: str) -> int:
        """The string's place in the table, put there once."""
        if not text:
            return 0
        known = self.strings.find(b"\0" + text.encode() + b"\0")
        if known >= 0:
            return known + 1
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text.encode()) - 1

    def pack(self, layout: str, *values: int) -> bytes:
        return struct.pack(self.order + layout, *values)

    def raw(
        self, kind: int, name: str | int, vlen: int, size: int, tail: bytes = b"", root: int = 1
    ) -> int:
        """A record as it stands; a size that does not fit takes the long form."""
        at = name if isinstance(name, int) else self.name(name)
        most = 0xFFFFFFFF if self.wide else 0xFFFF
        info, short = kind << 11 | root << 10 | vlen & 0x3FF, min(size, most)
        self.types += self.pack("III" if self.wide else "IHH", at, info, short)
        if size >= most:
            self.types += self.pack("II", size >> 32, size & 0xFFFFFFFF)
        self.types += tail
        self._next += 1
        return self._next - 1

    def integer(self, name: str, size: int, flags: int = 0, bits: int | None = None) -> int:
        width = size * 8 if bits is None else bits
        return self.raw(INTEGER, name, 0, size, self.pack("I", flags << 24 | width))

    def float(self, name: str, size: int) -> int:
        return self.raw(FLOAT, name, 0, size, self.pack("I", 1 << 24 | size * 8))

    def refer(self, kind: int, to: int, name: str = "") -> int:
        """A pointer, typedef or qualifier."""
        return self.raw(kind, name, 0, to)

    def ptrauth(self, to: int, word: int) -> int:
        return self.raw(PTRAUTH, "", 0, to, self.pack("I", word))

    def array(self, contents: int, count: int, size: int = 0) -> int:
        layout = "III" if self.wide else "HHI"
        return self.raw(ARRAY, "", 0, size, self.pack(layout, contents, 1, count))

    def function(self, result: int, parameters: Sequence[int]) -> int:
        """`parameters` end with 0 if more may follow."""
        padded = [*parameters, 0] if len(parameters) % 2 else list(parameters)
        tail = self.pack(f"{len(padded)}{'I' if self.wide else 'H'}", *padded)
        return self.raw(FUNCTION, "", len(parameters), result, tail)

    def compound(
        self, kind: int, name: str, size: int, members: Sequence[tuple[str, int, int]]
    ) -> int:
        """Members are (name, type, bits from the start)."""
        tail = b""
        for member, number, bits in members:
            at = self.name(member)
            if size >= 8192:
                place = (bits >> 32, bits & 0xFFFFFFFF)
                layout = "IIII" if self.wide else "IHxxII"
                tail += self.pack(layout, at, number, *place)
            else:
                tail += self.pack("IIHxx" if self.wide else "IHH", at, number, bits)
        return self.raw(kind, name, len(members), size, tail)

    def enum(self, name: str, size: int, values: Sequence[tuple[str, int]]) -> int:
        tail = b"".join(self.pack("Ii", self.name(text), value) for text, value in values)
        return self.raw(ENUM, name, len(values), size, tail)

    def forward(self, name: str) -> int:
        return self.raw(FORWARD, name, 0, 0)

    def build(self, compress: bool = False, **header: int) -> bytes:
        """The file; `header` puts other numbers into the header than belong there."""
        unit = "I" if self.wide else "H"
        label = self.pack("II", self.name("xnu"), self._next - 1)
        objects = self.pack(f"{len(self.objects)}{unit}", *self.objects)
        functions = b""
        for found in self.functions:
            if found is None:
                functions += self.pack(unit, 0)
            else:
                result, taken = found
                info = FUNCTION << 11 | len(taken)
                functions += self.pack(f"{2 + len(taken)}{unit}", info, result, *taken)
        parent = self.name(self.parent)
        functions += bytes(-(len(label) + len(objects) + len(functions)) % 4)
        parts = [label, objects, functions, bytes(self.types), bytes(self.strings)]
        fields = {"magic": 0xCFF1, "version": self.version, "flags": int(compress)}
        fields |= {"parlabel": 0, "parname": parent}
        at = 0
        for name, part in zip(("lbl", "objt", "func", "type", "str"), parts, strict=True):
            fields[f"{name}off"] = at
            at += len(part)
        fields["strlen"] = len(self.strings)
        body = b"".join(parts)
        head = self.pack("HBB8I", *(fields | header).values())
        return head + (zlib.compress(body) if compress else body)
