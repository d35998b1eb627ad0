"""Whether a pointer to code leads where it belongs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvmtool.checks.code import KERNEL, CodeMap
from kvmtool.checks.finding import HIGH, HOOK, MEDIUM, MIDDLE, OUTSIDE
from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Collection

    from kvmtool.checks.finding import Outcome
    from kvmtool.kvm import Kvm
    from kvmtool.target import Target


class Case:
    """The kernel that is checked, and where its code lies."""

    def __init__(self, kvm: Kvm) -> None:
        """Reads nothing yet."""
        self.kvm = kvm
        self.code = CodeMap(kvm)

    @cached_property
    def target(self) -> Target:
        """The kernel with the likeliest types; see `Kvm.nearest_target`."""
        return self.kvm.nearest_target()

    def pointer(
        self,
        outcome: Outcome,
        table: str,
        where: str,
        at: int,
        pointer: Any,
        owners: Collection[str] | None = (KERNEL,),
        start: bool = True,
    ) -> bool:
        """Judge one pointer to code, `at` its place in `table`; whether it is as it should be.

        It may lead to the code of `owners`: KERNEL, identifiers of kexts; None: to any code. A null
        pointer leads nowhere and is well. With `start` it must lead to the start of a function.
        """
        if isinstance(pointer, Unreadable):
            outcome.cannot_read(f"pointers in {table}", pointer.reason)
            return True
        if not pointer:
            return True
        outcome.count(f"pointers in {table}")
        owner = self.code.code_owner(pointer)
        expected = expectation(owners)
        found = None
        if owner is None:
            found = self.kvm.code_at(pointer)
            lead = self.nowhere(pointer) + self._as_linked(at, pointer)
            outcome.add(OUTSIDE, self.severity(pointer), where, at, found, expected, lead)
        elif owners is not None and owner not in owners:
            found = self.kvm.code_at(pointer)
            lead = f"{pointer:#x} points into {_named(owner)}{self._as_linked(at, pointer)}"
            outcome.add(HOOK, MEDIUM, where, at, found, expected, lead)
        elif start and owner == KERNEL and self.code.starts_function(pointer) is False:
            found = self.kvm.code_at(pointer)
            lead = f"{pointer:#x} is {found.offset:#x} bytes from the start of a function"
            lead += self._as_linked(at, pointer)
            outcome.add(MIDDLE, MEDIUM, where, at, found, "the start of a function", lead)
        return found is None

    def read_pointer(self, at: int) -> Any:
        """The pointer at `at`, stripped, or `Unreadable`."""
        try:
            return self.target.pointer(at)
        except FaultError as fault:
            return Unreadable.of(fault)

    def linked(self, at: int) -> int | None:
        """The pointer that the kernel's file has at `at`, slid; None where it has none."""
        memory, slide = self.kvm.file_memory, self.kvm.kerndisp
        if memory is None or slide is None or self.code.owner(at) != KERNEL:
            return None
        size = self.target.arch.pointer_size
        try:
            raw = memory.read(at - slide, size)
        except FaultError:
            return None
        order = self.target.arch.byteorder
        value = int.from_bytes(raw, "little" if order == "<" else "big")
        return self.target.strip(value + slide) if value else 0

    def _as_linked(self, at: int, pointer: int) -> str:
        linked = self.linked(at)
        return f"; linked as {self.kvm.code_at(linked)}" if linked and linked != pointer else ""

    def severity(self, pointer: int) -> str:
        """That of a pointer which leads to no code, as far as all code is known."""
        known = self.code.complete or self.code.owner(pointer) is not None
        return HIGH if known else MEDIUM

    def nowhere(self, pointer: int) -> str:
        """What lies where a pointer leads that leads to no code."""
        owner = self.code.owner(pointer)
        if owner is None:
            text = f"{pointer:#x} lies in no image: neither the kernel's nor any kext's"
            return text if self.code.complete else f"{text}, of which some could not be read"
        what = f"{pointer:#x} lies in {_named(owner)}, but in none of its code"
        place = self.kvm.symbol_at(pointer)
        return f"{what} ({place})" if place is not None else what


def _named(owner: str) -> str:
    return owner if owner == KERNEL else f"kext {owner}"


def expectation(owners: Collection[str] | None) -> str:
    """Whose code is expected, in words."""
    if owners is None:
        return "code of the kernel or of a kext"
    return "code of " + " or ".join(map(_named, sorted(owners)))
