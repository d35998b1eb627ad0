"""Zones: the kernel's allocator of elements of one size each, as zprint(1) shows them.

Source: osfmk/kern/zalloc.c (first_zone, zone_array, get_zone_info), osfmk/kern/zalloc.h and
zalloc_internal.h (struct zone), osfmk/kern/kalloc.c (kalloc_heap_names), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FormatError, NotFoundError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu import named
from kvmtool.xnu.host import page_size
from kvmtool.xnu.members import Members
from kvmtool.xnu.percpu import copies, cpu_count
from kvmtool.xnu.queues import Report, walk_list
from kvmtool.xnu.zone_caches import ZoneCaches, ZoneNames, computed, text_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

LIMIT = 1 << 14  # zones; macOS 15 has some 700
_NO_LIMIT = 0xFFFFFFFF  # pages
FLAGS = {
    "exhaustible": ("exhaustible", "z_exhausts"),
    "collectable": ("collectable",),
    "expandable": ("expandable",),
    "foreign": ("allows_foreign", "z_allows_foreign"),
    "percpu": ("z_percpu", "percpu"),
    "permanent": ("z_permanent", "permanent"),
    "destroyed": ("z_destroyed", "destroyed"),
    "noencrypt": ("noencrypt", "z_noencrypt"),
    "destructible": ("z_destructible", "destructible"),
    "smr": ("z_smr",),
}
# struct zone up to xnu-6153
_OLD: dict[str, tuple[str, *tuple[str, ...]]] = {
    "name": ("P", "zone_name"),
    "count": ("i", "count"),
    "cur_size": ("W", "cur_size"),
    "max_size": ("W", "max_size"),
    "elem_size": ("W", "elem_size"),
    "alloc_size": ("W", "alloc_size"),
    "sum_count": ("Q", "sum_count"),
}
# from xnu-7195 on; 11.0.1 had other names than every later release
_NEW: dict[str, tuple[str, *tuple[str, ...]]] = {
    "self": ("P", "z_self"),
    "name": ("P", "z_name"),
    "elem_size": ("H", "z_elem_size"),
    "chunk": ("H", "z_chunk_pages", "alloc_pages"),
    "wired": ("I", "z_wired_cur", "page_count"),
    "wired_max": ("I", "z_wired_max", "page_count_max"),
    "avail": ("I", "z_elems_avail", "countavail"),
    "free": ("I", "z_elems_free", "countfree"),
    # in use by nobody, but not in z_elems_free; z_recirc_cur, which was before it, is in there
    "recirc": ("I", "z_recirc.zd_full"),
    "cache": ("W", "z_pcpu_cache"),
    "stats": ("W", "z_stats"),
    "heap": ("I", "kalloc_heap"),
}


@dataclass(frozen=True, slots=True)
class Zone:
    """One zone. Sizes are bytes; a field is None where this kernel has no such thing.

    `in_use` counts elements that somebody has, `elements` those there is memory for, `cached` free
    ones that lie in a CPU's magazines, `sum_size` all bytes ever allocated. `max_size` is None for
    no limit. Any field may be `Unreadable`.
    """

    index: int
    address: int
    name: Any
    elem_size: Any
    cur_size: Any
    max_size: Any
    elements: Any
    max_elements: Any
    in_use: Any
    cached: Any
    alloc_size: Any
    alloc_elements: Any
    sum_size: Any
    flags: Any


def zones(target: Target, report: Report | None = None) -> Iterator[Zone]:
    """Every zone, in the kernel's order; where the walk stopped goes into `report`.

    Raises `NotFoundError` for a kernel without zone_array or first_zone, `FormatError` for more
    zones than any kernel has, `FaultError` where their number cannot be read.
    """
    report = report if report is not None else Report()
    new = target.types.has("zone", "z_self")
    reader = _NewZones(target) if new else _OldZones(target)
    for index, address in _addresses(target, new, report):
        found = reader.read(index, address)
        if found is not None:
            yield found


def _addresses(target: Target, new: bool, report: Report) -> Iterator[tuple[int, int]]:
    array = named.address_of(target, "_zone_array")
    if array is None:  # up to 10.11
        head = named.address_of(target, "_first_zone")
        if head is None:
            raise NotFoundError("symbol", "_zone_array", hint=target.symbols.hint)
        link = target.types.offset("zone", "next_zone")
        yield from enumerate(walk_list(target, head, link, "first_zone", report, LIMIT))
        return
    at = named.address_of(target, "_num_zones")
    if at is None:
        raise NotFoundError("symbol", "_num_zones", hint=target.symbols.hint)
    count = target.unsigned(at, "H" if new else "I")  # a zone_id_t later
    if count > LIMIT:
        raise FormatError("num_zones", None, f"{count} at {at:#x}, expected at most {LIMIT}")
    size = target.types.size("zone")
    yield from ((index, array + index * size) for index in range(count))


def _flags(raw: dict[str, Any]) -> Any:
    missing = next((raw[name] for name in FLAGS if isinstance(raw[name], Unreadable)), None)
    return missing if missing is not None else [name for name in FLAGS if raw[name]]


def _times(size: Any, elem: Any) -> Any:
    """How many elements of that size there is room for."""
    return computed(lambda size, elem: size // elem if elem else 0, size, elem)


_BITS: dict[str, tuple[str, *tuple[str, ...]]] = {
    name: ("B", *members) for name, members in FLAGS.items()
}


class _OldZones:
    """Zones up to 10.15."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._members = Members(target, "zone", {**_OLD, **_BITS})

    def read(self, index: int, address: int) -> Zone | None:
        raw = self._members.read(address)
        elem, current = raw["elem_size"], raw["cur_size"]
        return Zone(
            index=index,
            address=address,
            name=text_at(self._target, raw["name"]),
            elem_size=elem,
            cur_size=current,
            max_size=raw["max_size"],
            elements=_times(current, elem),
            max_elements=_times(raw["max_size"], elem),
            in_use=raw["count"],
            cached=None,
            alloc_size=raw["alloc_size"],
            alloc_elements=_times(raw["alloc_size"], elem),
            sum_size=computed(lambda count, elem: count * elem, raw["sum_count"], elem),
            flags=_flags(raw),
        )


