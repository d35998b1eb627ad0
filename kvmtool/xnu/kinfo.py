"""struct kinfo_proc: a process as sysctl KERN_PROC tells it, and its bytes for either word size.

An output format, never found in kernel memory: `KinfoReader` fills it as fill_externproc() and
fill_eproc() do. What a kernel has no member for is zero here as there.
Source: bsd/sys/sysctl.h and proc.h (extern_proc), bsd/kern/kern_sysctl.c, xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

from kvmtool.errors import FormatError, KvmError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import MAXCOMLEN, NGROUPS, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

EPROC_CTTY, EPROC_SLEADER = 0x1, 0x2
WMESGLEN = 7
COMAPT_MAXLOGNAME = 12


class Timeval(NamedTuple):
    """struct timeval."""

    tv_sec: Any = 0
    tv_usec: Any = 0


class Itimerval(NamedTuple):
    """struct itimerval."""

    it_interval: Any
    it_value: Any


# C types by their codes in `_UNITS`; "Ns" is a char array.
Pointer = Annotated[Any, "P"]
Int = Annotated[Any, "i"]
UInt = Annotated[Any, "I"]
Short = Annotated[Any, "h"]
UShort = Annotated[Any, "H"]
Char = Annotated[Any, "b"]
UChar = Annotated[Any, "B"]
UQuad = Annotated[Any, "Q"]
TimevalType = Annotated[Any, "T"]
ItimervalType = Annotated[Any, "TT"]
Comm = Annotated[Any, f"{MAXCOMLEN + 1}s"]
Wmesg = Annotated[Any, f"{WMESGLEN + 1}s"]
Login = Annotated[Any, f"{COMAPT_MAXLOGNAME}s"]
Lock = Annotated[Any, "72s"]
Groups = Annotated[Any, "I" * NGROUPS]
Ints3 = Annotated[Any, "iii"]
Ints5 = Annotated[Any, "iiiii"]
Pointers3 = Annotated[Any, "PPP"]

_NEVER = Timeval()
_NO_TIMER = Itimerval(_NEVER, _NEVER)


@dataclass(frozen=True, slots=True)
class ExternProc:
    """struct extern_proc. A field may be `Unreadable`; p_comm is char[17], NULs and all."""

    p_starttime: TimevalType = _NEVER  # p_un: overlays p_forw and p_back
    p_vmspace: Pointer = 0
    p_sigacts: Pointer = 0
    p_flag: UInt = 0
    p_stat: Char = 0
    p_pid: Int = 0
    p_oppid: Int = 0
    p_dupfd: Int = 0
    user_stack: Pointer = 0
    exit_thread: Pointer = 0
    p_debugger: Int = 0
    sigwait: Int = 0
    p_estcpu: UInt = 0
    p_cpticks: Int = 0
    p_pctcpu: UInt = 0
    p_wchan: Pointer = 0
    p_wmesg: Pointer = 0
    p_swtime: UInt = 0
    p_slptime: UInt = 0
    p_realtimer: ItimervalType = _NO_TIMER
    p_rtime: TimevalType = _NEVER
    p_uticks: UQuad = 0
    p_sticks: UQuad = 0
    p_iticks: UQuad = 0
    p_traceflag: Int = 0
    p_tracep: Pointer = 0
    p_siglist: Int = 0
    p_textvp: Pointer = 0
    p_holdcnt: Int = 0
    p_sigmask: UInt = 0
    p_sigignore: UInt = 0
    p_sigcatch: UInt = 0
    p_priority: UChar = 0
    p_usrpri: UChar = 0
    p_nice: Char = 0
    p_comm: Comm = b""
    p_pgrp: Pointer = 0
    p_addr: Pointer = 0
    p_xstat: UShort = 0
    p_acflag: UShort = 0
    p_ru: Pointer = 0


@dataclass(frozen=True, slots=True)
class Pcred:
    """struct _pcred, a fake of one that is long gone: only the four ids are filled."""

    pc_lock: Lock = b""
    pc_ucred: Pointer = 0
    p_ruid: UInt = 0
    p_svuid: UInt = 0
    p_rgid: UInt = 0
    p_svgid: UInt = 0
    p_refcnt: Int = 0


@dataclass(frozen=True, slots=True)
class Ucred:
    """struct _ucred: all 16 of cr_groups, of which cr_ngroups mean something."""

    cr_ref: Int = 0
    cr_uid: UInt = 0
    cr_ngroups: Short = 0
    cr_groups: Groups = (0,) * NGROUPS


@dataclass(frozen=True, slots=True)
class Vmspace:
    """struct vmspace as programs see it; XNU leaves all of it zero."""

    dummy: Int = 0
    dummy2: Pointer = 0
    dummy3: Ints5 = (0,) * 5
    dummy4: Pointers3 = (0,) * 3


@dataclass(frozen=True, slots=True)
class Eproc:
    """struct eproc. e_lcid is e_spare[0] of kernels without login contexts (not 10.5 to 10.8)."""

    e_paddr: Pointer = 0
    e_sess: Pointer = 0
    e_pcred: Pcred = Pcred()
    e_ucred: Ucred = Ucred()
    e_vm: Vmspace = Vmspace()
    e_ppid: Int = 0
    e_pgid: Int = 0
    e_jobc: Short = 0
    e_tdev: Int = 0
    e_tpgid: Int = 0
    e_tsess: Pointer = 0
    e_wmesg: Wmesg = b""
    e_xsize: Int = 0
    e_xrssize: Short = 0
    e_xccount: Short = 0
    e_xswrss: Short = 0
    e_flag: Int = 0
    e_login: Login = b""
    e_lcid: Int = 0
    e_spare: Ints3 = (0,) * 3


@dataclass(frozen=True, slots=True)
class KinfoProc:
    """struct kinfo_proc."""

    kp_proc: ExternProc = ExternProc()
    kp_eproc: Eproc = Eproc()

    @property
    def comm(self) -> Any:
        """p_comm as text, up to its NUL."""
        return text_of(self.kp_proc.p_comm)

    def pack(self, byteorder: str, lp64: bool) -> bytes:
        """The 648 bytes an LP64 program gets from sysctl, or the 492 a 32-bit one gets.

        `byteorder` is a struct prefix; the caller's word size counts, not the kernel's: what is too
        wide for it is cut off, as XNU does. Raises `KvmError` naming a field that is `Unreadable`.
        """
        packer, _, masks = _layout(byteorder, lp64)
        values = (
            value & mask if mask else value
            for mask, value in zip(masks, _flatten(self, "kinfo_proc"), strict=True)
        )
        return packer.pack(*values)

    @classmethod
    def unpack(cls, data: bytes, byteorder: str, lp64: bool) -> list[KinfoProc]:
        """The records in a sysctl's answer. Raises `FormatError` when it ends inside of one."""
        _, unpacker, _ = _layout(byteorder, lp64)
        if len(data) % unpacker.size:
            total, chunks = len(data), unpacker.size
            raise FormatError(
                "kinfo_proc", total, f"proc size mismatch ({total} total, {chunks} chunks)"
            )
        return [_build(cls, iter(values)) for values in unpacker.iter_unpack(data)]


