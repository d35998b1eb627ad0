"""Which types to believe for a kernel, the best first: the user's, exact ones, built-in layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import NotFoundError
from kvmtool.types.layouts import Choice

if TYPE_CHECKING:
    from kvmtool.arch import Arch
    from kvmtool.type_files import Found


def choices(
    arch: Arch, version: str | None, layout: str | None, found: Found | None, named: bool
) -> list[Choice]:
    """The types to try on a kernel of `arch` with the banner `version`.

    `layout` is the name of a built-in one if the user gave one, `found` the exact types if there
    are any, and `named` says that the user named their file. What exact types lack is taken from
    the built-in layouts; those alone come last, unless the user named the file.

    Raises: NotFoundError("layout") when nothing is known of such a kernel.
    """
    try:
        built_in = _built_in(arch, version, layout)
    except NotFoundError:
        if found is None or layout is not None:
            raise
        built_in = []
    if found is None:
        return built_in
    from kvmtool.types.chained import chain
    from kvmtool.types.model import TypeTable

    source = found.source
    shape = source.byteorder, source.pointer_size
    fitting = [
        choice
        for choice in built_in
        if (choice.table.source.byteorder, choice.table.source.pointer_size) == shape
    ]
    joined = [
        Choice(chain(source, choice.table), f"{found.how}; what these lack: {choice.how}", True)
        for choice in fitting
    ] or [Choice(TypeTable(source), found.how, exact=True)]
    return joined if named else joined + built_in


def _built_in(arch: Arch, version: str | None, layout: str | None) -> list[Choice]:
    from kvmtool.types import layouts

    if layout is not None:
        table = layouts.table(layout)
        return [Choice(table, f"layout {table.name}, named by the user", exact=False)]
    banner = layouts.parse_banner(version) if version else None
    return layouts.candidates(banner.xnu if banner else None, arch.layouts)
