"""What stands on one list of the kernel's and not on another: processes and kexts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.checks.finding import HIGH, MEDIUM, OUTSIDE, UNLISTED
from kvmtool.xnu.thread import threads

if TYPE_CHECKING:
    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case


def processes(case: Case, outcome: Outcome) -> None:
    """Each process is on allproc (or zombproc), and on every other list where it belongs.

    So is each thread: one that the kernel runs and no task has belongs to a task that is hidden.
    """
    outcome.count("processes", len(list(case.kvm.procs(outcome.report))))
    target = case.kvm.verified_target()
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
            if not kext.holds(pointer):
                where = f"{kext.name}: its {name} function"
                evidence = f"{pointer:#x} lies outside of the kext"
                code = case.kvm.code_at(pointer)
                outcome.add(OUTSIDE, HIGH, where, kext.kmod, code, f"code of {kext.name}", evidence)
    if not found:
        outcome.absent.append("no kext is loaded")
