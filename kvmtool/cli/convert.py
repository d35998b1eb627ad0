"""convert: memory as another container."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli import say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.extract import check_out
from kvmtool.cli.opening import opened
from kvmtool.cli.params import Where, kernel_options
from kvmtool.convert import TARGETS
from kvmtool.convert import convert as convert_memory

if TYPE_CHECKING:
    from types import TracebackType

_ENDINGS = {
    ".core": "macho-core",
    ".macho": "macho-core",
    ".lime": "lime",
    ".elf": "elf",
    ".raw": "raw",
}
_LONG = 1.0  # seconds after which a person wants to see how far it is


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
    with Progress() as progress:
        made = convert_memory(
            kvm, out, target, physical=physical, overwrite=overwrite, progress=progress
        )
    click.echo(
        f"wrote {click.format_filename(out)}: {made.target}, {made.held:#x} bytes of "
        f"{made.space} memory in {made.regions} regions"
    )


def _by_ending(out: str) -> str:
    target = _ENDINGS.get(os.path.splitext(out)[1].lower())
    if target is None:
        every = ", ".join(TARGETS)
        raise click.UsageError(f"{out}: no ending that says what it is to be; --to one of {every}")
    return target


class Progress:
    """Told bytes done and bytes in all; a person at a terminal sees it when it takes long."""

    def __init__(self) -> None:
        self._stack, self._start = ExitStack(), monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, done: int, total: int) -> None:
        """See `Conversion.write`."""
        if self._bar is not None:
            self._bar.update(done - self._bar.pos)
        elif sys.stderr.isatty() and monotonic() - self._start > _LONG:
            self._bar = self._stack.enter_context(click.progressbar(length=total, file=sys.stderr))
            self._bar.update(done)
