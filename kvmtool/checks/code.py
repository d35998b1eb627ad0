"""Where code lies: the sections of the kernel and of kexts that hold instructions.

Sections tell it more sharply than segments: an x86 kernel's __TEXT holds its strings and constants
too, and its __HIB, which is not executable by its own account, the code that wakes the machine.
Source: mach-o/loader.h (S_ATTR_*), libkern/c++/OSKext.cpp (removeKextBootstrap frees __KLD).
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError, FormatError
from kvmtool.image import LoadedImage
from kvmtool.kernelcache import own_segment
from kvmtool.macho import MH_OBJECT, VM_PROT_EXECUTE, MachO
from kvmtool.xnu.queues import Report

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.kexts import Kext
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.kext import KextInfo

KERNEL = "the kernel"
S_ATTR_PURE_INSTRUCTIONS, S_ATTR_SOME_INSTRUCTIONS = 0x80000000, 0x400
_CODE = S_ATTR_PURE_INSTRUCTIONS | S_ATTR_SOME_INSTRUCTIONS
LC_FUNCTION_STARTS = 0x26
_LINKEDIT_DATA = 16  # bytes: cmd, cmdsize, dataoff, datasize
_MOST_STARTS = 1 << 22  # bytes of function starts; the largest kernel has some 200 KB


class Part(NamedTuple):
    """Bytes of the kernel's: `start` to `end` in memory, from `offset` on in its Mach-O."""

    name: str
    start: int
    end: int
    offset: int


class Span(NamedTuple):
    """Addresses [start, end) that belong to `owner`: KERNEL, or a kext's identifier."""

    start: int
    end: int
    owner: str


