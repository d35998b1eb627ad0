"""panic: why this Mac died."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvmtool.cli.backtrace import LISTING as STACKS
from kvmtool.cli.backtrace import frame_lines, frame_of, row_of, thread_words
from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, finish, opened
from kvmtool.cli.params import core_argument, format_option, kernel_options
from kvmtool.cli.render import Address, Column, Named, render_one, visible
from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.backtrace import Frame
from kvmtool.xnu.panic import Header, Log, Said

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.backtrace import Backtrace
    from kvmtool.xnu.queues import Report

LISTING = Listing(
    "panic",
    "answers",
    (
        Column("panicked", "PANICKED"),
        Column("evidence", "EVIDENCE", "list"),
        Column("message", "MESSAGE"),
        Column("format", "FORMAT"),
        Column("caller", "CALLER"),
        *(column for column in STACKS.columns if column.name in ("pid", "command", "tid")),
        Column("thread", "THREAD", "address"),
        Column("cpu", "CPU", "number"),
        Column("version", "KERNEL"),
        Column("osversion", "OSVERSION"),
        Column("uptime", "UPTIME", "number"),
        Column("boot_args", "BOOT ARGS"),
        Column("flags", "FLAGS", "list"),
        Column("kexts", "KEXTS", "list"),
        Column("backtrace", "BACKTRACE"),
        Column("printed", "PRINTED", "list"),
        Column("log", "LOG"),
        Column("log_origin", "LOG FROM"),
    ),
    (),
)


class _Found(NamedTuple):
    """What the dump holds of a panic. `printed` is the stack as the log has it."""

    evidence: list[str]
    format: Any
    header: Header | None
    log: Log | None
    said: Said
    stack: Backtrace | None
    printed: list[Frame]
    unknown: Unreadable | None = None  # why it cannot be told whether it panicked


def _container_log(kvm: Kvm, report: Report) -> Log | None:
    """The panic log of a corefile."""
    container = getattr(kvm.dump, "container", None)
    if container is None:
        return None
    try:
        text = container.log().decode("utf-8", "surrogateescape")
    except UnsupportedError as encrypted:
        report.stops.append(str(encrypted))
        return None
    return Log(text, f"{container.source.name}: panic log") if text.strip() else None


def _look(kvm: Kvm, report: Report) -> _Found:
    """Everything there is of a panic; a corefile's log is an answer even without symbols."""
    from kvmtool.stacks import Stacks
    from kvmtool.xnu import panic as xnu

    outside = _container_log(kvm, report)
    try:
        target = kvm.nearest_target()
        stacks = Stacks(kvm, report)
    except NotFoundError as missing:
        if outside is None:
            raise
        report.notes.append(f"only the panic log was read: {missing}")
        said = xnu.read_log(outside.text)
        return _Found(_evidence(None, said, None), None, None, outside, said, None, [])
    try:
        string: Any = xnu.panic_string(target)
    except FaultError as fault:
        string = Unreadable.of(fault)
    log = _memory_log(kvm, report, outside) or outside
    said = xnu.read_log(log.text) if log is not None else Said()
    stack = stacks.panicking(said.cpu, said.thread)
    printed = [
        Frame(pc, fp, stacks.unwinder.code(pc, returns=True), "return") for fp, pc in said.frames
    ]
    evidence = _evidence(string, said, stack)
    unknown = None
    if not evidence and stack is not None:  # it is the panic's only if there was one
        unknown = Unreadable(f"the stack: {stack.stop}") if stack.unreadable else None
        stack = None
    header = xnu.panic_header(target)
    return _Found(evidence, string, header, log, said, stack, printed, unknown)


def _memory_log(kvm: Kvm, report: Report, outside: Log | None) -> Log | None:
    """The log in the kernel's own buffer; gaps in it are told unless the container has it whole."""
    from kvmtool.xnu.panic import debug_log
    from kvmtool.xnu.queues import Report

    own = Report()
    try:
        log = debug_log(kvm.nearest_target(), own)
    except FaultError as fault:
        log = None
        own.stops.append(f"panic log: {fault}")
    if own.partial and outside is not None:
        return None
    report.stops.extend(own.stops)
    return log


def _panicked(found: _Found) -> Any:
    if found.evidence:
        return True
    missing = found.format if found.format is not None else found.unknown
    return missing if missing is not None else False


def _evidence(string: Any, said: Said, stack: Backtrace | None) -> list[str]:
    from kvmtool.xnu.panic import FUNCTIONS

    found = []
    if isinstance(string, str):
        found.append("panic string")
    if said.message is not None:
        found.append("panic log")
    if stack is not None and any(frame.code.symbol in FUNCTIONS for frame in stack.frames):
        found.append("stack")
    return found


def _kexts(kvm: Kvm, frames: Iterable[Frame]) -> list[dict[str, Any]]:
    """The kexts that code in `frames` belongs to, in order."""
    from kvmtool.macho import uuid_text

    names = dict.fromkeys(frame.code.kext for frame in frames if frame.code.kext is not None)
    return [
        {
            "identifier": kext.identifier,
            "version": kext.version,
            "uuid": None if kext.uuid is None else uuid_text(kext.uuid),
            "address": Address(kext.address),
        }
        for name in names
        for kext in (kvm.kexts.find(name),)
    ]


