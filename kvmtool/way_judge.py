"""Whether a kernel is where a page table puts it: its header and its banner say so.

With the kernel's file both must be the file's (the UUID, the text at `_version`); without one the
header must be a kernel's and its segments must hold a banner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.boot import BANNER, banner_of
from kvmtool.errors import FaultError, FormatError
from kvmtool.image import LoadedImage, image_memory
from kvmtool.macho import MachO, uuid_text
from kvmtool.memory import read_cstring
from kvmtool.symbols import SymbolTable
from kvmtool.way_places import MASK, loaded_kernel

if TYPE_CHECKING:
    from kvmtool.memory import Memory

_BANNER_LIMIT = 512
_TEXT_LIMIT = 64 << 20  # bytes of one segment that are searched for the banner
_NOT_SEARCHED = ("__PAGEZERO", "__LINKEDIT")


class Verdict(NamedTuple):
    """The kernel that was found: `slide` is None where nothing tells it."""

    slide: int | None
    uuid: bytes | None
    version: str | None


class KernelFile:
    """What the kernel's file says that memory must say as well. Raises `FormatError`."""

    def __init__(self, image: MachO) -> None:
        text = image.segment("__TEXT")
        if text is None:
            raise FormatError(image.source.name, None, "has no segment __TEXT, expected a kernel")
        self.image, self.link, self.uuid = image, text.vmaddr, image.uuid
        symbols = SymbolTable(image.symtab, 0)
        self.banner = banner_of(image_memory(image), symbols)
        version, low_globals = symbols.get("_version"), symbols.get("_lowGlo")
        self.version_at = version.address if version else None
        self.low_globals_at = low_globals.address if low_globals else None
        self._slid = {0: symbols}

    def symbols(self, slide: int) -> SymbolTable:
        """The file's symbols, `slide` bytes from where they were linked."""
        if slide not in self._slid:
            self._slid[slide] = SymbolTable(self.image.symtab, slide)
        return self._slid[slide]

    def __str__(self) -> str:
        banner = self.banner or "no banner"
        return f"{self.image.source.name} ({uuid_text(self.uuid)}, {banner})"


class Judge:
    """Holds candidates against the kernel's file, or against what all kernels have."""

    def __init__(self, kernel: KernelFile | None, name: str, force: bool) -> None:
        """`name` is the dump's; with `force` another kernel than the file's will do."""
        self.kernel, self.name, self.force = kernel, name, force
        self.seen: tuple[bytes | None, str | None] | None = None  # the other kernel, if there is

    def refuse(self, memory: Memory, address: int) -> str | None:
        """Why the header at `address` is plainly not the one; None when it may be.

        Empty where there is no kernel at all, only something that began like one.
        """
        image = loaded_kernel(memory, address, self.name)
        uuid = _uuid(image)
        if self.kernel is None:
            return None if image is not None else ""
        if self.force or uuid is None or uuid == self.kernel.uuid:
            return None
        return self._another(memory, image, uuid)

    def judge(self, space: Memory, address: int) -> Verdict | str:
        """The kernel at `address`, or why it is not the one."""
        image = loaded_kernel(space, address, self.name)
        uuid = _uuid(image)
        if self.kernel is None:
            version = _banner_inside(space, image) if image is not None else None
            if image is None or version is None:
                return f"no kernel with header and banner at {address:#x}"
            return Verdict(self._slide_inside(space, address), uuid, version)
        slide = (address - self.kernel.link) & MASK
        version = self._banner_at(space, slide)
        expected = self.kernel.uuid
        same_uuid = None if uuid is None or expected is None else uuid == expected
        same_banner = version is not None and version == self.kernel.banner
        if (same_banner and same_uuid is not False) or (same_uuid and version is None):
            return Verdict(slide, uuid, version or self.kernel.banner)
        if self.force and image is not None:
            return Verdict(slide, uuid, version)
        if image is None:
            return f"no kernel at {address:#x}"
        return self._another(space, image, uuid)

    def _another(self, memory: Memory, image: MachO | None, uuid: bytes | None) -> str:
        if self.seen is None or self.seen[0] != uuid:
            version = _banner_inside(memory, image) if image is not None else None
            self.seen = (uuid, version)
        return f"another kernel ({uuid_text(uuid)}, {self.seen[1] or 'no banner'})"

    def symbols(self, memory: Memory, address: int) -> SymbolTable | None:
        """The kernel's symbols: of its file, else those the kernel in `memory` has with it."""
        if self.kernel is not None:
            return self.kernel.symbols((address - self.kernel.link) & MASK)
        try:
            table = MachO(LoadedImage(memory, address, self.name)).symtab
            entries = table.find("__mh_execute_header") if table is not None else []
        except (FaultError, FormatError):
            return None
        header = next((entry for entry in entries if entry.defined), None)
        return None if header is None else SymbolTable(table, (address - header.n_value) & MASK)

    def _slide_inside(self, space: Memory, address: int) -> int | None:
        """The slide by the kernel's own symbols: the table may be as linked, or slid as well."""
        symbols = self.symbols(space, address)
        if symbols is None:
            return None
        variable = symbols.get("_vm_kernel_slide")
        if symbols.slide or variable is None:  # without the variable: a kernel that never slides
            return symbols.slide
        try:
            return int.from_bytes(space.read(variable.address, 4), "little")
        except FaultError:
            return None

    def _banner_at(self, space: Memory, slide: int) -> str | None:
        if self.kernel is None or self.kernel.version_at is None:
            return None
        try:
            text = read_cstring(space, (self.kernel.version_at + slide) & MASK, _BANNER_LIMIT)
        except FaultError:
            return None
        known = text.startswith(BANNER)
        return text.decode("utf-8", "backslashreplace").rstrip() if known else None


def _uuid(image: MachO | None) -> bytes | None:
    try:
        return None if image is None else image.uuid
    except (FaultError, FormatError):
        return None


def _banner_inside(space: Memory, image: MachO) -> str | None:
    """The banner of a kernel without symbols: the first text of that form in its segments."""
    for segment in image.segments:
        if segment.segname in _NOT_SEARCHED or not segment.filesize:
            continue
        carry = b""
        for piece in space.read_pieces(segment.vmaddr, min(segment.filesize, _TEXT_LIMIT)):
            data = carry + (piece.data or b"")
            at = data.find(BANNER)
            while at >= 0:
                rest = data[at : at + _BANNER_LIMIT].split(b"\0")[0].rstrip()
                if rest[len(BANNER) : len(BANNER) + 1].isdigit() and b"xnu-" in rest:
                    return rest.decode("utf-8", "backslashreplace")
                at = data.find(BANNER, at + 1)
            carry = data[-_BANNER_LIMIT:] if piece.data else b""
    return None
