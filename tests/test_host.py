"""The host and its load, against what was planted and what a running kernel answered."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.errors import FormatError
from kvmtool.types import layouts
from kvmtool.types.fixed import FixedTypes
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.host import boot_args, host, page_size
from kvmtool.xnu.load import boottime, load
from tests.builders.sparse import Sparse, sparse_target
from tests.inputs import DUMPS, oracle, plain_core, real, truth

X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
ARM64 = "machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel"
RAN = {"live": "machine/live.elfcore", "crash": "machine/crash.kdp-core"}


def answer(command, *args, status=0):
    found = CliRunner().invoke(cli, [command, *args, "--format", "json"])
    assert found.exit_code == status, found.output
    return json.loads(found.stdout)


def said(name, machine="live"):
    """What sysctl(3) answered on the running machine."""
    return bytes.fromhex(oracle(machine)["userland"]["sysctl"][name])


def number(name, code="<I"):
    return struct.unpack_from(code, said(name))[0]


def text(name):
    return said(name).split(b"\0")[0].decode()


@pytest.mark.parametrize("dump", DUMPS)
def test_host_and_load_are_those_planted(dump):
    where = ("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    planted = truth(dump)["statics"]
    found = answer("host", *where)
    names = ("version", "ostype", "osrelease", "osversion", "hostname", "domainname", "hz")
    for name in (*names, "maxproc", "mem_size"):
        assert found[name] == planted[name], name
    assert found["boottime"] == "2017-07-11T02:40:00.000000Z"
    assert found["boottime_raw"][0] == planted["boottime"]
    assert found["uuid"] == truth(dump)["uuid"]
    assert int(found["slide"], 16) == truth(dump)["slide"]
    if truth(dump)["slide"]:
        assert found["vm_kernel_slide"] == found["slide"]
        assert int(found["vm_kernel_stext"], 16) == planted["kernel_stext"]
    loaded = answer("load", *where)
    assert loaded["loadavg"] == planted["loadavg"]
    assert loaded["nprocs"] == planted["nprocs"]
    assert loaded["tasks"] == planted["live"]
    assert loaded["boottime_raw"] == found["boottime_raw"]


@pytest.mark.parametrize("machine", RAN)
def test_host_is_what_the_running_kernel_answered(machine):
    found = answer("host", "-N", real(X86), "-M", real(RAN[machine]))
    version = text("kern.version")
    assert found["version"].rstrip("\n").startswith(version[:90].rstrip("\n"))
    for name in ("ostype", "osrelease", "osversion", "hostname"):
        assert found[name] == text(f"kern.{name}")
    assert found["kernel_uuid"] == found["uuid"] == text("kern.uuid")
    assert found["maxproc"] == number("kern.maxproc")
    assert found["max_mem"] == number("hw.memsize", "<Q")
    assert found["page_size"] == number("hw.pagesize", "<Q")
    assert found["logical_cpu"] == number("hw.ncpu")
    assert found["boottime_raw"] == list(struct.unpack_from("<qi", said("kern.boottime")))
    if machine == "live":
        assert found["bootargs"] == text("kern.bootargs")
    assert found["bootargs"].endswith("msgbuf=65536 cpus=1 rd=md0")
    assert found["rootdevice"] == "md0"


def test_load_is_near_what_the_running_kernel_answered():
    found = answer("load", "-N", real(X86), "-M", real(RAN["live"]))
    averages = [n / 2048 for n in struct.unpack_from("<3I", said("vm.loadavg"))]
    # sampled some seconds before the dump: the 15 minutes moved little, the first minute more
    for ours, theirs, slack in zip(found["loadavg"], averages, (1.0, 0.5, 0.2), strict=True):
        assert abs(ours - theirs) < slack
    assert hex(found["nprocs"]) == oracle("live")["symbols"]["_nprocs"]["value"]
    assert found["threads"] == len(oracle("live")["threads"])


def test_host_of_an_arm64_machine():
    where = ("-N", real(ARM64), "-M", real("machine/armc.corefile"))
    found = answer("host", *where)
    log = CliRunner().invoke(cli, ["info", *where]).stdout
    (line,) = [line for line in log.splitlines() if "Boot args: " in line]
    assert found["bootargs"] == line.partition("Boot args: ")[2].strip()
    (line,) = [line for line in log.splitlines() if "Boot    : " in line]
    assert found["boottime_raw"][0] == int(line.split()[2], 16)
    assert found["max_mem"] == 0x8000000
    assert found["page_size"] == 4096
    assert found["kernel_uuid"] == found["uuid"]


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"])
def test_pe_state_is_the_kits(dump):
    """The declaration for kernels without a kit gives what the kits of three others have."""
    name = {"i386-10.5.8": "10.5.8 i386"}.get(dump, f"{dump.partition('-')[2]} x86_64")
    types = FixedTypes(4 if dump.startswith("i386") else 8)
    kit, ours = layouts.table(name).struct("PE_state"), types.flat("PE_state")
    for member in ("deviceTreeHead", "bootArgs"):
        assert ours.members[member].offset == kit.members[member].offset


def planted_args(name, line, at, state=0xA0):
    """A kernel of layout `name` that knows nothing but PE_state."""
    base = 0xFFFFFE0010000000
    args = base + 0x1000
    return sparse_target(
        name,
        {"_PE_state": base},
        {base + state: struct.pack("<Q", args), args + at: line},
    )


@pytest.mark.parametrize(
    ("name", "at"), [("15.5 arm64", 108), ("15.5 x86_64", 8), ("10.14.6 x86_64", 8)]
)
def test_boot_args_without_a_kit(name, at):
    target = planted_args(name, b"-v debug=0x144\0" + bytes(1024), at)
    assert boot_args(target) == "-v debug=0x144"
    found = host(target)
    assert found.bootargs == "-v debug=0x144"
    assert found.hostname is found.version is found.boottime is None


def test_boot_args_that_are_no_text():
    bad = planted_args("15.5 arm64", b"\x01\xff\x80" + bytes(1024), 108)
    assert boot_args(bad) == Unreadable(
        "no text at 0xfffffe001000106c, expected boot_args.CommandLine"
    )
    absent = sparse_target("15.5 arm64", {"_PE_state": 0xFFFFFE0010000000}, {})
    assert isinstance(boot_args(absent), Unreadable)
    assert "unmapped" in boot_args(absent).reason


def test_page_size_of_arm64_is_its_variable():
    symbol = {"_page_size": 0xFFFFFE0010000000}
    for size in (4096, 16384):
        stored = {symbol["_page_size"]: struct.pack("<Q", size)}
        assert page_size(sparse_target("15.5 arm64", symbol, stored)) == size
    wrong = {symbol["_page_size"]: struct.pack("<Q", 5)}
    assert page_size(sparse_target("15.5 arm64", symbol, wrong)) == Unreadable(
        "page_size is 0x5, expected 0x1000 or 0x4000"
    )
    assert page_size(sparse_target("15.5 arm64", {}, {})) == 16384
    assert page_size(sparse_target("10.13.6 x86_64", {}, {})) == 4096


def test_boot_time_without_its_page():
    target = sparse_target("10.13.6 x86_64", {"_clock_boottime": 0xFFFFFF8000A00000}, {})
    assert boottime(target) == Unreadable("unmapped at 0xffffff8000a00000")


def test_a_field_without_its_page_is_said(tmp_path):
    kernel = real("dumps/x86_64-10.8.5/mach_kernel")
    with kvmtool.open(kernel, plain_core("x86_64-10.8.5")) as kvm:
        at = kvm.address("_hostname")
        near = [n for n in ("_domainname", "_nprocs") if kvm.address(n) >> 12 == at >> 12]
    core = without_page("x86_64-10.8.5", at, tmp_path)
    found = CliRunner().invoke(cli, ["host", "-N", kernel, "-M", core])
    assert found.exit_code == 3, found.output
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("hostname ")]
    assert "? (unmapped at 0x" in line
    found = answer("host", "-N", kernel, "-M", core, status=3)
    assert "unmapped" in found["hostname"]["unreadable"]
    assert near or found["domainname"] == "example.net"


def without_page(dump, address, folder):
    """The dump as a core that lacks the page of `address`, made by `convert`."""
    core = folder / "cut.core"
    with open(plain_core(dump), "rb") as file:
        data = bytearray(file.read())
    at = 32
    (commands,) = struct.unpack_from("<I", data, 16)
    for _ in range(commands):
        kind, size = struct.unpack_from("<2I", data, at)
        if kind == 0x19:
            start, length = struct.unpack_from("<2Q", data, at + 24)
            if start <= address < start + length:
                page = address & ~0xFFF
                assert page > start
                # the segment ends before the page: what follows of it is gone, too
                struct.pack_into("<Q", data, at + 32, page - start)
                struct.pack_into("<Q", data, at + 48, page - start)
        at += size
    core.write_bytes(data)
    return str(core)


def test_load_of_a_kernel_that_has_little():
    made = Sparse("10.13.6 x86_64")
    found = load(made.target())
    assert found.loadavg is found.avenrun is found.mach_factor is found.boottime is None
    made.variable("_averunnable", struct.pack("<3I4xq", 1, 2, 3, 0))
    with pytest.raises(FormatError, match=r"fscale at 0x\w+ is 0, expected 2048"):
        load(made.target())
    made.variable("_averunnable", struct.pack("<3I4xq", 2048, 1024, 3072, 2048))
    made.variable("_mach_factor", struct.pack("<3I", 1500, 250, 0))
    proc = made.record("proc")
    made.pointer("_kernproc", proc.address)
    found = load(made.target())
    assert found.loadavg == [1.0, 0.5, 1.5]
    assert found.mach_factor == [1.5, 0.25, 0.0]
    assert found.boottime is None  # what kernproc leads to is not process 0
    proc.text("p_comm", "kernel_task", 17)
    proc.timeval("p_start", (1_500_000_000, 7))
    assert load(made.target()).boottime == (1_500_000_000, 7)


def test_load_for_people():
    dump = "x86_64-10.8.5"
    where = ("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    lines = CliRunner().invoke(cli, ["load", *where]).stdout.splitlines()
    assert lines[0].split() == ["boottime", "2017-07-11T02:40:00.000000Z"]
    assert "load averages (1, 5, 15 min)  0.72 1.01 3.31" in lines
