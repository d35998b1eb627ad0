"""A kernel image with kexts inside: prelinked kernels (10.6 to 10.15) and kernel collections (11+).

A collection is an MH_FILESET: one Mach-O around others, whose file offsets count from the start of
the whole file and whose symbol tables share one __LINKEDIT. A prelinked kernel carries kexts in
__PRELINK_TEXT, each a Mach-O by itself. What both say of their kexts is in __PRELINK_INFO.

Sources: EXTERNAL_HEADERS/mach-o/loader.h, libkern/libkern/prelink.h, libkern/c++/OSKext.cpp
(`initWithPrelinkedInfoDict`) and pexpert/gen/kc.c, xnu-11417.121.6.
"""

from __future__ import annotations

from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.fileset import (
    AUXILIARY,
    COLLECTIONS,
    PAGEABLE,
    PRIMARY,
    FilesetEntry,
    entry_image,
    fileset_entries,
)
from kvmtool.macho import (
    CPU_TYPE_ARM64,
    CPU_TYPE_X86_64,
    MH_FILESET,
    MachO,
    arch_name,
)
from kvmtool.source import SliceSource

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmtool.fixups import FixedMemory
    from kvmtool.macho import Section
    from kvmtool.memory import RunMemory
    from kvmtool.prelink_info import KextInfo, PrelinkInfo

KERNEL_ENTRY = "com.apple.kernel"

OWN_SYMBOLS, SHARED_SYMBOLS = "own symbol table", "fileset __LINKEDIT"
STRIPPED, CODELESS = "none: stripped", "none: no executable"


FREED = ("__KLD", "__LINKEDIT")  # at the end of start-up, unless boot-arg keepsyms keeps them
KEXTS = ("__PRELINK", "__PLK")  # how the names of segments begin that hold kexts


def own_segment(segname: str) -> bool:
    """Whether a segment of the kernel's image is the kernel's own, and stays."""
    return segname not in FREED and not segname.startswith(KEXTS)


class KextImage(NamedTuple):
    """A kext inside an image. `address` is that of its Mach-O header, as linked; `size` in bytes.

    `image` reads by the offsets of the kext's own load commands, the bytes as they lie in the file
    (decoded pointers are in `KernelCache.memory`); it is None for a kext without an executable
    (address and size are 0) and for a damaged one. `origin` says where the symbols come from, or
    what the damage is. `info` is all that the property list says of the kext.
    """

    identifier: str
    version: str | None
    uuid: bytes | None
    address: int
    size: int
    dependencies: tuple[str, ...]
    path: str | None
    image: MachO | None
    origin: str
    info: KextInfo | None


