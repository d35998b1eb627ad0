"""Open files, against what was planted and what a running kernel answered."""

from __future__ import annotations

import json
import struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from tests.inputs import DUMPS, oracle, plain_core, real, truth

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
MACHINE = {"crash": "machine/crash.kdp-core", "live": "machine/live.elfcore"}
STATES = {1: "LISTEN", 4: "ESTABLISHED"}
KINDS = {"inet": "IPv4", "inet6": "IPv6", "unix": "unix"}
DTYPES = {3: "PSXSHM", 4: "PSXSEM", 5: "KQUEUE", 6: "PIPE", 7: "FSEVENTS"}
VTYPES = {1: "REG", 2: "DIR", 4: "CHR", 7: "FIFO"}


def files(*args):
    found = CliRunner().invoke(cli, ["files", *args, "--format", "json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def number(text):
    return None if text is None else int(text, 16)


def endpoint(text):
    """As truth.json has it, "0.0.0.0:80", in lsof's form; nothing for one that is not there."""
    host, _, port = text.rpartition(":")
    if host in ("0.0.0.0", "::"):
        return f"*:{port}" if port != "0" else None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@pytest.mark.parametrize("dump", DUMPS)
def test_descriptors_are_those_planted(dump):
    rows = files("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    found = {(row["pid"], row["fd"]): row for row in rows}
    assert len(found) == len(rows)
    planted = {
        (process["pid"], fd["fd"]): fd
        for process in truth(dump)["processes"]
        for fd in process["fds"]
    }
    assert planted.keys() == {key for key in found if isinstance(key[1], int)}
    assert {fd["type"] for fd in planted.values()} >= {"vnode", "tcp", "udp", "unix", "pipe"}
    for key, fd in planted.items():
        row = found[key]
        assert number(row["fileglob"]) == fd["fileglob"]
        assert row["cloexec"] == fd["cloexec"]
        if fd["type"] == "vnode":
            assert row["path"] == row["name"] == fd["path"]
            assert number(row["vnode"]) == number(row["data"]) == fd["vnode"]
            assert (number(row["flags"]), row["offset"]) == (fd["flag"], fd["offset"])
            assert row["mode"] == {1: "r", 2: "w", 3: "u"}[fd["flag"] & 3]
        elif fd["dtype"] == 2:
            assert number(row["socket"]) == number(row["data"]) == fd["socket"]
            assert row["type"] == KINDS[fd["family"]]
            if fd["family"] == "unix":
                assert row["local"] == fd["local"]
                continue
            assert row["protocol"] == fd["proto"]
            assert row["local"] == endpoint(fd["local"])
            assert row["remote"] == endpoint(fd["remote"])
            assert row["state"] == STATES.get(fd["state"])
        else:
            assert row["type"] == DTYPES[fd["dtype"]]
            assert number(row["data"]) == fd["data"]


@pytest.mark.parametrize("dump", DUMPS)
def test_what_is_held_without_a_descriptor(dump):
    rows = files("-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump))
    found = {(row["pid"], row["fd"]): row for row in rows}
    programs = 0
    for process in truth(dump)["processes"]:
        pid = process["pid"]
        if process.get("cwd"):
            assert found[pid, "cwd"]["path"] == process["cwd"]
            assert found[pid, "cwd"]["type"] == "DIR"
        if process.get("textvp"):
            row = found[pid, "txt"]
            assert (row["path"], number(row["vnode"])) == (process["path"], process["textvp"])
            programs += 1
    assert programs > 30


@pytest.mark.parametrize("machine", MACHINE)
def test_descriptors_of_a_machine_that_ran(machine):
    """Against the same structures read by lldb with the kernel's DWARF."""
    rows = files("-N", real(KERNEL), "-M", real(MACHINE[machine]))
    found = {(row["pid"], row["fd"]): row for row in rows if isinstance(row["fd"], int)}
    said = {
        (process["p_pid"], fd["fd"]): fd
        for process in oracle(machine)["procs"]
        for fd in process["fds"]
    }
    assert found.keys() == said.keys()
    assert len(said) > 50
    for key, fd in said.items():
        row = found[key]
        for name, theirs in (("fileproc", "fp"), ("fileglob", "fg"), ("data", "data")):
            assert row[name] == fd[theirs]
        assert (number(row["flags"]), row["refs"]) == (int(fd["flag"], 16), fd["count"])
        assert row["offset"] == fd["offset"]
        if fd["type"] == 1:
            assert row["type"] == VTYPES[fd["vtype"]]
            assert row["path"].rpartition("/")[2] == fd["v_name"]
        elif fd["type"] == 2:
            assert row["socket"] == fd["data"]
        else:
            assert row["type"] == DTYPES[fd["type"]]


def userland(machine, call):
    """pid -> bytes of what proc_info answered to `call` on the running machine."""
    answers = {}
    for name, text in oracle(machine)["userland"]["other"]:
        pid, _, data = text.partition(" ")
        if name == call and "ERR" not in data:
            answers[int(pid)] = bytes.fromhex(data)
    return answers


def test_descriptors_as_the_running_kernel_listed_them():
    """struct proc_fdinfo {int32_t fd; uint32_t type} of PROC_PIDLISTFDS.

    Process 1 did the asking; it opened /dev/kmem afterwards.
    """
    rows = files("-N", real(KERNEL), "-M", real(MACHINE["crash"]))
    kinds = {**DTYPES, 2: ("IPv4", "IPv6", "unix", "systm"), 1: tuple(VTYPES.values())}
    held = {(r["pid"], r["fd"]): r for r in rows if isinstance(r["fd"], int)}
    listed = {
        (pid, fd): kind
        for pid, answer in userland("crash", "listfds").items()
        for fd, kind in struct.iter_unpack("<2i", answer)
    }
    assert len(listed) > 50
    for key, kind in listed.items():
        assert held[key]["type"] in kinds[kind]
    later = held.keys() - listed.keys()
    assert [(key[0], held[key]["path"]) for key in later] == [(1, "/dev/kmem")]


def test_directories_as_the_running_kernel_named_them():
    """PROC_PIDVNODEPATHINFO: the paths of cwd and root, each after 152 bytes of vnode_info."""
    rows = files("-N", real(KERNEL), "-M", real(MACHINE["crash"]))
    held = {(row["pid"], row["fd"]): row["path"] for row in rows}
    answers = userland("crash", "vnodepathinfo")
    assert len(answers) == 5
    for pid, answer in answers.items():
        for name, start in (("cwd", 152), ("rtd", 1176 + 152)):
            path = answer[start : start + 1024].split(b"\0", 1)[0].decode()
            assert held.get((pid, name)) == (path or None)


def test_only_one_process():
    where = ("-N", real(KERNEL), "-M", real(MACHINE["crash"]))
    rows = files(*where, "--pid", "3", "--pid", "5")
    assert {row["pid"] for row in rows} == {3, 5}
    names = {row["name"] for row in rows}
    assert names >= {
        "/shm1",
        "/sem1",
        "/tmp/fifo",
        "TCP *:8081 (LISTEN)",
        "/tmp/netd.sock (LISTEN)",
    }
    missing = CliRunner().invoke(cli, ["files", *where, "--pid", "77"])
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr.startswith("kvmtool: process 77 not found")


def test_a_table_of_every_column():
    from kvmtool.cli.files import LISTING

    where = ("-N", real(KERNEL), "-M", real(MACHINE["crash"]), "--pid", "3")
    columns = ",".join(column.name for column in LISTING.columns)
    found = CliRunner().invoke(cli, ["files", *where, "-o", columns])
    assert found.exit_code == 0, found.output
    assert len(found.stdout.splitlines()) == len(files(*where)) + 1
    assert " 3,2 " in found.stdout  # /dev/null
