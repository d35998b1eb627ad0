"""What kvmtool must say of every form of the machine's memory: a table, and who holds against it.

Expected values are what the kernel itself said on the serial port; the kext's address is taken from
its symbol table as llvm-nm reads it. A form kvmtool cannot open fails with kvmtool's own words.
"""

from __future__ import annotations

import json
import subprocess
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.types import layouts
from tests.machine import commands, postlink, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.machine.build import Images
    from tests.machine.running import Answer
    from tests.machine.vm import Vm

MMREAD_MAJOR = 11
# form: what follows -M, given the path of the dump or the port of the gdb stub
FORMS = {
    "macho-core": "{path}",
    "elf": "{path}",
    "elf-paging": "{path}",
    "kdump-zlib": "{path}",
    "kdump-lzo": "{path}",
    "kdump-snappy": "{path}",
    "kdump-raw-zlib": "{path}",  # not flattened, from QEMU 8.2 on
    "kdump-raw-lzo": "{path}",
    "kdump-raw-snappy": "{path}",
    "makedumpfile": "{path}",
    "makedumpfile-zlib": "{path}",
    "makedumpfile-lzo": "{path}",
    "makedumpfile-snappy": "{path}",
    "makedumpfile-zstd": "{path}",
    "raw": "{path}",
    "lime": "{path}",
    "gdb": "gdb://127.0.0.1:{port}",
}
KERNEL_ONLY = {"macho-core"}  # lldb writes the kernel's address space
TYPED = {"raw", "gdb"}  # where every command runs by the compiler's types, too
# of a process: what the kernel told and `procs --format json` says under the same name
_PROCESS = (
    *("pid", "ppid", "pgid", "sid", "uid", "ruid", "svuid", "gid", "rgid", "svgid", "groups"),
    *("login", "tdev", "stat", "flag", "nice", "xstat", "start_raw", "threads", "comm", "name"),
    *("address", "task", "ucred", "parent", "pgrp", "session"),
)


class Check(NamedTuple):
    """`look` finds in an answer what must equal `expected`.

    `kernel` is whether -N is given, `layout` the built-in one that is named, if one is.
    """

    title: str
    arguments: tuple[str, ...]
    expected: Any
    look: Callable[[Answer], Any]
    kernel: bool = True
    layout: str | None = None


class Failure(NamedTuple):
    """Which check did not hold, and why, in one line."""

    title: str
    reason: str


