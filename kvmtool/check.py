"""Is this kernel as its makers left it? The checks of `kvmtool check`.

Each check looks at one kind of thing a rootkit changes, or a kext that is not careful: tables of
functions, lists, code. What it finds has its evidence with it, and what it could not see is said.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from kvmtool import progress
from kvmtool.checks.finding import Finding, Outcome
from kvmtool.checks.judge import Case
from kvmtool.errors import FaultError, FormatError, MismatchError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtool.kvm import Kvm

__all__ = ["CHECKS", "Check", "Finding", "Outcome", "check"]


class Check(NamedTuple):
    """A check: its function is called as it is, in `module` of `kvmtool.checks`."""

    module: str
    what: str


CHECKS = {
    "syscalls": Check("calls", "the handlers of sysent, by owner and by name"),
    "traps": Check("calls", "the handlers of mach_trap_table"),
    "devices": Check("tables", "the functions of cdevsw, bdevsw and linesw"),
    "sysctl": Check("tables", "the handlers of the sysctl tree"),
    "filesystems": Check("filesystems", "vfsops and vnode operations, and who uses which"),
    "protocols": Check("networks", "the functions of domains, protocols and their requests"),
    "policies": Check("networks", "the hooks of mandatory access control policies"),
    "interrupts": Check("vectors", "the gates of the interrupt tables, or arm64's vectors"),
    "imports": Check("imports", "the tables by which kexts and the kernel reach other images"),
    "text": Check("pages", "the kernel's code in memory against its file"),
    "kextcode": Check("kext_code", "the code of kexts in memory against their files"),
    "processes": Check("lists", "processes that are on one list and not on another"),
    "kexts": Check("lists", "kexts that are on one list and not on another"),
}


def check(kvm: Kvm, names: Iterable[str] = ()) -> Iterator[Outcome]:
    """Make the checks of these names, by default all, in the order of `CHECKS`; one outcome each.

    What a kernel does not have is in an outcome's `absent`, what cannot be read in its
    `incomplete`. Raises `UnsupportedError` for a kernel file alone, and what `Kvm.nearest_target`
    raises; KeyError for a name that is no check's.
    """
    wanted = set(names) or set(CHECKS)
    if unknown := wanted - set(CHECKS):
        raise KeyError(unknown.pop())
    case = Case(kvm)
    case.target  # noqa: B018  without it no check could be made
    ordered = [name for name in CHECKS if name in wanted]
    for number, name in enumerate(ordered):
        progress.step("checking", number, len(ordered), "checks")
        module = import_module(f"kvmtool.checks.{CHECKS[name].module}")
        yield _made(getattr(module, name), case, Outcome(name))
    progress.end("checking")


def _made(function: Callable[[Case, Outcome], None], case: Case, outcome: Outcome) -> Outcome:
    try:
        function(case, outcome)
    except NotFoundError as missing:
        outcome.absent.append(str(missing))
    except (FaultError, FormatError, MismatchError) as error:
        outcome.failed.append(str(error))
    return outcome
