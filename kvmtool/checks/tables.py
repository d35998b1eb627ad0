"""The tables that drivers and kexts add to: device switches, line disciplines, sysctl names.

What a kext has put there for itself is as it should be; a function of another owner among the
kernel's own is not. Source: bsd/sys/conf.h, bsd/kern/tty_conf.c, bsd/sys/sysctl.h, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.checks.code import KERNEL
from kvmtool.checks.finding import EXPECTED, INFO
from kvmtool.errors import FormatError
from kvmtool.xnu.devsw import devices as slots
from kvmtool.xnu.sysctl import oids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case

# what any driver may put into its slot: bsd/kern/subr_xxx.c, bsd/kern/bsd_stubs.c, tty.c
_STUBS = ("_enodev", "_enodev_strat", "_nulldev", "_eno_", "_nodev", "_seltrue", "_asc_")
_DISCIPLINES = 64  # bsd/kern/tty_conf.c has eight


def devices(case: Case, outcome: Outcome) -> None:
    """Each function of cdevsw, bdevsw and linesw lies in the code of the slot's own driver."""
    for device in slots(case.target):
        table = "cdevsw" if device.kind == "character" else "bdevsw"
        functions = {
            f"d_{name}": (at, device.functions[name]) for name, at in device.places.items()
        }
        _slot(case, outcome, table, f"{table}[{device.major}]", functions)
    _line_disciplines(case, outcome)


def _line_disciplines(case: Case, outcome: Outcome) -> None:
    target = case.target
    start, count = (target.symbols.get(name) for name in ("_linesw", "_nlinesw"))
    if start is None or count is None or not target.types.has("linesw"):
        outcome.absent.append("linesw: no symbol of that name")
        return
    number, size = target.integer(count.address), target.types.size("linesw")
    if not 0 <= number <= _DISCIPLINES:
        what = f"_nlinesw at {count.address:#x} is {number}, expected at most {_DISCIPLINES}"
        raise FormatError("linesw", None, what)
    for index in range(number):
        at = start.address + index * size
        members = target.types.struct("linesw").members.values()
        places = {member.name: at + member.offset for member in members}
        functions = {name: (place, case.read_pointer(place)) for name, place in places.items()}
        _slot(case, outcome, "linesw", f"linesw[{index}]", functions)


def _slot(
    case: Case, outcome: Outcome, table: str, where: str, functions: Mapping[str, tuple[int, Any]]
) -> None:
    """The functions of one slot: name -> (where the pointer lies, the pointer)."""
    driver = _driver(case, functions)
    owners = (KERNEL,) if driver in (None, KERNEL) else (KERNEL, driver)
    fine = [
        case.pointer(outcome, table, f"{where}.{name}", at, pointer, owners)
        for name, (at, pointer) in functions.items()
    ]
    if all(fine) and driver not in (None, KERNEL):
        at = next(iter(functions.values()))[0]
        evidence = f"kext {driver} answers for this slot"
        outcome.add(EXPECTED, INFO, where, at, None, f"kext {driver}", evidence)


def _driver(case: Case, functions: Mapping[str, tuple[int, Any]]) -> str | None:
    """Whose slot it is: the kernel's where it was linked with a driver, else who took it.

    That is the owner of its open, or of the first function that is no stub.
    """
    for at, _ in functions.values():
        linked = case.linked(at)
        if linked and case.code.code_owner(linked) == KERNEL and not _stub(case, linked):
            return KERNEL
    for _, pointer in functions.values():
        owner = case.code.code_owner(pointer) if isinstance(pointer, int) and pointer else None
        if owner is None:
            continue
        if owner != KERNEL or not _stub(case, pointer):
            return owner
    return None


def _stub(case: Case, pointer: int) -> bool:
    found = case.kvm.symbols.at(pointer)
    return found is not None and found[0].name.startswith(_STUBS)


def sysctl(case: Case, outcome: Outcome) -> None:
    """Each sysctl's handler lies in the code of the one whose sysctl it is."""
    for oid in oids(case.target, outcome.report):
        owner = case.code.owner(oid.address)  # of one in the heap nobody can tell
        owners = None if owner is None else (KERNEL, owner)
        case.pointer(outcome, "the sysctl tree", oid.name, oid.handler_at, oid.handler, owners)
    if not outcome.looked:
        outcome.absent.append("the sysctl tree has no names")
