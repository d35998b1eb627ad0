"""From what the user said to an open `Kvm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmtool import progress
from kvmtool.cli.params import VERBOSE
from kvmtool.kvm import open as open_kvm

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm


def opened(where: Where, mapped: bool = True) -> Kvm:
    """The kernel the user named; closed when the command ends. Raises what `kvmtool.open` does."""
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
        progress=_searching,
        mapped=mapped,
    )
    progress.pause()
    ctx = click.get_current_context()
    ctx.with_resource(kvm)
    if ctx.meta.get(VERBOSE):
        from kvmtool.cli.verbose import explain

        ctx.call_on_close(lambda: explain(kvm, where))
    return kvm


def _searching(done: int, total: int) -> None:
    progress.step("searching memory for the kernel", done, total)
