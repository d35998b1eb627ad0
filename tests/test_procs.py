"""Processes: real dumps against their truth, damaged ones, and every layout of the database."""

from __future__ import annotations

import contextlib
import re
import warnings
from typing import NamedTuple

import pytest

from kvmtool import kvm
from kvmtool.errors import FormatError, KvmWarning, MismatchError, UnsupportedError
from kvmtool.types import layouts
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import Proc, iso_time
from kvmtool.xnu.proc_state import SSTOP
from kvmtool.xnu.queues import Report
from tests import inputs
from tests.builders import xnu
from tests.builders.specs import TH_RUN, TH_SUSP, TH_UNINT, TH_WAIT, ProcSpec

MAVERICKS = "machine/x86_64-xnu-2422.115.4.mach_kernel"
BOTH = ("core.macho", "core.macho.gz")

# the fields of the truth that are fields of ours, under the same names
FIELDS = (
    *("pid", "ppid", "pgid", "sid", "uid", "ruid", "svuid", "gid", "rgid", "groups"),
    *("tty", "stat", "flag", "nice", "xstat", "zombie", "comm", "name"),
    *("address", "task", "ucred"),
)


class Answer(NamedTuple):
    """The processes of a dump, and what was said about them."""

    procs: list[Proc]
    report: Report
    warnings: list[str]

    def by_pid(self):
        return {proc.pid: proc for proc in self.procs if isinstance(proc.pid, int)}


