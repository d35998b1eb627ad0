"""demo: the embedded sample."""

from __future__ import annotations

import os
import shlex

import click


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
def demo(directory: str) -> None:
    """Write the embedded sample to DIR: the machine of Amit Singh's article, and what to type.

    \b
    Example:
      kvmtool demo /tmp/sample
    """
    from kvmtool import sample

    for path in sample.write(directory):
        click.echo(f"wrote {path}")
    kernel, core = (shlex.quote(os.path.join(directory, n)) for n in ("mach_kernel", "core"))
    click.echo("\nNow type:")
    click.echo(f"  export KVMTOOL_KERNEL={kernel} KVMTOOL_CORE={core}")
    for command in ("nlist _cdevsw", "read 0x441990 4", "procs", "info"):
        click.echo(f"  kvmtool {command}")
