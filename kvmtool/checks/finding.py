"""What a check says: findings, how much it looked at, and what it could not see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmtool.xnu.queues import Report

if TYPE_CHECKING:
    from kvmtool.kexts import Code

HIGH, MEDIUM, INFO = "high", "medium", "info"

# what a finding can be
OUTSIDE = "outside"  # a pointer to code leads to no code
HOOK = "hook"  # it leads to the code of another than the one it belongs to
MIDDLE = "middle"  # it leads into a function, not to its start
OTHER = "other"  # it leads to another function than its name says
UNLISTED = "unlisted"  # something stands on one list of the kernel's and not on another
DIFFERS = "differs"  # memory is not what the kernel's file says
EXPECTED = "expected"  # not as linked, but for a reason that is known


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be; of severity "info", one that has a known reason.

    `check` is the check's name, `kind` one of the words above. `where` names the place as a person
    would ("cdevsw[3].d_read"), `address` is where the pointer or the bytes lie (None for what has
    no place). `found` is what a pointer leads to; `evidence` says in words what was seen.
    """

    check: str
    kind: str
    severity: str
    where: str
    address: int | None
    found: Code | None
    expected: str
    evidence: str


@dataclass
class Outcome:
    """What one check did. `looked` counts what it looked at: {"pointers in sysent": 456}.

    `absent` says what is not there to be checked. The report's `stops`, `unreadable` and `failed`
    say what should be there and could not be read: the check is then not complete.
    """

    name: str
    looked: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    unreadable: dict[str, tuple[int, str]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        """`number` more of `what` were looked at."""
        self.looked[what] = self.looked.get(what, 0) + number

    def cannot_read(self, what: str, reason: str) -> None:
        """One of `what` could not be read; the first reason is kept."""
        number, first = self.unreadable.get(what, (0, reason))
        self.unreadable[what] = (number + 1, first)

    def add(
        self,
        kind: str,
        severity: str,
        where: str,
        address: int | None,
        found: Code | None,
        expected: str,
        evidence: str,
    ) -> None:
        """A finding of this check."""
        finding = Finding(self.name, kind, severity, where, address, found, expected, evidence)
        self.findings.append(finding)

    @property
    def incomplete(self) -> list[str]:
        """What could not be seen, in words."""
        unread = [
            f"{number} {what} cannot be read, the first: {reason}"
            for what, (number, reason) in self.unreadable.items()
        ]
        return [*self.failed, *self.report.stops, *unread]

    @property
    def alarming(self) -> list[Finding]:
        """The findings that have no known reason."""
        return [finding for finding in self.findings if finding.severity != INFO]
