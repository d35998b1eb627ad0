"""What is asked of a parser's result: all that a user may ask, in bounds."""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvmtool.arch import arch_for
from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.types.ctype import Array, Compound, Enum, Function, Pointer, unqualified
from kvmtool.types.declare import declare
from kvmtool.types.flatten import flatten

if TYPE_CHECKING:
    from kvmtool.memory import Memory
    from kvmtool.types.ctype import CType

ENDS = (0, 0x1000, 0xFFFFFF8000200000, (1 << 64) - 8)
NAMES = ("proc", "task", "allproc", "version", "nprocs", "Base", "os::Base", "value")


def memory(space: Memory | None) -> None:
    """Regions, pieces of them, reads at their borders, a search."""
    if space is None:
        return
    regions = list(islice(space.regions(), 32))
    for region in regions:
        size = min(region.size, 0x2000)
        for start in (region.start, region.start + region.size - size):
            list(islice(space.read_pieces(start, size), 64))
        with suppress(KvmError):
            space.read(region.start + region.size - 4, 8)
    for address in ENDS:
        with suppress(KvmError):
            space.read(address, 8)
        list(islice(space.read_pieces(address, 0x4000), 64))
    if sum(region.size for region in regions) < 1 << 22:
        list(islice(space.find(b"Darwin Kernel"), 4))


def dump(found: Any) -> None:
    """A container: facts, registers, notes, runs, its memory."""
    facts = found.facts
    with suppress(UnsupportedError):
        machine = arch_for(facts.cputype, facts.cpusubtype)
        for thread in islice(facts.threads, 16):
            for state in thread.states:
                machine.registers(*state)
    for note in islice(found.notes, 64):
        repr(note)
    list(islice(found.runs(), 1024))
    memory(found.virtual())
    memory(found.physical())


def source(found: Any) -> None:
    """Bytes: both ends, and what is past them."""
    size = min(found.size, 1 << 16)
    found.read_at(0, size)
    found.read_at(found.size - size, size)
    found.find(b"\xcf\xfa\xed\xfe", 0, min(found.size, 1 << 20))
    with suppress(KvmError):
        found.read_at(found.size, 1)


def types(found: Any) -> None:
    """Every kind of name, what is behind the first of them."""
    if found is None:
        return
    for kind in ("tag", "typedef", "base", "variable"):
        for name in [*NAMES, *sorted(found.names(kind))[:24]]:
            with suppress(KvmError):
                ctype(found.find(kind, name))
    for name in NAMES:
        with suppress(KvmError):
            ctype(found.variable(name))
    for extra in ("addresses", "entries"):
        list(getattr(found, extra, list)())


DEPTH = 3  # levels of what types are made of


def ctype(found: CType | None, depth: int = DEPTH) -> None:
    """Ask for all that is in a type, some levels deep."""
    if found is None:
        return
    declare(found, "x")
    if isinstance(found, Compound):
        if found.complete and depth == DEPTH:
            with suppress(KvmError):
                flatten(found)
        for field in found.fields[:200] if depth else ():
            ctype(field.type, depth - 1)
    elif isinstance(found, Enum):
        list(found.values)
    elif isinstance(found, Function) and depth:
        ctype(found.result, depth - 1)
    elif isinstance(found, (Pointer, Array)) and depth:
        ctype(found.target, depth - 1)
    else:
        unqualified(found)
