"""What processes use, against what was planted and what the running kernel answered."""

from __future__ import annotations

import json
from struct import Struct

import pytest
from click.testing import CliRunner

from kvmtool.cli import cli
from tests.inputs import DUMPS, oracle, plain_core, real, truth

COLUMNS = "pid,time,utime,stime,vsize,rss,wchan,csflags,text"
TASKINFO = Struct("<136x4Q")  # proc_taskallinfo: pti_virtual_size, resident_size, user, system


def rows(kernel, core):
    args = ["procs", "-N", kernel, "-M", core, "-o", COLUMNS, "--format", "json"]
    found = CliRunner().invoke(cli, args)
    assert found.exit_code == 0, found.output
    return {row["pid"]: row for row in json.loads(found.stdout)}


@pytest.mark.parametrize("dump", DUMPS)
def test_times_and_texts_are_those_planted(dump):
    found = rows(real(f"dumps/{dump}/mach_kernel"), plain_core(dump))
    compared = 0
    for process in truth(dump)["processes"]:
        row = found[process["pid"]]
        if process["zombie"]:
            assert row["time"] is None
            continue
        assert (row["utime"], row["stime"]) == (process["user_time"], process["system_time"])
        assert row["time"] == row["utime"] + row["stime"]
        if process["pid"]:
            assert row["text"] == process["path"]
            assert row["vsize"] == sum(end - start for start, end, *_ in process["regions"])
            compared += 1
    assert compared > 50


def test_usage_is_what_the_running_kernel_answered():
    """proc_info of processes that then slept: their times and sizes moved no more."""
    said = {}
    for what, text in oracle("live")["userland"]["other"]:
        pid, _, data = text.partition(" ")
        if what == "taskallinfo" and not data.startswith("ERR"):
            said[int(pid)] = TASKINFO.unpack_from(bytes.fromhex(data))
    kernel = real("machine/x86_64-xnu-2422.115.4.mach_kernel")
    found = rows(kernel, real("machine/live.elfcore"))
    for pid in (2, 3, 4, 5):
        vsize, rss, user, system = said[pid]
        row = found[pid]
        assert (row["vsize"], row["rss"]) == (vsize, rss)
        assert user <= row["utime"] < user + 10**9
        assert system <= row["stime"] < system + 10**9
    texts = {1: "/sbin/launchd", 2: "/usr/sbin/syslogd", 4: "/bin/sh", 5: "/bin/sleep"}
    assert {pid: found[pid]["text"] for pid in texts} == texts
    first = {}
    for thread in oracle("live")["threads"]:
        if int(thread["wait_event"], 16):
            first.setdefault(thread["task"], thread["wait_event"])
    tasks = {p["p_pid"]: p["task"] for p in oracle("live")["procs"]}
    for pid in texts:
        if found[pid]["wchan"] is not None:
            assert found[pid]["wchan"]["address"] == first[tasks[pid]]
