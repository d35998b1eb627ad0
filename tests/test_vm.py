"""The counters of virtual memory, against what a running kernel said and against planted ones."""

from __future__ import annotations

import gzip
import itertools
import json
import struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.types import layouts
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.percpu import counter
from kvmtool.xnu.queues import Report
from kvmtool.xnu.vm import EVENTS, vm, vm_stat_fields
from tests.builders.sparse import Sparse
from tests.inputs import DUMPS, oracle, plain_core, real

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
ARM64 = "machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel"
RAN = {
    "live": (X86, "machine/live.elfcore"),
    "crash": (X86, "machine/crash.kdp-core"),
    "kaslr": (X86, "machine/kaslr.raw"),
    "armc": (ARM64, "machine/armc.corefile"),
}


def answer(*args, status=0):
    found = CliRunner().invoke(cli, ["vm", *args, "--format", "json"])
    assert found.exit_code == status, found.output
    rows = json.loads(found.stdout)
    return {(row["group"], row["counter"]): row["value"] for row in rows}, rows


def symbol(machine, name):
    return int(oracle(machine)["symbols"][name]["value"], 16)


@pytest.mark.parametrize("machine", RAN)
def test_pages_are_those_an_independent_reader_saw(machine):
    kernel, core = RAN[machine]
    found, rows = answer("-N", real(kernel), "-M", real(core))
    compared = 0
    for ours in ("free", "active", "inactive", "wire"):
        name = f"_vm_page_{ours}_count"
        if name in oracle(machine)["symbols"]:
            value = found["pages", {"wire": "wired"}.get(ours, ours)]
            if machine == "armc":  # it went on after it had written its core
                assert abs(value - symbol(machine, name)) < 2000
            else:
                assert value == symbol(machine, name)
            compared += 1
    assert compared >= 2
    assert found["page", "page_size"] == 4096
    for row in rows:
        if row["unit"] == "pages":
            assert row["bytes"] == row["value"] * 4096


def test_counters_are_near_what_the_running_kernel_answered():
    found, _ = answer("-N", real(X86), "-M", real(RAN["live"][1]))

    def said(name):
        return int.from_bytes(bytes.fromhex(oracle("live")["userland"]["sysctl"][name]), "little")

    assert abs(found["pages", "free"] - said("vm.page_free_count")) < 200
    assert found["pages", "free_target"] == said("vm.vm_page_free_target")
    assert found["pages", "external"] == said("vm.vm_page_external_count")
    # the tasks' own counts (proc_taskinfo in proc_info's answer) have no more than all together
    tasks = [
        bytes.fromhex(text.split()[1])
        for name, text in oracle("live")["userland"]["other"]
        if name == "taskallinfo" and "ERR" not in text
    ]
    assert len(tasks) == 6
    for name, at in (("faults", 52), ("pageins", 56), ("cow_faults", 60)):
        total = sum(struct.unpack_from("<i", task, 136 + at)[0] for task in tasks)
        assert 0 < total <= found["events", name], name
    assert found["events", "zero_fill_count"] < found["events", "faults"]


def test_a_kernel_that_no_layout_fits():
    kernel, core = RAN["armc"]
    found, _ = answer("-N", real(kernel), "-M", real(core))
    assert {group for group, _ in found} == {"page", "pages", "compressor"}
    assert found["pages", "total"] < 0x8000000 // 4096