# code: (struct code in 32-bit and in LP64, bytes and alignment in 32-bit and in LP64). 32-bit XNU
# (ppc and i386) aligns 8-byte integers to 4; T is a timeval, | the edge of a structure.
_UNITS = {
    "P": (("I", 4, 4), ("Q", 8, 8)),
    "T": (("ii", 8, 4), ("qi4x", 16, 8)),
    "Q": (("Q", 8, 4), ("Q", 8, 8)),
    "I": (("I", 4, 4), ("I", 4, 4)),
    "i": (("i", 4, 4), ("i", 4, 4)),
    "h": (("h", 2, 2), ("h", 2, 2)),
    "H": (("H", 2, 2), ("H", 2, 2)),
    "b": (("b", 1, 1), ("b", 1, 1)),
    "B": (("B", 1, 1), ("B", 1, 1)),
    "|": (("", 0, 4), ("", 0, 8)),
}
_MASKS = {"Q": (1 << 64) - 1, "I": (1 << 32) - 1, "H": 0xFFFF, "B": 0xFF}


@cache
def _members(record: type) -> tuple[tuple[str, Any], ...]:
    """(name, code) of each member of a structure; the code of a structure inside is its class."""
    hints = get_type_hints(record, include_extras=True)
    return tuple(
        (name, hint if isinstance(hint, type) else hint.__metadata__[0])
        for name, hint in hints.items()
    )


def _codes(record: type) -> Iterator[str]:
    """The code of every scalar and array in `record`, those of structures inside it in place.

    A structure with pointers in it begins and ends where a pointer may stand.
    """
    codes = [code for _, code in _members(record)]
    edge = "|" if "P" in codes else ""
    yield edge
    for code in codes:
        if isinstance(code, type):
            yield from _codes(code)
        else:
            yield code
    yield edge


@cache
def _layout(byteorder: str, lp64: bool) -> tuple[Struct, Struct, tuple[int, ...]]:
    """The struct to pack (all unsigned), the one to unpack, and each value's mask (0: bytes)."""
    text, at, masks = "", 0, []
    for code in _codes(KinfoProc):
        if code.endswith("s"):
            text, at = text + code, at + int(code[:-1])
            masks.append(0)
            continue
        for unit in code:
            packed, size, align = _UNITS[unit][lp64]
            text += f"{-at % align}x{packed}"
            at += -at % align + size
            masks += [_MASKS[letter] for letter in packed.upper() if letter in _MASKS]
    return Struct(byteorder + _unsigned(text)), Struct(byteorder + text), tuple(masks)


def _unsigned(text: str) -> str:
    return text.translate(str.maketrans("qihb", "QIHB"))


def _flatten(value: Any, name: str) -> Iterator[Any]:
    """Every scalar and char array in `value`, in C's order."""
    if isinstance(value, Unreadable):
        raise KvmError(f"{name} is unreadable: {value.reason}")
    if isinstance(value, tuple):
        for part in value:
            yield from _flatten(part, name)
    elif isinstance(value, int | bytes):
        yield value
    else:
        for member, _ in _members(value.__class__):
            yield from _flatten(getattr(value, member), f"{name}.{member}")


def _build(record: type, values: Iterator[Any]) -> Any:
    """A `record` of the values at the head of `values`."""
    found: dict[str, Any] = {}
    for name, code in _members(record):
        if isinstance(code, type):
            found[name] = _build(code, values)
        elif code == "T":
            found[name] = Timeval(next(values), next(values))
        elif code == "TT":
            pairs = [Timeval(next(values), next(values)) for _ in code]
            found[name] = Itimerval(*pairs)
        elif code.endswith("s") or len(code) == 1:
            found[name] = next(values)
        else:
            found[name] = tuple(next(values) for _ in code)
    return record(**found)
