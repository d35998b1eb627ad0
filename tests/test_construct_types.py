"""Structures as construct reads and writes them, held against what clang wrote.

The compiler lays the structures out and fills them; the values we read must be those it was told
to write, on machines of both byte orders and word sizes.
"""

from __future__ import annotations

import contextlib
import random
from operator import xor

import pytest
from builders.c_types import CLANG, OBJCOPY, TARGETS, Program
from inputs import oracle, real

from kvmtool import open as open_kvm
from kvmtool.errors import KvmError, NotFoundError
from kvmtool.source import FileSource
from kvmtool.types import layouts
from kvmtool.types.as_construct import construct_of, parse
from kvmtool.types.ctf import open_ctf
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Opaque,
    Pointer,
    Typedef,
    Void,
)
from kvmtool.types.model import TypeTable
from kvmtool.types.outline import element

construct = pytest.importorskip("construct")

INT = Base("int", 4)
SHORT = Base("short", 2)
CHAR = Base("char", 1, "char")
UINT = Base("unsigned int", 4, signed=False)
needs_clang = pytest.mark.skipif(not (CLANG and OBJCOPY), reason="no clang or no llvm-objcopy")


def assert_holds(found, expected, path):
    """`found` has every value of `expected`; of unions more."""
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_holds(found[name], value, f"{path}.{name}")
        else:
            assert plain(found[name]) == value, f"{path}.{name}"


def plain(value):
    return list(map(plain, value)) if isinstance(value, list) else value


@needs_clang
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(3))
def test_what_the_compiler_wrote_is_what_we_read(target, seed, tmp_path):
    program = Program(random.Random(f"{target} {seed}"), target, 60)
    types, data, expected = program.compile(str(tmp_path))
    rng = random.Random(seed)
    for tag, ctype in types.items():
        made = construct_of(ctype, program.byteorder)
        assert made.sizeof() == ctype.size == len(data[tag])
        value = made.parse(data[tag])
        assert_holds(value, expected[tag], tag)
        assert made.build(value) == data[tag]
        noise = rng.randbytes(ctype.size)
        again = made.build(made.parse(noise))
        # Python gives a signalling NaN of 4 bytes back quiet: one bit of it differs, nothing else
        assert again == noise or (holds_float(ctype) and set(map(xor, again, noise)) <= {0, 0x40})


def holds_float(ctype):
    """Whether there is a float of 4 bytes in it."""
    found = element(ctype)
    if isinstance(found, Compound):
        return any(holds_float(field.type) for field in found.fields)
    return isinstance(found, Base) and found.form == "float" and found.size == 4


@needs_clang
@pytest.mark.parametrize("target", ["x86_64", "ppc"])
def test_an_edit_changes_its_member_and_nothing_else(target, tmp_path):
    """Written through construct, read as the compiler's own bytes of the same values."""
    one = Program(random.Random("edit"), target, 40)
    types, before, _ = one.compile(str(tmp_path))
    _, after, values = one.compile(str(tmp_path))  # the same structures, other values
    edited = 0
    for tag, ctype in types.items():
        made = construct_of(ctype, one.byteorder)
        value = made.parse(before[tag])
        for name, new in values[tag].items():
            if not isinstance(new, dict) and one.records[tag].kind == "struct":
                value[name] = new
        again = made.parse(made.build(value))
        flat = {name: new for name, new in values[tag].items() if not isinstance(new, dict)}
        if one.records[tag].kind == "struct":
            assert_holds(again, flat, tag)
            edited += len(flat)
    assert edited > 50
    assert after != before


# by hand


def bits(*widths):
    """A struct of 4 bytes with these bit-fields."""
    fields, at = [], 0
    for number, width in enumerate(widths):
        fields.append(Field(f"b{number}", UINT, 0, at, width))
        at += width
    return Compound("struct", "bits", 4, fields)


def test_bits_are_counted_as_the_machine_fills_them():
    assert dict_of(parse(bits(3, 13, 16), bytes.fromhex("0d 00 34 12"))) == {
        "b0": 5,
        "b1": 1,
        "b2": 0x1234,
    }
    assert dict_of(parse(bits(3, 13, 16), bytes.fromhex("a0 01 12 34"), ">")) == {
        "b0": 5,
        "b1": 1,
        "b2": 0x1234,
    }


def dict_of(value):
    return {name: item for name, item in value.items() if not name.startswith("_")}


def test_built_from_members_alone():
    made = construct_of(bits(3, 13, 16))
    assert made.build({"b0": 5, "b2": 0x1234}) == bytes.fromhex("05 00 34 12")
    padded = Compound("struct", "padded", 8, [Field("a", CHAR, 0), Field("b", INT, 4)])
    assert construct_of(padded).build({"a": -1, "b": 2}) == bytes.fromhex("ff000000 02000000")


