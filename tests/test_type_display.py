"""Structures as people read them, held against pahole, and against a compiler that reads them."""

from __future__ import annotations

import random
import re
import shutil
import subprocess

import pytest
from builders.c_types import CLANG, Program
from inputs import real

from kvmtool.cli.declaration import declaration
from kvmtool.errors import KvmError
from kvmtool.type_files import open_types
from kvmtool.types.compare import compare
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Field,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)
from kvmtool.types.model import TypeTable
from kvmtool.types.outline import in_order, outline, start, summary
from kvmtool.types.places import places

INT = Base("int", 4)
CHAR = Base("char", 1, "char")
UINT = Base("unsigned int", 4, signed=False)
PAHOLE = shutil.which("pahole")
needs_clang = pytest.mark.skipif(not CLANG, reason="no clang")

MACH_O, ELF = "x86_64-apple-macosx10.9", "x86_64-linux-gnu"

SOURCE = """
typedef unsigned int uid_t;
typedef struct { unsigned long opaque[2]; } lock_t;
typedef int handler_t(int, ...);
enum state { IDLE = -1, RUN, STOP = 100 };
struct list { struct list *next, **prev; };
union value { int number; void *pointer; char text[6]; };
struct proc {
    struct { struct proc *le_next; struct proc **le_prev; } p_list;
    char p_stat;
    uid_t p_uid;
    const char *const p_name;
    volatile unsigned p_busy : 1, p_kind : 3;
    char p_nice;
    lock_t p_lock;
    union { long wide; struct { short low; char high; }; } p_value[2];
    union { struct list p_children; int p_count; };
    int (*p_read)(struct proc *, int);
    handler_t *p_handlers[4];
    struct { int lines[3]; char last; } p_rows[2][3];
    enum { SMALL, LARGE } p_size;
    enum state p_state;
    union value p_one;
    unsigned p_tail : 31;
    char p_comm[17];
    char p_rest[];
};
struct proc a_proc;
"""


def table_of(source, folder, *flags):
    """The types of C `source`, compiled for Mach-O."""
    path = str(folder / "types.c")
    with open(path, "w") as out:
        out.write(source)
    command = [CLANG, "-target", MACH_O, "-g", "-gdwarf-4", "-w", *flags, "-c", path]
    subprocess.run([*command, "-o", path + ".o"], check=True)
    return TypeTable(open_types(path + ".o").source)


# pahole


