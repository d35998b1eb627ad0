"""C types as data, their names, and structures flattened: also those no compiler would make."""

from __future__ import annotations

import itertools

import pytest

from kvmtool.errors import KvmError, NotFoundError
from kvmtool.types.chained import chain, origin_of
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Pointer,
    Qualified,
    Typedef,
    Void,
    unqualified,
)
from kvmtool.types.declare import declare
from kvmtool.types.flatten import Member, flatten
from kvmtool.types.model import TypeTable

INT = Base("int", 4)
UINT = Base("unsigned int", 4, signed=False)
CHAR = Base("char", 1, "char")


class Source:
    """A `TypeSource` of what it is given."""

    name, origin = "made here", "a test"

    def __init__(self, tags=(), typedefs=(), bases=(), byteorder="<", pointer_size=8):
        self.byteorder, self.pointer_size = byteorder, pointer_size
        self._all = {"tag": dict(tags), "typedef": dict(typedefs), "base": dict(bases)}

    def find(self, kind, name):
        return self._all[kind].get(name)

    def names(self, kind):
        return self._all[kind]

    def variable(self, name):
        return {"nprocs": INT}.get(name)


PROC = Compound("struct", "proc", 8, [Field("p_pid", INT, 0), Field("p_flag", INT, 4)])
VALUE = Compound("union", "value", 4, [Field("n", INT, 0)])
STATE = Enum("state", 4, [("RUN", 1)])
TABLE = TypeTable(
    Source(
        {"proc": PROC, "value": VALUE, "state": STATE, "both": PROC},
        {"pid_t": Typedef("pid_t", INT), "both": Typedef("both", INT)},
        {"int": INT, "unsigned int": UINT},
    )
)
NARROW = TypeTable(Source(pointer_size=4))


# sizes


def test_sizes():
    assert Array(Array(INT, 3), 2).size == 24
    assert Array(INT, None).size == 0
    assert Array(Compound("struct", "x", None), 2).size is None
    assert Typedef("t", Qualified("const", INT)).size == 4
    assert Qualified("const", Array(INT, 2)).size == 8
    assert Void().size is Function(INT).size is Compound("struct", "x", None).size is None


def test_targets_are_made_once_and_when_asked():
    made = []

    def target():
        made.append(1)
        return INT

    pointer = Pointer(target, 8)
    assert made == []
    assert pointer.target is pointer.target is INT
    assert made == [1]
    fields = Compound("struct", "x", 4, lambda: [*(made.append(2) or []), Field("a", INT, 0)])
    assert fields.fields is fields.fields
    assert made == [1, 2]


def test_typedefs_in_a_circle():
    one = Typedef("one_t", lambda: two)
    two = Typedef("two_t", lambda: one)
    with pytest.raises(KvmError, match="type one_t: more than 64 typedefs lead from one to the"):
        unqualified(one)
    with pytest.raises(KvmError, match="more than 64 typedefs"):
        _ = one.size
    quals = Qualified("const", lambda: quals)
    with pytest.raises(KvmError, match="more than 64"):
        _ = quals.size


def test_an_array_of_itself():
    loop = Array(lambda: loop, 2)
    with pytest.raises(KvmError, match="array nested deeper than 64"):
        _ = loop.size


def test_chains_up_to_the_limit_are_fine():
    found = INT
    for depth in range(60):
        found = Typedef(f"t{depth}", found)
    assert found.size == 4
    for _ in range(60):
        found = Array(found, 1)
    assert found.size == 4


# names


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("proc", "struct proc"),
        ("struct proc", "struct proc"),
        ("  struct   proc  *", "struct proc *"),
        ("union value", "union value"),
        ("enum state", "enum state"),
        ("state", "enum state"),
        ("pid_t", "pid_t"),
        ("const pid_t *const", "const pid_t *const"),
        ("proc const *", "const struct proc *"),
        ("struct proc **[4][0x10]", "struct proc **[4][16]"),
        ("char[17]", "char[17]"),
        ("char []", "char[]"),
        ("unsigned", "unsigned"),
        ("void *", "void *"),
        ("both", "both"),
        ("struct both", "struct proc"),
    ],
)
def test_names_of_types(text, shown):
    assert declare(TABLE.type(text)) == shown


