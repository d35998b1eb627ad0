"""Built crashes, read by others: llvm's tools, and a few lines of struct.

No line of kvmtool but the layouts' numbers takes part; builder and test both ask for those.
"""

from __future__ import annotations

import itertools
import re
import struct
import uuid

import pytest

from kvmtool.types import layouts
from tests.builders import macho
from tests.builders.llvm import run
from tests.builders.macho import thread_state
from tests.builders.reader import Reader
from tests.builders.xnu import CoreShape, KextSpec, ProcSpec, build, has_kaslr

BANNER = "Darwin Kernel Version 13.4.0: Sun Aug 17 19:50:11 PDT 2014; root:xnu-1.2.3~4/RELEASE_{}"
UUID = bytes(range(16))
KEXTS = {"i386": 0x3A000000, "x86_64": 0xFFFFFF7F81000000, "arm64": 0xFFFFFE0010000000}
SPECS = [
    ProcSpec(1, "launchd", ppid=0, threads=(1, 1)),
    ProcSpec(56, "WindowServer", uid=88, gid=88, groups=(88, 61), threads=(1, 4, 9)),
    ProcSpec(70, "login", ruid=501, rgid=20, tty=(16, 3), login="amit"),
    ProcSpec(71, "bash", 70, sid=70, uid=501, gid=20, tty=(16, 3), login="amit", nice=-5),
    ProcSpec(327, "vim", 71, sid=70, uid=501, gid=20, tty=(16, 3), login="amit", stat=4),
    ProcSpec(328, "a very long command name", 71, uid=501, gid=20, start=(1_400_000_000, 654_321)),
    ProcSpec(99_999, "defunct", 71, pgid=71, sid=70, uid=501, gid=20, xstat=0x200, zombie=True),
]


def crash(name: str, **more):
    """A built crash for the layout of that name, slid where kernels of its time were."""
    arch = name.rpartition(" ")[2]
    layout = layouts.table(name)
    facts = {"banner": BANNER.format(arch.upper()), "uuid": UUID}
    facts["slide"] = 0xA00000 if has_kaslr(layout) else 0
    kexts = [
        KextSpec("com.example.first", KEXTS[arch], 0x8000, "2.8", bytes([7]) * 16),
        KextSpec(
            "com.example.second", KEXTS[arch] + 0x8000, 0x4000, references=("com.example.first",)
        ),
    ]
    facts["kexts"] = kexts
    return build(layout, arch, more.pop("procs", SPECS), **facts | more)


def reader(built, core: bytes | None = None) -> Reader:
    return Reader(built.core if core is None else core, built.symbols, built.slide)


def test_kernel_reads_back_in_llvm(tmp_path):
    """The headers and symbols of a built kernel, as llvm prints them."""
    built = crash("10.9.5 x86_64")
    path = tmp_path / "mach_kernel"
    path.write_bytes(built.kernel)
    headers = run("llvm-objdump", "--macho", "--private-headers", str(path))
    assert "EXECUTE" in headers
    names = re.findall(r"cmd LC_SEGMENT_64\n.*\n  segname (\S+)", headers)
    assert names == ["__TEXT", "__DATA", "__KLD", "__HIB", "__LINKEDIT"]
    assert str(uuid.UUID(bytes=UUID)).upper() in headers
    found = {}
    for line in run("llvm-nm", str(path)).splitlines():
        address, _, name = line.split()
        found[name] = int(address, 16)
    assert found == built.symbols
    assert found["__mh_execute_header"] == 0xFFFFFF8000200000


def test_core_reads_back_in_llvm(tmp_path):
    """Segments and registers of a built core, as llvm prints them."""
    built = crash("10.9.5 x86_64")
    path = tmp_path / "core"
    path.write_bytes(built.core)
    headers = run("llvm-objdump", "--macho", "--private-headers", str(path))
    starts = [int(a, 16) for a in re.findall(r"^   vmaddr (0x\w+)", headers, re.MULTILINE)]
    assert starts == [address for address, _ in built.runs()]
    assert f"rip 0x{built.address('_Debugger'):016x}" in headers


