"""--verbose: what stderr tells of how each fact was found."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner
from inputs import plain_core, real, truth

from kvmtool import sample
from kvmtool.cli import cli


def run(*arguments: str, status: int = 0, **environment: str) -> tuple[str, list[str]]:
    """Standard output, and the lines of stderr."""
    result = CliRunner().invoke(cli, arguments, env=environment)
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr.splitlines()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("sample"))
    sample.write(folder)
    return ["-N", os.path.join(folder, "mach_kernel"), "-M", os.path.join(folder, "core")]


def test_without_it_nothing_is_said(machine):
    assert run("procs", *machine)[1] == []


@pytest.mark.parametrize("words", [("-v", "procs"), ("procs", "-v"), ("-v", "procs", "--verbose")])
def test_before_or_after_the_command_and_once(machine, words):
    plain, _ = run("procs", *machine)
    told, lines = run(*words, *machine)
    assert told == plain
    kernel, core = machine[1], machine[3]
    assert lines[0] == f"kvmtool: core: {core}: macho-core, by its bytes"
    assert [line for line in lines if line.startswith(f"kvmtool: kernel: {kernel} ")] == [
        f"kvmtool: kernel: {kernel} (no UUID): named with -N"
    ]
    assert sum(line.startswith("kvmtool: types: ") for line in lines) == 1
    assert any("fits: kernproc is kernel_task" in line for line in lines)


def test_what_was_not_needed_is_not_told(machine):
    _, lines = run("nlist", "-v", "_cdevsw", *machine)
    assert not any("types" in line or "kext" in line for line in lines)


def test_the_environment_is_named(machine):
    _, lines = run("nlist", "-v", "_cdevsw", KVMTOOL_KERNEL=machine[1])
    assert any(line.endswith("named in KVMTOOL_KERNEL") for line in lines)


def test_kext_files_are_told(machine):
    kext = os.path.join(os.path.dirname(machine[1]), "KernelMemoryAccess")
    _, lines = run("print", "-v", "cdevsw[11].d_read", *machine)
    assert any(line.startswith("kvmtool: kext ") and kext in line for line in lines)


def test_slide_witness_and_what_was_rejected():
    dump = "x86_64-10.8.5"
    files = ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump)]
    _, lines = run("nlist", "-v", "_cdevsw", *files)
    slide = truth(dump)["slide"]
    assert any(f"slide {slide:#x}: scan for the kernel's header" in line for line in lines)
    assert any(line.startswith("kvmtool: witness: ") for line in lines)
    assert any("rejected: the kernel lies at its link address" in line for line in lines)


def test_page_tables_and_the_cache_of_physical_memory():
    dump = "x86_64-10.8.5"
    files = ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", real(f"dumps/{dump}/mem.lime")]
    _, lines = run("nlist", "-v", "_cdevsw", *files)
    assert any(line.startswith("kvmtool: page tables: 4-level, root 0x") for line in lines)


def test_a_core_alone_and_what_was_kept():
    dump = "x86_64-10.8.5"
    _, first = run("symbol", "-v", "0x1000", "-M", real(f"dumps/{dump}/mem.lime"), status=1)
    _, second = run("symbol", "-v", "0x1000", "-M", real(f"dumps/{dump}/mem.lime"), status=1)
    assert "kvmtool: cache: the way into physical memory: used" in second
    for lines in (first, second):
        assert any(line.endswith("the one in the core's own memory") for line in lines)


def test_of_a_failure_what_was_rejected():
    files = ["-N", real("dumps/x86_64-10.13.6/mach_kernel"), "-M", plain_core("x86_64-10.8.5")]
    _, lines = run("nlist", "-v", "_cdevsw", *files, status=1)
    assert sum("rejected: " in line for line in lines) >= 3
    assert "is not the kernel of" in lines[-1]
    assert not any("rejected: " in line for line in run("nlist", "x", *files, status=1)[1])
