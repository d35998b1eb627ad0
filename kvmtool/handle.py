"""`Kvm`, the handle: what an opened kernel answers. `kvm.open` makes one.

All state is the handle's; handles share nothing.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import (
    FaultError,
    KvmWarning,
    MismatchError,
    NotFoundError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from kvmtool.arch import Arch
    from kvmtool.boot import Boot
    from kvmtool.formats import Facts, Format
    from kvmtool.kernel_file import KernelFile
    from kvmtool.kext_file import LoadedKext
    from kvmtool.kexts import Code, Kext, Kexts, Located
    from kvmtool.macho import MachO
    from kvmtool.memory import Memory
    from kvmtool.object import Object
    from kvmtool.peel import Layer
    from kvmtool.scope import Scope
    from kvmtool.source import Source
    from kvmtool.symbols import Symbol, SymbolTable
    from kvmtool.target import Target
    from kvmtool.type_files import Closable, Found
    from kvmtool.types.layouts import Choice
    from kvmtool.types.model import TypeTable
    from kvmtool.way_in import Way
    from kvmtool.xnu.args import Arguments
    from kvmtool.xnu.kext import KextInfo
    from kvmtool.xnu.kinfo import KinfoProc
    from kvmtool.xnu.layout_check import Verdict
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.queues import Report


class Parts(NamedTuple):
    """What names need: the kernel's Mach-O, its symbols, where it was found, and its file."""

    kernel: MachO | None
    symbols: SymbolTable
    boot: Boot | None
    file: KernelFile | None = None


