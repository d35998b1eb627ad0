"""How far a command is: who is told, what a terminal shows, and that nothing of it stays."""

from __future__ import annotations

import gzip
import io
import os
import random
from array import array
from contextlib import suppress
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from kvmtool import progress, sample
from kvmtool.cli import cli, say
from kvmtool.cli import progress_line as line_module
from kvmtool.cli.progress_line import ProgressLine, line_of
from kvmtool.memory import RunMemory
from kvmtool.progress import Step
from kvmtool.source import BytesSource, open_source


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True

    def screen(self):
        """The lines as they stand at the end: what follows \\r overwrites."""
        lines = [""]
        for char in self.getvalue():
            if char == "\n":
                lines.append("")
            elif char == "\r":
                lines[-1] = lines[-1].rstrip("\0") + "\0"
            elif "\0" in lines[-1]:
                old, _, new = lines[-1].partition("\0")
                lines[-1] = old + "\0" + new + char
            else:
                lines[-1] += char
        return [overwritten(line) for line in lines]


def overwritten(line):
    shown = ""
    for part in line.split("\0"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(line_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    """What the line is written to."""
    stream = Terminal()
    monkeypatch.setattr(line_module, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setenv("COLUMNS", "80")
    return stream


def test_nothing_is_shown_for_half_a_second(clock, terminal):
    line = ProgressLine()
    for done in range(5):
        line(Step("searching", done, 100))
        clock[0] += 0.1
    assert terminal.getvalue() == ""
    clock[0] += 0.1
    line(Step("searching", 42, 100))
    assert terminal.screen() == ["searching: 42 %"]


def test_the_line_changes_ten_times_a_second_and_no_oftener(clock, terminal):
    line = ProgressLine()
    for done in range(4000):
        line(Step("writing", done, 4000))
        clock[0] += 0.001
    assert 30 <= terminal.getvalue().count("\r") <= 36


@pytest.mark.parametrize("last", [Step("writing", 100, 100), Step("writing", 1, 1), None])
def test_nothing_stays_when_it_is_over(clock, terminal, last):
    line = ProgressLine()
    line(Step("writing", 1, 100))
    clock[0] += 1
    line(Step("writing", 50, 100))
    assert terminal.screen() == ["writing: 50 %"]
    line(last)
    assert terminal.screen() == [""]
    assert terminal.getvalue().endswith("\r")


def test_what_goes_on_inside_of_something_is_not_told(clock, terminal):
    line = ProgressLine()
    for done in range(20):
        line(Step("decoding", done, 100))
        line(Step("writing", 3 * done, 100))
        clock[0] += 0.1
    assert "decoding" in terminal.getvalue()
    assert "writing" not in terminal.getvalue()
    clock[0] += 5
    line(Step("writing", 1, 100))
    clock[0] += 0.6
    line(Step("writing", 2, 100))
    assert terminal.screen() == ["writing: 2 %"]


@pytest.mark.parametrize(
    ("step", "seconds", "text"),
    [
        (Step("searching", 1, 3), 1.0, "searching: 33 %"),
        (Step("searching", 1, 4), 10.0, "searching: 25 %, 30 s left"),
        (Step("searching", 0, 4), 10.0, "searching: 0 %"),
        (Step("searching", 5 << 20, 0), 10.0, "searching: 5 MiB"),
        (Step("looking", 12, 0, "files"), 10.0, "looking: 12 files"),
    ],
)
def test_what_is_said(step, seconds, text):
    assert line_of(step, seconds) == text


def test_a_narrow_terminal_gets_no_second_line(clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    line = ProgressLine()
    for done in (1, 2):
        line(Step("searching memory for the kernel", done, 100))
        clock[0] += 1
    assert [len(text) for text in terminal.screen()] == [11]


@click.command()
@click.argument("how")
def long(how):
    """A command that takes its time."""
    for done in range(1, 4):
        progress.step("working", done, 10)
    if how == "say":
        say("a word")
    if how == "ctrl-c":
        raise KeyboardInterrupt
    if how == "error":
        raise FileNotFoundError(2, "No such file or directory", "core")


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("say", ["kvmtool: a word", ""]),
        ("quietly", [""]),
        ("ctrl-c", [""]),
        ("error", [""]),
    ],
)
def test_the_terminal_is_clean_however_a_command_ends(how, left, terminal, monkeypatch):
    monkeypatch.setattr(line_module, "_PATIENCE", -1.0)
    monkeypatch.setattr(line_module, "_PACE", 0.0)
    monkeypatch.setattr(type(cli), "get_command", lambda self, ctx, name: long)
    monkeypatch.setattr("sys.stderr", terminal)
    ended = suppress(KeyboardInterrupt, click.ClickException)
    with cli.make_context("kvmtool", ["read", how]) as context, ended:
        cli.invoke(context)
    assert "working: " in terminal.getvalue()
    assert terminal.screen() == left


def test_pipes_are_not_written_to(tmp_path):
    sample.write(str(tmp_path))
    files = ["-N", str(tmp_path / "mach_kernel"), "-M", str(tmp_path / "core")]
    result = CliRunner().invoke(cli, ["convert", str(tmp_path / "new.core"), *files])
    assert result.exit_code == 0
    assert "\r" not in result.output


# who tells


def heard_of(work):
    heard = []
    with progress.listening(heard.append):
        work()
    return [step for step in heard if step is not None]


def test_without_a_listener_nothing_is_told():
    progress.step("working", 1, 2)
    progress.pause()
    assert progress.listener() is None


def test_a_search_tells_how_far_it_is_and_finds_what_lies_across_its_pieces(monkeypatch):
    from kvmtool import memory as module

    monkeypatch.setattr(module, "_FIND_PIECE", 16)
    data = bytearray(random.Random(7).randbytes(1 << 12))
    places = [0, 13, 15, 16, 31, 1000, (1 << 12) - 4]
    for at in places:
        data[at : at + 4] = b"\xaa\xbb\xcc\xdd"
    # 13 and 15 and 16 overlap: what is really there tells
    wanted = [at for at in range(len(data)) if data[at : at + 4] == b"\xaa\xbb\xcc\xdd"]
    arrays = [array("Q", [n]) for n in (0x1000, 0x1000 + len(data), 0)]
    memory = RunMemory(BytesSource(bytes(data), "test"), *arrays)
    found = []
    steps = heard_of(lambda: found.extend(memory.find(b"\xaa\xbb\xcc\xdd")))
    assert found == [0x1000 + at for at in wanted]
    assert {step.what for step in steps} == {"searching"}
    assert [step.done for step in steps] == [*sorted(step.done for step in steps[:-1]), 1]


def test_gzip_tells_how_far_it_is(tmp_path):
    path = tmp_path / "core.gz"
    path.write_bytes(gzip.compress(random.Random(1).randbytes(5 << 20), 1))
    source = open_source(os.fspath(path))
    steps = heard_of(lambda: source.size)
    source.close()
    assert steps[-1] == ("decoding", 1, 1, "bytes")
    assert [step.total for step in steps[:-1]] == [path.stat().st_size] * (len(steps) - 1)
    assert len(steps) > 4


def test_a_big_gzip_file_tells_how_far_its_index_is(tmp_path):
    pytest.importorskip("rapidgzip")
    path = tmp_path / "core.gz"
    path.write_bytes(gzip.compress(random.Random(1).randbytes(20 << 20), 0))
    source = open_source(os.fspath(path))
    steps = heard_of(lambda: source.size)
    source.close()
    assert "indexing gzip" in {step.what for step in steps}
