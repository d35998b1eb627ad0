"""The built-in layouts against the tables they came from, and against independent ones."""

from __future__ import annotations

import csv
import functools
import gzip
import json
import os
import subprocess
import sys

import pytest

from kvmtool.errors import FormatError, NotFoundError
from kvmtool.types import layouts
from kvmtool.types.fixed import FixedTypes
from kvmtool.types.flatten import Member, Struct
from kvmtool.types.layout_types import LayoutTypes
from kvmtool.types.model import TypeTable
from kvmtool.types.resource import Resource
from tests.inputs import ROOT, real
from tools import build_layouts

# ------------------------------------------------------------------------------ known cells
# Rows of the published tables: a structure (its size) or a member (its offset), hexadecimal;
# "-" is no such member, "." no such structure. Columns up to 10.13 were read from debug kits by
# another program, later ones computed.

UP_TO_10_7 = ("10.4.11 i386", "10.5.0 i386", "10.5.8 i386", "10.6.8 i386", "10.7.5 i386")
UP_TO_10_13 = (
    *("10.6.8 x86_64", "10.7.5 x86_64", "10.8.5 x86_64", "10.9.5 x86_64", "10.10.5 x86_64"),
    *("10.11.6 x86_64", "10.12.6 x86_64", "10.13.6 x86_64"),
)
SINCE_12 = ("12.5", "13.0", "13.5", "14.0", "14.6", "15.0", "15.5")
SINCE_11 = ("11.0.1", "11.5", "12.0.1", *SINCE_12)
SINCE_10_14 = ("10.14.6", "10.15.6", *SINCE_11)