class KernelCache:
    """A kernel image and the kexts inside it. Nothing but `image` is read before it is asked for.

    Everything raises `FormatError` for what is damaged, only `kexts` tells it of each kext.
    """

    def __init__(self, image: MachO) -> None:
        """`image` is the outermost Mach-O; the cache does not own its source."""
        self.image = image
        self._inner: dict[int, MachO] = {}
        self._unclaimed = image.source.size

    def __repr__(self) -> str:
        return f"<KernelCache {self.image.source.name} {self.kind}>"

    @property
    def is_fileset(self) -> bool:
        """Whether this is a kernel collection."""
        return bool(self.image.filetype == MH_FILESET)

    @cached_property
    def kind(self) -> str:
        """One of "kernel", "prelinked kernel", "kernel collection"."""
        if self.is_fileset:
            return "kernel collection"
        return "kernel" if self._info_section is None else "prelinked kernel"

    @cached_property
    def entries(self) -> tuple[FilesetEntry, ...]:
        """The Mach-Os of a collection, in file order."""
        return tuple(fileset_entries(self.image)) if self.is_fileset else ()

    @cached_property
    def level(self) -> int:
        """Which collection this is, as a cacheLevel of its pointers (`fileset.COLLECTIONS`).

        Only the boot collection has a kernel. A system collection exists on x86_64 alone, and an
        auxiliary one there is linked against it. An image that is no collection counts as boot.
        """
        if not self.is_fileset or any(e.identifier == KERNEL_ENTRY for e in self.entries):
            return PRIMARY
        info = self.info
        on_system = info is not None and info.pageable_kcid is not None
        return AUXILIARY if on_system or self.image.cputype != CPU_TYPE_X86_64 else PAGEABLE

    @cached_property
    def kernel(self) -> MachO:
        """The kernel itself; in a collection, segments and symbols are at the file's offsets.

        Raises `NotFoundError` for a collection without one.
        """
        if not self.is_fileset:
            return self.image
        for entry in self.entries:
            if entry.identifier == KERNEL_ENTRY:
                return self._entry_image(entry)
        raise NotFoundError(
            "fileset entry",
            KERNEL_ENTRY,
            hint=f"{self.image.source.name} is the {COLLECTIONS[self.level]} kernel collection",
        )

    def _entry_image(self, entry: FilesetEntry) -> MachO:
        if entry.fileoff not in self._inner:
            self._inner[entry.fileoff] = self._claimed(entry_image(self.image, entry))
        return self._inner[entry.fileoff]

    def _claimed(self, image: MachO) -> MachO:
        """`image`, whose load commands are bytes of this file that no other's are."""
        self._unclaimed -= image.header_size + image.sizeofcmds
        if self._unclaimed < 0:  # a few large headers cannot be made thousands
            raise FormatError(
                image.source.name, 20, "the load commands of all kexts are larger than the file"
            )
        return image

    # what the property list says

    @cached_property
    def _info_section(self) -> Section | None:
        if (segment := self.image.segment("__PRELINK_INFO")) is None or not segment.filesize:
            return None
        return self._section("__PRELINK_INFO", "__info")

    def _section(self, segname: str, sectname: str) -> Section | None:
        for section in self.image.sections:
            if section.segname == segname and section.sectname == sectname and section.size:
                return section
        return None

    @cached_property
    def info(self) -> PrelinkInfo | None:
        """The property list of __PRELINK_INFO,__info; None where there is none."""
        section, image = self._info_section, self.image
        if section is None:
            return None
        from kvmtool.prelink_info import parse_prelink_info

        data = image.source.read_at(section.offset, section.size)
        arch = arch_name(image.cputype, image.cpusubtype)
        return parse_prelink_info(data, image.source.name, section.offset, arch)

    @cached_property
    def kexts(self) -> tuple[KextImage, ...]:
        """Every kext, those without an executable too: entries in file order, then the list's."""
        listed = {kext.identifier: kext for kext in self.info.kexts} if self.info else {}
        kexts = [
            self._fileset_kext(entry, listed.pop(entry.identifier, None))
            for entry in self.entries
            if entry.identifier != KERNEL_ENTRY
        ]
        kexts += [self._listed_kext(info) for info in listed.values()]
        return tuple(kexts)

    def _fileset_kext(self, entry: FilesetEntry, info: KextInfo | None) -> KextImage:
        size = info.size if info is not None else None
        name, address = entry.identifier, entry.vmaddr
        return _kext(name, info, address, size, lambda: self._entry_image(entry), SHARED_SYMBOLS)

    def _listed_kext(self, info: KextInfo) -> KextImage:
        name, address = info.identifier, info.load_address
        if info.module_index is not None:
            return self._module(info, info.module_index)
        if address is None or not info.size:
            return _kext(name, info, 0, 0, None, CODELESS)
        return _kext(
            name, info, address, info.size, lambda: self._prelinked_image(info), OWN_SYMBOLS
        )

    def _prelinked_image(self, info: KextInfo) -> MachO:
        source = self.image.source
        name = f"{source.name} {info.identifier}"
        address = info.load_address if info.source_address is None else info.source_address
        segment = None if address is None else self.image.segment_at(address)
        if address is None or segment is None:
            raise FormatError(
                name, None, f"no segment of the kernel holds address {address or 0:#x}"
            )
        offset = segment.fileoff + address - segment.vmaddr
        return self._claimed(MachO(SliceSource(source, offset, info.size or 0, name)))

    def _module(self, info: KextInfo, index: int) -> KextImage:
        """A kext that is linked into the kernel: it lies from __kmod_start[index] to the next."""
        section = self._section("__PRELINK_INFO", "__kmod_start")
        layout = Struct(self.image.byteorder + ("2Q" if self.image.is64 else "2I"))
        at, size = index * layout.size // 2, 0 if section is None else section.size
        if section is None or at + layout.size > size:
            problem = f"none: module {index:#x} of __kmod_start, which has {size:#x} bytes"
            return _kext(info.identifier, info, 0, 0, None, problem)
        try:
            words = self._memory.read(section.addr + at, layout.size)
        except (FaultError, FormatError) as error:
            return _kext(info.identifier, info, 0, 0, None, f"none: {error}")
        start, end = layout.unpack(words)
        return _kext(
            info.identifier,
            info,
            start,
            max(0, end - start),
            lambda: self._module_image(start),
            OWN_SYMBOLS,
        )

    def _module_image(self, address: int) -> MachO:
        from kvmtool.image import LoadedImage

        return self._claimed(MachO(LoadedImage(self._memory, address, self.image.source.name)))

    # memory

    @cached_property
    def base(self) -> int:
        """The address that pointers into this collection count from.

        The kernel takes its own header for it on arm64, which is linked to be the lowest; on
        x86_64 __HIB lies below it. System and auxiliary collections are linked at 0.
        """
        header = self.image.segment("__TEXT")
        if self.level == PRIMARY and self.image.cputype == CPU_TYPE_ARM64 and header is not None:
            return header.vmaddr
        return min((segment.vmaddr for segment in self.image.segments), default=0)

    def memory(
        self,
        bases: Mapping[int, int] | None = None,
        symbol: Callable[[str], int | None] | None = None,
    ) -> RunMemory | FixedMemory:
        """The image at its link addresses, its pointers decoded where the file has them packed.

        `bases` has the `base` of other collections by level, where they are at hand; `symbol` is
        as for `fixups.Fixups`.
        """
        from kvmtool.fixups import FixedMemory, Fixups, has_fixups
        from kvmtool.image import image_memory

        raw = image_memory(self.image)
        images = [self.image]
        if self.is_fileset and self.level != PRIMARY:  # these have chains for every kext
            images += [self._entry_image(entry) for entry in self.entries]
        images = [image for image in images if has_fixups(image)]
        if not images:
            return raw
        known = {**(bases or {}), self.level: self.base}
        return FixedMemory(raw, Fixups(images, raw, known, symbol))

    @cached_property
    def _memory(self) -> RunMemory | FixedMemory:
        return self.memory()


def _kext(
    identifier: str,
    info: KextInfo | None,
    address: int,
    size: int | None,
    opener: Callable[[], MachO] | None,
    origin: str,
) -> KextImage:
    """A kext, with what its list entry and its image say; `origin` when it has symbols."""
    image, uuid = None, None
    try:
        if opener is not None:
            image = opener()
            uuid = image.uuid
            size = size or sum(s.vmsize for s in image.segments if s.segname != "__LINKEDIT")
            origin = origin if image.symtab else STRIPPED
    except FormatError as error:  # one damaged kext does not hide the others
        image, origin = None, f"none: {error}"
    return KextImage(
        identifier,
        info.version if info else None,
        uuid or (info.interface_uuid if info else None),
        address,
        size or 0,
        info.dependencies if info else (),
        info.bundle_path if info else None,
        image,
        origin,
        info,
    )


def open_collection(image: MachO) -> KernelCache:
    """The kernel and the kexts inside `image`. Costs nothing for a plain kernel."""
    return KernelCache(image)
