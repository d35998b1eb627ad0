"""Stacks in processes: on a machine that ran, and planted ones."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool.cli import cli
from kvmtool.errors import NotFoundError
from kvmtool.types.model import TypeTable
from kvmtool.xnu.thread import threads
from kvmtool.xnu.user_stack import LIMIT, Mapping, Mappings, UserWalk
from kvmtool.xnu.user_state import UserState, UserStates
from tests.builders.sparse import Sparse
from tests.builders.typed import memory_of
from tests.inputs import plain_core, real

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"


def stacks(core, *which, status=0, form="json"):
    args = ["backtrace", *which, "--user", "-N", real(KERNEL), "-M", core, "--format", form]
    if core.endswith(".raw"):
        args += ["--core-format", "raw"]
    found = CliRunner().invoke(cli, args)
    assert found.exit_code == status, found.output
    return json.loads(found.stdout) if form == "json" else found.stdout


@pytest.mark.parametrize("core", ["live.elfcore", "kaslr.raw"])
def test_where_a_machines_processes_wait(core):
    """Behind the instruction that called the kernel, in the file they run."""
    path = real(f"machine/{core}")
    options = {"format": "raw"} if core.endswith(".raw") else {}
    texts = {1: "/sbin/launchd", 2: "/usr/sbin/syslogd", 4: "/bin/sh", 5: "/bin/sleep"}
    with kvmtool.open(real(KERNEL), path, **options) as kvm:
        for pid, text in texts.items():
            (row,) = stacks(path, str(pid))
            user = row["user"]
            frame = user["frames"][0]
            assert (frame["kind"], frame["fp"], frame["image"]) == ("pc", None, text)
            pc = int(frame["pc"], 16)
            assert kvm.process(pid).read(pc - 2, 2) == b"\x0f\x05"  # syscall
            assert frame["offset"] == pc - 0x100000000  # where llvm-objdump has __TEXT of them
            assert not user["unreadable"]
            # they were compiled without frame pointers
            assert user["stop"] == "end of the chain" or "is no code" in user["stop"]
            assert len(user["frames"]) == 1


def test_threads_of_the_kernel_have_none():
    rows = stacks(real("machine/live.elfcore"), "--all")
    assert {row["user"] is None for row in rows if row["pid"] == 0} == {True}
    assert len([row for row in rows if row["user"] is not None]) == 7


def test_a_dump_of_the_kernel_alone_names_the_file():
    (row,) = stacks(real("machine/crash.kdp-core"), "2", status=3)
    assert row["user"]["frames"][0]["image"] == "/usr/sbin/syslogd"
    assert row["user"]["stop"] == "a process's memory is in no dump of the kernel's memory alone"
    assert row["user"]["unreadable"]


def test_for_a_person():
    text = stacks(real("machine/live.elfcore"), "5", form="table")
    assert text.splitlines()[2:] == [
        "     in its process:",
        "  0  0x0000000100001032  sleep+0x1032",
        "     end of the chain",
    ]


# what a thread had saved


def user_state(target, thread):
    return UserStates(target).read(thread)


@pytest.mark.parametrize("name", ["10.14.6 x86_64", "15.5 x86_64"])
def test_saved_by_intel(name):
    made = Sparse(name)
    thread = made.record("thread")
    target = made.target()
    assert user_state(target, thread.address) is None  # a thread of the kernel's

    # {flavor, pad[3]} {rdi … r11} {rbp, rbx, rcx, rax} {gs, fs, ds, es} {trapno …, rip, cs, rflags,
    # rsp, ss}: osfmk/mach/i386/thread_status.h, xnu-4903
    def saved(cs):
        regs = struct.pack("<12Q", *range(1, 13)) + struct.pack("<4Q", 0x7000, 1, 2, 3)
        frame = struct.pack("<8Q", 0x85, 4, 5, 0x10002000, cs, 0x202, 0x6FF8, 0x23)
        return struct.pack("<4I", 15, 0, 0, 0) + regs + bytes(16) + frame

    thread.ptr("machine.iss", made.alloc(saved(0x2B)))
    state = user_state(made.target(), thread.address)
    assert state == UserState(0x10002000, 0x6FF8, 0x7000, None, 8)
    thread.ptr("machine.iss", made.alloc(saved(0x8)))
    assert user_state(made.target(), thread.address) is None
    thread.ptr("machine.iss", made.alloc(bytes(0x100)))
    assert user_state(made.target(), thread.address) is None
    # {gs … eax} {trapno, cpu, err, eip, cs, efl, uesp, ss}
    words = [0x23] * 4 + [1, 2, 0x5000, 0, 3, 4, 5, 6] + [0, 0, 0x1F00, 0x1B, 0x202, 0x4FF0, 0x23]
    narrow = struct.pack("<4I", 14, 0, 0, 0) + struct.pack("<19I", *words)
    thread.ptr("machine.iss", made.alloc(narrow))
    state = user_state(made.target(), thread.address)
    assert state == UserState(0x1F00, 0x4FF0, 0x5000, None, 4)


def test_saved_by_arm64():
    made = Sparse("15.5 arm64")
    thread = made.record("thread")
    assert user_state(made.target(), thread.address) is None

    # {flavor, count} x0 … x28, fp, lr, sp, pc, cpsr: osfmk/mach/arm/thread_status.h
    def saved(cpsr):
        words = (*range(29), 0x16F000, 0xA5 << 56 | 0x10001234, 0x16EFF0, 0x10002000)
        return struct.pack("<2I33QI", 7, 66, *words, cpsr)

    thread.ptr("machine.upcb", made.alloc(saved(0x60000000)))
    state = user_state(made.target(), thread.address)
    assert state == UserState(0x10002000, 0x16EFF0, 0x16F000, 0x10001234, 8)
    thread.ptr("machine.upcb", made.alloc(saved(0x4)))  # EL1
    assert user_state(made.target(), thread.address) is None


@pytest.mark.parametrize("core", ["live.elfcore", "crash.kdp-core"])
def test_built_in_types_find_the_same_by_trying(core, monkeypatch):
    """Those of 10.9.5 do not know machine.iss; the kernel's own, which do, are hidden."""

    def states():
        with kvmtool.open(real(KERNEL), real(f"machine/{core}")) as kvm:
            target = kvm.verified_target()
            reader = UserStates(target)
            return reader.tried, {
                thread.address: reader.read(thread.address) for thread in threads(target)
            }

    tried, before = states()
    assert not tried
    monkeypatch.setattr("kvmtool.type_files.find_types", lambda *_, **__: None)
    tried, after = states()
    assert tried
    assert after == before
    assert len([state for state in after.values() if state is not None]) >= 4


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.4.11 i386"])
def test_types_that_do_not_say_where(name):
    made = Sparse(name)
    thread = made.record("thread")
    with pytest.raises(NotFoundError, match=r"thread\.machine\.iss.* --types takes more"):
        user_state(made.target(), thread.address)


