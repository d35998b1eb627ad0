"""Every command on a generated machine of each of the 35 main kernels: the answer is what was
planted, whatever the release keeps and wherever it keeps it.
"""

from __future__ import annotations

import json
import re
import uuid
from contextlib import ExitStack

import pytest
from click.testing import CliRunner

from kvmtool.cli import COMMANDS, cli
from kvmtool.types import layouts
from tests.builders.eras import ERAS, whole
from tests.builders.network import INTERFACES
from tests.builders.specs import P_CONTROLT, TH_RUN, TH_SUSP, TH_UNINT, TH_WAIT
from tests.builders.stacks import CALLERS, CLOCK, CONTINUATION


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """The options that open the machine of an era; its files are written once."""
    known = {}

    def options(name, form):
        if name not in known:
            folder = known[name] = tmp_path_factory.mktemp("era")
            built = whole(name)
            (folder / "kernel").write_bytes(built.kernel)
            (folder / "core").write_bytes(built.core)
        if form == "lime" and not (known[name] / form).exists():
            (known[name] / form).write_bytes(whole(name).truth["ram"].lime())
        return ("-N", str(known[name] / "kernel"), "-M", str(known[name] / form))

    return options


@pytest.fixture
def ask(machine):
    """What a command answers of an era's machine; stderr must say what is expected of it."""

    def run(name, *args, status=0, stderr="", form="core"):
        found = CliRunner().invoke(cli, [*args, "--format", "json", *machine(name, form)])
        assert found.exit_code == status, found.output
        assert stderr is None or found.stderr == stderr
        return json.loads(found.stdout) if found.stdout else None

    run.where = lambda name: machine(name, "lime")

    return run


def number(text):
    """An address of JSON."""
    return None if text is None else int(text, 16)


def function(cell):
    """(address, name) of a function in JSON."""
    return number(cell["address"]), cell["name"]


def nanoseconds(name, ticks):
    """Absolute time: nanoseconds on Intel."""
    return ticks if ticks is None or "arm64" not in name else ticks * 10**9 // CLOCK


every_era = pytest.mark.parametrize("name", ERAS, scope="module")  # one era after the other


def test_the_eras_are_those_of_the_published_tables():
    assert len(ERAS) == len(set(ERAS)) == 35
    assert set(ERAS) <= set(layouts.names())


# processes

PLAIN = ("pid", "ppid", "pgid", "sid", "uid", "ruid", "svuid", "gid", "rgid", "svgid", "groups")
SAME = (*PLAIN, "login", "stat", "flag", "nice", "xstat", "zombie", "comm", "name")
LETTERS = {TH_RUN: "R", TH_WAIT: "S", TH_SUSP: "T", TH_UNINT | TH_WAIT: "U"}


def state_of(truth, layout):
    """ps's STAT."""
    if truth["zombie"]:
        return "Z"
    letters = {
        LETTERS.get(state, "U" if state & TH_UNINT else "S") for _, state in truth["threads"]
    }
    letter = next(letter for letter in "RUST" if letter in letters)
    if truth["stat"] == 4 or truth["comm"] == "sleeper":
        letter = "T"
    marks = "<" if truth["nice"] < 0 else "N" if truth["nice"] > 0 else ""
    marks += "s" if truth["pid"] == truth["sid"] else ""
    foreground = truth["flag"] & P_CONTROLT and layout.has("session", "s_ttypgrpid")
    return letter + marks + ("+" if foreground and truth["pgid"] == 70 else "")