@pytest.mark.parametrize(
    ("text", "wide", "narrow", "signed"),
    [
        ("char", 1, 1, True),
        ("unsigned char", 1, 1, False),
        ("short int", 2, 2, True),
        ("unsigned", 4, 4, False),
        ("long", 8, 4, True),
        ("long unsigned int", 8, 4, False),
        ("long long", 8, 8, True),
        ("unsigned long long int", 8, 8, False),
        ("int long unsigned long", 8, 8, False),
        ("_Bool", 1, 1, False),
        ("float", 4, 4, True),
        ("double", 8, 8, True),
        ("long double", 16, 16, True),
        ("char *", 8, 4, None),
    ],
)
def test_cs_own_numbers(text, wide, narrow, signed):
    """As clang has them for x86_64-apple-macosx and i386-apple-macosx."""
    for table, size in ((TABLE, wide), (NARROW, narrow)):
        found = table.type(text)
        assert found.size == size
        assert getattr(found, "signed", None) == signed


def test_which_words_c_combines():
    """Every row of up to four words: the standard's list (C17 6.7.2) in any order, no other."""
    listed = {
        *("char", "signed char", "unsigned char", "short", "signed short", "short int"),
        *("signed short int", "unsigned short", "unsigned short int", "int", "signed"),
        *("signed int", "unsigned", "unsigned int", "long", "signed long", "long int"),
        *("signed long int", "unsigned long", "unsigned long int", "long long"),
        *("signed long long", "long long int", "signed long long int", "unsigned long long"),
        *("unsigned long long int", "float", "double", "long double", "_Bool"),
    }
    wanted = {tuple(sorted(text.split())) for text in listed}
    words = ("signed", "unsigned", "char", "short", "int", "long", "float", "double", "_Bool")
    for count in range(1, 5):
        for row in itertools.combinations_with_replacement(words, count):
            if tuple(sorted(row)) in wanted:
                assert NARROW.type(" ".join(row)).size
            else:
                with pytest.raises(KvmError, match="expected the name of a type"):
                    NARROW.type(" ".join(row))


@pytest.mark.parametrize(
    ("text", "near"),
    [("prok", "proc"), ("struct prok", "proc"), ("pid_", "pid_t"), ("enum stat", "state")],
)
def test_what_is_no_name_has_near_misses(text, near):
    with pytest.raises(NotFoundError) as caught:
        TABLE.type(text)
    assert (caught.value.kind, caught.value.name) == ("type", text)
    assert near in caught.value.near
    assert "types are those of made here" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "const",
        "int [",
        "int]",
        "int[x]",
        "int[08]",
        "proc->p_pid",
        "int (*)(int)",
        "int[-1]",
    ],
)
def test_what_is_no_name_at_all(text):
    with pytest.raises(KvmError, match="expected"):
        TABLE.type(text)


def test_names_without_end():
    with pytest.raises(KvmError, match="at most 8 stars"):
        TABLE.type("int" + "*" * 100_000)
    with pytest.raises(KvmError, match="more than 64"):
        _ = TABLE.type("const " * 100_000 + "int").size
    with pytest.raises(KvmError, match="nested deeper than 64"):
        _ = TABLE.type("int" + "[1]" * 10_000).size


def test_variables_with_and_without_their_underscore():
    assert TABLE.variable("_nprocs") is TABLE.variable("nprocs") is INT
    assert TABLE.variable("nproc") is None


# two sources as one


