"""Kernel stacks: against what an independent reader and lldb saw of machines that ran, what XNU
itself printed when it panicked, what was planted, and stacks built for every layout.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from kvmtool import kvm
from kvmtool.cli import cli
from kvmtool.stacks import Stacks
from kvmtool.types import layouts
from kvmtool.xnu.backtrace import LIMIT
from kvmtool.xnu.queues import Report
from tests.builders.macho import thread_state
from tests.builders.running import STACK, Running, symbols
from tests.builders.xnu import CoreShape, has_kaslr
from tests.inputs import DUMPS, oracle, plain_core, real, truth
from tests.test_builders_xnu import crash

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
ARM = ("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel", "machine/armc.corefile")
CORES = {"live": "machine/live.elfcore", "crash": "machine/crash.kdp-core"}


def said(*args, status=0):
    found = CliRunner().invoke(cli, ["backtrace", *args])
    assert found.exit_code == status, found.output
    return found


def stacks_of(*args, status=0):
    return json.loads(said(*args, "--format", "json", status=status).stdout)


def names(stack):
    return [frame["name"] for frame in stack["frames"]]


# machines that ran


@pytest.mark.parametrize("machine", CORES)
def test_every_blocked_thread_of_a_machine_that_ran(machine):
    seen = {thread["addr"]: thread for thread in oracle(machine)["threads"]}
    found = stacks_of("--all", "-N", real(KERNEL), "-M", real(CORES[machine]))
    assert len(found) == len(seen)
    with_stack = 0
    for stack in found:
        true = seen[stack["thread"]]
        if stack["cpu"] is not None:
            continue
        assert names(stack) == true["bt"]
        with_stack += bool(true["bt"])
        if not true["bt"]:
            assert true["kernel_stack"] == "0x0"
            assert stack["continuation"]["name"] == true["continuation"]
            assert stack["stop"] == f"no kernel stack: it goes on at {true['continuation']}"
        else:
            assert stack["stop"] == "end of the chain"
    assert with_stack == 4


def test_the_thread_that_panicked():
    (stack,) = stacks_of("-N", real(KERNEL), "-M", real(CORES["crash"]))
    (true,) = [t for t in oracle("crash")["threads"] if t["addr"] == stack["thread"]]
    assert names(stack) == true["bt"]
    assert (stack["pid"], stack["command"], stack["cpu"]) == (1, "launchd", 0)
    assert stack["stop"] == "a system call: it was in user mode before"
    # XNU's own: "frame : return address", the first of them panic's
    printed = re.findall(r"^(0x\w+) : (0x\w+) ", oracle("crash")["strings"]["_debug_buf"], re.M)
    assert [(frame["fp"], frame["pc"]) for frame in stack["frames"][1:]] == printed


def test_a_running_cpu_goes_by_its_registers_not_by_what_its_thread_had_saved():
    where = ("-N", real(KERNEL), "-M", real(CORES["live"]))
    (stack,) = stacks_of(*where)
    assert stack["tid"] == 2  # the idle thread of CPU 0
    assert names(stack) == [
        "_machine_idle+0x162",  # where QEMU's registers are, in hlt
        "_processor_idle+0xb9",
        "_idle_thread+0x18",
        "_call_continuation+0x17",
    ]
    assert stacks_of("--tid", "2", *where) == stacks_of("--cpu", "0", *where) == [stack]
    assert stacks_of(stack["thread"], *where) == [stack]


def test_saved_registers_of_a_thread_that_ran_are_called_stale():
    (stack,) = stacks_of("-N", real(KERNEL), "-M", real("machine/kaslr.raw"))
    assert stack["origin"].endswith("which may be stale: it was running")
    (true,) = [t for t in oracle("kaslr")["threads"] if t["addr"] == stack["thread"]]
    assert names(stack) == true["bt"][:-1]
    wild = int(true["bt"][-1], 16) + 0xA00000  # the oracle took the slide off every address
    assert stack["stop"] == f"return address {wild:#x} is not the kernel's"


def test_an_arm64_panic_without_any_layout():
    found = said("-N", real(ARM[0]), "-M", real(ARM[1]), "--format", "json")
    assert "its threads are not known" in found.stderr
    (stack,) = json.loads(found.stdout)
    pairs = [(frame["pc"], frame["fp"]) for frame in stack["frames"]]
    with kvm.open(real(ARM[0]), real(ARM[1])) as handle:
        log = handle.dump.container.log().decode()
    printed = re.findall(r"lr: (0x\w+)  fp: (0x\w+)", log)
    start = printed.index((pairs[0][0], "0xfffffff003a53800"))
    assert printed[start + 1][0] == pairs[1][0]
    assert re.search(r"caller (0x\w+)", log).group(1) == pairs[3][0]
    assert names(stack)[:4] == [
        "_DebuggerTrapWithState+0x90",
        "_panic_trap_to_debugger+0x26c",
        "_panic+0x48",
        "_IOFindBSDRoot+0x62c",
    ]


@pytest.mark.parametrize("dump", DUMPS)
def test_the_planted_chain(dump):
    (stack,) = stacks_of("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    planted = truth(dump)["cpu"]
    assert [int(frame["pc"], 16) for frame in stack["frames"]] == planted["backtrace"]
    for frame, function in zip(stack["frames"], planted["functions"], strict=True):
        # an alias at the same address is as good
        assert frame["symbol"].lstrip("_") == function or frame["symbol"] == "hndl_kerntrap"
    assert stack["stop"] == "end of the chain"


def test_lldb_sees_the_same_chain():
    """The instructions are zeros here, so lldb guesses frames in between; none is missing."""
    if shutil.which("lldb") is None:
        pytest.skip("lldb is not installed")
    kernel, core = real(KERNEL), real(CORES["crash"])
    steps = (
        f"target create --no-dependents {kernel} --core {core}",
        f"target modules load --file {kernel} --slide 0",
        "thread backtrace",
    )
    command = ["lldb", "--no-lldbinit", "--batch", *(w for step in steps for w in ("-o", step))]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = re.findall(r"frame #\d+: (0x[0-9a-f]{16}) \S+`(\w+) \+ (\d+)", out)
    (stack,) = stacks_of("-N", kernel, "-M", core)
    ours = [(f["pc"], f["symbol"].removeprefix("_"), str(f["offset"])) for f in stack["frames"]]
    assert seen == ours


# what is asked for


def test_a_process_and_what_is_not_there():
    where = ("-N", real(KERNEL), "-M", real(CORES["live"]))
    assert [stack["tid"] for stack in stacks_of("3", *where)] == [40, 42, 43]
    assert "process 77 not found" in said("77", *where, status=1).stderr
    assert "CPU 4 not found; known are 0" in said("--cpu", "4", *where, status=1).stderr
    assert "thread 4711 not found" in said("--tid", "4711", *where, status=1).stderr
    assert "thread 0x12 not found" in said("0x12", *where, status=1).stderr
    assert "expected a PID" in said("launchd", *where, status=2).stderr
    assert "exclude each other" in said("1", "--cpu", "0", *where, status=2).stderr


def test_the_table_is_for_a_person():
    out = said("--tid", "26", "-N", real(KERNEL), "-M", real(CORES["live"])).stdout.split("\n")
    assert out[0].startswith(
        "thread 26 of kernel_task (0) at 0xffffff8001bb8000, registers it saved"
    )
    assert out[1] == "  0  0xffffff80002dc192  _machine_switch_context+0x162"
    assert out[9] == "     end of the chain"


# stacks that were built

FUNCTIONS = ("_f0", "_f1", "_f2", "_f3", "_f4", "_hndl_alltraps", "_kernel_trap")
ERAS = (
    *("10.4.11 i386", "10.5.8 i386", "10.6.8 i386", "10.6.8 x86_64", "10.9.5 x86_64"),
    *("10.13.6 x86_64", "11.0.1 arm64", "12.5 arm64", "15.5 x86_64", "15.5 arm64"),
)


def machine(name, **more):
    """A built crash of that layout, where a thread of process 71 has no stack yet."""
    layout = layouts.table(name)
    slide = 0xA00000 if has_kaslr(layout) else 0
    arch = name.rpartition(" ")[2]
    built = crash(name, functions=FUNCTIONS, more_symbols=symbols(arch, slide), **more)
    thread, _ = built.process(71)["threads"][0]
    return built, Running(built, layout), thread


def opened(tmp_path, built, name, core=None):
    kernel, dump = tmp_path / "kernel", tmp_path / "core"
    kernel.write_bytes(built.kernel)
    dump.write_bytes(core or built.dump())
    return kvm.open(str(kernel), str(dump), layout=name)


def calls(built, *functions):
    return [built.address(function) + 4 for function in functions]


def walked(handle, thread, report=None):
    return Stacks(handle, report).at(thread)


def symbols_in(stack):
    return [frame.code.symbol for frame in stack.frames]


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout(name, tmp_path):
    built, running, thread = machine(name)
    running.stack(thread, calls(built, "_f0", "_f1", "_f2", "_f3"))
    with opened(tmp_path, built, name) as handle:
        stack = walked(handle, thread)
        others = Stacks(handle).of_process(1)
    assert symbols_in(stack) == ["_f0", "_f1", "_f2", "_f3"]
    assert [frame.code.offset for frame in stack.frames] == [4] * 4
    assert (stack.stop, stack.unreadable) == ("end of the chain", False)
    assert {other.stop for other in others} == {"no kernel stack: and no continuation"}


@pytest.mark.parametrize(
    ("name", "below"),
    [("10.13.6 x86_64", 80), ("10.4.11 i386", 28), ("10.6.8 i386", 24), ("15.5 arm64", 0x80)],
)
def test_what_else_lies_at_the_top_of_a_stack(name, below, tmp_path):
    """An allocation's name since xnu-4570, a link to the last exception's state up to xnu-1228."""
    built, running, thread = machine(name)
    running.stack(thread, calls(built, "_f0", "_f1"), at_top=below)
    with opened(tmp_path, built, name) as handle:
        assert symbols_in(walked(handle, thread)) == ["_f0", "_f1"]


@pytest.mark.parametrize("name", ["12.5 arm64", "15.5 arm64"])
def test_signed_return_addresses_are_stripped(name, tmp_path):
    built, running, thread = machine(name)
    pac = 0x5A << 56  # above the 47 bits of an address, but for bit 55
    f0, f1, f2 = (call & ~(0x7F << 56) | pac for call in calls(built, "_f0", "_f1", "_f2"))
    running.stack(thread, [f0, f1, f2])
    with opened(tmp_path, built, name) as handle:
        assert symbols_in(walked(handle, thread)) == ["_f0", "_f1", "_f2"]


# ends: (what is written where the second frame's pair was, what is said)


@pytest.mark.parametrize("name", ["10.6.8 i386", "10.9.5 x86_64", "15.5 arm64"])
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("circle", "does not lie above"),
        ("itself", "does not lie above"),
        ("odd", "is not aligned"),
        ("outside", "leaves the kernel stack"),
        ("data", "lies in no known text"),
        ("zero", "end of the chain"),
    ],
)
def test_a_chain_that_is_broken_says_how(name, damage, why, tmp_path):
    built, running, thread = machine(name)
    f0, f1, f2, f3 = calls(built, "_f0", "_f1", "_f2", "_f3")
    stack = running.stack(thread, [f0, f1, f2, f3])
    first, second, third = (running.frame(stack, number) for number in range(3))
    pairs = {
        "circle": (first, f2),
        "itself": (second, f2),
        "odd": (third + 1, f2),
        "outside": (stack + STACK + 0x100, f2),
        "data": (third, stack),
        "zero": (third, 0),
    }
    running.words(second, *pairs[damage])
    with opened(tmp_path, built, name) as handle:
        found = walked(handle, thread)
    assert why in found.stop
    assert not found.unreadable
    shown = ["_f0", "_f1"] if damage in ("data", "zero") else ["_f0", "_f1", "_f2"]
    assert symbols_in(found) == shown


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "15.5 arm64"])
def test_a_chain_into_user_mode_says_so(name, tmp_path):
    built, running, thread = machine(name)
    f0, f1, f2 = calls(built, "_f0", "_f1", "_f2")
    stack = running.stack(thread, [f0, f1, f2])
    running.words(running.frame(stack, 0), 0x7FFF5FBFF000, f1)
    with opened(tmp_path, built, name) as handle:
        found = walked(handle, thread)
    assert symbols_in(found) == ["_f0", "_f1"]
    assert found.stop == "the kernel was entered from user mode (frame pointer 0x7fff5fbff000)"


@pytest.mark.parametrize("name", ERAS)
def test_a_page_of_a_stack_that_is_missing(name, tmp_path):
    built, running, thread = machine(name)
    stack = running.stack(thread, calls(built, "_f0", "_f1", "_f2"))
    page = built.memory.page
    low = stack + STACK - 2 * page if page < STACK else stack
    first, second = running.frame(stack, 0), low + 0x100
    running.words(first, second, calls(built, "_f1")[0])
    report = Report()
    with opened(tmp_path, built, name, built.dump(without=[stack + STACK - 8])) as handle:
        found = walked(handle, thread, report)
    assert (found.frames, found.unreadable) == ((), True)
    assert "its saved registers at" in found.stop
    assert "absent" in found.stop or "unmapped" in found.stop
    kernel, core = (str(tmp_path / part) for part in ("kernel", "core"))
    told = said(f"{thread:#x}", "-N", kernel, "-M", core, "--layout", name, status=3)
    assert "its saved registers at" in told.stdout


def test_frames_on_a_page_that_is_missing(tmp_path):
    name = "10.9.5 x86_64"
    built, running, thread = machine(name)
    f0, f1, f2 = calls(built, "_f0", "_f1", "_f2")
    stack = running.stack(thread, [f0, f1, f2])
    saved = stack + STACK - 64
    low = stack + 0x2100
    running.words(saved + 8, low, low)  # rsp and rbp one page below
    running.words(low, running.frame(stack, 0), f1)
    with opened(tmp_path, built, name) as handle:
        assert symbols_in(walked(handle, thread)) == ["_f0", "_f1", "_f1", "_f2"]
    with opened(tmp_path, built, name, built.dump(without=[low])) as handle:
        found = walked(handle, thread)
    assert symbols_in(found) == ["_f0"]
    assert found.unreadable
    assert f"the frame at {low:#x}" in found.stop


def test_a_chain_has_an_end_even_where_it_has_none(tmp_path):
    name = "15.5 x86_64"
    built, running, thread = machine(name)
    f0, f1 = calls(built, "_f0", "_f1")
    stack = running.stack(thread, [f0, f1])
    running.words(stack + STACK - 64 + 8, stack, stack)
    for number in range(STACK // 16 - 8):
        running.words(stack + 16 * number, stack + 16 * (number + 1), f1)
    with opened(tmp_path, built, name) as handle:
        found = walked(handle, thread)
    assert len(found.frames) == LIMIT + 1
    assert found.stop == f"more than {LIMIT} frames"


# traps


def trapped(name, tmp_path, state, framed):
    """f4 called f3, which was interrupted; the handler has a frame for it only if `framed`."""
    built, running, thread = machine(name)
    width = built.memory.width
    handler, trap, f4 = calls(built, "_hndl_alltraps", "_kernel_trap", "_f4")
    stack = running.stack(thread, [trap, handler, f4])
    hit = built.address("_f3") + 7
    entry, below = running.frame(stack, 0), running.frame(stack, 1)
    running.words(entry, below, handler)
    if framed:
        extra = entry + 0x60
        running.words(entry, extra, handler)
        running.words(extra, below, hit)
    running.words(entry + 2 * width, *state(hit, below))
    with opened(tmp_path, built, name) as handle:
        return walked(handle, thread)


STATES = {
    # eip cs eflags; rip cs rflags rsp ss: what the processor pushes, as i386/seg.h selects
    "10.5.8 i386": lambda hit, sp: (hit, 0x08, 0x10246),
    "10.6.8 x86_64": lambda hit, sp: (hit, 0x80, 0x10246, sp, 0x88),
    "10.9.5 x86_64": lambda hit, sp: (hit, 0x08, 0x10246, sp, 0x10),
}


@pytest.mark.parametrize("name", STATES)
def test_what_a_trap_interrupted(name, tmp_path):
    stack = trapped(name, tmp_path, STATES[name], framed=False)
    kinds = [(frame.code.symbol, frame.kind) for frame in stack.frames]
    assert kinds == [
        ("_kernel_trap", "pc"),
        ("_hndl_alltraps", "return"),
        ("_f3", "trap"),
        ("_f4", "return"),
    ]
    assert stack.frames[2].code.offset == 7


@pytest.mark.parametrize("name", ["10.9.5 x86_64", "15.5 arm64"])
def test_a_handler_that_made_a_frame_for_what_it_interrupted(name, tmp_path):
    state = STATES["10.9.5 x86_64"] if "x86" in name else lambda hit, sp: (0, 0)
    stack = trapped(name, tmp_path, state, framed=True)
    kinds = [(frame.code.symbol, frame.code.offset, frame.kind) for frame in stack.frames]
    assert kinds == [
        ("_kernel_trap", 4, "pc"),
        ("_hndl_alltraps", 4, "return"),
        ("_f3", 7, "trap"),
        ("_f4", 4, "return"),
    ]


def test_a_trap_from_user_mode(tmp_path):
    name = "15.5 arm64"
    built, running, thread = machine(name)
    trap, handler = calls(built, "_kernel_trap", "_hndl_alltraps")
    stack = running.stack(thread, [trap, handler])
    running.words(running.frame(stack, 0), running.frame(stack, 1), handler)
    running.words(running.frame(stack, 1), 0x16FDFF000, 0x100003F50)
    with opened(tmp_path, built, name) as handle:
        found = walked(handle, thread)
    assert symbols_in(found) == ["_kernel_trap", "_hndl_alltraps"]
    assert found.stop == "the kernel was entered from user mode, at 0x100003f50"


# registers of CPUs


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_cpus_and_their_threads(name, tmp_path):
    """CPU 0 on its thread's stack; CPU 1 in user mode; CPU 2 with no registers at all."""
    built, running, thread = machine(name, core=CoreShape(cpus=1))
    stack = running.stack(thread, calls(built, "_f0", "_f1", "_f2"))
    (idle, _), (user, _) = built.process(1)["threads"]
    running.processors([idle, user, thread])
    regs = {
        "i386": ("eip", "esp", "ebp"),
        "x86_64": ("rip", "rsp", "rbp"),
        "arm64": ("pc", "sp", "fp"),
    }[built.arch]
    frame = running.frame(stack, 0)
    on_stack = dict(zip(regs, (calls(built, "_f4")[0], frame - 16, frame), strict=True))
    in_user = dict(zip(regs, (0x1000, 0x7000, 0x7010), strict=True))
    if built.arch == "i386":
        in_user["cs"] = 0x17
    core = with_threads(built, [on_stack, in_user, {}])
    with opened(tmp_path, built, name, core) as handle:
        stacks = Stacks(handle)
        first, second = stacks.cpus()
        assert stacks.cpu(1) == second
        assert stacks.of(next(t for t in stacks.threads if t.address == thread)) == first
    assert symbols_in(first) == ["_f4", "_f1", "_f2"]
    assert first.thread.address == thread
    assert first.cpu == 2  # the kernel's number for it, by whose stack it is on
    assert second.frames == ()
    assert second.stop == "it was in user mode, at 0x1000"


