"""Arguments and environment, against what was planted and what a running kernel answered."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import kvmtool
from kvmtool.cli import cli
from kvmtool.libkvm import (
    kvm_close,
    kvm_getargv,
    kvm_getenvv,
    kvm_geterr,
    kvm_getprocs,
    kvm_openfiles,
)
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.args import _APPLE, limited, parse
from kvmtool.xnu.getprocs import KERN_PROC_PID
from tests.inputs import DUMPS, oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
GONE, HALF = 193, 194  # swappedout: its whole block is missing; halfswapped: the end of it


def physical(dump):
    return real(f"dumps/{dump}/mach_kernel"), real(f"dumps/{dump}/mem.lime")


def words(value):
    if isinstance(value, list):
        return [words(item) for item in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


@pytest.mark.parametrize("dump", DUMPS)
def test_strings_are_those_planted(dump):
    planted = {process["pid"]: process for process in truth(dump)["processes"]}
    compared = 0
    with kvmtool.open(*physical(dump)) as kvm:
        for proc in kvm.procs():
            found, process = kvm.arguments(proc), planted[proc.pid]
            if process.get("argv") is None:  # the kernel's own, and zombies
                assert found == (None, [], [], [])
                continue
            if process["stack_missing_pages"]:
                assert not found.whole
                continue
            assert found.whole
            assert words(found.path) == process["exec_path"]
            assert words(found.argv) == process["argv"]
            assert words(found.env) == process["env"]
            assert words(found.apple) == process["apple"]
            compared += 1
    assert compared == len(planted) - 5


@pytest.mark.parametrize("dump", DUMPS)
def test_what_is_swapped_out_is_said(dump):
    planted = {process["pid"]: process for process in truth(dump)["processes"]}
    with kvmtool.open(*physical(dump)) as kvm:
        procs = {proc.pid: proc for proc in kvm.procs()}
        gone, half = kvm.arguments(procs[GONE]), kvm.arguments(procs[HALF])
    assert all(isinstance(field, Unreadable) for field in gone)
    (page,) = planted[HALF]["stack_missing_pages"]
    assert words(half.path) == planted[HALF]["exec_path"]
    assert words(half.argv[0]) == planted[HALF]["argv"][0]
    assert half.argv[1:] == [Unreadable(f"unmapped at {page:#x}")]
    assert isinstance(half.env, Unreadable)


def answered(machine):
    """pid → KERN_PROCARGS2's bytes, as the running kernel gave them to its own processes."""
    said = {}
    for what, text in oracle(machine)["userland"]["other"]:
        if what == "procargs2":
            pid, _, data = text.partition(" ")
            if len(data) % 2 == 0 and not data.startswith("E"):
                said[int(pid)] = bytes.fromhex(data)
    return said


def test_strings_are_what_the_running_kernel_answered():
    said = answered("live")
    assert len(said) >= 5
    with kvmtool.open(real(KERNEL), real("machine/live.elfcore")) as kvm:
        procs = {proc.pid: proc for proc in kvm.procs()}
        for pid, data in said.items():
            argc = int.from_bytes(data[:4], "little")
            strings = [text for text in data[4:].split(b"\0") if text]
            found = kvm.arguments(procs[pid])
            assert found.whole
            assert len(found.argv) == argc
            assert [found.path, *found.argv, *found.env, *found.apple] == strings
            assert all(text.startswith(b"pfz=") for text in found.apple[:1])
            if pid != 1:
                assert found.env == [b"PATH=/bin:/sbin", b"MARK=libkvm-oracle"]


