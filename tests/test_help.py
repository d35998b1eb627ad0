"""What help looks like: short, in groups, an example each; and what a wrong word is told."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from kvmtool.cli import COMMANDS, GROUPS, Commands, cli, groups
from kvmtool.cli.command import Sectioned

WIDTH = 80
LINES = 66  # what a command's help may take: two screens of a small terminal at most


def commands(group: click.Group = cli, path: tuple[str, ...] = ()):
    """Every command, those of groups too, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


EVERY = dict(commands())


def helped(*words: str) -> str:
    environment = {"COLUMNS": str(WIDTH)}
    result = CliRunner().invoke(cli, [*words, "--help"], env=environment, prog_name="kvmtool")
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("words", [(), *EVERY], ids=" ".join)
def test_help_has_an_example_and_fits_a_small_terminal(words):
    text = helped(*words)
    assert "\n  Example" in text
    assert f"\n    kvmtool {' '.join(words)}".rstrip() in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert len(text.splitlines()) <= (LINES if words else 100)


def test_every_command_stands_in_one_group():
    placed = " ".join(GROUPS.values()).split()
    assert sorted(placed) == sorted(COMMANDS)


def test_the_groups_stand_in_the_help_with_a_line_for_each_command():
    lines = helped().splitlines()
    for heading, names in groups():
        at = lines.index(f"{heading}:")
        told = lines[at + 1 : lines.index("", at)]
        assert [line.split()[0] for line in told] == list(names)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_options_that_say_which_kernel_stand_apart(words):
    command = EVERY[words]
    if isinstance(command, click.Group):
        return
    assert isinstance(command, Sectioned)
    own, _, shared = helped(*words).partition("Which kernel:")
    assert "--kernel FILE" not in own
    assert any(param.name == "kernel" for param in command.params) == ("--kernel FILE" in shared)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("proc", "no command 'proc': did you mean procs"),
        ("nslit", "did you mean nlist"),
        ("zzzzzz", "kvmtool --help lists them"),
        (__file__, f"try kvmtool info -M {__file__}"),
    ],
)
def test_a_command_that_is_none(word, said):
    result = CliRunner().invoke(cli, [word])
    assert result.exit_code == 2
    assert said in result.stderr
    assert isinstance(cli, Commands)
