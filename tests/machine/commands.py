"""Every command on the machine: what it must answer is what the kernel said of itself.

These run with the release's whole layout named, as for a kernel without types: the compiler's DWARF
knows the members alone that the mini kernel fills in. What has no structures there must be said in
a line.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.cli import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.machine.running import Answer
    from tests.machine.vm import Vm

# of no kernel's memory: a sample, a list of files, a server (mounted.py has it), a line to type,
# words for a shell, what is installed
ELSEWHERE = {"demo", "kernels", "mount", "dd", "completion", "doctor"}
JSON = ("--format", "json")
# the modes of fg_flag in lsof's letters
_MODES = (None, "r", "w", "u")
_PAGES = ("free", "active", "inactive", "speculative", "wired")
_HOST = ("version", "osversion", "ostype", "osrelease", "hostname", "hz", "max_mem", "max_cpus")
_HOST_COUNTS = ("physical_cpu", "logical_cpu")
_ZONE = ("name", "address", "elem_size", "alloc_size", "cur_size", "max_size", "in_use")
_THREAD = ("address", "pid", "th_state", "pri", "base", "task", "kernel_stack", "active")
# what a command is given besides --format; "" is a path that does not exist yet
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "args": (),
    "backtrace": ("--all",),
    "convert": ("--to", "macho-core", ""),
    "extract": ("kernel", ""),
    "nlist": ("_version",),
    "print": ("nprocs",),
    "python": ("-c", "print(kvm)"),
    "read": ("_version", "16"),
    "search": ("but it has its structures",),
    "symbol": ("_version",),
    "type": ("proc",),
    "vmmap": ("202",),
    "vtop": ("_version",),
    "walk": ("allproc", "--container", "proc", "--next", "p_list", "-o", "p_pid"),
}
_TEXT_ONLY = {"convert", "extract", "python"}  # no --format
# what asks for no structure, so that it need not be run again with other types
UNTYPED = {
    *("convert", "devsw", "dmesg", "extract", "info", "nlist", "python", "read", "regions"),
    "search",
    *("symbol", "symbols", "type", "types", "vtop"),
}


class Wanted(NamedTuple):
    """`look` finds in an answer what must equal `expected`."""

    title: str
    arguments: tuple[str, ...]
    expected: Any
    look: Callable[[Answer], Any]


def wanted(
    vm: Vm, symbols: Sequence[tuple[int, str]], kernel_only: bool = False
) -> Iterator[Wanted]:
    """Every command; `symbols` are the kernel's in memory, as llvm-nm has them, moved.

    `kernel_only` says that the form holds no memory of processes.
    """
    known = {each.arguments[0]: each for each in _known(vm, symbols)}
    if kernel_only:
        known["args"] = Wanted("args", ("args", *JSON), (3, True), _no_arguments)
    for name in COMMANDS:
        if name in ELSEWHERE:
            continue
        if name in known:
            yield known.pop(name)
        else:
            given = ("--format", "json") if name not in _TEXT_ONLY else ()
            yield Wanted(name, (name, *_ARGUMENTS.get(name, ()), *given), "clear", clear)
    if known:
        raise AssertionError(f"no command {', '.join(known)}")


def prepared(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The arguments with a fresh path for an empty one."""
    if "" not in arguments:
        return arguments
    path = os.path.join(tempfile.gettempdir(), f"kvmtool-machine-{os.getpid()}")
    if os.path.lexists(path):
        os.unlink(path)
    return tuple(each or path for each in arguments)


def clear(answer: Answer) -> str:
    """ "clear" for an answer, or for a refusal of one line and nothing else."""
    lines = answer.err.splitlines()
    if "Traceback" in answer.err:
        return f"a traceback: {lines[-1]}"
    if any(not line.startswith("kvmtool: ") for line in lines):
        return f"more than its own lines: {answer.err}"
    if answer.status == 1:
        return "clear" if len(lines) == 1 and not answer.out else f"not one line: {answer.err}"
    if answer.status == 3:
        return "clear" if lines else "nothing says why the status is 3"
    return "clear" if answer.status == 0 else f"exit status {answer.status}: {answer.err}"