OLD_PROCESSES = """
proc                 1f4 250 254 2a0 2b8 430 440 460 4a8 4b0 4b8 478 490
proc.task            108   c   c   c   c  18  18  18  18  18  18  18  18
proc.p_pptr           30  10  10  10  10  20  20  20  20  20  20  20  20
proc.p_ppid            -  14  14  14  14  28  28  28  28  28  28  28  28
proc.p_uid             -   -   -   -  1c   -  30  30  30  30  30  30  30
proc.p_pid            24   8   8   8   8  10  10  10  10  10  10  10  10
proc.p_stat           20  28  28  28  44  48  60  60  68  68  68  68  68
proc.p_pgrp           f8 1d4 1d4 1d8 1f0 2f0 300 300 308 308 318 318 318
proc.p_ucred           8  64  64  64  7c  c0  d0  d0  d8  d8  e8  e8  e8
proc.p_flag           1c  a4  a4  a8  c0 148 158 158 160 160 170 170 170
proc.p_argc          170 174 174 178 190 28c 29c 29c 2a4 2a4 2b4 2b4 2b4
proc.user_stack      160 178 178 17c 194 290 2a0 2a0 2a8 2a8 2b8 2b8 2b8
proc.p_comm           c3 1a0 1a0 1a4 1bc 2bc 2cc 2cc 2d4 2d4 2e4 2e4 2e0
proc.p_start           - 240 240 280 298 400 410 418 418 428 428 3c8 3c0
pgrp                  18  30  30  30  2c  50  48  48  48  48  48  48  48
pgrp.pg_session        c   c   c   c   c  18  18  18  18  18  18  18  18
session              114 138 138 138 134 168 160 160 160 160 160 160 160
session.s_login       14  1c  1c  1c  1c  30  30  30  30  30  30  30  30
ucred                 80  88  88  94  7c  b0  90  90  90  90  90  90  90
ucred.cr_uid           c   c   c   c   -  18   -   -   -   -   -   -   -
ucred.cr_posix         -   -   -   -   c   -  18  18  18  18  18  18  18
filedesc.fd_lastfile  14  14  14  14  14  24  24  24  24  24  24  24  4c
fileproc.f_fglob       8   8   8   8   8   8   8   8   8   8   8   8   8
fileglob.fg_type      14  14  14  14  14  24  24  14   -   -   -   -   -
fileglob.fg_data      30  30  30  30  30  48  48  38  38  38  38  38  38
vnode.v_name          64  70  70  74  70  b8  b0  b0  b0  b0  b0  b8  b8
mount.mnt_flag        3c  3c  3c  3c  38  78  70  70  70  70  70  70  70
"""
OLD_TASKS = """
task                    1b0 1d8 1dc 1f4 290 2f0 388 3a8 3c0 450 4c0 550 5d8
task.map                 14  14  14  18  14  28  20  20  20  20  20  20  20
task.pset_tasks          18   -   -   -   -   -   -   -   -   -   -   -   -
task.tasks                -  18  18  1c  18  30  28  28  28  28  28  28  28
task.bsd_info           19c 1c8 1cc 1d0 1ec 2c0 2d8 2e0 2f0 300 318 380 390
task.t_flags              -   -   -   -   -   -   -   - 300 310 330 3b8 3c8
thread                  364 3c8 3c8 3d4 3f8 588 540 578 450 4b8 490 498 4f0
thread.task_threads     1d8 210 210 20c 210 308 2d0 2e0 2f0 300 2f8 308 328
thread.thread_id          -   -   - 3cc 3a8 580 4f0 520 3f8 420 398 3a8 3d0
thread.state             94  94  94  94  4c 110  80  80  78  70  70  70  70
thread.base_pri           -   -   -   -   -   -   -   -   -   -  8a  8e  8e
thread.uthread          360 3ac 3ac 3a8 380 548 4b8 4e0 3b0 3c8 348 358 380
thread_ro                 .   .   .   .   .   .   .   .   .   .   .   .   .
_vm_map                   .  78  7c  a4  9c  f8  e8  e8  f0  f0  f8  f8 100
_vm_map.pmap              .  2c  2c  2c  38  38  48  48  50  50  50  48  48
pmap.pm_cr3              58  54  54  54   4  80   8   8   8   8   8   8   8
zone.elem_size           1c 150 150 150 148 1a8 198 198  c0  c0  c0  c0  c0
zone.zone_name           4c 180 180 180 184 200 1f8 220  f0  f0  f0  e8  e8
processor.active_thread   c   c   c   c   c  18  18  18  18  18  20  20  20
"""
OLD_SOCKETS = """
socket                 198 198 198 22c 2d0 368 370 3b8 3d8 3b8 3b8 3b8
socket.last_pid          -   -   - 1a8   - 2e0 2e0 2d8 2e0 224 224 224
protosw.pr_domain        4   4   4   4   4   4   4  10  10  10  10  10
inpcbinfo.listhead      14  14  14  14  28  28  28   -   -   -   -   -
inpcbinfo.ipi_listhead   -   -   -   -   -   -   -  40  40  40  40  40
inpcb.inp_socket        24  24  24  24  40  40  40  40  40  40  40  40
inpcb.inp_lport         12  12  12  12  1a  1a  1a  8e  8e  8e  8e  8e
tcpcb.t_state           20  20  20  34  30  48  48  48  58   c   c   c
unpcb.unp_vnode          c   c   c   c  18  18  18  18  18  18  18  18
tty.t_dev               64  64  70  6c  c4  bc  bc  bc  bc  bc  bc  bc
"""
NEW_PROCESSES = """
proc               470 4c8 4c0 4c0 538 5d0 5b8 7b8 7c8 7d8 7d8 7d8
proc.task           10  10  10  10  10  10   -   -   -   -   -   -
proc.p_proc_ro       -   -   -   -   -  20  18  18  18  18  18  18
proc.p_pptr         18  18  18  18  18  18  10  10  10  10  10  10
proc.p_uid          28  2c  2c  2c  2c  34  2c  2c  2c  2c  2c  28
proc.p_pid          60  68  68  68  68  68  60  60  60  60  60  60
proc.p_pgrp        300 320 308 308 198 190 188 188 198 198 198 198
proc.p_ucred        e0 100  f0  f0  d8   -   -   -   -   -   -   -
proc.p_flag        164 184 16c 16c 1fc 2a4 29c 494 4a4 4a4 4a4 4a4
proc.p_comm        2c8 2e8 2d0 2d0 358 400 400 5f8 608 60c 60c 60c
proc.p_start       3a0 3d0 3b8 3b8 438 4d0 4c8 6c0 6d0 6e0 6e0 6e0
pgrp                48  48  48  48  38  38  38  38  38  38  38  38
session.s_login     30  30  30  30  4c  4c  4c  4c  4c  4c  4c  4c
filedesc.fd_ofiles   0   0   0   0  20  20  28  28  28  28  28  28
fileproc.f_fglob     8  10   -   -   -   -   -   -   -   -   -   -
fileproc.fp_glob     -   -  10  10  10  10  10  10  10  10  10  10
vnode.v_name        b8  b8  b8  b8  b8  b8  b8  b8  b8  b8  b8  b8
mount.mnt_data     8f8 8f8 8f8 8f8 8f8 8f8 8f8 8f8 8f8 8f8 8f8 8f8
"""
NEW_TASKS = """
task                     5c0 618 650 678 6a0 670 628 628 628 628 650 680
task.map                  20  28  28  20  28  28  28  28  28  28  28  28
task.tasks                28  30  30  28  30  30  30  30  30  30  30  30
task.bsd_info            380 3a0 3b0 3c0 3c8 3a0   -   -   -   -   -   -
task.bsd_info_ro           -   -   -   -   - 3a8 398 398 398 398 3b8 3d8
thread                   518 520 890 8a0 8b0 798 760 760 750 760 760 760
thread.task              360 300 328 6a8 6a8   -   -   -   -   -   -   -
thread.t_task              -   -   -   -   - 630 610 610 608 618 618 618
thread.t_tro               -   -   -   -   - 638 618 618 610 620 620 620
thread.thread_id         3f8 430 800 810 810 6f8 6d8 6d8 6d8 6e8 6e8 6e8
thread.uthread           3a8 3a8 400 788 788   -   -   -   -   -   -   -
thread_ro                  .   .   .   .   .  60  60  60  60  60  60  60
thread_ro.tro_task         .   .   .   .   .  20  20  20  20  28  28  28
_vm_map.pmap              48  48  48  48  48  40  40  40  40  40  40  40
zone.elem_size            c8  c8   -   -   -   -   -   -   -   -   -   -
zone.z_elem_size           -   -  32  36  36  36  3c  34  34  34  34  34
processor.processor_list 930 430 4a8 4b0 4b0 4b0 4d8 4e0 558 5a0 5a0 5a0
"""
NEW_SOCKETS = """
socket                 3c8 3e8 3d0 3d0 3d8 3c8 3b8 3b8 3c0 3e8 3e8 3e8
socket.last_pid        224 224 214 214 218 218 21c 21c 21c 244 244 244
inpcbinfo.ipi_listhead  40  40  40  40  48  48  48  48  48  48  48  48
inpcb.inp_fport         8c  8c  8c  8c  8c  8c  8c  8c  8c  8c  8c  8c
tcpcb.t_state            c   c   c   c   c   c   c   c   c   c   c   c
unpcb.unp_addr          48  48  48  48  48  48  48  48  48  48  48  48
tty.t_session           d8  d8  d8  d8  d8  d8  d8  d8  d8  d8  d8  d8
"""
APPLE_SILICON = """
proc                  480 480 4f8 590 578 778 788 798 798 798
proc.task              10  10  10  10   -   -   -   -   -   -
proc.p_proc_ro          -   -   -  20  18  18  18  18  18  18
proc.p_pptr            18  18  18  18  10  10  10  10  10  10
proc.p_uid             2c  2c  2c  34  2c  2c  2c  2c  2c  28
proc.p_pid             68  68  68  68  60  60  60  60  60  60
proc.p_pgrp           2c8 2c8 198 190 188 188 198 198 198 198
proc.p_ucred           f0  f0  d8   -   -   -   -   -   -   -
proc.p_flag           12c 12c 1bc 264 25c 454 464 464 464 464
proc.p_comm           290 290 318 3c0 3c0 5b8 5c8 5cc 5cc 5cc
proc.p_start          378 378 3f8 490 488 680 690 6a0 6a0 6a0
session.s_sid          2c  2c  44  44  44  44  44  44  44  44
filedesc.fd_afterlast   -   -  18  18  18  18  18  18  18  18
task                  618 658 680 650 638 638 638 638 660 690
task.map               28  20  28  28  28  28  28  28  28  28
task.tasks             30  28  30  30  30  30  30  30  30  30
task.bsd_info         390 3b0 3c0 398   -   -   -   -   -   -
thread                620 670 690 560 540 540 530 548 548 550
thread.t_tro            -   -   - 3f8 3e0 3e0 3d8 3f0 3f0 3f8
thread.thread_id      598 5e8 5e0 4b0 498 498 498 4b0 4b0 4b8
thread_ro.tro_task      .   .   .  20  20  20  20  28  28  28
_vm_map.pmap           48  48  48  40  40  40  40  40  40  40
pmap.ttep               8   8   8   8   8   8   8   8   8   8
zone.z_chunk_pages      -  30  30  30  40  38  38  38  38  38
processor.cpu_id       4c  54  54  54  54  54  54  54  54  4c
"""
PROC_RO = """
proc_ro              78  80  80  80  80  80  88
proc_ro.pr_task       8   8   8   8   8   8   8
proc_ro.p_orig_ppid   -   -   -   -   -   -  1c
proc_ro.p_csflags    1c  1c  1c  1c  1c  1c  24
proc_ro.p_ucred      20  20  20  20  20  20  28
proc_ro.t_flags_ro    -  78  78  78  78  78  80
"""


