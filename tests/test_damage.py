"""A dump with one per cent of its pages absent at random, through every command.

What must hold for every seed: no traceback, no endless walk; every value is the undamaged one or
says that it is missing, and why, with an address on an absent page; rows are only missing where a
stop is named; nothing missing passes for status 0; and what lies wholly on pages that are there is
there. `KVMTOOL_DAMAGE=50` runs as many seeds; a plain run does a few.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from kvmtool.cli import COMMANDS as ALL
from kvmtool.cli import cli
from kvmtool.types import layouts
from tests.builders import damage
from tests.builders.eras import whole
from tests.inputs import plain_core, real

SEEDS = int(os.environ.get("KVMTOOL_DAMAGE", "2"))
SECONDS = 20.0
REAL = ("x86_64-10.8.5", "i386-10.5.8")
BUILT = ("10.9.5 x86_64", "14.6 arm64")
PHYSICAL = " lime"
COMMANDS = (
    *("procs", "procs -o pid,time,utime,stime,vsize,rss,wchan,csflags,text,address", "args"),
    *("threads", "backtrace", "backtrace --all", "backtrace --all --user", "files", "net"),
    "net --interfaces",
    *("net --routes", "mounts", "kexts", "devsw --all", "syscalls", "sysctl --computed", "vm"),
    *(
        "zones",
        "vmmap 1",
        "vmmap kernel",
        "vmmap 71",
        "load",
        "cpus",
        "host",
        "dmesg",
        "panic",
        "check",
    ),
    *("info", "nlist _allproc _cdevsw", "symbols devsw", "type proc", "types proc"),
    *("read _version 64 --type s", "read _cdevsw 8192 --partial", "search Darwin", "vtop _version"),
    *("print initproc->p_comm", "print *initproc", "print cdevsw[3]", "symbol initproc"),
    "walk allproc --next p_list -o p_pid,p_comm,p_pgrp",
)
# Of no machine's memory: what is installed, other files, how to write a line. `mount` serves what
# `read` reads; `convert` has a test of its own; what `python` says is the user's program's.
WITHOUT = {"completion", "dd", "demo", "doctor", "extract", "kernels", "mount", "python"}
# Not of the machine but of the file; what was concluded of everything, in words of its own; and by
# which of a kernel's page tables.
FREE = {
    "info": ("core", "slide", "layouts", "warnings", "types"),
    "check": ("",),
    "vtop _version": ("mode", "root", "steps"),
}
# Which ways led here, who else has it: fewer where a way is cut, which a stop says.
JOINED = ("pids", "command", "pid", "threads", "evidence", "kexts", "addresses")
# Up to the first that cannot be read.
STRINGS = ("args", "env", "apple")
# In words, when what it would have been told from is absent.
WORDS = ("stop", "origin", "unreadable", "text", "version", "symbols")
ADDRESS = re.compile(r"0x[0-9a-f]+")
SCOPE = re.compile(r"fe80:[0-9a-f:]*%\d+$")


class Case(NamedTuple):
    """A core to damage, the kernel's file, and what the undamaged core answers to each command."""

    core: damage.Core | damage.Lime
    kernel: str
    path: str
    answers: dict[str, tuple[int, Any]]


class Answer(NamedTuple):
    """What a command said of a damaged core."""

    status: int
    value: Any
    stderr: str
    absent: set[int] | None  # addresses; None where only physical ones are known
    page: int

    def is_absent(self, address: int) -> bool:
        """Whether that address lies on a page that is left out, or may."""
        return self.absent is None or address // self.page * self.page in self.absent


def ask(case: Case, command: str) -> tuple[int, Any, str]:
    begin = time.process_time()
    where = ["--format", "json", "-N", case.kernel, "-M", case.path]
    found = CliRunner().invoke(cli, [*command.split(), *where])
    assert found.exception is None or isinstance(found.exception, SystemExit), command
    assert time.process_time() - begin < SECONDS, command
    value = json.loads(found.stdout) if found.stdout else None
    return found.exit_code, value, found.stderr


def opened(folder, core: damage.Core | damage.Lime, kernel: str) -> Case:
    case = Case(core, kernel, str(folder / "core"), {})
    write(case, set())
    for command in COMMANDS:
        case.answers[command] = ask(case, command)[:2]
    return case


