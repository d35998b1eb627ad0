"""Volatility 3's ISF: every kind of description, real files against built-in layouts, damage."""

from __future__ import annotations

import gzip
import json
import lzma
import time
from copy import deepcopy
from typing import Any

import pytest

from kvmtool.errors import FormatError
from kvmtool.source import BytesSource, FileSource
from kvmtool.types import layouts
from kvmtool.types.ctype import Array, Base, Compound, Enum, Field, Function, Pointer, Void
from kvmtool.types.declare import declare
from kvmtool.types.fixed import FixedTypes
from kvmtool.types.isf import is_isf, open_isf
from kvmtool.types.model import TypeTable
from tests.inputs import real
from tests.typed_members import compare

INT = {"kind": "base", "name": "int"}


def pointer(to: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "pointer", "subtype": to}


def bits(position: int, length: int) -> dict[str, Any]:
    kind = {"kind": "bitfield", "bit_position": position, "bit_length": length}
    return {**kind, "type": {"kind": "base", "name": "unsigned int"}}


NAME = {"kind": "array", "count": 17, "subtype": {"kind": "base", "name": "char"}}
UNNAMED = {"kind": "union", "name": "unnamed_5f3c"}
FIELDS = {
    "p_call": {"offset": 40, "type": pointer({"kind": "function"})},
    "p_comm": {"offset": 16, "type": NAME},
    "p_high": {"offset": 8, "type": bits(3, 29)},
    "p_low": {"offset": 8, "type": bits(0, 3)},
    "p_pid": {"offset": 0, "type": INT},
    "p_next": {"offset": 48, "type": pointer({"kind": "struct", "name": "proc"})},
    "p_task": {"offset": 56, "type": pointer({"kind": "struct", "name": "task"})},
    "unnamed_field_4": {"offset": 4, "anonymous": True, "type": UNNAMED},
}


def content(**more: Any) -> dict[str, Any]:
    """A small file; `more` replaces parts of it."""
    number = {"kind": "int", "endian": "little"}
    parts = {
        "metadata": {"format": "6.2.0", "producer": {"name": "a test", "version": "1"}},
        "base_types": {
            "int": {**number, "size": 4, "signed": True},
            "unsigned int": {**number, "size": 4, "signed": False},
            "pointer": {**number, "size": 8, "signed": False},
            "char": {"kind": "char", "size": 1, "signed": True, "endian": "little"},
            "bool": {"kind": "bool", "size": 1, "signed": False, "endian": "little"},
            "double": {"kind": "float", "size": 8, "signed": True, "endian": "little"},
            "void": {"kind": "void", "size": 0, "signed": False, "endian": "little"},
        },
        "user_types": {
            "proc": {"kind": "struct", "size": 64, "fields": {**FIELDS}},
            "unnamed_5f3c": {
                "kind": "union",
                "size": 4,
                "fields": {
                    "u_color": {"offset": 0, "type": {"kind": "enum", "name": "color"}},
                    "u_count": {"offset": 0, "type": INT},
                },
            },
        },
        "enums": {
            "color": {"base": "int", "size": 4, "constants": {"GREEN": 7, "RED": -1}},
        },
        "symbols": {
            "allproc": {"address": 0xFFFFFF8000B84418, "type": pointer(INT)},
            "version": {"address": 0x1000, "constant_data": "RGFyd2luAA=="},
            "nothing": {"address": 0},
        },
    }
    return deepcopy(parts) | more


def opened(tmp_path, parts: dict[str, Any] | bytes, name: str = "types.json"):
    path = str(tmp_path / name)
    with open(path, "wb") as file:
        file.write(parts if isinstance(parts, bytes) else json.dumps(parts).encode())
    return open_isf(path)


def test_every_kind_of_description(tmp_path) -> None:
    source = opened(tmp_path, content())
    assert source.origin == f"ISF 6.2.0 in {tmp_path}/types.json"
    assert (source.pointer_size, source.byteorder) == (8, "<")
    assert set(source.names("tag")) == {"proc", "color"}
    proc = source.find("tag", "proc")
    assert isinstance(proc, Compound)
    assert (proc.kind, proc.size) == ("struct", 64)
    names = [field.name for field in proc.fields]
    order = ["p_pid", None, "p_low", "p_high", "p_comm", "p_call", "p_next", "p_task"]
    assert names == order  # in memory's order: the file has them by name
    fields = {field.name: field for field in proc.fields}
    assert fields["p_low"] == Field("p_low", fields["p_low"].type, 8, 0, 3)
    assert fields["p_high"][3:] == (3, 29)
    assert declare(fields["p_comm"].type, "p_comm") == "char p_comm[17]"
    assert isinstance(fields["p_call"].type.target, Function)
    assert fields["p_next"].type.target is proc
    task = fields["p_task"].type.target
    assert (task.kind, task.name, task.size) == ("struct", "task", None)
    inner = fields[None].type
    assert (inner.kind, inner.name) == ("union", None)
    assert TypeTable(source).offset("proc", "u_count") == 4


