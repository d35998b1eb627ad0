"""The registers with which a thread entered the kernel from its process.

Source: osfmk/i386/pcb.h, thread.h (machine_thread.iss; in a pcb up to xnu-1699), osfmk/mach/i386/
thread_status.h (x86_saved_state_t), osfmk/arm64/thread.h (upcb), osfmk/mach/arm/thread_status.h
(arm_saved_state), xnu-792..11417. Types of the kernel's own say where each register lies; without
them it is as in xnu-4903 and later, from when on built-in layouts have machine.iss.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import NotFoundError
from kvmtool.target import offset_of
from kvmtool.types.near import whose_types

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.types.model import TypeTable

_WIDTHS = {14: 4, 15: 8}  # flavor: x86_SAVED_STATE32, x86_SAVED_STATE64
_SAVED_STATE = "x86_saved_state_t"
_NAMES = {  # (pc, sp, fp, code segment) of each width
    4: ("uss.ss_32.eip", "uss.ss_32.uesp", "uss.ss_32.ebp", "uss.ss_32.cs"),
    8: ("uss.ss_64.isf.rip", "uss.ss_64.isf.rsp", "uss.ss_64.rbp", "uss.ss_64.isf.cs"),
}
_PLACES = {4: (72, 84, 40, 76), 8: (184, 208, 112, 192)}  # xnu-4903..11417
_ARM_FP, _ARM_STATE = 8 + 8 * 29, Struct("<4QI")  # fp, lr, sp, pc, cpsr
_ARM_MODE = 0xF  # cpsr: 0 in EL0


class UserState(NamedTuple):
    """Addresses in a process whose pointers have `width` bytes; `link` is arm64's lr."""

    pc: int
    sp: int
    fp: int
    link: int | None
    width: int


def user_state(target: Target, thread: int) -> UserState | None:
    """What the thread at `thread` had in user mode; None for one that never was there.

    Raises `FaultError`, and `NotFoundError` where types do not say where it is kept.
    """
    if target.arch.name.startswith("arm64"):
        return _arm64(target, thread)
    return _x86(target, thread)


def _lacking(types: TypeTable, member: str) -> NotFoundError:
    return NotFoundError("member", f"thread.{member}", (), whose_types(types.name, types.origin))


def _x86(target: Target, thread: int) -> UserState | None:
    types = target.types
    direct = offset_of(types, "thread", "machine.iss")
    if direct is not None:
        state = target.pointer(thread + direct)
    else:
        pcb, inside = offset_of(types, "thread", "machine.pcb"), offset_of(types, "pcb", "iss")
        if pcb is None or inside is None:
            raise _lacking(types, "machine.iss")
        at = target.pointer(thread + pcb)
        state = target.pointer(at + inside) if at else 0
    if not state:
        return None
    width = _WIDTHS.get(target.unsigned(state, "I"))
    if width is None:
        return None
    code = "I" if width == 4 else "Q"
    places = _places(types, width, direct is not None)
    pc, sp, fp, cs = (target.unsigned(state + place, code) for place in places)
    return UserState(pc, sp, fp, None, width) if cs & 3 == 3 else None


def _places(types: TypeTable, width: int, late: bool) -> tuple[int, ...]:
    known = [offset_of(types, _SAVED_STATE, name) for name in _NAMES[width]]
    found = tuple(place for place in known if place is not None)
    if len(found) == len(known):
        return found
    if not late or types.has("machine_thread"):
        raise _lacking(types, "machine.iss->uss")
    return _PLACES[width]


def _arm64(target: Target, thread: int) -> UserState | None:
    at = offset_of(target.types, "thread", "machine.upcb")
    if at is None:
        raise _lacking(target.types, "machine.upcb")
    state = target.pointer(thread + at)
    if not state:
        return None
    data = target.memory.read(state + _ARM_FP, _ARM_STATE.size)
    *addresses, cpsr = _ARM_STATE.unpack(data)
    fp, lr, sp, pc = map(target.strip, addresses)
    if not pc or cpsr & _ARM_MODE:
        return None
    return UserState(pc, sp, fp, lr, 8)
