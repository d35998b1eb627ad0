"""Errors say what to type next."""

from __future__ import annotations

import os
import shutil

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool import sample
from kvmtool.cli import cli
from kvmtool.errors import FormatError
from kvmtool.misnamed import kind_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both samples: a kernel with a core, a kernel with physical memory."""
    path = tmp_path_factory.mktemp("sample")
    sample.write(str(path))
    sample.write(str(path / "machine"), "machine")
    return path


def failure(*words, status=1, **environment):
    """The last line of stderr."""
    result = CliRunner().invoke(cli, words, env=environment)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_nothing_named():
    line = failure("procs")
    assert "name a kernel with -N or a core with -M" in line
    assert "kvmtool demo DIR" in line


def test_swapped(folder):
    kernel, core = str(folder / "mach_kernel"), str(folder / "core")
    line = failure("procs", "-N", core, "-M", kernel)
    assert line == (
        f"kvmtool: {core}: -N and -M are swapped: this is macho-core memory, "
        f"and {kernel} a kernel's file"
    )
    lime = str(folder / "machine" / "memory.lime")
    assert "-N and -M are swapped" in failure("nlist", "_x", "-N", lime, "-M", kernel)
    with pytest.raises(FormatError, match="-N and -M are swapped"):
        kvmtool.open(core, kernel)


def test_a_core_named_as_a_kernel(folder):
    assert failure("procs", "-N", str(folder / "core")).endswith("name it with -M")
    lime = str(folder / "machine" / "memory.lime")
    assert failure("procs", "-N", lime, "-M", lime).endswith(
        "this is lime memory, expected a kernel's file: name it with -M"
    )


@pytest.mark.parametrize("words", [("procs", "-M"), ("procs",), ("info",)])
def test_a_kernel_named_as_a_core(words, folder):
    line = failure(*words, str(folder / "mach_kernel"))
    assert line.endswith("this is a kernel's file, expected memory: name it with -N")


@pytest.mark.parametrize(
    ("name", "option"), [("mach_kernel", "-N"), ("core", "-M"), ("machine/memory.lime", "-M")]
)
def test_a_file_in_the_place_of_a_command(name, option, folder):
    path = str(folder / name)
    assert failure(path, status=2).endswith(f"try kvmtool info {option} {path}")


def test_a_file_whose_name_is_like_a_command(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert failure("core", status=2).endswith("which is a file: try kvmtool info -M core")
    assert failure("mach_kernel", status=2).endswith("try kvmtool info -N mach_kernel")


def test_what_a_file_is(folder, tmp_path):
    assert kind_of(str(folder / "mach_kernel")) == ("kernel", "a kernel's file")
    assert kind_of(str(folder / "core")) == ("memory", "macho-core memory")
    assert kind_of(str(tmp_path / "nosuch")) is None
    assert kind_of(str(tmp_path)) is None
    for name, content, kind in (
        ("empty", b"", None),
        ("text", b"no kernel at all", None),
        ("fat", b"\xca\xfe\xba\xbe\0\0\0\x02" + bytes(60), "kernel"),
        ("class", b"\xca\xfe\xba\xbe\0\0\0\x34" + bytes(60), None),
        ("kernelcache", b"\x30\x84\x00\xd0\x26\xc3\x16\x04IM4P" + bytes(60), "kernel"),
        ("comp", b"complzss" + bytes(60), "kernel"),
        ("short", b"\xcf\xfa\xed\xfe", None),
        ("dsym", b"\xcf\xfa\xed\xfe" + bytes(8) + b"\x0a\0\0\0" + bytes(60), "debug file"),
    ):
        (tmp_path / name).write_bytes(content)
        found = kind_of(str(tmp_path / name))
        assert (found and found[0]) == kind, name
    with pytest.raises(FormatError, match="name it with --types"):
        kvmtool.open(None, str(tmp_path / "dsym"))


def test_a_file_the_environment_names(tmp_path):
    gone = str(tmp_path / "gone")
    for name in ("KVMTOOL_KERNEL", "KVMTOOL_CORE"):
        line = failure("procs", **{name: gone})
        assert line == f"kvmtool: {gone}: No such file or directory (it is named in {name})"
    assert failure("procs", "-N", gone).endswith("No such file or directory")


def test_what_lists_what_was_not_found(folder):
    files = ["-N", str(folder / "mach_kernel"), "-M", str(folder / "core")]
    line = failure("args", "--pid", "77777", *files)
    assert line == "kvmtool: process 77777 not found; kvmtool procs lists them"
    line = failure("read", "zzzzzzzzzz", "4", *files)
    assert line == "kvmtool: symbol zzzzzzzzzz not found; kvmtool symbols lists them"
    assert "did you mean" in failure("read", "cdevs", "4", *files)
    assert failure("read", "0x10", "4", *files).endswith("; kvmtool regions lists what there is")
    assert "name a core with -M" in failure("vtop", "_version", *files[:2])
    assert "name a core with -M" in failure("procs", *files[:2])


def test_a_damaged_kernel_keeps_its_own_message(folder, tmp_path):
    shutil.copy(folder / "mach_kernel", tmp_path / "cut")
    os.truncate(tmp_path / "cut", 100)
    assert "offset" in failure("nlist", "_x", "-N", str(tmp_path / "cut"))
