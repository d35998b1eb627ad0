"""backtrace: the kernel stacks of threads and CPUs."""

from __future__ import annotations

import os
import sys
from itertools import starmap
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, finish, opened
from kvmtool.cli.outside import missing_kexts
from kvmtool.cli.params import core_argument, format_option, kernel_options
from kvmtool.cli.render import Address, Column, Named, render, visible
from kvmtool.cli.words import complete_pids
from kvmtool.errors import NotFoundError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kexts import Code
    from kvmtool.stacks import Stacks
    from kvmtool.xnu.backtrace import Backtrace, Frame
    from kvmtool.xnu.thread import Thread
    from kvmtool.xnu.user_stack import UserStack

LISTING = Listing(
    "backtrace",
    "stacks",
    (
        Column("pid", "PID", "number"),
        Column("command", "COMMAND"),
        Column("tid", "TID", "number"),
        Column("thread", "THREAD", "address"),
        Column("cpu", "CPU", "number"),
        Column("origin", "REGISTERS FROM"),
        Column("frames", "FRAMES", "list"),
        Column("stop", "ENDS"),
        Column("unreadable", "CUT"),
        Column("continuation", "CONTINUES AT"),
        Column("user", "USER"),
    ),
    (),
)


def frame_of(frame: Frame) -> dict[str, Any]:
    """One frame as JSON has it; `offset` counts from the symbol."""
    return {
        "pc": Address(frame.pc),
        "fp": None if frame.fp is None else Address(frame.fp),
        "kind": frame.kind,
        "name": str(frame.code),
        "symbol": frame.code.symbol,
        "offset": frame.code.offset,
        "kext": frame.code.kext,
    }


def user_of(stack: UserStack | None) -> dict[str, Any] | None:
    """A stack in a process as JSON has it; null where there is none."""
    if stack is None:
        return None
    frames = [
        {
            "pc": Address(frame.pc),
            "fp": None if frame.fp is None else Address(frame.fp),
            "kind": frame.kind,
            "image": frame.image,
            "offset": frame.offset,
        }
        for frame in stack.frames
    ]
    return {"frames": frames, "stop": stack.stop, "unreadable": stack.unreadable}


def row_of(stack: Backtrace, user: UserStack | None = None) -> dict[str, Any]:
    """A stack under the names that JSON has."""
    thread, goes_on = stack.thread, stack.continuation
    return {
        "pid": thread and thread.pid,
        "command": thread and thread.command,
        "tid": thread and thread.tid,
        "thread": thread and thread.address,
        "cpu": stack.cpu,
        "origin": stack.origin or None,
        "frames": [frame_of(frame) for frame in stack.frames],
        "stop": stack.stop,
        "unreadable": stack.unreadable,
        "continuation": _continuation(thread, goes_on),
        "user": user_of(user),
    }


def _continuation(thread: Thread | None, code: Code | None) -> Any:
    if thread is not None and isinstance(thread.continuation, Unreadable):
        return thread.continuation
    return code and Named(code.address, str(code))


def frame_lines(frames: Iterable[Frame], width: int, indent: str = "") -> Iterator[str]:
    """The frames for a person, innermost first; addresses have `width` bytes."""
    for number, frame in enumerate(frames):
        mark = "  <- interrupted here" if frame.kind == "trap" else ""
        name = visible(str(frame.code))
        yield f"{indent}{number:3}  {frame.pc:#0{2 + 2 * width}x}  {name}{mark}"


def thread_words(thread: Thread) -> str:
    """A thread for a person: its id and address, and whose it is, as far as that can be read."""
    name = "thread" if not isinstance(thread.tid, int) else f"thread {thread.tid}"
    owner = f" of {thread.command}" if isinstance(thread.command, str) else ""
    pid = f" ({thread.pid})" if isinstance(thread.pid, int) else ""
    return f"{name}{owner}{pid} at {thread.address:#x}"


def _user_lines(stack: UserStack, width: int) -> Iterator[str]:
    yield "     in its process:"
    for number, frame in enumerate(stack.frames):
        name = f"  {os.path.basename(frame.image)}+{frame.offset:#x}" if frame.image else ""
        yield visible(f"{number:3}  {frame.pc:#0{2 + 2 * width}x}{name}")
    yield f"     {visible(stack.stop)}"


def _lines(stack: Backtrace, width: int, user: UserStack | None = None) -> Iterator[str]:
    """One stack for a person."""
    words = [f"CPU {stack.cpu}"] if isinstance(stack.cpu, int) else []
    if stack.thread is not None:
        words.append(thread_words(stack.thread))
    if stack.origin:
        words.append(stack.origin)
    yield visible(", ".join(words))
    yield from frame_lines(stack.frames, width)
    yield f"     {visible(stack.stop)}"
    if user is not None:
        yield from _user_lines(user, width)


