"""What is said to the user besides the answer: lines on stderr."""

from __future__ import annotations

import click

from kvmtool import progress


def say(message: str) -> None:
    """One line on stderr, with the program's name; what does not print is escaped."""
    from kvmtool.cli.render import visible

    progress.pause()
    click.echo(f"kvmtool: {visible(message)}", err=True)