def with_threads(built, states):
    """The core with these registers in its LC_THREADs."""
    from tests.builders import macho, xnu

    class Core(xnu._Core):
        def _threads(self, core: macho.MachO) -> None:
            for state in states:
                core.thread(thread_state(built.arch, **state))

    return Core(built, built.shape, ()).write()


def test_no_registers_and_no_processors(tmp_path):
    name = "10.9.5 x86_64"
    built, _, _ = machine(name)
    opened(tmp_path, built, name, with_threads(built, [])).close()
    where = ("-N", str(tmp_path / "kernel"), "-M", str(tmp_path / "core"), "--layout", name)
    assert "name a process, or --all" in said(*where, status=1).stderr


REGISTERS = {
    "i386": ("eip", "esp", "ebp"),
    "x86_64": ("rip", "rsp", "rbp"),
    "arm64": ("pc", "sp", "fp"),
}


def started(tmp_path, name, prepare):
    """The stack of a CPU that runs the thread, with the registers that `prepare` gives."""
    built, running, thread = machine(name)
    stack = running.stack(thread, calls(built, "_f0", "_f1", "_f2"))
    running.processors([thread])
    registers = dict(zip(REGISTERS[built.arch], prepare(built, running, stack), strict=True))
    with opened(tmp_path, built, name, with_threads(built, [registers])) as handle:
        (found,) = Stacks(handle).cpus()
    assert found.thread.address == thread
    return found


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_from_an_interrupts_stack_to_the_threads_own(name, tmp_path):
    """Interrupts have a stack of their own; its first frame leads back, wherever that lies."""

    def prepare(built, running, stack):
        own = running._region.alloc(0x1000, 0x1000)
        frames = own + 0x100, own + 0x140
        running.words(frames[0], frames[1], calls(built, "_f3")[0])
        running.words(frames[1], running.frame(stack, 0), calls(built, "_f4")[0])
        return calls(built, "_kernel_trap")[0], frames[0] - 16, frames[0]

    found = started(tmp_path, name, prepare)
    assert symbols_in(found) == ["_kernel_trap", "_f3", "_f4", "_f1", "_f2"]
    assert found.stop == "end of the chain"


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_frames_far_from_each_other_on_an_unknown_stack(name, tmp_path):
    far = []

    def prepare(built, running, stack):
        own = running._region.alloc(0x1000, 0x1000)
        far.append(own + 0x800000)
        running.words(own + 0x100, far[0], calls(built, "_f3")[0])
        return calls(built, "_f4")[0], own + 0xF0, own + 0x100

    found = started(tmp_path, name, prepare)
    assert symbols_in(found) == ["_f4", "_f3"]
    assert found.stop.startswith(f"frame pointer {far[0]:#x} is too far from")


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.9.5 x86_64", "15.5 arm64"])
def test_a_cpu_that_ran_into_the_weeds(name, tmp_path):
    def prepare(built, running, stack):
        return stack, running.frame(stack, 0) - 16, running.frame(stack, 0)

    found = started(tmp_path, name, prepare)
    assert [frame.code.inside for frame in found.frames] == [False]
    assert "lies in no known text" in found.stop


