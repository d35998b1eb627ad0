"""Types out of DWARF: real files against llvm-dwarfdump and pyelftools, lookups against walks."""

from __future__ import annotations

import io
import os
import re
from struct import pack
from typing import TYPE_CHECKING

import pytest

from kvmtool.macho import MachO
from kvmtool.peel import peel
from kvmtool.source import BytesSource, FileSource
from kvmtool.types.ctype import Compound, Enum
from kvmtool.types.declare import declare
from kvmtool.types.dwarf import DwarfTypes, open_dwarf
from kvmtool.types.model import TypeTable
from tests import inputs
from tests.builders import dwarf, llvm

if TYPE_CHECKING:
    from collections.abc import Iterator

PPC = "objects/ppc-xnu-792.25.20-kern_proc.o"
X86_64 = "objects/x86_64-xnu-2422.115.4-kern_proc.o"
ZFS = "kexts/fat-ppc-i386-zfs-102A.dSYM"
REAL = [(PPC, None), (X86_64, None), (ZFS, "ppc"), (ZFS, "i386")]


def image_of(path: str, arch: str | None = None) -> MachO:
    source = FileSource(path)
    return MachO(source if arch is None else peel(source, arch)[0])


def opened(path: str, arch: str | None = None) -> DwarfTypes:
    found = open_dwarf(image_of(path, arch))
    assert found is not None
    return found


def of_bytes(data: bytes) -> DwarfTypes:
    found = open_dwarf(MachO(BytesSource(data, "made.o")))
    assert found is not None
    return found


def walked(data: bytes) -> DwarfTypes:
    """The same, without any table of names: every unit is walked."""
    for name in (b"__apple_", b"__debug_pub", b"__debug_names"):
        data = data.replace(name, b"__absent"[: len(name)] + name[8:])
    return of_bytes(data)


# real files


@pytest.mark.parametrize(
    ("name", "tag", "size"),
    [
        # data/README.md, which has them from the research's own readers
        (PPC, "proc", 0x1F4),
        (PPC, "pgrp", 0x18),
        (PPC, "session", 0x114),
        (X86_64, "proc", 0x4A8),
    ],
)
def test_sizes_of_real_structures(name: str, tag: str, size: int) -> None:
    types = opened(inputs.real(name))
    assert TypeTable(types).size(tag) == size
    assert tag in types.names("tag")


def dumped_members(path: str, struct: str) -> list[tuple[str, int]]:
    """(name, offset) of the members of `struct` as llvm-dwarfdump prints them."""
    text = llvm.run("llvm-dwarfdump", f"--name={struct}", "--show-children", path)
    entry = re.search(
        r"\n0x[0-9a-f]+: DW_TAG_structure_type\n(?: .*\n)*? +DW_AT_byte_size.*\n(?: .*\n)*", text
    )
    assert entry
    member = re.compile(
        r"0x[0-9a-f]+:   DW_TAG_member\n +DW_AT_name\s+\(\"(\w+)\"\)\n(?: .*\n)*?"
        r" +DW_AT_data_member_location\s+\((?:DW_OP_plus_uconst )?(0x[0-9a-f]+)\)"
    )
    inside = text[
        entry.end() : re.compile(r"0x[0-9a-f]+:   NULL").search(text, entry.end()).start()
    ]
    return [(name, int(where, 16)) for name, where in member.findall(inside)]


@pytest.mark.parametrize(("name", "struct"), [(PPC, "proc"), (PPC, "tty"), (X86_64, "proc")])
def test_members_as_llvm_dwarfdump_prints_them(name: str, struct: str) -> None:
    path = inputs.real(name)
    dumped = dumped_members(path, struct)
    found = opened(path).find("tag", struct)
    assert isinstance(found, Compound)
    assert len(dumped) > 20
    assert [(field.name, field.offset) for field in found.fields] == dumped