@every_era
def test_procs(name, ask):
    truth, layout = whole(name).truth, layouts.table(name)
    found = ask(name, "procs")
    assert [row["pid"] for row in found] == truth["allproc"] + truth["zombproc"]
    by_pid = {process["pid"]: process for process in truth["processes"]}
    for row in found:
        true = by_pid[row["pid"]]
        assert {field: row[field] for field in SAME} == {field: true[field] for field in SAME}
        assert row["start_raw"] == (None if true["start"] is None else list(true["start"]))
        assert row["tty"] == ("/dev/ttys003" if true["tty"] else None)
        assert row["threads"] == len(true["threads"])
        assert row["state"] == state_of(true, layout)
        for field in ("address", "task", "ucred"):
            assert number(row[field]) == true[field]
        assert number(row["parent"]) == by_pid[true["ppid"]]["address"]


@every_era
def test_what_processes_use(name, ask):
    built = whole(name)
    truth, page = built.truth, built.memory.page
    columns = "pid,time,utime,stime,vsize,rss,wchan,csflags,text"
    channels = {built.address(channel): channel for channel in ("_hz", "_lbolt")}
    for row in ask(name, "procs", "-o", columns):
        used = truth["usage"][row["pid"]]
        mapped = truth.get("maps", {}).get(row["pid"], {"size": None, "resident": None})
        assert row["text"] == used["text"]
        assert number(row["csflags"]) == used["csflags"]
        times = [nanoseconds(name, used.get(mode)) for mode in ("utime", "stime")]
        assert [row["utime"], row["stime"]] == times
        assert row["time"] == (None if None in times else sum(times))
        assert row["vsize"] == mapped["size"]
        resident = mapped["resident"]
        assert row["rss"] == (None if resident is None else resident * page)
        channel = used.get("wchan")
        if channel is None:
            assert row["wchan"] is None
        else:
            assert number(row["wchan"]["address"]) == channel
            assert row["wchan"]["name"] == channels.get(channel, "_vm_page_free_wanted")


@every_era
def test_args(name, ask):
    """What processes were started with lies in their own memory, behind their own page tables."""
    truth = whole(name).truth
    if "maps" not in truth:
        pytest.skip("no structure of this release leads to a process's page table")
    found = {row["pid"]: row for row in ask(name, "args", form="lime")}
    assert set(found) == {process["pid"] for process in truth["processes"]}
    for pid, true in truth["started"].items():
        row = found[pid]
        assert (row["path"], row["args"]) == (true["path"], true["argv"])
        assert (row["env"], row["apple"]) == (true["env"], true["apple"])
    rows = ask(name, "procs", "-o", "pid,path,args", form="lime")
    assert {row["pid"]: row["args"] for row in rows} == {
        row["pid"]: row["args"] for row in found.values()
    }


@every_era
def test_memory_of_a_process(name, ask):
    """By its own page table; a zombie has none."""
    built = whole(name)
    if "maps" not in built.truth:
        pytest.skip("no structure of this release leads to a process's page table")
    for pid in (1, 71):
        true = built.truth["started"][pid]
        at = f"{true['block']:#x}"
        (row,) = ask(name, "read", at, "64", "--pid", str(pid), "-t", "s", form="lime")
        assert row["string"].removeprefix("executable_path=") == true["path"]
    for pid, why in ((99_999, "it is a zombie"), (12_345, "process 12345 not found")):
        said = CliRunner().invoke(cli, ["read", "0x1000", "4", "--pid", str(pid), *ask.where(name)])
        assert (said.exit_code, said.stdout) == (1, "")
        assert why in said.stderr


@every_era
def test_args_without_the_memory_of_processes(name, ask):
    """Who was started with nothing the kernel knows; of the rest nothing can be read."""
    truth = whole(name).truth
    rows = ask(name, "args", status=3, stderr=None)
    without = {process["pid"] for process in truth["processes"]} - truth["started"].keys()
    assert 0 in without
    for row in rows:
        fields = [row[field] for field in ("path", "args", "env", "apple")]
        if row["pid"] in without:
            assert fields == [None, [], [], []]
        else:
            assert all("kernel's memory alone" in field["unreadable"] for field in fields)


# threads and stacks