def _chosen(
    stacks: Stacks, which: str | None, cpu: int | None, tid: int | None, every: bool
) -> Iterable[Backtrace]:
    if every:
        return (stacks.of(thread) for thread in stacks.threads)
    if cpu is not None:
        return [stacks.cpu(cpu)]
    if tid is not None:
        return [stacks.by_id(tid)]
    if which is None:
        return _cpus(stacks)
    number = int(which, 0)
    return [stacks.at(number)] if which.lower().startswith("0x") else stacks.of_process(number)


def _cpus(stacks: Stacks) -> list[Backtrace]:
    found = list(stacks.cpus())
    if not found:
        lost = (t.cpu.reason for t in stacks.threads if isinstance(t.cpu, Unreadable))
        why = next((f" ({reason})" for reason in lost), "")
        hint = f"the core has none, nor has the kernel's list of processors{why}: "
        hint += "name a process, or --all"
        raise NotFoundError("registers", "of a CPU", hint=hint)
    return found


def _parts_missing(thread: Thread) -> bool:
    shown = (thread.pid, thread.command, thread.tid, thread.cpu, thread.continuation)
    return any(isinstance(field, Unreadable) for field in shown)


def _check(which: str | None, *others: object) -> None:
    """Raises `click.UsageError` for what cannot be, or for two of them."""
    if sum(other is not None and other is not False for other in (which, *others)) > 1:
        raise click.UsageError("PID, THREAD, --cpu, --tid and --all exclude each other")
    if which is None:
        return
    try:
        int(which, 0)
    except ValueError:
        raise click.BadParameter(
            f"{which!r}: expected a PID, or the address of a thread (0x…)",
            param_hint="PID|THREAD",
        ) from None


@click.command(cls=Sectioned)
@click.argument("which", required=False, metavar="[PID|THREAD]", shell_complete=complete_pids)
@click.option("--cpu", type=int, metavar="N", help="What this CPU was doing.")
@click.option("--tid", type=int, metavar="N", help="The thread with this id.")
@click.option("--all", "every", is_flag=True, help="Every thread.")
@click.option("--user", is_flag=True, help="The stacks in their processes, too.")
@format_option
@kernel_options
@core_argument
def backtrace(
    where: Where,
    which: str | None,
    cpu: int | None,
    tid: int | None,
    every: bool,
    user: bool,
    format: str,
) -> None:
    """Print kernel stacks: of each CPU, of a process's threads, or of the THREAD at an address.

    A CPU's registers come from the core, as far as it has them; those of a thread that had given up
    its CPU from the top of its kernel stack. A thread without a stack goes on at its continuation.
    Each stack says why it ends; where memory is missing that would go on with it the exit status is
    3. The symbol of a return address is that of the call before it.

    --user adds where each thread was in its process, by the registers it entered the kernel with:
    addresses, and which file lies there. Callers need the process's memory, and frame pointers.

    \b
    Example:
      kvmtool backtrace -N mach_kernel -M core
      kvmtool backtrace 1 --user -N mach_kernel -M core
      kvmtool backtrace --all -N mach_kernel -M core --format jsonl
    """
    from kvmtool.stacks import Stacks
    from kvmtool.user_stacks import UserStacks
    from kvmtool.xnu.queues import Report

    _check(which, cpu, tid, every)
    kvm = opened(where)
    report = Report()
    stacks = Stacks(kvm, report)
    users = UserStacks(kvm, stacks, report) if user else None
    cut, strange = 0, False

    def counted() -> Iterator[tuple[Backtrace, UserStack | None]]:
        nonlocal cut, strange
        for stack in _chosen(stacks, which, cpu, tid, every):
            thread = stack.thread
            mine = None if users is None else users.of(thread)
            cut += stack.unreadable or (thread is not None and _parts_missing(thread))
            cut += mine is not None and mine.unreadable
            strange = strange or stack.textless
            yield stack, mine

    if format == "table":
        for number, (stack, mine) in enumerate(counted()):
            lines = _lines(stack, kvm.arch.pointer_size, mine)
            sys.stdout.write(("\n" if number else "") + "\n".join(lines) + "\n")
    else:
        render(starmap(row_of, counted()), LISTING.columns, format)
    if strange:  # it may be the text of a kext that nobody knows
        missing_kexts(kvm, report)
    finish(report, cut, LISTING.what)
