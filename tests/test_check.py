"""Is a kernel as its makers left it: real ones that are, and the same with one thing changed.

The instruction sections of every real kernel here are zero-filled, in file and memory alike: that
their code is found equal says that the comparison runs, not much more. Real code is that of the
embedded sample, a kernel of our own that ran under QEMU.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import NamedTuple

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.macho import MachO
from kvmtool.source import FileSource
from tests.inputs import oracle, real

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
MACHINES = ("crash.kdp-core", "live.elfcore", "kaslr.raw")
ARTICLE = "com.osxbook.kext.KernelMemoryAccess"
HEAP = 0xFFFFFF8012345678  # no image lies there
CDEVSW, D_READ = 112, 16  # sizeof(struct cdevsw): data README; d_read is its third pointer
SYSENT = 32  # 10.9: {call, munge32, munge64, ret, narg, bytes}: xnu.md 5.11
OID_HANDLER = 48  # struct sysctl_oid, LP64


class Answer(NamedTuple):
    """What the command said."""

    code: int
    rows: list
    said: str


def checked(kernel, core, *options):
    args = ["check", "-N", kernel, "-M", core, "--format", "json", *options]
    if core.endswith(".raw"):
        args += ["--core-format", "raw"]
    found = CliRunner().invoke(cli, args)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    return Answer(found.exit_code, json.loads(found.stdout or "[]"), found.stderr)


class Core:
    """A copy of a Mach-O core to write into, by the kernel's addresses."""

    def __init__(self, tmp_path, core):
        self.path = str(tmp_path / os.path.basename(core))
        shutil.copyfile(core, self.path)
        source = FileSource(core)
        self._segments = [(s.vmaddr, s.filesize, s.fileoff) for s in MachO(source).segments]
        source.close()

    def write(self, address, data):
        at = next(
            offset + address - start
            for start, size, offset in self._segments
            if start <= address < start + size
        )
        with open(self.path, "r+b") as file:
            file.seek(at)
            file.write(data)

    def pointer(self, address, value):
        self.write(address, struct.pack("<Q", value))


@pytest.fixture
def crash(tmp_path):
    return Core(tmp_path, real("machine/crash.kdp-core"))


@pytest.fixture(scope="module")
def symbols():
    """Name → address in the kernel of the machine, which is not slid in its crash."""
    with kvmtool.open(real(KERNEL)) as kvm:
        return {symbol.name: symbol.address for symbol in kvm.symbols}


def sysctl_address(name):
    return next(
        int(node["addr"], 16) for node in oracle("crash")["sysctl_tree"] if node["name"] == name
    )


@pytest.mark.parametrize("core", MACHINES)
def test_a_machine_that_ran_is_clean(core):
    found = checked(real(KERNEL), real(f"machine/{core}"))
    assert found.rows == []
    assert found.code == 0
    assert "no findings" in found.said
    assert "incomplete" not in found.said
    looked = found.said.split("looked at ")[1].split("\n")[0]
    counts = {what: int(n) for n, what in (part.split(" ", 1) for part in looked.split(", "))}
    said = oracle(core.split(".")[0])
    assert counts["pointers in sysent"] > 456
    assert counts["pointers in mach_trap_table"] >= 128
    assert counts["pointers in the interrupt table"] == 256
    assert counts["processes"] == len(said["procs"])
    assert counts["threads"] == len(said["threads"])
    assert counts["vnodes"] == len(said["vnodes"])
    handled = sum(node["handler"] is not None for node in said["sysctl_tree"])
    assert counts["pointers in the sysctl tree"] == handled
    assert counts["pointers in vnode operations"] > 900
    assert counts["pointers in the protocols"] > 500


def test_three_pointers_changed_are_the_three_found(crash, symbols):
    slot = symbols["_cdevsw"] + 3 * CDEVSW + D_READ
    call = symbols["_sysent"] + 5 * SYSENT
    oid = sysctl_address("kern.ostype") + OID_HANDLER
    for place in (slot, call, oid):
        crash.pointer(place, HEAP)
    found = checked(real(KERNEL), crash.path)
    assert found.code == 3
    assert [(row["check"], row["where"], row["address"]) for row in found.rows] == [
        ("syscalls", "sysent[5] (open)", hex(call)),
        ("devices", "cdevsw[3].d_read", hex(slot)),
        ("sysctl", "kern.ostype", hex(oid)),
    ]
    for row in found.rows:
        assert (row["kind"], row["severity"]) == ("outside", "high")
        assert row["found"]["address"] == hex(HEAP)
        assert "in no image" in row["evidence"]
    linked = [row["evidence"].split("linked as ")[1] for row in found.rows]
    assert linked == ["_open", "_mmread", "_sysctl_handle_string"]
    assert "3 findings" in found.said


def test_pointers_that_stay_inside_the_kernel(crash, symbols):
    crash.pointer(symbols["_sysent"] + 20 * SYSENT, symbols["_kill"])
    crash.pointer(symbols["_sysent"] + 37 * SYSENT, symbols["_kill"] + 7)
    crash.pointer(symbols["_sysent"] + 59 * SYSENT, symbols["_version"])  # a string
    traps = symbols["_mach_trap_table"]
    with kvmtool.open(real(KERNEL), crash.path) as kvm:
        from kvmtool.xnu.syscalls import traps as walk

        call = next(c for c in walk(kvm.nearest_target()) if c.number == 45)
    assert traps < call.handler_at < traps + 128 * 40
    crash.pointer(call.handler_at, symbols["_pid_for_task"])
    found = checked(real(KERNEL), crash.path)
    assert found.code == 3
    assert [(row["where"], row["kind"], row["found"]["name"]) for row in found.rows] == [
        ("sysent[20] (getpid)", "other", "_kill"),
        ("sysent[37] (kill)", "middle", "_kill+0x7"),
        ("sysent[59] (execve)", "outside", "_version"),
        ("mach_trap_table[45] (task_for_pid)", "other", "_pid_for_task"),
    ]
    assert found.rows[0]["expected"] == "_getpid"
    assert "in none of its code" in found.rows[2]["evidence"]