class _NewZones:
    """Zones from macOS 11 on: counted in pages, with magazines of free elements for each CPU.

    11.0.1 keeps its magazines elsewhere: there what is in them counts as in use.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._members = Members(target, "zone", {**_NEW, **_BITS})
        self._page = page_size(target)
        self._cpus = cpu_count(target)
        self._caches = ZoneCaches(target)
        self._heaps = ZoneNames(target)
        self._stats = Members(target, "zone_stats", {"bytes": ("Q", "zs_mem_allocated")})

    def read(self, index: int, address: int) -> Zone | None:
        raw = self._members.read(address)
        if isinstance(raw["self"], int) and raw["self"] != address:
            return None  # a slot that is not used: z_self is null there
        elem, copies = raw["elem_size"], self._cpus if raw["percpu"] == 1 else 1
        current = self._bytes(raw["wired"], copies)
        limit = None if raw["wired_max"] == _NO_LIMIT else self._bytes(raw["wired_max"], copies)
        whole = computed(lambda elem, copies: elem * copies, elem, copies)
        alloc = self._bytes(raw["chunk"], 1)
        inner = self._page if raw["percpu"] == 1 else alloc
        cached = self._caches.elements(raw["cache"])
        recirc = self._caches.magazines(raw["recirc"])
        return Zone(
            index=index,
            address=address,
            name=self._heaps.name(index, raw),
            elem_size=elem,
            cur_size=current,
            max_size=limit,
            elements=raw["avail"],
            max_elements=_times(limit, whole),
            in_use=_in_use(raw["avail"], raw["free"], recirc, cached),
            cached=computed(lambda a, b: a + b, cached, recirc or 0)
            if cached is not None
            else recirc,
            alloc_size=alloc,
            alloc_elements=_times(inner, elem),
            sum_size=self._sum(raw["stats"], copies),
            flags=_flags(raw),
        )

    def _bytes(self, pages: Any, copies: Any) -> Any:
        return computed(
            lambda pages, copies, page: pages * copies * page, pages, copies, self._page
        )

    def _sum(self, pointer: Any, scale: Any) -> Any:
        """zs_mem_allocated of every CPU together."""
        if not isinstance(pointer, int) or not pointer:
            return pointer or None
        places = copies(self._target, pointer)
        if not isinstance(places, list):
            return places
        parts = [self._stats.read(at)["bytes"] for at in places]
        missing = next((part for part in parts if not isinstance(part, int)), None)
        return missing if missing is not None else computed(lambda n: n * sum(parts), scale)


def _in_use(avail: Any, free: Any, recirc: Any, cached: Any) -> Any:
    """What get_zone_info counts, without what lies in the CPUs' magazines."""
    return computed(
        lambda avail, free, recirc, cached: max(avail - free - recirc - cached, 0),
        *(avail, free, 0 if recirc is None else recirc, 0 if cached is None else cached),
    )
