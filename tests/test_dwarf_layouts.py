"""Random C declarations, compiled: our layouts equal those clang itself prints.

`KVMTOOL_LAYOUTS=200` compiles as many files for each target; a plain run always the same few.
"""

from __future__ import annotations

import os
import re
import tempfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmtool.macho import MachO
from kvmtool.source import BytesSource
from kvmtool.types.ctype import Compound, CType, unqualified
from kvmtool.types.dwarf import open_dwarf
from tests.builders import dwarf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXAMPLES = int(os.environ.get("KVMTOOL_LAYOUTS", "5"))
STRUCTS = 8  # in one file
MACOS = [
    (f"{arch}-apple-macos11", f"-gdwarf-{version}")
    for arch in ("x86_64", "arm64", "i386")
    for version in (2, 4, 5)
]
# no compiler here writes Mach-O for these: their sections are put into one
ELF = [
    ("powerpc-linux-gnu", "-gdwarf-2"),
    ("powerpc-linux-gnu", "-gdwarf-4"),
    ("powerpc64-linux-gnu", "-gdwarf-5"),
    ("powerpc64-linux-gnu", "-gdwarf-4 -gdwarf64"),
    ("x86_64-linux-gnu", "-gdwarf-5 -gdwarf64"),
    ("x86_64-linux-gnu", "-gdwarf-3"),
]
# Base types and the bits a bit-field of them may have: one short of all, since LLVM (DwarfUnit.cpp,
# constructMemberDIE) writes one as wide as its type as a plain member, without its odd bits.
NUMBERS = {
    **dict.fromkeys(("char", "signed char", "unsigned char"), 7),
    **dict.fromkeys(("short", "unsigned short"), 15),
    **dict.fromkeys(("int", "unsigned", "long", "unsigned long", "enum e"), 31),
    **dict.fromkeys(("long long", "unsigned long long"), 63),
    "_Bool": 1,
}
OTHERS = ("float", "double", "void *", "long double", "number_t", "const char *volatile")


@st.composite
def members(draw: Callable[..., object], depth: int, earlier: int) -> str:
    """The members of one structure, "@" before each name: numbers come when all is put together."""
    kinds = ["plain", "plain", "bits", "bits", "array", "function", "pad", "number"]
    kinds += ["unnamed", "named"] if depth else []
    kinds += ["struct"] if earlier else []
    found = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=7)):
        word = draw(st.sampled_from([*NUMBERS, *OTHERS]))
        number = draw(st.sampled_from(list(NUMBERS)))
        if kind == "plain":
            found.append(f"{word} @;")
        elif kind == "number":
            found.append(f"{number} @;")
        elif kind == "bits":
            found.append(f"{number} @:{draw(st.integers(1, NUMBERS[number]))};")
        elif kind == "pad":
            width = draw(st.integers(0, NUMBERS[number]))
            found.append(f"{number} :{width};")
        elif kind == "array":
            sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
            found.append(f"{word} @{''.join(f'[{size}]' for size in sizes)};")
        elif kind == "function":
            found.append("int (*@)(struct undefined *, int, ...);")
        elif kind == "struct":
            array = draw(st.sampled_from(["", "[2]"]))
            found.append(f"struct s{draw(st.integers(0, earlier - 1))} @{array};")
        else:
            what = draw(st.sampled_from(["struct", "union"]))
            packed = draw(st.sampled_from(["", "", " __attribute__((packed))"]))
            inner = draw(members(depth - 1, earlier))
            found.append(f"{what}{packed} {{ {inner} }} {'@' if kind == 'named' else ''};")
    return " ".join(found)


@st.composite
def sources(draw: Callable[..., object]) -> str:
    """A C file with `STRUCTS` structures s0, s1, ... and a variable of each."""
    out = ["enum e { one = 1, many = 0x7fffffff }; typedef long number_t; struct undefined;"]
    for index in range(STRUCTS):
        what = draw(st.sampled_from(["struct", "struct", "struct", "union"]))
        extra = ["", "", " __attribute__((packed))", " __attribute__((aligned(16)))"]
        attribute = draw(st.sampled_from(extra))
        body = draw(members(2, index))
        if what == "struct" and draw(st.booleans()):
            body = f"char @; {body} short @[];"
        text = f"struct{attribute} s{index} {{ {body} }};"
        if what == "union":
            text = f"struct s{index} {{ union{attribute} {{ {body} }} @; }};"
        out.append(f"{_numbered(text)} struct s{index} v{index};")
    return "\n".join(out)


def _numbered(text: str) -> str:
    parts = text.split("@")
    return parts[0] + "".join(f"m{n}{part}" for n, part in enumerate(parts[1:]))


ROW = re.compile(r" *(\d+)(?::(?:(\d+)-(\d+)|-))? \| ( *)(.*)")

Layout = dict[str, tuple[int, int | None]]  # member -> bits from the start, width of a bit-field


def clangs(dump: str) -> dict[str, tuple[int, Layout]]:
    """(size, layout) of s0, s1, ... as clang prints them, members of members flattened."""
    found: dict[str, tuple[int, Layout]] = {}
    for record in dump.split("*** Dumping AST Record Layout")[1:]:
        head = re.search(r"\| struct (s\d+)\n", record)
        size = re.search(r"\[sizeof=(\d+)", record)
        assert size
        if head is None or head.group(1) in found:
            continue
        layout: Layout = {}
        inside: list[str] = []  # names of the members that the line's depth lies in
        for line in record.split("\n"):
            row = ROW.match(line)
            if row is None or row.group(4) == "":
                continue
            depth = len(row.group(4)) // 2
            name = re.search(r" (m\d+)$", row.group(5))
            del inside[depth - 1 :]
            inside.append(name.group(1) if name else "")
            if name is None:
                continue
            first, last = row.group(2), row.group(3)
            bits = 8 * int(row.group(1)) + int(first or 0)
            width = None if first is None else int(last) - int(first) + 1
            layout[".".join(part for part in inside if part)] = (bits, width)
        found[head.group(1)] = (int(size.group(1)), layout)
    return found


def ours(ctype: CType, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int | None]]:
    """(member, bits from the start, width) of all members, those of members flattened."""
    found = unqualified(ctype)
    if not isinstance(found, Compound):
        return
    for field in found.fields:
        name = f"{prefix}{field.name}" if field.name else prefix.rstrip(".")
        bits = base + 8 * field.offset
        if field.name:
            yield name, bits + (field.bit_offset or 0), field.bit_size
        yield from ours(field.type, f"{name}." if name else "", bits)


def check(source: str, target: str, flags: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        told = clangs(dwarf.record_layouts(folder, source, "-target", target))
        path = dwarf.compiled(folder, source, "-target", target, *flags.split())
        if "linux" in target:
            data = dwarf.from_elf(path)
        else:
            with open(path, "rb") as file:
                data = file.read()
    types = open_dwarf(MachO(BytesSource(data, "made.o")))
    assert types is not None
    for index in range(STRUCTS):
        size, layout = told[f"s{index}"]
        found = types.find("tag", f"s{index}")
        assert found is not None
        assert found.size == size
        mine = {name: (bits, width) for name, bits, width in ours(found)}
        assert mine == layout


@pytest.mark.parametrize(("target", "flags"), [*MACOS, *ELF])
def test_random_declarations_have_clangs_own_layout(target: str, flags: str) -> None:
    dwarf.tool(*dwarf.CLANGS)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize="KVMTOOL_LAYOUTS" not in os.environ,
    )
    @given(sources())
    def run(source: str) -> None:
        check(source, target, flags)

    run()