def _known(vm: Vm, symbols: Sequence[tuple[int, str]]) -> Iterator[Wanted]:
    """The commands whose answers the kernel told."""
    yield from _processes(vm)
    yield from _tables(vm)
    yield from _machine(vm)
    yield _backtrace(vm, symbols)
    yield _check()


def _rows(*names: str) -> Callable[[Answer], Any]:
    """Of a table in JSON the columns `names`."""
    return lambda answer: [{name: row[name] for name in names} for row in json.loads(answer.out)]


def _only(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _processes(vm: Vm) -> Iterator[Wanted]:
    processes = vm.said("process")
    arguments = [_arguments(told) for told in processes]
    yield Wanted("args", ("args", *JSON), arguments, _rows("pid", "path", "args", "env"))
    listed = [{"p_pid": told["pid"]} for told in processes if told["task"] is not None]
    yield Wanted("walk", ("walk", *_ARGUMENTS["walk"], *JSON), listed, _rows("p_pid"))
    yield Wanted(
        "print", ("print", "nprocs", *JSON), len(processes), lambda a: json.loads(a.out)["value"]
    )
    threads = sorted(
        (
            {**_only(told, _THREAD[:-1]), "active": True, "goes on": told["continuation"]}
            | {"waits": told["wait_event"]}
            for told in vm.said("thread")
        ),
        key=lambda row: str(row["address"]),
    )
    yield Wanted("threads", ("threads", *JSON), threads, _threads)
    yield Wanted("files", ("files", *JSON), [_file(told) for told in vm.said("file")], _files)


def _arguments(told: dict[str, Any]) -> dict[str, Any]:
    """A process's strings as `args` says them: exec keeps the path, - for / (write_arguments)."""
    strings, argc = told["strings"], told.get("argc", 0)
    path = strings[0].replace("-", "/") if strings else None
    return {"pid": told["pid"], "path": path, "args": strings[:argc], "env": strings[argc:]}


def _no_arguments(answer: Answer) -> tuple[int, bool]:
    """The status, and whether every process that has a task says that its strings are missing."""
    rows = json.loads(answer.out)
    return answer.status, all("unreadable" in row["args"] for row in rows if row["args"] != [])


def _threads(answer: Answer) -> list[dict[str, Any]]:
    found = [
        _only(row, _THREAD)
        | {"goes on": _address(row["continuation"]), "waits": _address(row["wait_event"])}
        for row in json.loads(answer.out)
    ]
    return sorted(found, key=lambda row: str(row["address"]))


def _address(value: Any) -> Any:
    return value["address"] if isinstance(value, dict) else value


def _file(told: dict[str, Any]) -> dict[str, Any]:
    """What was planted as `files` says it."""
    row = {"pid": told["pid"], "fd": told["fd"]}
    if "vnode" in told:
        kind = "DIR" if told["fd"] == "cwd" else "REG"
        return row | {"type": kind, "name": told["path"], "mode": None, "offset": None}
    row |= {"mode": _MODES[told["flag"]], "offset": told["offset"], "cloexec": told["cloexec"]}
    row |= {"data": told["data"], "slot": "open"}
    if "peer" in told:
        return row | {"type": "PIPE", "name": f"->{told['peer']}"}
    return row | {"type": "REG", "name": told["path"]}


def _files(answer: Answer) -> list[dict[str, Any]]:
    held = ("pid", "fd", "type", "name", "mode", "offset")
    slots = (*held, "cloexec", "data", "slot")
    return [
        _only(row, slots if isinstance(row["fd"], int) else held) for row in json.loads(answer.out)
    ]


def _tables(vm: Vm) -> Iterator[Wanted]:
    mounts = [
        {
            **_only(told, ("address", "type", "from", "on", "blocks")),
            "flags": f"{told['flags']:#x}",
            "bfree": told["free"],
        }
        for told in vm.said("mount")
    ]
    columns = ("address", "type", "from", "on", "blocks", "flags", "bfree")
    yield Wanted("mounts", ("mounts", *JSON), mounts, _rows(*columns))
    kext = vm.said("kext")[0]
    row = {"identifier": kext["name"], "version": kext["version"], "address": kext["address"]}
    row |= {"size": f"{kext['size']:#x}", "kmod": kext["kmod_info"]}
    yield Wanted("kexts", ("kexts", *JSON), [row], _rows(*row))
    yield Wanted("devsw", ("devsw", *JSON), {kext["name"]: kext["my_mmread"]}, _drivers)
    leaves = [_only(told, ("name", "mib", "value", "address")) for told in vm.said("sysctl")]
    yield Wanted(
        "sysctl",
        ("sysctl", "--computed", *JSON),
        leaves,
        _rows("name", "mib", "value", "address"),
    )
    zones = [_only(told, _ZONE) for told in vm.said("zone")]
    yield Wanted("zones", ("zones", *JSON), zones, _rows(*_ZONE))


def _drivers(answer: Answer) -> dict[str, Any]:
    """Slots whose driver is no part of the kernel: the kext's name, and where it reads."""
    return {
        row["driver"]: _address(row["read"])
        for row in json.loads(answer.out)
        if row["kind"] == "character" and row["major"] == 11
    }


def _machine(vm: Vm) -> Iterator[Wanted]:
    statics, slide = vm.said("statics")[0], vm.said("machine")[0]["slide"]
    msgbuf = statics["msgbuf"]
    yield Wanted("dmesg", ("dmesg", *JSON), msgbuf, _msgbuf)
    processes = vm.said("process")
    load = {
        "loadavg": [value / statics["fscale"] for value in statics["ldavg"]],
        "avenrun": [value / 1000 for value in statics["avenrun"]],
        "mach_factor": [value / 1000 for value in statics["mach_factor"]],
        "nprocs": len(processes),
        "tasks": sum(told["task"] is not None for told in processes),
        "threads": sum(told["threads"] for told in processes),
    }
    yield Wanted("load", ("load", *JSON), load, lambda a: _only(json.loads(a.out), [*load]))
    host = _only(statics, (*_HOST, *_HOST_COUNTS)) | {"slide": slide}
    yield Wanted("host", ("host", *JSON), host, lambda a: _only(json.loads(a.out), [*host]))
    yield Wanted("vm", ("vm", *JSON), statics["pages"], _pages)


def _msgbuf(answer: Answer) -> dict[str, Any]:
    found = json.loads(answer.out)
    crc = zlib.crc32(found["text"].encode())
    return {"address": found["address"], "bufx": found["bufx"], "crc": crc}


def _pages(answer: Answer) -> dict[str, Any]:
    rows = json.loads(answer.out)
    return {row["counter"]: row["value"] for row in rows if row["counter"] in _PAGES}


def _backtrace(vm: Vm, symbols: Sequence[tuple[int, str]]) -> Wanted:
    """The thread that kept its stack: every return address, and whose function it is."""
    told = vm.said("backtrace")[0]
    expected = [(pc, _function(symbols, int(pc, 16))) for pc in told["pcs"]]
    return Wanted("backtrace", ("backtrace", told["thread"], *JSON), expected, _frames)


def _function(symbols: Sequence[tuple[int, str]], address: int) -> str:
    """The name of the last symbol at or before `address`."""
    return max(pair for pair in symbols if pair[0] <= address)[1]


def _frames(answer: Answer) -> list[tuple[str, str]]:
    (stack,) = json.loads(answer.out)
    return [(frame["pc"], frame["symbol"]) for frame in stack["frames"]]


def _check() -> Wanted:
    """The boot code that is patched as it runs is all that differs from the kernel's file."""
    return Wanted("check", ("check", *JSON), (3, {"text"}, {"_mb_header"}), _findings)


def _findings(answer: Answer) -> tuple[int, set[str], set[str]]:
    rows = json.loads(answer.out)
    places = {row["where"].partition("+")[0] for row in rows}
    return answer.status, {row["check"] for row in rows}, places
