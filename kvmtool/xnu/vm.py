"""Counters of virtual memory, as vm_stat(1) and sysctl would show them.

Source: osfmk/vm/vm_page.h and vm_resident.c (vm_page_*_count), vm_compressor.c (c_segment_*),
osfmk/kern/processor_data.h and mach/vm_statistics.h (each processor's vm_stat, up to xnu-6153),
osfmk/kern/host.c (vm_statistics_* scalable counters, from xnu-7195), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu import named
from kvmtool.xnu.cpu import processors
from kvmtool.xnu.host import page_size
from kvmtool.xnu.layout_check import check
from kvmtool.xnu.percpu import counter
from kvmtool.xnu.queues import Report

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.types.model import TypeTable

# our name -> the variable, without vm_page_ before it; all count pages
PAGES = {
    "free": "free_count",
    "active": "active_count",
    "inactive": "inactive_count",
    "speculative": "speculative_count",
    "throttled": "throttled_count",
    "wired": "wire_count",
    "wired_initially": "wire_count_initial",
    "purgeable": "purgeable_count",
    "purgeable_wired": "purgeable_wired_count",
    "reusable": "reusable_count",
    "cleaned": "cleaned_count",
    "external": "external_count",
    "internal": "internal_count",
    "pageable_external": "pageable_external_count",
    "pageable_internal": "pageable_internal_count",
    "xpmapped_external": "xpmapped_external_count",
    "anonymous": "anonymous_count",
    "realtime": "realtime_count",
    "secluded": "secluded_count",
    "stolen": "stolen_count",
    "kernelcache": "kernelcache_count",
    "gobble": "gobble_count",
    "fictitious": "fictitious_count",
    "free_wanted": "free_wanted",
    "free_min": "free_min",
    "free_target": "free_target",
    "free_reserved": "free_reserved",
    "inactive_target": "inactive_target",
}
# our name -> the variable and its width
COMPRESSOR = {
    "segments": ("c_segment_count", "I"),
    "pages_stored": ("c_segment_pages_compressed", "I"),
    "pages_limit": ("c_segment_pages_compressed_limit", "I"),
    "bytes_stored": ("c_segment_input_bytes", "Q"),
    "bytes_compressed": ("c_segment_compressed_bytes", "Q"),
    "bytes_used": ("compressor_bytes_used", "Q"),
    "swap_files": ("vm_num_swap_files", "I"),
}
EVENTS = (
    *("faults", "cow_faults", "zero_fill_count", "reactivations", "purges", "pageins", "pageouts"),
    *("lookups", "hits", "compressions", "decompressions", "swapins", "swapouts"),
)
# mach/vm_statistics.h, where no kit tells: struct vm_statistics64 of xnu-4903 and 6153, and the
# struct vm_statistics of every 10.4
_WIDE = (
    *("free_count", "active_count", "inactive_count", "wire_count"),
    *("zero_fill_count", "reactivations", "pageins", "pageouts", "faults", "cow_faults"),
    *("lookups", "hits", "purges", "purgeable_count", "speculative_count"),
    *("decompressions", "compressions", "swapins", "swapouts"),
)
_HALF_OF_WIDE = frozenset(name for name in _WIDE if name.endswith("_count")) - {"zero_fill_count"}
_CODES = {"vm_statistics64": "Q", "vm_statistics": "I"}  # of the events in each
_NARROW = (*_WIDE[:12], "purgeable_count", "purges")


@dataclass(frozen=True, slots=True)
class Vm:
    """The counters of one kernel; `page_size` in bytes.

    `pages` are numbers of pages, `compressor` what their names say (`pages_occupied` is the memory
    that the compressor takes), `events` happened since boot. Only what this kernel has is there;
    a value may be `Unreadable`.
    """

    page_size: Any
    pages: dict[str, Any]
    compressor: dict[str, Any]
    events: dict[str, Any]


def vm(target: Target, report: Report | None = None) -> Vm:
    """The counters; where the walk of the processors stopped goes into `report`.

    Those that are kept in structures are left out, and that is noted, where no layout fits.
    """
    report = report if report is not None else Report()
    fits = check(target).fits is not False
    if not fits:
        report.notes.append("no structure layout fits this kernel: its variables alone are shown")
    pages = {ours: named.number(target, f"_vm_page_{name}") for ours, name in PAGES.items()}
    pages["total"] = named.number(target, "_vm_page_pages", "_vm_pages_count")
    compressor: dict[str, Any] = {
        ours: named.number(target, f"_{name}", code=code)
        for ours, (name, code) in COMPRESSOR.items()
    }
    compressor["pages_occupied"] = _occupied(target) if fits else None
    events = _events(target, report) if fits else {}
    return Vm(page_size(target), _there(pages), _there(compressor), events)


def _there(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _occupied(target: Target) -> Any:
    """VM_PAGE_COMPRESSOR_COUNT: the resident pages of compressor_object (10.9 on)."""
    inside = offset_of(target.types, "vm_object", "resident_page_count")
    at: Any = named.address_of(target, "_compressor_object_store")
    if at is None:
        at = named.pointer(target, "_compressor_object")
    if not isinstance(at, int) or not at or inside is None:
        return at if isinstance(at, Unreadable) else None
    return guarded(lambda: target.unsigned(at + inside, "I"))


def _events(target: Target, report: Report) -> dict[str, Any]:
    """What host_statistics64 would sum up."""
    if named.address_of(target, "_vm_statistics_faults") is not None:
        return _there({name: counter(target, f"_vm_statistics_{name}") for name in EVENTS})
    layout = vm_stat_fields(target)
    if layout is None or named.address_of(target, "_processor_list", "_processor_array") is None:
        return {}
    stops = len(report.stops)
    records = [Record(target, layout).read(at) for at in processors(target, report)]
    torn = Unreadable(report.stops[-1]) if len(report.stops) > stops else None
    names = [name for name, (at, _) in layout.items() if at is not None]
    if not records:
        return dict.fromkeys(names, torn) if torn is not None else {}
    return {name: torn or _sum([record[name] for record in records]) for name in names}


def _sum(values: list[Any]) -> Any:
    """The sum; the first that is `Unreadable` if one is."""
    return next((v for v in values if isinstance(v, Unreadable)), None) or sum(values)


def vm_stat_fields(target: Target) -> dict[str, tuple[int | None, str]] | None:
    """The event counters in a struct processor: name -> (offset in bytes, `struct` code).

    None where they are not kept there.
    """
    types = target.types
    start = _vm_stat(types, target.arch.pointer_size)
    if start is None:
        return None
    for struct in _CODES:
        if types.has(struct, "faults"):
            return {
                name: (_plus(start, offset_of(types, struct, name)), _CODES[struct])
                for name in EVENTS
            }
    wide = not types.has("processor", "processor_data.timer_call_queue")
    return _laid_out(start, _WIDE if wide else _NARROW, wide)


def _plus(start: int, inside: int | None) -> int | None:
    return None if inside is None else start + inside


def _laid_out(start: int, names: tuple[str, ...], wide: bool) -> dict[str, tuple[int | None, str]]:
    """The fields of a structure of numbers without holes, in their order."""
    fields: dict[str, tuple[int | None, str]] = dict.fromkeys(EVENTS, (None, "I"))
    for name in names:
        code = "Q" if wide and name not in _HALF_OF_WIDE else "I"
        if name in fields:
            fields[name] = (start, code)
        start += 8 if code == "Q" else 4
    return fields


def _vm_stat(types: TypeTable, width: int) -> int | None:
    """Bytes from the start of struct processor to processor_data.vm_stat.

    The kits' layouts stop at processor_data. In it are three timers, three pointers to timers, the
    stack cache (a pointer and a count) and, in 10.5 itself, a queue of timer calls.
    """
    known = offset_of(types, "processor", "processor_data.vm_stat")
    if known is not None:
        return known
    data = offset_of(types, "processor", "processor_data")
    if data is None or not types.has("timer"):
        return None
    before = 3 * types.size("timer") + 5 * width
    if not (types.has("processor", "cpu_num") or types.has("processor", "cpu_id")):
        before += 2 * width
    return data + before
