"""Volatility 2's profiles: types, symbols, the defects of the public ones, damage."""

from __future__ import annotations

import time
import warnings
import zipfile

import pytest

from kvmtool.errors import FormatError, KvmWarning
from kvmtool.source import BytesSource, FileSource
from kvmtool.types.ctype import Array, Compound, Enum, Field, Function, Opaque, Pointer
from kvmtool.types.declare import declare
from kvmtool.types.literal import LiteralError, parse_literal
from kvmtool.types.model import TypeTable
from kvmtool.types.vtypes import is_profile, open_profile
from tests.builders import profile as build
from tests.inputs import real

SYMBOLS = build.listing(
    "x86_64",
    [
        ("N_GSYM       ", 0x20, "_cdevsw", 0, 0),
        ("N_SO         ", 0x64, "kern_proc.c", 0, 0),
        ("N_BNSYM      ", 0x2E, "", 1, 0xFFFFFF8000202000),
        ("     SECT    ", 0x0E, "_hash", 8, 0xFFFFFF8000800010),
        ("     SECT EXT", 0x0F, "_hash", 8, 0xFFFFFF8000800020),
        ("     SECT EXT", 0x0F, "_cdevsw", 8, 0xFFFFFF8000853B20),
        ("     ABS     ", 0x02, "HZ", 0, 100),
        ("     UNDF EXT", 0x01, "_nowhere", 0, 0),
        ("     SECT EXT", 0x0F, "_it's", 1, 0xFFFFFF8000900000),
    ],
)
PROC = """\
  'proc': [ 0x4a8L, {
    'p_list': [0x0, ['__unnamed_8793789']],
    'p_pid': [0x10, ['int']],
    'p_comm': [0x2d4, ['array', 17, ['char']]],
    'task': [0x18, ['pointer', ['task']]],
    'p_call': [0x20, ['pointer', ['pointer', ['void']]]],
    'p_state': [0x28, ['Enumeration', {'target': 'int', 'choices': {18446744073709551615L: 'BAD', \
0: 'GOOD'}}]],
    'p_high': [0x30, ['BitField', {'end_bit': 7, 'start_bit': 3}]],
    'p_low': [0x30, ['BitField', {'end_bit': 3, 'start_bit': 0}]],
    'p_size': [0x38, ['unsigned long']],
    '__unnamed_12': [0x40, ['__unnamed_77']],
    'p_grid': [0x48, ['array', 3L, ['array', 2, ['short']]]],
    'p_fn': [0x58, ['pointer', ['function']]],
}],
  '__unnamed_8793789': [ 0x10, {
    'le_next': [0x0, ['pointer', ['proc']]],
    'le_prev': [0x8, ['pointer', ['pointer', ['proc']]]],
}],
  '__unnamed_77': [ 0x8, {
    'u_int': [0x0, ['int']],
    'u_long': [0x0, ['long']],
}],
  'OSObject_class': [ 0x10, {
    'retainCount': [0x8, ['int']],
}],
"""


def opened(tmp_path, content: bytes):
    path = str(tmp_path / "profile.zip")
    with open(path, "wb") as file:
        file.write(content)
    return open_profile(path)


