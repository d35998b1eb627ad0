"""Memory as text: the canonical hexdump, units as od shows them, and both as rows.

A range with holes is given as pieces, in order and without gaps. A hole is shown as what it is; no
byte is made up, so a unit of which only some bytes are there shows just those (in hexadecimal: two
digits for each byte).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TextIO, TypeAlias

from kvmtool.cli.render import Column, visible
from kvmtool.unreadable import Unreadable

ByteOrder: TypeAlias = Literal["little", "big"]

UNITS = (
    *("x1", "x2", "x4", "x8", "d1", "d2", "d4", "d8", "u1", "u2", "u4", "u8"),
    *("o1", "o2", "o4", "o8", "c", "a", "s"),
)
LINE = 16  # bytes

_DOTS = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))
_ESCAPES = {0: "\\0", 7: "\\a", 8: "\\b", 9: "\\t", 10: "\\n", 11: "\\v", 12: "\\f", 13: "\\r"}
_ASCII_NAMES = (
    "nul soh stx etx eot enq ack bel bs ht nl vt ff cr so si "
    "dle dc1 dc2 dc3 dc4 nak syn etb can em sub esc fs gs rs us sp"
)


class Piece(NamedTuple):
    """`size` bytes from `address` on: `data`, or a hole (None, or `Unreadable` which says why)."""

    address: int
    data: bytes | Unreadable | None
    size: int


Data: TypeAlias = bytes | Iterable[Piece]


def hexdump(data: Data, address: int, *, address_width: int, out: TextIO) -> None:
    """Write `data` from `address` on as ``hexdump -C`` does.

    `address_width` is in digits. Lines that repeat the line above collapse to one ``*``; the last
    line is the address behind the data, unless there is none.
    """

    def text_of(line: bytes) -> str:
        left, right = line[:8].hex(" "), line[8:].hex(" ")
        return f"  {left:<23}  {right:<23}  |{line.translate(_DOTS).decode('ascii')}|"

    if data:
        out.writelines(_dump(_pieces(data, address), address, f"0{address_width}x", text_of))


def dump_units(
    data: Data, address: int, unit: str, *, byteorder: ByteOrder, address_width: int, out: TextIO
) -> None:
    """Write `data` from `address` on as ``od -A x -t UNIT`` does; `unit` is one of `UNITS`.

    ``s``, which od lacks, is the one string that starts at `address` and ends at its NUL.
    Raises ValueError for another unit.
    """
    width = f"0{address_width}x"
    if unit == "s":
        out.writelines(_string_lines(_pieces(data, address), address, width))
        return
    kind = _unit(unit, byteorder)

    def text_of(line: bytes) -> str:
        values = kind.values(line)
        return "".join(f" {kind.show(value, size):>{kind.width}}" for value, size in values)

    out.writelines(_dump(_pieces(data, address), address, width, text_of))


def hexdump_rows(
    data: Data, address: int, unit: str | None = None, *, byteorder: ByteOrder = "little"
) -> Iterator[dict[str, Any]]:
    """The same as rows, 16 bytes each, a hole in one row: for json and csv.

    Without a unit a row has the keys address, size, hex and ascii; for ``s`` address, size, string
    and terminated (whether its NUL was found); for another unit address, size and values. Values of
    8 bytes are text (``0x…`` for x8, ``0o…`` for o8, decimal for d8 and u8), whatever their size,
    since many readers of json damage numbers above 2^53; smaller ones are numbers; c and a are
    text. Raises ValueError for an unknown unit.
    """
    pieces = _pieces(data, address)
    if unit == "s":
        yield from _string_rows(pieces, address)
        return
    kind = None if unit is None else _unit(unit, byteorder)
    for piece in _lines(pieces):
        row: dict[str, Any] = {"address": piece.address, "size": piece.size}
        line = piece.data if isinstance(piece.data, bytes) else None
        if kind is not None:
            values = [] if line is None else [kind.store(v) for v, _ in kind.values(line)]
            row["values"] = _why(piece) if line is None else values
        elif line is not None:
            row |= {"hex": line.hex(), "ascii": line.translate(_DOTS).decode("ascii")}
        else:
            row |= {"hex": _why(piece), "ascii": _why(piece)}
        yield row


def columns_for(unit: str | None) -> tuple[Column, ...]:
    """The columns of what `hexdump_rows` yields for `unit`."""
    place = (Column("address", "ADDRESS", "address"), Column("size", "SIZE", "number"))
    if unit is None:
        return (*place, Column("hex", "HEX"), Column("ascii", "ASCII"))
    if unit == "s":
        return (*place, Column("string", "STRING"), Column("terminated", "TERMINATED"))
    return (*place, Column("values", "VALUES", "list" if unit in ("a", "c") else "number"))


def _pieces(data: Data, address: int) -> Iterable[Piece]:
    return [Piece(address, data, len(data))] if isinstance(data, bytes) else data


def _lines(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of one line each, however the data was cut; holes that touch are one hole."""
    rest, hole = b"", None
    end = 0
    for piece in pieces:
        if isinstance(piece.data, bytes):
            if hole is not None:
                yield hole
                hole = None
            rest += piece.data
            start = piece.address + piece.size - len(rest)
            whole = len(rest) - len(rest) % LINE
            for off in range(0, whole, LINE):
                yield Piece(start + off, rest[off : off + LINE], LINE)
            rest = rest[whole:]
        else:
            if rest:
                yield Piece(end - len(rest), rest, len(rest))
                rest = b""
            hole = piece if hole is None else hole._replace(size=hole.size + piece.size)
        end = piece.address + piece.size
    if hole is not None:
        yield hole
    elif rest:
        yield Piece(end - len(rest), rest, len(rest))


