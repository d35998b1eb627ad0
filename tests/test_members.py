"""Members by name, bit-fields in either byte order."""

from __future__ import annotations

import pytest

from kvmtool import macho
from kvmtool.arch import arch_for
from kvmtool.symbols import SymbolTable
from kvmtool.target import Target
from kvmtool.types.ctype import Compound, Field
from kvmtool.types.model import TypeTable
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.members import Members
from tests.builders.typed import INT, UINT, HandTypes, memory_of

# struct { unsigned a:1, b:3, c:9; int d; }: clang's layout for i386 and for ppc
ENTRY = Compound(
    "struct",
    "entry",
    8,
    [
        Field("a", UINT, 0, 0, 1),
        Field("b", UINT, 0, 1, 3),
        Field("c", UINT, 0, 4, 9),
        Field("d", INT, 4),
    ],
)
WANTED = {
    "a": ("B", "a"),
    "b": ("B", "b"),
    "c": ("H", "c"),
    "d": ("i", "newer", "d"),
    "gone": ("I", "e"),
}


def read(cputype, data, inside=0):
    arch = arch_for(cputype)
    types = TypeTable(HandTypes(arch, {"entry": ENTRY}))
    target = Target(arch, memory_of({0x1000: data}), SymbolTable(None, 0), types, 32)
    members = Members(target, "entry", WANTED, inside)
    assert members.names == ["a", "b", "c", "d"]
    return members.read(0x1000)


@pytest.mark.parametrize(
    ("cputype", "data"),
    [
        # a = 1, b = 5, c = 0x155, d = -2
        (macho.CPU_TYPE_I386, bytes.fromhex("5b150000feffffff")),
        (macho.CPU_TYPE_POWERPC, bytes.fromhex("daa80000fffffffe")),
    ],
)
def test_bit_fields_in_either_byte_order(cputype, data):
    found = read(cputype, data)
    assert found == {"a": 1, "b": 5, "c": 0x155, "d": -2, "gone": None}
    assert read(cputype, bytes(4) + data, inside=4) == found


def test_what_is_on_an_absent_page_is_told_alone():
    found = read(macho.CPU_TYPE_I386, bytes.fromhex("5b150000"))
    assert (found["a"], found["b"], found["c"]) == (1, 5, 0x155)
    assert found["d"] == Unreadable("unmapped at 0x1004")
    assert found["gone"] is None


def test_a_structure_that_is_not_there():
    arch = arch_for(macho.CPU_TYPE_I386)
    target = Target(arch, memory_of({0: b"\0"}), SymbolTable(None, 0), TypeTable(HandTypes(arch)))
    assert Members(target, "entry", WANTED).read(0) == dict.fromkeys(WANTED)