def of(arch, versions):
    return tuple(f"{version} {arch}" for version in versions)


TABLES = {
    "old processes": (UP_TO_10_7 + UP_TO_10_13, OLD_PROCESSES),
    "old tasks": (UP_TO_10_7 + UP_TO_10_13, OLD_TASKS),
    "old sockets": (UP_TO_10_7[1:] + UP_TO_10_13, OLD_SOCKETS),
    "new processes": (of("x86_64", SINCE_10_14), NEW_PROCESSES),
    "new tasks": (of("x86_64", SINCE_10_14), NEW_TASKS),
    "new sockets": (of("x86_64", SINCE_10_14), NEW_SOCKETS),
    "apple silicon": (of("arm64", SINCE_11), APPLE_SILICON),
    "proc_ro x86_64": (of("x86_64", SINCE_12), PROC_RO),
    "proc_ro arm64": (of("arm64", SINCE_12), PROC_RO),
}


@pytest.mark.parametrize("name", TABLES)
def test_known_cells(name):
    columns, rows = TABLES[name]
    for row in rows.split("\n")[1:-1]:
        what, *cells = row.split()
        struct, _, member = what.partition(".")
        assert len(cells) == len(columns), row
        for column, cell in zip(columns, cells, strict=True):
            types = layouts.table(column)
            if cell == ".":
                assert not types.has(struct), (column, row)
            elif cell == "-":
                assert types.has(struct), (column, row)
                assert not types.has(struct, member), (column, row)
            else:
                found = types.offset(struct, member) if member else types.size(struct)
                assert found == int(cell, 16), (column, row)


