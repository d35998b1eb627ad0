"""What a zone of macOS 11 and later does not keep itself: its CPUs' caches, its heap's name.

Source: osfmk/kern/zalloc.c (struct zone_cache, zc_mag_size, zone_heap_name), zalloc_internal.h
(zone_security_flags_t), osfmk/kern/kalloc.c (kalloc_heap_names), xnu-7195..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, FormatError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu import named
from kvmtool.xnu.members import Members
from kvmtool.xnu.percpu import copies

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target

_NAME = 128  # bytes
_HEAP_NAME = 32
_MAGAZINE = 8  # elements: zc_mag_size, unless a boot argument said otherwise
_MAGAZINE_LIMIT = 1 << 10


def text_at(target: Target, pointer: Any, limit: int = _NAME) -> Any:
    """The text that `pointer` leads to; None for no pointer."""
    if not isinstance(pointer, int) or not pointer:
        return pointer or None
    return guarded(lambda: target.text(pointer, limit))


def computed(compute: Callable[..., Any], *values: Any) -> Any:
    """`compute` of the values; the first of them that is not a number if one is not."""
    for value in values:
        if not isinstance(value, int):
            return value
    return compute(*values)


class ZoneCaches:
    """What the magazines of the CPUs hold: struct zone_cache, which is in no header.

    From 11.5 on it begins with the numbers of elements in the two magazines in use and of full
    magazines; from 14 on a lock comes first, and the full magazines are zc_depot.zd_full.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._size = named.number(target, "__zc_mag_size", "_zc_magazine_size", code="H")
        if self._size is None:
            self._size = _MAGAZINE
        elif isinstance(self._size, int) and not 0 < self._size <= _MAGAZINE_LIMIT:
            self._size = Unreadable(f"zc_mag_size is {self._size}, expected at most 1024")
        types = target.types
        new = types.has("zone", "z_recirc.zd_full")
        places = (4, 6, 24) if new else (0, 2, 4)
        members = ("zc_alloc_cur", "zc_free_cur", "zc_depot.zd_full" if new else "zc_depot_cur")
        self._places = [
            (place if known is None else known, "I" if member.endswith("zd_full") else "H")
            for place, member in zip(places, members, strict=True)
            for known in (offset_of(types, "zone_cache", member),)
        ]

    def magazines(self, count: Any) -> Any:
        """How many elements are in `count` full magazines."""
        return computed(lambda count, size: count * size, count, self._size)

    def elements(self, pointer: Any) -> Any:
        """How many elements the CPUs' caches hold; None for a zone without any."""
        if not isinstance(pointer, int) or not pointer:
            return pointer or None
        places = copies(self._target, pointer)
        if not isinstance(places, list):
            return places
        if not isinstance(self._size, int):
            return self._size
        try:
            return sum(self._one(at) for at in places)
        except FaultError as fault:
            return Unreadable.of(fault)
        except FormatError as error:
            return Unreadable(str(error))

    def _one(self, cache: int) -> int:
        read = self._target.unsigned
        alloc, free, depot = (read(cache + at, code) for at, code in self._places)
        if alloc > self._size or free > self._size:
            what = f"magazines of {alloc} and {free} elements, expected at most {self._size}"
            raise FormatError(f"zone_cache at {cache:#x}", None, what)
        return alloc + free + depot * int(self._size)


class ZoneNames:
    """The names of zones, with their kalloc heap's before it: "default.", "data.", "kext."."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._names = named.address_of(target, "_kalloc_heap_names")
        self._security = named.address_of(target, "_zone_security_array")
        types = target.types
        self._known = types.has("zone_security_flags", "z_kheap_id")
        self._flags = Members(target, "zone_security_flags", {"heap": ("I", "z_kheap_id")})
        self._step = types.size("zone_security_flags") if self._known else 0
        self._cache: dict[int, Any] = {0: ""}

    def name(self, index: int, raw: dict[str, Any]) -> Any:
        """The zone's name as zprint(1) has it."""
        name = text_at(self._target, raw["name"])
        heap = raw["heap"]  # up to macOS 11 the zone itself has it
        if heap is None and self._security is not None and self._known:
            heap = self._flags.read(self._security + index * self._step)["heap"]
        if not isinstance(heap, int) or not isinstance(name, str):
            return name
        prefix = self._heap(heap)
        return prefix + name if isinstance(prefix, str) else name

    def _heap(self, heap: int) -> Any:
        if heap not in self._cache:
            self._cache[heap] = self._read(heap)
        return self._cache[heap]

    def _read(self, heap: int) -> Any:
        if self._names is None:
            return None
        at = self._names + heap * self._target.arch.pointer_size
        pointer = guarded(lambda: self._target.pointer(at))
        return text_at(self._target, pointer, _HEAP_NAME)
