"""Address maps: which ranges of an address space there are, and what is in them, as vmmap(1).

Source: osfmk/vm/vm_map.c (vm_map_region_walk, vm_map_region_top_walk), osfmk/vm/bsd_vm.c
(fill_procregioninfo), mach/vm_prot.h, mach/vm_inherit.h, mach/vm_behavior.h, mach/vm_region.h
(SM_*), xnu-792..11417.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, FormatError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.vm_map import FLAGS, Map, MapReader, RawEntry
from kvmtool.xnu.vm_object import Objects
from kvmtool.xnu.vm_tags import tag_name
from kvmtool.xnu.vnode import VnodeReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.vm_object import VmObject

_DEPTH = 8  # of maps in maps; XNU nests the shared region, and that is all
INHERITANCE = ("share", "copy", "none", "donate")
BEHAVIOR = ("default", "random", "sequential", "reverse sequential")


@dataclass(frozen=True, slots=True)
class Entry:
    """One range of a map. Any field may be `Unreadable`; None says that there is no such thing.

    Addresses [start, end) are the process's; `address`, `object`, `submap`, `vnode` the kernel's.
    `protection` and `max_protection` are VM_PROT_ bits (1 read, 2 write, 4 execute); `offset` is in
    bytes, in the object or the submap; `share_mode` is vmmap's word, `ref_count` and `shadow_depth`
    what proc_info(2) would say with it; `resident` counts pages of the whole object. `depth` is 0
    but for what is in a submap.
    """

    address: int
    start: Any
    end: Any
    protection: Any
    max_protection: Any
    inheritance: Any
    behavior: Any
    share_mode: Any
    tag: Any
    tag_name: Any
    object: Any
    offset: Any
    submap: Any
    wired_count: Any
    user_wired_count: Any
    ref_count: Any
    shadow_depth: Any
    resident: Any
    pager: Any
    vnode: Any
    path: Any
    flags: Any
    depth: int


class Maps:
    """The entries of address maps of one kernel; `reader` finds the maps."""

    def __init__(self, target: Target, report: Report | None = None) -> None:
        """Compiles what this kernel has; walks that stop go into `report`."""
        self.reader = MapReader(target, report)
        self.report = self.reader.report
        self.objects = Objects(target)
        self._vnodes = VnodeReader(target)

    def entries(self, where: Map, *, submaps: bool = False) -> Iterator[Entry]:
        """The entries of a map in their order; with `submaps`, after each submap what is in it."""
        raw = list(self.reader.walk(where))
        shared = self._references(raw)
        for one in raw:
            made = self._make(where, one, shared, 0)
            yield made
            if submaps and isinstance(made.submap, int):
                yield from self._below(where, made, {where.address}, 1)

    def _below(self, where: Map, entry: Entry, seen: set[int], depth: int) -> Iterator[Entry]:
        """What of a submap shows through `entry`, at the addresses it has there."""
        submap, name = entry.submap, f"map of {where.name}"
        if submap in seen or depth > _DEPTH:
            self.report.stop(name, depth, f"map {submap:#x} is inside itself")
            return
        for value in (entry.start, entry.end, entry.offset):
            if not isinstance(value, int):
                return  # the entry says so itself
        try:
            inner = self.reader.at(submap, f"submap {submap:#x}", kernel=where.kernel)
        except (FaultError, FormatError) as error:
            self.report.stop(name, depth, str(error))
            return
        raw = list(self.reader.walk(inner))
        shared = self._references(raw)
        low, high = entry.offset, entry.offset + entry.end - entry.start
        move = entry.start - entry.offset
        for one in raw:
            start, end = one.start, one.end
            if (
                not isinstance(start, int)
                or not isinstance(end, int)
                or end <= low
                or start >= high
            ):
                continue
            made = self._make(inner, one, shared, depth)
            skipped = max(low - start, 0)
            offset = made.offset + skipped if isinstance(made.offset, int) else made.offset
            made = replace(
                made, start=start + skipped + move, end=min(end, high) + move, offset=offset
            )
            yield made
            if isinstance(made.submap, int):
                yield from self._below(inner, made, seen | {submap}, depth + 1)

    def _references(self, raw: list[RawEntry]) -> Counter[int]:
        """How many times the entries of a map lead to each object: vm_map_region_count_obj_refs."""
        counts: Counter[int] = Counter()
        for one in raw:
            if isinstance(one.leads, int) and one.leads and one.is_submap == 0:
                counts.update(found.address for found in self.objects.chain(one.leads)[0])
        return counts

    def _make(self, where: Map, one: RawEntry, shared: Counter[int], depth: int) -> Entry:
        members, leads, tag = one.members, one.leads, one.tag
        submap = leads if one.is_submap else None
        thing = None if one.is_submap == 1 else leads
        missing = next((members[n] for n in FLAGS if isinstance(members[n], Unreadable)), None)
        return Entry(
            address=one.address,
            start=one.start,
            end=one.end,
            protection=members["protection"],
            max_protection=members["max_protection"],
            inheritance=_word(INHERITANCE, members["inheritance"]),
            behavior=_word(BEHAVIOR, members["behavior"]),
            tag=tag,
            tag_name=tag_name(tag, where.kernel) if isinstance(tag, int) else tag,
            object=thing or None,
            offset=one.offset,
            submap=submap,
            wired_count=members["wired_count"],
            user_wired_count=members["user_wired_count"],
            **self._sharing(thing, members, shared),
            **self._backing(thing),
            flags=missing or [name for name in FLAGS if members[name]],
            depth=depth,
        )

    def _sharing(self, thing: Any, members: dict[str, Any], shared: Counter[int]) -> dict[str, Any]:
        """What vm_map_region_walk finds out about the sharing of an entry's object."""
        if isinstance(thing, Unreadable):
            return dict.fromkeys(("share_mode", "ref_count", "shadow_depth", "resident"), thing)
        if not thing:
            return {"share_mode": "empty", "ref_count": 0, "shadow_depth": 0, "resident": 0}
        chain, torn = self.objects.chain(thing)
        first = chain[0]
        mode: Any = torn or _share_mode(chain, members, shared[thing])
        return {
            "share_mode": mode,
            "ref_count": torn or _all_references(chain),
            "shadow_depth": torn or len(chain) - 1,
            "resident": first.resident,
        }

    def _backing(self, thing: Any) -> dict[str, Any]:
        """The pager and the file behind an object: those of the last one it is a copy of."""
        nothing = dict.fromkeys(("pager", "vnode", "path"))
        if isinstance(thing, Unreadable):
            return dict.fromkeys(nothing, thing)
        if not thing:
            return nothing
        chain, torn = self.objects.chain(thing)
        pager = chain[-1].pager
        if torn is not None or isinstance(pager, Unreadable):
            return dict.fromkeys(nothing, torn or pager)
        if not pager:
            return nothing
        found = self.objects.pager(pager)
        path = self._vnodes.path(found.vnode) if isinstance(found.vnode, int) else found.vnode
        return {"pager": found.kind, "vnode": found.vnode, "path": path}


def _word(words: tuple[str, ...], value: Any) -> Any:
    if not isinstance(value, int):
        return value
    return words[value] if value < len(words) else str(value)


def _all_references(chain: list[VmObject]) -> Any:
    """What vm_map_region_top_walk counts: references to the object and to what it copies."""
    counts = [found.ref_count for found in chain]
    missing = next((count for count in counts if not isinstance(count, int)), None)
    return missing if missing is not None else sum(counts) - len(counts) + 1


def _share_mode(chain: list[VmObject], members: dict[str, Any], mine: int) -> Any:
    """SM_… in vmmap's words, as vm_map_region_walk and fill_procregioninfo decide."""
    first = chain[0]
    copied, large = members["needs_copy"], members["superpage"]
    for value in (copied, large, first.ref_count, first.contiguous):
        if isinstance(value, Unreadable):
            return value
    if large:
        return "large page"
    if first.contiguous:
        return "empty"
    if len(chain) > 1 or copied:
        return "copy on write"
    if first.ref_count == 1:
        return "private"
    if mine == first.ref_count:
        return "private aliased"
    if mine > 1:
        return "shared aliased"
    return "private" if first.external_pager is True and first.ref_count == 2 else "shared"