def test_the_commands():
    dump = "x86_64-10.8.5"
    kernel, lime = physical(dump)
    run = CliRunner().invoke
    found = run(cli, ["args", "-N", kernel, "-M", lime, "--pid", "13", "--format", "json"])
    assert found.exit_code == 0
    (row,) = json.loads(found.stdout)
    (planted,) = [p for p in truth(dump)["processes"] if p["pid"] == 13]
    assert (row["path"], row["args"], row["env"], row["apple"]) == tuple(
        planted[name] for name in ("exec_path", "argv", "env", "apple")
    )
    found = run(cli, ["procs", "-N", kernel, "-M", lime, "--pid", "13", "-o", "pid,args"])
    assert found.stdout.splitlines()[1].split() == ["13", *planted["argv"]]
    found = run(cli, ["procs", "-N", kernel, "-M", lime, "--pid", "13", "--env"])
    assert planted["env"][0] in found.stdout
    found = run(cli, ["args", "-N", kernel, "-M", lime, "--pid", "54321"])
    assert found.exit_code == 1
    assert "process 54321 not found" in found.stderr
    found = run(cli, ["args", "-N", kernel, "-M", plain_core(dump)])
    assert found.exit_code == 3
    # a list of processes does not ask for them
    found = run(cli, ["procs", "-N", kernel, "-M", plain_core(dump), "--format", "json"])
    assert found.exit_code == 0
    assert "args" not in json.loads(found.stdout)[0]


def test_libkvm():
    dump = "i386-10.5.8"
    kd = kvm_openfiles(*physical(dump), None, 0, "kvmtool")
    planted = {process["pid"]: process for process in truth(dump)["processes"]}
    (record,), _ = kvm_getprocs(kd, KERN_PROC_PID, 13)
    assert words(kvm_getargv(kd, record, 0)) == planted[13]["argv"]
    assert words(kvm_getenvv(kd, record, 0)) == planted[13]["env"]
    whole = planted[13]["env"][0]
    assert words(kvm_getenvv(kd, record, 6)) == [whole[:5]]
    (record,), _ = kvm_getprocs(kd, KERN_PROC_PID, GONE)
    assert kvm_getargv(kd, record, 0) is None
    assert kvm_geterr(kd).startswith(f"cannot read user space of process {GONE}: unmapped at")
    (record,), _ = kvm_getprocs(kd, KERN_PROC_PID, 0)
    assert kvm_getargv(kd, record, 0) is None
    kvm_close(kd)


NAMES = st.binary(min_size=1, max_size=12).filter(lambda text: b"\0" not in text)


@given(
    NAMES,
    st.lists(NAMES | st.just(b""), max_size=4),
    st.lists(NAMES, max_size=4),
    st.sampled_from([4, 8]),
    st.booleans(),
)
def test_a_block_is_parsed_as_execve_lays_it_out(path, argv, env, width, prefixed):
    """exec_save_path pads to a whole pointer; argv may be empty strings; a gap ends the rest."""
    told = b"executable_path=" + path if prefixed else path
    data = told + b"\0"
    data += b"\0" * (-len(data) % width)
    data += b"".join(text + b"\0" for text in argv)
    data += b"".join(text + b"\0" for text in env)
    apple = [b"pfz=0x1", b"other=2"]
    data += b"".join(text + b"\0" for text in apple)
    found = parse(data, len(argv), width)
    if prefixed or not path.startswith(b"executable_path="):
        assert found.path == path
    assert found.argv == argv
    if not any(text.startswith(_APPLE) for text in env):  # told apart by these, without a gap
        assert (found.env, found.apple) == (env, apple)


@given(st.binary(max_size=64), st.integers(-5, 100), st.sampled_from([4, 8]))
def test_any_bytes_are_parsed(data, argc, width):
    parse(data, argc, width)
    parse(data, argc, width, Unreadable("cut"))


def test_nchr_counts_every_nul():
    strings = [b"abc", b"de"]
    assert limited(strings, 0) == strings
    assert limited(strings, 7) == strings
    assert limited(strings, 6) == [b"abc", b"d"]
    assert limited(strings, 4) == [b"abc"]
    assert limited(strings, 3) == [b"ab"]
    assert limited([b"abc", Unreadable("gone"), b"x"], 0) == [b"abc"]
