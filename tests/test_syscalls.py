"""System calls and Mach traps of real kernels: every handler is the function of its name."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from tests.inputs import real

MACHINES = {
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core", 456, 128),
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile", 530, 128),
}
# bsd/kern/syscalls.master and osfmk/kern/syscall_sw.c: numbers that never moved
CALLS = {1: "_exit", 3: "_read", 4: "_write", 5: "_open", 20: "_getpid", 37: "_kill", 59: "_execve"}
TRAPS = {
    10: "__kernelrpc_mach_vm_allocate_trap",
    26: "_mach_reply_port",
    28: "_task_self_trap",
    31: "_mach_msg_trap",
}


def rows(machine, *options):
    kernel, core, *_ = MACHINES[machine]
    args = ["-N", real(f"machine/{kernel}"), "-M", real(f"machine/{core}"), "--format", "json"]
    found = CliRunner().invoke(cli, ["syscalls", *args, *options])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_and_traps(machine):
    found = rows(machine)
    calls = {row["number"]: row for row in found if row["table"] == "syscall"}
    traps = {row["number"]: row for row in found if row["table"] == "trap"}
    *_, least, count = MACHINES[machine]
    assert len(calls) >= least
    assert len(traps) == count
    assert {n: calls[n]["handler"]["name"] for n in CALLS} == CALLS
    assert {n: traps[n]["handler"]["name"] for n in TRAPS} == TRAPS
    assert (calls[3]["name"], calls[3]["arguments"]) == ("read", 3)
    assert traps[31]["arguments"] == 7
    # the kernel's own name of a call is that of the function, but for what shares one
    alike = sum(row["handler"]["name"] == f"_{row['name']}" for row in calls.values())
    assert alike > 0.6 * len(calls)
    assert not any(row["outside"] for row in found)


def test_one_table_alone():
    assert {row["table"] for row in rows("crash", "--traps")} == {"trap"}
    assert {row["table"] for row in rows("crash", "--bsd")} == {"syscall"}