def test_every_kind_of_description(tmp_path) -> None:
    source = opened(tmp_path, build.profile(PROC, SYMBOLS))
    assert (source.byteorder, source.pointer_size) == ("<", 8)
    assert set(source.names("tag")) == {"proc", "OSObject"}
    proc = source.find("tag", "proc")
    assert isinstance(proc, Compound)
    assert (proc.kind, proc.size) == ("struct", 0x4A8)
    fields = {field.name: field for field in proc.fields}
    assert [field.offset for field in proc.fields] == sorted(f.offset for f in proc.fields)
    assert declare(fields["p_comm"].type, "p_comm") == "char p_comm[17]"
    assert declare(fields["p_call"].type, "p_call") == "void **p_call"
    assert declare(fields["p_grid"].type, "p_grid") == "short p_grid[3][2]"
    assert fields["p_size"].type.size == 8
    assert isinstance(fields["p_fn"].type.target, Function)
    task = fields["task"].type.target
    assert (task.name, task.size) == ("task", None)
    assert fields["p_low"][2:] == (0x30, 0, 3)
    assert fields["p_high"][2:] == (0x30, 3, 4)
    state = fields["p_state"].type
    assert isinstance(state, Enum)
    assert list(state.values) == [("BAD", -1), ("GOOD", 0)]
    union = fields[None].type
    assert (union.kind, union.name, union.size) == ("union", None, 8)
    members = TypeTable(source).struct("proc").members
    assert members["p_list.le_prev"].offset == 8
    assert members["u_long"].offset == 0x40
    shared = fields["p_list"].type
    assert shared.name is None
    assert shared.fields[0].type.target is proc


def test_classes_go_by_their_own_names(tmp_path) -> None:
    found = opened(tmp_path, build.profile(PROC)).find("tag", "OSObject")
    assert isinstance(found, Compound)
    assert (found.kind, found.name, found.size) == ("class", "OSObject", 16)


def test_symbols_without_stabs_and_undefined_ones(tmp_path) -> None:
    source = opened(tmp_path, build.profile(PROC, SYMBOLS))
    assert source.addresses() == {
        "hash": 0xFFFFFF8000800020,
        "cdevsw": 0xFFFFFF8000853B20,
        "HZ": 100,
        "it's": 0xFFFFFF8000900000,
    }
    entries = list(source.entries())
    assert len(entries) == 8
    assert entries[0][:5] == ("_cdevsw", 0x20, 0, 0, 0)
    assert source.variable("cdevsw") is None
    assert opened(tmp_path, build.profile(PROC)).addresses() == {}


@pytest.mark.parametrize(
    ("arch", "size", "order"), [("i386", 4, "<"), ("x86_64", 8, "<"), ("ppc", 4, ">")]
)
def test_the_listing_says_the_processor(tmp_path, arch: str, size: int, order: str) -> None:
    source = opened(tmp_path, build.profile(PROC, build.listing(arch, [])))
    assert (source.pointer_size, source.byteorder) == (size, order)
    assert source.find("base", "long").size == size


def test_without_a_listing_two_pointers_in_a_row_say_it(tmp_path) -> None:
    queue = "'queue_entry': [ 0x8, {\n 'next': [0x0, ['pointer', ['queue_entry']]],\n}],\n"
    assert opened(tmp_path, build.profile(queue)).pointer_size == 4
    assert opened(tmp_path, build.profile(PROC)).pointer_size == 8


# the defects of public profiles

UNCOUNTED = """\
  'proc': [ 0x60, {
    'p_pid': [0x0, ['int']],
    'p_comm': [0x4, ['array', 0, ['char']]],
    'p_name': [0x18, ['array', 0, ['long']]],
    'p_lpad': [0x30, ['array', 0, ['char']]],
    'p_arg': [0x30, ['long']],
    'p_odd': [0x38, ['array', 0, ['s12']]],
    'p_grid': [0x48, ['array', 0, ['array', 0, ['int']]]],
    'p_bits': [0x58, ['BitField', {'end_bit': 16, 'start_bit': 0}]],
    'p_end': [0x60, ['array', 0, ['char']]],
}],
  'u': [ 0x8, {
    'u_text': [0x0, ['array', 0, ['char']]],
    'u_long': [0x0, ['long']],
}],
  's12': [ 0xc, {
    'x': [0x0, ['int']],
}],
"""


def counts(source) -> dict[str, int]:
    fields = source.find("tag", "proc").fields
    return {f.name: f.type.count for f in fields if isinstance(f.type, Array)}


