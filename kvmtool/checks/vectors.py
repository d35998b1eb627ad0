"""The interrupt vectors: every gate leads to the kernel's own code, every vector is as linked.

Intel kernels have tables of gates: master_idt64, and master_idt in those of i386, which have both
where the processor knows 64 bits. Where a dump has the processors' registers, the table each of
them really uses is judged too. From 10.8 on that is most often the same page at another address
(MASTER_IDT_ALIAS, osfmk/mach/i386/vm_param.h), from 10.13.2 on one of user page tables as well.

Vectors of arm64 are code: sixteen times 128 bytes at ExceptionVectorsBase (osfmk/arm64/locore.s,
Arm ARM D1.10.2), where VBAR_EL1 points, or at a second mapping of the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.checks.code import Part
from kvmtool.checks.finding import HIGH, OTHER
from kvmtool.checks.pages import Comparison, file_of
from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.xnu.interrupts import ENTRIES, SIZE, gates, narrow_gates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case
    from kvmtool.xnu.interrupts import Gate

_VECTOR = 0x80  # bytes
_FROM = ("the kernel on SP_EL0", "the kernel", "64-bit processes", "32-bit processes")
_KINDS = ("synchronous exceptions", "interrupts", "fast interrupts", "system errors")
_VBAR = ("VBAR_EL1", "VBAR")  # as QEMU's stub has called it


def interrupts(case: Case, outcome: Outcome) -> None:
    """Each gate leads to the kernel's code, maybe by its second mapping; vectors are as linked."""
    arch = case.target.arch.name
    if arch == "arm64":
        _exception_vectors(case, outcome)
        return
    tables: dict[int | None, str] = {None: "the interrupt table"}
    if arch == "i386":
        _narrow(case, outcome)
        wide = case.target.symbols.get("_master_idt64")  # xnu-1228 (10.5) on
        tables = {wide.address: "the interrupt table of 64 bits"} if wide is not None else {}
    tables.update(_of_processors(case, outcome))
    for table, name in tables.items():
        try:
            of = name.removeprefix("the interrupt table")
            _judge(case, outcome, name, of, gates(case.target, table))
        except (UnsupportedError, NotFoundError) as error:
            outcome.absent.append(str(error))
            if isinstance(error, UnsupportedError):
                return
    if not outcome.looked and not outcome.unreadable and not outcome.absent:
        outcome.absent.append("no gate of the interrupt table is present")


def _narrow(case: Case, outcome: Outcome) -> None:
    try:
        _judge(case, outcome, "the interrupt table", "", narrow_gates(case.target))
    except NotFoundError as error:
        outcome.absent.append(str(error))


def _judge(case: Case, outcome: Outcome, name: str, of: str, found: Iterable[Gate]) -> None:
    for gate in found:
        where = f"interrupt vector {gate.number:#x}{of}"
        case.pointer(outcome, name, where, gate.address, gate.handler, start=False)


def _exception_vectors(case: Case, outcome: Outcome) -> None:
    """Each vector is as in the kernel's file, and the processors use these."""
    base = case.target.symbols.address("_ExceptionVectorsBase")
    _vbar(case, outcome, base)
    kernel = file_of(case, outcome)
    segment = None if kernel is None else kernel.segment_at(base - case.code.shift)
    if kernel is None or segment is None:
        return
    comparison = Comparison(case, outcome, kernel)
    offset = segment.fileoff + base - case.code.shift - segment.vmaddr
    for number in range(len(_FROM) * len(_KINDS)):
        place = f"the vector for {_KINDS[number % 4]} from {_FROM[number // 4]}"
        at = number * _VECTOR
        part = Part(place, base + at, base + at + _VECTOR, offset + at)
        for change in comparison.changes(part, "exception vectors")[0]:
            comparison.judge(change, place)


def _vbar(case: Case, outcome: Outcome, base: int) -> None:
    """What VBAR_EL1 of each processor points at, where the dump has it: the same vectors."""
    facts, size = case.kvm.facts, len(_FROM) * len(_KINDS) * _VECTOR
    for number, registers in enumerate(facts.control if facts is not None else ()):
        used = next((registers[name] for name in _VBAR if registers.get(name)), 0)
        if not used:
            continue
        there, own = _content(case, used, size), _content(case, base, size)
        if there is None or own is None:
            lost = used if there is None else base
            outcome.cannot_read("exception vectors", f"those of CPU {number} at {lost:#x}")
            continue
        outcome.count("exception vectors in use")
        if there != own:
            found = case.kvm.code_at(used)
            evidence = f"{used:#x} holds other vectors than those at {base:#x}"
            where = f"VBAR_EL1 of CPU {number}"
            outcome.add(OTHER, HIGH, where, None, found, "_ExceptionVectorsBase", evidence)


def _of_processors(case: Case, outcome: Outcome) -> Iterator[tuple[int, str]]:
    """The tables that processors use and that are not master_idt64 at another address."""
    facts, seen = case.kvm.facts, set()
    if facts is None or case.target.arch.name != "x86_64":
        return
    symbol = case.target.symbols.get("_master_idt64")
    master = _content(case, symbol.address, ENTRIES * SIZE) if symbol is not None else None
    for number, registers in enumerate(facts.control):
        table = registers.get("idtr")
        if not table or table in seen:
            continue
        seen.add(table)
        name = f"the interrupt table of CPU {number}"
        content = _content(case, table, ENTRIES * SIZE)
        if content is None:
            outcome.cannot_read("interrupt tables", f"that of CPU {number} at {table:#x}")
        elif content == master:
            outcome.count("interrupt tables in use")
        else:
            yield table, name


def _content(case: Case, table: int, size: int) -> bytes | None:
    try:
        return case.kvm.memory.read(table, size)
    except FaultError:
        return None