def test_sizes_of_a_kernel_built_from_source():
    """xnu-2422.115.4 compiled by others: the sizes its own CTF gives (bytes)."""
    types = layouts.choose("2422.115.4", "x86_64").table
    sizes = {"proc": 1192, "task": 960, "thread": 1104, "vnode": 240, "cdevsw": 112}
    sizes |= {"inpcb": 488, "mount": 2560, "zone": 288, "ifnet": 1688, "ipc_port": 160}
    assert {tag: types.size(tag) for tag in sizes} == sizes


def test_arm64_as_seen_on_devices():
    types = layouts.table("13.5 arm64")
    assert types.size("proc") == 0x778
    assert types.offset("proc", "p_pid") == 0x60


# ------------------------------------------------------------------------------ round trip


@functools.cache
def inputs(name):
    with gzip.open(real(f"layouts/{name}.json.gz")) as packed:
        return json.load(packed)


def as_written(member):
    """A member as xnu_layouts.json has it."""
    if member.bit_size is None:
        return member.offset
    last = member.bit_offset + member.bit_size - 1
    return [member.offset, f"{member.bit_offset}-{last}" if member.bit_size else "-"]


ADDED = ("sysent", "zone_security_flags")  # from macOS 12 on


def test_every_field_of_the_35_kernels():
    kernels = inputs("xnu_layouts")["kernels"]
    assert len(kernels) == 35
    compared = 0
    for name, kernel in kernels.items():
        types = layouts.table(name_of(name))
        assert types.origin.endswith("kit" if kernel["source"] == "kdk" else "headers")
        if kernel["source"] == "computed":
            # what tools/build_layouts.py has from headers and kits
            more = ADDED if int(name[:2]) >= 12 else ADDED[:1]
            assert types.source._tags == {*kernel["structs"], *more}, name
            assert set(types.structs()) == {*types.source._tags, *fixed(types)}, name
        for tag, known in kernel["structs"].items():
            found = types.struct(tag)
            assert (found.name, found.size) == (tag, known["size"])
            compared += len(known["fields"])
            if kernel["source"] == "computed":
                assert {n: as_written(m) for n, m in found.members.items()} == known["fields"]
            else:  # has only the bytes of bit-fields; the debug kits add the bits, and members
                offsets = {n: found.members[n].offset for n in known["fields"]}
                assert offsets == known["fields"], (name, tag)
    assert compared > 70_000


