"""A kext's Mach-O file as it lies in memory once it is loaded at an address.

The address is the one kmod_info and kextstat give. In a final image (MH_KEXT_BUNDLE) the Mach-O
header lies there. Of an MH_OBJECT, which 32-bit kexts are, the linker writes a new header into
pages of its own (hdr_size, one page in practice), and the sections follow: this is where Amit
Singh's `_my_mmread` at 0x14f of a kext at 0x3bd01000 becomes 0x3bd0214f. An MH_OBJECT that was
linked for a place already (vmaddr is not 0) says itself where its header was.

The order of sections is the file's. kld followed the order in which the kernel has its own; for
__text, the first in both, there is no difference. What a linker changes in C++ vtables is not
repeated here.

Sources: libsa/load.c (xnu-792, __kload_linkedit_address), libkern/kxld/kxld_seg.c and
kxld_object.c (xnu-1504..2050); struct kmod_info: osfmk/mach/kmod.h.
"""

from __future__ import annotations

import os
from array import array
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import macho
from kvmtool.errors import FaultError, FormatError, MismatchError, TruncatedError
from kvmtool.memory import ZERO_FILL, RunMemory
from kvmtool.nlist import N_SECT, N_TYPE
from kvmtool.relocations import S_ATTR_DEBUG, RelocatedSource, Relocations
from kvmtool.source import FileSource
from kvmtool.symbols import SymbolTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.macho import MachO, Section, Segment
    from kvmtool.source import Source

LC_DYLD_CHAINED_FIXUPS = 0x34 | macho.LC_REQ_DYLD

_PAGE = 4096  # of the machines whose kexts are MH_OBJECT: osfmk/mach/{i386,ppc}/vm_param.h
_PLIST_LIMIT = 1 << 20  # bytes
_KMOD_MAX_NAME = 64
# osfmk/mach/kmod.h: offsets of info_version, name, version
_KMOD_INFO = {False: (0x4, 0xC, 0x4C), True: (0x8, 0x10, 0x50)}
_KMOD_INFO_VERSION = 1


class Run(NamedTuple):
    """Linked addresses [start, end): at file offset `offset`, or zeros (ZERO_FILL)."""

    start: int
    end: int
    offset: int


class Identity(NamedTuple):
    """Who a kext is, and which of its files or structures said so."""

    identifier: str
    version: str | None
    how: str


