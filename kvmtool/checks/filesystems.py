"""The functions behind files: vnode operations and those of whole file systems.

A vector of vnode operations that no file system registered, but that vnodes use, is how files are
hidden without touching a registered one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.checks.code import KERNEL
from kvmtool.checks.finding import HIGH, OTHER
from kvmtool.errors import MismatchError
from kvmtool.unreadable import Unreadable
from kvmtool.xnu import file_systems as known
from kvmtool.xnu.mount import MountReader
from kvmtool.xnu.queues import walk_tail_queue

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.target import Target


def filesystems(case: Case, outcome: Outcome) -> None:
    """Each function of vfsops and of the vnode operations lies in its own file system's code."""
    target = case.target
    names = known.operation_names(target)
    if not names:
        outcome.absent.append("vfs_opv_numops is 0")
        return
    owners: dict[int, tuple[str, Collection[str] | None]] = {}
    for vector in known.vectors(target, outcome.report):
        place = case.kvm.symbol_at(vector.variable)
        name = str(place).lstrip("_") if place is not None else f"vector at {vector.address:#x}"
        owners[vector.address] = name, (KERNEL,)
    registered = _vfsops(case, outcome, owners)
    _unregistered(case, outcome, owners, registered)
    for address, (name, allowed) in owners.items():
        _judge(case, outcome, address, name, allowed, names)


def _vfsops(
    case: Case, outcome: Outcome, owners: dict[int, tuple[str, Collection[str] | None]]
) -> bool:
    """Judge each vfsops, add the vectors of kexts to `owners`; whether those are all there are."""
    for system in known.file_systems(case.target, outcome.report):
        if isinstance(system.vfsops, Unreadable):
            outcome.cannot_read("vfsops", system.vfsops.reason)
            continue
        owner = case.code.owner(system.vfsops)
        allowed = None if owner is None else {KERNEL, owner}
        for name, (at, pointer) in system.operations.items():
            case.pointer(outcome, "vfsops", f"{system.name}: {name}", at, pointer, allowed)
        for number, vector in enumerate(system.vectors):
            owners[vector] = f"{system.name} vector {number}", allowed
    return case.target.types.has("vfstable", "vfc_descptr") and not outcome.incomplete


def _unregistered(
    case: Case,
    outcome: Outcome,
    owners: dict[int, tuple[str, Collection[str] | None]],
    complete: bool,
) -> None:
    """What vnodes use that nobody registered; where types tell too little, only judge it."""
    try:
        target = case.kvm.verified_target()
    except MismatchError as error:
        outcome.failed.append(str(error))
        return
    used = known.vectors_in_use(target, _mounts(target, outcome), outcome.report)
    for vector, (count, first) in used.items():
        outcome.count("vnodes", count)
        if not vector:
            outcome.cannot_read("v_op of vnodes", f"vnode at {first:#x}")
            continue
        if vector in owners:
            continue
        if complete:
            where = f"v_op of vnode {first:#x}" + (f" and {count - 1} more" if count > 1 else "")
            evidence = f"vectors at {vector:#x} are no registered file system's"
            at = first + target.types.offset("vnode", "v_op")
            outcome.add(OTHER, HIGH, where, at, None, "a registered vector", evidence)
        owners[vector] = f"vector at {vector:#x}", None


def _mounts(target: Target, outcome: Outcome) -> Iterator[int]:
    head = target.symbols.get("_mountlist")
    if head is not None:
        link = MountReader(target).link
        yield from walk_tail_queue(target, head.address, link, "mountlist", outcome.report)


def _judge(
    case: Case,
    outcome: Outcome,
    address: int,
    name: str,
    allowed: Collection[str] | None,
    names: list[str],
) -> None:
    size = case.target.arch.pointer_size
    for index, operation in enumerate(names):
        at = address + index * size
        where = f"{name}: {operation}"
        case.pointer(outcome, "vnode operations", where, at, case.read_pointer(at), allowed)