@every_era
def test_threads(name, ask):
    built, layout = whole(name), layouts.table(name)
    truth = built.truth
    by_pid = {process["pid"]: process for process in truth["processes"]}
    states = {thread: state for p in truth["processes"] for thread, state in p["threads"]}
    found = ask(name, "threads")
    assert [number(row["address"]) for row in found] == list(truth["threads"])
    for row in found:
        true = truth["threads"][number(row["address"])]
        process = by_pid[true["pid"]]
        assert row["command"] == (process["name"] or process["comm"])
        assert {key: row[key] for key in ("pid", "cpu", "name", "wmesg")} == {
            key: true[key] for key in ("pid", "cpu", "name", "wmesg")
        }
        assert row["tid"] == (true["tid"] if layout.has("thread", "thread_id") else None)
        assert number(row["th_state"]) == states[number(row["address"])]
        assert number(row["kernel_stack"]) == true["stack"]
        assert number(row["task"]) == process["task"]
        goes_on = row["continuation"] and function(row["continuation"])
        assert goes_on == ((true["continuation"], CONTINUATION) if true["continuation"] else None)
        assert row["pri"] == row["base"] == (31 if true["pid"] else 81)
        for mode in ("user_time", "system_time"):
            assert row[mode] == nanoseconds(
                name, truth["timers"].get(true["address"], {}).get(mode)
            )


@every_era
def test_backtraces(name, ask):
    truth = whole(name).truth
    for stack in ask(name, "backtrace", "--all"):
        true = truth["threads"][number(stack["thread"])]
        assert (stack["pid"], stack["cpu"]) == (true["pid"], true["cpu"])
        assert [number(frame["pc"]) for frame in stack["frames"]] == true["calls"]
        assert not stack["unreadable"]
        if not true["stack"]:
            assert stack["stop"] == f"no kernel stack: it goes on at {CONTINUATION}"
            continue
        assert [frame["name"] for frame in stack["frames"]] == [f"{f}+0x5" for f in CALLERS]
        assert stack["stop"] == "end of the chain"


@every_era
def test_what_each_cpu_did(name, ask):
    truth = whole(name).truth
    known = truth["registers"] if name.endswith("arm64") else truth["registers"][:1]
    found = ask(name, "backtrace")
    assert [stack["cpu"] for stack in found] == list(range(len(known)))
    for stack in found:
        assert truth["threads"][number(stack["thread"])]["cpu"] == stack["cpu"]
        assert [frame["symbol"] for frame in stack["frames"]] == list(CALLERS)
        assert stack["origin"].startswith("registers ")


# kexts, messages, file systems


@every_era
def test_kexts(name, ask):
    truth = whole(name).truth["kexts"]
    found = {row["identifier"]: row for row in ask(name, "kexts")}
    summed = layouts.table(name).has("_loaded_kext_summary")
    assert list(found) == [kext["name"] for kext in reversed(truth)]
    for index, kext in enumerate(truth, 1):
        row = found[kext["name"]]
        assert (row["index"], row["refs"]) == (index, len(truth) - index)
        assert row["linked"] == list(range(1, index))
        assert row["version"] == kext["version"]
        for field, true in (("address", "address"), ("size", "size"), ("kmod", "kmod_info")):
            assert number(row[field]) == kext[true]
        assert number(row["wired"]) == kext["size"] - 0x1000
        assert row["uuid"] == str(uuid.UUID(bytes=kext["uuid"])).upper()
        assert row["lists"] == (["kmod", "summaries"] if summed else ["kmod"])


@every_era
def test_dmesg(name, ask):
    truth = whole(name).truth["msgbuf"]
    found = ask(name, "dmesg")
    assert found["text"] == truth["text"]
    assert number(found["address"]) == truth["address"]