@pytest.mark.parametrize("name", layouts.names())
def test_processes_are_where_the_layout_says(name):
    """allproc, zombproc, tasks, threads, pid hash and credentials, read with struct alone."""
    built = crash(name)
    core, layout = reader(built), layouts.table(name)

    def at(tag: str, member: str) -> int:
        return layout.offset(tag, member)

    link, pid_at = at("proc", "p_list"), at("proc", "p_pid")
    found = core.chain(core.symbol("_allproc"), link)
    assert [core.number(p + pid_at) for p in found] == [328, 327, 71, 70, 56, 1, 0]
    zombies = core.chain(core.symbol("_zombproc"), link)
    assert [core.number(p + pid_at) for p in zombies] == [99_999]
    assert core.pointer(core.symbol("_kernproc")) == found[-1]
    assert core.pointer(core.symbol("_initproc")) == found[-2]
    assert core.number(core.symbol("_nprocs")) == 8
    for proc in found + zombies:
        truth = built.process(core.number(proc + pid_at))
        assert truth["address"] == proc
        assert core.text(proc + at("proc", "p_comm")) == truth["comm"]
        parent = core.pointer(proc + at("proc", "p_pptr"))
        assert core.number(parent + pid_at) == truth["ppid"]
        _group(core, at, proc, truth)
        _credentials(core, layout, proc, truth)
        _start(core, layout, proc, truth)
        _task(core, layout, proc, truth)
    _queues(core, layout, built)
    assert _hashed(core, layout) == built.truth["pidhash"]


def _group(core, at, proc, truth):
    pgrp = core.pointer(proc + at("proc", "p_pgrp"))
    assert core.number(pgrp + at("pgrp", "pg_id")) == truth["pgid"]
    members = core.chain(pgrp + at("pgrp", "pg_members"), at("proc", "p_pglist"))
    assert proc in members
    session = core.pointer(pgrp + at("pgrp", "pg_session"))
    assert core.number(session + at("session", "s_sid")) == truth["sid"]
    assert core.text(session + at("session", "s_login")) == truth["login"]
    tty = core.pointer(session + at("session", "s_ttyp"))
    assert bool(tty) == (truth["sid"] == 70)
    if truth["flag"] & 0x2:  # P_CONTROLT
        major, minor = truth["tty"]
        assert core.number(tty + at("tty", "t_dev")) == major << 24 | minor


def _credentials(core, layout, proc, truth):
    if layout.has("proc", "p_ucred"):
        ucred = core.pointer(proc + layout.offset("proc", "p_ucred"))
    else:
        read_only = core.pointer(proc + layout.offset("proc", "p_proc_ro"))
        assert core.pointer(read_only) == proc
        ucred = core.pointer(read_only + layout.offset("proc_ro", "p_ucred"))
    assert ucred == truth["ucred"]
    base, tag = ucred, "ucred"
    if layout.has("ucred", "cr_posix"):
        base, tag = ucred + layout.offset("ucred", "cr_posix"), "posix_cred"
    for member, field in (("cr_uid", "uid"), ("cr_ruid", "ruid"), ("cr_svgid", "svgid")):
        assert core.number(base + layout.offset(tag, member)) == truth[field]
    count = core.number(base + layout.offset(tag, "cr_ngroups"), 2)
    groups = base + layout.offset(tag, "cr_groups")
    assert [core.number(groups + 4 * n) for n in range(count)] == truth["groups"]
    if layout.has("proc", "p_ruid"):
        assert core.number(proc + layout.offset("proc", "p_ruid")) == truth["ruid"]


def _start(core, layout, proc, truth):
    if layout.has("proc", "p_start"):
        place = proc + layout.offset("proc", "p_start")
    elif truth["zombie"]:
        assert truth["start"] is None
        assert core.raw(proc + layout.offset("proc", "p_stats")) == 0
        return
    else:
        stats = core.pointer(proc + layout.offset("proc", "p_stats"))
        place = stats + layout.offset("pstats", "p_start")
    found = (core.number(place, core.width), core.number(place + core.width))
    assert found == truth["start"]


