"""What a process was started with: its executable's path, arguments, environment, apple strings.

They lie at the top of the process's own stack, in [user_stack - p_argslen, user_stack): the path,
padded with NULs to a whole pointer, p_argc arguments, the environment, padding, and what the kernel
tells dyld. Source: bsd/kern/kern_exec.c (exec_save_path, exec_extract_strings), bsd/kern/
kern_sysctl.c (sysctl_procargsx), xnu-792..11417. In xnu-792 p_argslen is a name for p_swtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtool.memory import Memory
    from kvmtool.target import Target

ARG_MAX = 1 << 20  # bytes; NCARGS is 256 KiB to 1 MiB (bsd/sys/syslimits.h)
P_LP64 = 0x4
_PREFIX = b"executable_path="  # from xnu-3248 (10.11) on
# What the kernel tells a process, first in the list in some release: bsd/kern/kern_exec.c,
# exec_add_apple_strings(). Needed where the environment leaves no padding behind it.
_APPLE = (b"pfz=", b"ptr_munge=", b"stack_guard=", b"executable_path=", b"main_stack=")


class Block(NamedTuple):
    """Where a process keeps its strings: addresses in its own space, `argc` as the kernel has it.

    `size` is 0 for a process that has none (the kernel's own). Any field may be `Unreadable`.
    """

    start: Any
    size: Any
    argc: Any
    width: int


class Arguments(NamedTuple):
    """The strings of a process, as bytes. A field may be `Unreadable`, and so may be an item.

    Behind an item that could not be read nothing is known: the list ends there. `path` is that of
    the executable, as it was given to exec.
    """

    path: Any
    argv: Any
    env: Any
    apple: Any

    @property
    def whole(self) -> bool:
        """Whether every string could be read."""
        lists = (self.argv, self.env, self.apple)
        fields = (
            self.path,
            *lists,
            *(x for items in lists if isinstance(items, list) for x in items),
        )
        return not any(isinstance(field, Unreadable) for field in fields)


NOTHING = Arguments(None, [], [], [])


class BlockReader:
    """Finds the blocks of one kernel's processes."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's proc has of them."""
        types = target.types
        self._record = Record(
            target,
            {
                "top": (offset_of(types, "proc", "user_stack"), "P"),
                "size": (offset_of(types, "proc", "p_argslen", "p_swtime"), "I"),
                "argc": (offset_of(types, "proc", "p_argc"), "i"),
                "flag": (offset_of(types, "proc", "p_flag"), "I"),
            },
        )

    def read(self, proc: int) -> Block:
        """The block of the process at kernel address `proc`. Never raises `FaultError`."""
        raw = self._record.read(proc)
        top, size, flag = raw["top"], raw["size"], raw["flag"]
        width = 8 if isinstance(flag, int) and flag & P_LP64 else 4
        for field in (top, size):
            if isinstance(field, Unreadable):
                return Block(field, field, raw["argc"], width)
        if not top or not size:
            return Block(0, 0, 0, width)
        if size > ARG_MAX or size > top:
            odd = Unreadable(f"{size:#x} bytes of arguments below {top:#x}")
            return Block(odd, odd, raw["argc"], width)
        return Block(top - size, size, raw["argc"], width)


def arguments(block: Block, memory: Memory | Unreadable) -> Arguments:
    """The strings of `block` in the process's own `memory` (or why there is none)."""
    if block.size == 0:
        return NOTHING  # no memory is needed to say so
    for missing in (block.start, memory, block.argc):
        if isinstance(missing, Unreadable):
            return Arguments(missing, missing, missing, missing)
    assert not isinstance(memory, Unreadable)
    data, torn = b"", None
    for piece in memory.read_pieces(block.start, block.size):
        if piece.data is None:
            torn = Unreadable(f"{piece.reason} at {piece.address:#x}")
            break
        data += piece.data
    return parse(data, block.argc, block.width, torn)


def parse(data: bytes, argc: int, width: int, torn: Unreadable | None = None) -> Arguments:
    """The strings in `data`, the beginning of a block, in a process with pointers of `width` bytes.

    `torn` says what is missing behind `data`, if anything is.
    """
    end = data.find(b"\0")
    if end < 0:
        lost = torn or Unreadable("a path without an end")
        return Arguments(lost, lost, lost, lost)
    path = data[:end].removeprefix(_PREFIX)
    strings = _Strings(data, -(-(end + 1) // width) * width, torn)
    argv: list[Any] = []
    while len(argv) < argc and not strings.torn:
        argv.append(strings.next())
    if strings.torn:
        return Arguments(path, argv, torn, torn)
    env = strings.until_gap()
    if strings.torn:
        return Arguments(path, argv, env, torn)
    apple = strings.until_gap()
    if apple:
        return Arguments(path, argv, env, apple)
    told = next((n for n, text in enumerate(env) if _is_apple(text)), len(env))
    return Arguments(path, argv, env[:told], env[told:])


def _is_apple(text: Any) -> bool:
    return isinstance(text, bytes) and text.startswith(_APPLE)


class _Strings:
    """Strings one behind the other; `torn` once one was met that `data` does not hold whole."""

    def __init__(self, data: bytes, at: int, missing: Unreadable | None) -> None:
        self._data, self._at, self._missing = data, at, missing
        self.torn = False

    def next(self) -> Any:
        """The next string; at the end of a whole block an empty one."""
        end = self._data.find(b"\0", self._at)
        if end < 0:
            if self._missing is not None:
                self.torn = True
                return self._missing
            end = len(self._data)
        text = self._data[self._at : end]
        self._at = min(end + 1, len(self._data))
        return text

    def until_gap(self) -> list[Any]:
        """The strings from here up to an empty one, NULs before them and after them skipped."""
        self._skip()
        found: list[Any] = []
        while self._at < len(self._data) and self._data[self._at] and not self.torn:
            found.append(self.next())
        self._skip()
        if self._at >= len(self._data) and self._missing is not None and not self.torn:
            self.torn = True
            found.append(self._missing)
        return found

    def _skip(self) -> None:
        while self._at < len(self._data) and not self._data[self._at]:
            self._at += 1


def limited(strings: Iterable[Any], nchr: int) -> list[bytes]:
    """kvm_getargv's rule: at most `nchr` bytes over all, NULs included; 0 is no limit.

    The string that goes beyond is cut, and is the last; so is the list before an unreadable one.
    """
    found: list[bytes] = []
    left = nchr
    for text in strings:
        if not isinstance(text, bytes):
            break
        if not nchr:
            found.append(text)
            continue
        if left <= 0:
            break
        found.append(text[: left - 1])
        left -= len(text) + 1
    return found
