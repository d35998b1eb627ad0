"""The interrupt vectors: every gate leads to the kernel's own code.

The kernel's own table is master_idt64; where a dump has the processors' registers, the table each
of them really uses is judged too. From 10.8 on that is most often the same page at another address
(MASTER_IDT_ALIAS, osfmk/mach/i386/vm_param.h), from 10.13.2 on one of user page tables as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.errors import FaultError, NotFoundError, UnsupportedError
from kvmtool.xnu.interrupts import ENTRIES, SIZE, gates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.checks.finding import Outcome
    from kvmtool.checks.judge import Case


def interrupts(case: Case, outcome: Outcome) -> None:
    """Each gate of the interrupt tables leads to the kernel's code, maybe by its second mapping."""
    tables: dict[int | None, str] = {None: "the interrupt table"}
    tables.update(_of_processors(case, outcome))
    for table, name in tables.items():
        try:
            for gate in gates(case.target, table):
                where = f"interrupt vector {gate.number:#x}"
                if table is not None:
                    where += f" of {name.removeprefix('the interrupt table of ')}"
                case.pointer(outcome, name, where, gate.address, gate.handler, start=False)
        except UnsupportedError as error:
            outcome.absent.append(str(error))
            return
        except NotFoundError as error:
            outcome.absent.append(str(error))
    if not outcome.looked and not outcome.unreadable and not outcome.absent:
        outcome.absent.append("no gate of the interrupt table is present")


def _of_processors(case: Case, outcome: Outcome) -> Iterator[tuple[int, str]]:
    """The tables that processors use and that are not master_idt64 at another address."""
    facts, seen = case.kvm.facts, set()
    if facts is None or case.target.arch.name != "x86_64":
        return
    symbol = case.target.symbols.get("_master_idt64")
    master = _content(case, symbol.address) if symbol is not None else None
    for number, registers in enumerate(facts.control):
        table = registers.get("idtr")
        if not table or table in seen:
            continue
        seen.add(table)
        name = f"the interrupt table of CPU {number}"
        content = _content(case, table)
        if content is None:
            outcome.cannot_read("interrupt tables", f"that of CPU {number} at {table:#x}")
        elif content == master:
            outcome.count("interrupt tables in use")
        else:
            yield table, name


def _content(case: Case, table: int) -> bytes | None:
    try:
        return case.kvm.memory.read(table, ENTRIES * SIZE)
    except FaultError:
        return None
