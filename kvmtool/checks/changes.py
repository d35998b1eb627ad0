"""Bytes that are not as in a file: where, what they were, what they do now."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.checks import detour
from kvmtool.checks.finding import DIFFERS, EXPECTED, HIGH, INFO, MEDIUM
from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.kexts import Code

PAGE = 4096
AROUND = 16  # bytes of a change that are shown and looked into
MOST = 64  # changes told one by one: a part with more is another build's, or not there
_APART = 8  # as many equal bytes between two changes make them one
_LOCK_PROBE = "_lockstat_patch_point"  # LOCKSTAT_LABEL in osfmk/i386/i386_lock.s


class Change(NamedTuple):
    """`size` bytes at `address` are not as in the file. `was` and `now` begin there, and go on."""

    address: int
    size: int
    was: bytes
    now: bytes


def runs(address: int, was: bytes, now: bytes, size: int) -> list[Change]:
    """The runs of bytes that differ within the first `size`."""
    found: list[list[int]] = []
    for at in range(size):
        if was[at] != now[at]:
            if found and at - found[-1][1] < _APART:
                found[-1][1] = at + 1
            else:
                found.append([at, at + 1])
    return [
        Change(
            address + start,
            end - start,
            was[start : max(end, start + AROUND)],
            now[start : max(end, start + AROUND)],
        )
        for start, end in found
    ]


def joined(changes: list[Change]) -> list[Change]:
    """Changes that go on across the end of a page as one."""
    whole: list[Change] = []
    for change in changes:
        last = whole[-1] if whole else None
        if last is not None and last.address + last.size == change.address:
            was, now = last.was[: last.size] + change.was, last.now[: last.size] + change.now
            whole[-1] = Change(last.address, last.size + change.size, was, now)
        else:
            whole.append(change)
    return whole


class Teller:
    """Tells what differs, and what is known to make it; `name` is the file's.

    `filed` gives what the file has at an address of memory, or raises `FaultError`.
    """

    def __init__(
        self, case: Case, outcome: Outcome, name: str, filed: Callable[[int, int], bytes]
    ) -> None:
        self._case, self._outcome, self._name, self._filed = case, outcome, name, filed
        self._arch = case.kvm.arch.name

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
        try:
            was, now = self._filed(address, back), self._case.kvm.memory.read(address, back)
        except FaultError:
            return change
        return Change(address, size, was + change.was, now + change.now)

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
        shown = min(change.size, AROUND)
        more = " …" if change.size > shown else ""
        was, now = (data[:shown].hex(" ") + more for data in (change.was, change.now))
        evidence = f"{what}: {change.size} bytes, {was} in the file, {now} in memory"
        expected = f"as in {self._name}"
        self._outcome.add(kind, severity, where, change.address, found, expected, evidence)