class _Spans:
    """Spans that may be asked whose an address is; of those that overlap the first wins."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = sorted(spans)
        self._starts = [span.start for span in self._spans]
        self._reach: list[int] = []  # the furthest end of this span and all before it
        for span in self._spans:
            self._reach.append(max(span.end, self._reach[-1] if self._reach else 0))

    def at(self, address: int) -> str | None:
        at = bisect_right(self._starts, address) - 1
        while at >= 0 and self._reach[at] > address:
            if address < self._spans[at].end:
                return self._spans[at].owner
            at -= 1
        return None


class CodeMap:
    """The code of one kernel and its kexts."""

    def __init__(self, kvm: Kvm) -> None:
        """Reads nothing yet."""
        self._kvm = kvm

    @cached_property
    def shift(self) -> int:
        """What to add to the addresses in the kernel's own header.

        A header in memory may have been slid with the kernel, or not; one in a file has not.
        """
        kernel, boot = self._kvm.kernel, self._kvm.boot
        text = None if kernel is None else kernel.segment("__TEXT")
        return 0 if text is None or boot is None else boot.kernel_address - text.vmaddr

    def parts(self) -> Iterator[Part]:
        """The kernel's code, named "segment,section".

        Of a kernel whose sections do not say what they hold, its executable segments, without the
        header, which the booter changes.
        """
        kernel = self._kvm.kernel
        if kernel is None:
            return
        said = False
        for section in kernel.sections:
            if section.flags & _CODE and section.size and not section.zerofill:
                said = True
                if own_segment(section.segname):
                    start = section.addr + self.shift
                    name = f"{section.segname},{section.sectname}"
                    yield Part(name, start, start + section.size, section.offset)
        if not said:
            for segment in kernel.segments:
                if segment.initprot & VM_PROT_EXECUTE and own_segment(segment.segname):
                    start = segment.vmaddr + self.shift
                    end = start + min(segment.vmsize, segment.filesize)
                    head = 0 if segment.fileoff else kernel.header_size + kernel.sizeofcmds
                    yield Part(segment.segname, min(start + head, end), end, segment.fileoff + head)

    @cached_property
    def _loaded(self) -> tuple[list[KextInfo], bool]:
        """The kexts in memory, and whether these are all of them."""
        report = Report()
        found = self._kvm.loaded_kexts(report)
        placed = all(isinstance(kext.address, int) and isinstance(kext.size, int) for kext in found)
        return found, placed and not report.partial

    @property
    def complete(self) -> bool:
        """Whether every kext is known, so that an address outside of all is in none."""
        return self._loaded[1]

    @cached_property
    def _code(self) -> tuple[_Spans, _Spans]:
        """Those of the kexts, which may lie among the kernel's segments, and the kernel's."""
        loaded = {kext.name: kext for kext in self._loaded[0]}
        kexts = [
            Span(start, end, kext.identifier)
            for kext in self._kvm.kexts
            for start, end in self._of_kext(kext, loaded.get(kext.identifier))
        ]
        kernel = [Span(part.start, part.end, KERNEL) for part in self.parts()]
        return _Spans(kexts), _Spans(kernel)

    def _of_kext(self, kext: Kext, loaded: KextInfo | None) -> list[tuple[int, int]]:
        """Where a kext's code lies; where nothing tells it, all of the kext."""
        whole = [(kext.address, kext.address + kext.size)]
        if loaded is not None and isinstance(loaded.text, tuple):
            whole.append((loaded.text[0], loaded.text[0] + loaded.text[1]))
        image, trusted = self.image_of(kext)
        if image is None:
            return whole
        base = image.segment("__TEXT")
        shift = kext.address - (base.vmaddr if base is not None else kext.address)
        try:
            found = [
                (section.addr + shift, section.addr + shift + section.size)
                for section in image.sections
                if section.flags & _CODE and section.size
            ]
        except (FormatError, FaultError):
            return whole
        if not trusted:  # what a header in memory claims beyond its kext, nobody has confirmed
            found = [s for s in found if any(a <= s[0] and s[1] <= b for a, b in whole)]
        return found or whole

    def image_of(self, kext: Kext) -> tuple[MachO | None, bool]:
        """The kext's Mach-O with addresses as linked, and whether it comes from a file.

        None for one that is not readable, and for an MH_OBJECT, which lies elsewhere than it says.
        """
        image = kext.image
        trusted = image is not None and not isinstance(image.source, LoadedImage)
        try:
            if image is None and kext.size:
                memory = self._kvm.memory
                image = MachO(LoadedImage(memory, kext.address, kext.identifier))
            if image is None or image.filetype == MH_OBJECT:
                return None, False
            image.sections  # noqa: B018  a header that lies says so here
        except (FormatError, FaultError):
            return None, False
        return image, trusted

    @cached_property
    def _images(self) -> tuple[_Spans, _Spans]:
        """All that kexts and kernel hold, code and data."""
        loaded = [kext for kext in self._loaded[0] if isinstance(kext.text, tuple)]
        kexts = [Span(k.address, k.address + k.size, k.identifier) for k in self._kvm.kexts]
        kexts += [
            Span(kext.text[0], kext.text[0] + kext.text[1], kext.name)
            for kext in loaded
            if isinstance(kext.name, str)
        ]
        kernel = self._kvm.kernel
        segments = () if kernel is None else kernel.segments
        own = [
            Span(s.vmaddr + self.shift, s.vmaddr + self.shift + s.vmsize, KERNEL)
            for s in segments
            if s.vmaddr
        ]
        return _Spans(kexts), _Spans(own)

    def code_owner(self, address: int) -> str | None:
        """Whose code lies at `address`; None where there is none."""
        kexts, kernel = self._code
        return kexts.at(address) or kernel.at(address)

    def owner(self, address: int) -> str | None:
        """Whose code or data lies at `address`: None outside of every image, as in the heap."""
        kexts, kernel = self._images
        return kexts.at(address) or kernel.at(address)

    @cached_property
    def _starts(self) -> frozenset[int]:
        """Where the kernel's functions start, by its LC_FUNCTION_STARTS; empty without one."""
        kernel = self._kvm.kernel
        text = None if kernel is None else kernel.segment("__TEXT")
        if kernel is None or text is None:
            return frozenset()
        for command in kernel.commands(LC_FUNCTION_STARTS):
            order = "little" if kernel.byteorder == "<" else "big"
            if command.cmdsize != _LINKEDIT_DATA:
                continue
            offset, size = (int.from_bytes(command.data[at : at + 4], order) for at in (8, 12))  # type: ignore[arg-type]
            try:
                data = kernel.source.read_at(offset, min(size, _MOST_STARTS))
            except (FormatError, FaultError):
                return frozenset()  # __LINKEDIT is not in the dump
            return frozenset(_addresses(data, text.vmaddr + self.shift))
        return frozenset()

    def starts_function(self, address: int) -> bool | None:
        """Whether a function of the kernel's starts at `address`; None where nothing tells."""
        if not self._starts:
            return None
        if address in self._starts:
            return True
        found = self._kvm.symbols.at(address)  # assembly has entries that are no functions
        return found is not None and found[1] == 0


def _addresses(data: bytes, base: int) -> Iterator[int]:
    """ULEB128 distances, each from the one before; a distance of 0 ends them."""
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        if byte & 0x80:
            shift += 7
            if shift > 63:
                return
            continue
        if value == 0:
            return
        base += value
        yield base
        value = shift = 0
