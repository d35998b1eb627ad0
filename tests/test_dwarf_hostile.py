"""DWARF that no compiler writes: rare forms, circles, nests, lies, and thousands of damaged files.

`KVMTOOL_MUTATIONS=2000` runs as many as that; a plain run does every tenth.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING

import pytest

from kvmtool.errors import FormatError, KvmError
from kvmtool.macho import MachO
from kvmtool.source import BytesSource
from kvmtool.types import dwarf_numbers as dw
from kvmtool.types.ctype import Array, Compound, Enum, Pointer, unqualified
from kvmtool.types.declare import declare
from kvmtool.types.dwarf import DwarfTypes, open_dwarf
from kvmtool.types.flatten import flatten
from tests.builders import dwarf
from tests.builders.dwarf import Assembler, Entry, sleb, uleb
from tests.test_dwarf import CPLUSPLUS, SOURCE
from tests.test_mutations import mutated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.ctype import CType

CASES = int(os.environ.get("KVMTOOL_MUTATIONS", "200"))
SECONDS = 2.0


def text(value: str) -> tuple[int, int, bytes]:
    return (dw.AT_NAME, dw.FORM_STRING, value.encode() + b"\0")


def small(attribute: int, value: int) -> tuple[int, int, bytes]:
    return (attribute, dw.FORM_DATA1, bytes([value]))


def leads(label: str, attribute: int = dw.AT_TYPE) -> tuple[int, int, str]:
    return (attribute, dw.FORM_REF4, label)


def integer(name: str = "int", size: int = 4, label: str | None = None) -> Entry:
    values = (text(name), small(dw.AT_BYTE_SIZE, size), small(dw.AT_ENCODING, 5))
    return Entry(dw.TAG_BASE, values, label=label or name)


def struct(name: str, size: int, *members: Entry, label: str | None = None) -> Entry:
    values = (text(name), small(dw.AT_BYTE_SIZE, size))
    return Entry(dw.TAG_STRUCTURE, values, members, label=label or name)


def member(name: str, label: str, at: int = 0, *more: tuple[int, int, bytes]) -> Entry:
    where = small(dw.AT_DATA_MEMBER_LOCATION, at)
    return Entry(dw.TAG_MEMBER, (text(name), leads(label), where, *more))


def file_of(*entries: Entry, version: int = 4, order: str = "<", arch: str = "x86_64") -> bytes:
    root = Entry(dw.TAG_COMPILE_UNIT, (small(dw.AT_LANGUAGE, 0xC),), entries)
    return dwarf.wrapped(Assembler(version, order).sections(root), arch)


def types_of(data: bytes) -> DwarfTypes:
    found = open_dwarf(MachO(BytesSource(data, "made.dSYM")))
    assert found is not None
    return found


def look(ctype: CType, depth: int = 4) -> None:
    """Ask for all that is in a type, some levels deep."""
    declare(ctype, "x")
    assert ctype.size is None or ctype.size >= 0
    if isinstance(ctype, Compound):
        if ctype.complete:
            flatten(ctype)
        for field in ctype.fields:
            if depth:
                look(field.type, depth - 1)
    elif isinstance(ctype, Enum):
        assert len(ctype.values) >= 0
    elif isinstance(ctype, (Pointer, Array)) and depth:
        look(ctype.target, depth - 1)
    else:
        unqualified(ctype)


def look_at(data: bytes) -> None:
    """Everything a user may ask of a file with types."""
    types = open_dwarf(MachO(BytesSource(data, "made.dSYM")))
    for name in ("proc", "Base", "os::Base", "value", "find"):
        for kind in ("tag", "typedef", "base", "variable"):
            if types is not None and types.find(kind, name) is not None:
                look(types.find(kind, name))
    for kind in ("tag", "typedef", "base", "variable") if types is not None else ():
        for name in sorted(types.names(kind))[:40]:
            found = types.find(kind, name)
            if found is not None:
                look(found)


def refusal(data: bytes) -> str:
    with pytest.raises(KvmError) as caught:
        look_at(data)
    return str(caught.value)


# what is rare, but right


def test_forms_no_compiler_here_writes() -> None:
    values = (
        text("s"),
        (dw.AT_BYTE_SIZE, dw.FORM_INDIRECT, uleb(dw.FORM_UDATA) + uleb(300)),
        (dw.AT_DECL_LINE, dw.FORM_IMPLICIT_CONST, sleb(-7)),
        (0x7FFF, dw.FORM_DATA16, bytes(16)),
        (0x7FFE, dw.FORM_BLOCK2, b"\2\0ab"),
        (0x7FFD, dw.FORM_INDIRECT, uleb(dw.FORM_BLOCK1) + b"\1x"),
    )
    one = Entry(
        dw.TAG_MEMBER,
        (
            text("one"),
            (dw.AT_TYPE, dw.FORM_REF4, "int"),
            (dw.AT_DATA_MEMBER_LOCATION, dw.FORM_BLOCK1, b"\3\x23" + uleb(200)),
        ),
    )
    two = Entry(
        dw.TAG_MEMBER,
        (
            text("two"),
            leads("int"),
            (dw.AT_DATA_MEMBER_LOCATION, dw.FORM_SDATA, sleb(128)),
            (dw.AT_SIBLING, dw.FORM_REF4, "int"),
        ),
    )
    data = file_of(Entry(dw.TAG_STRUCTURE, values, (one, two)), integer(), version=5)
    found = types_of(data).find("tag", "s")
    assert isinstance(found, Compound)
    assert found.size == 300
    assert [(f.name, f.offset) for f in found.fields] == [("one", 200), ("two", 128)]


def test_a_signed_pointer_keeps_how_it_is_signed() -> None:
    """LLVM's Dwarf.def for the numbers; the word is packed as in CTF (xnu-8792 and later)."""
    signed = Entry(
        dw.TAG_LLVM_PTRAUTH,
        (
            leads("pointer"),
            small(dw.AT_PTRAUTH_KEY, 2),
            (dw.AT_PTRAUTH_ADDRESS_DISCRIMINATED, dw.FORM_FLAG_PRESENT, b""),
            (dw.AT_PTRAUTH_EXTRA_DISCRIMINATOR, dw.FORM_DATA2, b"\xd2\x04"),
        ),
        label="signed",
    )
    pointer = Entry(dw.TAG_POINTER, (leads("int"),), label="pointer")
    data = file_of(struct("s", 8, member("p", "signed")), signed, pointer, integer(), arch="arm64e")
    found = types_of(data).find("tag", "s")
    assert isinstance(found, Compound)
    kind = found.fields[0].type
    assert isinstance(kind, Pointer)
    assert kind.ptrauth == 1 << 24 | 2 << 16 | 0x4D2
    assert kind.size == 8
    assert declare(kind, "p") == "int *p"


