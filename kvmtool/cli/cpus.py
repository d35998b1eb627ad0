"""cpus: the processors, and what each was doing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Address, Column, Named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.cpu import Cpu
    from kvmtool.xnu.queues import Report

LISTING = Listing(
    "cpus",
    "processors",
    (
        Column("cpu", "CPU", "number"),
        Column("state", "STATE"),
        Column("idle", "IDLE"),
        Column("pid", "PID", "number"),
        Column("command", "COMMAND"),
        Column("tid", "TID", "number"),
        Column("active_thread", "THREAD", "address"),
        Column("idle_thread", "IDLE THREAD", "address"),
        Column("next_thread", "NEXT THREAD", "address"),
        Column("current_pri", "PRI", "number"),
        Column("pc", "PC"),
        Column("registers", "REGISTERS"),
        Column("interrupts", "INTERRUPTS", "number"),
        Column("interrupt_level", "INTLEVEL", "number"),
        Column("preemption_level", "PREEMPTION", "number"),
        Column("signals", "SIGNALS", "address"),
        Column("pending_ast", "AST", "address"),
        Column("running", "RUNNING", "number"),
        Column("int_state", "INT STATE", "address"),
        Column("int_stack_top", "INT STACK", "address"),
        Column("cpu_data", "CPU DATA", "address"),
        Column("processor_set", "PSET", "address"),
        Column("address", "PROCESSOR", "address"),
    ),
    (
        *("cpu", "state", "pid", "command", "tid", "active_thread", "current_pri", "pc"),
        *("interrupts", "address"),
    ),
)
_STORED = tuple(c.name for c in LISTING.columns if c.name not in ("pc", "registers"))


def row_of(kvm: Kvm, cpu: Cpu, registers: dict[str, int] | None) -> dict[str, Any]:
    """A processor under the names that -o and JSON have; `registers` are those of the container."""
    row = {name: getattr(cpu, name) for name in _STORED}
    pc = (registers or {}).get(kvm.arch.pc)
    return {
        **row,
        "pc": None if pc is None else Named(pc, str(kvm.code_at(pc))),
        "registers": registers and {name: Address(n) for name, n in registers.items()},
    }


def _rows(kvm: Kvm, report: Report) -> Iterator[dict[str, Any]]:
    from kvmtool.stacks import Stacks
    from kvmtool.xnu.cpu import cpus as walk

    facts, arch = kvm.facts, kvm.arch
    sets = facts.threads if facts is not None else ()
    stacks = Stacks(kvm) if sets else None
    for cpu in walk(kvm.verified_target(), report):
        thread = cpu.active_thread
        place = stacks.place_of(thread) if stacks and isinstance(thread, int) else None
        found: dict[str, int] = {}
        for flavor, data in sets[place].states if place is not None else ():
            found |= arch.registers(flavor, data)
        row = row_of(kvm, cpu, found or None)
        if not found and stacks is not None:  # whose registers those in the dump are
            row.update(dict.fromkeys(("pc", "registers"), stacks.unmatched(thread)))
        yield row


@click.command(cls=Sectioned)
@listing_options
def cpus(where: Where, columns: tuple[str, ...], format: str) -> None:
    """List the processors: state, active thread and its process, interrupts taken.

    PC and registers are those that the dump holds of the CPU, if it does. A kernel's own core has
    those of the CPU that panicked.

    \b
    Example:
      kvmtool cpus -N mach_kernel -M core -o cpu,state,command,registers
    """
    from kvmtool.xnu.queues import Report

    report = Report()
    LISTING.show(_rows(opened(where), report), columns, format, report)