def test_lost_counts_are_found_again_or_said_to_be_lost(tmp_path) -> None:
    source = opened(tmp_path, build.profile(UNCOUNTED))
    with pytest.warns(KvmWarning) as told:
        found = counts(source)
    assert found == {"p_comm": 20, "p_name": 3, "p_lpad": 0, "p_odd": 0, "p_grid": 0, "p_end": 0}
    since = "(a defect of profiles since 10.11)"
    assert [str(warning.message).partition(": ")[2] for warning in told] == [
        f"proc.p_odd: its array's count is lost {since}",
        f"proc.p_bits: 10.13's widths of 10 bits or more are wrong {since}",
    ]
    with warnings.catch_warnings(action="error"):  # each once
        assert source.find("tag", "u").fields[0].type.count == 0
    with pytest.warns(KvmWarning, match=r"u\.u_text: its array's count is lost"):
        assert opened(tmp_path, build.profile(UNCOUNTED)).find("tag", "u").fields


def test_counts_of_nothing_are_believed_where_others_are_kept(tmp_path) -> None:
    source = opened(tmp_path, build.profile(PROC + UNCOUNTED))  # the last `proc` counts
    assert set(counts(source).values()) == {0}


def test_bit_fields_that_straddle_their_unit(tmp_path) -> None:
    text = """\
  'pasc': [ 0x18, {
    'd': [0x0, ['BitField', {'end_bit': 28, 'start_bit': 21}]],
    'e': [0x0, ['BitField', {'end_bit': -18446744073709551581L, \
'start_bit': -18446744073709551588L}]],
    'func': [0x8, ['BitField', {'end_bit': -18446744073709551488L, \
'start_bit': -18446744073709551616L}]],
}],
"""
    _, straddling, func = opened(tmp_path, build.profile(text)).find("tag", "pasc").fields
    assert straddling[2:] == (0, 28, 7)
    assert isinstance(func.type, Opaque)  # a C++ pointer to a member
    assert func == Field("func", func.type, 8)
    assert func.type.size == 16


def test_of_the_two_files_of_el_capitan_one_is_read(tmp_path) -> None:
    short = build.vtypes("'proc': [ 0x10, {\n}],\n")
    content = build.archive({"a.vtype": short, "a.vtypes": build.vtypes(PROC)})
    assert TypeTable(opened(tmp_path, content)).size("proc") == 0x4A8


# a real one


def test_a_real_profile() -> None:
    path = real("profiles/Mavericks_10.9.4_13e28.zip")
    assert is_profile(FileSource(path))
    source = open_profile(path)
    table = TypeTable(source)
    assert (table.size("proc"), table.offset("proc", "p_comm")) == (0x4A8, 0x2D4)
    assert source.pointer_size == 8
    with warnings.catch_warnings(action="error"):
        members = sum(len(source.find("tag", tag).fields) for tag in source.names("tag"))
    assert members == 26326
    entries = list(source.entries())
    stabs = [entry for entry in entries if entry.n_type & 0xE0]
    assert [e.n_value for e in stabs if e.name == "_cdevsw"] == [0]
    assert source.addresses()["cdevsw"] == 0xFFFFFF8000853B20


# damage


def refused(tmp_path, content: bytes) -> str:
    with pytest.raises(FormatError) as error:
        source = opened(tmp_path, content)
        for name in source.names("tag"):
            for field in source.find("tag", name).fields:
                if isinstance(field.type, Pointer):
                    field.type.target  # noqa: B018 (asked for to be made)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/profile.zip: ")
    assert "\n" not in message
    return message