def test_enumerations_and_numbers(tmp_path) -> None:
    source = opened(tmp_path, content())
    color = source.find("tag", "color")
    assert isinstance(color, Enum)
    assert (color.size, color.signed) == (4, True)
    assert list(color.values) == [("RED", -1), ("GREEN", 7)]
    assert isinstance(source.find("base", "void"), Void)
    double, boolean = source.find("base", "double"), source.find("base", "bool")
    assert isinstance(double, Base)
    assert isinstance(boolean, Base)
    assert (double.size, double.form, boolean.form) == (8, "float", "bool")
    assert source.find("base", "nosuch") is None
    assert source.find("typedef", "pid_t") is None
    assert list(source.names("typedef")) == []


def test_symbols(tmp_path) -> None:
    source = opened(tmp_path, content())
    assert source.addresses() == {"allproc": 0xFFFFFF8000B84418, "version": 0x1000}
    assert declare(source.variable("allproc"), "allproc") == "int *allproc"
    assert source.variable("version") is None
    assert source.variable("nosuch") is None
    assert source.constant("version") == b"Darwin\0"
    assert source.constant("allproc") is None


def test_an_old_file_without_metadata(tmp_path) -> None:
    parts = content()
    del parts["metadata"], parts["enums"], parts["symbols"]
    source = opened(tmp_path, parts)
    assert source.origin.startswith("ISF of unknown version")
    assert TypeTable(source).size("proc") == 64
    assert source.addresses() == {}


def test_bits_of_a_big_endian_file_are_counted_from_the_first_byte(tmp_path) -> None:
    parts = content()
    for base in parts["base_types"].values():
        base["endian"] = "big"
    source = opened(tmp_path, parts)
    assert source.byteorder == ">"
    fields = {field.name: field for field in source.find("tag", "proc").fields}
    assert fields["p_low"][3:] == (29, 3)
    assert fields["p_high"][3:] == (0, 29)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes])
def test_packed_files_are_known_by_their_bytes(tmp_path, pack) -> None:
    packed = pack(json.dumps(content()).encode())
    assert is_isf(BytesSource(packed))
    assert TypeTable(opened(tmp_path, packed, "no.suffix")).size("proc") == 64


def test_other_files_are_not_isf() -> None:
    for other in (b"", b"{", b"{}", b'{"a": {}}', b"[1]", b"\x1f\x8b", b"\xfd7zXZ\0junk"):
        assert not is_isf(BytesSource(other)), other
    assert is_isf(BytesSource(b' {\n "symbols" : {'))


# real ones

REAL = {
    "i386-10.5.8": ("10.5.8 i386", 2178),
    "x86_64-10.8.5": ("10.8.5 x86_64", 2602),
    "x86_64-10.13.6": ("10.13.6 x86_64", 2881),
}


@pytest.mark.parametrize("kernel", list(REAL))
def test_real_files_equal_the_built_in_layouts(kernel: str) -> None:
    """Both come from debug kits, by two programs that know nothing of each other."""
    path = real(f"types/{kernel}.types.json.gz")
    assert is_isf(FileSource(path))
    source = open_isf(path)
    name, members = REAL[kernel]
    found = compare(TypeTable(source), layouts.table(name))
    print(f"{kernel}: {found.members} members of {found.structs} structures compared")
    # those of types/fixed.py have only the members they always had: tests/test_fixed_types.py
    written = FixedTypes(source.pointer_size).names("tag")
    assert {tag: what for tag, what in found.differences.items() if tag not in written} == {}
    assert found.members >= members
    assert source.pointer_size == (4 if kernel.startswith("i386") else 8)
    with gzip.open(real(f"types/{kernel}.symbols.json.gz")) as file:
        entries = json.load(file)
    kept = source.addresses()
    external = {name[1:]: value for name, n_type, _, _, value in entries if n_type == 0xF}
    same = [name for name, value in external.items() if kept.get(name) == value & (1 << 64) - 1]
    assert len(same) > 0.99 * len(external)


# damage


def refused(tmp_path, parts: dict[str, Any] | bytes) -> str:
    """What is said when everything is asked for."""
    with pytest.raises(FormatError) as error:
        source = opened(tmp_path, parts)
        for kind in ("tag", "base"):
            for name in source.names(kind):
                walk(source.find(kind, name))
        for name in ("allproc", "version"):
            source.variable(name)
            source.constant(name)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/types.json: ")
    assert "\n" not in message
    return message


