"""`Kvm`, the handle, and `open`, the pipeline that makes one.

Bytes → container → address space → symbols → types → kernel objects. All state is the handle's;
handles share nothing.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool import macho
from kvmtool.arch import Arch, arch_for
from kvmtool.errors import (
    FormatError,
    KvmError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.macho import MachO
from kvmtool.source import open_source
from kvmtool.symbols import Symbol, SymbolTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from kvmtool.boot import Boot, Finder
    from kvmtool.formats import Facts, Format
    from kvmtool.memory import RunMemory
    from kvmtool.source import Source
    from kvmtool.target import Target
    from kvmtool.types.layouts import Choice
    from kvmtool.xnu.kinfo import KinfoProc
    from kvmtool.xnu.layout_check import Verdict
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.queues import Report


class Parts(NamedTuple):
    """What names need: the kernel's Mach-O, its symbols, and where it was found."""

    kernel: MachO | None
    symbols: SymbolTable
    boot: Boot | None


class Kvm:
    """A kernel, live or dead: its symbols, its memory, its processes.

    Made by `open`; a context manager. `dump` is the container (None for a kernel file alone),
    `arch` the processor. `memory` (the kernel's address space), `kernel` (the Mach-O of the
    kernel's file, or the one found in the dump), `symbols` and `boot` (where the kernel lies, and
    how it was found) are made when they are first asked for.
    """

    def __init__(
        self,
        dump: Format | None,
        arch: Arch,
        memory: Callable[[], RunMemory],
        parts: Callable[[], Parts],
        sources: tuple[Source, ...],
    ) -> None:
        """Use `open`; this only puts the parts together. Takes over `sources` to close them."""
        self.dump, self.arch = dump, arch
        self.layout_name: str | None = None
        self._make_memory, self._make_parts = memory, parts
        self._sources = sources
        self._closed = False

    @cached_property
    def _parts(self) -> Parts:
        return self._make_parts()

    @cached_property
    def memory(self) -> RunMemory:
        """The kernel's address space; of a kernel file alone, its segments at link addresses."""
        return self._make_memory()

    @property
    def kernel(self) -> MachO | None:
        """The Mach-O of the kernel; None when neither a file nor the dump has it."""
        return self._parts.kernel

    @property
    def symbols(self) -> SymbolTable:
        """The kernel's symbols; empty, with a hint what to do, when there are none to be had."""
        return self._parts.symbols

    @property
    def boot(self) -> Boot | None:
        """Where the kernel lies; None for a kernel file alone, or when it was not found."""
        return self._parts.boot

    def __enter__(self) -> Kvm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = self.dump.name if self.dump else "kernel file"
        slide = "unknown" if self.kerndisp is None else f"{self.kerndisp:#x}"
        return f"<Kvm {self.arch.name} {name} slide={slide}>"

    def close(self) -> None:
        """Give back the files; the handle cannot be used afterwards."""
        if not self._closed:
            self._closed = True
            for source in self._sources:
                source.close()

    # symbols and memory

    @property
    def kerndisp(self) -> int | None:
        """The slide in bytes: where the kernel runs minus where it was linked; None if unknown."""
        if self.dump is None:
            return 0
        return None if self.boot is None else self.boot.slide

    def nlist(self, names: Iterable[str]) -> list[Symbol | None]:
        """The symbol for each name, in order; None for a miss."""
        return [self.symbols.get(name) for name in names]

    def address(self, symbol: str) -> int:
        """The address of a symbol. Raises `NotFoundError` with near misses."""
        return self.symbols.address(symbol)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of kernel memory at `address`, or `FaultError`: all or nothing."""
        return self.memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Always refused, even for no bytes: the kernel is dead, and its file is evidence."""
        raise UnsupportedError("kvm_write not implemented for dead kernels")

    # types and kernel objects

    @property
    def facts(self) -> Facts | None:
        """What the container says of its kernel; None for a kernel file alone."""
        return None if self.dump is None else self.dump.facts

    @cached_property
    def version(self) -> str | None:
        """The kernel's banner: as it stands in memory, else as the container has it."""
        from kvmtool.boot import banner_of

        if self.boot is not None and self.boot.version is not None:
            return self.boot.version
        found = banner_of(self.memory, self.symbols)
        return found if found is not None or self.facts is None else self.facts.version

    @cached_property
    def layouts(self) -> list[Choice]:
        """The structure layouts that may fit this kernel, the likeliest first, and why these.

        Raises `NotFoundError` when the database has none for this kernel's machine.
        """
        from kvmtool.types import layouts

        if self.layout_name is not None:
            table = layouts.table(self.layout_name)
            return [layouts.Choice(table, f"layout {table.name}, named by the user", False)]
        banner = layouts.parse_banner(self.version) if self.version else None
        return layouts.candidates(banner.xnu if banner else None, self.arch.layouts)

    @cached_property
    def tried(self) -> list[tuple[Choice, Target, Verdict]]:
        """The layouts held against the kernel's memory, until one fits: it is the last."""
        from kvmtool.target import Target
        from kvmtool.xnu.layout_check import check

        address = self.boot.kernel_address if self.boot else 0
        bits = self.facts.va_bits if self.facts else None
        tried = []
        for choice in self.layouts:
            target = Target(self.arch, self.memory, self.symbols, choice.table, bits, address)
            tried.append((choice, target, check(target)))
            if tried[-1][2].fits is not False:
                break
        return tried

    def verified_target(self) -> Target:
        """The kernel with types that fit it.

        Raises `MismatchError` when they do not; warns when the memory that would tell is missing.
        """
        if self.dump is None:
            raise UnsupportedError(
                f"{self.kernel.source.name if self.kernel else 'the kernel'} is a kernel file, "
                "its memory is not in it: name a core with -M"
            )
        if not len(self.symbols) and self.symbols.hint:
            raise NotFoundError("symbol", "_allproc", hint=self.symbols.hint)
        choice, target, verdict = self.tried[-1]
        if verdict.fits is False:
            reasons = "; ".join(f"{choice.how}: {verdict.why}" for choice, _, verdict in self.tried)
            raise MismatchError(
                f"no structure layout fits this kernel ({self.version or 'no banner'}): {reasons}"
            )
        if verdict.fits is None:
            text = f"layout {choice.table.name} is not verified: {verdict.why}"
            warnings.warn(text, KvmWarning, stacklevel=2)
        return target

    def procs(self, report: Report | None = None) -> Iterator[Proc]:
        """Every process; what stopped or disagreed goes into `report`. See `xnu.proc.procs`."""
        from kvmtool.xnu.proc import procs

        return procs(self.verified_target(), report)

    def getprocs(self, op: int = 0, arg: int = 0, report: Report | None = None) -> list[KinfoProc]:
        """The processes `op` (KERN_PROC_*) and `arg` select, as a live kernel answers sysctl."""
        from kvmtool.xnu.getprocs import getprocs

        return getprocs(self.verified_target(), op, arg, report)

    def loadavg(self) -> tuple[float, float, float]:
        """The load averages over 1, 5 and 15 minutes. Raises `FaultError` or `NotFoundError`."""
        from kvmtool.xnu.load import loadavg

        return loadavg(self.arch, self.memory, self.symbols)


