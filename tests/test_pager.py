"""--pager: only when asked, only at a terminal, and the answer is as in any pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from inputs import ROOT

from kvmtool import sample


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sample"))
    sample.write(folder)
    return ["-N", os.path.join(folder, "mach_kernel"), "-M", os.path.join(folder, "core")]


def run(*words, terminal=True, **environment):
    """Standard output of the command at a terminal (or not), stderr, the exit status."""
    known = {k: v for k, v in os.environ.items() if k not in ("PAGER", "LESS", "KVMTOOL_PAGER")}
    control, stdout = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "kvmtool", *words],
        stdout=stdout if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**known, "TERM": "dumb", "COLUMNS": "40", **environment},
    ) as done:
        os.close(stdout)
        out = drained(control) if terminal else done.stdout.read()
        os.close(control)
        err = done.stderr.read().decode()
    return out.decode().replace("\r\n", "\n"), err, done.returncode


def drained(fd):
    data = b""
    while True:
        try:
            piece = os.read(fd, 1 << 16)
        except OSError:  # Linux: the other end is closed
            piece = b""
        if not piece:
            return data
        data += piece


def test_what_is_paged_is_what_a_pipe_gets(machine):
    piped, _, _ = run("procs", *machine, terminal=False)
    paged, err, status = run("procs", "--pager", *machine, PAGER="sed 's/^/>/'")
    assert paged == "".join(f">{line}\n" for line in piped.splitlines())
    assert (err, status) == ("", 0)
    before, _, _ = run("--pager", "procs", *machine, KVMTOOL_PAGER="sed 's/^/>/'", PAGER="false")
    assert before == paged


def test_nobody_is_paged_who_did_not_ask(machine):
    shown, _, _ = run("procs", *machine, PAGER="sed 's/^/>/'")
    assert ">" not in shown
    piped, _, _ = run("procs", "--pager", *machine, terminal=False, PAGER="sed 's/^/>/'")
    assert ">" not in piped


def test_less_is_told_not_to_wrap(machine):
    shown, _, _ = run("procs", "--pager", *machine, PAGER="sh -c 'cat >/dev/null; echo $LESS'")
    assert shown == "FRSX\n"
    kept, _, _ = run(
        "procs", "--pager", *machine, PAGER="sh -c 'cat >/dev/null; echo $LESS'", LESS="R"
    )
    assert kept == "R\n"


def test_a_pager_that_ends_early_leaves_nothing_behind(machine):
    shown, err, status = run("symbols", "--pager", *machine, PAGER="head -1")
    assert shown.count("\n") == 1
    assert err == ""
    assert status in (0, -13)
    shown, err, status = run("procs", "--pager", *machine, PAGER="true")
    assert (shown, err) == ("", "")


def test_a_pager_that_is_not_there(machine):
    shown, err, status = run("procs", "--pager", *machine, PAGER="no-such-pager-here")
    assert (shown, status) == ("", 1)
    assert "pager no-such-pager-here cannot be started" in err
    assert "name one in PAGER" in err
