"""Threads: against what an independent reader saw of a machine that ran, what was planted in
dumps, and every layout of the database.
"""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kvmtool import kvm
from kvmtool.cli import cli
from kvmtool.errors import NotFoundError
from kvmtool.types import layouts
from kvmtool.types.flatten import Struct
from kvmtool.types.model import TypeTable
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report
from kvmtool.xnu.thread import _fields, threads
from tests.builders.running import Running, symbols
from tests.builders.specs import TH_WAIT
from tests.builders.xnu import has_kaslr
from tests.inputs import DUMPS, oracle, plain_core, real, truth
from tests.test_builders_xnu import crash

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
CORES = {"live": "machine/live.elfcore", "crash": "machine/crash.kdp-core"}


def said(*args, status=0):
    found = CliRunner().invoke(cli, ["threads", *args])
    assert found.exit_code == status, found.output
    return found


def rows(*args, status=0):
    return json.loads(said(*args, "--format", "json", status=status).stdout)


@pytest.mark.parametrize("machine", CORES)
def test_every_thread_of_a_machine_that_ran(machine):
    seen = oracle(machine)["threads"]
    found = {row["address"]: row for row in rows("-N", real(KERNEL), "-M", real(CORES[machine]))}
    assert len(found) == len(seen) == 39
    for true in seen:
        row = found[true["addr"]]
        assert row["tid"] == true["thread_id"]
        assert row["task"] == true["task"]
        assert row["th_state"] == true["state"]
        assert row["pri"] == true["sched_pri"]
        assert row["kernel_stack"] == true["kernel_stack"]
        assert (row["wait_event"] or {"address": "0x0"})["address"] == true["wait_event"]
        assert (row["continuation"] or {"name": None})["name"] == true["continuation"]


@pytest.mark.parametrize("machine", CORES)
def test_owners_and_cpu_of_a_machine_that_ran(machine):
    true = oracle(machine)
    owners = {task["addr"]: task["bsd_info"] for task in true["tasks"]}
    pids = {proc["task"]: proc["p_pid"] for proc in true["procs"]}
    found = rows("-N", real(KERNEL), "-M", real(CORES[machine]))
    for row in found:
        assert row["pid"] == pids[row["task"]]
        assert row["task"] in owners
    (on_cpu,) = [row for row in found if row["cpu"] is not None]
    assert on_cpu["address"] == true["cpu"]["active_thread"]
    assert on_cpu["cpu"] == true["cpu"]["cpu_number"]


def test_what_threads_wait_for_by_name():
    found = rows("-N", real(KERNEL), "-M", real(CORES["live"]))
    waits = {row["tid"]: row["wait_event"] and row["wait_event"]["name"] for row in found}
    assert waits[1] == "_vm_page_free_wanted"  # vm_pageout_continue() asserts it: vm_pageout.c
    assert {row["tid"]: row["wmesg"] for row in found}[24] == "pf_purge"  # bsd/net/pf.c
    shell = next(row for row in found if row["command"] == "sh")
    assert shell["wmesg"] == "wait"  # bsd/kern/kern_exit.c, wait4_nocancel


def test_one_process_only_and_one_that_is_not_there():
    where = ("-N", real(KERNEL), "-M", real(CORES["live"]))
    assert {row["pid"] for row in rows("3", *where)} == {3}
    assert len(rows("3", *where)) == 3
    missing = said("77", *where, status=1)
    assert "process 77 not found" in missing.stderr


