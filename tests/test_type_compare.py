"""What differs between two kernels: held against members we moved, and two compilers' layouts."""

from __future__ import annotations

import random

import pytest
from builders.c_types import CLANG, OBJCOPY, Program

from kvmtool.types.compare import compare, compare_values, meaning, meanings_differ
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)

INT = Base("int", 4)
UINT = Base("unsigned int", 4, signed=False)
LONG = Base("long", 8)
CHAR = Base("char", 1, "char")


def struct(*fields, size=64, kind="struct", tag="proc"):
    return Compound(kind, tag, size, [Field(*field) for field in fields])


def changes(before, after, expand=False):
    """Name to what happened, in order."""
    return {change.name: " ".join(change.kinds) for change in compare(before, after, expand)}


def test_added_gone_moved_resized_retyped():
    before = struct(("a", INT, 0), ("b", INT, 4), ("c", INT, 8), ("d", INT, 16), ("e", INT, 20))
    after = struct(("a", INT, 0), ("c", INT, 4), ("n", INT, 8), ("d", LONG, 16), ("e", UINT, 24))
    assert changes(before, after) == {
        "b": "gone",
        "c": "moved",
        "n": "added",
        "d": "resized",
        "e": "moved retyped",
    }
    (gone, moved, added, *_) = compare(before, after)
    assert (gone.before.offset, gone.after) == (4, None)
    assert (moved.before.offset, moved.after.offset) == (8, 4)
    assert (added.before, added.after.offset) == (None, 8)


def test_alike():
    one = struct(("a", INT, 0), ("b", Array(CHAR, 8), 4), ("c", UINT, 16, 3, 2))
    assert changes(one, one) == {}


def test_what_moves_with_the_structure_around_it_is_not_named():
    pair = Compound("struct", None, 16, [Field("next", LONG, 0), Field("prev", LONG, 8)])
    swapped = Compound("struct", None, 16, [Field("prev", LONG, 0), Field("next", LONG, 8)])
    before, after = struct(("list", pair, 0)), struct(("list", pair, 8))
    assert changes(before, after) == {"list": "moved"}
    assert changes(before, struct(("list", swapped, 8))) == {
        "list": "moved",
        "list.prev": "moved",
        "list.next": "moved",
    }
    assert changes(before, struct()) == {"list": "gone"}
    assert changes(struct(), before) == {"list": "added"}


def test_what_has_no_name_is_as_if_its_members_stood_there():
    pair = Compound("struct", None, 16, [Field("next", LONG, 0), Field("prev", LONG, 8)])
    before, after = struct((None, pair, 0)), struct(("next", LONG, 0), ("prev", LONG, 16))
    assert changes(before, after) == {"prev": "moved"}


def test_structures_with_a_name_count_as_one_member_unless_expanded():
    old = Compound("struct", "list", 16, [Field("next", LONG, 0), Field("prev", LONG, 8)])
    new = Compound("struct", "list", 24, [Field("next", LONG, 8), Field("prev", LONG, 16)])
    before, after = struct(("l", old, 0)), struct(("l", new, 0))
    assert changes(before, after) == {"l": "resized"}
    assert changes(before, after, expand=True) == {
        "l": "resized",
        "l.next": "moved",
        "l.prev": "moved",
    }


def test_a_structure_that_has_a_name_in_one_only():
    opaque = Compound("struct", None, 16, [Field("opaque", Array(LONG, 2), 0)])
    before, after = struct(("lock", Typedef("lock_t", opaque), 0)), struct(("lock", opaque, 0))
    assert changes(before, after) == changes(after, before) == {}


def test_bit_fields():
    before = struct(("a", UINT, 0, 0, 3), ("b", UINT, 0, 3, 2), ("c", UINT, 0, 9, 1))
    after = struct(("a", UINT, 0, 0, 4), ("b", UINT, 0, 4, 2), ("c", UINT, 1, 1, 1))
    assert changes(before, after) == {"a": "resized", "b": "moved"}


def test_of_unknown_types_only_the_place_is_compared():
    before = struct(("a", Opaque(4), 0), ("b", Opaque(4), 4))
    after = struct(("a", Opaque(8), 0), ("b", INT, 8))
    assert changes(before, after) == {"b": "moved"}


def test_types_are_compared_by_what_they_mean():
    proc = Pointer(Compound("struct", "proc", 8), 8)
    same = [
        (Typedef("pid_t", INT), INT),
        (Typedef("proc_t", proc), proc),
        (Qualified("const", INT), INT),
        (Array(INT, 2), Array(INT, 3)),
        (Base("long", 8), Base("long long", 8)),
        (Pointer(Function(Void()), 8), Pointer(Function(INT, []), 4)),
        (Opaque(4), INT),
        (Pointer(Opaque(4), 8), proc),
    ]
    other = [
        (INT, UINT),
        (INT, Base("float", 4, "float")),
        (proc, Pointer(Compound("struct", "task", 8), 8)),
        (proc, Pointer(Void(), 8)),
        (proc, Base("unsigned long", 8, signed=False)),
        (Array(INT, 2), INT),
        (Array(CHAR, 2), Array(UINT, 2)),
        (Compound("struct", "a", 4), Compound("union", "a", 4)),
        (Enum("a", 4), Enum("b", 4)),
    ]
    assert [pair for pair in same if meanings_differ(*pair)] == []
    assert [pair for pair in other if not meanings_differ(*pair)] == []


def test_a_pointer_to_itself_has_a_meaning():
    loop = Pointer(lambda: loop, 8)
    assert meaning(loop) == meaning(Pointer(loop, 8))


def test_values_of_an_enum():
    before = Enum("e", 4, [("A", 0), ("B", 1), ("C", 2)])
    after = Enum("e", 4, [("A", 0), ("C", 1), ("D", 2)])
    assert compare_values(before, after) == [
        ("C", ["changed"], 2, 1),
        ("D", ["added"], None, 2),
        ("B", ["gone"], 1, None),
    ]


@pytest.mark.skipif(not (CLANG and OBJCOPY), reason="no clang or no llvm-objcopy")
def test_the_same_c_on_two_machines(tmp_path):
    """Every member that clang places or sizes differently on i386 is named, and no other."""
    places = {}
    for target in ("x86_64", "i386"):
        program = Program(random.Random("machines"), "i386", 60)
        program.triple = {"x86_64": "x86_64-linux-gnux32"}.get(target, program.triple)
        places[target] = program.compile(str(tmp_path))[0]
    seen = 0
    for tag, after in places["i386"].items():
        before = places["x86_64"][tag]
        wanted = {
            name: "moved"
            for (name, offset), (_, other) in zip(bits_of(before), bits_of(after), strict=True)
            if offset != other
        }
        found = {
            name: kinds for name, kinds in changes(before, after, True).items() if "moved" in kinds
        }
        direct = {name: kinds for name, kinds in found.items() if "." not in name}
        assert set(direct) == set(wanted)
        seen += len(wanted)
    assert seen > 10


def bits_of(compound, base=0):
    """Where clang has the members that have a name, unnamed structures' too, in bits."""
    for field in compound.fields:
        at = base + 8 * field.offset + (field.bit_offset or 0)
        if field.name:
            yield field.name, at
        else:
            yield from bits_of(field.type, at)
