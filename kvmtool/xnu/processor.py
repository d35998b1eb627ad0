"""What a thread's record needs of the processors: who ran where, and how fast their clock ticks.

Source: osfmk/kern/processor.h, pexpert/pexpert/pexpert.h (gPEClockFrequencyInfo), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.queues import Report, walk_list

if TYPE_CHECKING:
    from kvmtool.target import Target

NANOSECOND = 1_000_000_000  # in a second
_CPUS = 1 << 10
_CLOCK = 9  # words before timebase_frequency_hz in struct clock_frequency_info


class Running(NamedTuple):
    """Which thread was on which CPU: thread's address -> the CPU's number.

    `lost` says why that is not known of every CPU; None if it is.
    """

    cpus: dict[int, int]
    lost: Unreadable | None


def running_on(target: Target) -> Running:
    """Which threads were running."""
    types = target.types
    head = target.symbols.get("_processor_list")
    link = offset_of(types, "processor", "processor_list")
    if head is None or link is None:
        return Running({}, None)
    number = offset_of(types, "processor", "cpu_id", "cpu_num", "processor_data.slot_num")
    record = Record(
        target,
        {
            "active": (offset_of(types, "processor", "active_thread"), "P"),
            "cpu": (number, "i"),
        },
    )
    found: dict[int, int] = {}
    lost: Any = None
    report = Report()
    places = walk_list(target, head.address, link, "processor_list", report, _CPUS)
    for place, address in enumerate(places):
        raw = record.read(address)
        active, cpu = raw["active"], place if raw["cpu"] is None else raw["cpu"]
        if isinstance(active, Unreadable) or isinstance(cpu, Unreadable):
            lost = active if isinstance(active, Unreadable) else cpu
        elif active:
            found[active] = cpu
    return Running(found, Unreadable(report.stops[0]) if report.stops else lost)


def abstime_hz(target: Target) -> int | None:
    """Ticks of mach_absolute_time in a second; None where the kernel does not say it.

    Intel's count nanoseconds (osfmk/i386/rtclock.c); elsewhere gPEClockFrequencyInfo has it.
    """
    if target.arch.name in ("i386", "x86_64"):
        return NANOSECOND
    clock = target.symbols.get("_gPEClockFrequencyInfo")
    if clock is None or target.arch.pointer_size != 8:
        return None
    try:
        hz = target.unsigned(clock.address + 8 * _CLOCK, "Q")
    except FaultError:
        return None
    return hz if 1_000 <= hz <= 100 * NANOSECOND else None
