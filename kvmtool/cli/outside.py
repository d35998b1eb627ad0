"""Pointers that lead to no code the kernel is known to have: whether that can be told.

Where the kernel's lists of kexts could not be read to their ends, such a pointer may lead into a
kext that nobody knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.cli.render import Named
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.kvm import Kvm
    from kvmtool.xnu.queues import Report


def missing_kexts(kvm: Kvm, report: Report) -> Unreadable | None:
    """Why not every kext is known, which then goes into `report`; None if they are."""
    from kvmtool.xnu.queues import Report

    own = Report()
    unplaced = [kext for kext in kvm.loaded_kexts(own) if not isinstance(kext.address, int)]
    own.stops += [f"kexts: where one of them lies is {kext.address.reason}" for kext in unplaced]
    report.stops += [stop for stop in own.stops if stop not in report.stops]
    return Unreadable(own.stops[0]) if own.stops else None


def settled(
    kvm: Kvm, rows: Iterable[dict[str, Any]], report: Report, *derived: str
) -> Iterator[dict[str, Any]]:
    """The rows; what is said to lie outside is not known to, if kexts are missing.

    "outside" is `Unreadable` then, and so are the cells `derived` from it.
    """
    asked, missing = False, None
    for row in rows:
        if row["outside"] and not asked:
            asked, missing = True, missing_kexts(kvm, report)
        if row["outside"] and missing is not None:
            for name, value in row.items():
                if isinstance(value, Named) and value.text.startswith(f"{value:#x} "):
                    row[name] = Named(value, f"{value:#x}")
            row.update(dict.fromkeys(("outside", *derived), missing))
        yield row
