"""demo: the embedded sample."""

from __future__ import annotations

import os
import shlex

import click

from kvmtool.cli.command import Sectioned


@click.command(cls=Sectioned)
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--machine", is_flag=True, help="The other sample: memory of a machine that ran.")
def demo(directory: str, machine: bool) -> None:
    """Write the embedded sample to DIR: the machine of Amit Singh's article, and what to type.

    With --machine physical memory of a small kernel of our own that ran under QEMU.

    \b
    Example:
      kvmtool demo /tmp/sample
    """
    from kvmtool import sample

    for path in sample.write(directory, "machine" if machine else "article"):
        click.echo(f"wrote {path}")
    names = ("mach_kernel", "memory.lime" if machine else "core")
    kernel, core = (shlex.quote(os.path.join(directory, name)) for name in names)
    click.echo("\nNow type:")
    click.echo(f"  export KVMTOOL_KERNEL={kernel} KVMTOOL_CORE={core}")
    kext = shlex.quote(os.path.join(directory, "KernelMemoryAccess@0x3bd01000"))
    article = (
        *("nlist _cdevsw", "read 0x441990 4", f"print 'cdevsw[11].d_read' --kext {kext}"),
        *("procs", "info"),
    )
    for command in ("info", "procs", "vtop _cdevsw", "regions") if machine else article:
        click.echo(f"  kvmtool {command}")