def test_what_the_first_lacks_the_second_answers():
    old = Compound("struct", "proc", 12, [Field("p_pid", INT, 8)])
    task = Compound("struct", "task", 8, [Field("bsd_info", Pointer(old, 8), 0)])
    head = Compound("struct", None, 8, [Field("lh_first", Pointer(old, 8), 0)])
    below = Source({"proc": old, "task": task})
    below.variable = {
        "kernproc": Pointer(old, 8),
        "allproc": head,
        "table": Array(Pointer(task, 8), 2),
        "nprocs": UINT,
    }.get
    below.name = "below"
    above = Source({"proc": PROC, "task": Compound("struct", "task", None)})
    table = chain(above, TypeTable(below))
    assert table.type("proc") is PROC
    assert table.type("task") is task
    assert table.size("proc") == 8
    assert table.variable("nprocs") is INT  # the first knows it
    assert table.variable("kernproc").target is PROC
    assert table.variable("allproc").fields[0].type.target is PROC
    assert table.variable("table").target.target is task
    assert table.variable("nothing") is None
    assert origin_of(table.source, PROC) == "made here: a test"
    assert origin_of(table.source, task) == "below: a test"


# flattened


def test_members_by_dotted_names():
    inner = Compound("struct", "list", 16, [Field("next", INT, 0), Field("prev", INT, 8)])
    nameless = Compound("union", None, 8, [Field("a", INT, 0), Field("b", INT, 4)])
    outer = Compound(
        "struct",
        "outer",
        32,
        [
            Field("first", Typedef("list_t", inner), 0),
            Field(None, nameless, 16),
            Field("many", Array(inner, 1), 24),
        ],
    )
    assert {name: member.offset for name, member in flatten(outer).members.items()} == {
        "first": 0,
        "first.next": 0,
        "first.prev": 8,
        "a": 16,
        "b": 20,
        "many": 24,
    }


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_bit_fields_are_counted_as_the_source_counts(byteorder):
    fields = [Field("low", UINT, 4, 0, 3), Field("high", UINT, 4, 19, 13)]
    inner = Compound("struct", None, 8, fields)
    outer = Compound("struct", "bits", 16, [Field("x", inner, 8)])
    table = TypeTable(Source({"bits": outer}, byteorder=byteorder))
    assert table.struct("bits").members["x.high"] == Member("x.high", 12, 19, 13)
    assert table.offset("bits", "x.low") == 12


def test_of_two_members_of_one_name_the_first_counts():
    twice = Compound("struct", "twice", 8, [Field("a", INT, 4), Field("a", INT, 0)])
    assert flatten(twice).members["a"].offset == 4


def test_structures_that_hold_themselves():
    loop = Compound("struct", "loop", 8, lambda: [Field("again", loop, 0)])
    with pytest.raises(KvmError, match="nested deeper than 64"):
        flatten(loop)
    nameless = Compound("union", None, 8, lambda: [Field(None, nameless, 0)] * 2)
    with pytest.raises(KvmError, match="nested deeper than 64"):
        flatten(nameless)


def test_a_nest_that_doubles():
    for name in ("x", None):  # what has no name is not listed, but it takes as long
        inner = Compound("union", None, 8, [Field("a", INT, 0)])
        for _ in range(40):
            inner = Compound("union", None, 8, [Field(name, inner, 0), Field(None, inner, 0)])
        with pytest.raises(KvmError, match="at most 65536 members"):
            flatten(inner)


def test_a_table_answers_by_member():
    assert TABLE.has("proc")
    assert TABLE.has("proc", "p_pid")
    assert not TABLE.has("proc", "p_pids")
    assert not TABLE.has("state")
    assert TABLE.size("proc") == 8
    with pytest.raises(
        NotFoundError, match=r"member proc.p_pids not found \(did you mean proc.p_p"
    ):
        TABLE.offset("proc", "p_pids")
    with pytest.raises(NotFoundError, match=r"structure prok not found \(did you mean proc"):
        TABLE.struct("prok")


def test_a_declaration_is_no_structure():
    declared = Compound("struct", "proc", None)
    table = TypeTable(Source({"proc": declared}, {"proc_t": Typedef("proc_t", declared)}))
    assert not table.has("proc")
    with pytest.raises(NotFoundError):
        table.struct("proc_t")
    assert table.type("struct proc").size is None
