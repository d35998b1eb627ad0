"""From what the user said to an open `Kvm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmtool.kvm import open as open_kvm

if TYPE_CHECKING:
    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm


def opened(where: Where, layout: str | None = None) -> Kvm:
    """The kernel the user named; closed when the command ends. Raises what `kvmtool.open` does."""
    kvm = open_kvm(
        where.kernel,
        where.core,
        slide=where.slide,
        force=where.force,
        format=where.format_name,
        layout=layout,
        arch=where.arch,
        kexts=where.kexts,
        kernel_path=where.kernel_path or None,
    )
    return click.get_current_context().with_resource(kvm)