def _task(core, layout, proc, truth):
    if layout.has("proc", "task"):
        task = core.pointer(proc + layout.offset("proc", "task"))
    else:
        task = proc + core.raw(core.symbol("_proc_struct_size"))
        flags = core.number(task + layout.offset("task", "t_flags"))
        assert bool(flags & 0x00800000) != truth["zombie"]
        task = 0 if truth["zombie"] else task
    assert (task or None) == truth["task"]
    if not task:
        return
    if layout.has("task", "bsd_info"):
        assert core.pointer(task + layout.offset("task", "bsd_info")) == proc
    head = task + layout.offset("task", "threads")
    threads = core.chain(head, layout.offset("thread", "task_threads"), head)
    state = layout.offset("thread", "state")
    assert [(t, core.number(t + state)) for t in threads] == truth["threads"]
    for thread in threads:
        if layout.has("thread", "task"):
            assert core.pointer(thread + layout.offset("thread", "task")) == task
        else:
            read_only = core.pointer(thread + layout.offset("thread", "t_tro"))
            assert core.pointer(read_only + layout.offset("thread_ro", "tro_task")) == task
            assert core.pointer(read_only + layout.offset("thread_ro", "tro_proc")) == proc


def _queues(core, layout, built):
    if layout.has("task", "pset_tasks"):
        head = core.symbol("_default_pset") + 0x464  # 10.4; xnu 792.25.20's pset.tasks
        link = layout.offset("task", "pset_tasks")
    else:
        head = core.symbol("_tasks")
        link = layout.offset("task", "tasks")
    tasks = core.chain(head, link, head)
    assert tasks == [p["task"] for p in built.truth["processes"] if not p["zombie"]]
    assert core.pointer(core.symbol("_kernel_task")) == tasks[0]
    assert core.pointer(head + core.width) == tasks[-1]


def _hashed(core, layout):
    link = layout.offset("proc", "p_hash")
    if layout.has("proc", "p_hash.next"):
        array = core.raw(core.symbol("_pid_hash"))
        size = 1 << (64 - (array >> 48 & 0xFF))
        heads, back = array | 0xFF << 48, link
        assert core.number(core.symbol("_pid_hash") + 8) == 7
    else:
        heads, back = core.raw(core.symbol("_pidhashtbl")), 0
        size = core.raw(core.symbol("_pidhash")) + 1
    pids = []
    for bucket in range(size):
        for place in core.chain(heads + bucket * core.width, link - back):
            pids.append(core.number(place - back + layout.offset("proc", "p_pid")))
            if not back:
                assert pids[-1] % size == bucket
    return sorted(pids)


@pytest.mark.parametrize("name", ["12.0.1 arm64", "15.5 arm64"])
def test_pointers_are_signed_on_arm64(name):
    """What those kernels sign is signed: other bits than the address's, bit 55 untouched."""
    built = crash(name)
    core, layout = reader(built), layouts.table(name)
    proc = built.process(71)["address"]
    for member in ("p_pptr", "p_pgrp"):
        place = proc + layout.offset("proc", member)
        assert core.raw(place) != core.pointer(place)
        assert core.raw(place) >> 55 & 1
    read = core.symbol("_cdevsw") + 3 * 0x70 + 0x10
    assert core.raw(read) != core.pointer(read) == built.address("_mmread")


