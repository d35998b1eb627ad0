"""Types out of DWARF: real files against llvm-dwarfdump and pyelftools, lookups against walks."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import pytest

from kvmtool.macho import MachO
from kvmtool.peel import peel
from kvmtool.source import BytesSource, FileSource
from kvmtool.types.ctype import Compound
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
    ("name", "struct", "size"),
    [
        # data/README.md, which has them from the research's own readers
        (PPC, "proc", 0x1F4),
        (PPC, "pgrp", 0x18),
        (PPC, "session", 0x114),
        (X86_64, "proc", 0x4A8),
    ],
)
def test_sizes_of_real_structures(name: str, struct: str, size: int) -> None:
    types = opened(inputs.real(name))
    assert TypeTable(types).size(struct) == size
    assert struct in types.names("tag")


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
    for struct, size, members in judged(image_of(path, arch)):
        told.setdefault(struct, []).append((size, members))
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
