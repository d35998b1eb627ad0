"""`open`, the pipeline that makes a `Kvm`: read this first.

Bytes → container → address space → symbols → types → kernel objects. Types and objects are the
handle's business, since not every question needs them.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from kvmtool import macho
from kvmtool.arch import arch_for
from kvmtool.errors import (
    FormatError,
    KvmError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.handle import Kvm, Parts
from kvmtool.kernel_file import open_kernel
from kvmtool.macho import MachO, uuid_text
from kvmtool.source import open_source
from kvmtool.symbols import SymbolTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtool.boot import Finder
    from kvmtool.formats import Format
    from kvmtool.memory import Memory
    from kvmtool.source import Source

__all__ = ["Kvm", "open", "open_format"]


def open(  # noqa: A001  kvmtool.open() reads as what it does
    kernel: str | None = None,
    core: str | None = None,
    *,
    slide: int | None = None,
    force: bool = False,
    format: str | None = None,
    layout: str | None = None,
    arch: str | None = None,
    kexts: Sequence[tuple[str, int]] = (),
    kernel_path: Sequence[str] | None = None,
) -> Kvm:
    """Open a kernel file, a dump, or a dump with its kernel's file.

    `kernel` and `core` are paths. Without `kernel`, a dump's kernel is looked for by its UUID in
    the directories of `kernel_path` (KVMTOOL_KERNEL_PATH by default), else the one in the dump's
    own memory is used. `slide` (bytes) overrides what would be found; `force` goes on although
    kernel and dump do not belong together; `format` names the container; `layout` a layout of the
    database; `arch` the slice of a fat file, by default the dump's; `kexts` are kext files and the
    addresses they are loaded at.

    Raises OSError, `FormatError`, `MismatchError`, `NotFoundError`.
    """
    if core is None:
        kvm = _open_static(kernel, arch)
    else:
        kvm = _open_dump(kernel, core, slide, force, format, arch, kernel_path)
    kvm.layout_name = layout
    kvm.kext_files = tuple(kexts)
    return kvm


def _open_static(kernel: str | None, arch: str | None) -> Kvm:
    if kernel is None:
        raise KvmError(
            "no kernel and no core: name a kernel with -N or a core with -M, or make a sample "
            "to try with 'kvmtool demo DIR'"
        )
    file = open_kernel(kernel, arch)
    machine = arch_for(file.image.cputype, file.image.cpusubtype)

    def parts() -> Parts:
        try:
            image = file.kernel
        except NotFoundError:  # a collection of kexts alone, or kexts for another kernel
            return Parts(None, SymbolTable(None, 0, f"{kernel} holds no kernel"), None, file)
        return Parts(image, SymbolTable(image.symtab, 0), None, file)

    found = parts()
    return Kvm(
        None, machine, lambda: _static_memory(file.image), lambda: found, (file.image.source,)
    )


def _static_memory(image: MachO) -> Memory:
    from kvmtool.kernelcache import open_collection

    return open_collection(image).memory()


def open_format(source: Source, name: str | None) -> tuple[Format, tuple[Source, ...]]:
    """The container in `source`, seen through a corefile to the kernel's core inside it.

    Returns it with the further sources to close. Raises `FormatError`.
    """
    from kvmtool import formats

    entry = formats.by_name(name) if name is not None else formats.identify(source)
    dump: Any = formats.load(entry)(source)
    if entry.name != "corefile":
        return dump, ()
    inner = dump.open_member(dump.kernel_member())
    core, more = open_format(inner, None)
    core.container = dump
    return core, (inner, *more)


def _open_dump(
    kernel: str | None,
    core: str,
    slide: int | None,
    force: bool,
    format: str | None,
    arch: str | None,
    kernel_path: Sequence[str] | None,
) -> Kvm:
    from kvmtool.boot import Finder

    source = open_source(core)
    dump, inner = open_format(source, format)
    facts = dump.facts
    for text in dump.warnings:
        warnings.warn(f"{core}: {text}", KvmWarning, stacklevel=3)
    machine = arch_for(facts.cputype, facts.cpusubtype)
    memory: Memory | None = dump.virtual()
    if memory is None:
        raise UnsupportedError(f"{core}: {dump.name} holds no kernel address space")
    alone = Finder(memory, facts, machine, core, None)
    if kernel is None:
        kernel = _known_kernel(alone, kernel_path)
    if kernel is None:
        if slide is not None:  # raises: a slide says nothing without a kernel's link address
            alone.at_slide(slide)
        sources = (*inner, source)
        return Kvm(dump, machine, lambda: memory, lambda: _kernel_inside(alone, core), sources)
    file = open_kernel(kernel, arch or macho.arch_name(facts.cputype, facts.cpusubtype))
    image = file.kernel
    if image.cputype != facts.cputype and not force:
        theirs = macho.arch_name(image.cputype, image.cpusubtype)
        raise MismatchError(
            f"{kernel} is a kernel for {theirs}, {core} a dump of {machine.name}; "
            "--force goes on all the same"
        )
    finder = Finder(memory, facts, machine, core, image)
    boot = finder.find(force) if slide is None else finder.at_slide(slide)
    parts = Parts(image, SymbolTable(image.symtab, boot.slide or 0), boot, file)
    sources = (file.image.source, *inner, source)
    return Kvm(dump, machine, lambda: memory, lambda: parts, sources)


def _known_kernel(finder: Finder, kernel_path: Sequence[str] | None) -> str | None:
    """The file of the dump's kernel in the directories the user named, found by its UUID."""
    from kvmtool.kernel_index import ENVIRONMENT

    if kernel_path is None and not os.environ.get(ENVIRONMENT):
        return None
    from kvmtool.kernel_search import find_kernel

    uuid = finder.facts.uuid or finder.uuid_alone()
    known = None if uuid is None else find_kernel(uuid, kernel_path)
    if known is not None:
        text = f"kernel {known.path} taken for {finder.name}: its UUID is {uuid_text(uuid)}"
        warnings.warn(text, KvmWarning, stacklevel=4)
    return None if known is None else known.path


def _kernel_inside(finder: Finder, core: str) -> Parts:
    """The kernel in the dump's own memory, and its symbols where the dump holds them.

    The table in memory may be as linked or as run; `__mh_execute_header`, which is the header's
    own address, tells which.
    """
    from kvmtool.image import LoadedImage

    try:
        boot = finder.find()
    except NotFoundError as error:
        return Parts(None, SymbolTable(None, 0, str(error)), None)
    image = MachO(LoadedImage(finder.memory, boot.kernel_address, core))
    try:
        table = image.symtab
        found = table.find("__mh_execute_header") if table is not None else []
    except FormatError:
        table, found = None, []
    header = next((entry for entry in found if entry.defined), None)
    if header is None:
        hint = (
            f"{core} holds no symbol table; name the file of kernel {uuid_text(boot.uuid)} "
            f"({boot.version or 'no banner'}) with -N"
        )
        return Parts(image, SymbolTable(None, 0, hint), boot)
    slide = boot.kernel_address - header.n_value
    return Parts(image, SymbolTable(table, slide), boot._replace(slide=slide))
