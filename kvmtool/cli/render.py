"""Rows to what a person or a program reads: table, json, jsonl, csv.

How a value looks:

================  ======================  ==================================  ==================
value             table                   json, jsonl                         csv
================  ======================  ==================================  ==================
None              ``-``                   ``null``                            empty
True, False       ``yes``, empty          ``true``, ``false``                 ``yes``, ``no``
address           ``0xffffff8000200000``  ``"0xffffff8000200000"``            as in the table
other number      ``42``                  ``42``                              ``42``
`Unreadable`      ``?``                   ``{"unreadable": "absent at 0x…"}`` ``unreadable: …``
list              items and spaces        array                               items and spaces
mapping           ``key=value …``         object                              ``key=value …``
bytes             as text                 as text                             as text
text              escaped                 exact                               escaped
================  ======================  ==================================  ==================

Text comes from a kernel that may be hostile, so a character that does not print (control and
format characters, bidi overrides, bytes that are not UTF-8) never reaches the output: tables and
csv show it as `visible` does, json as ``\\uXXXX``, from which a program gets the exact value back
(a byte that is not UTF-8 is U+DC80…U+DCFF, as Python's surrogateescape has it). Text that a
spreadsheet would evaluate has a ``'`` before it in csv.

Nothing is buffered beyond one block of a table. When `rows` raises, what was read before is
written; a json array then stays open, so that a cut-off answer does not parse as a whole one.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO, TypeAlias

from kvmtool import progress
from kvmtool.cli.tables import GAP, Table, pad, width_of
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable


Kind: TypeAlias = Literal["text", "number", "address", "list"]
Row: TypeAlias = Mapping[str, Any]

_AS_IT_IS = frozenset((str, bool, float, type(None)))  # what JSON has, too; most cells are that
_FORMULA = tuple("=+-@＝＋－＠")  # what makes a spreadsheet evaluate a cell instead of showing it


class Column(NamedTuple):
    """One column: `name` is the JSON key and what -o takes, `heading` stands above the table.

    `kind` decides alignment and whether integers are addresses (in a list, each of them). `show`
    turns a value into what a person sees in the table; json and csv keep the value. It is not asked
    about None and `Unreadable`.
    """

    name: str
    heading: str
    kind: Kind = "text"
    show: Callable[[Any], str] | None = None


class Address(int):
    """An integer that is shown as ``0x…`` wherever it stands, for what no column describes."""


class Named(int):
    """An address that is shown by its name, such as a pointer to code; JSON has both."""

    text: str

    def __new__(cls, address: int, text: str) -> Named:
        """The address with its name."""
        made = super().__new__(cls, address)
        made.text = text
        return made


def render(
    rows: Iterable[Row], columns: Sequence[Column], format: str, out: TextIO | None = None
) -> None:
    """Write `rows` to `out` (stdout); every row has a value for every column.

    `format` is one of `kvmtool.cli.params.FORMATS`; json is one array, jsonl an object a line.
    Raises what `rows` and `out` raise (BrokenPipeError included), KeyError for another format.
    """
    _WRITERS[format](_alone(rows), columns, _stdout() if out is None else out)


def _alone(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows; what shows how far they are goes before one is written."""
    for row in rows:
        progress.pause()
        yield row
    progress.pause()


def render_one(
    record: Row, format: str, out: TextIO | None = None, *, columns: Sequence[Column] = ()
) -> None:
    """Write the one answer `record`: a line per key, one json object, or csv with one row.

    `columns` describe keys that need a kind, a heading or a show; the rest goes by its key. In the
    table a list of mappings takes a line for each item, and what is unreadable says why.
    """
    out = _stdout() if out is None else out
    known = {column.name: column for column in columns}
    described = [known.get(key) or Column(key, key) for key in record]
    if format == "table":
        out.writelines(_record_lines(record, described))
    elif format == "json":
        out.write(_json_encoder(out, indent=2)(_object(record, described)) + "\n")
    else:
        render([record], described, format, out)


