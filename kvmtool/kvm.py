"""`open`, the pipeline that makes a `Kvm`: read this first.

Bytes → container → address space → symbols → types → kernel objects. Types and objects are the
handle's business, since not every question needs them.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.arch import arch_for
from kvmtool.container import open_container
from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnknownFormatError,
    UnsupportedError,
)
from kvmtool.handle import Kvm, Parts
from kvmtool.kernel_file import open_kernel
from kvmtool.macho import MachO, uuid_text
from kvmtool.symbols import SymbolTable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmtool.boot import Boot
    from kvmtool.formats import Format
    from kvmtool.memory import Memory
    from kvmtool.source import Source

__all__ = ["Kvm", "open"]


def open(  # noqa: A001  kvmtool.open() reads as what it does
    kernel: str | None = None,
    core: str | None = None,
    *,
    slide: int | None = None,
    force: bool = False,
    format: str | None = None,
    layout: str | None = None,
    types: str | None = None,
    arch: str | None = None,
    kexts: Sequence[tuple[str, int]] = (),
    kernel_path: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    mapped: bool = True,
) -> Kvm:
    """Open a kernel file, a dump, or a dump with its kernel's file.

    `kernel` and `core` are paths. Without `kernel`, a dump's kernel is looked for by its UUID in
    the directories of `kernel_path` (KVMTOOL_KERNEL_PATH by default), else the one in the dump's
    own memory is used. `slide` (bytes) overrides what would be found; `force` goes on although
    kernel and dump do not belong together; `format` names the container (`open_container` has the
    names); `layout` a layout of the database, and `types` a file with the kernel's types (dSYM,
    CTF, ISF, a Volatility 2 profile);
    `arch` the slice of a fat file, by default the dump's; `kexts` are kext files and the
    addresses they are loaded at; `progress` is told bytes done and bytes in all while memory is
    searched for the kernel.

    With `mapped` off a dump's file is read, not mapped: it may be cut while it is open.
    `core` may also be gdb://host:port (a halted machine) or a memory device of the running Mac.

    Raises OSError, `FormatError`, `MismatchError`, `NotFoundError`.
    """
    try:
        if core is None:
            kvm = _open_static(kernel, arch)
        else:
            kvm = _open_dump(
                _Wanted(kernel, core, slide, force, format, arch, kernel_path, progress, mapped)
            )
    except FormatError as error:
        from kvmtool.misnamed import misnamed

        better = misnamed(kernel, core)
        if better is None:
            raise
        raise better from error
    kvm.layout_name, kvm.types_file = layout, types
    kvm.kernel_path, kvm.force = kernel_path, force
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


class _Wanted(NamedTuple):
    """What the user said about a dump; see `open`."""

    kernel: str | None
    core: str
    slide: int | None
    force: bool
    format: str | None
    arch: str | None
    kernel_path: Sequence[str] | None
    progress: Callable[[int, int], None] | None
    mapped: bool


def _open_dump(wanted: _Wanted) -> Kvm:
    dump, sources, unknown = open_container(wanted.core, wanted.format, wanted.mapped)
    for text in dump.warnings:
        warnings.warn(f"{wanted.core}: {text}", KvmWarning, stacklevel=3)
    physical = dump.physical()
    try:
        if physical is not None:
            return _open_physical(wanted, dump, sources, physical)
    except NotFoundError as missing:
        if unknown is None:
            raise
        raise UnknownFormatError(
            wanted.core, None, f"{unknown.reason}; and no kernel was found in it as raw memory"
        ) from missing
    memory = dump.virtual()
    if memory is None:
        raise UnsupportedError(f"{wanted.core}: {dump.name} holds no memory of a kernel")
    return _open_virtual(wanted, dump, sources, memory)


def _open_virtual(
    wanted: _Wanted, dump: Format, sources: tuple[Source, ...], memory: Memory
) -> Kvm:
    """A dump of the kernel's address space."""
    from kvmtool.boot import Finder

    facts, core = dump.facts, wanted.core
    machine = arch_for(facts.cputype, facts.cpusubtype)
    alone = Finder(memory, facts, machine, core, None)
    kernel = wanted.kernel or _known_kernel(wanted, facts.uuid, alone.uuid_alone)
    if kernel is None:
        if wanted.slide is not None:  # raises: a slide says nothing without a link address
            alone.at_slide(wanted.slide)

        def inside() -> Parts:
            try:
                return _kernel_inside(memory, alone.find(), core)
            except NotFoundError as error:
                return Parts(None, SymbolTable(None, 0, str(error)), None)

        return Kvm(dump, machine, lambda: memory, functools.cache(inside), sources)
    file = open_kernel(kernel, wanted.arch or macho.arch_name(facts.cputype, facts.cpusubtype))
    image = file.kernel
    if image.cputype != facts.cputype and not wanted.force:
        raise _other_machine(kernel, image, core, machine.name)
    finder = Finder(memory, facts, machine, core, image)
    boot = finder.find(wanted.force) if wanted.slide is None else finder.at_slide(wanted.slide)
    parts = Parts(image, SymbolTable(image.symtab, boot.slide or 0), boot, file)
    return Kvm(dump, machine, lambda: memory, lambda: parts, (file.image.source, *sources))