def open_kernel(path: str) -> MachO:
    """The kernel's Mach-O. The caller closes its source. Raises OSError or `FormatError`."""
    image = MachO(open_source(path))
    if image.filetype == macho.MH_CORE:
        raise FormatError(path, 12, "this is a core, expected a kernel: name it with -M instead")
    return image


def open(  # noqa: A001  kvmtool.open() reads as what it does
    kernel: str | None = None,
    core: str | None = None,
    *,
    slide: int | None = None,
    force: bool = False,
    format: str | None = None,
    layout: str | None = None,
) -> Kvm:
    """Open a kernel file, a dump, or a dump with its kernel's file.

    `kernel` and `core` are paths; without `kernel` the dump's own kernel is used where it holds
    one. `slide` (bytes) overrides what would be found; `force` goes on although kernel and dump do
    not belong together; `format` names the container; `layout` a layout of the database.

    Raises OSError, `FormatError`, `MismatchError`, `NotFoundError`.
    """
    if core is None:
        kvm = _open_static(kernel)
    else:
        image = open_kernel(kernel) if kernel is not None else None
        kvm = _open_dump(image, core, slide, force, format)
    kvm.layout_name = layout
    return kvm


def _open_static(kernel: str | None) -> Kvm:
    if kernel is None:
        raise KvmError(
            "no kernel and no core: name a kernel with -N or a core with -M, or make a sample "
            "to try with 'kvmtool demo DIR'"
        )
    image = open_kernel(kernel)
    arch = arch_for(image.cputype, image.cpusubtype)
    parts = Parts(image, SymbolTable(image.symtab, 0), None)
    return Kvm(None, arch, lambda: _static_memory(image), lambda: parts, (image.source,))


def _static_memory(image: MachO) -> RunMemory:
    from kvmtool.image import image_memory

    return image_memory(image)


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
    image: MachO | None, core: str, slide: int | None, force: bool, format: str | None
) -> Kvm:
    from kvmtool.boot import Finder

    source = open_source(core)
    dump, inner = open_format(source, format)
    facts = dump.facts
    for text in dump.warnings:
        warnings.warn(f"{core}: {text}", KvmWarning, stacklevel=3)
    arch = arch_for(facts.cputype, facts.cpusubtype)
    if image is not None and image.cputype != facts.cputype and not force:
        theirs = macho.arch_name(image.cputype, image.cpusubtype)
        raise MismatchError(
            f"{image.source.name} is a kernel for {theirs}, {core} a dump of {arch.name}; "
            "--force goes on all the same"
        )
    memory: RunMemory | None = dump.virtual()
    if memory is None:
        raise UnsupportedError(f"{core}: {dump.name} holds no kernel address space")
    finder = Finder(memory, facts, arch, core, image)
    if image is None:
        if slide is not None:
            finder.at_slide(slide)  # raises: there is nothing to slide
        sources = (*inner, source)
        return Kvm(dump, arch, lambda: memory, lambda: _kernel_inside(finder, core), sources)
    boot = finder.find(force) if slide is None else finder.at_slide(slide)
    parts = Parts(image, SymbolTable(image.symtab, boot.slide or 0), boot)
    return Kvm(dump, arch, lambda: memory, lambda: parts, (image.source, *inner, source))


def _kernel_inside(finder: Finder, core: str) -> Parts:
    """The kernel in the dump's own memory, and its symbols where the dump holds them.

    The table in memory may be as linked or as run; `__mh_execute_header`, which is the header's
    own address, tells which.
    """
    from kvmtool.boot import uuid_text
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