def write(case: Case, absent: set[int]) -> None:
    with open(case.path, "wb") as out:
        out.write(case.core.without(absent))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By name, each made once."""
    known = {}

    def get(name: str) -> Case:
        if name not in known:
            folder = tmp_path_factory.mktemp("damage")
            if name in REAL:
                with open(plain_core(name), "rb") as core:
                    parts = damage.taken_apart(core.read())
                known[name] = opened(folder, parts, real(f"dumps/{name}/mach_kernel"))
            else:
                built = whole(name.removesuffix(PHYSICAL))
                (folder / "kernel").write_bytes(built.kernel)
                parts = damage.taken_apart(built.core, built.memory.page)
                if name.endswith(PHYSICAL):
                    ram = built.truth["ram"].lime()
                    parts = damage.lime_taken_apart(ram, built.memory.page)
                known[name] = opened(folder, parts, str(folder / "kernel"))
        return known[name]

    return get


def test_no_command_is_left_out():
    asked = {command.split()[0] for command in COMMANDS} | {"convert", "regions"}
    assert asked == ALL.keys() - WITHOUT


# what may differ


def key_of(command: str, row: dict[str, Any]) -> str:
    """What makes a row the same row in two answers."""
    names = {
        "files": ("pid", "fd"),
        "syscalls": ("table", "number"),
        "net": ("socket", "pcb"),
        "net --interfaces": ("address",),
        "vm": ("group", "counter"),
        "backtrace": ("thread", "cpu"),
        "backtrace --all": ("thread",),
        "backtrace --all --user": ("thread",),
        "devsw --all": ("kind", "major"),
        "sysctl --computed": ("address",),
        "check": ("where",),
        "kexts": ("address", "identifier"),
        "args": ("pid",),
        "type proc": ("offset", "name"),
        "types proc": ("kind", "name"),
    }.get(command, ("address",))
    return json.dumps([row.get(name) for name in names])


def reasons(value: Any) -> list[str]:
    """Why anything in an answer is missing."""
    if isinstance(value, dict):
        if set(value) == {"unreadable"}:
            return [value["unreadable"]]
        return [reason for item in value.values() for reason in reasons(item)]
    return [r for item in value for r in reasons(item)] if isinstance(value, list) else []


def check_same(before: Any, after: Any, name: str, answer: Answer) -> None:
    """`after` is `before`, or says what is missing."""
    if before == after or (isinstance(after, dict) and set(after) == {"unreadable"}):
        return
    if name == "meanings":  # names of what pointers lead to, which is another structure's page
        assert after.items() <= before.items()
        return
    assert answer.status == 3, f"{name}: {before!r} became {after!r}"
    if isinstance(before, dict) and isinstance(after, dict) and set(before) == set(after):
        for key in before:
            check_same(before[key], after[key], key, answer)
        return
    if name == "frames":
        assert before[: len(after)] == after
        return
    if name == "lists":  # other ways lead there, too, where the usual one is cut
        return
    if name in STRINGS and isinstance(before, list) and isinstance(after, list):
        assert before[: len(after) - 1] == after[:-1]
        assert reasons(after[-1])
        return
    if name in JOINED and isinstance(before, list) and isinstance(after, list):
        assert {str(one) for one in after if not reasons(one)} <= set(map(str, before))
        return
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            check_same(one, other, name, answer)
        return
    if isinstance(before, str) and isinstance(after, str) and SCOPE.match(after):
        assert before.partition("%")[0] == after.partition("%")[0]
        return  # the interface by its number: its name is not known
    if name == "name" and isinstance(after, str) and ADDRESS.fullmatch(after):
        return  # the kext whose code it is is not known
    assert name in WORDS or (name in JOINED and after is None), f"{name}: {before!r} => {after!r}"


def check_answer(case: Case, command: str, answer: Answer) -> None:
    """Everything that must hold for one command and one damaged core."""
    status, before = case.answers[command]
    if status not in (0, 3):  # what the undamaged dump cannot answer
        assert answer.status in (1, 3)
        return
    if command.startswith("search") and answer.absent is None:
        assert all(row in before for row in answer.value or ())
        return
    if command.startswith("search"):  # in what there is
        assert answer.value == [
            row for row in before if not answer.is_absent(int(row["address"], 16))
        ]
        return
    if answer.status == 1:  # nothing at all could be answered: the one line says why
        named = [int(text, 16) for text in ADDRESS.findall(answer.stderr)]
        assert answer.value is None
        assert any(map(answer.is_absent, named)), answer.stderr
        return
    assert answer.status in (0, 3), answer.stderr
    known = set(reasons(before))
    for reason in reasons(answer.value):
        named = [int(text, 16) for text in ADDRESS.findall(reason)]
        assert reason in known or any(map(answer.is_absent, named)), reason
    if set(reasons(answer.value)) - known or status == 3:
        assert answer.status == 3
    if isinstance(before, dict):
        for key in before.keys() - set(FREE.get(command, ())):
            check_same(before[key], answer.value[key], key, answer)
        return
    if command in FREE:  # what is missing accuses nobody, or with that said
        accused = {(row["check"], row["where"]) for row in before}
        sure = [row for row in answer.value if "some could not be read" not in row["evidence"]]
        assert {(row["check"], row["where"]) for row in sure} <= accused
        return
    rows = {key_of(command, row): row for row in before}
    found = {key_of(command, row): row for row in answer.value}
    for key in rows.keys() & found.keys():
        gap = command.startswith("read") and bool(reasons(found[key]))  # one row, whatever its size
        for name in rows[key].keys() - ({"size"} if gap else set()):
            check_same(rows[key][name], found[key][name], name, answer)
    strange = found.keys() - rows.keys()
    for key in strange:  # one whose own key is on an absent page
        assert reasons(found[key]) or command == "backtrace", found[key]
    if command.startswith("read"):  # a gap is one row
        return
    if len(rows.keys() - found.keys()) > len(strange):  # where it stopped is told
        assert answer.status == 3
        named = [int(text, 16) for text in ADDRESS.findall(answer.stderr)]
        assert any(map(answer.is_absent, named)), answer.stderr


def damaged(case: Case, seed: int, *kept: int) -> set[int]:
    """Leaves pages out, but none that holds an address of `kept`; which."""
    page = case.core.page
    spared = {at // page * page for at in kept}
    absent = damage.chosen([at for at in case.core.pages() if at not in spared], seed)
    write(case, absent)
    return absent


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", [*REAL, *BUILT, *(f"{name}{PHYSICAL}" for name in BUILT)])
def test_every_command(name, seed, cases):
    case = cases(name)
    gone = damaged(case, seed)
    absent = None if name.endswith(PHYSICAL) else gone
    for command in COMMANDS:
        status, value, stderr = ask(case, command)
        check_answer(case, command, Answer(status, value, stderr, absent, case.core.page))


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", [*REAL, *BUILT])
def test_all_that_is_there_and_no_more(name, seed, cases, tmp_path):
    """As `regions` lists it, and as `convert` writes it."""
    case = cases(name)
    page, absent = case.core.page, damaged(case, seed)
    out = tmp_path / "again.core"
    done = CliRunner().invoke(cli, ["convert", str(out), "-N", case.kernel, "-M", case.path])
    assert done.exit_code == 0, done.output
    again = damage.taken_apart(out.read_bytes(), page)
    there = {
        at: content[at - address : at - address + page]
        for address, content in case.core.segments
        for at in range(address, address + len(content), page)
        if at not in absent
    }
    assert there == {
        at: content[at - address : at - address + page]
        for address, content in again.segments
        for at in range(address, address + len(content), page)
    }
    _, regions, _ = ask(case, "regions")
    assert there.keys() == {
        at for row in regions for at in range(int(row["start"], 16), int(row["end"], 16), page)
    }


# what lies on pages that are there


class Whole(NamedTuple):
    """A generated machine with pages absent: what of it is there."""

    case: Case
    name: str
    absent: set[int]

    def there(self, tag: str, *addresses: int | None) -> bool:
        """Whether structures `tag` at these addresses are wholly there; None is no structure."""
        page = self.case.core.page
        size = layouts.table(self.name).size(tag) if tag else 1
        return not any(
            at // page * page in self.absent
            for address in addresses
            if address is not None
            for at in range(address // page * page, address + size, page)
        )

    def rows(self, command: str) -> tuple[list[Any], list[Any]]:
        """What the command says undamaged, and damaged."""
        return self.case.answers[command][1], ask(self.case, command)[1] or []


def same(before: dict[str, Any], after: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    for name in before.keys() - set(but):
        assert before[name] == after[name], name


def by_address(rows: list[Any]) -> dict[str, Any]:
    return {row["address"]: row for row in rows}


@pytest.mark.parametrize("seed", range(2 * SEEDS))
@pytest.mark.parametrize("name", BUILT)
def test_what_is_there_is_shown(name, seed, cases):
    case, built = cases(name), whole(name)
    roots = ("_allproc", "_tasks", "_kernproc", "_mountlist", "_kmod", "_nchrdev", "_first_zone")
    roots += ("_num_zones", "_zpercpu_early_count", "_nsysent")
    there = [built.address(root) for root in roots if root in built.symbols]
    absent = damaged(case, seed, *there)  # the heads of lists, the lengths of tables
    machine = Whole(case, name, absent)
    _processes(machine)
    _threads(machine)
    _files(machine)
    _mounts(machine)
    _switches(machine)
    _zones(machine)
    _calls(machine)
    _map(machine)


def _processes(machine: Whole) -> None:
    """Each process whose structures are there, wherever its neighbours are."""
    before, after = map(by_address, machine.rows("procs"))
    for process in whole(machine.name).truth["processes"]:
        parts = (("proc", process["address"]), ("ucred", process["ucred"]))
        parts += (("pgrp", process["pgrp"]), ("session", process["session"]))
        parts += (("task", process["task"]),)
        parts += tuple(("thread", thread) for thread, _ in process["threads"])
        if process["proc_ro"]:
            parts += (("proc_ro", process["proc_ro"]),)
        if process["tty"]:
            continue  # its terminal lies somewhere else
        if all(machine.there(tag, address) for tag, address in parts):
            key = f"{process['address']:#x}"
            same(before[key], after[key], but=("lists",))


def _threads(machine: Whole) -> None:
    """Each thread that is there with its task and its process, also behind a cut queue."""
    before, after = map(by_address, machine.rows("threads"))
    ro = layouts.table(machine.name).has("thread", "t_tro")
    for process in whole(machine.name).truth["processes"]:
        if ro or not machine.there("proc", process["address"]):
            continue
        if not machine.there("task", process["task"]):
            continue
        for thread, _ in process["threads"]:
            if machine.there("thread", thread):
                key = f"{thread:#x}"
                same(before[key], after[key], but=("name", "wmesg", "cpu"))


def _files(machine: Whole) -> None:
    """Each descriptor whose slot, fileproc and fileglob are there."""
    before, after = machine.rows("files")
    known = {(json.dumps(row["pid"]), row["fd"]): row for row in after}
    rows = {(row["pid"], row["fd"]): row for row in before}
    truth = whole(machine.name).truth
    addresses = {process["pid"]: process["address"] for process in truth["processes"]}
    for (pid, fd), file in truth["descriptors"].items():
        if "fileglob" not in file or not machine.there("proc", addresses[pid]):
            continue
        table, slot, flag = file["places"]
        if not machine.there("filedesc", table) or not machine.there("", slot, slot + 7, flag):
            continue
        if machine.there("fileproc", file["fileproc"]) and machine.there(
            "fileglob", file["fileglob"]
        ):
            one, other = rows[pid, fd], known[json.dumps(pid), fd]
            for name in ("slot", "flags", "offset", "refs", "data", "fileproc", "fileglob"):
                assert one[name] == other[name], name


def _mounts(machine: Whole) -> None:
    """Each mount that is there and that can be reached from one end of the list."""
    before, after = map(by_address, machine.rows("mounts"))
    addresses = [mount["address"] for mount in whole(machine.name).truth["mounts"]]
    whole_ones = [machine.there("mount", address) for address in addresses]
    for place, address in enumerate(addresses):
        reached = all(whole_ones[:place]) or all(whole_ones[place + 1 :])
        if whole_ones[place] and reached:
            assert before[f"{address:#x}"] == after[f"{address:#x}"]


def _switches(machine: Whole) -> None:
    """Each slot of the switches that is there; names of kexts' code need the kexts."""
    before, after = map(by_address, machine.rows("devsw --all"))
    for key, row in before.items():
        if machine.there(row["kind"][0] + "devsw", int(key, 16)):
            same(row, after[key], but=("driver", "outside", "read"))


