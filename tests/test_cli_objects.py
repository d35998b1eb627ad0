"""print, walk, and C in every ADDRESS."""

from __future__ import annotations

import csv
import json
import re

import pytest
from click.testing import CliRunner

from kvmtool import sample
from kvmtool.cli import cli
from tests import inputs


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    """The embedded sample: (kernel, core)."""
    folder = tmp_path_factory.mktemp("article")
    sample.write(str(folder), "article")
    return str(folder / "mach_kernel"), str(folder / "core")


def run(files, *arguments):
    kernel, core = files
    return CliRunner().invoke(cli, ["-N", kernel, "-M", core, *arguments])


def output(files, *arguments):
    result = run(files, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_address_may_be_c(article):
    """The article's numbers: cdevsw at 0x441720, rows of 14 words, d_read the third word."""
    plain = output(article, "read", "0x441990", "4")
    for text in (
        "_cdevsw+0x270",
        "(char *)cdevsw + 11 * 56 + 8",
        "&cdevsw[11].d_read",
        "(long)_cdevsw + (11 * 56 + 8)",
        "&((unsigned *)&cdevsw)[11 * 14 + 2]",
    ):
        assert output(article, "read", text, "4") == plain
    kext = ("--kext", article[0].replace("mach_kernel", "KernelMemoryAccess@0x3bd01000"))
    found = output(article, "symbol", "*(void **)0x441990", *kext)
    assert found == "0x3bd0214f _my_mmread [com.osxbook.kext.KernelMemoryAccess]\n"


def test_an_address_that_is_not_c_shows_where(article):
    result = run(article, "read", "cdevsw[11", "4")
    assert result.exit_code == 2
    assert result.stderr == "kvmtool: expected ']', got the end\n  cdevsw[11\n           ^\n"
    result = run(article, "read", "1 + nonesuch->x", "4")
    assert result.exit_code == 1
    assert result.stderr == (
        "kvmtool: symbol nonesuch not found; kvmtool symbols lists them\n"
        "  1 + nonesuch->x\n      ^\n"
    )


def answer(files, *arguments, status=0):
    result = run(files, *arguments, "--format", "json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_the_article_in_one_expression(article):
    """The issue's own: the pointer, and whose function it is."""
    found = "com.osxbook.kext.KernelMemoryAccess:_my_mmread"
    kext = ("--kext", article[0].replace("mach_kernel", "KernelMemoryAccess@0x3bd01000"))
    assert output(article, "print", "cdevsw[11].d_read", *kext) == f"0x3bd0214f  {found}\n"
    json_answer = answer(article, "print", "cdevsw[11].d_read", *kext)
    assert json_answer["address"] == "0x441990"
    assert (json_answer["value"], json_answer["meaning"]) == ("0x3bd0214f", found)
    plain = output(article, "read", "cdevsw[11]", "4")
    assert plain == output(article, "read", "_cdevsw+0x268", "4")


def test_a_structure_is_a_tree(article):
    lines = output(article, "print", "averunnable").splitlines()
    assert lines[0].startswith("struct loadavg at 0x")
    assert lines[2].split() == ["+0x000c", "fscale", "2048"]
    first = output(article, "print", "*kernproc", "--depth", "1").splitlines()
    assert first[1].split() == ["+0x0000", "p_list", "{…}"]
    assert len(first) < len(output(article, "print", "*kernproc").splitlines())
    flags = [line for line in first if " p_flag " in line]
    assert flags[0].split()[2] == "0x200"


def test_csv_has_a_row_for_each_value(article):
    rows = list(
        csv.DictReader(output(article, "print", "*kernproc", "--format", "csv").split("\n"))
    )
    named = {row["name"]: row for row in rows}
    assert named["p_comm"]["value"] == "kernel_task"
    assert named["p_pptr"]["meaning"] == "_proc0"
    assert int(named["p_pid"]["address"], 16) - int(named["p_list.le_next"]["address"], 16) == 0x24


def test_numbers_in_hexadecimal_and_arrays_cut(article):
    assert output(article, "print", "255", "-x") == "0xff\n"
    assert output(article, "print", "(char)-1", "-x") == "0xff\n"
    assert output(article, "print", "averunnable.ldavg", "-x") == "{0x28f, 0x200, 0x185}\n"
    cut = run(article, "print", "averunnable.ldavg", "--elements", "1")
    assert (cut.stdout, cut.exit_code) == ("{655}\n", 0)
    assert "2 elements are not shown" in cut.stderr
    assert output(article, "print", "--", "-1") == "-1\n"


@pytest.mark.parametrize(
    ("text", "status", "complaint"),
    [
        ("kernproc->p_com", 1, "struct proc.p_com not found (did you mean p_comm"),
        ("pgrp0 + *pgrp0", 1, "type of pgrp0 is not known"),
        ("kernproc-> 5", 2, "expected the name of a member, got '5'"),
    ],
)
def test_print_says_what_is_wrong(article, text, status, complaint):
    result = run(article, "print", text)
    assert (result.exit_code, result.stdout) == (status, "")
    assert complaint in result.stderr
    assert f"\n  {text}\n" in result.stderr


def test_a_symbol_without_type(article):
    assert output(article, "print", "enodev") == "0x113070  _enodev\n"
    result = run(article, "print", "pgrp0")
    assert result.exit_code == 1
    assert "type of pgrp0 is not known" in result.stderr


@pytest.fixture(params=[(dump, exact) for dump in inputs.DUMPS for exact in (False, True)])
def dump(request):
    """(name, files, options): every dump, with the built-in layout and with its own types."""
    name, exact = request.param
    types = ("--types", inputs.real(f"types/{name}.types.json.gz")) if exact else ()
    files = inputs.real(f"dumps/{name}/mach_kernel"), inputs.plain_core(name)
    return name, files, types


def test_kernproc_is_as_planted(dump):
    name, files, types = dump
    truth = inputs.truth(name)["processes"][0]
    found = answer(files, "print", "*kernproc", *types)
    assert (found["type"], int(found["address"], 16)) == ("struct proc", truth["address"])
    value = found["value"]
    for key, member in (
        ("pid", "p_pid"),
        ("comm", "p_comm"),
        ("stat", "p_stat"),
        ("flag", "p_flag"),
    ):
        assert value[member] == truth[key], member
    assert int(value["task"], 16) == truth["task"]
    assert value["p_nice"] == truth["nice"]
    for text, key in (
        ("p_ucred", "ucred"),
        ("p_pgrp->pg_id", "pgid"),
        ("p_pgrp->pg_session->s_sid", "sid"),
    ):
        seen = answer(files, "print", f"kernproc->{text}", *types)["value"]
        assert (int(seen, 16) if isinstance(seen, str) else seen) == truth[key]


def test_processes_by_walking(dump):
    name, files, types = dump
    truth = inputs.truth(name)
    known = {process["pid"]: process for process in truth["processes"]}
    found = answer(
        files, "walk", "allproc", "--next", "p_list", "-o", "p_pid,p_comm,p_stat", *types
    )
    assert [row["p_pid"] for row in found] == truth["allproc"]
    for row in found:
        process = known[row["p_pid"]]
        assert int(row["address"], 16) == process["address"]
        assert (row["p_comm"], row["p_stat"]) == (process["comm"], process["stat"])


def test_a_mach_queue_tells_how_it_is_linked(dump):
    """tasks is made with queue_enter: links point at tasks; its prev pointers say so."""
    name, files, types = dump
    known = {process["task"] for process in inputs.truth(name)["processes"] if process["task"]}
    for how in (("--container", "task.tasks"), ("--container", "task", "--next", "tasks")):
        found = answer(files, "walk", "tasks", *how, *types)
        assert {int(row["address"], 16) for row in found} == known


def test_cdevsw_is_as_planted(dump):
    name, files, types = dump
    entries = inputs.truth(name)["cdevsw"]["entries"]
    for index in (0, 1, len(entries) - 1):
        value = answer(files, "print", f"cdevsw[{index}]", *types)["value"]
        for member, pointer in entries[index].items():
            if member != "d_type":
                assert int(value[member], 16) == pointer
            else:
                assert value[member] == pointer


@pytest.mark.parametrize("name", inputs.DUMPS)
def test_a_ring_stops_where_it_closes(name):
    files = (
        inputs.real(f"dumps/{name}/mach_kernel"),
        inputs.real(f"dumps/{name}/damaged/core.cyclic.macho"),
    )
    result = run(files, "walk", "allproc", "--next", "p_list")
    assert result.exit_code == 3
    assert "allproc: stopped after" in result.stderr
    assert "was met before (the list runs in a circle)" in result.stderr


def test_missing_memory_is_shown_as_missing(article):
    result = run(article, "print", "*(struct proc *)0x446220 , 1")
    assert result.exit_code == 2
    result = run(article, "print", "*(struct proc *)0x10")
    assert result.exit_code == 3
    assert "? (unmapped at 0x34)" in result.stdout
    assert "values could not be read" in result.stderr
    found = answer(article, "print", "*(struct proc *)0x10", status=3)
    assert found["value"]["p_pid"] == {"unreadable": "unmapped at 0x34"}
    torn = run(article, "walk", "(struct proc *)0x10", "--next", "p_list", "-o", "p_pid")
    assert torn.exit_code == 3
    assert "stopped after 1 elements: the link at 0x10 is unmapped" in torn.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("allproc",), "the member of struct proc with the next pointer|which member"),
        (("kernproc->p_pid", "--next", "p_list"), "int is no list"),
        (("allproc", "--next", "p_pid"), "p_pid has no next pointer"),
        (("allproc", "--next", "p_lst"), "did you mean p_list"),
        (("(void *)0", "--next", "p_list"), "does not tell the elements' type"),
        (("allproc", "--container", "9"), "expected TYPE or TYPE.MEMBER"),
        (("allproc", "--next", "p_list", "-o", "p_pdi"), "did you mean p_pid"),
    ],
)
def test_what_cannot_be_walked(article, arguments, complaint):
    result = run(article, "walk", *arguments)
    assert result.exit_code == 1
    assert re.search(complaint, result.stderr)


def test_walk_shows_expressions_of_each_element(article):
    what = "p_pid, (p_flag & 0x200) != 0, offsetof(struct proc, p_pid), p_comm"
    rows = answer(article, "walk", "allproc", "--next", "p_list.le_next", "-o", what)
    last = rows[-1]
    assert (last["p_pid"], last["(p_flag & 0x200) != 0"]) == (0, 1)
    assert last["offsetof(struct proc, p_pid)"] == 0x24
    limited = run(article, "walk", "allproc", "--next", "p_list", "--limit", "2")
    assert limited.exit_code == 3
    assert len(limited.stdout.splitlines()) == 3