def fixed(types):
    """Tags of the structures that are the same everywhere."""
    return FixedTypes(types.source.pointer_size).names("tag")


def name_of(name):
    version, arch = name.partition(" (")[0].split()
    return f"{version.split('/')[0].rstrip('+')} {arch}"


def test_every_layout_of_the_debug_kits():
    """Of each distinct layout the first and the last kernel; and which kernel has which."""
    tables = kit_tables()
    assert len(tables) == 131
    for name, arches in inputs("kdk_layouts_10.5-10.13").items():
        if name in build_layouts.LEFT_OUT:
            assert not any(types.has(name) for types in tables.values())
            continue
        for arch, known in arches.items():
            for layout in known:
                expected = {path: (at, kind) for path, at, kind in layout["members"]}
                for kernel in {layout["kernels"][0], layout["kernels"][-1]}:
                    found = tables[kernel, arch].struct(name)
                    assert found.size == layout["size"], (name, kernel)
                    unnamed = {n for n in found.members if n.startswith("__unnamed_")}
                    assert found.members.keys() - unnamed == expected.keys(), (name, kernel)
                    assert all(found.members[n].offset == at for n, (at, _) in expected.items())
                    for member, (_, kind) in expected.items():
                        if kind.startswith("bits"):
                            first, end = map(int, kind[4:].split(":"))
                            bits = first, end - first
                            assert found.members[member][2:] == bits, (name, kernel, member)
            has = {kernel for layout in known for kernel in layout["kernels"]}
            for (kernel, kernel_arch), types in tables.items():
                if kernel_arch == arch:
                    assert types.has(name) == (kernel in has), (name, kernel)


@functools.cache
def kit_tables():
    """(name in kdk_kernels.csv, arch) → the table of that very kernel."""
    with open(real("layouts/kdk_kernels.csv"), newline="") as rows:
        listed = list(csv.DictReader(rows))
    main = {}
    for name, kernel in inputs("xnu_layouts")["kernels"].items():
        main[kernel.get("profile"), name.split()[1]] = name_of(name)
    known = layouts.names()
    tables = {}
    for row in listed:
        plain = f"{row['version']} {row['arch']}"
        built = f"{row['version']}-{row['builds']} {row['arch']}"
        name = main.get((row["name"], row["arch"])) or (built if built in known else plain)
        tables[row["name"], row["arch"]] = layouts.table(name)
    assert len({types.name for types in tables.values()}) == len(tables)
    return tables


@pytest.mark.parametrize(
    ("dump", "name"),
    [
        ("i386-10.5.8", "10.5.8 i386"),
        ("x86_64-10.8.5", "10.8.5-12f45 x86_64"),
        ("x86_64-10.13.6", "10.13.6 x86_64"),
    ],
)
def test_agrees_with_whole_type_descriptions(dump, name):
    """Every named member and every bit-field that the ISF of the same kernel has."""
    with gzip.open(real(f"types/{dump}.types.json.gz")) as packed:
        known = json.load(packed)["user_types"]
    types = layouts.table(name)
    compared = 0
    # those of types/fixed.py have only the members they always had: tests/test_fixed_types.py
    measured = set(types.structs()) - set(FixedTypes(types.source.pointer_size).names("tag"))
    for tag in measured & set(known):
        found = types.struct(tag)
        assert found.size == known[tag]["size"], tag
        for field, about in known[tag]["fields"].items():
            if field.startswith("__unnamed_"):
                continue
            kind = about["type"]
            bits = kind.get("bit_position"), kind.get("bit_length")
            assert found.members[field] == Member(field, about["offset"], *bits), (tag, field)
            compared += 1
    assert compared > 1800