def test_the_definition_with_more_members_wins_over_an_opaque_one() -> None:
    """XNU: osfmk/kern/kern_types.h has `struct wait_queue` as words named opaque."""
    opaque = struct("wait_queue", 16, member("opaque", "int"), label="first")
    true = struct("wait_queue", 16, member("a", "int"), member("b", "int", 4), label="second")
    line = small(dw.AT_DECL_LINE, 77)
    true = true._replace(values=(*true.values, line))
    for entries in ((opaque, true), (true, opaque)):
        found = types_of(file_of(*entries, integer())).find("tag", "wait_queue")
        assert isinstance(found, Compound)
        assert [field.name for field in found.fields] == ["a", "b"]


@pytest.mark.parametrize(("order", "arch"), [("<", "i386"), (">", "ppc")])
def test_gcc_counts_bits_from_the_most_significant(order: str, arch: str) -> None:
    """DWARF 2, 5.5.4 and its figure 5: in an int, j (5 bits) lies behind 0, k (6 bits) behind 5
    in big-endian memory; in little-endian behind 27 and 21 bits counted from the top."""
    places = {">": (0, 5), "<": (27, 21)}[order]
    bits = [
        member(
            *(name, "int", 0, small(dw.AT_BYTE_SIZE, 4)),
            *(small(dw.AT_BIT_SIZE, width), small(dw.AT_BIT_OFFSET, place)),
        )
        for name, width, place in zip("jk", (5, 6), places, strict=True)
    ]
    assembler = Assembler(2, order, 4)
    root = Entry(dw.TAG_COMPILE_UNIT, (), (struct("s", 4, *bits), integer()))
    found = types_of(dwarf.wrapped(assembler.sections(root), arch)).find("tag", "s")
    assert isinstance(found, Compound)
    got = [(f.name, f.offset, f.bit_offset, f.bit_size) for f in found.fields]
    assert got == [("j", 0, 0, 5), ("k", 0, 5, 6)]


# lies


