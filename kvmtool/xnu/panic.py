"""Why a kernel died: its panic string, the log it wrote meanwhile, and what that log says.

Source: osfmk/kern/debug.c (panicstr, debug_buf, debug_buf_ptr, debug_buf_base, panic_info),
osfmk/kern/debug.h (embedded_panic_header, macos_panic_header), osfmk/i386/AT386/model_dep.c and
osfmk/arm/model_dep.c (what is printed), xnu-792..11417.
"""

from __future__ import annotations

import re
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.xnu.queues import Report

BUFFER_LIMIT = 1 << 22  # bytes; EXTENDED_DEBUG_BUF_SIZE is 1.25 MiB
_STRING_LIMIT = 1 << 12
# functions that run only in a panic
FUNCTIONS = (
    *("_panic", "_panic_context", "_panic_with_options", "_panic_with_thread_context"),
    *("_panic_trap_to_debugger", "_panic_with_thread_kernel_state"),
)

# the magic of each kind of header; its flags, lowest bit first
_EMBEDDED, _MACOS = 0x46554E4B, 0x44454544
_FLAGS = {
    _EMBEDDED: (
        *("coredump complete", "stackshot succeeded", "stackshot failed: debugger sync"),
        *("stackshot failed: error", "stackshot failed: incomplete", "stackshot failed: nested"),
        *("nested panic", "button reset panic", "coprocessor initiated panic", "coredump failed"),
    ),
    _MACOS: (
        *("nested panic", "coprocessor initiated panic", "stackshot succeeded"),
        *("stackshot data compressed", "stackshot failed: debugger sync"),
        *("stackshot failed: error", "stackshot failed: incomplete", "stackshot failed: nested"),
        *("coredump complete", "coredump failed", "stackshot kernel only"),
    ),
}
# both are packed: after the magic, the CRC and the version macOS's has four bytes to spare
_HEADS = {_EMBEDDED: Struct("<3IQ4I"), _MACOS: Struct("<3I4xQ4I")}
_MACOS_STACKSHOT = 2  # the version of macOS's that says where the stackshot is: xnu-6153 (10.15)


class Header(NamedTuple):
    """A panic header (10.13 on) at `address`: its `version` and `flags`, the known ones in words.

    The panic log lies `log_offset` bytes after it and is `log_length` bytes long, the `stackshot`
    (first address and end; None if there is none) in the middle of it.
    """

    address: int
    version: int
    flags: int
    words: tuple[str, ...]
    log_offset: int
    log_length: int
    stackshot: tuple[int, int] | None


class Log(NamedTuple):
    """The text of a panic log, and where it was found."""

    text: str
    origin: str


class Said(NamedTuple):
    """What a panic log says; None where it does not. All of it is the log's claim.

    `message` is the panic string as it was printed, `caller` and `thread` are addresses, `uptime`
    is in nanoseconds, `frames` are (frame, return address), innermost first.
    """

    message: str | None = None
    cpu: int | None = None
    caller: int | None = None
    pid: int | None = None
    command: str | None = None
    thread: int | None = None
    tid: int | None = None
    uptime: int | None = None
    osversion: str | None = None
    boot_args: str | None = None
    frames: tuple[tuple[int, int], ...] = ()


def panic_string(target: Target) -> str | None:
    """What panic() was called with: the format, before its arguments. None if it was not.

    Raises `FaultError`.
    """
    for name in ("_debugger_panic_str", "_panicstr"):  # from 10.13 on, before
        pointer = target.variable(name)
        if pointer:
            return target.text(pointer, _STRING_LIMIT)
    return None


def debug_log(target: Target, report: Report) -> Log | None:
    """What the kernel wrote into its panic buffer; None if nothing, or if it cannot be one.

    The stackshot that may lie in the middle of it is left out. Memory of it that is missing goes
    into `report`. Raises `FaultError` where it is not known where the buffer lies.
    """
    end = target.variable("_debug_buf_ptr")
    start = target.variable("_debug_buf_base")  # xnu-4570 (10.13) on: behind the header
    if start is None:
        found = target.symbols.get("_debug_buf")
        start = None if found is None else found.address
    if not start or not end or not 0 < end - start <= BUFFER_LIMIT:
        return None
    header = panic_header(target)
    parts = []
    for first, last in _around(start, end, header.stackshot if header is not None else None):
        for piece in target.memory.read_pieces(first, last - first):
            if piece.data is None:
                reason = f"{piece.size:#x} bytes at {piece.address:#x} are {piece.reason}"
                report.stop("panic log", piece.address - start, reason)
            else:
                parts.append(piece.data)
    text = b"".join(parts).replace(b"\0", b"").decode("utf-8", "surrogateescape")
    return Log(text, f"debug_buf at {start:#x}") if text.strip() else None


