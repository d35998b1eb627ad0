"""convert: memory as another container."""

from __future__ import annotations

import os

import click

from kvmtool import progress
from kvmtool.cli import say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.extract import check_out
from kvmtool.cli.opening import opened
from kvmtool.cli.params import Where, kernel_options
from kvmtool.convert import TARGETS
from kvmtool.convert import convert as convert_memory

_ENDINGS = {
    ".core": "macho-core",
    ".macho": "macho-core",
    ".lime": "lime",
    ".elf": "elf",
    ".raw": "raw",
}


@click.command(cls=Sectioned)
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "--to",
    "target",
    type=click.Choice(TARGETS),
    help="What OUT is to be; else its ending says so: .core .macho .lime .elf .raw.",
)
@click.option("--physical", is_flag=True, help="In an ELF, physical memory, not the kernel's.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@kernel_options
def convert(out: str, target: str | None, physical: bool, overwrite: bool, where: Where) -> None:
    """Write the memory of a core to OUT in another form.

    macho-core holds the kernel's memory, for lldb and every kvmtool command; elf the kernel's, or
    with --physical that of the machine; lime and raw that of the machine. What the core does not
    have is left out; of raw, a sparse file, it reads as zeros.

    OUT is there when all of it is, or not at all; nothing is overwritten without --overwrite.

    \b
    Example:
      kvmtool convert kernel.core -N mach_kernel -M mem.lime
    """
    if where.core is None:
        raise click.UsageError("no core: name one with -M")
    if target is None:
        target = _by_ending(out)
        say(f"{out}: {target}, by its ending")
    check_out(out, overwrite, where)
    kvm = opened(where)
    made = convert_memory(
        kvm, out, target, physical=physical, overwrite=overwrite, progress=_written
    )
    click.echo(
        f"wrote {click.format_filename(out)}: {made.target}, {made.held:#x} bytes of "
        f"{made.space} memory in {made.regions} regions"
    )


def _written(done: int, total: int) -> None:
    progress.step("writing", done, total)


def _by_ending(out: str) -> str:
    target = _ENDINGS.get(os.path.splitext(out)[1].lower())
    if target is None:
        every = ", ".join(TARGETS)
        raise click.UsageError(f"{out}: no ending that says what it is to be; --to one of {every}")
    return target