@every_era
def test_mounts(name, ask):
    sizes = ("bsize", "iosize", "blocks", "bfree", "bavail", "bused", "files", "ffree")
    same = ("on", *sizes, "owner")
    truth = whole(name).truth["mounts"]
    found = ask(name, "mounts")
    assert len(found) == len(truth)
    for row, true in zip(found, truth, strict=True):
        assert {field: row[field] for field in same} == {field: true[field] for field in same}
        assert (row["from"], row["type"]) == (true["source"], true["kind"])
        assert row["fsid"] == list(true["fsid"])
        for ours, theirs in (("flags", "flags"), ("address", "address")):
            assert number(row[ours]) == true[theirs]
        assert (number(row["vnodecovered"]) or 0) == true["vnodecovered"]


# tables of functions


@every_era
def test_devsw(name, ask):
    built = whole(name)
    names = {value + built.slide: symbol for symbol, value in built.symbols.items()}
    found = ask(name, "devsw", "--all")
    characters = [row for row in found if row["kind"] == "character"]
    assert len(found) - len(characters) == built.truth["nblkdev"]
    kinds = {0: None, 1: "tape", 2: "disk", 3: "tty"}
    hooked = built.truth["kexts"][1]
    for row, true in zip(characters, built.truth["cdevsw"], strict=True):
        assert row["type"] == kinds[true["d_type"]]
        for slot in ("open", "close", "read", "write", "ioctl", "select", "strategy"):
            address, text = function(row[slot])
            assert address == true[f"d_{slot}"]
            if address in names:
                assert text == names[address]
            else:
                assert (row["major"], slot) == (3, "read")
                assert hooked["name"] in text
        assert row["outside"] == []
    assert "com.example.driver.second" in characters[3]["driver"]


@every_era
def test_syscalls(name, ask):
    truth, found = whole(name).truth, ask(name, "syscalls")
    planted = [("syscall", call) for call in truth["sysent"]]
    planted += [("trap", call) for call in truth["traps"]]
    assert len(found) == len(planted)
    for row, (table, true) in zip(found, planted, strict=True):
        assert row["table"] == table
        assert {key: row[key] for key in ("number", "name", "arguments")} == {
            key: true[key] for key in ("number", "name", "arguments")
        }
        assert function(row["handler"]) == (true["handler"], true["handler_name"])
        assert number(row["address"]) == true["address"]
        if true["munge"]:
            assert number(row["munge"]["address"]) == true["munge"]
        assert not row["outside"]


@every_era
def test_sysctl(name, ask):
    truth = whole(name).truth["sysctl"]
    found = ask(name, "sysctl", "--computed")
    assert len(found) == len(truth)
    for row, true in zip(found, truth, strict=True):
        same = ("name", "mib", "type", "fmt", "value")
        assert {key: row[key] for key in same} == {key: true[key] for key in same}
        assert function(row["handler"]) == (true["handler"], true["handler_name"])
        assert number(row["address"]) == true["address"]
        assert row["flags"][:2] == ["rd", "wr"]


# descriptors and sockets

FAMILIES = {2: "IPv4", 30: "IPv6"}
PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp"}


def lsof(end):
    """An address and a port as lsof writes them."""
    host, port = end
    host = "*" if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
    return f"{host}:{port or '*'}"


