"""The kernel's code in memory, held against its file.

Only code is judged. What else lies in segments that nobody should write to (the kernel's header,
which the booter changes, strings, constants) is compared too, and told as "info". __KLD and
__LINKEDIT are left out: start-up frees them (libkern/c++/OSKext.cpp, removeKextBootstrap).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.checks import detour
from kvmtool.checks.code import Part, own
from kvmtool.checks.finding import DIFFERS, EXPECTED, HIGH, INFO, MEDIUM
from kvmtool.errors import FaultError, FormatError, MismatchError, UnsupportedError
from kvmtool.image import LoadedImage
from kvmtool.macho import VM_PROT_WRITE
from kvmtool.relocations import RelocatedSource, Relocations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.kexts import Code
    from kvmtool.macho import MachO

_CHUNK = 1 << 20  # bytes compared at a time
_PAGE = 4096
_APART = 8  # as many equal bytes between two changes make them one
_MOST = 64  # changes told one by one: a part with more is another kernel's, or not there
_CODE, _CONSTANTS = "pages of code", "pages of constants"
_LOCK_PROBE = "_lockstat_patch_point"  # LOCKSTAT_LABEL in osfmk/i386/i386_lock.s
_HIB = "__HIB"  # executable and full of data: page tables, descriptors, variables
_AROUND = 16  # bytes of a change that are shown and looked into


class Change(NamedTuple):
    """`size` bytes at `address` are not as in the file. `was` and `now` begin there, and go on."""

    address: int
    size: int
    was: bytes
    now: bytes


def text(case: Case, outcome: Outcome) -> None:
    """Each page of the kernel's code is as in its file, but for what is known to change it."""
    kernel = file_of(case, outcome)
    if kernel is None:
        return
    comparison = Comparison(case, outcome, kernel)
    code = list(case.code.parts())
    for part in code:
        changes, pages = comparison.changes(part, _CODE)
        if len(changes) > _MOST:
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
        for change in changes[len(header) : _MOST]:
            comparison.tell(DIFFERS, INFO, change, f"a constant of {part.name} differs")


def file_of(case: Case, outcome: Outcome) -> MachO | None:
    """The kernel's file; without one the outcome says so."""
    kernel = case.kvm.kernel
    if kernel is not None and not isinstance(kernel.source, LoadedImage):
        return kernel
    outcome.absent.append("no kernel file to compare with: name it with -N")
    return None


