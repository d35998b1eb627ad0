"""kexts: those in a kernel's image, and those a kernel had loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, header_missing, listing_options, opened
from kvmtool.cli.render import Column
from kvmtool.macho import uuid_text
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kexts import Kext
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.kext import KextInfo
    from kvmtool.xnu.queues import Report

LISTING = Listing(
    "kexts",
    "kexts",
    (
        Column("index", "INDEX", "number"),
        Column("refs", "REFS", "number"),
        Column("address", "ADDRESS", "address"),
        Column("size", "SIZE", "address"),
        Column("wired", "WIRED", "address"),
        Column("identifier", "NAME"),
        Column("version", "VERSION"),
        Column("uuid", "UUID"),
        Column("linked", "LINKED AGAINST", "list"),
        Column("symbols", "SYMBOLS", "number"),
        Column("origin", "SYMBOLS FROM"),
        Column("dependencies", "NEEDS", "list"),
        Column("path", "PATH"),
        Column("kmod", "KMOD", "address"),
        Column("start", "START", "address"),
        Column("stop", "STOP", "address"),
        Column("flags", "FLAGS", "address"),
        Column("text", "TEXT", "address"),
        Column("text_size", "TEXTSIZE", "address"),
        Column("lists", "LISTS", "list"),
    ),
    ("index", "refs", "address", "size", "wired", "identifier", "version", "uuid", "linked"),
)
_IN_FILE = ("address", "size", "identifier", "version", "uuid", "origin")


def _in_file(kext: Kext) -> dict[str, Any]:
    """A kext of a kernel's image, or of a file of its own."""
    row: dict[str, Any] = dict.fromkeys(column.name for column in LISTING.columns)
    for name in ("identifier", "version", "size", "origin", "path"):
        row[name] = getattr(kext, name)
    row["uuid"] = None if kext.uuid is None else uuid_text(kext.uuid)
    row["address"] = kext.address or None
    row["symbols"] = len(kext.symbols)
    row["dependencies"] = list(kext.dependencies)
    return row


def _loaded(info: KextInfo, kext: Kext | None) -> dict[str, Any]:
    """A kext in memory, with what is known of its symbols."""
    row = {} if kext is None else _in_file(kext)
    for name in ("index", "refs", "address", "size", "wired", "version", "linked", "kmod"):
        row[name] = getattr(info, name)
    for name in ("start", "stop", "flags"):
        row[name] = getattr(info, name)
    row["identifier"] = info.name
    if isinstance(info.uuid, bytes):
        row["uuid"] = uuid_text(info.uuid)
    elif row.get("uuid") is None:
        row["uuid"] = info.uuid
    missing = isinstance(info.text, Unreadable)
    row["text"], row["text_size"] = (info.text, info.text) if missing else info.text or (None, None)
    row["lists"] = list(info.lists)
    return {column.name: row.get(column.name) for column in LISTING.columns}


def _rows(kvm: Kvm, report: Report) -> Iterator[dict[str, Any]]:
    loaded = kvm.loaded_kexts(report)
    known = {kext.identifier: kext for kext in kvm.kexts}
    if not loaded:
        yield from map(_in_file, kvm.kexts)
    for info in loaded:
        row = _loaded(info, known.get(info.name))
        missing = header_missing(kvm, info.address) if isinstance(info.address, int) else None
        if missing is not None and not row["symbols"]:
            row["symbols"] = missing
        if row["uuid"] is None:
            row["uuid"] = missing
        yield row


@click.command(cls=Sectioned)
@listing_options
def kexts(where: Where, columns: tuple[str, ...], format: str) -> None:
    """List the loaded kexts of a dump, as kextstat does; of a kernel file those inside it.

    The kmod list and the kext summaries are compared: where they differ, stderr says so. A kext's
    symbols are found as KEXT:SYMBOL by every command; the last part of its identifier will do where
    no other kext has it. Files named with --kext are listed too.

    \b
    Example:
      kvmtool kexts -N kernelcache
      kvmtool kexts -N mach_kernel -M core
    """
    from kvmtool.xnu.queues import Report

    kvm = opened(where)
    report = Report()
    listing = LISTING if kvm.dump is not None else LISTING._replace(shown=_IN_FILE)
    listing.show(_rows(kvm, report), columns, format, report)