@every_era
def test_files(name, ask):
    truth, layout = whole(name).truth, layouts.table(name)
    notes = ""
    if not layout.has("inpcb"):
        near = "did you mean unpcb, inpcbinfo, inpcbhead?"
        notes = (
            "kvmtool: Internet sockets have no addresses: structure inpcb not found "
            f"({near}); types are the built-in ones of {name}: --types takes more "
            "(a dSYM, CTF, ISF)\n"
        )
    rows = ask(name, "files", stderr=notes)
    found = {(row["pid"], row["fd"]): row for row in rows}
    assert len(found) == len(rows)
    for pid, used in truth["usage"].items():
        if used["text"] is not None:
            row = found.pop((pid, "txt"))
            assert (row["path"], row["type"]) == (used["text"], "REG")
    planted = truth["descriptors"]
    assert set(found) == set(planted)
    for key, true in planted.items():
        row = found[key]
        if isinstance(key[1], str):
            assert (row["path"], row["type"]) == (true["path"], true["kind"])
            continue
        assert row["slot"] == true["slot"]
        if true["slot"] == "reserved":
            assert row["type"] is row["fileproc"] is None
            continue
        assert (number(row["fileproc"]), number(row["fileglob"])) == (
            true["fileproc"],
            true["fileglob"],
        )
        assert (number(row["flags"]), row["offset"]) == (true["flag"], true["offset"])
        assert row["cloexec"] == true["cloexec"]
        assert number(row["data"]) == true["data"]
        if true["type"] == 1:
            assert (row["type"], row["path"]) == (true["kind"], true["what"])
            assert row["mount"] == max(
                (m["on"] for m in truth["mounts"] if true["what"].startswith(m["on"])), key=len
            )
        elif true["type"] == 2:
            of_socket(row, truth["sockets"][true["what"]], layout)
        else:
            assert row["type"] == true["what"]


def of_socket(row, true, layout):
    assert number(row["socket"]) == true["socket"]
    if "unix" in true:
        unix = true["unix"]
        assert (row["type"], row["protocol"], row["local"]) == ("unix", "stream", unix.path)
        assert row["state"] == ("LISTEN" if unix.listening else "CONNECTED")
        return
    net = true["net"]
    assert row["type"] == FAMILIES[net.family]
    if layout.has("inpcb"):
        assert row["protocol"] == PROTOCOLS[net.protocol]
        assert row["local"] == lsof(net.local)
        assert row["remote"] == (lsof(net.foreign) if net.foreign[1] else None)
        assert row["state"] == net.state


# the machine


@every_era
def test_host(name, ask):
    built = whole(name)
    truth, found = built.truth, ask(name, "host")
    load = ("avenrun", "mach_factor")
    planted = {key: value for key, value in truth["host"].items() if key not in load}
    assert {key: found[key] for key in planted} == planted
    assert (found["version"], found["osversion"]) == (truth["banner"], truth["osversion"])
    assert found["hostname"] == truth["hostname"]
    assert (found["arch"], found["page_size"]) == (built.arch, built.memory.page)
    assert found["maxproc"] == truth["maxproc"]
    assert found["uuid"] == str(uuid.UUID(bytes=truth["uuid"])).upper()
    assert number(found["slide"]) == truth["slide"]
    start = truth["processes"][0]["start"]
    assert found["boottime_raw"] == list(start)


@every_era
def test_load(name, ask):
    truth, found = whole(name).truth, ask(name, "load")
    assert found["loadavg"] == [average / truth["fscale"] for average in truth["loadavg"]]
    assert found["nprocs"] == truth["nprocs"]
    assert found["maxproc"] == truth["maxproc"]
    assert found["avenrun"] == [1.5, 1.25, 0.75]
    assert found["mach_factor"] == [6.5, 7.0, 7.999]


@every_era
def test_cpus(name, ask):
    truth = whole(name).truth
    by_pid = {process["pid"]: process for process in truth["processes"]}
    found = ask(name, "cpus")
    assert len(found) == len(truth["processors"])
    for row, true in zip(found, truth["processors"], strict=True):
        for field in ("cpu", "state", "current_pri", "interrupts", "preemption_level"):
            assert row[field] == true[field], field
        for field in ("address", "active_thread", "idle_thread", "processor_set", "cpu_data"):
            assert number(row[field]) == true[field], field
        assert row["idle"] is (true["state"] == "idle")
        thread = truth["threads"][true["active_thread"]]
        process = by_pid[thread["pid"]]
        assert (row["pid"], row["command"]) == (process["pid"], process["name"] or process["comm"])
        if name.endswith("arm64") or row["cpu"] == 0:
            assert function(row["pc"]) == (thread["registers"]["pc"], f"{CALLERS[0]}+0x5")
        else:  # an Intel kernel's core has the registers of one CPU
            assert row["pc"] is row["registers"] is None


