"""Dumps of memory, held against the real hexdump and od."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtool.cli import hexdump as hd
from kvmtool.cli.hexdump import Piece, columns_for, dump_units, hexdump, hexdump_rows
from kvmtool.cli.render import render
from kvmtool.unreadable import Unreadable

PAGE = bytes(range(256)) * 2 + bytes(64) + b"A" * 48 + b"A" * 47 + b"B" + b"tail"
SAMPLES = [
    PAGE,
    b"",
    b"x",
    bytes(16),
    bytes(32),
    bytes(33),
    bytes(48) + b"\1" + bytes(31),
    PAGE[:23],
]
OD_UNITS = [unit for unit in hd.UNITS if unit != "s"]


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run(*args, data):
    done = subprocess.run(args, input=data, capture_output=True, check=True, env={"LC_ALL": "C"})
    return done.stdout.decode("ascii")


@functools.cache
def gnu_od():
    """GNU od, which alone has --endian and 8-byte units everywhere."""
    version = subprocess.run([tool("od"), "--version"], capture_output=True, check=False).stdout
    if b"GNU coreutils" not in version:
        pytest.skip("od is not GNU od")
    return tool("od")


def hexdumped(data, address=0, width=8):
    out = io.StringIO()
    hexdump(data, address, address_width=width, out=out)
    return out.getvalue()


def dumped(data, unit, address=0, byteorder="little", width=6):
    out = io.StringIO()
    dump_units(data, address, unit, byteorder=byteorder, address_width=width, out=out)
    return out.getvalue()


def whole_units(data, unit):
    size = int(unit[1:] or 1)
    return data[: len(data) - len(data) % size]


@pytest.mark.parametrize("data", SAMPLES)
def test_hexdump_equals_hexdump_c(data):
    assert hexdumped(data) == run(tool("hexdump"), "-C", data=data)


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("unit", OD_UNITS)
def test_units_equal_od(unit, byteorder):
    command = (gnu_od(), "-A", "x", f"--endian={byteorder}", "-t", unit)
    for data in SAMPLES:
        data = whole_units(data, unit)
        assert dumped(data, unit, byteorder=byteorder) == run(*command, data=data)


def test_x4_equals_od_of_this_machine():
    expected = run(tool("od"), "-A", "x", "-t", "x4", data=PAGE)
    assert dumped(PAGE, "x4", byteorder=sys.byteorder).split() == expected.split()


@settings(deadline=None, max_examples=20)
@given(
    data=st.lists(st.sampled_from([bytes(16), b"0123456789abcdef", b"\xff\x80\n"])).map(b"".join)
)
def test_repeated_lines_collapse_as_in_both_tools(data):
    assert hexdumped(data) == run(tool("hexdump"), "-C", data=data)
    assert dumped(data, "x1") == run(gnu_od(), "-A", "x", "-t", "x1", data=data)


@given(data=st.binary(max_size=200), address=st.integers(0, 2**64 - 200))
def test_hexdump_round_trip(data, address):
    found = b""
    for line in hexdumped(data, address, 16).splitlines():
        if line == "*":
            last = found[-16:]
            continue
        place, digits = int(line[:16], 16) - address, line[16:66]
        while len(found) < place:
            found += last
        assert place == len(found)
        found += bytes.fromhex(digits)
        assert line == f"{address + place:016x}" or line[68] == line[-1] == "|"
    assert found == data


def test_addresses_are_those_of_the_memory():
    assert hexdumped(b"kernel_task\0", 0xFFFFFF8000B2EC85, 16) == (
        "ffffff8000b2ec85  6b 65 72 6e 65 6c 5f 74  61 73 6b 00              |kernel_task.|\n"
        "ffffff8000b2ec91\n"
    )
    assert dumped(bytes.fromhex("4f21d03b"), "x4", 0x441990, width=8) == (
        "00441990 3bd0214f\n00441994\n"  # the article's cdevsw[11].d_read
    )


def test_a_cut_off_unit_shows_the_bytes_there_are():
    data = bytes.fromhex("11223344 f5f6")
    assert dumped(data, "x4") == "000000 44332211     f6f5\n000006\n"
    assert dumped(data, "x4", byteorder="big") == "000000 11223344     f5f6\n000006\n"
    assert dumped(data, "d4") == "000000  1144201745       63221\n000006\n"
    assert list(hexdump_rows(data, 0, "x4")) == [
        {"address": 0, "size": 6, "values": [0x44332211, 0xF6F5]}
    ]


HOLED = [
    Piece(0x1000, b"A" * 10, 10),
    Piece(0x100A, b"A" * 30, 30),
    Piece(0x1028, Unreadable("absent at 0x1028"), 0x10),
    Piece(0x1038, None, 0xFC8),
    Piece(0x2000, b"A" * 16, 16),
    Piece(0x2010, None, 0x10),
]


def test_holes_are_lines_of_their_own():
    assert hexdumped(HOLED, 0x1000) == (
        "00001000  41 41 41 41 41 41 41 41  41 41 41 41 41 41 41 41  |AAAAAAAAAAAAAAAA|\n"
        "*\n"
        "00001020  41 41 41 41 41 41 41 41                           |AAAAAAAA|\n"
        "00001028  unreadable: 0xfd8 bytes (absent at 0x1028)\n"
        "00002000  41 41 41 41 41 41 41 41  41 41 41 41 41 41 41 41  |AAAAAAAAAAAAAAAA|\n"
        "00002010  unreadable: 0x10 bytes\n"
        "00002020\n"
    )
    assert dumped(HOLED, "x8", 0x1000) == (
        "001000 4141414141414141 4141414141414141\n"
        "*\n"
        "001020 4141414141414141\n"
        "001028  unreadable: 0xfd8 bytes (absent at 0x1028)\n"
        "002000 4141414141414141 4141414141414141\n"
        "002010  unreadable: 0x10 bytes\n"
        "002020\n"
    )


def test_nothing_but_a_hole():
    hole = [Piece(0x1000, None, 0x20)]
    assert hexdumped(hole, 0x1000) == "00001000  unreadable: 0x20 bytes\n00001020\n"
    assert list(hexdump_rows(hole, 0x1000, "x1")) == [
        {"address": 0x1000, "size": 0x20, "values": Unreadable("0x20 bytes at 0x1000")}
    ]


def test_holes_in_rows():
    rows = list(hexdump_rows(HOLED, 0x1000))
    assert [(row["address"], row["size"]) for row in rows] == [
        (0x1000, 16),
        (0x1010, 16),
        (0x1020, 8),
        (0x1028, 0xFD8),
        (0x2000, 16),
        (0x2010, 0x10),
    ]
    assert rows[3]["hex"] == rows[3]["ascii"] == Unreadable("absent at 0x1028")
    assert rows[4] == {"address": 0x2000, "size": 16, "hex": "41" * 16, "ascii": "A" * 16}


@given(data=st.binary(max_size=100), cuts=st.lists(st.integers(0, 100)))
def test_where_the_pieces_are_cut_does_not_matter(data, cuts):
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [
        Piece(7 + start, data[start:end], end - start) for start, end in itertools.pairwise(edges)
    ]
    assert dumped(pieces, "x2", 7) == dumped(data, "x2", 7)
    assert list(hexdump_rows(pieces, 7)) == list(hexdump_rows(data, 7))
    assert dumped(pieces, "s", 7) == dumped(data, "s", 7)


def test_a_dump_is_written_while_it_is_read():
    out = io.StringIO()

    def pieces():
        for page in range(3):
            assert out.getvalue().count("\n") == page * 256
            yield Piece(page * 4096, bytes(range(256)) * 16, 4096)

    hexdump(pieces(), 0, address_width=8, out=out)
    assert out.getvalue().count("\n") == 3 * 256 + 1


@given(data=st.binary(max_size=100), unit=st.sampled_from(["x", "u", "d", "o"]))
def test_values_of_rows_are_the_bytes(data, unit):
    for size in (1, 2, 4, 8):
        whole = whole_units(data, f"{unit}{size}")
        rows = hexdump_rows(whole, 0, f"{unit}{size}", byteorder="big")
        values = [value for row in rows for value in row["values"]]
        assert all(isinstance(value, str if size == 8 else int) for value in values)
        numbers = [int(value, 0) if size == 8 else value for value in values]
        assert b"".join(n.to_bytes(size, "big", signed=unit == "d") for n in numbers) == whole


@pytest.mark.parametrize("unit", [None, *hd.UNITS])
def test_every_row_has_the_columns_it_should(unit):
    for pieces in ([Piece(0, PAGE, len(PAGE)), Piece(len(PAGE), None, 16)], [Piece(0, None, 4)]):
        for row in hexdump_rows(pieces, 0, unit):
            assert list(row) == [column.name for column in columns_for(unit)]
        out = io.StringIO()
        render(hexdump_rows(pieces, 0, unit), columns_for(unit), "json", out)
        assert json.loads(out.getvalue())


def test_names_and_characters_in_rows():
    assert next(hexdump_rows(b"a\0\xff", 0, "c"))["values"] == ["a", "\\0", "377"]
    assert next(hexdump_rows(b"a\0\xff", 0, "a"))["values"] == ["a", "nul", "del"]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (b"Darwin Kernel\0rest", "00001000 Darwin Kernel\n"),
        (b"", "00001000   (no NUL in 0x0 bytes)\n"),
        (b"abc", "00001000 abc  (no NUL in 0x3 bytes)\n"),
        (b"\x1b[1m\xff\n\0", "00001000 \\x1b[1m\\xff\\n\n"),
        (
            [Piece(0x1000, b"ab", 2), Piece(0x1002, Unreadable("absent at 0x1002"), 6)],
            "00001000 ab\n00001002  unreadable: 0x6 bytes (absent at 0x1002)\n",
        ),
        ([Piece(0x1000, None, 6)], "00001000  unreadable: 0x6 bytes\n"),
        ([Piece(0x1000, b"a\0", 2), Piece(0x1002, None, 6)], "00001000 a\n"),
    ],
)
def test_a_string_ends_at_its_nul(pieces, text):
    assert dumped(pieces, "s", 0x1000, width=8) == text


def test_strings_in_rows():
    assert list(hexdump_rows(b"caf\xc3\xa9\xff\0x", 16, "s")) == [
        {"address": 16, "size": 6, "string": "café\udcff", "terminated": True}
    ]
    hole = Unreadable("absent at 0x12")
    assert list(hexdump_rows([Piece(16, b"ab", 2), Piece(18, hole, 6)], 16, "s")) == [
        {"address": 16, "size": 2, "string": "ab", "terminated": False},
        {"address": 18, "size": 6, "string": hole, "terminated": hole},
    ]


@pytest.mark.parametrize("unit", ["x3", "x16", "f4", "", "x"])
def test_unknown_units_are_refused(unit):
    with pytest.raises(ValueError, match="unknown unit"):
        dumped(b"", unit)
    with pytest.raises(ValueError, match="expected one of x1, x2"):
        list(hexdump_rows(b"", 0, unit))