def elftools_of(image: MachO):
    """The same sections as pyelftools reads them."""
    dwarfinfo = pytest.importorskip("elftools.dwarf.dwarfinfo")
    sections = {s.sectname: s for s in image.sections if s.segname == "__DWARF"}

    def section(name: str):
        if name not in sections:
            return None
        at = sections[name]
        data = image.source.read_at(at.offset, at.size)
        return dwarfinfo.DebugSectionDescriptor(
            io.BytesIO(data), name, global_offset=0, size=at.size, address=0
        )

    names = {
        **{f"debug_{n}_sec": f"__debug_{n}" for n in ("info", "abbrev", "str", "line", "loc")},
        **{f"debug_{n}_sec": f"__debug_{n}" for n in ("aranges", "frame", "ranges", "types")},
        **{f"debug_{n}_sec": f"__debug_{n}" for n in ("pubtypes", "pubnames", "addr")},
        "debug_str_offsets_sec": "__debug_str_offs",
        "debug_line_str_sec": "__debug_line_str",
        "debug_loclists_sec": "__debug_loclists",
        "debug_rnglists_sec": "__debug_rnglists",
        "debug_sup_sec": "__debug_sup",
        "gnu_debugaltlink_sec": "__gnu_debugalt",
        "gnu_debuglink_sec": "__gnu_debuglink",
        "eh_frame_sec": "__eh_frame",
    }
    config = dwarfinfo.DwarfConfig(
        little_endian=image.byteorder == "<",
        machine_arch="x64",
        default_address_size=8 if image.is64 else 4,
    )
    wanted = dwarfinfo.DWARFInfo.__init__.__code__.co_varnames
    given = {key: section(name) for key, name in names.items() if key in wanted}
    return dwarfinfo.DWARFInfo(config, **given)


def judged(image: MachO) -> Iterator[tuple[str, int, list[tuple[str | None, int, int | None]]]]:
    """(name, size, [(member, bits from the start, width)]) of every structure, by pyelftools."""
    big = image.byteorder == ">"
    for unit in elftools_of(image).iter_CUs():
        for die in unit.iter_DIEs():
            attributes = die.attributes
            if die.tag not in ("DW_TAG_structure_type", "DW_TAG_union_type"):
                continue
            if "DW_AT_name" not in attributes or "DW_AT_byte_size" not in attributes:
                continue
            members = []
            for child in die.iter_children():
                if child.tag != "DW_TAG_member":
                    continue
                values = {key: value.value for key, value in child.attributes.items()}
                where = values.get("DW_AT_data_member_location", 0)
                if isinstance(where, list):
                    assert where[0] == 0x23
                    where = sum((b & 0x7F) << 7 * n for n, b in enumerate(where[1:]))
                width = values.get("DW_AT_bit_size")
                bits = 8 * where
                if width is not None:
                    skipped = values.get("DW_AT_bit_offset", 0)
                    storage = 8 * values.get("DW_AT_byte_size", 0)
                    bits += skipped if big else storage - skipped - width
                name = values.get("DW_AT_name")
                members.append((name and name.decode(), bits, width))
            yield (
                attributes["DW_AT_name"].value.decode(),
                attributes["DW_AT_byte_size"].value,
                members,
            )


@pytest.mark.parametrize(("name", "arch"), REAL)
def test_every_structure_as_pyelftools_reads_it(name: str, arch: str | None) -> None:
    path = inputs.real(name)
    types = opened(path, arch)
    compared = 0
    told: dict[str, list[object]] = {}
    for tag, size, members in judged(image_of(path, arch)):
        told.setdefault(tag, []).append((size, members))
    assert set(types.names("tag")) >= set(told)
    for struct, forms in told.items():
        found = types.find("tag", struct)
        assert isinstance(found, Compound)
        mine = [
            (field.name, 8 * field.offset + (field.bit_offset or 0), field.bit_size)
            for field in found.fields
        ]
        assert (found.size, mine) in forms, struct
        compared += len(mine)
    print(f"{name} {arch}: {len(told)} structures, {compared} members")
    assert compared > 100


# ways to a name

SOURCE = """
typedef int pid_t; struct task; enum state { idle, running = 5, gone = -1 };
struct proc { struct { struct proc *next; } link; pid_t p_pid; struct task *task; unsigned f:3; };
union value { long number; char text[16]; };
static struct proc zombie; struct proc *allproc = &zombie; union value values[4];
enum state state; pid_t find(int pid, struct proc *p) { return p->p_pid + pid; }
"""

