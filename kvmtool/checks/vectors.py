"""The interrupt vectors: every gate leads to the kernel's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import UnsupportedError
from kvmtool.xnu.interrupts import gates

if TYPE_CHECKING:
    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case


def interrupts(case: Case, outcome: Outcome) -> None:
    """Each gate of the interrupt table leads to the kernel's code, maybe by its second mapping."""
    try:
        for gate in gates(case.target):
            where = f"interrupt vector {gate.number:#x}"
            case.pointer(
                outcome, "the interrupt table", where, gate.address, gate.handler, start=False
            )
    except UnsupportedError as error:
        outcome.absent.append(str(error))
        return
    if not outcome.looked and not outcome.unreadable:
        outcome.absent.append("no gate of the interrupt table is present")