@pytest.mark.parametrize("name", ERAS)
def test_a_stack_without_saved_registers(name, tmp_path):
    built, running, thread = machine(name)
    stack = running.stack(thread, calls(built, "_f0", "_f1"))
    built.memory.write(stack + STACK - 0x80, bytes(0x80))
    with opened(tmp_path, built, name) as handle:
        found = walked(handle, thread)
    assert found.stop == f"no saved registers at the top of the stack {stack:#x}"
    assert found.frames == ()


def test_registers_saved_elsewhere_are_not_believed(tmp_path):
    name = "15.5 arm64"
    built, running, thread = machine(name)
    stack = running.stack(thread, calls(built, "_f0", "_f1"))
    running.words(thread + layouts.table(name).offset("thread", "machine.kstackptr"), stack - 0x70)
    with opened(tmp_path, built, name) as handle:
        assert "no saved registers" in walked(handle, thread).stop


@pytest.mark.parametrize("size", [0, 0x1234, 1 << 40])
def test_a_stack_size_that_cannot_be_one(size, tmp_path):
    name = "10.9.5 x86_64"
    built, running, thread = machine(name)
    running.stack(thread, calls(built, "_f0", "_f1"))
    running.words(running.variables["_kernel_stack_size"], size)
    with opened(tmp_path, built, name) as handle:
        assert symbols_in(walked(handle, thread)) == ["_f0", "_f1"]


def test_a_thread_whose_page_is_missing(tmp_path):
    name = "10.9.5 x86_64"
    built, _, thread = machine(name)
    at = thread + layouts.table(name).offset("thread", "kernel_stack")
    with opened(tmp_path, built, name, built.dump(without=[at])) as handle:
        stacks = Stacks(handle, Report())
        cut = [stacks.of(t) for t in stacks.threads if t.address == thread]
    for stack in cut:
        assert stack.unreadable
        assert stack.stop.startswith("its stack is not known: ")
    assert cut