CPLUSPLUS = """
namespace os {
  struct Second { int q; int *b; };
  class Base { public: static int count; virtual ~Base(); int a;
    struct Inner { int z; long w; } inner; enum class E : unsigned char { one = 1, big = 255 } e;
    union { int u1; char u2[4]; }; int Base::*pm; int (Base::*pf)(int); int &r; bool ok; };
  class Derived : public Base, public Second { int d:3; int e:9; };
  class Virtual : public virtual Second { int x; };
  struct Later; Later *later;
}
struct Inner { short s; };
os::Derived *d; os::Virtual *v; int os::Base::count; Inner inner;
"""


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path)


def names_of(types: DwarfTypes) -> dict[str, set[str]]:
    return {kind: set(types.names(kind)) for kind in ("tag", "typedef", "base", "variable")}


@pytest.mark.parametrize("source", [SOURCE, CPLUSPLUS])
@pytest.mark.parametrize(
    "flags",
    [
        ("-gdwarf-2",),
        ("-gdwarf-4",),
        ("-gdwarf-5",),
        ("-gdwarf-5", "-gpubnames", "-mllvm", "-accel-tables=Dwarf"),
    ],
)
def test_tables_of_names_find_what_a_walk_finds(folder, source, flags) -> None:
    language = ["-xc++"] if source is CPLUSPLUS else []
    path = dwarf.compiled(folder, source, *language, "-target", "x86_64-apple-macos12", *flags)
    with open(path, "rb") as file:
        data = file.read()
    table, walk = of_bytes(data), walked(data)
    assert names_of(table)["tag"] == names_of(walk)["tag"]
    for kind, names in names_of(table).items():
        assert names <= names_of(walk)[kind]
        for name in names:
            one, other = table.find(kind, name), walk.find(kind, name)
            assert one is not None
            assert other is not None
            assert one.size == other.size
    assert "tag" in names_of(table)


@pytest.mark.parametrize("order", [(CPLUSPLUS, SOURCE), (SOURCE, CPLUSPLUS)])
def test_names_of_a_dsym_of_c_and_cplusplus(tmp_path, order: tuple[str, ...]) -> None:
    objects = []
    for number, source in enumerate(order):
        os.makedirs(tmp_path / str(number))
        language = ["-xc++"] if source is CPLUSPLUS else []
        flags = (*language, "-target", "x86_64-apple-macos10.13", "-gdwarf-4")
        objects.append(dwarf.compiled(str(tmp_path / str(number)), source, *flags))
    path = dwarf.dsym(str(tmp_path), objects)
    with open(path, "rb") as file:
        data = file.read()
    assert b"__apple_types" in data
    table, walk = of_bytes(data), walked(data)
    assert names_of(table)["tag"] == names_of(walk)["tag"]
    # llvm-dwarfdump's names of these, from clang's own printing of types
    assert {"os::Base::Inner", "Inner", "os::Base::E", "os::Derived", "proc"} <= names_of(table)[
        "tag"
    ]
    for types in (table, walk):
        assert types.find("tag", "os::Base::Inner").size == 16
        assert types.find("tag", "Inner").size == 2
        assert types.find("tag", "proc").size == 32