@every_era
def test_zones(name, ask):
    truth = whole(name).truth["zones"]
    size = sum(zone["cur_size"] for zone in truth)
    used = sum(zone["in_use"] * zone["elem_size"] for zone in truth)
    said = f"kvmtool: {len(truth)} zones: {size} bytes, {used} of them in use\n"
    found = ask(name, "zones", stderr=said)
    assert len(found) == len(truth)
    for row, true in zip(found, truth, strict=True):
        assert {**{field: row[field] for field in true}, "address": number(row["address"])} == true


@every_era
def test_vm(name, ask):
    built = whole(name)
    truth, page = built.truth["vm"], built.memory.page
    found = ask(name, "vm")
    values = {(row["group"], row["counter"]): row["value"] for row in found}
    assert values.pop(("page", "page_size")) == page
    assert values.pop(("pages", "free_wanted")) == 0
    assert values == {(group, key): n for group, there in truth.items() for key, n in there.items()}
    for row in found:
        if row["unit"] == "pages":
            assert row["bytes"] == row["value"] * page


def letters(bits):
    """VM_PROT_ bits."""
    return "".join(letter if bits >> n & 1 else "-" for n, letter in enumerate("rwx"))


@every_era
def test_vmmap(name, ask):
    built = whole(name)
    if "maps" not in built.truth:
        said = ask(name, "vmmap", "71", status=1, stderr=None)
        assert said is None
        return
    page = built.memory.page
    for which, pid in (("71", 71), ("kernel", 0)):
        truth = built.truth["maps"][pid]["entries"]
        found = ask(name, "vmmap", which)
        assert [number(row["address"]) for row in found] == [true["address"] for true in truth]
        for row, true in zip(found, truth, strict=True):
            end = true["start"] + true["pages"] * page
            assert (number(row["start"]), number(row["end"])) == (true["start"], end)
            assert (row["prot"], row["max_prot"]) == (
                letters(true["protection"]),
                letters(true["maximum"]),
            )
            assert (row["tag"], number(row["offset"])) == (true["tag"], true["offset"] * page)
            assert (row["wired_count"], row["user_wired_count"]) == (
                true["wired"],
                true["user_wired"],
            )
            assert row["inheritance"] == ("share", "copy", "none")[true["inheritance"]]
            assert (row["object"] is None) == (true["resident"] is None)
            assert row["resident"] == (true["resident"] or 0)
            assert row["size"] == end - true["start"]


# what died, what changed


@every_era
def test_a_machine_that_did_not_panic(name, ask):
    found = ask(name, "panic")
    assert found["panicked"] is False
    assert found["version"] == whole(name).truth["banner"]
    rest = set(found) - {"panicked", "version"}
    assert {key for key in rest if found[key] not in (None, [])} == set()