def test_the_resource_is_what_the_script_makes():
    folder = os.path.dirname(real("layouts/kdk_kernels.csv"))
    streams = build_layouts.build(build_layouts.gather(folder))
    resource = Resource(layouts.PATH, layouts.MAGIC)
    assert len(resource._spans) == len(streams)
    for number, stream in enumerate(streams):
        assert resource.stream(number) == stream, f"run `make layouts`: stream {number} is stale"
    again = build_layouts.build(build_layouts.gather(folder))
    assert build_layouts.pack(streams) == build_layouts.pack(again)


# ------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize(
    ("xnu", "arch", "name"),
    [
        ("792.25.20", "i386", "10.4.11 i386"),
        ("1228", "i386", "10.5.0 i386"),
        ("1228.15.4~1", "i386", "10.5.8 i386"),
        ("1504.9.26", "i386", "10.6.6 i386"),
        ("xnu-2050.48.12~1", "x86_64", "10.8.5-12f45 x86_64"),
        ("2422.115.4", "x86_64", "10.9.5 x86_64"),
        ("2782.30.5", "x86_64", "10.10.4 x86_64"),
        ("4570.71.2", "x86_64h", "10.13.6 x86_64"),
        ("7195.50.7~2", "x86_64", "11.0.1 x86_64"),
        ("7195.50.7.100.1", "arm64", "11.0.1 arm64"),
        ("8796.141.3", "arm64e", "13.5 arm64"),
    ],
)
def test_own_release(xnu, arch, name):
    choice = layouts.choose(xnu, arch)
    assert choice.exact
    assert choice.table.name == name
    assert name in choice.how
    assert "exactly this kernel's release" in choice.how
    assert [c.table.name for c in layouts.candidates(xnu, arch)] == [name]


@pytest.mark.parametrize(
    ("xnu", "arch", "name", "why"),
    [
        ("2422.100.9", "x86_64", "10.9.2-13C1021 x86_64", "nearest release below"),
        ("10002.41.9", "arm64", "14.0 arm64", "nearest release below"),
        ("99999.1", "x86_64", "15.5 x86_64", "nearest release below"),
        ("1228.15", "i386", "10.5.7 i386", "nearest release below"),
        ("517.12.7", "i386", "10.4.11 i386", "nearest release above"),
        ("792.obj~1", "x86_64", "10.6 x86_64", "nearest release above"),
        ("4903.221.2", "arm64", "11.0.1 arm64", "nearest release above"),
    ],
)
def test_nearest_release(xnu, arch, name, why):
    choice = layouts.choose(xnu, arch)
    assert not choice.exact
    assert choice.table.name == name
    assert why in choice.how
    assert xnu in choice.how
    assert ("none being below" in choice.how) == ("above" in why)


def test_candidates_are_both_neighbours():
    """12.1, xnu-8019.61.5, has proc_ro already: what lies below does not fit, what is above may."""
    below, above = layouts.candidates("8019.61.5", "arm64")
    assert (below.table.name, above.table.name) == ("12.0.1 arm64", "12.5 arm64")
    assert "nearest release above" in above.how
    assert below == layouts.choose("8019.61.5", "arm64")


def test_releases_of_one_os_version_differ():
    """struct pmap changed twice in security updates of 10.11.6 and once in those of 10.12.6."""
    el_capitan = [layouts.choose(x, "x86_64") for x in ("3248.60.10", "3248.70.3", "3248.73.8")]
    sierra = [layouts.choose(x, "x86_64") for x in ("3789.70.16", "3789.73.11")]
    for choices in (el_capitan, sierra):
        assert len({choice.table.name.partition("-")[0].split()[0] for choice in choices}) == 1
        layouts_of_pmap = {str(choice.table.struct("pmap").members) for choice in choices}
        assert len(layouts_of_pmap) == len(choices)


def test_no_layout():
    with pytest.raises(NotFoundError, match=r"layout for ppc not found; .*i386, x86_64, arm64"):
        layouts.choose("792.25.20", "ppc")
    with pytest.raises(NotFoundError, match="layout for an unknown xnu release on arm64"):
        layouts.choose(None, "arm64")
    for junk in ("", "upstream", "~1", "9" * 5000, "²"):
        with pytest.raises(NotFoundError, match="layout for xnu release"):
            layouts.choose(junk, "x86_64")
    with pytest.raises(NotFoundError) as missing:
        layouts.table("10.9.2 x86_64")
    assert missing.value.near[:2] == ("10.9.2-13c64 x86_64", "10.9.2-13C1021 x86_64")


