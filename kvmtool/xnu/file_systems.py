"""The file systems a kernel knows, and the functions that answer for their vnodes.

Source: bsd/sys/mount_internal.h (vfstable), bsd/sys/mount.h (vfsops), bsd/sys/vnode_if.h
(vnodeop_desc, vnodeopv_desc), bsd/vfs/vfs_init.c (vfs_opv_init), bsd/vfs/kpi_vfs.c (vfs_fsadd),
xnu-792..11417. Every vector of vnode operations has vfs_opv_numops pointers, in the order of
vfs_op_descs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, FormatError, NotFoundError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import guarded
from kvmtool.xnu.queues import Report, walk_list, walk_tail_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

_OPERATIONS = 512  # of a vnode; macOS 15 has some 70
_VECTORS = 256  # of file systems linked into the kernel
_SYSTEMS = 256
_NAME = 64  # bytes
_TYPE_NAME = 15  # MFSNAMELEN
VNODE_LISTS = ("mnt_vnodelist", "mnt_workerqueue", "mnt_newvnodes")


@dataclass(frozen=True, slots=True)
class FileSystem:
    """An entry of vfstbllist: `name` ("hfs"), its vfsops, the vectors it brought with it.

    `operations` maps "vfs_mount" and so on to (where the pointer lies, the pointer). `vectors` are
    the addresses of the vectors of a file system that a kext added. Any may be `Unreadable`.
    """

    address: int
    name: Any
    vfsops: Any
    operations: dict[str, tuple[int, Any]]
    vectors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector of vnode operations at `address`, kept in the kernel's variable at `variable`."""

    address: int
    variable: int


def operation_names(target: Target) -> list[str]:
    """The names of the vnode operations in the order of every vector ("vnop_lookup").

    Raises `NotFoundError` for a kernel without vfs_opv_numops, `FaultError`, `FormatError`.
    """
    count = _symbol(target, "_vfs_opv_numops")
    number = target.integer(count)
    if not 0 <= number <= _OPERATIONS:
        what = f"at {count:#x} is {number}, expected at most {_OPERATIONS}"
        raise FormatError("vfs_opv_numops", None, what)
    names = [f"[{index}]" for index in range(number)]
    table = target.symbols.get("_vfs_op_descs")
    size = target.arch.pointer_size
    for index in range(number if table is not None else 0):
        assert table is not None
        try:
            description = target.pointer(table.address + index * size)
            if not description:
                break
            at = target.integer(description)  # vdesc_offset; vdesc_name follows
            text = target.text(target.pointer(description + size), _NAME)
        except FaultError:
            continue
        if 0 <= at < number and text.isidentifier():
            names[at] = text
    return names


def vectors(target: Target, report: Report | None = None) -> Iterator[Vector]:
    """The vectors of the file systems that are linked into the kernel; those not made yet are left.

    What could not be read goes into `report`. Raises `NotFoundError` for a kernel without
    vfs_opv_descs.
    """
    report = report if report is not None else Report()
    table, size = _symbol(target, "_vfs_opv_descs"), target.arch.pointer_size
    for number in range(_VECTORS):
        try:
            description = target.pointer(table + number * size)
            if not description:
                return
            variable = target.pointer(description)  # opv_desc_vector_p comes first
            vector = target.pointer(variable)
        except FaultError as fault:
            text = f"{fault.reason} at {fault.address:#x}"
            if fault.address == table + number * size:  # where the table ends is not known then
                report.stop("vfs_opv_descs", number, text)
                return
            report.stops.append(f"vfs_opv_descs[{number}] cannot be read: {text}")
            continue
        if vector:
            yield Vector(vector, variable)
    report.stop("vfs_opv_descs", _VECTORS, f"more than {_VECTORS} entries")


def file_systems(target: Target, report: Report | None = None) -> Iterator[FileSystem]:
    """Every entry of the list at vfsconf. Raises `NotFoundError` for a kernel without the symbol.

    Where the walk stopped goes into `report`.
    """
    report = report if report is not None else Report()
    head, types = _symbol(target, "_vfsconf"), target.types
    record = Record(
        target,
        {
            "vfsops": (types.offset("vfstable", "vfc_vfsops"), "P"),
            "name": (types.offset("vfstable", "vfc_name"), f"{_TYPE_NAME}s"),
            "vectors": (offset_of(types, "vfstable", "vfc_descptr"), "P"),
            "size": (offset_of(types, "vfstable", "vfc_descsize"), "i"),
        },
    )
    link = types.offset("vfstable", "vfc_next")
    members = [
        (member.name, member.offset)
        for member in types.struct("vfsops").members.values()
        if "reserved" not in member.name
    ]
    for at in walk_list(target, head, link, "vfsconf", report, _SYSTEMS):
        raw = record.read(at)
        vfsops = raw["vfsops"]
        operations = (
            {name: (vfsops + offset, _pointer(target, vfsops + offset)) for name, offset in members}
            if isinstance(vfsops, int) and vfsops
            else {}
        )
        name = raw["name"]
        text = name.split(b"\0")[0].decode("utf-8", "replace") if isinstance(name, bytes) else name
        yield FileSystem(at, text, vfsops, operations, _added(target, raw["vectors"], raw["size"]))


def _added(target: Target, start: Any, size: Any) -> tuple[int, ...]:
    """The vectors of one block of them, as vfs_fsadd() allocates it."""
    if not (isinstance(start, int) and isinstance(size, int)) or not start or size <= 0:
        return ()
    try:
        each = target.integer(_symbol(target, "_vfs_opv_numops")) * target.arch.pointer_size
    except FaultError:
        return ()
    many = size // each if each > 0 else 0
    return tuple(start + number * each for number in range(min(many, _VECTORS)))


def vectors_in_use(target: Target, mounts: Iterator[int], report: Report) -> dict[int, list[int]]:
    """Vector → (how many vnodes of these mounts use it, the first of them).

    `mounts` are addresses of struct mount. Where walks stopped goes into `report`; vnodes that
    cannot be read count under 0.
    """
    types = target.types
    at = types.offset("vnode", "v_op")
    link = offset_of(types, "vnode", "v_mntvnodes.tqe_next", "v_mntvnodes") or 0
    found: dict[int, list[int]] = {}
    for mount in mounts:
        for name in VNODE_LISTS:
            inside = offset_of(types, "mount", name)
            if inside is None:
                continue
            for vnode in walk_tail_queue(target, mount + inside, link, name, report):
                vector = _pointer(target, vnode + at)
                seen = found.setdefault(vector if isinstance(vector, int) else 0, [0, vnode])
                seen[0] += 1
    return found


def _pointer(target: Target, at: int) -> Any:
    return guarded(lambda: target.pointer(at))


def _symbol(target: Target, name: str) -> int:
    found = target.symbols.get(name)
    if found is None:
        raise NotFoundError("symbol", name, hint=target.symbols.hint or "it may be stripped")
    return found.address
