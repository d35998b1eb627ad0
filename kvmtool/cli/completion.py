"""completion: what to give a shell so that it completes our words."""

from __future__ import annotations

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.stderr import say

_PLACES = {
    "bash": "~/.local/share/bash-completion/completions/kvmtool",
    "zsh": "a directory of $fpath, as _kvmtool",
    "fish": "~/.config/fish/completions/kvmtool.fish",
}


@click.command(cls=Sectioned)
@click.argument("shell", type=click.Choice(tuple(_PLACES)))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options, files, symbols, types and pids.

    Put it where the shell looks for it; stderr says where that is. Symbols complete after
    `kvmtool symbols` has listed them once, types after `types`, pids after `procs`.

    \b
    Example:
      kvmtool completion bash > ~/.local/share/bash-completion/completions/kvmtool
      kvmtool completion zsh > ~/.zfunc/_kvmtool
      kvmtool completion fish > ~/.config/fish/completions/kvmtool.fish
    """
    from click.shell_completion import get_completion_class

    from kvmtool.cli import shells

    shells.register()
    made = get_completion_class(shell)
    assert made is not None
    group = click.get_current_context().find_root().command
    click.echo(made(group, {}, "kvmtool", "_KVMTOOL_COMPLETE").source())
    say(f"put this in {_PLACES[shell]}")