def test_names():
    names = layouts.names()
    assert len(names) == len(set(names)) == 154
    assert [name.split()[1] for name in names] == sorted(
        (name.split()[1] for name in names), key=["i386", "x86_64", "arm64"].index
    )
    assert all(layouts.table(name).name == name for name in names)


# ------------------------------------------------------------------------------ banners


@pytest.mark.parametrize(
    ("version", "built", "expected"),
    [
        (
            "Darwin Kernel Version 12.5.0: Sun Sep 29 13:33:47 PDT 2013",
            "root:xnu-2050.48.12~1/RELEASE_X86_64",
            ("2050.48.12", "RELEASE_X86_64", "x86_64", "12.5.0"),
        ),
        (
            "Darwin Kernel Version 13.4.0: Thu Jan  1 00:00:00 UTC 2015",
            "admin:xnu-2422.115.4/BUILD/obj/RELEASE_X86_64\0\0garbage",
            ("2422.115.4", "RELEASE_X86_64", "x86_64", "13.4.0"),
        ),
        (
            "Darwin Kernel Version 18.2.0: Wed Dec 19 20:28:53 PST 2018",
            "Proteas:xnu-4903.221.2/BUILD/obj/DEBUG_ARM64_BCM2837",
            ("4903.221.2", "DEBUG_ARM64_BCM2837", "arm64", "18.2.0"),
        ),
        (
            "Darwin Kernel Version 20.1.0: Sat Oct 31 00:07:10 PDT 2020",
            "root:xnu-7195.50.7~2/RELEASE_ARM64_T8101 arm64",
            ("7195.50.7", "RELEASE_ARM64_T8101", "arm64", "20.1.0"),
        ),
        (
            "Darwin Kernel Version 9.8.0: Wed Jul 15 16:55:01 PDT 2009",
            "root:xnu-1228.15.4~1/RELEASE_I386\n",
            ("1228.15.4", "RELEASE_I386", "i386", "9.8.0"),
        ),
        (
            "Darwin Kernel Version 8.0.0: Sat Mar 26 14:15:22 PST 2005",
            "root:xnu-792.obj~1/RELEASE_PPC",
            ("792", "RELEASE_PPC", "ppc", "8.0.0"),
        ),
        (
            "Darwin Kernel Version 7.9.0:\nWed Mar 30 20:11:17 PST 2005",
            "root:xnu/xnu-517.12.7.obj~1/RELEASE_PPC",
            ("517.12.7", "RELEASE_PPC", "ppc", "7.9.0"),
        ),
        (
            "@(#)VERSION: Darwin Kernel Version 14.0.0: Wed Aug 13 20:16:34 PDT 2014",
            "root:xnu-2783.1.72~11/RELEASE_ARM_S5L8950X",
            ("2783.1.72", "RELEASE_ARM_S5L8950X", "arm", "14.0.0"),
        ),
    ],
)
def test_banner(version, built, expected):
    assert layouts.parse_banner(f"{version}; {built}") == layouts.Banner(*expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Linux version 6.1.0",
        "Darwin Kernel Version",
        "Darwin Kernel Version 13.4.0: Thu Jan  1 00:00:00 UTC 2015; ",
        "Darwin Kernel Version 13.4.0: Thu Jan  1 00:00:00 UTC 2015; root:xnu-2422.115.4~1",
        "Darwin Kernel Version 13.4.0: Thu Jan  1 00:00:00 UTC 2015; root:xnu-2422.115.4~1/RELEA",
        "Darwin Kernel Version 13.4.0: Thu Jan  1 00:00:00 UTC 2015; root:xnu-/RELEASE_X86_64",
        "Darwin Kernel Version 13.4.0: ;\0; root:xnu-2422.115.4~1/RELEASE_X86_64",
    ],
)
def test_no_banner(text):
    assert layouts.parse_banner(text) is None


def test_cut_off_banner():
    banner = "Darwin Kernel Version 9.8.0: Wed Jul 15; root:xnu-1228.15.4~1/RELEASE_I386"
    assert layouts.parse_banner(banner)
    assert all(layouts.parse_banner(banner[:end]) is None for end in range(len(banner)))