def circle(tag: int) -> bytes:
    return file_of(
        struct("s", 4, member("m", "a")),
        Entry(tag, (leads("b"), small(dw.AT_BYTE_SIZE, 8)), label="a"),
        Entry(tag, (leads("a"), small(dw.AT_BYTE_SIZE, 8)), label="b"),
    )


LEADING = (
    *(dw.TAG_TYPEDEF, dw.TAG_CONST, dw.TAG_PACKED, dw.TAG_ARRAY, dw.TAG_SUBRANGE),
    *(dw.TAG_PTR_TO_MEMBER, dw.TAG_LLVM_PTRAUTH, dw.TAG_ENUMERATION),
)


@pytest.mark.parametrize("tag", LEADING)
def test_types_in_a_circle(tag: int) -> None:
    message = refusal(circle(tag))
    assert "\n" not in message


def test_pointers_may_go_in_circles() -> None:
    found = types_of(circle(dw.TAG_POINTER)).find("tag", "s")
    assert isinstance(found, Compound)
    first = found.fields[0].type
    assert isinstance(first, Pointer)
    assert isinstance(first.target, Pointer)
    assert first.target.target is first


def test_a_structure_inside_itself() -> None:
    inside = struct("s", 4, member("m", "s"), member("n", "s"))
    assert "nested deeper" in refusal(file_of(inside))


def test_a_nest_that_doubles_at_every_level_ends_soon() -> None:
    levels = [
        struct(f"s{n}", 4, member("a", f"s{n + 1}"), member("b", f"s{n + 1}")) for n in range(60)
    ]
    began = time.process_time()
    message = refusal(file_of(*levels, integer(label="s60")))
    assert "members" in message
    assert time.process_time() - began < SECONDS


def test_signatures_in_a_circle() -> None:
    values = (text("s"), (dw.AT_SIGNATURE, dw.FORM_REF_SIG8, b"12345678"))
    message = refusal(file_of(Entry(dw.TAG_STRUCTURE, (*values, small(dw.AT_BYTE_SIZE, 4)))))
    assert "signature 3132333435363738" in message


def test_specifications_in_a_circle() -> None:
    values = (text("find"), leads("x", dw.AT_SPECIFICATION))
    data = file_of(Entry(dw.TAG_VARIABLE, values, label="x"))
    assert "more than 8 entries" in refusal(data)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (struct("s", 4, member("m", "int", 5)), "a member at 0x5 of a structure of 0x4 bytes"),
        (
            Entry(dw.TAG_STRUCTURE, (text("s"), (dw.AT_BYTE_SIZE, dw.FORM_SDATA, sleb(-8))), ()),
            "DW_AT_byte_size",
        ),
        (
            Entry(
                dw.TAG_STRUCTURE,
                (text("s"), (dw.AT_BYTE_SIZE, dw.FORM_DATA8, b"\xff" * 8)),
                (),
            ),
            "DW_AT_byte_size 0xffffffffffffffff",
        ),
        (
            struct("s", 4, member("m", "int", 0, small(dw.AT_BIT_SIZE, 33))),
            "a bit-field of 0x21 bits in a type of 0x4 bytes",
        ),
        (
            Entry(
                dw.TAG_STRUCTURE,
                (text("s"), small(dw.AT_BYTE_SIZE, 4)),
                (Entry(dw.TAG_MEMBER, (text("m"), (dw.AT_TYPE, dw.FORM_REF_ADDR, b"\0\0\0\x7f"))),),
            ),
            "expected a debugging entry of some unit",
        ),
        (struct("s", 4, member("m", "s", 0), member("n", "top")), "where a type was expected"),
        (Entry(0x1234, ((dw.AT_NAME, 0x77, b""),)), "form 0x77, which no DWARF up to 5 has"),
        (
            Entry(dw.TAG_TYPEDEF, (text("t"), (dw.AT_TYPE, dw.FORM_REF_SUP4, b"abcd"))),
            "supplementary file",
        ),
        (
            Entry(dw.TAG_TYPEDEF, ((dw.AT_NAME, dw.FORM_STRP, b"\0\0\0\0"),)),
            "there is no __debug_str",
        ),
    ],
)
def test_one_line_for_each_lie(entry: Entry, said: str) -> None:
    root = Entry(dw.TAG_COMPILE_UNIT, (), (entry, integer()), label="top")
    message = refusal(dwarf.wrapped(Assembler().sections(root), "x86_64"))
    assert said in message
    assert "\n" not in message
    assert message.startswith("made.dSYM: at offset 0x")