def visible(text: str) -> str:
    """`text` with what does not print as an escape: ``\\x1b``, ``\\n``, ``\\u202e``.

    ``\\x80`` and above is always a byte that was not UTF-8, never the character of that number.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape's range
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return repr(char)[1:-1]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _stdout() -> TextIO:
    # Our own stream: a name that its encoding lacks is shown escaped instead of ending the program.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def _json(rows: Iterable[Row], columns: Sequence[Column], out: TextIO) -> None:
    encode = _json_encoder(out)
    before = "[\n  "
    for row in rows:
        out.write(before + encode(_object(row, columns)))
        before = ",\n  "
    out.write("[]\n" if before.startswith("[") else "\n]\n")


def _jsonl(rows: Iterable[Row], columns: Sequence[Column], out: TextIO) -> None:
    encode = _json_encoder(out)
    for row in rows:
        out.write(encode(_object(row, columns)) + "\n")


def _json_encoder(out: TextIO, indent: int | None = None) -> Callable[[object], str]:
    import json

    encoding = codecs.lookup(getattr(out, "encoding", None) or "utf-8").name
    to_text = json.JSONEncoder(ensure_ascii=encoding != "utf-8", allow_nan=False, indent=indent)

    def encode_safely(value: object) -> str:
        text = to_text.encode(value)
        if text.isprintable():
            return text
        # Outside of strings only the newlines of an indented object do not print.
        return "".join(
            char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text
        )

    return encode_safely


def _object(row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    found = {}
    for column in columns:
        name = column.name
        value = row[name]
        plain = type(value) in _AS_IT_IS
        found[name] = value if plain else _json_value(value, column.kind == "address")
    return found


def _json_value(value: Any, is_address: bool) -> Any:
    if type(value) is int:
        return f"{value:#x}" if is_address else value
    if isinstance(value, Unreadable):
        return {"unreadable": value.reason}
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Named):
        return {"address": f"{value:#x}", "name": value.text}
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}" if is_address or isinstance(value, Address) else value
    if isinstance(value, Mapping):
        return {key: _json_value(item, is_address) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, is_address) for item in value]
    return value


def _csv(rows: Iterable[Row], columns: Sequence[Column], out: TextIO) -> None:
    import csv

    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows([_csv_cell(row[column.name], column) for column in columns] for row in rows)


def _csv_cell(value: Any, column: Column) -> str:
    if value is None:
        return ""
    text = visible(_words(value, column.kind == "address"))
    is_number = isinstance(value, (int, float)) and not isinstance(value, Named)
    return f"'{text}" if not is_number and text.startswith(_FORMULA) else text


def _words(value: Any, is_address: bool = False) -> str:
    """`value` as text for csv, and for tables what is in it."""
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Unreadable):
        return f"unreadable: {value.reason}"
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Named):
        return value.text
    if isinstance(value, int):
        return f"{value:#x}" if is_address or isinstance(value, Address) else str(value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_words(item, is_address)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_words(item, is_address) for item in value)
    return str(value)


def _table_cell(value: Any, column: Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, Unreadable):
        return "?"
    if column.show is not None:
        return visible(column.show(value))
    return "" if value is False else visible(_words(value, column.kind == "address"))


def _record_lines(record: Row, columns: Sequence[Column]) -> Iterator[str]:
    labels = [column.heading or column.name for column in columns]
    indent = max(map(width_of, labels), default=0)
    for label, column in zip(labels, columns, strict=True):
        value = record[column.name]
        if isinstance(value, Unreadable):
            cells = [f"? ({visible(value.reason)})"]
        elif value is False and column.show is None:
            cells = ["no"]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            cells = [_table_cell(item, column) for item in value]
        else:
            cells = [_table_cell(value, column)]
        for number, cell in enumerate(cells):
            yield f"{pad('' if number else label, indent)}{GAP}{cell}".rstrip() + "\n"


def _table(rows: Iterable[Row], columns: Sequence[Column], out: TextIO) -> None:
    right = [column.kind in ("number", "address") for column in columns]
    table = Table([c.heading for c in columns], right, [c.name for c in columns], out)
    table.write([_table_cell(row[c.name], c) for c in columns] for row in rows)


_WRITERS = {"table": _table, "json": _json, "jsonl": _jsonl, "csv": _csv}
