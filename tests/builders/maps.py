"""Address maps of tasks and of the kernel, after osfmk/vm/vm_map.h and osfmk/{i386,arm}/pmap.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.builders.ground import Ground

READ, WRITE, EXECUTE = 1, 2, 4


class Region(NamedTuple):
    """A map entry: pages from its start on; offsets and sizes in pages of the machine."""

    start: int
    pages: int
    protection: int
    maximum: int = 7
    inheritance: int = 1  # VM_INHERIT_COPY
    tag: int = 0
    offset: int = 0
    wired: int = 0
    user_wired: int = 0
    resident: int | None = None  # of the object behind it; None for an entry without one
    needs_copy: bool = False
    shared: bool = False
    submap: bool = False


def regions(pid: int, width: int, page: int) -> list[Region]:
    """What a program of that pid has mapped."""
    text = 0x1000_0000 if width == 4 else 0x1_0000_0000
    heap = 0x2000_0000 if width == 4 else 0x7F80_0000_0000 & ((1 << 39) - 1) | 0x60_0000_0000
    stack = 0xBF80_0000 if width == 4 else 0x7_0000_0000
    return sorted(
        [
            Region(text, 3, READ | EXECUTE, 5, resident=2, needs_copy=True),
            Region(text + 3 * page, 1, READ | WRITE, 3, offset=3, resident=1),
            Region(heap, 16 + pid % 7, READ | WRITE, 3, tag=7, resident=9, wired=1, user_wired=1),
            Region(heap + 64 * page, 8, READ, 7, 0, 32, resident=None, shared=True),
            Region(stack, 32, READ | WRITE, 7, tag=30, resident=4),
        ]
    )


class Maps:
    """One map a live process; pid 0 has the kernel's."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._types = ground.types
        self.pmaps: dict[int, Record] = {}

    def plant(self) -> dict[str, Any]:
        """For every process; the truth by pid: entries, size in bytes, resident pages."""
        ground = self._ground
        found = {}
        for spec in ground.processes.specs:
            if spec.zombie:
                continue
            layout = self._kernel() if spec.pid == 0 else self._user(spec.pid)
            vm_map, truth = self._map(spec.pid, layout)
            ground.processes.tasks[spec.pid].ptr("map", vm_map.address)
            if spec.pid == 0:
                ground.pointer_variable("_kernel_map", vm_map.address)
                ground.pointer_variable("_kernel_pmap", self.pmaps[0].address)
            found[spec.pid] = truth
        return {"maps": found}

    def _user(self, pid: int) -> list[Region]:
        return regions(pid, self._ground.memory.width, self._ground.memory.page)

    def _kernel(self) -> list[Region]:
        page = self._ground.memory.page
        return [
            Region(region.base, -(-len(region.data) // page), READ | WRITE, 7, tag=12)
            for region in sorted(self._ground.zones.values(), key=lambda zone: zone.base)
            if region.data
        ]

    def _map(self, pid: int, layout: Sequence[Region]) -> tuple[Record, dict[str, Any]]:
        ground, page = self._ground, self._ground.memory.page
        vm_map = ground.record("_vm_map")
        size = sum(region.pages for region in layout) * page
        pmap = self.pmaps[pid] = ground.record("pmap")
        vm_map.ptr("pmap", pmap.address)
        vm_map.word("size", size)
        resident = pid + 100
        if self._types.has("pmap", "stats"):
            ground.memory.put_u32(pmap.place("stats"), resident)
        header = vm_map.place("hdr")
        low = min(region.start for region in layout)
        high = max(region.start + region.pages * page for region in layout)
        entries = [self._entry(region) for region in layout]
        self._link([header, *entries])
        inside = Record(self._types, ground.zones["kalloc"], "vm_map_header", header)
        inside.u32("nentries", len(entries))
        inside.u16("page_shift", page.bit_length() - 1, maybe=True)
        links = Record(self._types, ground.zones["kalloc"], "vm_map_links", header)
        links.u64("start", low)
        links.u64("end", high)
        truth = {
            "map": vm_map.address,
            "pmap": pmap.address,
            "size": size,
            "resident": resident if self._types.has("pmap", "stats") else None,
            "entries": [
                region._asdict() | {"address": at}
                for at, region in zip(entries, layout, strict=True)
            ],
        }
        return vm_map, truth

    def _link(self, ring: list[int]) -> None:
        """{prev, next} of every one, the header among them."""
        ground, types = self._ground, self._types
        for number, at in enumerate(ring):
            following = ring[(number + 1) % len(ring)]
            ground.memory.put_pointer(at + types.offset("vm_map_links", "next"), following)
            ground.memory.put_pointer(at + types.offset("vm_map_links", "prev"), ring[number - 1])

    def _entry(self, region: Region) -> int:
        ground, page = self._ground, self._ground.memory.page
        entry = ground.record("vm_map_entry")
        links = Record(self._types, ground.zones["kalloc"], "vm_map_links", entry.address)
        links.u64("start", region.start)
        links.u64("end", region.start + region.pages * page)
        for member in ("protection", "inheritance", "needs_copy", "is_shared"):
            value = getattr(region, member.removeprefix("is_"))
            ground.bits("vm_map_entry", entry.address, member, int(value))
        ground.bits("vm_map_entry", entry.address, "max_protection", region.maximum)
        entry.u16("wired_count", region.wired)
        entry.u16("user_wired_count", region.user_wired)
        self._offset_and_tag(entry, region)
        if region.resident is not None:
            self._behind(entry, self._object(region))
        return entry.address

    def _offset_and_tag(self, entry: Record, region: Region) -> None:
        """Bytes with the tag in the low twelve bits, or bit-fields of their own."""
        types, page = self._types, self._ground.memory.page
        offset = region.offset * page
        if types.has("vm_map_entry", "vme_alias"):  # xnu-8020 (macOS 12.1)
            self._ground.bits("vm_map_entry", entry.address, "vme_alias", region.tag)
            self._ground.bits("vm_map_entry", entry.address, "vme_offset", offset >> 12)
        elif types.has("vm_map_entry", "vme_offset"):  # xnu-3248 (10.11)
            entry.u64("vme_offset", offset | region.tag)
        else:
            entry.u64("offset", offset)
            self._ground.bits("vm_map_entry", entry.address, "alias", region.tag)

    def _object(self, region: Region) -> int:
        """struct vm_object, 64-byte aligned as packed pointers need it."""
        zone = self._ground.zones["kalloc"]
        at = zone.alloc(self._types.layout.size("vm_object"), 64)
        found = self._ground.record("vm_object", address=at)
        found.u32("resident_page_count", region.resident or 0)
        found.u32("ref_count", 1)
        return at

    def _behind(self, entry: Record, at: int) -> None:
        """The entry's object: a pointer, or (from xnu-8020 on) packed into 32 bits."""
        types = self._types
        if types.has("vm_map_entry", "vme_alias"):
            member = next(
                name
                for name in ("vme_object_or_delta", "vme_object")
                if types.has("vm_map_entry", name)
            )
            # VM_PAGE_PACKED_PTR_BASE: VM_MIN_KERNEL_AND_KEXT_ADDRESS
            base = {"x86_64": 0xFFFFFF7F80000000, "arm64": 0xFFFFFE0000000000}
            entry.u32(member, at - base[self._ground.image.arch] >> 6)
        elif types.has("vm_map_entry", "vme_object"):
            entry.ptr("vme_object", at)
        else:
            entry.ptr("object", at)