def test_too_many_dimensions() -> None:
    many = tuple(Entry(dw.TAG_SUBRANGE, (small(dw.AT_COUNT, 2),)) for _ in range(65))
    array = Entry(dw.TAG_ARRAY, (leads("int"),), many, label="array")
    message = refusal(file_of(struct("s", 4, member("m", "array")), array, integer()))
    assert "65 dimensions" in message


def test_too_many_entries_in_each_other() -> None:
    nest = Entry(dw.TAG_LEXICAL_BLOCK, (), ())
    for _ in range(900):
        nest = Entry(dw.TAG_LEXICAL_BLOCK, (), (nest,))
    look_at(file_of(nest))
    sections = Assembler().sections(Entry(dw.TAG_COMPILE_UNIT, (), (nest,)))
    # an entry of code 1 (the unit's own) inside itself, for ever
    info = sections["__debug_info"]
    sections["__debug_info"] = info[:11] + b"\1" * (len(info) - 11)
    assert "in each other" in refusal(dwarf.wrapped(sections, "x86_64"))


@pytest.mark.parametrize(
    ("at", "patch", "said"),
    [
        (0, b"\xff\xff\xff\x7f", "unit_length 0x7fffffff"),
        (0, b"\xf7\xff\xff\xff", "unit_length 0xfffffff7"),
        (0, b"\3\0\0\0", "shorter than the unit's header"),
        (4, b"\6\0", "DWARF version 6, expected 2 to 5"),
        (6, b"\0\0\1\0", "a table's offset"),
        (10, b"\3", "address_size 0x3, expected 0x4 or 0x8"),
        (11, b"\x7f", "abbreviation code 0x7f"),
    ],
)
def test_units_that_cannot_be(at: int, patch: bytes, said: str) -> None:
    root = Entry(dw.TAG_COMPILE_UNIT, (), (integer(),))
    sections = Assembler().sections(root)
    info = sections["__debug_info"]
    sections["__debug_info"] = info[:at] + patch + info[at + len(patch) :]
    assert said in refusal(dwarf.wrapped(sections, "x86_64"))


def test_a_section_that_ends_early() -> None:
    data = file_of(struct("s", 4, member("m", "int")), integer())
    for size in range(len(data) - 1, len(data) - 40, -3):
        with pytest.raises(FormatError):
            look_at(data[:size])


# damage


def images(folder: str) -> Iterator[bytes]:
    for source, *flags in (
        (SOURCE, "-gdwarf-2", "-target", "i386-apple-macos10.13"),
        (SOURCE, "-gdwarf-5", "-target", "arm64-apple-macos12"),
        (CPLUSPLUS, "-xc++", "-gdwarf-4", "-target", "x86_64-apple-macos12"),
        (
            *(CPLUSPLUS, "-xc++", "-gdwarf-5", "-target", "x86_64-apple-macos12"),
            *("-gpubnames", "-mllvm", "-accel-tables=Dwarf"),
        ),
    ):
        with open(dwarf.compiled(folder, source, *flags), "rb") as file:
            yield file.read()
    elf = ("-gdwarf-4", "-target", "powerpc-linux-gnu", "-gpubnames")
    yield dwarf.from_elf(dwarf.compiled(folder, SOURCE, *elf))


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> list[bytes]:
    return list(images(str(tmp_path_factory.mktemp("images"))))


def test_every_image_is_read_before_it_is_damaged(undamaged: list[bytes]) -> None:
    for data in undamaged:
        look_at(data)
        assert "os::Base" in (names := set(types_of(data).names("tag"))) or "proc" in names


def hurt(data: bytes, case: int) -> bytes:
    """Half of them as test_mutations does, half of them only in the debugging sections."""
    if case % 2:
        return mutated(data, case)
    chance = random.Random(case)
    sections = [s for s in MachO(BytesSource(data, "made")).sections if s.segname == "__DWARF"]
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        section = chance.choice(sections)
        at = section.offset + chance.randrange(max(1, section.size))
        out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(out)


def told(data: bytes) -> str | None:
    try:
        look_at(data)
    except KvmError as error:
        return str(error)
    return None


def test_only_one_line_errors(undamaged: list[bytes]) -> None:
    refused = 0
    for case in range(CASES):
        data = hurt(undamaged[case // 2 % len(undamaged)], case)
        began = time.process_time()
        message = told(data)
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
        took = time.process_time() - began
        assert took < SECONDS, f"case {case} took {took:.1f} s"
    assert refused > CASES / 10
