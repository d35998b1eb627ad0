"""What a thread's record needs of the processors: who ran where, and how fast their clock ticks.

Source: osfmk/kern/processor.h, pexpert/pexpert/pexpert.h (gPEClockFrequencyInfo), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of
from kvmtool.xnu.queues import Report, walk_list

if TYPE_CHECKING:
    from kvmtool.target import Target

NANOSECOND = 1_000_000_000  # in a second
_CPUS = 1 << 10
_CLOCK = 9  # words before timebase_frequency_hz in struct clock_frequency_info


def running_on(target: Target) -> dict[int, int]:
    """Which thread was on which CPU: thread's address -> the CPU's number.

    Of processors that cannot be read nothing is said.
    """
    types = target.types
    head = target.symbols.get("_processor_list")
    link = offset_of(types, "processor", "processor_list")
    if head is None or link is None:
        return {}
    number = offset_of(types, "processor", "cpu_id", "cpu_num", "processor_data.slot_num")
    record = Record(
        target,
        {
            "active": (offset_of(types, "processor", "active_thread"), "P"),
            "cpu": (number, "i"),
        },
    )
    found = {}
    places = walk_list(target, head.address, link, "processor_list", Report(), _CPUS)
    for place, address in enumerate(places):
        raw = record.read(address)
        cpu = place if raw["cpu"] is None else raw["cpu"]
        if isinstance(raw["active"], int) and raw["active"] and isinstance(cpu, int):
            found[raw["active"]] = cpu
    return found


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