class Kvm:
    """A kernel, live or dead: its symbols, its memory, its processes.

    Made by `open`; a context manager. `dump` is the container (None for a kernel file alone),
    `arch` the processor. `memory` (the kernel's address space), `kernel` (the Mach-O of the
    kernel's file, or the one found in the dump), `symbols` and `boot` (where the kernel lies, and
    how it was found) are made when they are first asked for. `physical` is the machine's memory
    where the dump holds that, and `way` the page tables that lead from it to the kernel's.
    """

    def __init__(
        self,
        dump: Format | None,
        arch: Arch,
        memory: Callable[[], Memory],
        parts: Callable[[], Parts],
        sources: tuple[Source, ...],
    ) -> None:
        """Use `open`; this only puts the parts together. Takes over `sources` to close them."""
        self.dump, self.arch = dump, arch
        self.layout_name: str | None = None
        self.types_file: str | None = None
        self.kernel_path: Sequence[str] | None = None
        self.force = False
        self.kext_files: tuple[tuple[str, int], ...] = ()
        self.physical: Memory | None = None
        self.way: Way | None = None
        self._make_memory, self._make_parts = memory, parts
        self._sources = sources
        self._held: tuple[Closable, ...] = ()
        self._closed = self._told = False

    @cached_property
    def _parts(self) -> Parts:
        return self._make_parts()

    @cached_property
    def memory(self) -> Memory:
        """The kernel's address space; of a kernel file alone, its segments at link addresses.

        There pointers that the file holds packed are decoded, and the kext files that were named
        lie where they were said to.
        """
        return self._with_kexts(self._make_memory())

    def _with_kexts(self, memory: Memory) -> Memory:
        if self.dump is not None or not self.kext_files:
            return memory
        from kvmtool.joined import JoinedMemory

        return JoinedMemory([memory, *(kext.memory for kext in self._files_of_kexts)])

    @cached_property
    def raw_memory(self) -> Memory:
        """As `memory`, but a kernel file's pointers as they lie in the file."""
        file = self._parts.file
        if self.dump is not None or file is None:
            return self.memory
        from kvmtool.image import image_memory

        return self._with_kexts(image_memory(file.image))

    def decoded(self, address: int, size: int) -> bool:
        """Whether `memory` there holds pointers that the kernel's file has in packed form."""
        if self.dump is not None:
            return False
        pieces = zip(
            self.memory.read_pieces(address, size),
            self.raw_memory.read_pieces(address, size),
            strict=False,
        )
        return any(decoded.data != filed.data for decoded, filed in pieces)

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
            for source in (*self._held, *self._sources):
                source.close()

    # symbols and memory

    @property
    def kerndisp(self) -> int | None:
        """The slide in bytes: where the kernel runs minus where it was linked; None if unknown."""
        if self.dump is None:
            return 0
        return None if self.boot is None else self.boot.slide

    def nlist(self, names: Iterable[str]) -> list[Symbol | None]:
        """The symbol for each name (`kext:symbol` for a kext's), in order; None for a miss."""
        return [self._found(name) for name in names]

    def near(self, name: str) -> list[str]:
        """What `name`, which was not found, may have meant: in a kext, or another spelling."""
        return self.kexts.having(name)[:3] or self.symbols.near(name)

    def _found(self, name: str) -> Symbol | None:
        try:
            return self.lookup(name) if ":" in name else self.symbols.get(name)
        except NotFoundError:
            return None

    def lookup(self, name: str) -> Symbol:
        """The symbol `name`, or `kext:symbol`. Raises `NotFoundError` with near misses."""
        try:
            return self.symbols.lookup(name)
        except NotFoundError as missing:
            if ":" in name:  # C++ names may hold a colon too
                return self.kexts.lookup(name)
            if having := self.kexts.having(name):
                raise NotFoundError("symbol", name, having[:3]) from missing
            raise

    def address(self, symbol: str) -> int:
        """The address of a symbol. Raises `NotFoundError` with near misses."""
        return self.lookup(symbol).address

    def symbol_at(self, address: int) -> Located | None:
        """The kernel's or a kext's symbol that holds `address`; None outside of all of them."""
        from kvmtool.kexts import Located

        kernel = self.kernel
        inside = kernel.segment_at(address - (self.kerndisp or 0)) if kernel is not None else None
        if inside is not None:
            found = self.symbols.at(address)
            owner = self.kexts.owner(address)  # a prelinked kext lies in the kernel's segments
            if found is not None and owner is None:
                return Located(found[0], found[1], None)
        return self.kexts.at(address)

    def code_at(self, address: int) -> Code:
        """What a pointer to code leads to, stripped of its signature."""
        from kvmtool.kexts import Code
        from kvmtool.macho import VM_PROT_EXECUTE

        found = self.symbol_at(address)
        owner = self.kexts.owner(address)
        kernel = self.kernel
        segment = kernel.segment_at(address - (self.kerndisp or 0)) if kernel else None
        inside = owner is not None or (
            segment is not None and bool(segment.initprot & VM_PROT_EXECUTE)
        )
        kext = owner.identifier if owner is not None else None
        if found is None or not inside:
            start = owner.address if owner is not None else address
            return Code(address, None, address - start, kext, inside)
        return Code(address, found.symbol.name, found.offset, kext, inside)

    # the kernel's file

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What the kernel's file was wrapped in, outermost first."""
        file = self._parts.file
        return () if file is None else file.layers

    @property
    def kind(self) -> str:
        """ "kernel", "prelinked kernel" or "kernel collection"."""
        from kvmtool.kernelcache import open_collection

        file = self._parts.file
        return "kernel" if file is None else open_collection(file.image).kind

    @cached_property
    def kexts(self) -> Kexts:
        """The kexts in the kernel's image, those whose files were named, and those in memory."""
        from kvmtool import kexts
        from kvmtool.kernelcache import open_collection

        file = self._parts.file
        inside = open_collection(file.image).kexts if file is not None else ()
        found = [kexts.from_image(kext, self.kerndisp or 0) for kext in inside]
        found += [kexts.from_file(loaded) for loaded in self._files_of_kexts]
        return kexts.Kexts(kexts.with_loaded(found, self._kexts_in_memory()))

    def _kexts_in_memory(self) -> Iterator[Kext]:
        """Those the kernel had loaded, with the symbols that lie in memory beside them."""
        from kvmtool.kexts import from_memory

        for kext in self.loaded_kexts():
            name, version = kext.name, kext.version
            if isinstance(name, str) and isinstance(kext.address, int) and kext.address:
                size = kext.size if isinstance(kext.size, int) else 0
                told = version if isinstance(version, str) else None
                yield from_memory(self.memory, name, told, kext.address, size)

    def loaded_kexts(self, report: Report | None = None) -> list[KextInfo]:
        """What kextstat lists of a dump; none of a kernel file, or without types for its machine.

        See `xnu.kext.kexts`.
        """
        from kvmtool.xnu.kext import kexts

        if self.dump is None or not len(self.symbols):
            return []
        try:
            target = self.nearest_target()
        except NotFoundError:  # there are no layouts for this kind of machine at all
            return []
        return kexts(target, report)

    @cached_property
    def _files_of_kexts(self) -> list[LoadedKext]:
        from kvmtool.kernel_file import open_kernel
        from kvmtool.kext_file import load_kext

        loaded = []
        for path, address in self.kext_files:
            image = open_kernel(path, self.arch.name).image
            self._sources = (*self._sources, image.source)
            loaded.append(load_kext(image, address, self._kernel_address))
        return loaded

    def _kernel_address(self, name: str) -> int | None:
        found = self.symbols.get(name)
        return None if found is None else found.address

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
    def exact_types(self) -> Found | None:
        """This very kernel's types: from the file the user named, else wherever they were found.

        Raises what `type_files.open_types` raises for the file the user named.
        """
        from kvmtool.macho import arch_name
        from kvmtool.type_files import KernelIdentity, find_types, open_types

        image, file = self.kernel, self._parts.file
        said = (image.uuid if image else None, self.boot.uuid if self.boot else None)
        kernel = KernelIdentity(
            arch_name(image.cputype, image.cpusubtype) if image else self.arch.name,
            self.arch.byteorder,
            self.arch.pointer_size,
            next((uuid for uuid in said if uuid), None),
            self.version,
        )
        if self.types_file is not None:
            found: Found | None = open_types(self.types_file, kernel, self.force)
        else:
            path = file.path if file else None
            found = find_types(image, path, kernel, self.kernel_path)
        if found is not None:
            self._held = found.held
        return found

    @cached_property
    def layouts(self) -> list[Choice]:
        """The types that may fit this kernel, the likeliest first, and why these.

        Exact ones come first. Raises `NotFoundError` when there are none, and the database has
        none for this kernel's machine.
        """
        from kvmtool.type_choice import choices

        named = self.types_file is not None
        exact = self.exact_types if self.layout_name is None or named else None
        return choices(self.arch, self.version, self.layout_name, exact, named)

    @property
    def type_choice(self) -> Choice:
        """The types that are used, and in one sentence which these are and why.

        Of a dump those that fit its memory. Raises as `layouts`, and `MismatchError` when none of
        them fits.
        """
        return self.layouts[0] if self.dump is None else self._fitting()[0]

    @property
    def types(self) -> TypeTable:
        """The kernel's types: exact ones where they were found, else the built-in layout.

        Raises as `type_choice`.
        """
        return self.type_choice.table

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

    def _need_memory(self) -> None:
        if self.dump is None:
            raise UnsupportedError(
                f"{self.kernel.source.name if self.kernel else 'the kernel'} is a kernel file, "
                "its memory is not in it: name a core with -M"
            )
        if not len(self.symbols) and self.symbols.hint:
            raise NotFoundError("symbol", "_allproc", hint=self.symbols.hint)

    def verified_target(self) -> Target:
        """The kernel with types that fit it.

        Raises `MismatchError` when they do not; warns when the memory that would tell is missing.
        """
        self._need_memory()
        return self._fitting()[1]

    def _fitting(self) -> tuple[Choice, Target]:
        """The types that fit; raises and warns as `verified_target`."""
        choice, target, verdict = self.tried[-1]
        if verdict.fits is False:
            reasons = "; ".join(f"{choice.how}: {verdict.why}" for choice, _, verdict in self.tried)
            raise MismatchError(
                f"no structure layout fits this kernel ({self.version or 'no banner'}): {reasons}"
            )
        if not self._told:
            self._told = True
            if verdict.fits is None:
                text = f"layout {choice.table.name} is not verified: {verdict.why}"
                warnings.warn(text, KvmWarning, stacklevel=3)
            exact = self.exact_types if len(self.tried) > 1 else None
            if exact is not None and not choice.how.startswith(exact.how):
                text = f"{exact.how}, do not fit: {self.tried[0][2].why}; {choice.how}"
                warnings.warn(text, KvmWarning, stacklevel=3)
        return choice, target

    @cached_property
    def scope(self) -> Scope:
        """The kernel's variables and types as an expression sees them."""
        from kvmtool.scope import Scope

        return Scope(self)

    def __getitem__(self, name: str) -> Object:
        """The kernel's variable or function `name`, or `kext:symbol`: a reference, nothing is read.

        Of one whose type is not known only the address is: cast it. Raises `NotFoundError` with
        near misses.
        """
        return self.scope.variable(name)

    def __contains__(self, name: str) -> bool:
        return self.nlist([name]) != [None]

    def evaluate(self, expression: str) -> Object:
        """What the C expression means: "cdevsw[11].d_read". Raises as `kvmtool.evaluate` says."""
        from kvmtool.evaluate import evaluate

        return evaluate(expression, self.scope)

    def nearest_target(self) -> Target:
        """The kernel with the types likeliest to fit, held against nothing.

        For structures that hardly ever changed and whose readers check what they find. Raises as
        `verified_target`, but for the mismatch.
        """
        self._need_memory()
        fitting = [target for _, target, verdict in self.tried if verdict.fits is not False]
        return fitting[0] if fitting else self.tried[0][1]

    def procs(self, report: Report | None = None) -> Iterator[Proc]:
        """Every process; what stopped or disagreed goes into `report`. See `xnu.proc.procs`."""
        from kvmtool.xnu.proc import procs

        return procs(self.verified_target(), report)

    def process(self, pid: int) -> Memory:
        """The address space of the process `pid`, from a dump of physical memory.

        Raises as `space_of`; `NotFoundError` when there is no such process.
        """
        from kvmtool.xnu.space import find_process

        return self.space_of(find_process(self.procs(), pid))

    def space_of(self, proc: Proc) -> Memory:
        """The address space of a process, from a dump of physical memory.

        Raises `UnsupportedError` when the dump holds the kernel's memory alone, or the process has
        no address space.
        """
        from kvmtool.way_in import process_memory
        from kvmtool.xnu import space

        if self.physical is None or self.way is None:
            raise UnsupportedError("a process's memory is in no dump of the kernel's memory alone")
        target = self.verified_target()
        root, known = space.table_root(target, proc), space.user_stack(target, proc)
        budget = getattr(self.memory, "budget", None)
        name = f"process {proc.pid}"
        return process_memory(self.physical, self.way, root, known, name, budget)

    def arguments(self, proc: Proc) -> Arguments:
        """What a process was started with, from its own memory. Never raises `FaultError`."""
        from kvmtool.unreadable import Unreadable
        from kvmtool.xnu.args import NOTHING, BlockReader, arguments

        if proc.zombie is True:
            return NOTHING
        block = BlockReader(self.verified_target()).read(proc.address)
        memory: Memory | Unreadable
        try:
            memory = self.space_of(proc)
        except (UnsupportedError, FaultError, NotFoundError) as error:
            memory = Unreadable(str(error))
        return arguments(block, memory)

    def getprocs(self, op: int = 0, arg: int = 0, report: Report | None = None) -> list[KinfoProc]:
        """The processes `op` (KERN_PROC_*) and `arg` select, as a live kernel answers sysctl."""
        from kvmtool.xnu.getprocs import getprocs

        return getprocs(self.verified_target(), op, arg, report)

    def loadavg(self) -> tuple[float, float, float]:
        """The load averages over 1, 5 and 15 minutes. Raises `FaultError` or `NotFoundError`."""
        from kvmtool.xnu.load import loadavg

        return loadavg(self.arch, self.memory, self.symbols)