def _pages(part: Part) -> int:
    return -(-part.end // _PAGE) - part.start // _PAGE


def _constants(case: Case, kernel: MachO, code: list[Part]) -> Iterator[Part]:
    """What lies between the code in segments that are not writable."""
    for segment in kernel.segments:
        if segment.initprot & VM_PROT_WRITE or not own(segment.segname) or segment.segname == _HIB:
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


class Comparison:
    """Memory against one kernel's file."""

    def __init__(self, case: Case, outcome: Outcome, kernel: MachO) -> None:
        self._case, self._outcome, self._kernel = case, outcome, kernel
        self._arch = case.kvm.arch.name

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

    @cached_property
    def _lock_probes(self) -> frozenset[int]:
        """Where dtrace's lockstat turns a return into nothing, as the kernel's own labels say."""
        found = set()
        for symbol in self._case.kvm.symbols:
            if symbol.name.endswith(_LOCK_PROBE):
                try:
                    found.add(self._case.target.pointer(symbol.address))
                except FaultError:
                    continue
        return frozenset(found)

    def changes(self, part: Part, what: str) -> tuple[list[Change], int]:
        """What differs, not much more than `_MOST` of it; and on how many pages."""
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
                    if len(found) <= _MOST:
                        found += page
        self._outcome.count(what, -(-looked // _PAGE))
        if missing and what != _CONSTANTS:
            size = part.end - part.start
            text = f"{part.name}: {missing:#x} of {size:#x} bytes cannot be read, {first}"
            self._outcome.failed.append(text)
        return _joined(found), pages

    def _differing(self, address: int, data: bytes, offset: int) -> Iterator[list[Change]]:
        """The changes of each page that has any."""
        at = 0
        while at < len(data):
            size = min(_PAGE - (address + at) % _PAGE, len(data) - at)
            was, now = self._kernel.source.read_at(offset + at, size), data[at : at + size]
            if was != now and self._relocated is not None:
                was = self._relocated.read_at(offset + at, size)
            if was != now:
                whole = self._kernel.source.size
                more = self._kernel.source.read_at(
                    offset + at + size, max(0, min(_AROUND, whole - offset - at - size))
                )
                yield _changes(address + at, was + more, data[at : at + size + _AROUND], size)
            at += size

    def judge(self, change: Change, place: str = "") -> None:
        """Tell a change of code, unless something is known to make it; `place` says where it is."""
        if self._arch.startswith("arm64"):  # whole instructions
            change = self._from(change, change.address % 4)
        if detour.is_probe(self._arch, change.was, change.now, change.size):
            self.tell(EXPECTED, INFO, change, "a probe of dtrace", place=place)
            return
        if detour.is_lock_probe(change.was, change.now) and change.address in self._lock_probes:
            self.tell(EXPECTED, INFO, change, "a lockstat probe of dtrace", place=place)
            return
        if detour.is_breakpoint(self._arch, change.now):
            self.tell(DIFFERS, MEDIUM, change, "a breakpoint", place=place)
            return
        for back in (0, 1):  # the first byte may be what it was before
            whole = self._from(change, back)
            target = detour.target_of(self._arch, whole.now, whole.address)
            if target is not None:
                code = self._case.kvm.code_at(target)
                self.tell(DIFFERS, HIGH, whole, f"code goes to {code}", code, place)
                return
        self.tell(DIFFERS, HIGH, change, "code differs", place=place)

    def _from(self, change: Change, back: int) -> Change:
        """The change from some bytes before on."""
        if not back:
            return change
        address, size = change.address - back, change.size + back
        shift = self._case.code.shift
        segment = self._kernel.segment_at(address - shift)
        if segment is None:
            return change
        try:
            data = self._case.kvm.memory.read(address, back)
        except FaultError:
            return change
        was = self._kernel.source.read_at(segment.fileoff + address - shift - segment.vmaddr, back)
        return Change(address, size, was + change.was, data + change.now)

    def tell(
        self,
        kind: str,
        severity: str,
        change: Change,
        what: str,
        found: Code | None = None,
        place: str = "",
    ) -> None:
        """A finding: where, and which bytes."""
        where = place or str(self._case.kvm.symbol_at(change.address) or hex(change.address))
        shown = min(change.size, _AROUND)
        more = " …" if change.size > shown else ""
        was, now = (data[:shown].hex(" ") + more for data in (change.was, change.now))
        evidence = f"{what}: {change.size} bytes, {was} in the file, {now} in memory"
        expected = f"as in {self._kernel.source.name}"
        self._outcome.add(kind, severity, where, change.address, found, expected, evidence)


def _changes(address: int, was: bytes, now: bytes, size: int) -> list[Change]:
    """The runs of bytes that differ within the first `size`."""
    runs: list[list[int]] = []
    for at in range(size):
        if was[at] != now[at]:
            if runs and at - runs[-1][1] < _APART:
                runs[-1][1] = at + 1
            else:
                runs.append([at, at + 1])
    return [
        Change(
            address + start,
            end - start,
            was[start : max(end, start + _AROUND)],
            now[start : max(end, start + _AROUND)],
        )
        for start, end in runs
    ]


def _joined(changes: list[Change]) -> list[Change]:
    """Changes that go on across the end of a page as one."""
    joined: list[Change] = []
    for change in changes:
        last = joined[-1] if joined else None
        if last is not None and last.address + last.size == change.address:
            was, now = last.was[: last.size] + change.was, last.now[: last.size] + change.now
            joined[-1] = Change(last.address, last.size + change.size, was, now)
        else:
            joined.append(change)
    return joined
