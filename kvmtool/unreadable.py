"""The value that stands where a value could not be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable


class Unreadable:
    """A field that is there in the kernel but not in what we were given.

    `reason` says why and where, e.g. ``absent at 0xffffff8012345000``. Not None (which says that
    there is nothing) and, like every plain object, true: ``value or default`` cannot pass missing
    memory off as an empty field. Equal to another with the same reason; hashable; frozen.
    """

    __slots__ = ("_reason",)

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @classmethod
    def of(cls, fault: FaultError) -> Unreadable:
        """What stands for a value that `fault` kept from us."""
        return cls(f"{fault.reason} at {fault.address:#x}")

    @property
    def reason(self) -> str:
        """Why the value could not be read, and at which address."""
        return self._reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unreadable) and self._reason == other._reason

    def __hash__(self) -> int:
        return hash((Unreadable, self._reason))

    def __repr__(self) -> str:
        return f"<unreadable: {self._reason}>"


def guarded(read: Callable[[], Any]) -> Any:
    """What `read` gives, or `Unreadable` where it meets missing memory."""
    try:
        return read()
    except FaultError as fault:
        return Unreadable.of(fault)
