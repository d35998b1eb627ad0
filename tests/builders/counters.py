"""What a kernel counts: zones of its allocator, pages, the compressor, events since boot.

After osfmk/kern/zalloc.h and zalloc_internal.h (struct zone), osfmk/vm/vm_page.h,
osfmk/kern/processor_data.h (struct processor_data), osfmk/mach/vm_statistics.h and
osfmk/kern/host.c (scalable counters, macOS 11 on).
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record
from tests.builders.usage import CPUS

if TYPE_CHECKING:
    from tests.builders.ground import Ground


class ZoneSpec(NamedTuple):
    """A zone; sizes in bytes, `chunk` and `wired` in pages, `free` elements of those wired."""

    name: str
    elem: int
    wired: int
    in_use: int
    chunk: int = 1
    limit: int = 64
    collectable: bool = False


ZONES = (
    ZoneSpec("vm.maps", 256, 2, 5),
    ZoneSpec("kalloc.16", 16, 3, 600, collectable=True),
    ZoneSpec("proc", 1072, 8, 7, chunk=4),
)
# our name -> the variable and how many pages
PAGES = {
    "free": ("_vm_page_free_count", 70_001),
    "active": ("_vm_page_active_count", 50_002),
    "inactive": ("_vm_page_inactive_count", 30_003),
    "speculative": ("_vm_page_speculative_count", 1_004),
    "wired": ("_vm_page_wire_count", 20_005),
    "purgeable": ("_vm_page_purgeable_count", 306),
    "free_min": ("_vm_page_free_min", 3_500),
    "free_target": ("_vm_page_free_target", 4_000),
    "free_reserved": ("_vm_page_free_reserved", 1_537),
    "total": ("_vm_page_pages", 0x7FFF0),
}
COMPRESSOR = {
    "segments": ("_c_segment_count", "<I", 9),
    "pages_stored": ("_c_segment_pages_compressed", "<I", 1_234),
    "bytes_stored": ("_c_segment_input_bytes", "<Q", 5_054_464),
    "bytes_compressed": ("_c_segment_compressed_bytes", "<Q", 1_600_000),
}
OCCUPIED = 432
EVENTS = {
    "faults": 1 << 20,
    "cow_faults": 70_000,
    "zero_fill_count": 500_000,
    "pageins": 4_200,
    "pageouts": 17,
    "reactivations": 3,
}
_NARROW = (
    *("free_count", "active_count", "inactive_count", "wire_count", "zero_fill_count"),
    *("reactivations", "pageins", "pageouts", "faults", "cow_faults", "lookups", "hits"),
)


class Counters:
    """Plants them; processors must stand."""

    def __init__(self, ground: Ground, processors: list[int]) -> None:
        self._ground = ground
        self._types = ground.types
        self._image = ground.image
        self._processors = processors
        self._scalable = ground.types.has("zone", "z_self")

    def plant(self) -> dict[str, Any]:
        """The truth under the names of the `zones` and `vm` commands."""
        if self._scalable and not self._types.has("task", "tk_recount"):  # else `Usage` does
            self._number("_zpercpu_early_count", "<I", CPUS)
        pages = {ours: count for ours, (_, count) in PAGES.items()}
        for name, count in PAGES.values():
            self._number(name, "<I", count)
        return {
            "zones": self._zones(),
            "vm": {
                "pages": pages,
                "compressor": self._compressor(),
                "events": self._scalables() if self._scalable else self._per_processor(),
            },
        }

    def _number(self, name: str, code: str, value: int) -> None:
        at = self._image.variable(name, struct.calcsize(code))
        self._ground.memory.write(at, struct.pack(code, value))

    # zones

    def _zones(self) -> list[dict[str, Any]]:
        places = self._chain() if self._types.has("zone", "next_zone") else self._array()
        fill = self._new if self._scalable else self._old
        return [fill(zone, spec) for zone, spec in zip(places, ZONES, strict=True)]

    def _chain(self) -> list[Record]:
        zones = [self._ground.record("zone") for _ in ZONES]
        for zone, following in pairwise(zones):
            zone.ptr("next_zone", following.address)
        self._ground.pointer_variable("_first_zone", zones[0].address)
        return zones

    def _array(self) -> list[Record]:
        size = self._types.layout.size("zone")
        start = self._image.variable("_zone_array", size * len(ZONES), align=64)
        self._number("_num_zones", "<H" if self._scalable else "<I", len(ZONES))
        common = self._image.common
        return [
            Record(self._types, common, "zone", start + number * size)
            for number in range(len(ZONES))
        ]

    def _old(self, zone: Record, spec: ZoneSpec) -> dict[str, Any]:
        """Sizes in bytes."""
        page = self._ground.memory.page
        zone.ptr("zone_name", self._ground.text(spec.name))
        zone.u32("count", spec.in_use)
        zone.word("elem_size", spec.elem)
        sizes = {"cur": spec.wired * page, "max": spec.limit * page, "alloc": spec.chunk * page}
        for name, size in sizes.items():
            zone.word(f"{name}_size", size)
        self._flag(zone, "collectable", spec.collectable)
        return self._truth(zone, spec) | {"max_size": spec.limit * page}

    def _new(self, zone: Record, spec: ZoneSpec) -> dict[str, Any]:
        """Sizes in pages; 11.0.1 has names of its own for them."""
        there = spec.wired * self._ground.memory.page // spec.elem
        zone.ptr("z_self", zone.address)
        zone.ptr("z_name", self._ground.text(spec.name))
        zone.u16("z_elem_size", spec.elem)
        numbers = {
            ("z_wired_cur", "page_count"): spec.wired,
            ("z_wired_max", "page_count_max"): 0xFFFFFFFF,
            ("z_elems_avail", "countavail"): there,
            ("z_elems_free", "countfree"): there - spec.in_use,
        }
        for names, number in numbers.items():
            for name in names:
                zone.u32(name, number, maybe=True)
        for name in ("z_chunk_pages", "alloc_pages"):
            zone.u16(name, spec.chunk, maybe=True)
        self._flag(zone, "collectable", spec.collectable)
        return self._truth(zone, spec) | {"max_size": None}

    def _flag(self, zone: Record, member: str, value: bool) -> None:
        if self._types.has("zone", member):
            self._ground.bits("zone", zone.address, member, int(value))

    def _truth(self, zone: Record, spec: ZoneSpec) -> dict[str, Any]:
        page = self._ground.memory.page
        known = spec.collectable and self._types.has("zone", "collectable")
        return {
            "address": zone.address,
            "name": spec.name,
            "elem_size": spec.elem,
            "cur_size": spec.wired * page,
            "elements": spec.wired * page // spec.elem,
            "in_use": spec.in_use,
            "alloc_size": spec.chunk * page,
            "flags": ["collectable"] if known else [],
        }

    # virtual memory

    def _compressor(self) -> dict[str, int]:
        """10.9 brought it, and with it only 64-bit kernels."""
        if self._ground.memory.width == 4:
            return {}
        for name, code, value in COMPRESSOR.values():
            self._number(name, code, value)
        truth = {ours: value for ours, (_, _, value) in COMPRESSOR.items()}
        if self._types.has("vm_object", "resident_page_count"):
            size = self._types.layout.size("vm_object")
            at = self._image.variable("_compressor_object_store", size, align=64)
            thing = Record(self._types, self._image.common, "vm_object", at)
            thing.u32("resident_page_count", OCCUPIED)
            truth["pages_occupied"] = OCCUPIED
        return truth

    def _scalables(self) -> dict[str, int]:
        """A pointer to as many numbers as there are CPUs, a page apart."""
        page = self._ground.memory.page
        start = self._ground.region("percpu", 3).alloc(CPUS * page, page)
        for number, (name, count) in enumerate(EVENTS.items()):
            at = start + 8 * number
            shares = [count // CPUS + count % CPUS, *[count // CPUS] * (CPUS - 1)]
            for cpu, share in enumerate(shares):
                self._ground.memory.write(at + cpu * page, struct.pack("<Q", share))
            self._number(f"_vm_statistics_{name}", "<Q", at)
        return dict(EVENTS)

    def _per_processor(self) -> dict[str, int]:
        """Each processor's vm_stat; the first has all but one of each."""
        found = {}
        for name, (at, code) in self._vm_stat().items():
            if name not in EVENTS:
                found[name] = 0
                continue
            found[name] = EVENTS[name]
            others = len(self._processors) - 1
            for number, processor in enumerate(self._processors):
                share = 1 if number else EVENTS[name] - others
                self._ground.memory.write(processor + at, struct.pack(code, share))
        return found

    def _vm_stat(self) -> dict[str, tuple[int, str]]:
        """Where in a processor each event is counted, and how."""
        types, width = self._types, self._ground.memory.width
        if types.has("processor", "processor_data.vm_stat"):
            start = types.offset("processor", "processor_data.vm_stat")
        else:
            # struct processor_data: idle_state, system_state, user_state; current_state,
            # thread_timer, kernel_timer; stack_cache {free, count}; 10.5's timer_call_queue
            timers = 3 * types.layout.size("timer") + 3 * width
            first = not any(types.has("processor", name) for name in ("cpu_num", "cpu_id"))
            queue = 2 * width if first else 0
            start = types.offset("processor", "processor_data") + timers + 2 * width + queue
        for tag, code in (("vm_statistics64", "<Q"), ("vm_statistics", "<I")):
            if types.has(tag, "faults"):
                return {
                    name: (start + types.offset(tag, name), code)
                    for name in (*EVENTS, *_LATER)
                    if types.has(tag, name)
                }
        return self._laid_out(start)

    def _laid_out(self, start: int) -> dict[str, tuple[int, str]]:
        """struct vm_statistics of xnu-792, vm_statistics64 of xnu-4903, which no layout has."""
        wide = self._ground.memory.width == 8
        names = (*_NARROW, *(_TAIL if wide else ("purgeable_count", "purges")))
        places = {}
        for name in names:
            narrow = not wide or name in _NATURAL
            if not name.endswith("_count") or name == "zero_fill_count":
                places[name] = (start, "<I" if narrow else "<Q")
            start += 4 if narrow else 8
        return places


_LATER = (
    *("purges", "lookups", "hits"),
    *("compressions", "decompressions", "swapins", "swapouts"),
)
_NATURAL = (
    *("free_count", "active_count", "inactive_count", "wire_count"),
    *("purgeable_count", "speculative_count"),
)
_TAIL = (
    *("purges", "purgeable_count", "speculative_count"),
    *("decompressions", "compressions", "swapins", "swapouts"),
)
