"""The kernel's code in memory, held against its file.

Only code is judged. What else lies in segments that nobody should write to (the kernel's header,
which the booter changes, strings, constants) is compared too, and told as "info". __KLD and
__LINKEDIT are left out: start-up frees them (libkern/c++/OSKext.cpp, removeKextBootstrap).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from kvmtool.checks.changes import AROUND, MOST, PAGE, Teller, joined, runs
from kvmtool.checks.code import Part
from kvmtool.checks.finding import DIFFERS, EXPECTED, HIGH, INFO
from kvmtool.errors import FaultError, FormatError, MismatchError, UnsupportedError
from kvmtool.image import LoadedImage
from kvmtool.kernelcache import own_segment
from kvmtool.macho import VM_PROT_WRITE
from kvmtool.relocations import RelocatedSource, Relocations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.checks.changes import Change
    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.macho import MachO

_CHUNK = 1 << 20  # bytes compared at a time
_CODE, _CONSTANTS = "pages of code", "pages of constants"
_HIB = "__HIB"  # executable and full of data: page tables, descriptors, variables


def text(case: Case, outcome: Outcome) -> None:
    """Each page of the kernel's code is as in its file, but for what is known to change it."""
    kernel = file_of(case, outcome)
    if kernel is None:
        return
    comparison = Comparison(case, outcome, kernel)
    code = list(case.code.parts())
    for part in code:
        changes, pages = comparison.changes(part, _CODE)
        if len(changes) > MOST:
            evidence = (
                f"{pages} of {_pages(part)} pages differ, the first at {changes[0].address:#x}"
            )
            expected = f"as in {kernel.source.name}"
            outcome.add(DIFFERS, HIGH, part.name, part.start, None, expected, evidence)
            continue
        for change in changes:
            comparison.judge(change)
    for part in _constants(case, kernel, code):
        changes, _ = comparison.changes(part, _CONSTANTS)
        end = part.start + kernel.header_size + kernel.sizeofcmds if part.offset == 0 else 0
        header = [change for change in changes if change.address < end]
        if header:
            what = f"{sum(change.size for change in header)} bytes of the header, by the booter"
            outcome.add(EXPECTED, INFO, part.name, part.start, None, "moved", f"changed: {what}")
        for change in changes[len(header) : MOST]:
            comparison.tell(DIFFERS, INFO, change, f"a constant of {part.name} differs")


def file_of(case: Case, outcome: Outcome) -> MachO | None:
    """The kernel's file; without one the outcome says so."""
    kernel = case.kvm.kernel
    if kernel is not None and not isinstance(kernel.source, LoadedImage):
        return kernel
    outcome.absent.append("no kernel file to compare with: name it with -N")
    return None


def _pages(part: Part) -> int:
    return -(-part.end // PAGE) - part.start // PAGE


def _constants(case: Case, kernel: MachO, code: list[Part]) -> Iterator[Part]:
    """What lies between the code in segments that are not writable."""
    for segment in kernel.segments:
        if (
            segment.initprot & VM_PROT_WRITE
            or not own_segment(segment.segname)
            or segment.segname == _HIB
        ):
            continue
        start = segment.vmaddr + case.code.shift
        end = start + min(segment.vmsize, segment.filesize)
        inside = (part for part in code if start <= part.start < end)
        for part in sorted(inside, key=lambda part: part.start):
            if part.start > start:
                offset = segment.fileoff + start - segment.vmaddr - case.code.shift
                yield Part(segment.segname, start, part.start, offset)
            start = max(start, part.end)
        if end > start:
            offset = segment.fileoff + start - segment.vmaddr - case.code.shift
            yield Part(segment.segname, start, end, offset)


class Comparison(Teller):
    """Memory against one kernel's file."""

    def __init__(self, case: Case, outcome: Outcome, kernel: MachO) -> None:
        super().__init__(case, outcome, kernel.source.name, self._in_file)
        self._kernel = kernel

    def _in_file(self, address: int, size: int) -> bytes:
        linked = address - self._case.code.shift
        segment = self._kernel.segment_at(linked)
        if segment is None:
            raise FaultError("kernel", address, size)
        return self._kernel.source.read_at(segment.fileoff + linked - segment.vmaddr, size)

    @cached_property
    def _relocated(self) -> RelocatedSource | None:
        """The file with its relocations applied, for a kernel that was moved."""
        slide = self._case.kvm.kerndisp
        if not slide:
            return None
        relocations = Relocations(self._kernel, slide)
        try:
            next(relocations.patches(0, 1), None)  # the first use reads and checks every entry
        except (FormatError, UnsupportedError, MismatchError) as error:
            self._outcome.failed.append(str(error))
            return None
        return RelocatedSource(relocations)

    def changes(self, part: Part, what: str) -> tuple[list[Change], int]:
        """What differs, not much more than `MOST` of it; and on how many pages."""
        found: list[Change] = []
        pages = missing = looked = 0
        first = ""
        end = min(part.end, part.start + max(0, self._kernel.source.size - part.offset))
        if end < part.end:
            self._outcome.failed.append(
                f"{part.name}: {part.end - end:#x} bytes are not in the file"
            )
        for at in range(part.start, end, _CHUNK):
            size = min(_CHUNK, end - at)
            for piece in self._case.kvm.memory.read_pieces(at, size):
                if piece.data is None:
                    missing += piece.size
                    first = first or f"{piece.reason} at {piece.address:#x}"
                    continue
                looked += piece.size
                offset = part.offset + piece.address - part.start
                if self._kernel.source.read_at(offset, piece.size) == piece.data:
                    continue
                for page in self._differing(piece.address, piece.data, offset):
                    pages += 1
                    if len(found) <= MOST:
                        found += page
        self._outcome.count(what, -(-looked // PAGE))
        if missing and what != _CONSTANTS:
            size = part.end - part.start
            text = f"{part.name}: {missing:#x} of {size:#x} bytes cannot be read, {first}"
            self._outcome.failed.append(text)
        return joined(found), pages

    def _differing(self, address: int, data: bytes, offset: int) -> Iterator[list[Change]]:
        """The changes of each page that has any."""
        at = 0
        while at < len(data):
            size = min(PAGE - (address + at) % PAGE, len(data) - at)
            was, now = self._kernel.source.read_at(offset + at, size), data[at : at + size]
            if was != now and self._relocated is not None:
                was = self._relocated.read_at(offset + at, size)
            if was != now:
                whole = self._kernel.source.size
                more = self._kernel.source.read_at(
                    offset + at + size, max(0, min(AROUND, whole - offset - at - size))
                )
                yield runs(address + at, was + more, data[at : at + size + AROUND], size)
            at += size
