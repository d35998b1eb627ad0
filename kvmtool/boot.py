"""What must be found before names work: where the kernel lies in a dump, and its slide.

Several ways lead there, each left by another writer; they are tried from the surest to the
slowest, and every candidate is verified against the kernel's UUID and its `version` banner before
it is believed. What was found, how, and what was rejected is kept for the user.

Order: osfmk/kdp notes and strings (xnu-2050..11417), the header scan lldb does
(DynamicLoaderDarwinKernel.cpp), the low globals page, a search back from a thread's pc.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FaultError, FormatError, MismatchError, NotFoundError
from kvmtool.image import LoadedImage, image_memory
from kvmtool.macho import MachO, uuid_text
from kvmtool.memory import read_cstring
from kvmtool.symbols import SymbolTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.arch import Arch
    from kvmtool.formats import Facts
    from kvmtool.memory import Memory

BANNER = b"Darwin Kernel Version "
_BANNER_LIMIT = 512
_PC_REACH = 32 << 20  # bytes; lldb's SearchForKernelNearPC
_PC_LIMIT = 64  # threads searched back from; XNU writes one per CPU
_PAGE = 4096
_MASK = (1 << 64) - 1

# osfmk/{i386,x86_64,arm64}/lowmem_vectors: eyecatcher, its fixed address, offset of lgStext
_LOW_GLOBALS = (
    (b"Catfish ", 0xFFFFFF8000002000, 0x10),
    (b"Kraken  ", 0xFFFFFFF000002000, 0x10),
    (b"Kraken  ", 0xFFFFFFF000004000, 0x10),
    (b"Kraken  ", 0xFFFFFE0000004000, 0x10),
)


class Candidate(NamedTuple):
    """A kernel header address that may be right, and who says so."""

    address: int
    how: str


class Boot(NamedTuple):
    """Where the kernel was found.

    `kernel_address` is that of its Mach-O header, `slide` bytes from its link address (None when
    no kernel file and no symbol tells); `how` says which way led there, `rejected` which did not.
    """

    kernel_address: int
    slide: int | None
    how: str
    uuid: bytes | None
    version: str | None
    rejected: tuple[str, ...] = ()


def banner_of(memory: Memory, symbols: SymbolTable) -> str | None:
    """The text at `_version`, or None if there is no such symbol or it cannot be read."""
    symbol = symbols.get("_version")
    if symbol is None:
        return None
    try:
        text = read_cstring(memory, symbol.address, _BANNER_LIMIT)
    except FaultError:
        return None
    return text.decode("utf-8", "backslashreplace").rstrip() if text.startswith(BANNER) else None


class Finder:
    """One search through one dump, with the kernel's file or without it."""

    def __init__(
        self, memory: Memory, facts: Facts, arch: Arch, name: str, kernel: MachO | None
    ) -> None:
        """`name` is the dump's, for messages."""
        self.memory, self.facts, self.arch, self.name, self.kernel = (
            memory,
            facts,
            arch,
            name,
            kernel,
        )
        self.rejected: list[str] = []
        self._seen_uuid = facts.uuid
        text = kernel.segment("__TEXT") if kernel else None
        self.link_address = text.vmaddr if text else None
        self.banner = (
            banner_of(image_memory(kernel), SymbolTable(kernel.symtab, 0)) if kernel else None
        )

    def find(self, force: bool = False) -> Boot:
        """The first candidate that verifies. Raises `MismatchError` naming kernel and dump.

        With `force` a kernel that is plainly another one's is taken all the same.
        """
        self._compare_claims(force)
        for candidate in self._candidates():
            boot = self._verify(candidate, force)
            if boot is not None:
                return boot
        error = self._nothing_found()
        error.tried = tuple(self.rejected)
        raise error

    def at_slide(self, slide: int) -> Boot:
        """The place a user's --slide names: taken as said, verified only to be able to warn."""
        if self.link_address is None:
            raise NotFoundError(
                "segment", "__TEXT", hint="--slide needs a kernel file: name one with -N"
            )
        address = (self.link_address + slide) & _MASK
        version = self._banner_at(slide)
        return Boot(address, slide, "given with --slide", self._uuid_at(address), version)

    def uuid_alone(self) -> bytes | None:
        """The UUID of the kernel in the dump's own memory; None if it was not found there."""
        try:
            return self.find().uuid
        except NotFoundError:
            return None

    # candidates

    def _candidates(self) -> Iterator[Candidate]:
        facts = self.facts
        if facts.kernel_address is not None:
            yield Candidate(facts.kernel_address, facts.said["kernel_address"])
        if facts.slide is not None and self.link_address is not None:
            yield Candidate((self.link_address + facts.slide) & _MASK, facts.said["slide"])
        if self.link_address is not None:
            yield Candidate(self.link_address, "the kernel lies at its link address")
        yield from self._headers()
        yield from self._low_globals()
        yield from self._near_pc()

    def _headers(self) -> Iterator[Candidate]:
        magic = next(
            magic
            for magic, (order, wide) in macho.MAGICS.items()
            if order == self.arch.byteorder and wide == (self.arch.pointer_size == 8)
        )
        for address in self.memory.find(magic, _PAGE):
            if self._kernel_header(address) is not None:
                yield Candidate(address, f"scan for the kernel's header, found at {address:#x}")

    def _kernel_header(self, address: int) -> MachO | None:
        """The Mach-O at `address` if it looks like a kernel: MH_EXECUTE with a __KLD segment."""
        try:
            image = MachO(LoadedImage(self.memory, address, self.name))
            looks_right = image.filetype == macho.MH_EXECUTE and image.segment("__KLD") is not None
        except (FaultError, FormatError):
            return None
        return image if looks_right else None

    def _low_globals(self) -> Iterator[Candidate]:
        for eyecatcher, address, offset in _LOW_GLOBALS:
            try:
                if self.memory.read(address, 8) != eyecatcher:
                    continue
                stext = int.from_bytes(self.memory.read(address + offset, 8), "little")
            except FaultError:
                continue
            if stext:
                yield Candidate(stext, f"lgStext of the low globals page at {address:#x}")

    def _near_pc(self) -> Iterator[Candidate]:
        found = (
            self.arch.registers(flavor, data).get(self.arch.pc)
            for thread in self.facts.threads
            for flavor, data in thread.states
        )
        for pc in islice(filter(None, found), _PC_LIMIT):
            start = self.arch.strip(pc, self.facts.va_bits or 64) & ~(_PAGE - 1)
            for address in range(start, max(start - _PC_REACH, 0), -_PAGE):
                if self._kernel_header(address) is not None:
                    yield Candidate(address, f"search back from pc {pc:#x}")
                    break

    # verification

    def _compare_claims(self, force: bool) -> None:
        """What the dump itself says of its kernel, against the file: cheap, before any search."""
        if self.kernel is None or force:
            return
        uuid = self.kernel.uuid
        if uuid is not None and self.facts.uuid is not None and uuid != self.facts.uuid:
            raise self._mismatch(self.facts.uuid, self.facts.version)

    def _verify(self, candidate: Candidate, force: bool) -> Boot | None:
        address = candidate.address
        if self.link_address is None:
            return self._verify_alone(candidate)
        slide = (address - self.link_address) & _MASK
        uuid, version = self._uuid_at(address), self._banner_at(slide)
        same_uuid = (
            None
            if uuid is None or self.kernel is None or self.kernel.uuid is None
            else uuid == self.kernel.uuid
        )
        same_banner = version is not None and version == self.banner
        if same_banner and same_uuid is not False:
            return Boot(address, slide, candidate.how, uuid, version, tuple(self.rejected))
        if same_uuid and version is None:  # no `version` symbol, or its page is not in the dump
            how = f"{candidate.how}; by its UUID, the banner in memory cannot be read"
            return Boot(address, slide, how, uuid, self.banner, tuple(self.rejected))
        if force and self._kernel_header(address) is not None:
            how = f"{candidate.how}; unverified (--force)"
            return Boot(address, slide, how, uuid, version, tuple(self.rejected))
        self._seen_uuid = self._seen_uuid or uuid
        found = f"{uuid_text(uuid)}, {version or 'no banner'}"
        self.rejected.append(f"{candidate.how} ({address:#x}): found {found}")
        return None

    def _verify_alone(self, candidate: Candidate) -> Boot | None:
        image = self._kernel_header(candidate.address)
        if image is None:
            self.rejected.append(
                f"{candidate.how} ({candidate.address:#x}): no kernel header there"
            )
            return None
        return Boot(
            candidate.address,
            None,
            candidate.how,
            image.uuid,
            self.facts.version,
            tuple(self.rejected),
        )

    def _uuid_at(self, address: int) -> bytes | None:
        try:
            return MachO(LoadedImage(self.memory, address, self.name)).uuid
        except (FaultError, FormatError):
            return None

    def _banner_at(self, slide: int) -> str | None:
        assert self.kernel is not None
        return banner_of(self.memory, SymbolTable(self.kernel.symtab, slide))

    # failure

    def _nothing_found(self) -> MismatchError | NotFoundError:
        if self.kernel is None:
            return NotFoundError(
                "kernel",
                f"in {self.name}",
                hint="name the kernel's file with -N, and its slide with --slide if it is known",
            )
        return self._mismatch(self._seen_uuid, self.facts.version)

    def _mismatch(self, uuid: bytes | None, version: str | None) -> MismatchError:
        assert self.kernel is not None
        return MismatchError(
            f"{self.kernel.source.name} ({uuid_text(self.kernel.uuid)}, "
            f"{self.banner or 'no banner'}) is not the kernel of {self.name} "
            f"({uuid_text(uuid)}, {version or self._banner_anywhere() or 'no banner found'})"
            "; --force goes on all the same, --slide names a slide"
        )

    def _banner_anywhere(self) -> str | None:
        for address in self.memory.find(BANNER):
            try:
                return read_cstring(self.memory, address, _BANNER_LIMIT).decode("utf-8", "replace")
            except FaultError:
                continue
        return None
