"""The processors, against what a running machine's memory holds and against planted ones."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.errors import NotFoundError
from kvmtool.types import layouts
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.cpu import cpus, processors
from kvmtool.xnu.queues import Report
from tests.builders.sparse import Sparse
from tests.inputs import oracle, real

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
RAN = {"live": "live.elfcore", "crash": "crash.kdp-core", "kaslr": "kaslr.raw"}


def answer(*args, status=0):
    found = CliRunner().invoke(cli, ["cpus", *args, "--format", "json"])
    assert found.exit_code == status, found.output
    return json.loads(found.stdout)


@pytest.mark.parametrize("machine", RAN)
def test_the_cpu_of_a_machine_that_ran(machine):
    (cpu,) = answer("-N", real(X86), "-M", real(f"machine/{RAN[machine]}"))
    said = oracle(machine)
    assert cpu["cpu"] == said["cpu"]["cpu_number"]
    assert cpu["cpu_data"] == said["cpu"]["cpu_data"]
    assert cpu["active_thread"] == said["cpu"]["active_thread"]
    (thread,) = [t for t in said["threads"] if t["addr"] == cpu["active_thread"]]
    assert cpu["tid"] == thread["thread_id"]
    task = next(t for t in said["tasks"] if t["addr"] == thread["task"])
    proc = next(p for p in said["procs"] if p["addr"] == task["bsd_info"])
    assert (cpu["pid"], cpu["command"]) == (proc["p_pid"], proc["p_comm"])
    assert cpu["idle"] is (cpu["state"] == "idle")
    assert cpu["interrupts"] > 1000
    if machine == "crash":
        assert cpu["pc"]["name"].startswith("_Debugger+")
        assert cpu["registers"]["rip"] == cpu["pc"]["address"]
    if machine == "kaslr":  # a raw image has no registers
        assert cpu["pc"] is cpu["registers"] is None


def planted(name, count=3):
    """A kernel with `count` processors, the first of which runs the thread it idles with."""
    made = Sparse(name)
    found = []
    for number in range(count):
        cpu, idle = made.record("processor"), made.record("thread")
        busy = made.record("thread") if number else idle
        for member in ("cpu_id", "cpu_num", "processor_data.slot_num"):
            cpu.u32(member, number, maybe=True)
        cpu.u32("state", 6 if number else 4)
        cpu.ptr("active_thread", busy.address)
        cpu.ptr("idle_thread", idle.address)
        cpu.u32("current_pri", 31)
        found.append((cpu, busy, idle))
    for (cpu, *_), (following, *_) in itertools.pairwise(found):
        cpu.ptr("processor_list", following.address)
    made.pointer("_processor_list", found[0][0].address)
    return made, found


def built_in():
    """The 35 kernels that the layouts were computed or checked for, and the kits' between them."""
    return [name for name in layouts.names() if "-" not in name]


@pytest.mark.parametrize("name", built_in())
def test_processors_of_every_era(name):
    made, there = planted(name)
    report = Report()
    found = list(cpus(made.target(), report))
    assert report.stops == report.notes == []
    assert [cpu.address for cpu in found] == [cpu.address for cpu, *_ in there]
    assert [cpu.cpu for cpu in found] == [0, 1, 2]
    assert [cpu.state for cpu in found] == ["idle", "running", "running"]
    assert [cpu.idle for cpu in found] == [True, False, False]
    assert [cpu.active_thread for cpu in found] == [busy.address for _, busy, _ in there]
    assert [cpu.current_pri for cpu in found] == [31, 31, 31]
    assert [cpu.cpu_data for cpu in found] == [None] * 3


def test_the_machine_part_of_intel():
    made, _ = planted("10.13.6 x86_64", 2)
    data = made.record("cpu_data")
    data.u32("cpu_preemption_level", 2)
    data.u32("cpu_interrupt_level", 1)
    for vector, count in ((0x40, 7), (0xD1, 35)):
        data.u32("cpu_hwIntCnt", count, at=4 * vector)
    made.variable("_cpu_data_ptr", struct.pack("<2Q", data.address, 0))
    first, second = cpus(made.target())
    assert first.cpu_data == data.address
    assert (first.preemption_level, first.interrupt_level, first.interrupts) == (2, 1, 42)
    assert second.cpu_data is second.interrupts is second.preemption_level is None


def test_the_machine_part_of_arm64():
    made, _ = planted("15.5 arm64", 2)
    made.variable("_CpuDataEntries", struct.pack("<4Q", 1, 0xFFFFFE1111, 2, 0xFFFFFE2222))
    assert [cpu.cpu_data for cpu in cpus(made.target())] == [0xFFFFFE1111, 0xFFFFFE2222]


def test_a_list_that_runs_in_a_circle():
    made, there = planted("10.13.6 x86_64")
    there[2][0].ptr("processor_list", there[0][0].address)
    report = Report()
    assert len(list(cpus(made.target(), report))) == 3
    assert "runs in a circle" in report.stops[0]


def test_a_processor_that_the_list_lost():
    made, there = planted("10.13.6 x86_64")
    there[1][0].ptr("processor_list", 0)
    addresses = [cpu.address for cpu, *_ in there]
    made.variable("_processor_array", struct.pack("<3Q", *addresses))
    made.number("_processor_count", 3)
    report = Report()
    assert list(processors(made.target(), report)) == addresses
    assert report.notes == [
        f"processor {addresses[2]:#x} is in processor_array, but not on processor_list"
    ]
    made.number("_processor_count", 1 << 30)  # a lie: the walk is bounded
    made.symbols["_processor_array"] = 0xFFFFFF9000000000
    report = Report()
    assert list(processors(made.target(), report)) == addresses[:2]
    assert report.stops == [
        "processor_array: stopped after 0 elements: its entry at 0xffffff9000000000 is unmapped"
    ]


def test_only_the_master_processor():
    made, there = planted("10.13.6 x86_64", 1)
    del made.symbols["_processor_list"]
    made.pointer("_master_processor", there[0][0].address)
    assert list(processors(made.target(), Report())) == [there[0][0].address]
    del made.symbols["_master_processor"]
    made.symbols["_percpu_slot_processor"] = there[0][0].address
    assert list(processors(made.target(), Report())) == [there[0][0].address]
    with pytest.raises(NotFoundError, match="_processor_list"):
        list(processors(Sparse("10.13.6 x86_64").target(), Report()))


def test_a_processor_whose_page_is_absent():
    made, there = planted("10.13.6 x86_64")
    gone = there[1][0].address
    report = Report()
    found = list(cpus(made.target(without=(gone,)), report))
    assert report.partial or isinstance(found[1].state, Unreadable)
    assert any(isinstance(cpu.idle, Unreadable) for cpu in found)