def _around(start: int, end: int, hole: tuple[int, int] | None) -> list[tuple[int, int]]:
    """What is left of `start` to `end` without the `hole`: the stackshot is no text."""
    if hole is None or not start <= hole[0] < hole[1] <= end:
        return [(start, end)]
    return [(start, hole[0]), (hole[1], end)]


def panic_header(target: Target) -> Header | None:
    """The header before the panic log, from 10.13 on; None if there is none, or no memory of it."""
    try:
        address = target.variable("_panic_info")
        if not address:
            return None
        magic = target.unsigned(address, "I")
        head = _HEADS.get(magic)
        if head is None:
            return None
        record = head.unpack(target.memory.read(address, head.size))
    except FaultError:
        return None
    _, _, version, flags, offset, length, shot, size = record
    has_shot = magic == _EMBEDDED or version >= _MACOS_STACKSHOT
    stackshot = (address + shot, address + shot + size) if has_shot and size else None
    words = tuple(word for bit, word in enumerate(_FLAGS[magic]) if flags >> bit & 1)
    return Header(address, version, flags, words, offset, length, stackshot)


_CALL = re.compile(r"panic\(cpu (\d{1,4}) caller (0x[0-9a-fA-F]{1,16})\): ")
# what follows the panic string, on a line of its own
_AFTER = re.compile(
    r"\n(?:Backtrace|Debugger message|Panicked task|Panicked thread|Device: |Latency |"
    r"BSD process name|Process name|Debugger called|PreoslogExtra|Memory ID|Kernel version)"
)
_FRAME_X86 = re.compile(r"^(0x[0-9a-fA-F]{6,16}) : (0x[0-9a-fA-F]{6,16})\b", re.MULTILINE)
_FRAME_ARM = re.compile(r"lr: (0x[0-9a-fA-F]{6,16})  fp: (0x[0-9a-fA-F]{6,16})")
_TASK = re.compile(
    r"Panicked task (0x[0-9a-fA-F]{1,16}): [^\n]{0,100}?pid (\d{1,9}): ([^\n]{1,64})"
)
_THREAD = re.compile(
    r"Panicked thread: (0x[0-9a-fA-F]{1,16}), backtrace: 0x[0-9a-fA-F]{1,16}, tid: (\d{1,19})"
)
_PROCESS = re.compile(
    r"[Pp]rocess name corresponding to current thread(?: \(0x[0-9a-fA-F]{1,16}\))?: ([^\n]{1,64})"
)
_UPTIME = re.compile(r"System uptime in nanoseconds: (\d{1,20})")
_EPOCH = re.compile(r"(Boot|Calendar) *: 0x([0-9a-fA-F]{1,16}) 0x([0-9a-fA-F]{1,8})")
_OSVERSION = re.compile(r"OS version: *\n?([^\n]{1,64})")
_BOOT_ARGS = re.compile(r"Boot args: ([^\n]{0,1024})")


def read_log(text: str) -> Said:
    """What the panic log `text` says."""
    call = _CALL.search(text)
    message = None
    if call is not None:
        after = _AFTER.search(text, call.end())
        message = text[call.end() : after.start() if after else None].strip("\n")
    task, thread = _TASK.search(text), _THREAD.search(text)
    process, osversion, args = (p.search(text) for p in (_PROCESS, _OSVERSION, _BOOT_ARGS))
    name = task.group(3) if task else process.group(1) if process else None
    pairs = [(fp, pc) for fp, pc in _FRAME_X86.findall(text)]
    pairs = pairs or [(fp, pc) for pc, fp in _FRAME_ARM.findall(text)]
    return Said(
        message=message,
        cpu=int(call.group(1)) if call else None,
        caller=int(call.group(2), 16) if call else None,
        pid=int(task.group(2)) if task else None,
        command=name.strip() if name else None,
        thread=int(thread.group(1), 16) if thread else None,
        tid=int(thread.group(2)) if thread else None,
        uptime=_uptime(text),
        osversion=osversion.group(1).strip() if osversion else None,
        boot_args=args.group(1).strip() if args else None,
        frames=tuple((int(fp, 16), int(pc, 16)) for fp, pc in pairs),
    )


def _uptime(text: str) -> int | None:
    """Nanoseconds: as printed on Intel, from the times of boot and panic on arm64."""
    found = _UPTIME.search(text)
    if found is not None:
        return int(found.group(1))
    epoch = {name: int(s, 16) * 10**6 + int(us, 16) for name, s, us in _EPOCH.findall(text)}
    if len(epoch) < 2 or epoch["Calendar"] < epoch["Boot"]:
        return None
    return (epoch["Calendar"] - epoch["Boot"]) * 1000
