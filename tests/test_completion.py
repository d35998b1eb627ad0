"""What a shell is offered: commands, options, files, and the words that were listed last."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from inputs import ROOT

from kvmtool import sample
from kvmtool.check import CHECKS
from kvmtool.cli import COMMANDS, cli
from kvmtool.cli.params import Where
from kvmtool.cli.words import matching, remember


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """-N and -M of the embedded sample; nothing was listed before."""
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / "cache"))
    sample.write(str(tmp_path))
    return ["-N", str(tmp_path / "mach_kernel"), "-M", str(tmp_path / "core")]


def offered(*words):
    """What is offered for the last of `words`, as text and description."""
    found = ShellComplete(cli, {}, "kvmtool", "_KVMTOOL_COMPLETE").get_completions(
        list(words[:-1]), words[-1]
    )
    return {item.value: item.help for item in found if item.type == "plain"}


def run(*words):
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_with_their_help_lines():
    assert offered("s") == {name: COMMANDS[name][1] for name in COMMANDS if name[0] == "s"}
    assert set(offered("extract", "k")) == {"kernel", "kext"}


def test_options():
    assert {"--kernel", "--core", "--verbose", "--help"} <= set(offered("procs", "--"))
    assert set(offered("procs", "--format", "j")) == {"json", "jsonl"}
    assert set(offered("procs", "--core-format", "l")) == {"lime"}
    assert set(offered("procs", "--arch", "arm6")) == {"arm64", "arm64e"}
    assert offered("check", "--only", "tex") == {"text": CHECKS["text"].what}


@pytest.mark.parametrize("option", ["-N", "-M", "--kernel", "--core", "--types"])
def test_files_are_for_the_shell(option):
    complete = ShellComplete(cli, {}, "kvmtool", "_KVMTOOL_COMPLETE").get_completions
    assert [item.type for item in complete(["nlist", option], "")] == ["file"]


def test_nothing_is_known_before_something_was_listed(machine):
    assert offered("nlist", "_cdev") == {}
    assert offered("args", "--pid", "") == {}


def test_symbols(machine):
    run("symbols", *machine)
    assert "_cdevsw" in offered("nlist", "_cdevs")
    for words in (("nlist", "cdevs"), ("read", "cdevs"), ("print", "cdevs"), ("walk", "_cdevs")):
        assert "_cdevsw" in offered(*words)
    assert "_cdevsw" in offered("-N", machine[1], "nlist", "_cdevs")
    assert "_cdevsw" in offered("nlist", "-N", machine[1], "_cdevs")
    assert offered("nlist", "-N", machine[3], "_cdevs") == {}


def test_the_environment_names_the_kernel_as_well(machine, monkeypatch):
    run("symbols", *machine)
    monkeypatch.setenv("KVMTOOL_KERNEL", machine[1])
    assert "_cdevsw" in offered("nlist", "_cdevs")
    monkeypatch.setenv("KVMTOOL_KERNEL", machine[3])
    assert offered("nlist", "_cdevs") == {}


def test_pids_with_their_names(machine):
    run("procs", *machine)
    assert offered("args", "--pid", "0") == {"0": "kernel_task"}
    assert offered("procs", *machine, "--pid", "1")["1"] == "launchd"
    assert offered("-M", machine[1], "args", "--pid", "0") == {}
    assert {"kernel", "0", "1"} <= set(offered("vmmap", ""))
    assert set(offered("vmmap", "k")) == {"kernel"}


def test_some_processes_alone_are_not_all(machine):
    run("procs", "--pid", "0", *machine)
    assert offered("args", "--pid", "") == {}


def test_types(machine):
    run("types", *machine)
    assert {"proc", "proclist"} <= set(offered("type", "proc"))


def test_another_file_of_the_name_is_another_kernel(machine):
    run("symbols", *machine)
    os.utime(machine[1], (1, 1))
    assert offered("nlist", "-N", machine[1], "_cdevs") == {}


def test_what_a_hostile_file_calls_its_symbols_reaches_no_command_line(machine):
    names = [
        "$(reboot)",
        "`reboot`",
        "a;reboot",
        "a b",
        "a\nb",
        "-rf",
        "*",
        "\x1b[2J",
        "_good",
        "é",
    ]
    remember("symbols", Where("kernel"), lambda: [(name, "") for name in names])
    assert set(offered("nlist", "")) == {"_good"}
    remember("pids", Where("kernel"), lambda: [("1", "\x1b]0;x\x07$(reboot)\tb" + "c" * 99)])
    (text,) = offered("args", "--pid", "").values()
    assert text == ("0x(reboot)b" + "c" * 99)[:40]


def test_of_too_many_words_how_they_go_on():
    words = sorted(f"_{first}{n:03}" for first in "abc" for n in range(300))
    assert matching(words, "_") == ["_a", "_b", "_c"]
    assert matching(words, "_a1") == [f"_a1{n:02}" for n in range(100)]
    assert matching(words, "_a") == ["_a0", "_a1", "_a2"]
    assert matching([f"same{n:03}" for n in range(999)], "s") == [f"same{n}" for n in range(10)]
    assert matching(words, "x") == matching([], "x") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell):
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert f"_KVMTOOL_COMPLETE={shell}_complete" in result.stdout
    assert "put this in" in result.stderr
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=result.stdout, text=True, check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_itself_completes(machine, tmp_path):
    run("symbols", *machine)
    script = CliRunner().invoke(cli, ["completion", "bash"]).stdout
    (tmp_path / "script").write_text(script)
    ask = (
        f". {tmp_path}/script; COMP_WORDS=(kvmtool nlist _cdevsw_); COMP_CWORD=2; "
        "_kvmtool_completion kvmtool; echo ${COMPREPLY[@]}"
    )
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", "--norc", "-c", ask], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == sorted(offered("nlist", "_cdevsw_"))


def test_completion_imports_no_command_it_does_not_need():
    code = (
        "import os, sys, atexit\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from kvmtool.cli import main\n"
        "main()\n"
    )
    environment = {
        **os.environ,
        "_KVMTOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": "kvmtool pro",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == ["plain,procs"]
    modules = done.stderr.split()
    unwanted = ("kvmtool.cli.procs", "kvmtool.kvm", "rich", "json", "construct", "kvmtool.types")
    assert not set(unwanted) & set(modules)
    assert isinstance(cli, click.Group)


ANSWERS = {  # what each shell gives for the words before, for the one at the cursor; what it gets
    "bash": ("kvmtool procs --format = js", "4", ["plain,json", "plain,jsonl"]),
    "zsh": (
        "kvmtool procs --format=js",
        "2",
        ["plain", "--format=json", "_", "plain", "--format=jsonl", "_"],
    ),
    "fish": (
        "kvmtool procs --format=js",
        "--format=js",
        ["plain,--format=json", "plain,--format=jsonl"],
    ),
}


def answer(shell, words, at):
    """What a shell gets, as lines."""
    code = "from kvmtool.cli import main; main()"
    said = {"_KVMTOOL_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": at}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **said},
        cwd=ROOT,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("shell", ANSWERS)
def test_a_value_behind_an_equals_sign(shell):
    words, at, wanted = ANSWERS[shell]
    assert answer(shell, words, at) == wanted


def test_other_words_with_an_equals_sign_stay_as_they_are():
    assert answer("zsh", "kvmtool read a=b", "2") == []
    assert answer("zsh", "kvmtool procs --format js", "3") == [
        *("plain", "json", "_"),
        *("plain", "jsonl", "_"),
    ]
    assert answer("bash", "kvmtool procs --format js", "3") == ["plain,json", "plain,jsonl"]


def test_zsh_completes_files_behind_an_equals_sign():
    script = CliRunner().invoke(cli, ["completion", "zsh"]).stdout
    assert "compset -P '--*='; _path_files -f" in script
