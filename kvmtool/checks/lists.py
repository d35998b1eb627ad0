"""What stands on one list of the kernel's and not on another: processes and kexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.checks.finding import HIGH, MEDIUM, OUTSIDE, UNLISTED
from kvmtool.errors import FaultError
from kvmtool.target import offset_of
from kvmtool.xnu.queues import Report, walk_list
from kvmtool.xnu.thread import threads

if TYPE_CHECKING:
    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.target import Target

_BUCKETS = 1 << 20


def processes(case: Case, outcome: Outcome) -> None:
    """Each process is on allproc (or zombproc), and on every other list where it belongs.

    So is each thread: one that the kernel runs and no task has belongs to a task that is hidden.
    """
    known = {proc.address for proc in case.kvm.procs(outcome.report)}
    outcome.count("processes", len(known))
    target = case.kvm.verified_target()
    _members(target, outcome, known)
    outcome.count("threads", len(list(threads(target, outcome.report))))
    outcome.report.stops[:] = dict.fromkeys(outcome.report.stops)  # both walked the tasks
    for difference in outcome.report.differences:
        hidden = "allproc" in difference.missing
        expected = f"on {' or '.join(difference.missing)}, too"
        outcome.add(
            UNLISTED,
            HIGH if hidden else MEDIUM,
            difference.subject,
            difference.address,
            None,
            expected,
            difference.text,
        )


def _members(target: Target, outcome: Outcome, known: set[int]) -> None:
    """Each member of a process group is among the `known` processes (proc_internal.h, pgrp).

    Where the lists that make these known are torn, nobody is missed.
    """
    types, size = target.types, target.arch.pointer_size
    link, members = (offset_of(types, "pgrp", name) for name in ("pg_hash", "pg_members"))
    beside = offset_of(types, "proc", "p_pglist")
    try:
        first, mask = target.variable("_pgrphashtbl"), target.variable("_pgrphash")
    except FaultError as fault:
        outcome.failed.append(f"pgrphashtbl: {fault.reason} at {fault.address:#x}")
        return
    if None in (link, members, beside) or not first or mask is None or mask >= _BUCKETS:
        outcome.absent.append("process groups: no table of them is known")
        return
    assert link is not None
    assert members is not None
    assert beside is not None
    torn, walks = outcome.report.partial, Report()
    for head in range(first, first + (mask + 1) * size, size):
        for group in walk_list(target, head, link, "pgrphash", walks):
            for proc in walk_list(target, group + members, beside, "pg_members", walks):
                outcome.count("members of process groups")
                if proc not in known and not torn:
                    who = f"process at {proc:#x}"
                    text = f"{who} is a member of the group at {group:#x}, but on no list"
                    outcome.add(UNLISTED, HIGH, who, proc, None, "on allproc or zombproc", text)
    if walks.stops:
        number, stop = len(walks.stops), walks.stops[0]
        outcome.failed.append(f"process groups: {number} walks stopped, the first: {stop}")


def kexts(case: Case, outcome: Outcome) -> None:
    """Each kext is in the kmod list and in the summaries, alike, and starts and stops in itself."""
    found = case.kvm.loaded_kexts(outcome.report)
    outcome.count("kexts", len(found))
    for difference in outcome.report.differences:
        outcome.add(
            UNLISTED,
            HIGH if difference.missing else MEDIUM,
            difference.subject,
            difference.address,
            None,
            "alike in the kmod list and the kext summaries",
            difference.text,
        )
    for kext in found:
        for name, pointer in (("start", kext.start), ("stop", kext.stop)):
            if not isinstance(pointer, int) or not pointer:
                continue
            outcome.count("pointers in kmod_info")
            if not kext.holds(pointer) and case.code.code_owner(pointer) != kext.name:
                where = f"{kext.name}: its {name} function"
                evidence = f"{pointer:#x} lies outside of the kext"
                code = case.kvm.code_at(pointer)
                outcome.add(OUTSIDE, HIGH, where, kext.kmod, code, f"code of {kext.name}", evidence)
    if not found:
        outcome.absent.append("no kext is loaded")