def test_built_in_types_are_asked_before_anything_is_told():
    dump = "x86_64-10.8.5"
    args = ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump), "--format", "json"]
    found = CliRunner().invoke(cli, ["backtrace", "--all", "--user", *args])
    assert (found.exit_code, found.stdout) == (1, "")
    assert "member thread.machine.iss not found; " in found.stderr


def test_the_kernels_own_types_say_where():
    with kvmtool.open(real(KERNEL), real("machine/live.elfcore")) as kvm:
        target = kvm.verified_target()
        assert isinstance(target.types, TypeTable)
        assert target.types.has("thread", "machine.iss")
        assert not target.types.has("pcb", "iss")


# walking

TEXT = Mapping(0x1000, 0x3000, 5, "/bin/one", 0x1000)
MORE = Mapping(0x8000, 0x9000, 5, "/usr/lib/two", 0x7000)
STACK = Mapping(0x10000, 0x11000, 3, None, 0x10000)


def mapped(*mappings):
    made = Mappings(())
    made._mappings, made._starts = list(mappings), [one.start for one in mappings]
    return made


def walked(state, words, mappings=(TEXT, MORE, STACK), width=8, start=0x10000):
    code = "Q" if width == 8 else "I"
    content = memory_of({start: struct.pack(f"<{len(words)}{code}", *words)})
    walk = UserWalk(state, mapped(*mappings), content, lambda value: value & 0xFFFFFFFF)
    return walk.stack()


def test_a_chain_of_frames():
    state = UserState(0x1100, 0x10000, 0x10000, None, 8)
    found = walked(state, [0x10020, 0x8200, 0, 0, 0x10030, 0x2200, 0, 0])
    assert [(f.pc, f.fp, f.kind, f.image, f.offset) for f in found.frames] == [
        (0x1100, None, "pc", "/bin/one", 0x100),
        (0x8200, 0x10000, "return", "/usr/lib/two", 0x1200),
        (0x2200, 0x10020, "return", "/bin/one", 0x1200),
    ]
    assert (found.stop, found.unreadable) == ("end of the chain", False)


def test_the_link_register_is_the_caller_of_a_function_without_a_frame():
    state = UserState(0x1100, 0x10000, 0x10000, 0x2040, 8)
    kinds = [(f.pc, f.kind) for f in walked(state, [0, 0x8200, 0, 0]).frames]
    assert kinds == [(0x1100, "pc"), (0x2040, "link"), (0x8200, "return")]
    assert len(walked(state._replace(link=0x8200), [0, 0x8200]).frames) == 2
    assert len(walked(state._replace(link=0x10008), [0, 0x8200]).frames) == 2


@pytest.mark.parametrize(
    ("fp", "words", "stop"),
    [
        (0, [], "end of the chain"),
        (0x10001, [0, 0], "frame pointer 0x10001 is not aligned"),
        (0x8000, [0, 0], "frame pointer 0x8000 does not lie above 0xffff"),
        (0x10000, [0x10000, 0x1200], "frame pointer 0x10000 does not lie above 0x10000"),
        (0x10000, [0x10010, 0x10008], "return address 0x10008 is no code: 0x10000 may be no frame"),
        (0x10000, [0x10010, 0x777], "return address 0x777 is no code: 0x10000 may be no frame"),
        (0x10000, [0x10010, 0], "end of the chain"),
    ],
)
def test_why_a_chain_ends(fp, words, stop):
    found = walked(UserState(0x1100, 0x10000, fp, None, 8), words or [0, 0])
    assert (found.stop, found.unreadable) == (stop, False)


def test_memory_that_is_missing_is_said():
    found = walked(UserState(0x1100, 0x10000, 0x10000, None, 8), [0x10800, 0x1200])
    assert len(found.frames) == 2
    assert found.stop == "the frame at 0x10800 is unmapped"
    assert found.unreadable


def test_a_32_bit_process_runs_what_it_may_read():
    state = UserState(0x1100, 0x10000, 0x10000, None, 4)
    mappings = (TEXT._replace(protection=1), STACK)
    found = walked(state, [0x10008, 0x2200, 0, 0], mappings, 4)
    assert [frame.pc for frame in found.frames] == [0x1100, 0x2200]


def test_an_endless_chain_ends():
    words = [word for n in range(LIMIT + 4) for word in (0x10000 + 16 * n + 16, 0x1200)]
    found = walked(UserState(0x1100, 0x10000, 0x10000, None, 8), words)
    assert len(found.frames) == LIMIT + 1
    assert found.stop == "more than 512 frames"
