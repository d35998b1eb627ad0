"""Stacks of processes: who called whom, by frame pointers, and in which image each function lies.

A function that made no frame of its own is left out, and where code was compiled without frame
pointers the chain ends early; each stack says why it ends.
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.memory import Memory
    from kvmtool.xnu.user_state import UserState
    from kvmtool.xnu.vmmap import Entry

LIMIT = 512  # frames
_READ, _EXECUTE = 1, 4


class Mapping(NamedTuple):
    """Addresses [start, end) of a process; `image` is the path of the file there, if any.

    `base` is where the lowest part of that file is mapped, `protection` has bits of VM_PROT_.
    """

    start: int
    end: int
    protection: int
    image: str | None
    base: int


class UserFrame(NamedTuple):
    """One function: `pc` is where it was, or where it will be returned to.

    `fp` is the frame in which it was found, None for the first. `kind` is "pc", "link" (arm64's lr)
    or "return"; `offset` counts from where `image` begins, both None outside of every file.
    """

    pc: int
    fp: int | None
    kind: str
    image: str | None
    offset: int | None


class UserStack(NamedTuple):
    """A process's stack, innermost function first. `stop` says why there is no more.

    `unreadable` is whether memory that would have gone on with it is missing.
    """

    frames: tuple[UserFrame, ...]
    stop: str
    unreadable: bool = False


class Mappings:
    """What lies where in one process."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Of entries that cannot be read nothing is known."""
        bases: dict[int, int] = {}
        found = []
        for entry in entries:
            if not isinstance(entry.start, int) or not isinstance(entry.end, int):
                continue
            if isinstance(entry.submap, int) and entry.submap:
                continue  # what is in it follows
            if isinstance(entry.vnode, int) and entry.vnode:
                bases[entry.vnode] = min(entry.start, bases.get(entry.vnode, entry.start))
            found.append(entry)
        found.sort(key=lambda entry: entry.start)
        self._starts = [entry.start for entry in found]
        self._mappings = [
            Mapping(
                entry.start,
                entry.end,
                entry.protection if isinstance(entry.protection, int) else _READ | _EXECUTE,
                entry.path if isinstance(entry.path, str) else None,
                bases.get(entry.vnode, entry.start),
            )
            for entry in found
        ]

    def __len__(self) -> int:
        return len(self._mappings)

    def at(self, address: int) -> Mapping | None:
        """What `address` lies in."""
        at = bisect_right(self._starts, address) - 1
        found = self._mappings[at] if at >= 0 else None
        return found if found is not None and address < found.end else None


class UserWalk:
    """One walk along a process's frames; when it has ended, `stop` says why."""

    def __init__(
        self,
        state: UserState,
        mappings: Mappings,
        memory: Memory | str,
        strip: Callable[[int], int],
        byteorder: str = "<",
    ) -> None:
        """`memory` is the process's, or why there is none; `strip` takes signatures off."""
        self._state, self._mappings, self._memory = state, mappings, memory
        self._strip = strip
        self._pair = Struct(f"{byteorder}2{'I' if state.width == 4 else 'Q'}")
        # a 32-bit process may run what it may read
        self._runs = _EXECUTE if state.width == 8 else _READ | _EXECUTE
        self.stop = f"more than {LIMIT} frames"
        self.unreadable = False

    def stack(self) -> UserStack:
        """All of it. Never raises `FaultError`."""
        frames = tuple(self._frames())
        return UserStack(frames, self.stop, self.unreadable)

    def _frame(self, pc: int, fp: int | None, kind: str) -> UserFrame:
        found = self._mappings.at(pc)
        if found is None or found.image is None:
            return UserFrame(pc, fp, kind, None, None)
        return UserFrame(pc, fp, kind, found.image, pc - found.base)

    def _is_code(self, pc: int) -> bool:
        if not len(self._mappings):
            return bool(pc)  # nothing is known of them
        found = self._mappings.at(pc)
        return found is not None and bool(found.protection & self._runs)

    def _frames(self) -> Iterator[UserFrame]:
        state = self._state
        yield self._frame(state.pc, None, "pc")
        if isinstance(self._memory, str):
            self.stop, self.unreadable = self._memory, True
            return
        fp, below, link = state.fp, state.sp - 1, state.link
        for _ in range(LIMIT):
            if not self._goes_on(fp, below):
                return
            try:
                following, pc = self._pair.unpack(self._memory.read(fp, self._pair.size))
            except FaultError as fault:
                self.stop, self.unreadable = f"the frame at {fp:#x} is {fault.reason}", True
                return
            following, pc = self._strip(following), self._strip(pc)
            if link not in (None, pc, state.pc) and self._is_code(link):
                yield self._frame(link, None, "link")
            link = None
            if not pc:
                self.stop = "end of the chain"
                return
            if not self._is_code(pc):
                self.stop = f"return address {pc:#x} is no code: {fp:#x} may be no frame"
                return
            yield self._frame(pc, fp, "return")
            below, fp = fp, following

    def _goes_on(self, fp: int, below: int) -> bool:
        if fp == 0:
            self.stop = "end of the chain"
        elif fp % self._state.width:
            self.stop = f"frame pointer {fp:#x} is not aligned"
        elif fp <= below:
            self.stop = f"frame pointer {fp:#x} does not lie above {below:#x}"
        else:
            return True
        return False