def _zones(machine: Whole) -> None:
    """Each zone of an array that is there, and of a chain those before the first that is not."""
    before, after = map(by_address, machine.rows("zones"))
    chained = layouts.table(machine.name).has("zone", "next_zone")
    for zone in whole(machine.name).truth["zones"]:
        if machine.there("zone", zone["address"]):
            key = f"{zone['address']:#x}"
            same(before[key], after[key], but=("name",))
        elif chained:
            break


def _calls(machine: Whole) -> None:
    """Each entry of sysent that is there; its name lies somewhere else."""
    truth = whole(machine.name).truth.get("sysent", ())
    before, after = map(by_address, machine.rows("syscalls"))
    for call in truth:
        if machine.there("sysent", call["address"]):
            key = f"{call['address']:#x}"
            same(before[key], after[key], but=("name",))


def _map(machine: Whole) -> None:
    """Each entry of a map that is there, and that can be reached from one end."""
    built = whole(machine.name)
    known, process = built.truth["maps"][71], built.process(71)
    ways = (("proc", process["address"]), ("task", process["task"]), ("_vm_map", known["map"]))
    if not all(machine.there(tag, address) for tag, address in ways):
        return
    before, after = map(by_address, machine.rows("vmmap 71"))
    entries = [entry["address"] for entry in known["entries"]]
    whole_ones = [machine.there("vm_map_entry", address) for address in entries]
    for place, address in enumerate(entries):
        reached = all(whole_ones[:place]) or all(whole_ones[place + 1 :])
        if whole_ones[place] and reached:
            one, other = before[f"{address:#x}"], after[f"{address:#x}"]
            for name in ("start", "end", "size", "prot", "max_prot", "tag", "wired_count"):
                assert one[name] == other[name], name
