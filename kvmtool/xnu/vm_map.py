"""Address maps as the kernel chains them: where they are, and their entries one after the other.

Source: osfmk/vm/vm_map.h (struct _vm_map, vm_map_header, vm_map_links, vm_map_entry, VME_OBJECT,
VME_OFFSET, VME_ALIAS), osfmk/kern/task.h (map), xnu-792..11417.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FormatError, NotFoundError, UnsupportedError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu import named
from kvmtool.xnu.members import Members
from kvmtool.xnu.queues import Report
from kvmtool.xnu.vm_object import kernel_object, unpack

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kvmtool.target import Target
    from kvmtool.xnu.proc import Proc

LIMIT = 1 << 20  # entries of one map
_PAGE = 4096  # VME_OFFSET_SHIFT, and what VME_ALIAS takes of the offset, is 12 everywhere
FLAGS = {
    "needs_copy": ("needs_copy",),
    "is_shared": ("is_shared",),
    "in_transition": ("in_transition",),
    "permanent": ("vme_permanent", "permanent"),
    "no_cache": ("no_cache",),
    "superpage": ("superpage_size",),
    "jit": ("used_for_jit",),
    "tpro": ("used_for_tpro",),
    "zero_wired": ("zero_wired_pages",),
    "iokit_acct": ("iokit_acct",),
    "atomic": ("vme_atomic",),
    "resilient_codesign": ("vme_resilient_codesign",),
    "resilient_media": ("vme_resilient_media",),
    "no_copy_on_read": ("vme_no_copy_on_read",),
    "translated": ("translated_allow_execute",),
    "use_pmap": ("use_pmap",),
}
_ENTRY: dict[str, tuple[str, *tuple[str, ...]]] = {
    "protection": ("I", "protection"),
    "max_protection": ("I", "max_protection"),
    "inheritance": ("I", "inheritance"),
    "behavior": ("I", "behavior"),
    "wired_count": ("H", "wired_count"),
    "user_wired_count": ("H", "user_wired_count"),
    "is_sub_map": ("I", "is_sub_map"),
    "kernel_object": ("I", "vme_kernel_object"),
    "submap": ("I", "vme_submap"),
    "packed": ("I", "vme_object_or_delta"),  # 32 bits, from 12.3 on
    "object": ("P", "vme_object.vmo_object", "object.vm_object", "vme_object", "object"),
    "offset": ("Q", "vme_offset", "offset"),
    "alias": ("I", "vme_alias", "alias"),
}
_LINKS: dict[str, tuple[str, *tuple[str, ...]]] = {
    "prev": ("P", "prev"),
    "next": ("P", "next"),
    "start": ("Q", "start"),
    "end": ("Q", "end"),
}
_HEADER: dict[str, tuple[str, *tuple[str, ...]]] = {
    "nentries": ("i", "nentries"),
    "page_shift": ("H", "page_shift"),
}


class Map(NamedTuple):
    """An address map: where its struct _vm_map lies, its bounds, how many entries it says it has.

    `name` is for people; `kernel` says that its tags are the kernel's.
    """

    address: int
    header: int
    start: Any
    end: Any
    nentries: Any
    name: str
    kernel: bool = False


class RawEntry(NamedTuple):
    """One struct vm_map_entry at `address`: [start, end) and what it leads to.

    `leads` is the address of the object, or of the submap if `is_submap`; 0 for neither; `offset`
    in bytes. `members` has the rest by its names. Any of them may be `Unreadable`.
    """

    address: int
    start: Any
    end: Any
    leads: Any
    is_submap: Any
    offset: Any
    tag: Any
    members: dict[str, Any]


class MapReader:
    """Finds and walks the address maps of one kernel."""

    def __init__(self, target: Target, report: Report | None = None) -> None:
        """Compiles what this kernel has of map entries; walks that stop go into `report`."""
        self.target = target
        self.report = report if report is not None else Report()
        self._links = Members(target, "vm_map_links", _LINKS)
        self._header = Members(target, "vm_map_header", _HEADER)
        self._packed = target.types.has("vm_map_entry", "vme_object_value")
        wanted: dict[str, tuple[str, *tuple[str, ...]]] = {
            **_ENTRY,
            **{name: ("B", *members) for name, members in FLAGS.items()},
        }
        if self._packed:
            wanted["packed"] = ("I", "vme_object_or_delta", "vme_object")
        self._entry = Members(target, "vm_map_entry", wanted)
        self._kernel_object = kernel_object(target)

    def of_kernel(self) -> Map:
        """The kernel's own map. Raises `NotFoundError`, `FaultError`, as `at`."""
        address = self.target.variable("_kernel_map")
        if address is None:
            raise NotFoundError("symbol", "_kernel_map", hint=self.target.symbols.hint)
        return self.at(address, "the kernel", kernel=True)

    def of_process(self, proc: Proc) -> Map:
        """The map of a process. Raises `UnsupportedError` for one without (a zombie); as `at`."""
        if proc.task is None:
            raise UnsupportedError(f"process {proc.pid} has no address space: it is a zombie")
        if isinstance(proc.task, Unreadable):
            why = proc.task.reason
            raise UnsupportedError(f"the task of process {proc.pid} cannot be read: {why}")
        types = self.target.types
        address = self.target.pointer(proc.task + types.offset("task", "map"))
        if not address:
            raise UnsupportedError(f"process {proc.pid} has no address space: its map is null")
        kernel = address == named.pointer(self.target, "_kernel_map")
        return self.at(address, f"process {proc.pid}", kernel=kernel)

    def at(self, address: int, name: str, *, kernel: bool = False) -> Map:
        """The map whose struct _vm_map lies at `address`.

        Raises `FaultError`, and `FormatError` for what is no map: its entries must be a ring.
        """
        header = self._header_of(address, name)
        return Map(address, header, *self._bounds(header), name, kernel)

    def _header_of(self, address: int, name: str) -> int:
        """Where the map's header lies: after its lock, whose size 10.4's headers do not tell."""
        width = self.target.arch.pointer_size
        known = offset_of(self.target.types, "_vm_map", "hdr")
        places = [known] if known is not None else range(width, 16 * width, width)
        for place in places:
            if self._is_header(address + place, known is None):
                return address + place
        raise FormatError(
            f"map of {name}", None, f"no ring of entries at {address:#x}, expected a vm_map"
        )

    def _is_header(self, header: int, sure: bool) -> bool:
        """Whether the entries at both ends lead back to the header. Raises `FaultError`.

        Unless it must be `sure`, one end is enough, and of a map whose entries are not there that
        it looks like one.
        """
        width, pointer = self.target.arch.pointer_size, self.target.pointer
        last, first = pointer(header), pointer(header + width)
        ends = [guarded(partial(pointer, at)) for at in (first, last + width)]
        if sure:
            return ends == [header, header]
        if header in ends:
            return True
        if not any(isinstance(end, Unreadable) for end in ends):
            return False
        start, end, count = self._bounds(header)
        if not all(isinstance(value, int) for value in (start, end, count)):
            return False
        return start < end and 0 < count <= LIMIT and not (first | last) % width

    def _bounds(self, header: int) -> tuple[Any, Any, Any]:
        links = self._links.read(header)
        return links["start"], links["end"], self._header.read(header)["nentries"]

    def walk(self, where: Map) -> Iterator[RawEntry]:
        """Every entry of a map in its order, which is that of addresses.

        Where the chain is torn, what leads there from its other end follows; `report` says so.
        """
        name = f"map of {where.name}"
        seen: dict[int, Any] = {}
        torn = yield from self._one_way(where, "next", seen)
        if torn is not None:
            self.report.stop(name, len(seen), torn)
            edge = max((end for end in seen.values() if isinstance(end, int)), default=0)
            yield from reversed(list(self._one_way(where, "prev", seen, edge)))
        if isinstance(where.nentries, int) and where.nentries != len(seen):
            self.report.notes.append(f"{name}: {len(seen)} entries, expected {where.nentries}")

    def _one_way(
        self, where: Map, way: str, seen: dict[int, Any], low: int = 0
    ) -> Generator[RawEntry, None, str | None]:
        """The entries from the header on, each with its end into `seen`; gives why it ended early.

        An entry must not begin before the last one ended (nor below `low`), nor end before it
        begins, nor be in `seen` already.
        """
        forward = way == "next"
        at, edge = self._links.read(where.header)[way], None
        while at != where.header:
            if (why := self._wrong(at, seen)) is not None:
                return why
            links = self._links.read(at)
            start, end = links["start"], links["end"]
            if isinstance(start, int) and isinstance(end, int):
                fits = edge is None or (start >= edge if forward else end <= edge)
                if not low <= start < end or not fits:
                    return f"entry {at:#x} is {start:#x} to {end:#x}, next to {edge or 0:#x}"
                edge = end if forward else start
            seen[at] = end
            yield self._raw(at, start, end)
            at = links[way]
        return None

    def _wrong(self, at: Any, seen: dict[int, Any]) -> str | None:
        if isinstance(at, Unreadable):
            return f"the link is {at.reason}"
        if not at:
            return "the link is null"
        if at in seen:
            return f"{at:#x} was met before (the list runs in a circle)"
        return f"more than {LIMIT} entries" if len(seen) >= LIMIT else None

    def _raw(self, address: int, start: Any, end: Any) -> RawEntry:
        members = self._entry.read(address)
        below = members["is_sub_map"]
        leads = below if isinstance(below, Unreadable) else self._object(members)
        offset, tag = self._offset(members), self._tag(members)
        return RawEntry(address, start, end, leads, below, offset, tag, members)

    def _object(self, record: dict[str, Any]) -> Any:
        """VME_OBJECT: the address of the object, or of the submap; 0 for none."""
        if not self._packed:
            return record["object"]
        for field in ("is_sub_map", "kernel_object", "packed"):
            if isinstance(record[field], Unreadable):
                return record[field]
        if record["is_sub_map"]:
            return self.target.strip(record["submap"] << 2)
        if record["kernel_object"]:
            return self._kernel_object
        return unpack(self.target, record["packed"])

    def _offset(self, record: dict[str, Any]) -> Any:
        """VME_OFFSET, in bytes: from 10.11 on the low 12 bits are something else."""
        offset = record["offset"]
        if not isinstance(offset, int):
            return offset
        if self._packed:
            return offset * _PAGE
        return offset - offset % _PAGE if record["alias"] is None else offset

    def _tag(self, record: dict[str, Any]) -> Any:
        """VME_ALIAS: a member of its own, but from 10.11 to 12.0 the low bits of the offset."""
        if record["alias"] is not None:
            return record["alias"]
        offset = record["offset"]
        return offset % _PAGE if isinstance(offset, int) else offset
