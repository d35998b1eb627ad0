"""DWARF, CTF, ISF and Volatility 2's vtypes against each other and against the built-in layouts.

Four formats, written by five programs (gcc's and clang's debug information, Apple's ctfconvert and
ctfmerge, Volatility's dwarf.py by way of dwarfdump, an ISF converter): what they say of one
structure must be the same number. The numbers compared are printed (pytest -s).
"""

from __future__ import annotations

import functools

import pytest

from kvmtool.macho import MachO
from kvmtool.source import FileSource
from kvmtool.types import layouts
from kvmtool.types.ctf import ctf_of, open_ctf
from kvmtool.types.dwarf import open_dwarf
from kvmtool.types.isf import open_isf
from kvmtool.types.model import TypeTable
from kvmtool.types.vtypes import open_profile
from tests.inputs import real
from tests.typed_members import compare

OBJECT = "objects/x86_64-xnu-2422.115.4-kern_proc.o"

# Names that 10.9 gives to several structures, each private to its source files. CTF keeps them all,
# vtypes one by name alone, so that what embeds one of them there may embed the wrong one.
TIMER = ("async_dequeue", "flags", "soft_deadline", "ttd")  # behind a lock that differs
SEVERAL = {
    "internal_state": {"size"},
    "rdata": {"size"},
    "slock": {"size"},
    "walkarg": {"size", "w_req"},
    "timer_call": {"size", *TIMER},
    "processor": {f"quantum_timer.{name}" for name in TIMER},
    "thread": {f"{timer}.{name}" for timer in ("depress_timer", "wait_timer") for name in TIMER},
    "thread_call_group": {
        f"{timer}.{name}" for timer in ("dealloc_timer", "delayed_timer") for name in TIMER
    },
    "time_trigger": {f"tcall.{name}" for name in TIMER},
}


@functools.cache
def table(name: str) -> TypeTable:
    """The table of one file; skips without it."""
    if name == "dwarf":
        found = open_dwarf(MachO(FileSource(real(OBJECT))))
    elif name == "ctf of the object":
        found = ctf_of(MachO(FileSource(real(OBJECT + ".ctf"))))
    elif name == "ctf of the kernel":
        found = open_ctf(FileSource(real("types/x86_64-xnu-2422.115.4.ctfdata")))
    elif name == "vtypes of 10.9.4":
        found = open_profile(real("profiles/Mavericks_10.9.4_13e28.zip"))
    elif name == "isf of 10.8.5":
        found = open_isf(real("types/x86_64-10.8.5.types.json.gz"))
    else:
        return layouts.table(name)
    assert found is not None
    return TypeTable(found)


@pytest.mark.parametrize(
    ("first", "second", "members"),
    [
        ("dwarf", "ctf of the object", 917),
        ("dwarf", "ctf of the kernel", 900),
        ("dwarf", "vtypes of 10.9.4", 917),
        ("ctf of the object", "ctf of the kernel", 900),
        ("ctf of the object", "vtypes of 10.9.4", 917),
        ("ctf of the kernel", "vtypes of 10.9.4", 37_000),
        ("dwarf", "10.9.5 x86_64", 450),
        ("ctf of the kernel", "10.9.5 x86_64", 2_700),
        ("vtypes of 10.9.4", "10.9.5 x86_64", 2_700),
    ],
)
def test_readers_agree(first: str, second: str, members: int) -> None:
    """10.9.4 (xnu-2422.110.17) and 10.9.5 (xnu-2422.115.4) differ in no structure."""
    found = compare(table(first), table(second))
    print(f"{first} / {second}: {found.members} members of {found.structs} structures")
    assert found.members >= members
    differing = {tag: set(names) for tag, names in found.differences.items()}
    assert differing.keys() <= SEVERAL.keys()
    for tag, names in differing.items():
        assert names <= SEVERAL[tag], tag
    if "vtypes of 10.9.4" not in (first, second) or members < 10_000:
        assert differing == {}


@pytest.mark.parametrize(
    ("first", "members"),
    [("dwarf", 400), ("ctf of the kernel", 25_000), ("vtypes of 10.9.4", 25_000)],
)
def test_structures_that_10_8_and_10_9_share(first: str, members: int) -> None:
    """No ISF of 10.9 is here: what has the same size and the same members lies the same way."""
    found = compare(table(first), table("isf of 10.8.5"), alike=True)
    print(f"{first} / isf of 10.8.5: {found.members} members of {found.structs} structures")
    assert found.members >= members
    assert found.differences == {}


def test_structures_of_known_sizes() -> None:
    """data/README.md; `proc` also by llvm-dwarfdump: DW_AT_byte_size (0x04a8)."""
    for name in ("dwarf", "ctf of the object", "ctf of the kernel", "vtypes of 10.9.4"):
        proc = table(name).struct("proc")
        assert proc.size == 0x4A8, name
        assert (proc.members["p_pid"].offset, proc.members["p_comm"].offset) == (0x10, 0x2D4)