@pytest.mark.parametrize("name", ["10.4.11 i386", "10.6.8 x86_64", "10.9.5 x86_64", "13.5 arm64"])
def test_statics(name):
    """Banner, versions, load, cdevsw, message buffer, host name, kexts, low globals."""
    built = crash(name, loadavg=(1, 2, 3), msgbuf="hello")
    core, layout = reader(built), layouts.table(name)
    wide = core.width == 8
    banner = built.truth["banner"].encode()
    assert core.read(core.symbol("_version"), len(banner) + 1) == banner + b"\0"
    assert core.number(core.symbol("_version_major")) == 13
    assert core.number(core.symbol("_version_minor")) == 4
    load = core.read(core.symbol("_averunnable"), 24 if wide else 16)
    assert struct.unpack("<3I4xQ" if wide else "<4I", load) == (1, 2, 3, 2048)
    size = layout.size("cdevsw")
    assert size == (0x70 if wide else 0x38)
    slot = core.symbol("_cdevsw") + 3 * size + 2 * core.width
    assert core.pointer(slot) == built.address("_mmread")
    assert core.number(core.symbol("_nchrdev")) == len(built.truth["cdevsw"])
    assert core.text(core.symbol("_hostname")) == "built.local"
    buffer = core.pointer(core.symbol("_msgbufp"))
    assert core.number(buffer) == 0x063061
    text = buffer + layout.offset("msgbuf", "msg_bufc")
    assert core.text(core.pointer(text) if layout.has("msgbuf", "msg_size") else text) == "hello"
    kmods = core.chain(core.symbol("_kmod"), 0)
    names = [core.text(k + layout.offset("kmod_info", "name")) for k in kmods]
    assert names == ["com.example.seco", "com.example.firs"]
    if layout.has("_loaded_kext_summary_header"):
        header = core.pointer(core.symbol("_gLoadedKextSummaries"))
        stride, count = core.number(header + 4), core.number(header + 8)
        assert (stride, count) == (0x88 if "arm64" in name else 0x78, 2)
        assert core.number(header + 16 + 0x50, 8) == built.truth["kexts"][0]["address"]
        assert core.number(header + 16 + 0x60, 8) == 208009000  # "2.8"


def test_low_globals():
    """The page of each architecture, at its symbol and at its alias."""
    for name, alias, eyecatcher, version_at in (
        ("10.4.11 i386", 0x2000, b"Catfish ", 0x1C),
        ("10.9.5 x86_64", None, b"Catfish ", 0x30),
        ("15.5 arm64", 0xFFFFFE0000004000, b"Kraken  ", 0x18),
    ):
        built = crash(name)
        core = reader(built)
        page = core.symbol("_lowGlo")
        assert page % 0x1000 == 0
        assert core.read(page, 8) == eyecatcher
        assert core.raw(page + version_at) == core.symbol("_version")
        if core.width == 8:
            assert core.raw(page + 0x10) == core.symbol("__mh_execute_header")
        if alias is not None:
            assert core.read(alias, 0x1000) == core.read(page, 0x1000)


def test_kernel_header_in_memory_is_slid():
    """The header in the core: same UUID, segments slide bytes higher, a __KLD among them."""
    built = crash("10.9.5 x86_64")
    core = reader(built)
    header = core.read(built.address("__mh_execute_header"), 0x1000)
    assert header[:4] == built.kernel[:4]
    assert UUID in header
    names = [header[at + 8 : at + 24].rstrip(b"\0") for at in _segments_at(header)]
    assert b"__KLD" in names
    for at in _segments_at(header):
        (here,) = struct.unpack_from("<Q", header, at + 24)
        (there,) = struct.unpack_from("<Q", built.kernel, at + 24)
        assert here == there + 0xA00000


def _segments_at(header: bytes) -> list[int]:
    found, at = [], 32
    for _ in range(struct.unpack_from("<I", header, 16)[0]):
        cmd, size = struct.unpack_from("<2I", header, at)
        if cmd == macho.LC_SEGMENT_64:
            found.append(at)
        at += size
    return found


def test_linkedit_in_memory():
    """keep_linkedit: the symbol table of the file lies at __LINKEDIT in the core."""
    built = crash("10.9.5 x86_64", keep_linkedit=True)
    at = _segments_at(built.kernel)[-1]
    vmaddr, _, fileoff, filesize = struct.unpack_from("<4Q", built.kernel, at + 24)
    tables = built.kernel[fileoff : fileoff + filesize]
    assert b"\0_allproc\0" in tables
    assert reader(built).read(vmaddr + built.slide, filesize) == tables