def paholes(source, folder, *flags):
    """pahole's answer for the same C: the text of each structure by its tag."""
    path = str(folder / "elf.c")
    with open(path, "w") as out:
        out.write(source)
    command = [
        CLANG,
        "-target",
        ELF,
        "-g",
        "-gdwarf-4",
        "-w",
        *flags,
        "-c",
        path,
        "-o",
        path + ".o",
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([PAHOLE, path + ".o"], capture_output=True, text=True, check=True)
    found = re.finditer(r"^(?:struct|union) (\w+) \{.*?^\}", done.stdout, re.DOTALL | re.MULTILINE)
    return {match[1]: match[0] for match in found}


def total(pattern, text):
    return sum(map(int, re.findall(pattern + r": (\d+)", text)))


@needs_clang
@pytest.mark.skipif(not PAHOLE, reason="no pahole")
@pytest.mark.parametrize("seed", range(4))
def test_places_holes_and_sizes_are_paholes(seed, tmp_path):
    program = Program(random.Random(f"pahole {seed}"), "x86_64", 60)
    source = program.source()
    theirs = paholes(source, tmp_path, "-fms-extensions")
    ours = table_of(source.replace('section("', 'section("__DATA,'), tmp_path, "-fms-extensions")
    members = 0
    for tag, record in program.records.items():
        text, ctype = theirs[tag], ours.type(f"{record.kind} {tag}")
        lines = re.findall(r"^\t\S.*;? +/\* +(\d+)(?:: ?(\d+))? +\d+ \*/$", text, re.MULTILINE)
        assert [start(field) for field in in_order(ctype)] == [
            8 * int(offset) + int(bit or 0) for offset, bit in lines
        ], text
        members += len(lines)
        whole = summary(ctype)
        if record.kind == "struct":
            assert whole.hole_bits == 8 * total("sum holes", text) + total("sum bit holes", text)
            assert whole.padding_bits == 8 * total(r"\* padding", text) + total("bit_padding", text)
            assert re.search(rf"size: {whole.size},.* members: {whole.members} ", text)
    assert members > 150


# a compiler


@needs_clang
@pytest.mark.parametrize("seed", range(2))
def test_what_is_printed_is_c_of_the_same_layout(seed, tmp_path):
    program = Program(random.Random(f"c {seed}"), "x86_64", 60)
    source = program.source().replace('section("', 'section("__DATA,')
    table = table_of(source, tmp_path, "-fms-extensions")
    lines = [*declaration(table.type("enum kvm_kind"))]
    for tag, record in program.records.items():
        lines += declaration(table.type(f"{record.kind} {tag}"))
        if record.packed:  # which C says elsewhere
            lines[-2] = lines[-2].replace("};", "} __attribute__((packed));")
    assert_alike(lines, table, [(r.kind, tag) for tag, r in program.records.items()], tmp_path)


@needs_clang
@pytest.mark.parametrize("expand", [False, True])
def test_what_is_printed_of_nested_structures_is_c(expand, tmp_path):
    table = table_of(SOURCE, tmp_path)
    lines = []
    for name in ("uid_t", "lock_t", "handler_t", "enum state", "struct list", "union value"):
        if not (expand and name in ("struct list", "union value")):
            lines += declaration(table.type(name))
    lines += declaration(table.type("struct proc"), expand)
    assert_alike(lines, table, [("struct", "proc")], tmp_path, expand)


def assert_alike(lines, table, names, folder, expand=False):
    """Compile what was printed, and compare what the compiler makes of it with what we printed."""
    text = "\n".join(line for line in lines if not re.fullmatch(r"/\* \d+ bytes? \*/", line))
    users = "".join(f"\n{kind} {tag} v_{tag};" for kind, tag in names)
    (folder / "again").mkdir()
    again = table_of(text + users, folder / "again", "-fms-extensions")
    for kind, tag in names:
        one, two = table.type(f"{kind} {tag}"), again.type(f"{kind} {tag}")
        assert one.size == two.size, tag
        places_one, places_two = (
            [(line.what, line.depth, line.offset, line.bit_offset, line.path) for line in lines]
            for lines in (outline(one, expand), outline(two, expand))
        )
        assert places_one == places_two
        if not expand:  # which writes the structures of typedefs where they stand
            assert [line.text for line in outline(one)] == [line.text for line in outline(two)]


# what stands where


@needs_clang
def test_nested_structures_stand_where_they_are_declared(tmp_path):
    proc = table_of(SOURCE, tmp_path).type("struct proc")
    plain, expanded = list(declaration(proc)), list(declaration(proc, expand=True))
    starts = [line.partition("*/ ")[2] for line in plain]
    assert starts.index("    struct {") + 3 == plain.index(" " * 22 + "} p_list;")
    assert "    lock_t p_lock;" in starts
    assert "    struct list p_children;" not in starts
    assert "        struct list p_children;" in starts
    assert " " * 22 + "} p_rows[2][3];" in plain
    assert [line.strip() for line in plain if "SMALL" in line] == ["SMALL = 0,"]
    assert [line.partition("*/ ")[2] for line in expanded if "lock_t" in line] == [
        "    struct { /* lock_t */"
    ]
    assert " " * 26 + "} p_children;" in expanded


def test_a_hole_of_bits_and_padding_of_bytes():
    fields = [Field("a", UINT, 0, 0, 3), Field("b", UINT, 0, 5, 2), Field("c", CHAR, 2)]
    lines = list(declaration(Compound("struct", "bits", 8, fields)))
    assert lines == [
        "                struct bits {",
        "/* 0x00:0 3b */     unsigned int a:3;",
        "/* 0x00:3 2b */     /* hole */",
        "/* 0x00:5 2b */     unsigned int b:2;",
        "/* 0x00:7 9b */     /* hole */",
        "/* 0x02    1 */     char c;",
        "/* 0x03    5 */     /* padding */",
        "                };",
        "/* size: 0x8 (8), members: 3, holes: 2 (1 byte 3 bits), padding: 5 bytes */",
    ]


def test_a_bit_field_is_where_its_first_bit_is_whoever_counts():
    one = Compound("struct", "one", 4, [Field("x", UINT, 0, 19, 4)])
    two = Compound("struct", "two", 4, [Field("x", UINT, 2, 3, 4)])
    (first,), (second,) = (
        [line for line in outline(c) if line.what == "member"] for c in (one, two)
    )
    assert first == second
    assert (first.offset, first.bit_offset, first.bit_size) == (2, 3, 4)


def test_members_of_unknown_types():
    inner = Compound("struct", None, 8, [Field("next", Opaque(8), 0)])
    fields = [Field("list", inner, 0), Field("pid", Opaque(4), 8), Field("rest", INT, 12)]
    lines = list(declaration(Compound("struct", "proc", 16, fields)))
    assert lines == [
        "               struct proc {",
        "/* 0x00 <=8 */     struct {",
        "/* 0x00 <=8 */         unknown next;",
        "                   } list;",
        "/* 0x08 <=4 */     unknown pid;",
        "/* 0x0c   4 */     int rest;",
        "               };",
        "/* size: 0x10 (16), members: 3, holes: not known */",
        "/* unknown: places only; a size with <= is the room up to the next member */",
    ]


def test_what_is_no_structure():
    pid = Typedef("pid_t", Typedef("__darwin_pid_t", INT))
    assert list(declaration(pid)) == [
        "typedef __darwin_pid_t pid_t;",
        "typedef int __darwin_pid_t;",
        "/* 4 bytes */",
    ]
    assert list(declaration(Pointer(Qualified("const", CHAR), 8))) == [
        "const char *  /* 8 bytes */"
    ]
    assert list(declaration(Void())) == ["void  /* no size */"]
    assert list(declaration(Array(CHAR, 1))) == ["char[1]  /* 1 byte */"]
    assert list(declaration(Compound("struct", "x", None))) == [
        "struct x;  /* only declared in these types, not defined */"
    ]
    enum = Enum(None, 4, [("A", -1), ("B", 2)])
    assert list(declaration(Typedef("e_t", enum))) == [
        "typedef enum {",
        "    A = -1,",
        "    B = 2,",
        "} e_t;",
        "/* size: 4, values: 2 */",
    ]


# which member


@needs_clang
def test_every_byte_of_a_structure_is_some_members(tmp_path):
    table = table_of(SOURCE, tmp_path)
    proc = table.type("struct proc")
    seen = {}
    for offset in range(proc.size):
        for place in places(proc, offset):
            size = place.size if place.bit_size is None else -(-place.bit_size // 8) + 1
            assert place.offset <= offset < place.offset + size
            seen.setdefault(place.path or place.what, place)
    assert seen["p_list.le_prev"].offset == 8
    assert seen["p_comm[16]"].type.name == "char"
    assert seen["p_rows[1][2].lines[2]"].size == 4
    assert seen["p_value[1].wide"].offset == seen["p_value[1].low"].offset
    assert {"p_busy", "p_kind", "p_children.next", "p_count", "p_lock.opaque[1]"} <= set(seen)
    assert seen["hole"].size == 3


def test_bits_that_share_a_byte():
    fields = [Field("a", UINT, 0, 0, 3), Field("b", UINT, 0, 3, 9), Field("c", UINT, 0, 16, 4)]
    bits = Compound("struct", "bits", 4, fields)
    found = [[p.path or p.what for p in places(bits, offset)] for offset in range(4)]
    assert found == [["a", "b"], ["b", "hole"], ["c", "padding"], ["padding"]]


def test_bytes_outside():
    for offset in (-1, 4, 1 << 70):
        with pytest.raises(KvmError, match="is outside: the type has 0x4 bytes"):
            places(INT, offset)
    with pytest.raises(KvmError, match="has no size"):
        places(Void(), 0)


# what is wrong


def test_structures_without_end():
    loop = Compound("struct", None, 8, lambda: [Field("again", loop, 0)])
    twice = Compound("union", None, 8, lambda: [Field(None, twice, 0)] * 2)
    for ctype in (loop, twice):
        with pytest.raises(KvmError, match=r"nested deeper than 64|at most 65536"):
            outline(ctype)
        with pytest.raises(KvmError, match=r"nested deeper than 64|at most 65536"):
            places(ctype, 0)


def test_a_nest_that_doubles():
    inner = Compound("union", None, 8, [Field("a", INT, 0)])
    for _ in range(40):
        inner = Compound("union", None, 8, [Field(None, inner, 0), Field(None, inner, 0)])
    with pytest.raises(KvmError, match="at most 65536 lines"):
        outline(inner)
    with pytest.raises(KvmError, match="at most 65536 members at offset"):
        places(inner, 7)


@pytest.mark.parametrize(
    "name", ["ppc-xnu-792.25.20-kern_proc.o", "x86_64-xnu-2422.115.4-kern_proc.o"]
)
def test_damaged_dwarf_is_shown_or_refused(name, tmp_path):
    """Of every damaged structure either all is shown, or one line says what is wrong."""
    with open(real(f"objects/{name}"), "rb") as whole:
        intact = whole.read()
    path, outcomes = str(tmp_path / "damaged.o"), set()
    for seed in range(40):
        rng, data = random.Random(seed), bytearray(intact)
        for _ in range(rng.choice([1, 5, 50, 400])):
            data[rng.randrange(0x1000, len(data))] = rng.randrange(256)
        with open(path, "wb") as out:
            out.write(data)
        outcomes |= set(shown_or_refused(path))
    assert outcomes == {"shown", "refused"}


def shown_or_refused(path):
    for tag in ("proc", "pgrp", "session", "ucred"):
        try:
            table = TypeTable(open_types(path).source)
            ctype = table.type(f"struct {tag}")
            list(declaration(ctype, expand=True))
            if ctype.size:
                places(ctype, ctype.size - 1)
                compare(ctype, ctype)
                table.construct(tag)
            yield "shown"
        except KvmError:
            yield "refused"
