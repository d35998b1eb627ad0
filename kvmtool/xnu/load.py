"""Load averages and what else uptime(1) tells.

Source: bsd/sys/resource.h (struct loadavg), bsd/sys/param.h, osfmk/kern/sched_average.c
(avenrun, mach_factor), osfmk/kern/clock.c (clock_boottime), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError
from kvmtool.unreadable import guarded
from kvmtool.xnu import named
from kvmtool.xnu.layout_check import check

if TYPE_CHECKING:
    from kvmtool.arch import Arch
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable
    from kvmtool.target import Target

LOAD_SCALE = 1000  # osfmk/mach/processor_info.h: of avenrun and mach_factor


@dataclass(frozen=True, slots=True)
class Load:
    """What a kernel knew of its load. A field is None without its symbol, or `Unreadable`.

    `loadavg` is what getloadavg(3) answers; `avenrun` and `mach_factor` are Mach's own averages
    over 5, 30 and 60 seconds, the second of the processor time that a new thread could have;
    `boottime` is (seconds, microseconds) since 1970 UTC; the rest are counts.
    """

    loadavg: Any
    avenrun: Any
    mach_factor: Any
    boottime: Any
    nprocs: Any
    tasks: Any
    threads: Any
    maxproc: Any


def loadavg(arch: Arch, memory: Memory, symbols: SymbolTable) -> tuple[float, float, float]:
    """`averunnable.ldavg` over its own `fscale`: XNU has no `_fscale`, unlike every other BSD.

    Raises `NotFoundError`, `FaultError`, or `FormatError` when fscale is 0.
    """
    wide = arch.pointer_size == 8
    layout = Struct(arch.byteorder + ("3I4xq" if wide else "3Ii"))
    address = symbols.address("_averunnable")
    *averages, fscale = layout.unpack(memory.read(address, layout.size))
    if fscale <= 0:
        raise FormatError("averunnable", None, f"fscale at {address:#x} is {fscale}, expected 2048")
    one, five, fifteen = (value / fscale for value in averages)
    return one, five, fifteen


def load(target: Target) -> Load:
    """The load of the kernel. Raises `FormatError` for averages of no scale."""
    return Load(
        loadavg=_loadavg(target),
        avenrun=_scaled(target, "_avenrun"),
        mach_factor=_scaled(target, "_mach_factor"),
        boottime=boottime(target),
        nprocs=named.number(target, "_nprocs"),
        tasks=named.number(target, "_tasks_count"),
        threads=named.number(target, "_threads_count"),
        maxproc=named.number(target, "_maxproc"),
    )


def _loadavg(target: Target) -> Any:
    if named.address_of(target, "_averunnable") is None:
        return None
    return guarded(lambda: list(loadavg(target.arch, target.memory, target.symbols)))


def _scaled(target: Target, name: str) -> Any:
    at = named.address_of(target, name)
    if at is None:
        return None
    layout = Struct(target.arch.byteorder + "3I")
    return guarded(
        lambda: [n / LOAD_SCALE for n in layout.unpack(target.memory.read(at, layout.size))]
    )


def boottime(target: Target) -> Any:
    """When the kernel booted, as kern.boottime would say: (seconds, microseconds) since 1970.

    `clock_boottime` follows the clock when it is set; it is static, so stripped kernels leave the
    start of process 0, by the clock as it was then. None if neither is to be had.
    """
    seconds = named.number(target, "_clock_boottime")
    if seconds is not None:
        return seconds if not isinstance(seconds, int) else (seconds, 0)
    from kvmtool.xnu.proc import ProcReader

    kernproc = named.pointer(target, "_kernproc")
    if not isinstance(kernproc, int):
        return kernproc
    if check(target).fits is False:
        return None
    return ProcReader(target).read(kernproc, ()).start