def _called_from(kvm: Kvm, address: int) -> str:
    """A return address, by the symbol of the call before it."""
    code = kvm.code_at(address - 1)
    return str(code._replace(address=address, offset=code.offset + 1))


def _else(said: Any, other: Any) -> Any:
    """What the log says, or if it says nothing, the other."""
    return other if said is None else said


def record_of(kvm: Kvm, found: _Found) -> dict[str, Any]:
    """The answer under the names that JSON has."""
    said, stack = found.said, found.stack
    thread = stack.thread if stack is not None else None
    caller, lost = said.caller, found.unknown
    frames = [*(stack.frames if stack is not None else ()), *found.printed]
    return {
        # without the string a panic can be shown, but not denied
        "panicked": _panicked(found),
        "evidence": found.evidence,
        "message": said.message,
        "format": found.format,
        "caller": caller and Named(caller, _called_from(kvm, caller)),
        "pid": thread.pid if thread is not None else _else(said.pid, lost),
        "command": thread.command if thread is not None else _else(said.command, lost),
        "tid": thread.tid if thread is not None else _else(said.tid, lost),
        "thread": thread.address if thread is not None else _else(said.thread, lost),
        "cpu": _else(said.cpu, lost if stack is None else stack.cpu),
        "version": kvm.version,
        "osversion": said.osversion,
        "uptime": said.uptime,
        "boot_args": said.boot_args,
        "flags": list(found.header.words) if found.header is not None else None,
        "kexts": _kexts(kvm, frames),
        "backtrace": lost
        if stack is None
        else {
            key: value
            for key, value in row_of(stack).items()
            if key in ("origin", "frames", "stop", "unreadable")
        },
        "printed": [frame_of(frame) for frame in found.printed],
        "log": None if found.log is None else found.log.text,
        "log_origin": None if found.log is None else found.log.origin,
    }


def _lines(kvm: Kvm, found: _Found, record: dict[str, Any]) -> Iterator[str]:
    """The answer for a person."""
    width = kvm.arch.pointer_size
    stack = found.stack
    for label, text in _facts(found, record):
        yield f"{label:10}{visible(text)}"
    if stack is not None:
        yield ""
        yield f"stack, by {visible(stack.origin or 'nothing')}:"
        yield from frame_lines(stack.frames, width)
        yield f"     {visible(stack.stop)}"
    shown = {frame.pc for frame in stack.frames} if stack is not None else set()
    if any(frame.pc not in shown for frame in found.printed):
        yield ""
        yield "stack, as it was printed:"
        yield from frame_lines(found.printed, width)
    if found.log is not None:
        yield ""
        yield f"log, from {visible(found.log.origin)}:"
        for line in found.log.text.rstrip("\n").split("\n"):
            yield "  " + visible(line).replace("\\t", "\t")


def _facts(found: _Found, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    evidence = ", ".join(found.evidence)
    string = record["format"]
    known = f"yes ({evidence})" if evidence else "no: no panic string, no panic log"
    yield "panicked", known if record["panicked"] in (True, False) else "not known"
    if record["message"] is not None:
        yield "message", record["message"].replace("\n", " ")
    elif string is not None:
        text = f"? ({string.reason})" if isinstance(string, Unreadable) else f"{string} (format)"
        yield "message", text
    if record["caller"] is not None:
        yield "caller", f"{record['caller']:#x} {record['caller'].text}"
    thread = found.stack.thread if found.stack is not None else None
    if thread is not None:
        yield "thread", thread_words(thread)
    elif found.said.command is not None:
        pid = "" if found.said.pid is None else f" ({found.said.pid})"
        yield "process", f"{found.said.command}{pid}, says the log"
    elif found.unknown is not None:
        yield "process", f"? ({found.unknown.reason})"
    if isinstance(record["cpu"], int):
        yield "cpu", str(record["cpu"])
    if record["version"] is not None:
        yield "kernel", record["version"]
    if record["osversion"] is not None:
        yield "os", record["osversion"]
    if record["uptime"] is not None:
        yield "uptime", f"{record['uptime'] / 1e9:.1f} s"
    if record["flags"]:
        yield "flags", ", ".join(record["flags"])
    if found.evidence:
        kexts = (f"{kext['identifier']} {kext['version'] or ''}" for kext in record["kexts"])
        yield "kexts", ", ".join(map(str.strip, kexts)) or "none on the stack"


@click.command(cls=Sectioned)
@format_option
@kernel_options
@core_argument
def panic(where: Where, format: str) -> None:
    """Say why this Mac died: the panic string, who called panic and in which process, the stack.

    The stack comes from the registers in the core; the one that the kernel printed into its log,
    with symbols, is shown beside it. The log is the kernel's own buffer, else that of a corefile.
    The exit status is 0 also for a kernel that had not panicked: PANICKED is then no, false in
    json. UPTIME is nanoseconds there.

    \b
    Example:
      kvmtool panic -N mach_kernel -M core
    """
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    report = Report()
    found = _look(kvm, report)
    record = record_of(kvm, found)
    if format == "table":
        sys.stdout.writelines(f"{line.rstrip()}\n" for line in _lines(kvm, found, record))
    else:
        render_one(record, format, columns=LISTING.columns)
    cut = found.unknown is not None or (found.stack is not None and found.stack.unreadable)
    finish(report, int(cut or isinstance(found.format, Unreadable)), LISTING.what)
