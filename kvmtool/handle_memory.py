"""What a handle has of an opened kernel before types are asked for: memory, symbols, kexts."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Self

from kvmtool.errors import (
    NotFoundError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from kvmtool.arch import Arch
    from kvmtool.boot import Boot
    from kvmtool.formats import Facts, Format
    from kvmtool.kernel_file import KernelFile
    from kvmtool.kext_file import LoadedKext
    from kvmtool.kexts import Code, Kext, Kexts, Located
    from kvmtool.macho import MachO, Segment
    from kvmtool.memory import Memory, Region
    from kvmtool.peel import Layer
    from kvmtool.source import Source
    from kvmtool.symbols import Symbol, SymbolTable
    from kvmtool.type_files import Closable
    from kvmtool.way_in import Way


class Parts(NamedTuple):
    """What names need: the kernel's Mach-O, its symbols, where it was found, and its file."""

    kernel: MachO | None
    symbols: SymbolTable
    boot: Boot | None
    file: KernelFile | None = None


class MemoryHandle:
    """A kernel's memory and symbols. `kvm.open` makes one, as a `Kvm`; it is a context manager.

    `dump` is the container (None for a kernel file alone), `arch` the processor. `memory` (the
    kernel's address space), `kernel` (the Mach-O of the kernel's file, or the one found in the
    dump), `symbols` and `boot` (where the kernel lies, and how it was found) are made when they are
    first asked for. `physical` is the machine's memory where the dump holds that, and `way` the
    page tables that lead from it to the kernel's.
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

    @cached_property
    def file_memory(self) -> Memory | None:
        """The kernel's file at link addresses, packed pointers decoded; None without a file."""
        from kvmtool.kernelcache import open_collection

        file = self._parts.file
        return None if file is None else open_collection(file.image).memory()

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

    def __enter__(self) -> Self:
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
        names = list(names)
        self.symbols.expect(len(names))
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

        if self._kernel_segment(address) is not None:
            found = self.symbols.at(address)
            owner = self.kexts.owner(address)  # a prelinked kext lies in the kernel's segments
            if found is not None and owner is None:
                return Located(found[0], found[1], None)
        return self.kexts.at(address)

    def _kernel_segment(self, address: int) -> Segment | None:
        """The kernel's segment that holds `address`, by where its header lies.

        The slide would not do: the booter has slid the addresses in a header that is in memory.
        """
        kernel = self.kernel
        return None if kernel is None else kernel.segment_at(address - self._kernel_moved())

    def _kernel_moved(self) -> int:
        """How far the kernel's segments lie from where its header has them, in bytes."""
        text = None if self.kernel is None else self.kernel.segment("__TEXT")
        if self.boot is None or text is None:
            return self.kerndisp or 0
        return self.boot.kernel_address - text.vmaddr

    def code_at(self, address: int) -> Code:
        """What a pointer to code leads to, stripped of its signature."""
        from kvmtool.kexts import Code
        from kvmtool.macho import VM_PROT_EXECUTE

        found = self.symbol_at(address)
        owner = self.kexts.owner(address)
        segment = self._kernel_segment(address)
        inside = owner is not None or (
            segment is not None and bool(segment.initprot & VM_PROT_EXECUTE)
        )
        kext = owner.identifier if owner is not None else None
        if found is None or not inside:
            start = owner.address if owner is not None else address
            return Code(address, None, address - start, kext, inside)
        return Code(address, found.symbol.name, found.offset, kext, inside)

    def data_ranges(self) -> list[Region]:
        """Where the data of the kernel's image lies: its segments that hold no code, and stay."""
        from kvmtool.kernelcache import own_segment
        from kvmtool.macho import VM_PROT_EXECUTE
        from kvmtool.memory import Region

        moved = self._kernel_moved()
        return [
            Region(segment.vmaddr + moved, segment.vmsize)
            for segment in (() if self.kernel is None else self.kernel.segments)
            if segment.initprot and not segment.initprot & VM_PROT_EXECUTE
            if own_segment(segment.segname)
        ]

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

    def _kexts_in_memory(self) -> Iterable[Kext]:
        """Those the kernel had loaded: a handle with types knows them."""
        return ()

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