def test_classes(folder) -> None:
    """Offsets are clang's, from -fdump-record-layouts of CPLUSPLUS."""
    flags = ("-xc++", "-target", "x86_64-apple-macos12", "-gdwarf-4")
    layouts = dwarf.record_layouts(folder, CPLUSPLUS, *flags[:3])
    assert re.search(r"os::Derived\n.*\| *class os::Base \(primary base\)", layouts)
    types = opened(dwarf.compiled(folder, CPLUSPLUS, *flags))
    derived = types.find("tag", "os::Derived")
    assert isinstance(derived, Compound)
    assert derived.kind == "class"
    size = re.search(r"\| class os::Derived\n(?:.*\n)*? *\| \[sizeof=(\d+)", layouts)
    assert size
    assert derived.size == int(size.group(1))
    assert [(field.name, field.type.name) for field in derived.fields[:2]] == [
        (None, "os::Base"),
        (None, "os::Second"),
    ]
    second = re.search(r"(\d+) \|   struct os::Second \(base\)\n", layouts)
    assert second
    assert derived.fields[1].offset == int(second.group(1))
    base = types.find("tag", "os::Base")
    assert isinstance(base, Compound)
    assert [field.name for field in base.fields] == [
        *("_vptr$Base", "a", "inner", "e", None, "pm", "pf", "r", "ok")
    ]
    virtual = types.find("tag", "os::Virtual")
    assert isinstance(virtual, Compound)
    assert [field.name for field in virtual.fields] == ["_vptr$Virtual", "x"]
    later = types.variable("_ZN2os5laterE")
    assert later is not None
    assert declare(later, "later") == "struct os::Later *later"
    assert types.variable("_ZN2os4Base5countE").name == "int"


TYPES = """
enum sign { minus = -1, plus = 1 }; enum large { most = 0xffffffff }; enum only;
typedef int (*handler_t)(int, ...); typedef int old(); typedef char matrix[2][3];
struct undefined; struct flexible { int n; struct undefined *u; char rest[]; };
struct zero { int n; char rest[0]; }; struct empty {};
struct proc *current(void);
enum sign sign; enum large large; handler_t handler; old *older; matrix rows; matrix *table;
struct flexible flexible; struct zero zero; struct empty empty;
const volatile char *const text; _Atomic int counter; void *anything; long double ld; _Bool yes;
unsigned char byte; float real; int *restrict only_one; int use(void) { return 0; }
void nothing(struct proc *p, const char *format, ...) {}
"""
DECLARED = {
    "handler": "handler_t handler",
    "rows": "matrix rows",
    "table": "matrix *table",
    "text": "const volatile char *const text",
    "anything": "void *anything",
    "nothing": "void nothing(struct proc *, const char *, ...)",
}


@pytest.mark.parametrize("version", [2, 4, 5])
def test_every_sort_of_type(folder, version: int) -> None:
    flags = ("-target", "x86_64-apple-macos12", f"-gdwarf-{version}", "-std=c11")
    types = opened(dwarf.compiled(folder, TYPES.replace("restrict", "__restrict"), *flags))
    table = TypeTable(types)
    # DWARF 2 has no tag for restrict, and none before 5 one for _Atomic
    counter = "_Atomic int counter" if version >= 5 else "int counter"
    only_one = "int *restrict only_one" if version >= 3 else "int *only_one"
    more = {"counter": counter, "only_one": only_one}
    for name, text in (DECLARED | more).items():
        found = types.variable(name)
        assert found is not None, name
        assert declare(found, name) == text
    assert declare(types.find("typedef", "handler_t").target) == "int (*)(int, ...)"
    assert declare(types.find("typedef", "old").target, "f") == "int f()"
    assert declare(types.find("typedef", "matrix").target, "m") == "char m[2][3]"
    assert table.type("matrix").size == 6
    sign, large = types.find("tag", "sign"), types.find("tag", "large")
    assert isinstance(sign, Enum)
    assert isinstance(large, Enum)
    assert (sign.values, sign.signed) == ([("minus", -1), ("plus", 1)], True)
    assert (large.values, large.signed) == ([("most", 0xFFFFFFFF)], False)
    assert [types.find("tag", tag).size for tag in ("flexible", "zero", "empty")] == [16, 4, 0]
    flexible, zero = types.find("tag", "flexible"), types.find("tag", "zero")
    assert [f.type.count for f in (flexible.fields[2], zero.fields[1])] == [None, 0]
    target = flexible.fields[1].type.target
    assert (target.tag, target.size, target.complete) == ("undefined", None, False)
    forms = {name: types.variable(name) for name in ("yes", "byte", "real", "ld")}
    told = [(base.form, base.size) for base in forms.values()]
    assert told == [("bool", 1), ("char", 1), ("float", 4), ("float", 16)]
    assert types.variable("absent") is None
    assert types.find("tag", "absent") is None


