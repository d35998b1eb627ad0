"""type and types as a user types them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from inputs import ROOT, real

from kvmtool.cli import cli
from kvmtool.types import layouts
from kvmtool.types.ctype import Opaque

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
    assert f"from {OLD} (" in result.stderr
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
