"""Rows as table, json, jsonl and csv; what a hostile name may not do to the output."""

from __future__ import annotations

import copy
import csv
import io
import json
import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.cli import params, render
from kvmtool.cli.render import Address, Column, render_one, visible
from kvmtool.cli.tables import fit, width_of
from kvmtool.unreadable import Unreadable

COLUMNS = (
    Column("pid", "PID", "number"),
    Column("addr", "ADDR", "address"),
    Column("comm", "COMMAND"),
    Column("groups", "GROUPS", "list"),
    Column("zombie", "Z"),
)
ROWS = (
    {"pid": 0, "addr": 0xFFFFFF8000B2EC80, "comm": "kernel_task", "groups": [0, 1], "zombie": True},
    {"pid": 12, "addr": 0x0000F00D, "comm": None, "groups": [], "zombie": False},
    {
        "pid": Unreadable("absent at 0x1000"),
        "addr": None,
        "comm": "=x",
        "groups": None,
        "zombie": 0,
    },
)
ANY_TEXT = st.text(st.characters())
SURROGATE_ESCAPED = st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))


def shown(rows, columns, format):
    out = io.StringIO()
    render.render(rows, columns, format, out)
    return out.getvalue()


def shown_one(record, format, columns=()):
    out = io.StringIO()
    render_one(record, format, out, columns=columns)
    return out.getvalue()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A function from rows, columns and a width to what a colour terminal gets."""

    def show(rows, columns, width):
        monkeypatch.setenv("COLUMNS", str(width))
        out = Terminal()
        render.render(rows, columns, "table", out)
        return out.getvalue()

    unwanted = ("FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM", "CLICOLOR", "CLICOLOR_FORCE")
    for name in ("NO_COLOR", *unwanted):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return show


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_every_format_of_the_command_line_is_written():
    for name in params.FORMATS:
        assert shown(ROWS, COLUMNS, name)
    with pytest.raises(KeyError):
        shown(ROWS, COLUMNS, "xml")


def test_table_is_aligned_and_has_no_trailing_spaces():
    assert shown(ROWS, COLUMNS, "table") == (
        "PID                ADDR  COMMAND      GROUPS  Z\n"
        "  0  0xffffff8000b2ec80  kernel_task  0 1     yes\n"
        " 12              0xf00d  -\n"
        "  ?                   -  =x           -       0\n"
    )


def test_json_is_one_array_of_objects():
    assert json.loads(shown(ROWS, COLUMNS, "json")) == [
        {
            "pid": 0,
            "addr": "0xffffff8000b2ec80",
            "comm": "kernel_task",
            "groups": [0, 1],
            "zombie": True,
        },
        {"pid": 12, "addr": "0xf00d", "comm": None, "groups": [], "zombie": False},
        {
            "pid": {"unreadable": "absent at 0x1000"},
            "addr": None,
            "comm": "=x",
            "groups": None,
            "zombie": 0,
        },
    ]
    assert '"zombie": true' in shown(ROWS, COLUMNS, "json")


def test_jsonl_is_the_same_a_line_each():
    lines = shown(ROWS, COLUMNS, "jsonl").splitlines()
    assert [json.loads(line) for line in lines] == json.loads(shown(ROWS, COLUMNS, "json"))


def test_csv_has_a_header_and_one_line_a_row():
    assert shown(ROWS, COLUMNS, "csv") == (
        "pid,addr,comm,groups,zombie\n"
        "0,0xffffff8000b2ec80,kernel_task,0 1,yes\n"
        "12,0xf00d,,,no\n"
        "unreadable: absent at 0x1000,,'=x,,0\n"
    )


@pytest.mark.parametrize(
    ("format", "empty"),
    [
        ("table", "PID  ADDR  COMMAND  GROUPS  Z\n"),
        ("json", "[]\n"),
        ("jsonl", ""),
        ("csv", "pid,addr,comm,groups,zombie\n"),
    ],
)
def test_no_rows(format, empty):
    assert shown([], COLUMNS, format) == empty


def test_columns_choose_what_is_shown_and_in_which_order():
    chosen = (COLUMNS[2], COLUMNS[0])
    assert shown(ROWS[:1], chosen, "json") == '[\n  {"comm": "kernel_task", "pid": 0}\n]\n'
    assert shown(ROWS[:1], chosen, "table") == "COMMAND      PID\nkernel_task    0\n"


def test_without_any_heading_there_is_no_line_of_headings():
    bare = [column._replace(heading="") for column in (COLUMNS[0], COLUMNS[2])]
    assert shown(ROWS[:2], bare, "table") == " 0  kernel_task\n12  -\n"


def test_a_row_that_lacks_a_column_is_a_bug_not_a_blank():
    with pytest.raises(KeyError, match="comm"):
        shown([{"pid": 1}], (COLUMNS[2],), "json")


def test_show_is_for_tables_only():
    column = Column("size", "SIZE", "number", lambda size: f"{size >> 10}k")
    rows = [{"size": 4096}, {"size": None}, {"size": Unreadable("cut off")}]
    assert shown(rows, [column], "table") == "SIZE\n  4k\n   -\n   ?\n"
    assert shown(rows[:1], [column], "json") == '[\n  {"size": 4096}\n]\n'
    assert shown(rows[:1], [column], "csv") == "size\n4096\n"


def test_addresses_are_text_wherever_they_stand():
    record = {"at": [0x10, None], "nested": {"start": Address(0xABC), "size": 0xABC}, "pc": 0xFF}
    columns = (Column("at", "AT", "address"), Column("pc", "PC", "address"))
    value = json.loads(shown_one(record, "json", columns))
    assert value == {"at": ["0x10", None], "nested": {"start": "0xabc", "size": 2748}, "pc": "0xff"}
    assert "start=0xabc size=2748" in shown_one(record, "table", columns)
    assert "0x10 -,start=0xabc size=2748,0xff" in shown_one(record, "csv", columns)


def test_numbers_above_2_to_the_53_stay_exact():
    assert shown([{"flags": 2**64 - 1}], [Column("flags", "FLAGS", "number")], "jsonl") == (
        '{"flags": 18446744073709551615}\n'
    )


def test_one_answer():
    record = {
        "format": "Mach-O core",
        "slide": None,
        "banner": Unreadable("absent at 0x2000"),
        "live": False,
        "notes": [{"name": "a", "size": 1}, {"name": "b", "size": 2}],
        "empty": "",
    }
    assert shown_one(record, "table", [Column("slide", "Slide", "address")]) == (
        "format  Mach-O core\n"
        "Slide   -\n"
        "banner  ? (absent at 0x2000)\n"
        "live    no\n"
        "notes   name=a size=1\n"
        "        name=b size=2\n"
        "empty\n"
    )
    value = json.loads(shown_one(record, "json"))
    assert value == record | {"banner": {"unreadable": "absent at 0x2000"}}
    assert json.loads(shown_one(record, "jsonl")) == value
    assert shown_one(record, "jsonl").count("\n") == 1
    assert shown_one({"a": 1, "b": "x"}, "csv") == "a,b\n1,x\n"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain", "plain"),
        ("naïve 日本", "naïve 日本"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\tc\x00", "a\\nb\\tc\\x00"),
        ("\x7f\x9b", "\\x7f\\u009b"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("launchd\u200b", "launchd\\u200b"),
        ("\udcff\udc9b", "\\xff\\x9b"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_what_does_not_print_is_escaped_in_tables_and_csv(text, escaped):
    assert visible(text) == escaped
    assert shown([{"comm": text}], [Column("comm", "COMMAND")], "table") == f"COMMAND\n{escaped}\n"
    assert shown([{"comm": text}], [Column("comm", "COMMAND")], "csv") == f"comm\n{escaped}\n"


def test_what_show_returns_is_escaped_too():
    column = Column("comm", "COMMAND", show=lambda name: f"<{name}>")
    assert shown([{"comm": "\x1b"}], [column], "table") == "COMMAND\n<\\x1b>\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝"])
def test_spreadsheets_do_not_evaluate_text(start):
    columns = [Column("t", "T"), Column("l", "L", "list"), Column("n", "N", "number")]
    row = {"t": start + "1", "l": [start + "a", "b"], "n": -1}
    assert shown([row], columns, "csv") == f"t,l,n\n'{start}1,'{start}a b,-1\n"
    assert shown([row | {"t": -1}], columns, "csv").startswith("t,l,n\n-1,")


def test_bytes_are_text():
    row = {"comm": b"caf\xc3\xa9\xff"}
    column = Column("comm", "COMMAND")
    assert shown([row], [column], "table") == "COMMAND\ncafé\\xff\n"
    assert json.loads(shown([row], [column], "jsonl"))["comm"].encode(
        "utf-8", "surrogateescape"
    ) == (b"caf\xc3\xa9\xff")


@pytest.mark.parametrize("format", params.FORMATS)
@given(text=ANY_TEXT | SURROGATE_ESCAPED)
def test_output_is_utf8_that_prints(format, text):
    # Lone surrogates would raise here; anything else must print, newlines between rows apart.
    out = shown(
        [{"comm": text, "args": [text]}], [Column("comm", "C"), Column("args", "A")], format
    )
    out.encode("utf-8")
    assert all(char.isprintable() for char in out.replace("\n", ""))


@given(texts=st.lists(ANY_TEXT | SURROGATE_ESCAPED), number=st.integers(0, 2**64 - 1))
def test_json_round_trip(texts, number):
    row = {"comm": texts, "n": number, "at": number}
    columns = [
        Column("comm", "C", "list"),
        Column("n", "N", "number"),
        Column("at", "A", "address"),
    ]
    expected = {"comm": texts, "n": number, "at": hex(number)}
    assert json.loads(shown([row], columns, "json")) == [expected]
    assert json.loads(shown([row], columns, "jsonl")) == expected
    assert json.loads(shown_one(row, "json", columns)) == expected


@given(rows=st.lists(st.tuples(st.text("abcé,;\"' \\=-"), st.integers())))
def test_csv_round_trip(rows):
    columns = [Column("t", "T"), Column("n", "N", "number")]
    out = shown(({"t": t, "n": n} for t, n in rows), columns, "csv")
    read = list(csv.DictReader(io.StringIO(out)))
    assert [
        (row["t"].removeprefix("'") if t[:1] in "=-" and t else row["t"], int(row["n"]))
        for row, (t, _) in zip(read, rows, strict=True)
    ] == rows


@given(
    rows=st.lists(st.lists(st.text("ab é日\u0301"), min_size=3, max_size=3), min_size=1),
)
def test_columns_of_a_table_start_in_the_same_cell(rows):
    columns = [Column(name, name.upper()) for name in "abc"]
    out = shown((dict(zip("abc", row, strict=True)) for row in rows), columns, "table")
    starts = [max(width_of(row[i]) for row in [["A", "B", "C"], *rows]) + 2 for i in range(2)]
    for row, line in zip(rows, out.split("\n")[1:], strict=False):
        blanks = [" " * (start - width_of(text)) for start, text in zip(starts, row, strict=False)]
        assert line == (row[0] + blanks[0] + row[1] + blanks[1] + row[2]).rstrip()


def test_a_long_table_does_not_wait_for_its_end():
    out = io.StringIO()

    def rows():
        for number in range(5000):
            if number == 4000:
                assert "\n2000\n" in out.getvalue()
            yield {"n": number}

    render.render(rows(), [Column("n", "N")], "table", out)
    assert out.getvalue().splitlines() == ["N", *map(str, range(5000))]


def failing():
    yield {"n": 1}
    yield {"n": 2}
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("format", "written"),
    [
        ("table", "N\n1\n2\n"),
        ("csv", "n\n1\n2\n"),
        ("jsonl", '{"n": 1}\n{"n": 2}\n'),
        ("json", '[\n  {"n": 1},\n  {"n": 2}'),
    ],
)
def test_rows_before_an_error_are_written_and_the_error_goes_on(format, written):
    out = io.StringIO()
    with pytest.raises(OSError, match="the disk is gone"):
        render.render(failing(), [Column("n", "N")], format, out)
    assert out.getvalue() == written


def test_an_error_before_the_first_row_leaves_no_lone_headings():
    out = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        render.render(({"n": 1 // zero} for zero in [0]), [Column("n", "N")], "table", out)
    assert out.getvalue() == ""


@pytest.mark.parametrize("format", params.FORMATS)
def test_broken_pipe_reaches_the_caller(format):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        render.render(ROWS, COLUMNS, format, Closed())


@pytest.mark.parametrize("format", params.FORMATS)
def test_a_stdout_that_lacks_a_character_shows_it_escaped(format):
    code = (
        "from kvmtool.cli.render import *\n"
        f"render([dict(comm='caf\\xe9 \\udcff')], [Column('comm', 'COMMAND')], {format!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    out = done.stdout.decode("ascii")
    if format.startswith("json"):
        value = json.loads(out)
        assert (value[0] if format == "json" else value) == {"comm": "café \udcff"}
    else:
        assert out.splitlines()[1] == "caf\\xe9 \\xff"


def test_piped_output_imports_nothing_heavy():
    code = (
        "import sys, io\n"
        "from kvmtool.cli import render, hexdump\n"
        "columns = [render.Column('n', 'N')]\n"
        "render.render([{'n': 1}], columns, 'table', io.StringIO())\n"
        "render.render_one({'n': 1}, 'table', io.StringIO())\n"
        "hexdump.hexdump(b'abc', 0, address_width=8, out=io.StringIO())\n"
        "for name in ('rich', 'json', 'csv', 'dataclasses', 'logging', 'construct', 'macholib'):\n"
        "    assert name not in sys.modules, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wide_terminal_gets_the_piped_table_with_bold_headings(terminal):
    out = terminal(ROWS, COLUMNS, 100)
    assert plain(out) == shown(ROWS, COLUMNS, "table")
    assert out.startswith("\x1b[1m")
    assert "\x1b" not in out.split("\n", 1)[1]


def test_no_color_means_no_escape_sequences(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(ROWS, COLUMNS, 100) == shown(ROWS, COLUMNS, "table")
    assert "\x1b" not in terminal(LONG, COLUMNS[:3], 60)


@pytest.mark.parametrize(
    ("environment", "at_terminal", "in_pipe"),
    [
        ({}, True, False),
        ({"CLICOLOR": "0"}, False, False),
        ({"CLICOLOR": "1"}, True, False),
        ({"CLICOLOR_FORCE": "1"}, True, True),
        ({"CLICOLOR_FORCE": "0"}, True, False),
        ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_the_environment_decides_on_colours(
    environment, at_terminal, in_pipe, terminal, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for width in (100, 50):
        assert ("\x1b" in terminal(LONG, COLUMNS[:3], width)) == at_terminal
    assert ("\x1b" in shown(LONG, COLUMNS[:3], "table")) == in_pipe


LONG = [
    {"pid": pid, "addr": 0xFFFFFF8000B2EC80 + pid, "comm": "/usr/libexec/" + "d" * pid}
    for pid in range(40)
]


def test_a_narrower_terminal_gets_text_cut_and_no_number(terminal):
    out = plain(terminal(LONG, COLUMNS[:3], 50))
    lines = out.splitlines()
    assert len(lines) == len(LONG) + 1
    assert all(width_of(line) <= 50 for line in lines)
    assert lines[0].split() == ["PID", "ADDR", "COMMAND"]
    assert re.findall(r"0x[0-9a-f]+", out) == [hex(row["addr"]) for row in LONG]
    room = 50 - len("PID  0xffffff8000b2ec80  ")
    for line, row in zip(lines[1:], LONG, strict=True):
        whole = row["comm"]
        shown = line.split()[2]
        assert shown == (whole if len(whole) <= room else whole[: room - 1] + "…")


def test_the_widest_text_gives_way_first(terminal):
    rows = [{"a": "short", "b": "x" * 60, "c": "middling text"}]
    out = plain(terminal(rows, [Column(name, name.upper()) for name in "abc"], 40))
    assert out.splitlines()[1].split("  ") == ["short", "x" * 17 + "…", "middling text"]


def test_headings_are_not_repeated_for_every_block(terminal):
    rows = [row | {"comm": "x" * 60} for row in LONG * 30]
    assert plain(terminal(rows, COLUMNS[:3], 50)).count("COMMAND") == 1


def test_a_terminal_too_narrow_for_columns_gets_paragraphs(terminal):
    assert terminal(LONG[:2], COLUMNS[:3], 24) == (
        "PID      0\n"
        "ADDR     0xffffff8000b2ec80\n"
        "COMMAND  /usr/libexec/\n"
        "\n"
        "PID      1\n"
        "ADDR     0xffffff8000b2ec81\n"
        "COMMAND  /usr/libexec/d\n"
        "\n"
    )


def test_terminal_escapes_of_a_name_never_reach_the_terminal(terminal):
    rows = [{"comm": "\x1b]0;owned\x07[bold]:smile:" * 9}]
    for width in (400, 40, 5):
        assert "\x1b]" not in terminal(rows, [COLUMNS[2]], width)
    assert "[bold]:smile:" in terminal(rows, [COLUMNS[2]], 400)


@given(
    widths=st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=9),
    room=st.integers(1, 300),
)
def test_fit(widths, room):
    sizes, fixed = zip(*widths, strict=True)
    fitted = fit(sizes, fixed, room)
    gaps = 2 * (len(sizes) - 1)
    if fitted is None:
        floor = sum(w if stays else min(w, 8) for w, stays in widths)
        assert floor + gaps > room
        return
    assert sum(fitted) + gaps <= room
    for now, (before, stays) in zip(fitted, widths, strict=True):
        assert now == before if stays else min(before, 8) <= now <= before


def test_unreadable_is_a_value_not_a_blank():
    cell = Unreadable("absent at 0xffffff8012345000")
    assert repr(cell) == "<unreadable: absent at 0xffffff8012345000>"
    assert bool(cell)
    assert cell == Unreadable(cell.reason)
    assert cell not in (Unreadable("other"), cell.reason)
    assert len({cell, Unreadable(cell.reason)}) == 1
    assert pickle.loads(pickle.dumps(cell)) == copy.copy(cell) == cell
    with pytest.raises(AttributeError):
        cell.reason = "x"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        cell.other = "x"  # type: ignore[attr-defined]