@pytest.mark.parametrize("dump", DUMPS)
def test_threads_are_those_planted(dump):
    found = rows("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    ours: dict[int, list[int]] = {}
    for row in found:
        ours.setdefault(row["pid"], []).append(int(row["address"], 16))
    planted = {p["pid"]: p["threads"] for p in truth(dump)["processes"] if p.get("threads")}
    assert ours == planted


# every layout

HZ = 24_000_000
TICKS = 123_456_789_012


def fitted(name):
    """A built crash of that layout whose threads of process 71 hold something of everything."""
    layout = layouts.table(name)
    slide = 0xA00000 if has_kaslr(layout) else 0
    arch = name.rpartition(" ")[2]
    built = crash(name, functions=["_goes_on"], more_symbols=symbols(arch, slide))
    running = Running(built, layout)
    running.clock(HZ)
    (first, _), *_ = built.process(71)["threads"]
    put = {"continuation": built.address("_goes_on"), "kernel_stack": running.text("stack")}
    for member, value in put.items():
        running.put("thread", first, member, value)
    for member, value in (("suspend_count", 3), ("options", 0x82)):
        running.memory.write(first + layout.offset("thread", member), bytes([value]))
    active = layout.struct("thread").members["active"]
    running.memory.write(first + active.offset, bytes([1 << (active.bit_offset or 0)]))
    uthread = running.uthread(first)
    for member, text in (("pth_name", "a name"), ("uu_wmesg", "wait")):
        if layout.has("uthread", member):
            running.put("uthread", uthread, member, running.text(text))
    running.timer(first, "user_timer", TICKS)
    running.timer(first, "system_timer", 2 * TICKS)
    others = [thread for process in (1, 56) for thread, _ in built.process(process)["threads"]]
    running.processors([others[0], first, others[1]])
    return built, layout, first, put


def opened(tmp_path, built, name, core=None):
    kernel, dump = tmp_path / "kernel", tmp_path / "core"
    kernel.write_bytes(built.kernel)
    dump.write_bytes(core or built.dump())
    return kvm.open(str(kernel), str(dump), layout=name)


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout(name, tmp_path):
    built, layout, first, put = fitted(name)
    report = Report()
    with opened(tmp_path, built, name) as handle:
        found = list(threads(handle.verified_target(), report))
    assert report.stops == report.notes == []
    planted = {
        thread: (process, state)
        for process in built.truth["processes"]
        for thread, state in process["threads"]
    }
    assert [thread.address for thread in found] == list(planted)
    for number, thread in enumerate(found, 1):
        process, state = planted[thread.address]
        assert thread.pid == process["pid"]
        assert thread.command == (process["name"] or process["comm"])
        assert thread.task == process["task"]
        assert thread.state == state
        assert thread.tid == (number if layout.has("thread", "thread_id") else None)
        assert thread.sched_pri == thread.base_pri == (31 if process["pid"] else 81)
        assert (thread.wait_event != 0) == bool(state & TH_WAIT)
    one = next(thread for thread in found if thread.address == first)
    assert {field: getattr(one, field) for field in put} == put
    assert (one.suspend_count, one.options, one.active) == (3, 0x82, True)
    assert one.cpu == 1
    assert sorted(t.cpu for t in found if t.running) == [0, 1, 2]
    assert one.name == ("a name" if layout.has("uthread", "pth_name") else None)
    assert one.wmesg == ("wait" if layout.has("uthread", "uu_wmesg") else None)
    scale = 1_000_000_000 if built.arch != "arm64" else None
    user = TICKS if scale else TICKS * 1_000_000_000 // HZ
    if layout.has("thread", "user_timer"):
        assert one.user_time == user
        assert one.system_time in (2 * user, 2 * user + 1)
    else:
        assert one.user_time is one.system_time is None


ERAS = ("10.4.11 i386", "10.6.8 x86_64", "10.13.6 x86_64", "12.5 arm64", "15.5 arm64")


@pytest.mark.parametrize("name", ERAS)
def test_a_torn_queue_is_told_and_the_list_of_all_threads_gives_the_rest(name, tmp_path):
    built = crash(name)
    layout = layouts.table(name)
    mine = [thread for thread, _ in built.process(56)["threads"]]
    link = mine[0] + layout.offset("thread", "task_threads")
    wild = (0x12345678).to_bytes(built.memory.width, "little")
    report = Report()
    with built.patched(link, wild), opened(tmp_path, built, name, built.dump()) as handle:
        found = list(threads(handle.verified_target(), report))
    assert len(report.stops) == 1
    assert f"{built.process(56)['task']:#x}" in report.stops[0]
    assert report.partial
    assert report.notes == []
    true = [t for p in built.truth["processes"] for t, _ in p["threads"]]
    known = [thread.address for thread in found if isinstance(thread.pid, int)]
    assert sorted(set(known)) == sorted(true)


@pytest.mark.parametrize("name", ERAS)
def test_a_thread_that_no_task_knows_is_noted(name, tmp_path):
    built = crash(name)
    layout = layouts.table(name)
    hidden, _ = built.process(56)["threads"][1]
    link = layout.offset("thread", "task_threads")
    width = built.memory.width
    following = built.memory.read(hidden + link, width)
    before = int.from_bytes(built.memory.read(hidden + link + width, width), "little")
    report = Report()
    with built.patched(before + link, following):
        handle = opened(tmp_path, built, name, built.dump())
    with handle:
        found = list(threads(handle.verified_target(), report))
    assert found[-1].address == hidden
    assert found[-1].pid == 56
    assert report.stops == []
    assert len(report.notes) == 1
    assert f"{hidden:#x} is on threads, but on no task" in report.notes[0]


def test_a_page_that_is_missing_costs_its_own_fields_alone(tmp_path):
    name = "10.9.5 x86_64"
    built, layout, first, _ = fitted(name)
    uthread = built.memory.read(first + layout.offset("thread", "uthread"), 8)
    at = struct.unpack("<Q", uthread)[0] + layout.offset("uthread", "pth_name")
    text = struct.unpack("<Q", built.memory.read(at, 8))[0]
    with opened(tmp_path, built, name, built.dump(without=[text])) as handle:
        one = next(t for t in threads(handle.verified_target()) if t.address == first)
    assert isinstance(one.name, Unreadable)
    assert f"{text:#x}" in one.name.reason
    assert one.pid == 71
    assert one.sched_pri == 31
    assert one.user_time == TICKS


def test_times_are_shown_as_ps_shows_them(tmp_path):
    name = "10.9.5 x86_64"
    built, _, first, _ = fitted(name)
    with opened(tmp_path, built, name):
        pass
    where = ("-N", str(tmp_path / "kernel"), "-M", str(tmp_path / "core"), "--layout", name)
    table = said("71", *where, "-o", "address,user_time,suspend_count,options").stdout.split("\n")
    line = next(line for line in table if f"{first:#x}" in line)
    assert line.split() == [f"{first:#x}", "2:03.45", "3", "0x82"]


@pytest.mark.parametrize("gone", ["active", "options", "suspend_count", "wait_event"])
def test_types_that_lack_a_member_say_which(gone):
    every = layouts.table("10.9.5 x86_64")
    thread = every.struct("thread")
    members = {name: member for name, member in thread.members.items() if name != gone}
    types = TypeTable(every.source, lambda tag: Struct(tag, thread.size, members))
    with pytest.raises(NotFoundError, match=gone):
        _fields(SimpleNamespace(types=types, arch=SimpleNamespace(pointer_size=8)))