def test_holes_are_kept_but_not_shown():
    padded = Compound("struct", "padded", 8, [Field("a", CHAR, 0), Field("b", SHORT, 4)])
    value = parse(padded, b"\x01xyz\x02\x00uv")
    assert dict_of(value) == {"a": 1, "b": 2}
    assert value["_hole_0x1"] == b"xyz"
    assert "xyz" not in str(value)
    assert construct_of(padded).build(value) == b"\x01xyz\x02\x00uv"


def test_an_unnamed_unions_members_go_by_their_own_names():
    pair = Compound("struct", None, 4, [Field("low", SHORT, 0), Field("high", SHORT, 2)])
    union = Compound("union", None, 4, [Field("whole", INT, 0), Field(None, pair, 0)])
    outer = Compound("struct", "outer", 8, [Field("first", INT, 0), Field(None, union, 4)])
    made = construct_of(outer)
    value = made.parse(bytes.fromhex("01000000 02000300"))
    assert dict_of(value) == {"first": 1, "whole": 0x30002, "low": 2, "high": 3}
    value.high = 7
    assert made.build(value) == bytes.fromhex("01000000 02000700")
    assert made.build({"first": 1, "whole": 5}) == bytes.fromhex("01000000 05000000")


def test_arrays_texts_enums_pointers():
    kind = Enum("kind", 4, [("NONE", 0), ("SOME", 1)])
    fields = [
        Field("name", Array(CHAR, 4), 0),
        Field("grid", Array(Array(SHORT, 2), 2), 4),
        Field("kind", Typedef("kind_t", kind), 12),
        Field("at", Pointer(Void(), 4), 16),
        Field("raw", Opaque(4), 20),
        Field("ints", Array(INT, None), 24),
        Field("tail", Array(CHAR, None), 24),
    ]
    data = b"abc\0" + bytes.fromhex("0001 0002 0003 0004 00000001 80000000 01020304")
    value = parse(Compound("struct", "all", 24, fields), data, ">")
    assert dict_of(value) == {
        "name": b"abc\0",
        "grid": [[1, 2], [3, 4]],
        "kind": "SOME",
        "at": 0x80000000,
        "raw": b"\1\2\3\4",
        "ints": [],
        "tail": b"",
    }
    assert int(value.kind) == 1


def test_a_member_without_a_size_gets_the_room_there_is():
    fields = [Field("known", INT, 0), Field("gone", Compound("struct", "x", None), 4)]
    later = [*fields, Field("last", INT, 12)]
    assert parse(Compound("struct", "a", 16, later), bytes(range(16))).gone == bytes(range(4, 12))
    assert parse(Compound("struct", "a", 16, fields), bytes(range(16))).gone == bytes(range(4, 16))


def test_numbers_of_any_size():
    assert parse(Base("__int128", 16), bytes([1] + [0] * 14 + [0x80])) == 1 - (1 << 127)
    assert parse(Base("odd", 3, signed=False), b"\1\2\3", ">") == 0x010203
    assert parse(Base("long double", 10, "float"), b"0123456789") == b"0123456789"
    assert parse(Base("_Bool", 1, "bool"), b"\xff") == 255


# what is wrong


def test_too_few_bytes():
    with pytest.raises(KvmError, match="int: expected 0x4 bytes, got 0x3"):
        parse(INT, b"abc")


@pytest.mark.parametrize("offset", [-1, 5, 1 << 40])
def test_members_outside_of_their_structure(offset):
    with pytest.raises(KvmError, match="struct a: expected members within 0x8 bytes"):
        construct_of(Compound("struct", "a", 8, [Field("x", INT, offset)]))


def test_what_has_no_size():
    for ctype in (Void(), Compound("struct", "declared", None), Enum("e", None)):
        with pytest.raises(KvmError, match="has no size"):
            construct_of(ctype)


def test_structures_that_hold_each_other():
    loop = Compound("struct", "loop", 8, lambda: [Field("again", loop, 0)])
    with pytest.raises(KvmError, match="nested deeper or larger"):
        construct_of(loop)
    nameless = Compound("union", None, 8, lambda: [Field(None, nameless, 0)] * 2)
    with pytest.raises(KvmError, match="nested deeper or larger"):
        construct_of(nameless)


def test_a_million_nested_members():
    inner = Compound("union", "leaf", 8, [Field("a", INT, 0), Field("b", INT, 0)])
    for level in range(30):
        inner = Compound("union", f"l{level}", 8, [Field("x", inner, 0), Field("y", inner, 0)])
    with pytest.raises(KvmError, match="nested deeper or larger"):
        construct_of(inner)