class LoadedKext:
    """A kext at `address`, as `load_kext` makes it.

    `size` is bytes from `address` on, headers and zero-fill included, __LINKEDIT (which a running
    kernel frees) not; `hdr_size` is what kmod_info calls so, 0 in a final image; `slide` is how far
    from its link address it lies. `identifier` is the CFBundleIdentifier.
    """

    def __init__(
        self, image: MachO, address: int, resolve: Callable[[str], int | None] | None
    ) -> None:
        """Use `load_kext`."""
        if image.filetype not in (macho.MH_OBJECT, macho.MH_KEXT_BUNDLE):
            raise FormatError(
                image.source.name,
                12,
                f"filetype {image.filetype:#x}, expected a kext: an object (0x1) or a kext bundle "
                f"({macho.MH_KEXT_BUNDLE:#x})",
            )
        if not image.segments:
            raise FormatError(image.source.name, None, "no segment, expected a kext's")
        self.image, self.address = image, address
        base, self.hdr_size = _link_base(image)
        self.slide = address - base
        self.relocations = Relocations(image, self.slide, resolve)
        self._runs = list(_runs(image))
        self._header = (base, base + image.header_size + image.sizeofcmds)
        ends = [run.end for run in self._runs] + [at + 8 for at in self.relocations.got.values()]
        self.size = max([base + self.hdr_size, *ends]) - base
        if image.filetype == macho.MH_OBJECT:
            self.size = _up(self.size)
        low, width = min([base, *(run.start for run in self._runs)]), 64 if image.is64 else 32
        if low + self.slide < 0 or address + self.size >= 1 << width:
            raise MismatchError(
                f"{image.source.name}: {self.size:#x} bytes at {address:#x} do not fit into "
                f"{width}-bit addresses"
            )
        self.symbols = SymbolTable(image.symtab, self.slide, f"{image.source.name} has no symbols")

    def __repr__(self) -> str:
        return f"<LoadedKext {self.identifier} at {self.address:#x}>"

    @property
    def uuid(self) -> bytes | None:
        """The 16 bytes of LC_UUID; kexts of 10.4 have none."""
        return self.image.uuid

    @property
    def identifier(self) -> str:
        """The CFBundleIdentifier: of the Info.plist, else of kmod_info, else the file's name."""
        return self.identity.identifier

    @property
    def version(self) -> str | None:
        """The CFBundleVersion from where the identifier came; None if only the file was found."""
        return self.identity.version

    @cached_property
    def identity(self) -> Identity:
        """The identifier and version, and where they stand (with why not in a nearer place)."""
        why = ""
        try:
            found = _from_plist(self.image.source.name)
        except FormatError as error:
            found, why = None, f" ({error})"
        if found is None:
            name = os.path.basename(self.image.source.name)
            found = self._from_kmod_info() or Identity(name, None, "the file's name")
        return found._replace(how=found.how + why)

    def _from_kmod_info(self) -> Identity | None:
        entries = self.image.symtab.find("_kmod_info") if self.image.symtab is not None else []
        at = next((e.n_value for e in entries if e.defined and e.n_type & N_TYPE == N_SECT), None)
        if at is None:
            return None
        info_version, name, version = _KMOD_INFO[self.image.is64]
        try:
            linked = _memory(self.image.source, 0, self._runs, ())
            data = linked.read(at, version + _KMOD_MAX_NAME)
        except FaultError:
            return None
        number = int.from_bytes(data[info_version : info_version + 4], self.relocations.byteorder)
        if number != _KMOD_INFO_VERSION or not (identifier := _text(data[name:version])):
            return None
        return Identity(identifier, _text(data[version:]) or None, "_kmod_info in the file")

    @cached_property
    def unresolved(self) -> tuple[str, ...]:
        """Names that neither the kext nor `resolve` defines: bytes that need them stay as filed.

        Raises what `Relocations` does.
        """
        return self.relocations.unresolved

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes the bytes differ from those a kernel would have here; empty when nothing."""
        notes = []
        if self.slide and self.image.segments[0].vmaddr and not self.relocations.tables:
            linked = self.address - self.slide
            notes.append(f"linked for {linked:#x} without relocations: pointers are as linked")
        if next(self.image.commands(LC_DYLD_CHAINED_FIXUPS), None) is not None:
            notes.append("chained fixups are not applied: pointers are as in the file")
        return tuple(notes)

    @cached_property
    def memory(self) -> RunMemory:
        """The kext's bytes at their addresses, relocated when read; raises what that raises.

        The Mach-O header is there only if the file was linked for this place, since a linker
        writes another. Else it is "absent", and so is __LINKEDIT.
        """
        runs, (start, end) = self._runs, self._header
        lost = [(s.vmaddr, s.vmaddr + s.vmsize) for s in self.image.segments if _linkedit(s)]
        if self.slide:
            runs = [part for run in runs for part in _without(run, start, end)]
            lost.append((start, max(end, start + self.hdr_size)))
        tail: list[bytes] = []
        for index, slot in self.relocations.got.items():
            value = self.relocations.symbol(index)
            if value is None:
                lost.append((slot, slot + 8))
                continue
            runs = [*runs, Run(slot, slot + 8, self.image.source.size + 8 * len(tail))]
            tail.append(value.to_bytes(8, self.relocations.byteorder))
        source = RelocatedSource(self.relocations, b"".join(tail))
        return _memory(source, self.slide, runs, lost)


def load_kext(
    image: MachO, address: int, resolve: Callable[[str], int | None] | None = None
) -> LoadedKext:
    """The kext file `image` as it lies in memory when kmod_info says `address`.

    `resolve` gives the address of a name that the kext leaves undefined (the kernel's and other
    kexts' symbols), or None. Raises `FormatError` or `TruncatedError` for a file that is no kext or
    is damaged, `MismatchError` when it does not fit at `address`. The caller closes the source.
    """
    return LoadedKext(image, address, resolve)


def _link_base(image: MachO) -> tuple[int, int]:
    """The linked address of what will lie at kmod_info's address, and hdr_size (0: none)."""
    if image.filetype == macho.MH_KEXT_BUNDLE:
        holds_header = (s.vmaddr for s in image.segments if s.fileoff == 0 and s.filesize)
        return next(holds_header, min(s.vmaddr for s in image.segments)), 0
    segment = image.segments[0]
    if segment.vmaddr:  # linked already, headers and all
        return (segment.vmaddr - segment.fileoff) // _PAGE * _PAGE, 0
    hdr_size = _up(image.header_size + image.sizeofcmds)
    return -hdr_size, hdr_size


def _runs(image: MachO) -> Iterator[Run]:
    """What of the file is loaded, at linked addresses; what lies between sections is zero."""
    for name, start, held, size, offset in _parts(image):
        if held and offset + held > image.source.size:
            got = max(0, image.source.size - offset)
            raise TruncatedError(image.source.name, offset, held, got, name)
        if start + size > 1 << (64 if image.is64 else 32):
            message = f"{name}: {start:#x} + {size:#x} leaves the address space"
            raise FormatError(image.source.name, None, message)
        if held:
            yield Run(start, start + held, offset)
        if held < size:
            yield Run(start + held, start + size, ZERO_FILL)


def _parts(image: MachO) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, linked address, bytes in the file, bytes, file offset) of what is loaded."""
    if image.filetype == macho.MH_KEXT_BUNDLE:
        for s in image.segments:
            if not _linkedit(s):
                held = min(s.filesize, s.vmsize)
                yield f"segment {s.segname}", s.vmaddr, held, s.vmsize, s.fileoff
        return
    sections = sorted((s for s in image.sections if not s.flags & S_ATTR_DEBUG), key=_addr)
    segment = image.segments[0]
    if segment.vmaddr and not segment.fileoff and sections:
        before = sections[0].addr - segment.vmaddr
        if before == sections[0].offset > 0:  # the header lies in memory too, before the sections
            yield "header", segment.vmaddr, before, before, 0
    for section, following in zip_longest(sections, sections[1:]):
        size = (
            section.size if following is None else max(section.size, following.addr - section.addr)
        )
        held = 0 if section.zerofill else section.size
        yield f"section {section.sectname}", section.addr, held, size, section.offset


def _without(run: Run, start: int, end: int) -> Iterator[Run]:
    """What is left of `run` when [start, end) is taken out."""
    if run.start < min(run.end, start):
        yield run._replace(end=min(run.end, start))
    if max(run.start, end) < run.end:
        at = max(run.start, end)
        offset = run.offset if run.offset == ZERO_FILL else run.offset + at - run.start
        yield Run(at, run.end, offset)


def _memory(
    source: Source, slide: int, runs: Iterable[Run], lost: Iterable[tuple[int, int]]
) -> RunMemory:
    runs = list(runs)
    return RunMemory(
        source,
        array("Q", [run.start + slide for run in runs]),
        array("Q", [run.end + slide for run in runs]),
        array("Q", [run.offset for run in runs]),
        lost=[(start + slide, end + slide) for start, end in lost],
    )


def _from_plist(path: str) -> Identity | None:
    """What the Info.plist of the file at `path` says: beside it, or in the folder above.

    One that names another executable belongs to another bundle. Raises `FormatError`.
    """
    from kvmtool.prelink_info import parse_plist

    folder, name = os.path.split(path)
    for place in (folder, os.path.join(folder, os.pardir)) if os.path.isfile(path) else ():
        plist = os.path.join(place, "Info.plist")
        try:
            source = FileSource(plist)
        except OSError:
            continue
        try:
            if source.size > _PLIST_LIMIT:
                message = f"expected at most {_PLIST_LIMIT:#x} bytes, got {source.size:#x}"
                raise FormatError(plist, None, message)
            root = parse_plist(source.read_at(0, source.size), plist, 0)
        finally:
            source.close()
        if isinstance(root, dict) and root.get("CFBundleExecutable") == name:
            identifier, version = root.get("CFBundleIdentifier"), root.get("CFBundleVersion")
            if isinstance(identifier, str):
                return Identity(identifier, version if isinstance(version, str) else None, plist)
    return None


def _linkedit(segment: Segment) -> bool:
    return segment.segname == "__LINKEDIT"


def _addr(section: Section) -> int:
    return section.addr


def _up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _text(field: bytes) -> str:
    return field[:_KMOD_MAX_NAME].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