def walk(found) -> None:
    if isinstance(found, Compound):
        for field in found.fields:
            walk_type(field.type)
    elif isinstance(found, Enum):
        list(found.values)


def walk_type(found) -> None:
    for _ in range(100):
        if not isinstance(found, (Pointer, Array)):
            return
        found = found.target


def changed(path: str, value: Any) -> dict[str, Any]:
    """`content` with the part at a dotted path replaced."""
    parts = content()
    *way, last = path.split(".")
    place = parts
    for step in way:
        place = place[step]
    place[last] = value
    return parts


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("user_types", [], "without user_types"),
        ("enums", 7, "expected an object as enums"),
        ("user_types.proc", 7, "proc: expected an object, got 7"),
        ("user_types.proc.size", -1, "proc: expected a size of 0 to 0x100000000, got -1"),
        ("user_types.proc.size", 1 << 40, "expected a size"),
        ("user_types.proc.size", True, "expected a size"),
        ("user_types.proc.size", 1e300, "expected a size"),
        ("user_types.proc.fields", [], "proc: expected fields, got []"),
        ("user_types.proc.fields.p_pid", None, "proc.p_pid: expected an offset and a type"),
        ("user_types.proc.fields.p_pid.offset", -8, "proc.p_pid: expected a offset"),
        ("user_types.proc.fields.p_pid.type", {"kind": "base"}, "expected a type"),
        ("user_types.proc.fields.p_pid.type", {"kind": "odd", "name": "x"}, "expected a type"),
        ("user_types.proc.fields.p_pid.type", {"kind": "pointer"}, "expected a subtype"),
        ("user_types.proc.fields.p_pid.type", {"kind": "base", "name": "x"}, "there is none"),
        ("user_types.proc.fields.p_comm.type.count", -1, "proc.p_comm: expected a count"),
        ("user_types.proc.fields.p_low.type.bit_length", 99, "expected a bit_length of 0 to 0x20"),
        ("user_types.proc.fields.p_low.type.bit_position", 30, "bit_position of 0 to 0x1d"),
        ("user_types.proc.fields.p_low.type.type", 7, "expected a type"),
        ("base_types.int.size", 4096, "base type int: expected a size of 0 to 0x20"),
        ("enums.color.constants", {"RED": "x"}, "enum color: expected numbers"),
        ("symbols.allproc.type", {"kind": "odd"}, "symbol allproc: expected a type"),
        ("symbols.version.constant_data", "?!", "constant_data is no base64"),
    ],
)
def test_descriptions_that_are_none(tmp_path, path: str, value: Any, message: str) -> None:
    assert message in refused(tmp_path, changed(path, value))


def test_nests_and_circles(tmp_path) -> None:
    deep: dict[str, Any] = INT
    for _ in range(200):
        deep = {"kind": "array", "count": 2, "subtype": deep}
    message = refused(tmp_path, changed("user_types.proc.fields.p_pid.type", deep))
    assert "nested deeper than 64" in message
    itself = {"kind": "struct", "name": "proc"}
    source = opened(tmp_path, changed("user_types.proc.fields.p_pid.type", itself))
    with pytest.raises(Exception, match="structures nested deeper"):
        TypeTable(source).size("proc")
    nest = b'{"user_types": {"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}}"
    assert "nested deeper than any ISF" in refused(tmp_path, nest)


def test_what_is_no_json(tmp_path) -> None:
    text = json.dumps(content()).encode()
    assert "is not JSON" in refused(tmp_path, text[:-10])
    assert "is not JSON" in refused(tmp_path, text.replace(b"proc", b"\xff\xfe"))
    assert "is not JSON" in refused(tmp_path, b'{"user_types": {"a": ' + b"9" * 5000 + b"}}")
    assert "stream" in refused(tmp_path, gzip.compress(text)[:-20])
    assert "stream" in refused(tmp_path, lzma.compress(text)[:-20])
    assert "without user_types" in refused(tmp_path, b"[]")


def test_hugeness_is_refused_before_it_takes_memory(tmp_path) -> None:
    began = time.process_time()
    many = b'{"user_types": {"a": [' + b"{}," * 3_100_000 + b"{}]}}"
    assert "expected at most 3000000 '{'" in refused(tmp_path, many)
    many = b'{"user_types": {"a": [' + b"7," * 10_100_000 + b"7]}}"
    assert "expected at most 10000000 ','" in refused(tmp_path, many)
    bomb = gzip.compress(bytes(200 << 20), 1)
    assert "expected at most 192 MiB" in refused(tmp_path, bomb)
    assert time.process_time() - began < 4