def ask(kernel, core, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with kvm.open(kernel, core, **options) as handle:
            report = Report()
            found = list(handle.procs(report))
    assert all(issubclass(w.category, KvmWarning) for w in caught)
    return Answer(found, report, [str(w.message) for w in caught])


def ask_dump(dump, name):
    core = inputs.plain_core(dump) if name == "core.macho" else inputs.real(f"dumps/{dump}/{name}")
    return ask(inputs.real(f"dumps/{dump}/mach_kernel"), core)


def fields_of(proc, names=FIELDS):
    return {name: getattr(proc, name) for name in names} | {"start": list(proc.start)}


# the dumps


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_every_process_field_by_field(dump, name):
    truth = inputs.truth(dump)
    answer = ask_dump(dump, name)
    assert answer.warnings == answer.report.stops == answer.report.notes == []
    assert [proc.pid for proc in answer.procs] == truth["allproc"] + truth["zombproc"]
    true_of = {process["pid"]: process for process in truth["processes"]}
    for proc in answer.procs:
        expected = {field: true_of[proc.pid][field] for field in (*FIELDS, "start")}
        assert fields_of(proc) == expected
        assert proc.whole


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_login_is_the_sessions(dump):
    """Who logged in is s_login of the session: XNU answers e_login from there (fill_user_proc).

    The truth's `login` of a single process is the name it would have given its own session: that of
    a leader is the session's. Of nine members it is another one, which was never written to memory
    ("_www" is nowhere in the dump), so no reader could give it.
    """
    truth = inputs.truth(dump)
    sessions = {session["sid"]: session["login"] for session in truth["sessions"]}
    own = {process["pid"]: process["login"] for process in truth["processes"]}
    answer = ask_dump(dump, "core.macho")
    assert {p.pid: p.login for p in answer.procs} == {p.pid: sessions[p.sid] for p in answer.procs}
    differing = [proc for proc in answer.procs if proc.login != own[proc.pid]]
    assert len(differing) == 9
    assert not any(proc.pid == proc.sid for proc in differing)
    assert "_www" in {own[proc.pid] for proc in differing}
    with kvm.open(inputs.real(f"dumps/{dump}/mach_kernel"), inputs.plain_core(dump)) as handle:
        assert list(handle.memory.find(b"_www")) == []


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_relatives_and_groups_are_the_true_ones(dump):
    truth = inputs.truth(dump)
    address_of = {process["pid"]: process["address"] for process in truth["processes"]}
    groups = {group["pgid"]: group["address"] for group in truth["pgrps"]}
    sessions = {session["sid"]: session["address"] for session in truth["sessions"]}
    threads = {p["pid"]: len(p["threads"]) for p in truth["processes"] if "threads" in p}
    for proc in ask_dump(dump, "core.macho").procs:
        assert proc.parent == address_of[proc.ppid]
        assert proc.pgrp == groups[proc.pgid]
        assert proc.session == sessions[proc.sid]
        assert proc.threads == threads.get(proc.pid, 0)


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_every_list_leads_to_the_same(dump):
    for proc in ask_dump(dump, "core.macho").procs:
        main = "zombproc" if proc.zombie else "allproc"
        assert proc.lists[0] == main
        assert ("tasks" in proc.lists) == (not proc.zombie)
        assert ("pidhash" in proc.lists) == (proc.pid != 0)  # proc 0 is never hashed
        assert (proc.state[0] == "Z") == proc.zombie
        assert (proc.task is None) == proc.zombie


# the real machine


def test_the_machine_that_xnu_dumped_itself():
    oracle = inputs.oracle("crash")
    answer = ask(inputs.real(MAVERICKS), inputs.real("machine/crash.kdp-core"))
    assert answer.warnings == answer.report.stops == answer.report.notes == []
    assert (
        len(answer.procs)
        == len(oracle["procs"])
        == int(oracle["symbols"]["_nprocs"]["value"], 16) + 1
    )
    for proc, true in zip(answer.procs, oracle["procs"], strict=True):
        ours = {
            "addr": f"{proc.address:#x}",
            "p_pid": proc.pid,
            "p_ppid": proc.ppid,
            "p_pgrpid": proc.pgid,
            "p_flag": proc.flag,
            "p_lflag": proc.lflag,
            "p_stat": proc.stat,
            "p_uid": proc.uid,
            "p_gid": proc.gid,
            "p_ruid": proc.ruid,
            "task": f"{proc.task or 0:#x}",
            "p_ucred": f"{proc.ucred:#x}",
            "p_pgrp": f"{proc.pgrp:#x}",
            "p_nice": proc.nice,
            "p_comm": proc.comm,
            "p_name": proc.name,
            "pg_id": proc.pgid,
            "s_sid": proc.sid,
            "s_login": proc.login,
            "list": "_zombproc" if proc.zombie else "_allproc",
        }
        assert ours == {name: true[name] for name in ours}


def test_the_terminal_of_the_machine_is_its_console():
    oracle = inputs.oracle("crash")
    names = {vnode["addr"]: vnode["name"] for vnode in oracle["vnodes"]}
    answer = ask(None, inputs.real("machine/crash.kdp-core"))  # the core holds its own kernel
    terminals = set()
    for proc, true in zip(answer.procs, oracle["procs"], strict=True):
        vnode = true.get("s_ttyvp", "0x0")
        expected = None if vnode == "0x0" else f"/dev/{names[vnode]}"
        assert proc.tty == expected
        terminals.add(expected)
    assert terminals == {None, "/dev/console"}


def test_the_threads_of_the_machine():
    oracle = inputs.oracle("crash")
    counts = {task["addr"]: task["thread_count"] for task in oracle["tasks"]}
    answer = ask(None, inputs.real("machine/crash.kdp-core"))
    ours = {f"{proc.task:#x}": proc.threads for proc in answer.procs if proc.task}
    assert ours == counts


def test_a_kernel_no_layout_fits_is_refused():
    kernel = inputs.real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")
    with kvm.open(kernel, inputs.real("machine/armc.corefile")) as handle:
        with pytest.raises(MismatchError, match="no structure layout fits this kernel") as caught:
            list(handle.procs())
        assert "xnu-4903.221.2" in str(caught.value)


def test_a_kernel_file_has_no_processes():
    with (
        kvm.open(inputs.real(MAVERICKS)) as handle,
        pytest.raises(UnsupportedError, match="is a kernel file, its memory is not in it"),
    ):
        handle.procs()


# damaged dumps

# members of struct proc itself; the rest is behind pointers, which may lead nowhere
OWN = {
    "i386": ("pid", "ppid", "pgid", "stat", "flag", "nice", "xstat", "zombie", "comm", "name"),
    "x86_64": (
        *("pid", "ppid", "pgid", "uid", "ruid", "svuid", "gid", "rgid"),
        *("stat", "flag", "nice", "xstat", "zombie", "comm", "name"),
    ),
}


def damage_of(dump, name):
    return inputs.truth(dump)["formats"]["damaged"][name]


def assert_nothing_invented(dump, procs):
    """Every readable field of every process is the true one; the processes are all real."""
    true_at = {process["address"]: process for process in inputs.truth(dump)["processes"]}
    for proc in procs:
        true = true_at[proc.address]
        for field in (*FIELDS, "start"):
            value = getattr(proc, field)
            if not isinstance(value, Unreadable):
                assert (list(value) if field == "start" else value) == true[field], (
                    proc.pid,
                    field,
                )


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_cut_core_gives_every_process_that_is_whole(dump):
    damage = damage_of(dump, "core.truncated.macho")
    answer = ask_dump(dump, "damaged/core.truncated.macho")
    found = answer.by_pid()
    assert found.keys() >= set(damage["procs_whole"])
    for pid in damage["procs_whole"]:
        proc = found[pid]
        own = {*OWN[dump.partition("-")[0]], "address", "task", "ucred", "start", "parent"}
        assert [n for n in own if isinstance(getattr(proc, n), Unreadable)] == []
    assert_nothing_invented(dump, answer.procs)
    assert answer.report.partial
    walked = [proc.pid for proc in answer.procs if "allproc" in proc.lists]
    reached = damage["walk_reaches"]  # the first that is not whole, but its link may be there
    assert walked[:reached] == inputs.truth(dump)["allproc"][:reached]
    (stop,) = (text for text in answer.report.stops if text.startswith("allproc"))
    assert re.fullmatch(
        rf"allproc: stopped after {len(walked)} .*the link at 0x\w+ is absent", stop
    )
    assert any("segments end past the end of the file" in text for text in answer.warnings)


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_cut_gzip_stream_gives_what_is_before_the_cut(dump):
    answer = ask_dump(dump, "damaged/core.truncated.macho.gz")
    assert answer.by_pid()[0].comm == "kernel_task"
    assert_nothing_invented(dump, answer.procs)
    assert answer.report.partial
    assert any("gzip stream is cut off" in text for text in answer.warnings)
    assert any("segments end past the end of the file" in text for text in answer.warnings)


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_core_cut_too_early_gives_nothing_but_says_so(dump):
    answer = ask_dump(dump, "damaged/core.truncated-early.macho")
    assert answer.procs == []
    assert damage_of(dump, "core.truncated-early.macho")["procs_whole"] == []
    assert answer.report.partial
    assert any(stop.startswith("allproc: stopped after 0 ") for stop in answer.report.stops)
    assert any("is not verified: kernproc cannot be read" in text for text in answer.warnings)


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_missing_page_costs_what_lies_in_it(dump):
    damage = damage_of(dump, "core.missing-page.macho")
    answer = ask_dump(dump, "damaged/core.missing-page.macho")
    truth = inputs.truth(dump)
    everyone = {process["pid"] for process in truth["processes"]}
    whole = {proc.pid for proc in answer.procs if proc.whole}
    assert whole == everyone - set(damage["procs_touched"])
    assert_nothing_invented(dump, answer.procs)
    before = damage["pids_before_hole"]
    assert [proc.pid for proc in answer.procs][: len(before)] == before
    (stop,) = (text for text in answer.report.stops if text.startswith("allproc"))
    page, after = damage["page"], re.search(r"after (\d+) elements: the link at (0x\w+)", stop)
    assert page <= int(after[2], 16) < page + 4096
    assert int(after[1]) == len(before) + 1  # the one the last link leads to is known by address
    lost = answer.procs[len(before)]
    assert lost.address == next(
        p["address"] for p in truth["processes"] if p["pid"] == damage["first_unwalkable"]
    )
    behind = sum(not {"allproc", "zombproc"} & {*proc.lists} for proc in answer.procs)
    (note,) = answer.report.notes
    assert note.startswith(f"{behind} processes behind where allproc stopped were found by way of")


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_circle_is_walked_once(dump):
    truth = inputs.truth(dump)
    damage = damage_of(dump, "core.cyclic.macho")
    answer = ask_dump(dump, "damaged/core.cyclic.macho")
    assert [proc.pid for proc in answer.procs] == truth["allproc"] + truth["zombproc"]
    assert_nothing_invented(dump, answer.procs)
    met = answer.by_pid()[damage["to_pid"]].address
    (stop,) = answer.report.stops
    assert stop.startswith(f"allproc: stopped after {len(truth['allproc'])} elements: {met:#x} was")


@pytest.mark.parametrize("dump", inputs.DUMPS)
@pytest.mark.parametrize(
    "name",
    ["core.lc-size-zero", "core.lc-size-huge", "core.ncmds", "core.sizeofcmds", "core.header-only"],
)
def test_a_damaged_head_is_an_error(dump, name):
    core = inputs.real(f"dumps/{dump}/damaged/{name}.macho")
    with pytest.raises(FormatError) as caught:
        ask(inputs.real(f"dumps/{dump}/mach_kernel"), core)
    assert caught.value.source == core


# every layout of the database


RELEASES = {kernel.name: kernel.releases for kernel in layouts._database().kernels}
SPECS = [
    ProcSpec(1, "launchd", ppid=0, threads=(TH_WAIT, TH_WAIT)),
    ProcSpec(56, "WindowServer", uid=88, gid=88, groups=(88, 61), threads=(TH_WAIT, TH_RUN)),
    ProcSpec(70, "login", ruid=501, rgid=20, svgid=21, tty=(16, 3), login="amit"),
    ProcSpec(71, "bash", 70, sid=70, uid=501, gid=20, tty=(16, 3), login="amit", nice=-5),
    ProcSpec(72, "stopped", 71, sid=70, uid=501, gid=20, tty=(16, 3), stat=SSTOP),
    ProcSpec(327, "vim", 71, sid=70, uid=501, svuid=502, gid=20, tty=(16, 3), nice=20),
    ProcSpec(
        *(328, "a very long command name", 71),
        name="a very long command name, longer than p_name",
        uid=501,
        gid=20,
        groups=tuple(range(20, 36)),
        start=(1_400_000_000, 654_321),
    ),
    ProcSpec(400, "κέρβερος", uid=0xFFFFFFFE, gid=0xFFFFFFFE, lflag=0x40, threads=(TH_UNINT,)),
    ProcSpec(99_999, "defunct", 71, sid=70, uid=501, gid=20, tty=(16, 3), xstat=0x200, zombie=True),
    ProcSpec(99_998, "sleeper", 1, threads=(TH_WAIT, TH_SUSP), suspend_count=1),
]


def banner_of(name):
    release = (RELEASES[name] or ("1.2.3",))[-1]
    config = f"RELEASE_{name.rpartition(' ')[2].upper()}"
    return f"Darwin Kernel Version 1.2.3: today; root:xnu-{release}~1/{config}"


def crash(name, specs=SPECS, **more):
    layout = layouts.table(name)
    slide = 0xA00000 if xnu.has_kaslr(layout) else 0
    arch = name.rpartition(" ")[2]
    facts = {"banner": banner_of(name), "slide": slide, "uuid": bytes(range(16))}
    return xnu.build(layout, arch, specs, **facts | more)


@contextlib.contextmanager
def unlinked(built, pid):
    """Memory as LIST_REMOVE leaves it: the neighbours of a process on allproc know it no more."""
    pids = built.truth["allproc"]
    at = pids.index(pid)
    layout = layouts.table(built.truth["layout"])
    link = layout.offset("proc", "p_list")
    before = built.process(pids[at - 1])["address"] + link
    behind = built.process(pids[at + 1])["address"] if at + 1 < len(pids) else 0
    memory = built.memory
    with contextlib.ExitStack() as stack:
        stack.enter_context(built.patched(before, memory.pointer(behind)))
        if behind:
            place = behind + link + memory.width
            stack.enter_context(built.patched(place, memory.pointer(before)))
        yield


@pytest.fixture
def files(tmp_path):
    """A built crash as files to open."""

    def write(built, core=None):
        kernel, dump = tmp_path / "kernel", tmp_path / "core"
        kernel.write_bytes(built.kernel)
        dump.write_bytes(built.core if core is None else core)
        return str(kernel), str(dump)

    return write


def assert_as_planted(answer, built):
    truth = built.truth
    assert [proc.pid for proc in answer.procs] == truth["allproc"] + truth["zombproc"]
    for proc in answer.procs:
        true = built.process(proc.pid)
        names = [name for name in FIELDS if name != "tty"]
        ours = {name: getattr(proc, name) for name in names}
        assert ours == {name: true[name] for name in names}
        assert proc.svgid == true["svgid"]
        assert proc.start == true["start"]
        assert proc.login == true["login"]
        assert proc.tty == (f"/dev/ttys{true['tty'][1]:03d}" if true["tty"] else None)
        assert proc.threads == len(true["threads"])
        assert proc.parent == built.process(proc.ppid)["address"]
        expected = ["zombproc" if proc.zombie else "allproc"]
        expected += [] if proc.zombie else ["tasks"]
        expected += ["pidhash"] if proc.pid in truth["pidhash"] else []
        assert list(proc.lists) == expected
        assert proc.whole


@pytest.mark.parametrize("name", layouts.names())
def test_every_layout(name, files):
    built = crash(name)
    chosen = {} if RELEASES[name] else {"layout": name}
    answer = ask(*files(built), **chosen)
    assert answer.warnings == answer.report.stops == answer.report.notes == []
    assert_as_planted(answer, built)
    with unlinked(built, 71):
        core = built.dump()
    answer = ask(*files(built, core), **chosen)
    hidden = answer.by_pid()[71]
    assert hidden.comm == "bash"
    assert hidden.lists == ("tasks", "pidhash")
    assert answer.report.stops == []
    assert answer.report.notes == [
        f"process 71 at {hidden.address:#x} is on tasks and pidhash, but not on allproc or zombproc"
    ]
    assert len(answer.procs) == len(built.truth["processes"])


ERAS = (
    "10.4.11 i386",
    "10.6.8 x86_64",
    "10.13.6 x86_64",
    "12.5 arm64",
    "13.5 x86_64",
    "15.5 arm64",
)


@pytest.mark.parametrize("name", ERAS)
def test_a_process_without_a_task_on_the_queue_is_noted(name, files):
    built = crash(name)
    layout = layouts.table(name)
    width = built.memory.width
    link = layout.offset("task", "tasks" if layout.has("task", "tasks") else "pset_tasks")
    place = built.process(71)["task"] + link
    following, before = (
        int.from_bytes(built.memory.read(place + at, width), "little") for at in (0, width)
    )
    with (
        built.patched(before + link, built.memory.pointer(following)),
        built.patched(following + link + width, built.memory.pointer(before)),
    ):
        core = built.dump()
    answer = ask(*files(built, core))
    found = answer.by_pid()[71]
    assert found.lists == ("allproc", "pidhash")
    assert answer.report.notes == [
        f"process 71 at {found.address:#x} is on allproc, but not on tasks"
    ]
    assert answer.report.stops == []


@pytest.mark.parametrize("name", ERAS)
def test_a_core_without_one_processs_page(name, files):
    many = [ProcSpec(100 + n, f"worker{n}", 1) for n in range(60)]  # over several pages
    built = crash(name, [ProcSpec(1, "launchd", ppid=0), *many])
    core = built.dump(without=[built.process(130)["address"]])
    answer = ask(*files(built, core))
    assert answer.report.partial
    found = answer.by_pid()
    page = built.memory.page
    size = layouts.table(name).size("proc")
    lost = built.process(130)["address"] // page
    untouched = {
        true["pid"]
        for true in built.truth["processes"]
        if true["address"] // page > lost or (true["address"] + size - 1) // page < lost
    }
    assert found.keys() >= untouched
    assert all(found[pid].comm == built.process(pid)["comm"] for pid in untouched)
    assert 130 not in found


@pytest.mark.parametrize("name", ERAS)
def test_a_circle_in_any_era(name, files):
    built = crash(name)
    pids = built.truth["allproc"]
    answer = ask(*files(built, built.cyclic(pids[-1], pids[2])))
    assert [proc.pid for proc in answer.procs] == pids + built.truth["zombproc"]
    (stop,) = answer.report.stops
    assert f"{built.process(pids[2])['address']:#x} was met before" in stop


@pytest.mark.parametrize("name", ERAS)
def test_a_layout_that_does_not_fit_is_refused(name, files):
    built = crash(name)
    place = built.truth["kernproc"] + layouts.table(name).offset("proc", "p_comm")
    with built.patched(place, b"kernel_tusk"):
        core = built.dump()
    with pytest.raises(MismatchError, match="has pid 0 and name 'kernel_tusk'"):
        ask(*files(built, core))
    first = built.process(built.truth["allproc"][1])["address"]
    back = first + layouts.table(name).offset("proc", "p_list") + built.memory.width
    with built.patched(back, built.memory.pointer(first)):
        core = built.dump()
    with pytest.raises(MismatchError, match="allproc: the back link of"):
        ask(*files(built, core))


# hostile memory: one thing wrong at a time, all else stands


@contextlib.contextmanager
def spoiled(built, address, tag, member, data):
    place = address + layouts.table(built.truth["layout"]).offset(tag, member)
    with built.patched(place, data):
        yield built.dump()


@pytest.mark.parametrize(
    ("count", "kept"), [(-1, 0), (0, 0), (3, 3), (16, 16), (17, 16), (9999, 16)]
)
def test_a_count_of_groups_is_only_a_claim(count, kept, files):
    built = crash("10.5.8 i386")
    data = (count & 0xFFFF).to_bytes(2, "little")
    with spoiled(built, built.process(328)["ucred"], "ucred", "cr_ngroups", data) as core:
        proc = ask(*files(built, core)).by_pid()[328]
    assert proc.groups == list(range(20, 36))[: max(count, 0)]
    assert proc.uid == 501


def test_a_name_need_not_end_nor_be_text(files):
    built = crash("10.9.5 x86_64")
    with spoiled(built, built.process(71)["address"], "proc", "p_comm", b"\xff" * 17) as core:
        proc = ask(*files(built, core)).by_pid()[71]
    assert proc.comm == "\udcff" * 17
    assert proc.name == "bash"


@pytest.mark.parametrize("pointer", ["p_ucred", "p_pgrp", "task"])
@pytest.mark.parametrize("value", [0, 0x1234, (1 << 64) - 8])
def test_a_wild_pointer_costs_what_it_leads_to(pointer, value, files):
    built = crash("10.9.5 x86_64")
    data = value.to_bytes(8, "little")
    with spoiled(built, built.process(71)["address"], "proc", pointer, data) as core:
        answer = ask(*files(built, core))
    proc = answer.by_pid()[71]
    assert (proc.comm, proc.uid, proc.ppid, proc.nice) == ("bash", 501, 70, -5)
    lost = {"p_ucred": proc.groups, "p_pgrp": proc.login, "task": proc.state}[pointer]
    if value:
        assert lost == Unreadable(lost.reason)
        assert lost.reason.startswith("unmapped at 0x")
    else:
        assert lost in (None, "?<+", "?<")
    others = [proc.pid for proc in answer.procs if not proc.whole]
    assert others == ([71] if value else [])


def test_threads_in_a_circle_are_counted_by_nobody(files):
    built = crash("10.9.5 x86_64")
    (first, _), (second, _) = built.process(1)["threads"]
    data = second.to_bytes(8, "little")
    with spoiled(built, second, "thread", "task_threads", data) as core:
        proc = ask(*files(built, core)).by_pid()[1]
    assert first != second
    assert isinstance(proc.threads, Unreadable)
    assert "circle" in proc.threads.reason
    assert proc.comm == "launchd"


@pytest.mark.parametrize("mask", [0x7FFFFFFFFFFFFFFF, (1 << 64) - 1, 6, 1 << 40])
def test_a_hash_that_is_no_hash_is_not_walked(mask, files):
    built = crash("10.9.5 x86_64")
    with built.patched(built.address("_pidhash"), mask.to_bytes(8, "little")):
        core = built.dump()
    answer = ask(*files(built, core))
    assert [proc.pid for proc in answer.procs][: len(built.truth["allproc"])] == built.truth[
        "allproc"
    ]
    (stop,) = answer.report.stops
    assert stop.startswith("pidhash: stopped after 0 elements")


def test_a_task_queue_in_a_circle_is_walked_once(files):
    built = crash("10.9.5 x86_64")
    task = built.process(71)["task"]
    with spoiled(built, task, "task", "tasks", task.to_bytes(8, "little")) as core:
        answer = ask(*files(built, core))
    assert len(answer.procs) == len(built.truth["processes"])
    (stop,) = answer.report.stops
    assert stop.startswith("tasks: stopped after ")
    assert f"{task:#x} was met before" in stop


def test_another_releases_layout_is_refused(files):
    built = crash("10.9.5 x86_64")
    with pytest.raises(MismatchError, match="kernproc at 0x"):
        ask(*files(built), layout="10.6.8 x86_64")


def test_no_banner_no_layout(files):
    built = crash("10.9.5 x86_64")
    core = built.dump(without=[built.address("_version")])
    kernel, dump = files(built, core)
    answer = ask(kernel, dump)  # the file's banner, whose UUID is the memory's
    assert len(answer.procs) == len(built.truth["processes"])


STATES = [
    ((TH_RUN,), {}, "Rs"),
    ((TH_WAIT,), {}, "Ss"),
    ((TH_WAIT | TH_UNINT,), {}, "Us"),
    ((TH_WAIT, TH_RUN, TH_WAIT), {}, "Rs"),
    ((TH_WAIT, TH_WAIT | TH_UNINT), {}, "Us"),
    ((TH_WAIT,), {"suspend_count": 1}, "Ts"),
    ((TH_RUN,), {"stat": SSTOP}, "Ts"),
    ((TH_SUSP,), {}, "Ts"),
    ((TH_WAIT,), {"nice": 5}, "SNs"),
    ((TH_WAIT,), {"nice": -5}, "S<s"),
    ((TH_WAIT,), {"sid": 1, "pgid": 1}, "S"),
    ((TH_WAIT,), {"tty": (4, 17)}, "Ss+"),
    ((TH_WAIT,), {"lflag": 0x400}, "SXs"),
    ((TH_WAIT,), {"lflag": 0x2000}, "SVs"),
]


@pytest.mark.parametrize("name", ["10.5.8 i386", "10.13.6 x86_64", "14.6 arm64"])
def test_states_are_those_of_ps(name, files):
    """adv_cmds ps: the liveliest thread's letter, then < N X E V s +."""
    specs = [ProcSpec(1, "launchd", ppid=0)]
    specs += [
        ProcSpec(100 + n, f"state{n}", threads=threads, **more)
        for n, (threads, more, _) in enumerate(STATES)
    ]
    found = ask(*files(crash(name, specs))).by_pid()
    states = {n: found[100 + n].state for n in range(len(STATES))}
    assert states == {n: state for n, (_, _, state) in enumerate(STATES)}


@pytest.mark.parametrize(
    ("device", "path"),
    [
        ((0, 0), "/dev/console"),
        ((16, 0), "/dev/ttys000"),
        ((16, 127), "/dev/ttys127"),
        ((4, 0), "/dev/ttyp0"),
        ((4, 0x1F), "/dev/ttyqf"),
        ((4, 0x7F), "/dev/ttywf"),
        ((4, 0x80), "(4,128)"),
        ((9, 3), "(9,3)"),
    ],
)
def test_terminals_have_the_names_of_their_devices(device, path, files):
    specs = [ProcSpec(1, "launchd", ppid=0), ProcSpec(2, "sh", tty=device)]
    found = ask(*files(crash("10.9.5 x86_64", specs))).by_pid()
    assert found[2].tty == path
    assert found[2].tdev == device[0] << 24 | device[1]
    assert found[1].tty is found[1].tdev is None


@pytest.mark.parametrize(
    ("start", "text"),
    [
        ((0, 0), "1970-01-01T00:00:00.000000Z"),
        ((1_499_740_807, 1237), "2017-07-11T02:40:07.001237Z"),
        ((-1, 5), "1969-12-31T23:59:59.000005Z"),
        ((1 << 62, 5), "4611686018427387904.000005"),
        ((253_402_300_799, 0), "9999-12-31T23:59:59.000000Z"),
        ((253_402_300_800, 0), "253402300800.000000"),
        ((-30_610_224_000, 0), "1000-01-01T00:00:00.000000Z"),
        ((-30_610_224_001, 0), "-30610224001.000000"),
        ((1, 1_000_000), "1.1000000"),
        ((1, -5), "1.-00005"),
    ],
)
def test_times_are_iso_8601(start, text):
    assert iso_time(start) == text


def test_two_thousand_processes(files):
    import time

    specs = [ProcSpec(1, "launchd", ppid=0)]
    specs += [ProcSpec(100 + n, f"p{n}", 1, uid=n % 50, gid=20) for n in range(2000)]
    paths = files(crash("10.13.6 x86_64", specs, maxproc=4096))
    started = time.process_time()
    answer = ask(*paths)
    assert time.process_time() - started < 1
    assert len(answer.procs) == 2002