@every_era
def test_check(name, machine, tmp_path):
    """The driver's hook that every machine has, and what is changed besides, and nothing else."""
    built = whole(name)
    heap = built.truth["processes"][-1]["address"]
    devices, leaves = built.truth["cdevsw"], built.truth["sysctl"]
    layout = layouts.table(name)
    leaf = next(leaf for leaf in leaves if leaf["name"] == "kern.proc")
    slot = built.address("_cdevsw") + 5 * layout.size("cdevsw")
    places = {
        "cdevsw[5].d_open": slot + layout.offset("cdevsw", "d_open"),
        f"sysctl {leaf['name']}": leaf["address"] + layout.offset("sysctl_oid", "oid_handler"),
    }
    core = tmp_path / "core"
    with ExitStack() as stack:
        for at in places.values():
            stack.enter_context(built.patched(at, built.memory.pointer(heap)))
        core.write_bytes(built.dump())
    kernel = machine(name, "core")[1]
    changed = CliRunner().invoke(cli, ["check", "--format", "json", "-N", kernel, "-M", str(core)])
    clean = CliRunner().invoke(cli, ["check", "--format", "json", *machine(name, "core")])
    assert (clean.exit_code, changed.exit_code) == (3, 3), clean.stderr + changed.stderr
    (hook,) = json.loads(clean.stdout)
    assert (hook["where"], hook["severity"]) == ("cdevsw[3].d_read", "medium")
    assert hook["kext"] == built.truth["kexts"][1]["name"]
    assert number(hook["found"]["address"]) == devices[3]["d_read"]
    found = {row["where"]: row for row in json.loads(changed.stdout)}
    assert found.pop("cdevsw[3].d_read") == hook
    assert {number(row["address"]) for row in found.values()} == set(places.values())
    assert {row["severity"] for row in found.values()} == {"high"}
    assert {number(row["found"]["address"]) for row in found.values()} == {heap}
    assert f"{len(built.truth['processes'])} processes" in clean.stderr


# the network


@every_era
def test_net(name, ask):
    truth, layout = whole(name).truth, layouts.table(name)
    known = layout.has("inpcb")
    rows = ask(name, "net", stderr=None)
    found = {number(row["socket"]): row for row in rows}
    assert found.keys() == {true["socket"] for true in truth["sockets"].values()}
    for true in truth["sockets"].values():
        row = found[true["socket"]]
        assert (row["pid"], row["command"]) == (71, "bash")
        if "unix" in true:
            assert (row["proto"], row["local"]) == ("unix", true["unix"].path)
        elif known:
            net = true["net"]
            assert row["proto"] == PROTOCOLS[net.protocol] + ("6" if net.family == 30 else "4")
            assert (row["recv_q"], row["send_q"]) == net.queued
            assert row["state"] == net.state
    if not layout.has("ifnet"):
        assert ask(name, "net", "--interfaces", status=1, stderr=None) is None
        assert ask(name, "net", "--routes", status=1, stderr=None) is None
        return
    interfaces = ask(name, "net", "--interfaces")
    assert [number(row["address"]) for row in interfaces] == truth["ifnets"]
    assert [row["name"] for row in interfaces] == [f"{one.name}{one.unit}" for one in INTERFACES]
    for row, one in zip(interfaces, INTERFACES, strict=True):
        assert (number(row["flags"]), row["mtu"]) == (one.flags, one.mtu)
        assert [a["address"].partition("%")[0] for a in row["addresses"]] == [
            address for address, _, _ in one.addresses
        ]
    routes = ask(name, "net", "--routes")
    assert [number(row["address"]) for row in routes] == truth["rtentries"]


# names, memory, types


@every_era
def test_symbols_of_a_machine(name, ask):
    built = whole(name)
    every = {number(row["address"]): row["name"] for row in ask(name, "symbols")}
    for symbol in ("_version", "_cdevsw", "_allproc", *CALLERS):
        address = built.address(symbol)
        assert every[address] == symbol
        (row,) = ask(name, "nlist", symbol)
        assert (number(row["address"]), row["name"]) == (address, symbol)
        assert number(row["n_value"]) == built.symbols[symbol]
    hooked = built.truth["cdevsw"][3]["d_read"]
    kernel, kext = ask(name, "symbol", f"{built.address(CALLERS[0]) + 5:#x}", f"{hooked:#x}")
    assert (kernel["symbol"], kernel["offset"]) == (CALLERS[0], 5)
    assert kext["kext"] == built.truth["kexts"][1]["name"]