def test_notes_and_ident():
    """The facts a core may state about its kernel, with their published layouts."""
    names = ("main bin spec", "kern ver str", "addrable bits")
    built = crash("13.5 arm64", core=CoreShape(notes=names, ident=True, cpus=3))
    core = reader(built)
    notes = {}
    for cmd, body in core.commands:
        if cmd == macho.LC_NOTE:
            owner, offset, size = struct.unpack("<16s2Q", body)
            notes[owner.rstrip(b"\0").decode()] = built.core[offset : offset + size]
    version, kind, address, owner_uuid = struct.unpack_from("<2IQ16s", notes["main bin spec"])
    assert (version, kind, owner_uuid) == (1, 1, UUID)
    assert address == built.address("__mh_execute_header")
    text = notes["kern ver str"][4:].rstrip(b"\0").decode()
    shown = str(uuid.UUID(bytes=UUID)).upper()
    assert text == f"{built.truth['banner']}; UUID={shown}; stext={address:#x}"
    assert struct.unpack("<2IQ", notes["addrable bits"]) == (3, 47, 0)
    (ident,) = [body for cmd, body in core.commands if cmd == macho.LC_IDENT]
    assert ident == notes["kern ver str"][4:]
    assert sum(cmd == macho.LC_THREAD for cmd, _ in core.commands) == 3
    second = built.dump(CoreShape(notes=("main bin spec v2",)))
    (body,) = [body for cmd, body in reader(built, second).commands if cmd == macho.LC_NOTE]
    offset = struct.unpack_from("<Q", body, 16)[0]
    assert struct.unpack_from("<2I2Q", second, offset)[3] == built.slide


def test_shapes_hold_the_same_memory():
    """Unsorted, overlapping and overstated cores read as the plain one, first match wins."""
    built = crash("10.4.11 i386")
    plain = reader(built)
    traps = CoreShape(overlap=True, past_end=True, extra_ncmds=5)
    for shape in (CoreShape(unsorted=True), CoreShape(thread_first=True), traps):
        core = reader(built, built.dump(shape))
        for address, content in built.runs(1):
            assert core.read(address, len(content)) == content == plain.read(address, len(content))
    starts = [
        segment[0] for segment in reader(built, built.dump(CoreShape(unsorted=True))).segments
    ]
    assert starts != sorted(starts)
    core = reader(built, built.dump(traps))
    assert core.ncmds == len(core.commands) + 5
    assert core.commands[-1][0] == macho.LC_THREAD
    spans = sorted((segment[0], segment[0] + segment[1]) for segment in core.segments)
    assert any(after[0] < before[1] for before, after in itertools.pairwise(spans))
    assert core.segments[-1][2] > len(core.core)


def test_damage():
    """A page left out is in no segment; a cycle leads back; the built crash stays as it was."""
    built = crash("10.9.5 x86_64")
    place = built.process(71)["address"]
    torn = reader(built, built.dump(without=[place]))
    with pytest.raises(LookupError):
        torn.read(place, 1)
    assert torn.read(built.process(0)["address"], 1)
    assert len(torn.core) == len(built.core) - 0x1000
    ring = reader(built, built.cyclic(70, 328))
    link = layouts.table("10.9.5 x86_64").offset("proc", "p_list")
    assert ring.pointer(built.process(70)["address"] + link) == built.process(328)["address"]
    assert built.dump() == built.core


def test_specs_that_make_no_sense_are_refused():
    """A test that asks for the impossible must not get a silent something."""
    for procs in (
        [ProcSpec(1, "launchd", ppid=0), ProcSpec(1, "again", ppid=0)],
        [ProcSpec(2, "orphan", ppid=77)],
        [ProcSpec(1, "launchd", ppid=0, gid=3, groups=(1, 3))],
    ):
        with pytest.raises(ValueError):
            crash("10.9.5 x86_64", procs=procs)
    with pytest.raises(ValueError):
        crash("10.9.5 x86_64", slide=0x123)
    with pytest.raises(ValueError):
        thread_state("i386", rip=1)