GCC = """
typedef int pid_t; struct task; enum state { idle, running = 5, gone = -1 };
struct proc { struct { struct proc *next; } link; pid_t p_pid; struct task *task; unsigned f:3;
  struct inner { short s; } in; int (*call)(struct proc *); char name[17]; enum state state; };
struct proc *allproc; static struct proc zombie; struct proc *find(int pid) { return &zombie; }
extern struct proc assembled; int use(void) { return assembled.f; }
"""


@pytest.mark.parametrize(
    "flags",
    [
        "-gdwarf-2 -gstrict-dwarf -gpubnames",
        "-gdwarf-3",
        "-gdwarf-4 -fdebug-types-section",
        "-gdwarf-5 -fdebug-types-section",
        "-gdwarf-5 -gdwarf64",
        "-gdwarf-4 -gpubnames",
    ],
)
def test_what_gcc_writes(folder, flags: str) -> None:
    """Its lists of names, DW_AT_sibling, type units; the layout is clang's for the same machine."""
    source, target = GCC, ("-target", "x86_64-linux-gnu")
    layout = dwarf.record_layouts(folder, source, *target)
    path = dwarf.compiled(folder, source, *flags.split(), compiler=dwarf.tool("gcc"))
    data = dwarf.from_elf(path)
    assert (b"__debug_pubtypes" in data) == ("-gpubnames" in flags)
    types = of_bytes(data)
    found = types.find("tag", "proc")
    assert isinstance(found, Compound)
    told = re.search(r"\| struct proc\n((?:.*\n)*?) *\| \[sizeof=(\d+)", layout)
    assert told
    assert found.size == int(told.group(2))
    rows = re.findall(r"^ *(\d+)(?::(\d)-\d)? \|   (?! ).*?(\w+)$", told.group(1), re.M)
    mine = [(str(f.offset), str(f.bit_offset or 0), f.name) for f in found.fields]
    assert mine == [(offset, bit or "0", name) for offset, bit, name in rows]
    assert {"proc", "inner", "state"} <= set(types.names("tag"))
    for name, text in (
        ("allproc", "struct proc *allproc"),
        ("zombie", "struct proc zombie"),
        ("find", "struct proc *find(int)"),
        ("assembled", "struct proc assembled"),
    ):
        assert declare(types.variable(name), name) == text
    state = types.find("tag", "state")
    assert isinstance(state, Enum)
    assert state.values == [("idle", 0), ("running", 5), ("gone", -1)]


def test_offsets_left_to_the_linker(folder) -> None:
    """Relocation entries of an MH_OBJECT that lead from one DWARF section into another."""
    path = dwarf.compiled(folder, SOURCE, "-target", "x86_64-apple-macos12", "-gdwarf-4")
    plain, data = opened(path), bytearray()
    with open(path, "rb") as file:
        data += file.read()
    image = image_of(path)
    names = [section.sectname for section in image.sections]
    info, strings = (image.sections[names.index(f"__debug_{n}")] for n in ("info", "str"))
    assert strings.addr
    # The names of structures as an assembler may leave them: addresses, each with an entry
    entries = bytearray()
    for name in ("proc", "task", "state"):
        text = image.source.find(b"\0%b\0" % name.encode(), strings.offset, image.source.size) + 1
        value = (text - strings.offset).to_bytes(4, "little")
        at = image.source.find(value, info.offset + 11, info.offset + info.size)
        data[at : at + 4] = (text - strings.offset + strings.addr).to_bytes(4, "little")
        word = names.index("__debug_str") + 1 | 2 << 25  # 4 bytes, absolute, of that section
        entries += (at - info.offset).to_bytes(4, "little") + word.to_bytes(4, "little")
    head = next(image.commands(0x19))
    table = head.offset + 72 + 80 * names.index("__debug_info")
    data[table + 56 : table + 64] = pack("<2I", len(data), len(entries) // 8)
    moved = walked(bytes(data + entries))
    assert set(moved.names("tag")) == set(plain.names("tag")) == {"proc", "value", "state"}
    assert moved.find("tag", "proc").size == 32
    assert declare(moved.find("tag", "proc").fields[2].type, "t") == "struct task *t"