def run(check: Check, kernel: str, core: str) -> Failure | None:
    """None if it holds."""
    where = ("-N", kernel) if check.kernel else ()
    if check.layout is not None:
        where += ("--layout", check.layout)
    try:
        answer = running.run(*where, "-M", core, *commands.prepared(check.arguments))
    except running.SlowError as slow:
        return Failure(check.title, str(slow))
    try:
        got = check.look(answer)
        if got == check.expected:
            return None
    except (ValueError, LookupError, TypeError):
        got = answer.out
    if answer.status:
        said = answer.err.splitlines()
        last = said[-1] if said else "no message"
        return Failure(check.title, f"exit status {answer.status}: {last}")
    return Failure(check.title, f"expected {_short(check.expected)}, got {_short(got)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def table(vm: Vm, images: Images, form: str) -> Iterator[Check]:
    """Every check of one machine in one form."""
    machine, statics = vm.said("machine")[0], vm.said("statics")[0]
    addresses = {each["name"]: each["address"] for each in vm.said("symbol")}
    names = ("nlist", "--format", "json", *addresses)
    yield Check("symbols", names, addresses, _named)
    yield Check("slide", ("info", "--format", "json"), machine["slide"], _slide)
    banner = ("read", "_version", str(len(statics["version"]) + 1), "-t", "s", "--format", "json")
    yield Check("banner", banner, statics["version"], lambda answer: _rows(answer)[0]["string"])
    yield from _kext(vm, images)
    yield Check("processes", ("procs", "--format", "json"), _expected_processes(vm), _processes)
    yield Check(
        "processes without a word", ("procs",), (0, ""), lambda answer: (answer.status, answer.err)
    )
    for part in vm.said("range"):
        span = ("read", part["address"], str(part["size"]), "--raw")
        yield Check(f"CRC of {part['name']}", span, part["crc"], _crc)
    hole = int(vm.said("hole")[0]["address"], 16)
    for title, start in (("a hole", hole), ("a range that runs into a hole", hole - 8)):
        refused = ("read", f"{start:#x}", "16")
        yield Check(
            title, refused, (1, b"", True), lambda a: (a.status, a.out, f"{hole:#x}" in a.err)
        )
    alone = ("nlist", "--format", "json", "_cdevsw")
    wanted = {"_cdevsw": addresses["_cdevsw"]}
    yield Check("symbols without -N", alone, wanted, _named, kernel=False)
    yield from _commands(vm, images, form)


def _commands(vm: Vm, images: Images, form: str) -> Iterator[Check]:
    """Every command by the release's layout; by the compiler's types, too, each must be clear."""
    machine = vm.said("machine")[0]
    slide = int(machine["slide"], 16)
    symbols = [(value + slide, name) for value, _, name in symbols_of(images.kernel)]
    for each in commands.wanted(vm, symbols, kernel_only=form in KERNEL_ONLY):
        yield Check(*each, layout=machine["layout"])
        if form in TYPED and each.arguments[0] not in commands.UNTYPED:
            yield Check(f"{each.title} by DWARF", each.arguments, "clear", commands.clear)


def _kext(vm: Vm, images: Images) -> Iterator[Check]:
    """The article's question: whose function is cdevsw[11].d_read?"""
    types = layouts.table(vm.said("machine")[0]["layout"])
    at = MMREAD_MAJOR * types.size("cdevsw") + types.offset("cdevsw", "d_read")
    word = "8" if vm.arch == "x86_64" else "4"
    read = ("read", f"_cdevsw+{at:#x}", word, "-t", f"x{word}", "--format", "json")
    yield Check("cdevsw[11].d_read", read, my_mmread(vm, images), _first_value)
    kext = vm.said("kext")[0]
    code = ("read", kext["my_mmread"], "16", "--raw")
    yield Check("my_mmread's code", code, kext["code"], lambda answer: answer.out.hex())


def my_mmread(vm: Vm, images: Images) -> int:
    """Where the kext's function lies: its symbol as llvm-nm has it, moved to the kext's address."""
    value = next(value for value, _, name in symbols_of(images.kext) if name == "_my_mmread")
    with open(images.kext, "rb") as file:
        _, (linked, *_) = postlink.Image(file.read()).segment(b"__TEXT")
    return int(vm.said("kext")[0]["address"], 16) + value - linked


def symbols_of(path: str) -> list[tuple[int, str, str]]:
    """(value, type letter, name) of the defined symbols of a file, by llvm-nm."""
    done = subprocess.run(
        ["llvm-nm-14", "--defined-only", path], capture_output=True, text=True, check=True
    )
    rows = (line.split() for line in done.stdout.splitlines())
    return [(int(value, 16), letter, name) for value, letter, name in rows]


def _rows(answer: Answer) -> Any:
    return json.loads(answer.out)


def _named(answer: Answer) -> dict[str, str]:
    return {row["name"]: row["address"] for row in _rows(answer)}


def _slide(answer: Answer) -> Any:
    return _rows(answer)["slide"]["slide"]


def _first_value(answer: Answer) -> int:
    return int(str(_rows(answer)[0]["values"][0]), 0)  # eight bytes are a string in JSON


def _crc(answer: Answer) -> int:
    if answer.status:
        raise ValueError(answer.status)
    return zlib.crc32(answer.out)


def _processes(answer: Answer) -> list[dict[str, Any]]:
    return [{name: row[name] for name in (*_PROCESS, "lists")} for row in _rows(answer)]


def _expected_processes(vm: Vm) -> list[dict[str, Any]]:
    """The kernel's own words, in its order, and on which lists each must be found."""
    found = []
    for told in vm.said("process"):
        lists = ["allproc", "tasks", "pidhash"]
        if told["pid"] == 0:
            lists.remove("pidhash")
        if told["task"] is None:  # a zombie
            lists = ["zombproc", "pidhash"]
        found.append({name: told[name] for name in _PROCESS} | {"lists": lists})
    return found