@pytest.mark.parametrize("dump", DUMPS)
def test_dumps_have_counters(dump):
    found, _ = answer("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    assert found["pages", "free"] > found["pages", "active"] > found["pages", "wired"] > 0


# Where struct processor has processor_data.vm_stat.faults: from whole descriptions of the kernels'
# types (../shared/data/types), from computed layouts, and from the CTF of a kernel of 10.9.5
PLACES = {
    "10.4.11 i386": 0x4E4 + 32,
    "10.5.8 i386": 0x4AC + 0x50 + 32,
    "10.8.5 x86_64": 0x1948 + 0x58 + 48,
    "10.9.5 x86_64": 0x1950 + 0x58 + 48,
    "10.13.6 x86_64": 0x930 + 0x58 + 48,
    "10.14.6 x86_64": 0x990 + 48,
    "10.15.6 x86_64": 0x490 + 48,
}


@pytest.mark.parametrize("dump", DUMPS)
def test_places_are_those_of_the_kernels_own_types(dump):
    with gzip.open(real(f"types/{dump}.types.json.gz")) as file:
        isf = json.load(file)["user_types"]
    name = " ".join(reversed(dump.split("-")))
    data = isf["processor"]["fields"]["processor_data"]["offset"]
    stat = isf["processor_data"]["fields"]["vm_stat"]
    inside = isf[stat["type"]["name"]]["fields"]
    fields = vm_stat_fields(Sparse(name).target())
    compared = 0
    for event in EVENTS:
        at, _ = fields[event]
        known = inside.get(event)
        assert at == (known and data + stat["offset"] + known["offset"]), event
        compared += known is not None
    assert compared >= 9
    assert fields["faults"][0] == PLACES[name]


def test_every_layout_has_room_for_the_counters():
    """Where the kits stop at processor_data, what follows vm_stat ends with the structure."""
    seen = 0
    for name in layouts.names():
        made = Sparse(name)
        fields = vm_stat_fields(made.target())
        if fields is None:
            assert made.layout.has("zone", "z_self"), name  # 11 on: scalable counters
            continue
        present = [at for at, _ in fields.values() if at is not None]
        assert len(present) >= 9
        assert max(present) + 8 <= made.layout.size("processor")
        if name in PLACES:
            assert fields["faults"][0] == PLACES[name]
            seen += 1
    assert seen >= 5


def with_processors(name, count=2):
    made = Sparse(name)
    cpus = [made.record("processor") for _ in range(count)]
    for first, second in itertools.pairwise(cpus):
        first.ptr("processor_list", second.address)
    made.pointer("_processor_list", cpus[0].address)
    return made, cpus


@pytest.mark.parametrize("name", PLACES)
def test_events_are_summed_over_the_processors(name):
    made, cpus = with_processors(name)
    code = "<Q" if "x86_64" in name else "<I"
    for number, cpu in enumerate(cpus):
        at = cpu.address + PLACES[name]
        made.region.write(at, struct.pack(code, 1000 + number))
        made.region.write(at + struct.calcsize(code), struct.pack(code, 5))  # cow_faults
    found = vm(made.target())
    assert found.events["faults"] == 2001
    assert found.events["cow_faults"] == 10
    assert found.events["pageins"] == 0


def test_events_of_a_processor_that_is_absent():
    made, cpus = with_processors("10.13.6 x86_64")
    gone = cpus[1].address + PLACES["10.13.6 x86_64"]
    link = cpus[1].place("processor_list")
    assert gone >> 12 == link >> 12
    report = Report()
    found = vm(made.target(without=(gone,)), report)
    assert isinstance(found.events["faults"], Unreadable)
    assert len(report.stops) == 1
    made.symbols["_processor_list"] = 0xFFFFFF9000000000
    report = Report()
    found = vm(made.target(), report)
    assert found.events["faults"] == Unreadable(report.stops[0])


def test_no_processors_no_events():
    made = Sparse("10.13.6 x86_64")
    made.pointer("_processor_list", 0)
    report = Report()
    assert vm(made.target(), report).events == {}
    assert report.stops == []


@pytest.mark.parametrize(
    ("name", "mangled"),
    [
        ("11.0.1 x86_64", 0),
        ("12.0.1 arm64", 0x8000000000000000),
        ("14.0 arm64", 0xC0C0000000000000),
        ("15.5 arm64", 0),
    ],
)
def test_events_are_scalable_counters(name, mangled):
    made = Sparse(name)
    page = made.arch.page_size
    copies = made.alloc(bytes(3 * page))
    for cpu, value in enumerate((7, 30, 500)):
        made.region.write(copies + cpu * page, struct.pack("<Q", value))
    made.number("_zpercpu_early_count", 3)
    for event in ("faults", "pageins", "compressions"):
        made.number(f"_vm_statistics_{event}", copies & ~mangled, 8)
    target = made.target()
    assert counter(target, "_vm_statistics_faults") == 537
    assert vm(target).events == {"faults": 537, "pageins": 537, "compressions": 537}


def test_scalable_counters_that_lie():
    made = Sparse("15.5 arm64")
    made.number("_zpercpu_early_count", 1 << 20)
    made.number("_vm_statistics_faults", 0xFFFFFE2400000000, 8)
    assert vm(made.target()).events["faults"] == Unreadable(
        "zpercpu_early_count is 1048576, expected at most 256"
    )
    made = Sparse("15.5 arm64")
    made.number("_zpercpu_early_count", 2)
    made.number("_vm_statistics_faults", 0xFFFFFE9900000000, 8)
    assert vm(made.target()).events["faults"] == Unreadable("unmapped at 0xfffffe9900000000")


def test_the_compressor():
    made = Sparse("10.9.5 x86_64")
    thing = made.record("vm_object")
    thing.u32("resident_page_count", 77)
    made.symbols["_compressor_object_store"] = thing.address
    made.number("_c_segment_count", 9)
    made.number("_c_segment_input_bytes", 1 << 40, 8)
    found = vm(made.target())
    assert found.compressor == {"segments": 9, "bytes_stored": 1 << 40, "pages_occupied": 77}
    assert found.pages == found.events == {}
    del made.symbols["_compressor_object_store"]
    made.pointer("_compressor_object", thing.address)
    assert vm(made.target()).compressor["pages_occupied"] == 77