def test_a_structure_of_exabytes_costs_nothing_until_it_is_read():
    huge = Compound("struct", "huge", 1 << 60, [Field("x", Array(INT, 1 << 50), 0)])
    assert construct_of(huge).sizeof() == 1 << 60
    with pytest.raises(KvmError, match="got 0x3"):
        parse(huge, b"abc")
    empty = Compound("struct", "empty", 0)
    none = Compound("struct", "none", 0, [Field("x", Array(empty, 1 << 60), 0)])
    assert dict_of(parse(none, b"")) == {"x": []}


def test_names_that_construct_uses_itself():
    names = ("_", "_io", "_root", "_index", "_params", "items", "keys", "get")
    fields = [Field(name, INT, 4 * at) for at, name in enumerate(names)]
    ctype = Compound("struct", "odd", 4 * len(names), fields)
    data = bytes(range(4 * len(names)))
    assert construct_of(ctype).build(construct_of(ctype).parse(data)) == data
    twice = Compound("struct", "twice", 8, [Field("x", INT, 0), Field("x", INT, 4)])
    assert dict_of(parse(twice, bytes([1, 0, 0, 0, 2, 0, 0, 0]))) == {"x": 1, "x_0x4": 2}


# tables


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_every_structure_of_a_layout(name):
    table = layouts.table(name)
    for tag in table.structs():
        made = table.construct(tag)
        noise = random.Random(tag).randbytes(table.size(tag))
        assert made.sizeof() == len(noise)
        assert made.build(made.parse(noise)) == noise


def test_every_structure_of_a_kernel():
    """2,784 structures of xnu-2422: as long as C has them, and back to the same bytes."""
    path = real("types/x86_64-xnu-2422.115.4.ctfdata")
    with contextlib.closing(FileSource(path)) as source:
        table, checked = TypeTable(open_ctf(source)), 0
        for tag in table.structs():
            ctype = table.source.find("tag", tag)
            if isinstance(ctype, Compound) and ctype.complete:
                made = table.construct(f"{ctype.kind} {tag}")
                noise = random.Random(tag).randbytes(ctype.size)
                assert made.sizeof() == ctype.size
                assert made.build(made.parse(noise)) == noise, tag
                checked += 1
    assert checked == 2784


def test_a_table_makes_each_once_and_only_structures():
    table = layouts.table("10.9.5 x86_64")
    assert isinstance(table.construct("proc"), construct.Struct)
    assert table.construct("proc") is table.construct("proc")
    with pytest.raises(NotFoundError, match="type prok not found"):
        table.construct("prok")
    with pytest.raises(KvmError, match=r"struct proc \*: expected a structure"):
        table.construct("struct proc *")


def test_the_processes_of_a_real_machine():
    """Parsed whole, by the kernel's own CTF; the oracle read the same memory with DWARF in lldb."""
    kernel, core = "machine/x86_64-xnu-2422.115.4.mach_kernel", "machine/live.elfcore"
    types = real("types/x86_64-xnu-2422.115.4.ctfdata")
    compared = 0
    with open_kvm(real(kernel), real(core), types=types) as kvm:
        made = kvm.types.construct("proc")
        for truth in oracle("live")["procs"]:
            data = kvm.read(int(truth["addr"], 16), made.sizeof())
            proc = made.parse(data)
            for name, value in truth.items():
                if name in proc:
                    assert alike(proc[name], value), name
                    compared += 1
            assert made.build(proc) == data
    assert compared > 100


def alike(found, value):
    """Addresses stand as text in the oracle, and texts end at their NUL."""
    if isinstance(found, bytes):
        return found.split(b"\0")[0].decode() == value
    return found == (int(value, 16) if isinstance(value, str) else value)


@pytest.mark.parametrize("tag", ["proc", "task", "vnode", "ucred"])
def test_objects_and_construct_read_the_same(tag):
    """Two ways from bytes to values: member by member from memory, and whole by construct."""
    kernel, core = "machine/x86_64-xnu-2422.115.4.mach_kernel", "machine/live.elfcore"
    types = real("types/x86_64-xnu-2422.115.4.ctfdata")
    starts = {"proc": "kernproc", "task": "kernel_task", "vnode": "rootvnode"}
    with open_kvm(real(kernel), real(core), types=types) as kvm:
        if tag == "ucred":
            found = kvm["kernproc"].p_ucred.deref()
        else:
            found = kvm[starts[tag]].cast(f"struct {tag} *").deref()
        whole = kvm.types.construct(tag).parse(kvm.read(found.address, found.size))
        compared = same_values(whole, found.value(), tag)
    assert compared > 15


def same_values(whole, value, path):
    """Compare what is in both; how many numbers and texts there were."""
    if isinstance(value, dict):
        assert set(value) == {name for name in whole if not name.startswith("_")}, path
        return sum(same_values(whole[name], value[name], f"{path}.{name}") for name in value)
    if isinstance(value, list):
        assert len(whole) == len(value), path
        return sum(map(same_values, whole, value, [path] * len(value)))
    assert whole == value or int(whole) == value, path
    return 1