# ------------------------------------------------------------------------------ the table


def test_table_and_struct():
    types = layouts.table("10.9.5 x86_64")
    proc = types.struct("proc")
    assert proc.name == "proc"
    assert proc.members["p_list.le_prev"] == Member("p_list.le_prev", 8, None, None)
    assert list(proc.members.values()) == sorted(
        proc.members.values(), key=lambda member: (member.offset, member.bit_offset or 0)
    )
    assert types.struct("proc") is proc
    assert types.has("proc")
    assert types.has("proc", "p_pid")
    assert not types.has("proc", "p_proc_ro")
    assert not types.has("proc_ro")
    assert not types.has("proc_ro", "pr_proc")
    assert {"proc", "_vm_map", "sysent", "sockaddr_in", "lowglo"} <= set(types.structs())


def test_bit_fields():
    """vm_page.wire_count is the low 16 bits of its word in every kernel that has one."""
    assert layouts.table("10.5.8 i386").struct("vm_page").members["wire_count"][1:] == (32, 0, 16)
    busy = layouts.table("15.5 arm64").struct("vm_page").members["vmp_busy"]
    assert (busy.bit_offset, busy.bit_size) == (0, 1)
    unnamed = layouts.table("10.4.11 i386").struct("vm_page").members["int"]
    assert (unnamed.bit_offset, unnamed.bit_size) == (0, 0)


def test_typedef_names():
    types = layouts.table("10.9.5 x86_64")
    assert types.struct("vm_map") is types.struct("_vm_map")
    assert types.size("OSKextLoadedKextSummary") == types.size("_loaded_kext_summary")
    assert types.has("OSKextLoadedKextSummaryHeader", "numSummaries")
    assert "vm_map" not in types.structs()
    assert not layouts.table("10.4.11 i386").has("vm_map")


def test_near_misses():
    types = layouts.table("13.5 arm64")
    with pytest.raises(NotFoundError) as missing:
        types.struct("prco")
    assert (missing.value.kind, missing.value.name) == ("structure", "prco")
    assert "proc" in missing.value.near
    with pytest.raises(NotFoundError) as missing:
        types.offset("proc", "fd_ofiles")
    assert (missing.value.kind, missing.value.name) == ("member", "proc.fd_ofiles")
    assert missing.value.near[0] == "proc.p_fd.fd_ofiles"
    assert "13.5 arm64" in str(missing.value)


def test_structs_are_decoded_when_asked_for():
    asked = []

    def load(tag):
        asked.append(tag)
        return Struct(tag, 8, {"a": Member("a", 4)})

    source = LayoutTypes("made up", "test", ["b", "c"], load, {"b_t": "b"})
    types = TypeTable(source, source.flat)
    assert types.structs() == sorted(["b", "c", *fixed(types)])
    assert asked == []
    assert (types.offset("b_t", "a"), types.offset("b", "a"), types.size("b_t")) == (4, 4, 8)
    assert asked == ["b"]


# ------------------------------------------------------------------------------ cost, damage


def test_size_of_the_resource():
    assert os.path.getsize(layouts.PATH) <= 150_000


IMPORTS = """
import sys
from kvmtool.types import layouts
types = layouts.choose("4570.71.2", "x86_64").table
assert types.offset("proc", "p_pid") == 0x10
print(*sys.modules)
"""


def test_imports_little():
    command = [sys.executable, "-S", "-c", IMPORTS]  # -S: only what we import ourselves
    run = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    unwanted = {"json", "lzma", "difflib", "pathlib", "dataclasses", "logging", "argparse"}
    assert not unwanted.intersection(run.stdout.split())


def test_damaged_resource(tmp_path):
    with open(layouts.PATH, "rb") as resource:
        good = resource.read()
    path = str(tmp_path / "layouts.bin")
    for content, message in [
        (b"something else", "expected b'KVMLAYT1', got"),
        (good[:10], "at offset 0x8: .* reinstall"),
        (good[:40], "at offset 0x8: .* reinstall"),
        (good[:2000], "stream 0 is damaged"),
        (good[:-100], "stream .* is damaged"),
    ]:
        with open(path, "wb") as out:
            out.write(content)
        with pytest.raises(FormatError, match=message):
            database = layouts._Database(path)
            database._resource.stream(len(database.tags))