def _open_physical(
    wanted: _Wanted, dump: Format, sources: tuple[Source, ...], physical: Memory
) -> Kvm:
    """A dump of physical memory, or a live machine's: the kernel's page tables have to be found."""
    from kvmtool.boot import Boot
    from kvmtool.formats import UNSAID
    from kvmtool.formats.raw import Raw
    from kvmtool.paging import BUDGET
    from kvmtool.way_in import find_way, kernel_memory

    facts, core = dump.facts, wanted.core
    said = None if facts.cputype == UNSAID else macho.arch_name(facts.cputype, facts.cpusubtype)
    look = functools.partial(
        find_way,
        physical,
        facts=facts,
        name=core,
        force=wanted.force,
        progress=wanted.progress,
        remember=not dump.live,
        movable=isinstance(dump, Raw) and dump.movable,
    )
    kernel = wanted.kernel or _known_kernel(wanted, facts.uuid, lambda: look(None).uuid)
    file = open_kernel(kernel, wanted.arch or said) if kernel is not None else None
    image = file.kernel if file is not None else None
    way = look(image, kernel_address=_address_at(image, wanted.slide))
    if image is not None and image.cputype != way.cputype and not wanted.force:
        raise _other_machine(kernel or "", image, core, macho.arch_name(way.cputype, 0))
    machine = arch_for(way.cputype, facts.cpusubtype)
    if way.base and isinstance(dump, Raw):
        physical = dump.move(way.base)
    memory = kernel_memory(physical, way, 0 if _runs(dump) else BUDGET)
    boot = Boot(way.kernel_address, way.slide, way.how, way.uuid, way.version, way.rejected)
    if file is None or image is None:
        parts = _kernel_inside(memory, boot, core)
    else:
        parts = Parts(image, SymbolTable(image.symtab, boot.slide or 0), boot, file)
        sources = (file.image.source, *sources)
    kvm = Kvm(dump, machine, lambda: memory, lambda: parts, sources)
    kvm.physical, kvm.way = physical, way
    return kvm


def _runs(dump: Format) -> bool:
    """Whether the machine goes on while we look: its page tables must not be kept then."""
    return dump.live and not getattr(dump, "halted", False)


def _address_at(image: MachO | None, slide: int | None) -> int | None:
    """Where --slide puts the kernel's header; None without it."""
    if slide is None:
        return None
    text = image.segment("__TEXT") if image is not None else None
    if text is None:
        raise NotFoundError(
            "segment", "__TEXT", hint="--slide needs a kernel file: name one with -N"
        )
    return (text.vmaddr + slide) & 0xFFFFFFFFFFFFFFFF


def _other_machine(kernel: str, image: MachO, core: str, machine: str) -> MismatchError:
    theirs = macho.arch_name(image.cputype, image.cpusubtype)
    return MismatchError(
        f"{kernel} is a kernel for {theirs}, {core} a dump of {machine}; "
        "--force goes on all the same"
    )


def _known_kernel(
    wanted: _Wanted, uuid: bytes | None, look: Callable[[], bytes | None]
) -> str | None:
    """The file of the dump's kernel in the directories the user named, found by its UUID.

    `look` finds the UUID where the dump does not say it; it is asked only if there are directories.
    """
    from kvmtool.kernel_index import ENVIRONMENT

    if wanted.kernel_path is None and not os.environ.get(ENVIRONMENT):
        return None
    from kvmtool.kernel_search import find_kernel

    uuid = uuid or look()
    known = None if uuid is None else find_kernel(uuid, wanted.kernel_path)
    if known is not None:
        text = f"kernel {known.path} taken for {wanted.core}: its UUID is {uuid_text(uuid)}"
        warnings.warn(text, KvmWarning, stacklevel=5)
    return None if known is None else known.path


def _kernel_inside(memory: Memory, boot: Boot, core: str) -> Parts:
    """The kernel in the dump's own memory, and its symbols where the dump holds them.

    The table in memory may be as linked or as run; `__mh_execute_header`, which is the header's
    own address, tells which.
    """
    from kvmtool.image import LoadedImage

    image = MachO(LoadedImage(memory, boot.kernel_address, core))
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
    symbols = SymbolTable(table, boot.kernel_address - header.n_value)
    return Parts(image, symbols, boot._replace(slide=_own_slide(memory, image, symbols)))


def _own_slide(memory: Memory, image: MachO, symbols: SymbolTable) -> int:
    """The slide as the kernel itself knows it; the table in memory may have been slid with it."""
    variable = symbols.get("_vm_kernel_slide")  # xnu-2050 (10.8) on: before, nothing slid
    if variable is None:
        return symbols.slide
    try:
        raw = memory.read(variable.address, 8 if image.is64 else 4)
    except FaultError:
        return symbols.slide
    return int.from_bytes(raw, "little" if image.byteorder == "<" else "big")