def _dump(
    pieces: Iterable[Piece], end: int, width: str, text_of: Callable[[bytes], str]
) -> Iterator[str]:
    before, starred = None, False
    for piece in _lines(pieces):
        end = piece.address + piece.size
        if not isinstance(piece.data, bytes):
            yield f"{piece.address:{width}}  {_hole_text(piece)}\n"
        elif piece.data != before:
            yield f"{piece.address:{width}}{text_of(piece.data)}\n"
        elif not starred:
            yield "*\n"
        starred = piece.data == before
        before = piece.data if isinstance(piece.data, bytes) else None
    yield f"{end:{width}}\n"


def _hole_text(piece: Piece) -> str:
    reason = f" ({visible(piece.data.reason)})" if isinstance(piece.data, Unreadable) else ""
    return f"unreadable: {piece.size:#x} bytes{reason}"


def _why(piece: Piece) -> Unreadable:
    if isinstance(piece.data, Unreadable):
        return piece.data
    return Unreadable(f"{piece.size:#x} bytes at {piece.address:#x}")


class _Unit(NamedTuple):
    """How the bytes of a line become values: `show` as od prints one, `store` as a row has it."""

    size: int
    byteorder: ByteOrder
    signed: bool
    width: int  # characters
    show: Callable[[int, int], str]  # of the value and its bytes, fewer than size at a cut
    store: Callable[[int], int | str]

    def values(self, line: bytes) -> list[tuple[int, int]]:
        """The values and of how many bytes each was made; a part's top bit is not a sign."""
        parts = [line[off : off + self.size] for off in range(0, len(line), self.size)]
        return [
            (int.from_bytes(p, self.byteorder, signed=self.signed and len(p) == self.size), len(p))
            for p in parts
        ]


def _unit(name: str, byteorder: ByteOrder) -> _Unit:
    if name not in UNITS or name == "s":
        raise ValueError(f"unknown unit {name!r}, expected one of {', '.join(UNITS)}")
    if name in ("c", "a"):
        names = [_char(byte) if name == "c" else _ascii_name(byte) for byte in range(256)]
        return _Unit(1, byteorder, False, 3, lambda value, _: names[value], names.__getitem__)
    letter, size = name[0], int(name[1:])
    lowest = -(1 << (8 * size - 1)) if letter == "d" else (1 << (8 * size)) - 1
    show = _SHOW[letter]
    store = _STORE[letter] if size == 8 else int
    return _Unit(size, byteorder, letter == "d", len(show(lowest, size)), show, store)


_SHOW: dict[str, Callable[[int, int], str]] = {
    "x": lambda value, size: f"{value:0{2 * size}x}",
    "o": lambda value, size: f"{value:0{(8 * size + 2) // 3}o}",
    "d": lambda value, _: str(value),
    "u": lambda value, _: str(value),
}
_STORE: dict[str, Callable[[int], str]] = {"x": hex, "o": oct, "d": str, "u": str}


def _char(byte: int) -> str:
    return _ESCAPES.get(byte) or (chr(byte) if 0x20 <= byte < 0x7F else f"{byte:03o}")


def _ascii_name(byte: int) -> str:
    byte &= 0x7F  # as od does, and POSIX asks
    return "del" if byte == 0x7F else _ASCII_NAMES.split()[byte] if byte <= 0x20 else chr(byte)


def _string(pieces: Iterable[Piece]) -> tuple[bytes, bool, Piece | None]:
    """The bytes before the first NUL, whether there is one, and the hole that comes before it."""
    got = bytearray()
    for piece in _lines(pieces):
        if not isinstance(piece.data, bytes):
            return bytes(got), False, piece
        text, nul, _ = piece.data.partition(b"\0")
        got += text
        if nul:
            return bytes(got), True, None
    return bytes(got), False, None


def _string_lines(pieces: Iterable[Piece], address: int, width: str) -> Iterator[str]:
    got, ended, hole = _string(pieces)
    text = visible(got.decode("utf-8", "surrogateescape"))
    note = "" if ended or hole else f"  (no NUL in {len(got):#x} bytes)"
    if got or not hole:
        yield f"{address:{width}} {text}{note}\n"
    if hole:
        yield f"{hole.address:{width}}  {_hole_text(hole)}\n"


def _string_rows(pieces: Iterable[Piece], address: int) -> Iterator[dict[str, Any]]:
    got, ended, hole = _string(pieces)
    if got or not hole:
        text = got.decode("utf-8", "surrogateescape")
        yield {"address": address, "size": len(got), "string": text, "terminated": ended}
    if hole:
        cell = _why(hole)
        yield {"address": hole.address, "size": hole.size, "string": cell, "terminated": cell}