def member(text: str) -> bytes:
    return build.profile(f"'s': [ 0x8, {{\n 'm': {text},\n}}],\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0x0, ['pointer', 1, 2]]", "s.m: expected a type, got ['pointer', 1, 2]"),
        ("[0x0, ['array', -1, ['int']]]", "s.m: expected a type"),
        ("[0x0, ['array', 'x', ['int']]]", "s.m: expected a type"),
        ("[0x0, ['pointer', 7]]", "s.m: expected a type"),
        ("[0x0, []]", "s.m: expected an offset and a type"),
        ("[-4, ['int']]", "s.m: expected an offset and a type"),
        ("[0xffffffffffff, ['int']]", "s.m: expected an offset and a type"),
        ("7", "s.m: expected an offset and a type, got 7"),
        ("[0x0, ['BitField', {'start_bit': 0}]]", "s.m: expected start_bit and end_bit"),
        ("[0x0, ['BitField', {'start_bit': 9, 'end_bit': 3}]]", "a bit-field of bits"),
        ("[0x0, __import__('os')]", "s: expected a literal, got"),
        ("[0x0, ['int']", "s: expected a literal, got '}'"),
        ("[0x0, ['int' 'int']]", "expected ',', got \"'int'\""),
        ("[0x0, {[]: 1}]", "expected a key"),
        ("'unfinished", "expected a literal"),
    ],
)
def test_descriptions_that_are_none(tmp_path, text: str, message: str) -> None:
    said = refused(tmp_path, member(text))
    assert message in said
    assert said.startswith(f"{tmp_path}/profile.zip: vtypes at character ")


def test_nests_sizes_and_circles(tmp_path) -> None:
    nest = "['pointer', " * 40 + "['int']" + "]" * 40
    assert "nested deeper than 32" in refused(tmp_path, member(f"[0x0, {nest}]"))
    deep = "['array', 1, " * 100_000
    assert "nested deeper than 32" in refused(tmp_path, member(f"[0x0, {deep}"))
    huge = build.profile("'s': [ 0xffffffffffff, {\n}],\n")
    assert "expected a 32-bit size" in refused(tmp_path, huge)
    itself = opened(tmp_path, member("[0x0, ['s']]"))
    with pytest.raises(Exception, match="structures nested deeper"):
        TypeTable(itself).size("s")


def test_a_structure_of_a_million_members(tmp_path) -> None:
    members = "".join(f"'m{n}': [0x0, ['int']],\n" for n in range(1_000_000))
    content = build.profile(f"'s': [ 0x8, {{\n{members}}}],\n")
    began = time.process_time()
    assert "more than any structure has" in refused(tmp_path, content)
    assert time.process_time() - began < 3


def test_what_is_no_profile(tmp_path) -> None:
    good = build.profile(PROC, SYMBOLS)
    assert is_profile(BytesSource(good))
    assert not is_profile(BytesSource(good[4:]))
    assert not is_profile(BytesSource(b""))
    assert not is_profile(BytesSource(build.archive({"kernel.txt": "x" * 100})))
    assert "it has no directory" in refused(tmp_path, good[:-40])
    assert "the zip is damaged" in refused(tmp_path, b"\xff" * 60 + good[60:])
    assert "expected a .vtypes file" in refused(tmp_path, build.archive({"a.txt": "x"}))
    assert "got no structure" in refused(tmp_path, build.archive({"a.vtypes": "x = 1"}))
    packed = build.archive({"a.vtypes": build.vtypes(PROC)}, zipfile.ZIP_BZIP2)
    assert "packed in an unusual way" in refused(tmp_path, packed)


def test_hugeness_is_refused_before_it_takes_memory(tmp_path) -> None:
    began = time.process_time()
    bomb = build.archive({"a.vtypes": "'" * (50 << 20)})
    assert "more than 0x3000000 bytes" in refused(tmp_path, bomb)
    many = build.archive({"a.vtypes": "x"} | {f"{n}": "" for n in range(20_000)})
    assert "is no profile's" in refused(tmp_path, many)
    quotes = build.archive({"a.vtypes": "'x'  :  [ " * (2 << 20)})
    assert "got no structure" in refused(tmp_path, quotes)
    assert time.process_time() - began < 6


def test_literals() -> None:
    text = "{'a': [0x10L, -7, \"b\"], 3: {}, 'c': [],}"
    assert parse_literal(text, 0) == {"a": [16, -7, "b"], 3: {}, "c": []}
    for bad in ("[1", "[1 2]", "{1}", "[x]", "{[1]: 2}", "", "[1,,2]", "[None]"):
        with pytest.raises(LiteralError):
            parse_literal(bad, 0)
