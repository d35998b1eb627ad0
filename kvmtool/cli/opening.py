"""From what the user said to an open `Kvm`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from kvmtool.kvm import open as open_kvm

_PATIENCE = 0.5  # seconds

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm


class _Progress:
    """How much of memory was searched for the kernel, on a terminal, once it takes a while."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = ""

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._began < _PATIENCE:
            return
        text = f"searching memory for the kernel: {100 * done // max(total, 1)} %"
        if text != self._shown:
            click.echo(f"\r{text}", nl=False, err=True)
            self._shown = text

    def end(self) -> None:
        """Take the line away again."""
        if self._shown:
            click.echo("\r" + " " * len(self._shown) + "\r", nl=False, err=True)


def opened(where: Where, mapped: bool = True) -> Kvm:
    """The kernel the user named; closed when the command ends. Raises what `kvmtool.open` does."""
    bar = _Progress() if sys.stderr.isatty() else None
    kvm = open_kvm(
        where.kernel,
        where.core,
        slide=where.slide,
        force=where.force,
        format=where.format_name,
        layout=where.layout,
        types=where.types,
        arch=where.arch,
        kexts=where.kexts,
        kernel_path=where.kernel_path or None,
        progress=bar,
        mapped=mapped,
    )
    if bar is not None:
        bar.end()
    return click.get_current_context().with_resource(kvm)