@every_era
def test_memory_of_a_machine(name, ask):
    built = whole(name)
    truth, width = built.truth, built.memory.width
    (text,) = ask(name, "read", "_version", "100", "-t", "s")
    assert text["string"] == truth["banner"]
    at = truth["processes"][0]["address"]
    (row,) = ask(name, "read", f"{at:#x}", "16")
    assert bytes.fromhex(row["hex"]) == built.memory.read(at, 16)
    (found,) = ask(name, "search", "line 59 of the kernel")
    assert built.memory.read(number(found["address"]), 7) == b"line 59"
    few = ("--align", str(width), "--limit", "1")
    said = "kvmtool: stopped after 1: --limit says how many\n"
    (found,) = ask(name, "search", "--pointer", f"{at:#x}", *few, stderr=said)
    inside = int.from_bytes(built.memory.read(number(found["address"]), width), "little")
    assert inside & (1 << 47) - 1 == at & (1 << 47) - 1
    regions = ask(name, "regions")
    pages = {
        address
        for start, content in built.runs()
        for address in range(start, start + len(content), built.memory.page)
    }
    assert pages == {
        address
        for row in regions
        for address in range(number(row["start"]), number(row["end"]), built.memory.page)
    }


@every_era
def test_physical_memory_of_a_machine(name, ask, machine, tmp_path):
    """The same kernel in a dump of physical memory: translated, and written as a core again."""
    built = whole(name)
    at = built.truth["processes"][0]["address"]
    way = ask(name, "vtop", f"{at:#x}", form="lime")
    physical = number(way["physical"])
    (row,) = ask(name, "read", "--physical", f"{physical:#x}", "16", form="lime")
    assert bytes.fromhex(row["hex"]) == built.memory.read(at, 16)
    out = tmp_path / "again.core"
    done = CliRunner().invoke(cli, ["convert", str(out), *machine(name, "lime")])
    assert done.exit_code == 0, done.output
    kernel = machine(name, "core")[1]
    again = CliRunner().invoke(cli, ["procs", "--format", "json", "-N", kernel, "-M", str(out)])
    assert json.loads(again.stdout) == ask(name, "procs")


@every_era
def test_types_of_a_machine(name, ask):
    built, layout = whole(name), layouts.table(name)
    truth = built.truth
    first = ask(name, "print", "initproc->p_pid")
    assert (first["value"], number(first["address"])) == (
        1,
        built.process(1)["address"] + layout.offset("proc", "p_pid"),
    )
    walked = ask(name, "walk", "allproc", "--next", "p_list", "-o", "p_pid")
    assert [row["p_pid"] for row in walked] == truth["allproc"]
    members = {row["name"]: row for row in ask(name, "type", "proc")}
    assert members["p_pid"]["offset"] == layout.offset("proc", "p_pid")
    (proc,) = [
        row for row in ask(name, "types", "proc", "--kind", "struct") if row["name"] == "proc"
    ]
    assert proc["size"] == layout.size("proc")


@every_era
def test_info(name, ask, machine, tmp_path):
    built = whole(name)
    found = ask(name, "info", stderr=None)
    assert found["kernel"]["uuid"] == str(uuid.UUID(bytes=built.truth["uuid"])).upper()
    assert found["kernel"]["version"] == found["slide"]["version"] == built.truth["banner"]
    assert number(found["slide"]["slide"]) == built.slide
    assert [layout["layout"] for layout in found["layouts"] if layout["fits"]] == [name]
    assert len(found["threads"]) == built.shape.cpus
    kernel, _ = machine(name, "core")[1::2]
    out = tmp_path / "kernel"
    done = CliRunner().invoke(cli, ["extract", "kernel", str(out), "-N", kernel])
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == built.kernel


# Of no machine's memory: what is installed, how to write a line, what else there is on this disk.
WITHOUT = {"completion", "dd", "demo", "doctor", "kernels", "mount", "python"}


def test_every_command_is_asked_of_every_era():
    with open(__file__, encoding="utf-8") as file:
        asked = set(re.findall(r'ask\(\s*(?:\*\()?name, "(\w+)"', file.read()))
    assert asked | {"check", "convert", "extract"} == COMMANDS.keys() - WITHOUT
