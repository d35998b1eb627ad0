"""System calls and Mach traps of real kernels: every handler is the function of its name."""

from __future__ import annotations

import json
import struct
from array import array

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.arch.x86 import X86_64
from kvmtool.cli import cli
from kvmtool.errors import NotFoundError
from kvmtool.memory import Region, RunMemory
from kvmtool.source import BytesSource
from kvmtool.symbols import SymbolTable
from kvmtool.target import Target
from kvmtool.xnu.call_tables import CALLS, MACH_TRAPS, SYSENT, Places, search
from kvmtool.xnu.call_tables import TRAPS as KNOWN_TRAPS
from kvmtool.xnu.syscalls import syscalls
from tests.inputs import real

MACHINES = {
    "crash": ("x86_64-xnu-2422.115.4.mach_kernel", "crash.kdp-core", 456, 128),
    "armc": ("arm64-xnu-4903.221.2-bcm2837.mach_kernel", "armc.corefile", 530, 128),
}
# bsd/kern/syscalls.master and osfmk/kern/syscall_sw.c: numbers that never moved
CALLS_BY_NUMBER = {
    1: "_exit",
    3: "_read",
    4: "_write",
    5: "_open",
    20: "_getpid",
    37: "_kill",
    59: "_execve",
}
TRAPS_BY_NUMBER = {
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
    assert {n: calls[n]["handler"]["name"] for n in CALLS_BY_NUMBER} == CALLS_BY_NUMBER
    assert {n: traps[n]["handler"]["name"] for n in TRAPS_BY_NUMBER} == TRAPS_BY_NUMBER
    assert (calls[3]["name"], calls[3]["arguments"]) == ("read", 3)
    assert traps[31]["arguments"] == 7
    # the kernel's own name of a call is that of the function, but for what shares one
    alike = sum(row["handler"]["name"] == f"_{row['name']}" for row in calls.values())
    assert alike > 0.6 * len(calls)
    assert not any(row["outside"] for row in found)


def test_one_table_alone():
    assert {row["table"] for row in rows("crash", "--traps")} == {"trap"}
    assert {row["table"] for row in rows("crash", "--bsd")} == {"syscall"}


def without_symbols(folder, kernel, *names):
    """A copy of a kernel in which symbols have other names, as if they were stripped."""
    with open(real(f"machine/{kernel}"), "rb") as file:
        data = file.read()
    for name in names:
        assert b"\0" + name + b"\0" in data
        data = data.replace(b"\0" + name + b"\0", b"\0" + b"_" * len(name) + b"\0")
    path = folder / "mach_kernel"
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("machine", MACHINES)
def test_tables_without_symbols_are_found(tmp_path, machine, counted):
    """The same entries as with symbols, also when nothing says how many there are."""
    kernel, core, *_ = MACHINES[machine]
    names = [b"_sysent", b"_mach_trap_table"]
    stripped = without_symbols(
        tmp_path, kernel, *names, *([] if counted else [b"_nsysent", b"_mach_trap_count"])
    )
    args = ["syscalls", "-N", stripped, "-M", real(f"machine/{core}"), "--format", "json"]
    found = CliRunner().invoke(cli, args)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == rows(machine)


@pytest.mark.parametrize(
    ("kernel", "calls"),
    [  # SYS_MAXSYSCALL of xnu-4903.221.2 and 6153.11.26
        ("kernels/arm64-xnu-4903.221.2-release.macho", 532),
        ("kernels/arm64e-xnu-6153.11.26-release.macho", 535),
        ("machine/x86_64-xnu-2422.115.4.mach_kernel", 456),
    ],
)
def test_tables_of_a_file_are_where_its_symbols_say(kernel, calls):
    with kvmtool.open(real(kernel)) as kvm:
        entries, traps = list(kvm.syscalls()), list(kvm.traps())
        assert (len(entries), len(traps)) == (calls, 128)
        target, places = kvm.built_target(), kvm.places()
        sysent = search(target, places, "_sysent", SYSENT[8], CALLS)
        table = search(target, places, "_mach_trap_table", MACH_TRAPS[8], KNOWN_TRAPS)
        assert sysent[0] == kvm.address("_sysent") == entries[0].address
        assert table[0] == kvm.address("_mach_trap_table") == traps[0].address
        names = {call.number: kvm.code_at(call.handler).symbol for call in entries}
        assert {number: names[number] for number in CALLS_BY_NUMBER} == CALLS_BY_NUMBER


def table(start, calls, hooked=()):
    """sysent of xnu-3248 and later at `start`, as bytes: code is at 0x10000 to 0x20000."""
    entries = []
    for number, arguments in enumerate(calls):
        handler = 0xDEAD0000 if number in hooked else 0x10000 + 16 * number
        munge = 0x18000 if arguments else 0
        entries.append(struct.pack("<QQiHH", handler, munge, 1, arguments, arguments * 4))
    return b"".join(entries)


def searched(data, at=0x1000):
    source = BytesSource(data, "tables")
    columns = [array("Q", [value]) for value in (at, at + len(data), 0)]
    memory = RunMemory(source, *columns)
    target = Target(X86_64, memory, SymbolTable(None, 0), no_types)
    places = Places((Region(at, len(data)),), lambda address: 0x10000 <= address < 0x20000)
    return [(c.handler, c.arguments) for c in syscalls(target, places)]


def no_types():
    raise AssertionError("types are not asked for")


CALLS_4_4 = [*CALLS.arguments, 5, 6, 8]


@pytest.mark.parametrize("shift", range(0, 24, 8))
def test_a_table_is_found_however_it_lies(shift):
    padding = bytes(range(1, 200)) * 3 + b"\1\0\4\0"
    padding = padding[: len(padding) // 8 * 8 - shift]
    found = searched(padding + table(0, CALLS_4_4) + bytes(64))
    assert found == [(0x10000 + 16 * n, count) for n, count in enumerate(CALLS_4_4)]


def test_hooks_do_not_hide_a_table():
    found = searched(table(0, CALLS_4_4, hooked=(3, 17, 18)) + bytes(256))
    assert [handler for handler, _ in found].count(0xDEAD0000) == 3
    assert len(found) == len(CALLS_4_4)
    with pytest.raises(NotFoundError, match="_sysent not found; it is stripped, and nothing"):
        searched(table(0, CALLS_4_4, hooked=range(8)) + bytes(64))


def test_two_tables_are_none():
    both = table(0, CALLS_4_4) + bytes(64) + table(0, CALLS_4_4) + bytes(64)
    with pytest.raises(NotFoundError, match="it may be at 0x1000 or 0x1220"):
        searched(both)
