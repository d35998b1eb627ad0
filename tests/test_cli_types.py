"""type and types as a user types them."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from inputs import ROOT, real

from kvmtool.cli import cli
from kvmtool.types import layouts
from kvmtool.types.ctype import Base, Opaque, Typedef
from kvmtool.types.model import TypeTable

OLD, NEW = "10.8.5 x86_64", "10.9.5 x86_64"
NOTHING = {"KVMTOOL_KERNEL": "", "KVMTOOL_CORE": "", "KVMTOOL_TYPES": ""}


def run(*arguments, status=0):
    result = CliRunner().invoke(cli, arguments, env=NOTHING)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, (result.output, result.stderr)
    return result


def rows(*arguments, status=0):
    return [
        json.loads(line)
        for line in run(*arguments, "--format", "jsonl", status=status).stdout.splitlines()
    ]


# from a built-in layout alone


def test_a_layout_alone_has_places_and_says_what_it_does_not_know():
    table = layouts.table("10.5.8 i386")
    tag, unknown = next(
        (tag, field)
        for tag in table.structs()
        for field in table.type(tag).fields
        if isinstance(field.type, Opaque) and field.bit_size is None
    )
    ctype = table.type(tag)
    output = run("type", tag, "--layout", "10.5.8 i386").stdout
    (line,) = [
        line for line in output.splitlines() if line.endswith(f"    unknown {unknown.name};")
    ]
    assert line.startswith(f"/* 0x{unknown.offset:0{max(2, len(f'{ctype.size:x}'))}x}")
    assert f" <={unknown.type.size} */ " in line
    assert f"/* size: {ctype.size:#x} ({ctype.size}), members: {len(ctype.fields)}, " in output
    assert "holes: not known" in output
    assert "unknown: places only" in output


def test_every_member_of_a_layout_is_a_row():
    table = layouts.table(OLD)
    found = {row["name"]: row for row in rows("type", "proc", "--layout", OLD)}
    for name, member in table.struct("proc").members.items():
        if member.bit_size is None:
            assert found[name]["offset"] == member.offset, name
    unknown = {f.name for f in table.type("proc").fields if isinstance(f.type, Opaque)}
    assert {name for name, row in found.items() if row["type"] is None} >= unknown
    assert set(found["p_pid"]) == {"offset", "size", "bit_offset", "bit_size", "type", "name"}


def test_a_tag_with_its_keyword_in_one_word_or_two():
    one = run("type", "struct proc", "--layout", OLD).stdout
    assert one == run("type", "struct", "proc", "--layout", OLD).stdout
    assert one == run("type", "proc", "--layout", OLD).stdout


def test_which_member_lies_at_a_byte():
    offset = layouts.table(OLD).offset("proc", "p_comm")
    (row,) = rows("type", "proc", "--layout", OLD, "--offset", str(offset + 3))
    assert row["name"].startswith("p_comm")
    assert row["offset"] + row["into"] == offset + 3
    table = run("type", "proc", "--layout", OLD, "--offset", hex(offset + 3)).stdout
    assert "p_comm" in table
    assert hex(row["offset"]) in table


def test_a_byte_behind_the_end_is_an_error():
    size = layouts.table(OLD).size("proc")
    result = run("type", "proc", "--layout", OLD, "--offset", str(size), status=1)
    assert f"offset {size:#x} is outside" in result.stderr


def test_a_name_that_is_none_has_near_misses():
    result = run("type", "vnoode", "--layout", OLD, status=1)
    assert "type vnoode not found (did you mean vnode" in result.stderr
    assert result.stdout == ""


def test_nothing_to_look_into():
    result = run("type", "proc", status=1)
    assert result.stderr == (
        "kvmtool: no types: name a kernel with -N, its types with --types, or a --layout\n"
    )


def test_csv():
    text = run("type", "proc", "--layout", OLD, "--format", "csv").stdout
    table = list(csv.DictReader(io.StringIO(text)))
    assert list(table[0]) == ["offset", "size", "bit_offset", "bit_size", "type", "name"]
    places = {row["name"]: int(row["offset"]) for row in table}
    assert places["p_list.le_prev"] == 8


# what moved


def test_what_moved_between_two_layouts():
    found = {row["name"]: row for row in rows("type", "proc", "--layout", OLD, "--diff", NEW)}
    old, new = layouts.table(OLD), layouts.table(NEW)
    assert found.pop("proc")["change"] == ["resized"]
    for name, row in found.items():
        if set(row["change"]) & {"resized", "retyped"}:
            continue
        places = [
            table.offset("proc", name) if table.has("proc", name) else None for table in (old, new)
        ]
        assert [row["offset"], row["offset_other"]] == places
        kind = "added" if places[0] is None else "gone" if places[1] is None else "moved"
        assert row["change"] == [kind]
    for name in old.struct("proc").members:
        if "." not in name and new.has("proc", name):
            moved = "moved" in found.get(name, {"change": ()})["change"]
            assert moved == (old.offset("proc", name) != new.offset("proc", name))


def test_members_that_moved_together_take_one_line():
    result = run("type", "proc", "--layout", OLD, "--diff", NEW)
    assert "p_mlock ... p_uuid" in result.stdout
    assert "members by +0x8" in result.stdout
    assert f"from {OLD}: " in result.stderr
    back = run("type", "proc", "--layout", NEW, "--diff", OLD)
    assert "members by -0x8" in back.stdout


def test_a_structure_that_did_not_change():
    result = run("type", "proc", "--layout", OLD, "--diff", OLD)
    assert "proc is alike in both" in result.stderr
    assert len(rows("type", "proc", "--layout", OLD, "--diff", OLD)) == 1


def test_another_kernel_that_is_none():
    assert (
        "layout 10.8.6 x86_64 not found (did you mean 10.8"
        in run("type", "proc", "--layout", OLD, "--diff", "10.8.6 x86_64", status=1).stderr
    )
    run("type", "proc", "--layout", OLD, "--diff", NEW, "--offset", "1", status=2)


# types


def test_the_structures_of_a_layout():
    table = layouts.table(OLD)
    found = {row["name"]: row for row in rows("types", "--layout", OLD) if row["kind"] != "typedef"}
    assert set(table.structs()) <= set(found)
    assert all(found[name]["size"] == table.size(name) for name in table.structs())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("vnodeop", {"vnodeop_desc"}), ("vno*st", {"vnodelst"}), ("nothing", set())],
)
def test_a_pattern_picks_some(pattern, names):
    assert {row["name"] for row in rows("types", pattern, "--layout", OLD)} == names


def test_kinds_of_types():
    assert {row["kind"] for row in rows("types", "--layout", OLD, "--kind", "typedef")} == {
        "typedef"
    }
    run("types", "--layout", OLD, "--kind", "function", status=2)


# a kernel


def test_the_layout_of_a_kernels_file():
    kernel = real("dumps/x86_64-10.8.5/mach_kernel")
    size = layouts.table(OLD).size("vnode")
    assert f"/* size: {size:#x} ({size})" in run("type", "vnode", "-N", kernel).stdout


def test_two_kernels_files():
    kernel = real("dumps/x86_64-10.8.5/mach_kernel")
    other = real("dumps/x86_64-10.13.6/mach_kernel")
    (whole, *_) = rows("type", "vnode", "-N", kernel, "--diff", other)
    assert whole["size"] == layouts.table(OLD).size("vnode")
    assert whole["size_other"] == layouts.table("10.13.6 x86_64").size("vnode")


# exact types


OBJECTS = {
    "objects/ppc-xnu-792.25.20-kern_proc.o": 0x1F4,
    "objects/x86_64-xnu-2422.115.4-kern_proc.o": 0x4A8,
    "objects/x86_64-xnu-2422.115.4-kern_proc.o.ctf": 0x4A8,
}
DWARFDUMP = shutil.which("llvm-dwarfdump") or shutil.which("llvm-dwarfdump-14")
_MEMBER = re.compile(
    r'DW_TAG_member\n\s+DW_AT_name\t\("(\w+)"\).*?data_member_location\t\(.*?(0x[0-9a-f]+)\)',
    re.DOTALL,
)


@pytest.mark.parametrize("option", ["-N", "--types"])
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_file_alone(name, option):
    """As the kernel, or as its types: either will do."""
    size = OBJECTS[name]
    output = run("type", "struct proc", option, real(name)).stdout
    assert f"/* size: {size:#x} ({size}), members: " in output
    assert "unknown" not in output.partition("\n")[2]


@pytest.mark.skipif(not DWARFDUMP, reason="no llvm-dwarfdump")
@pytest.mark.parametrize("name", list(OBJECTS)[:2])
@pytest.mark.parametrize("tag", ["proc", "pgrp", "session"])
def test_members_are_where_llvm_dwarfdump_has_them(name, tag):
    command = [DWARFDUMP, f"--name={tag}", "--show-children", "--recurse-depth=1", real(name)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = [
        {member: int(offset, 16) for member, offset in _MEMBER.findall(block)}
        for block in re.split(r"\n(?=0x[0-9a-f]+: DW_TAG)", text)
    ]
    ours = {row["name"]: row["offset"] for row in rows("type", tag, "--types", real(name))}
    wanted = max(theirs, key=len)
    assert len(wanted) > 3
    assert {member: ours[member] for member in wanted} == wanted


ISF, CTF = "types/x86_64-10.8.5.types.json.gz", "types/x86_64-xnu-2422.115.4.ctfdata"


@pytest.mark.parametrize("name", [ISF, "types/i386-10.5.8.types.json.gz", CTF])
def test_a_file_of_types_alone(name):
    found = {row["name"]: row for row in rows("type", "proc", "--types", real(name))}
    assert found["p_list.le_next"]["type"] == "struct proc *"
    assert found["p_comm"]["type"] == "char[17]"
    listed = rows("types", "proc*", "--types", real(name), "--kind", "struct")
    assert {"kind": "struct", "name": "proc"}.items() <= listed[0].items()
    assert len(listed) > 3


def test_typedefs_enums_and_values():
    types = ["--types", real(CTF)]
    assert run("type", "pid_t", *types).stdout.splitlines()[1:] == [
        "typedef __darwin_pid_t pid_t;",
        "typedef __int32_t __darwin_pid_t;",
        "typedef int __int32_t;",
        "/* 4 bytes */",
    ]
    (row,) = rows("type", "pid_t", *types)
    assert (row["size"], row["type"], row["name"]) == (4, "int", "pid_t")
    assert "    VREG = 1,\n" in run("type", "enum", "vtype", *types).stdout
    values = rows("type", "enum vtype", *types)
    assert ("VDIR", "enum vtype = 2") in [(row["name"], row["type"]) for row in values]
    listed = rows("types", "proc_t", *types, "--kind", "typedef")
    proc_t = {"kind": "typedef", "size": 8, "name": "proc_t", "type": "struct proc *"}
    assert proc_t in listed


def test_a_union_has_several_members_at_a_byte():
    found = rows("type", "vm_map_object", "--types", real(CTF), "--offset", "0")
    assert {row["name"] for row in found} == {"vm_object", "sub_map"}


def test_the_same_kernel_by_dwarf_and_by_ctf_is_alike():
    kernel, other = real(list(OBJECTS)[1]), real(CTF)
    for tag in ("proc", "pgrp", "session", "ucred"):
        assert "is alike in both" in run("type", tag, "-N", kernel, "--diff", other).stderr
    assert "is alike in both" in run("type", "vnode", "--types", real(ISF), "--diff", OLD).stderr


def test_what_moved_between_two_files_of_types():
    found = rows("type", "proc", "--types", real(ISF), "--diff", real(CTF))
    old, new = layouts.table(OLD), layouts.table(NEW)  # the same releases
    moved = {row["name"]: row["offset_other"] for row in found if "moved" in row["change"]}
    assert moved
    assert moved == {
        name: new.offset("proc", name)
        for name, member in old.struct("proc").members.items()
        if "." not in name and new.has("proc", name) and new.offset("proc", name) != member.offset
    }


@pytest.mark.parametrize(
    ("name", "whose"),
    [("proc", "DWARF"), ("pid_t", "DWARF"), ("zone", "built-in"), ("struct zone *", "DWARF")],
)
def test_whose_a_type_is_that_a_file_lacks(name, whose):
    """An object has the types of one source file; the built-in layout answers for the rest."""
    kernel = real("machine/x86_64-xnu-2422.115.4.mach_kernel")
    head, *_ = run("type", name, "-N", kernel, "--types", real(list(OBJECTS)[1])).stdout.split("\n")
    assert head.startswith("/* types of ")
    assert (whose in head, "what that lacks" in head) == (True, False)


def test_an_enum_of_two_kernels(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(isf_of(RUN=1, STOP=2, ZOMBIE=3)))
    (tmp_path / "new.json").write_text(json.dumps(isf_of(RUN=1, STOP=3, SLEEP=2)))
    both = ["--types", str(tmp_path / "old.json"), "--diff", str(tmp_path / "new.json")]
    found = rows("type", "enum state", *both)
    assert {row["name"]: (row["change"], row["value"], row["value_other"]) for row in found} == {
        "STOP": (["changed"], 2, 3),
        "SLEEP": (["added"], None, 2),
        "ZOMBIE": (["gone"], 3, None),
    }
    assert "2 -> 3" in run("type", "enum state", *both).stdout


def isf_of(**values):
    """The smallest ISF with one enum."""
    return {
        "metadata": {"format": "6.2.0", "producer": {"name": "test", "version": "1"}},
        "base_types": {
            "int": {"size": 4, "signed": True, "kind": "int", "endian": "little"},
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
        },
        "user_types": {},
        "enums": {"state": {"size": 4, "base": "int", "constants": values}},
        "symbols": {},
    }


def test_damaged_types_are_one_line(tmp_path):
    with open(real(CTF), "rb") as whole:
        data = bytearray(whole.read())
    data[0x100:0x180] = bytes(0x80)
    (tmp_path / "types.ctf").write_bytes(data[:0x4000])
    result = run("type", "proc", "--types", str(tmp_path / "types.ctf"), status=1)
    assert result.stderr.startswith("kvmtool: ")
    assert str(tmp_path / "types.ctf") in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_type_that_cannot_be_read_costs_only_itself(monkeypatch):
    loop = Typedef("loop_t", lambda: loop)
    found = {"fine_t": Typedef("fine_t", Base("int", 4)), "loop_t": loop}
    source = SimpleNamespace(
        name="made",
        origin="here",
        names=lambda kind: found if kind == "typedef" else (),
        find=lambda kind, name: found.get(name),
    )
    monkeypatch.setattr("kvmtool.cli.types.types_of", lambda where: TypeTable(source))
    result = run("types", "--format", "jsonl", status=3)
    fine, damaged = map(json.loads, result.stdout.splitlines())
    assert fine == {"kind": "typedef", "size": 4, "name": "fine_t", "type": "int"}
    assert "more than 64 typedefs" in damaged["size"]["unreadable"]
    assert result.stderr == "kvmtool: 1 type could not be read\n"


# start-up


def test_type_brings_no_construct_and_no_rich():
    code = (
        "import sys; from kvmtool.cli import cli; "
        f"cli(['type', 'proc', '--layout', '{OLD}'], standalone_mode=False); "
        "print(sorted({'rich', 'construct', 'macholib', 'json'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == "[]\n"
    assert " p_pid;" in done.stdout
