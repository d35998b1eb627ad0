"""--verbose: how each fact was found, on stderr; from what the handle knows when a command ends.

Nothing is looked up for it: what a command did not need to find out is not told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmtool.cli.stderr import say
from kvmtool.macho import uuid_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm

_CACHES = {
    "kernel-index": "what lies in the kernel path",
    "decoded-from": "the unpacked kernel",
    "gzip-index": "the index of the gzip stream",
    "gzip-size": "the decoded size of the gzip stream",
    "types": "types met before",
    "way": "the way into physical memory",
}


def explain(kvm: Kvm, where: Where) -> None:
    """Say what was found, and how."""
    for line in _facts(kvm, where):
        say(line)


def explain_cache(kind: str, found: bool) -> None:
    """Say that the cache was asked; what a shell may complete is no fact about a kernel."""
    if kind == "words":
        return
    what = next((text for name, text in _CACHES.items() if kind.startswith(name)), kind)
    say(f"cache: {what}: {'used' if found else 'not there yet'}")


def _facts(kvm: Kvm, where: Where) -> Iterator[str]:
    done = kvm.__dict__  # what `cached_property` has kept: asking for more would be work
    yield from _core(kvm, where)
    if kvm.dump is None or "_parts" in done:
        yield from _kernel(kvm, where)
        yield from _place(kvm)
    if kvm.way is not None:
        way = kvm.way
        yield f"page tables: {way.mode}, root {way.root:#x}: {way.how}"
        if way.base:
            yield f"memory begins at physical address {way.base:#x}"
    if "tried" in done:
        for choice, _, verdict in kvm.tried:
            fits = {True: "fits", False: "does not fit", None: "is not verified"}[verdict.fits]
            yield f"types: {choice.table.name}: {choice.how}; {fits}: {verdict.why}"
    elif "layouts" in done:
        yield f"types: {kvm.layouts[0].table.name}: {kvm.layouts[0].how}"
    if "kexts" in done:
        for kext in kvm.kexts:
            if kext.path is not None:
                yield f"kext {kext.identifier} at {kext.address:#x}: {kext.path}, {kext.origin}"


def _core(kvm: Kvm, where: Where) -> Iterator[str]:
    dump = kvm.dump
    if dump is None:
        return
    how = "by its bytes" if dump.name != "raw" else "as no format knows its bytes"
    if where.format_name or dump.live:
        how = "as --core-format says" if where.format_name else "live"
    yield f"core: {where.core}: {dump.name}, {how}"
    for fact, who in dump.facts.said.items():
        value = getattr(dump.facts, fact)
        shown = f"{value:#x}" if isinstance(value, int) else value
        if isinstance(shown, bytes):
            shown = uuid_text(shown)
        yield f"core says {fact} {shown}: {who}"


def _kernel(kvm: Kvm, where: Where) -> Iterator[str]:
    image = kvm.kernel
    if image is None:
        yield f"kernel: none: {kvm.symbols.hint}"
        return
    yield f"kernel: {image.source.name} ({uuid_text(image.uuid)}): {_why(kvm, where)}"
    for layer in kvm.layers:
        yield f"kernel was inside {layer.name}: {layer.detail}"
    yield f"symbols: {len(kvm.symbols)} in its table"


def _why(kvm: Kvm, where: Where) -> str:
    """Why this kernel file."""
    if where.kernel is not None:
        named = os.environ.get("KVMTOOL_KERNEL") == where.kernel
        return "named in KVMTOOL_KERNEL" if named else "named with -N"
    if kvm.layers or kvm.dump is None or not _inside(kvm):
        return "taken from the kernel path by its UUID"
    return "the one in the core's own memory"


def _inside(kvm: Kvm) -> bool:
    from kvmtool.image import LoadedImage

    return kvm.kernel is not None and isinstance(kvm.kernel.source, LoadedImage)


def _place(kvm: Kvm) -> Iterator[str]:
    boot = kvm.boot
    if boot is None:
        return
    slide = "not known" if boot.slide is None else f"{boot.slide:#x}"
    yield f"kernel at {boot.kernel_address:#x}, slide {slide}: {boot.how}"
    if boot.slide is not None:
        yield f"witness: {uuid_text(boot.uuid)} in memory, {boot.version or 'no banner'}"
    for text in boot.rejected:
        yield f"rejected: {text}"
