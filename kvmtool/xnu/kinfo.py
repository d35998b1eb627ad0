"""struct kinfo_proc: a process as sysctl KERN_PROC tells it, and its bytes for either word size.

An output format, never found in kernel memory: `KinfoReader` fills it as fill_externproc() and
fill_eproc() do. What a kernel has no member for is zero here as there.
Source: bsd/sys/sysctl.h and proc.h (extern_proc), bsd/kern/kern_sysctl.c, xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

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

    it_interval: Timeval = Timeval()
    it_value: Timeval = Timeval()


def _c(code: str | type, default: Any = 0) -> Any:
    """A field whose C type is `code`: see `_UNITS`, or an "Ns" char array, or a structure."""
    return field(default=default, metadata={"code": code})


@dataclass(frozen=True, slots=True)
class ExternProc:
    """struct extern_proc. A field may be `Unreadable`; p_comm is char[17], NULs and all."""

    p_starttime: Any = _c("T", Timeval())  # p_un: overlays p_forw and p_back
    p_vmspace: Any = _c("P")
    p_sigacts: Any = _c("P")
    p_flag: Any = _c("I")
    p_stat: Any = _c("b")
    p_pid: Any = _c("i")
    p_oppid: Any = _c("i")
    p_dupfd: Any = _c("i")
    user_stack: Any = _c("P")
    exit_thread: Any = _c("P")
    p_debugger: Any = _c("i")
    sigwait: Any = _c("i")
    p_estcpu: Any = _c("I")
    p_cpticks: Any = _c("i")
    p_pctcpu: Any = _c("I")
    p_wchan: Any = _c("P")
    p_wmesg: Any = _c("P")
    p_swtime: Any = _c("I")
    p_slptime: Any = _c("I")
    p_realtimer: Any = _c("TT", Itimerval())
    p_rtime: Any = _c("T", Timeval())
    p_uticks: Any = _c("Q")
    p_sticks: Any = _c("Q")
    p_iticks: Any = _c("Q")
    p_traceflag: Any = _c("i")
    p_tracep: Any = _c("P")
    p_siglist: Any = _c("i")
    p_textvp: Any = _c("P")
    p_holdcnt: Any = _c("i")
    p_sigmask: Any = _c("I")
    p_sigignore: Any = _c("I")
    p_sigcatch: Any = _c("I")
    p_priority: Any = _c("B")
    p_usrpri: Any = _c("B")
    p_nice: Any = _c("b")
    p_comm: Any = _c(f"{MAXCOMLEN + 1}s", b"")
    p_pgrp: Any = _c("P")
    p_addr: Any = _c("P")
    p_xstat: Any = _c("H")
    p_acflag: Any = _c("H")
    p_ru: Any = _c("P")


@dataclass(frozen=True, slots=True)
class Pcred:
    """struct _pcred, a fake of one that is long gone: only the four ids are filled."""

    pc_lock: Any = _c("72s", b"")
    pc_ucred: Any = _c("P")
    p_ruid: Any = _c("I")
    p_svuid: Any = _c("I")
    p_rgid: Any = _c("I")
    p_svgid: Any = _c("I")
    p_refcnt: Any = _c("i")


@dataclass(frozen=True, slots=True)
class Ucred:
    """struct _ucred: all 16 of cr_groups, of which cr_ngroups mean something."""

    cr_ref: Any = _c("i")
    cr_uid: Any = _c("I")
    cr_ngroups: Any = _c("h")
    cr_groups: Any = _c("I" * NGROUPS, (0,) * NGROUPS)


@dataclass(frozen=True, slots=True)
class Vmspace:
    """struct vmspace as programs see it; XNU leaves all of it zero."""

    dummy: Any = _c("i")
    dummy2: Any = _c("P")
    dummy3: Any = _c("iiiii", (0,) * 5)
    dummy4: Any = _c("PPP", (0,) * 3)


@dataclass(frozen=True, slots=True)
class Eproc:
    """struct eproc. e_lcid is e_spare[0] of kernels without login contexts (not 10.5 to 10.8)."""

    e_paddr: Any = _c("P")
    e_sess: Any = _c("P")
    e_pcred: Pcred = _c(Pcred, Pcred())
    e_ucred: Ucred = _c(Ucred, Ucred())
    e_vm: Vmspace = _c(Vmspace, Vmspace())
    e_ppid: Any = _c("i")
    e_pgid: Any = _c("i")
    e_jobc: Any = _c("h")
    e_tdev: Any = _c("i")
    e_tpgid: Any = _c("i")
    e_tsess: Any = _c("P")
    e_wmesg: Any = _c(f"{WMESGLEN + 1}s", b"")
    e_xsize: Any = _c("i")
    e_xrssize: Any = _c("h")
    e_xccount: Any = _c("h")
    e_xswrss: Any = _c("h")
    e_flag: Any = _c("i")
    e_login: Any = _c(f"{COMAPT_MAXLOGNAME}s", b"")
    e_lcid: Any = _c("i")
    e_spare: Any = _c("iii", (0,) * 3)


@dataclass(frozen=True, slots=True)
class KinfoProc:
    """struct kinfo_proc."""

    kp_proc: ExternProc = _c(ExternProc, ExternProc())
    kp_eproc: Eproc = _c(Eproc, Eproc())

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


def _codes(record: type) -> Iterator[str]:
    """The code of every scalar and array in `record`, those of structures inside it in place.

    A structure with pointers in it begins and ends where a pointer may stand.
    """
    codes = [member.metadata["code"] for member in fields(record)]
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
        for member in fields(value):
            yield from _flatten(getattr(value, member.name), f"{name}.{member.name}")


def _build(record: type, values: Iterator[Any]) -> Any:
    """A `record` of the values at the head of `values`."""
    found: dict[str, Any] = {}
    for member in fields(record):
        code = member.metadata["code"]
        if isinstance(code, type):
            found[member.name] = _build(code, values)
        elif code == "T":
            found[member.name] = Timeval(next(values), next(values))
        elif code == "TT":
            pairs = [Timeval(next(values), next(values)) for _ in code]
            found[member.name] = Itimerval(*pairs)
        elif code.endswith("s") or len(code) == 1:
            found[member.name] = next(values)
        else:
            found[member.name] = tuple(next(values) for _ in code)
    return record(**found)
