"""Page tables: the words in which all of them are spoken of."""

from __future__ import annotations

from typing import NamedTuple

WRITE, EXECUTE, USER = 1, 2, 4
ALL_RIGHTS = WRITE | EXECUTE | USER

UNMAPPED, ABSENT, COMPRESSED = "unmapped", "absent", "compressed"
MALFORMED, NON_CANONICAL = "malformed", "non-canonical"
TABLE, PAGE = "table", "page"  # what an entry leads to; any other word is why it leads nowhere


class Level(NamedTuple):
    """A level of the tree: its `name`, the lowest address bit it resolves, its index bits."""

    name: str
    shift: int
    bits: int


class Step(NamedTuple):
    """One lookup: entry number `slot` of the table at physical address `table` is `entry`.

    `entry` is None when the table is not in the dump; `flags` are its bits in words.
    """

    level: str
    table: int
    slot: int
    entry: int | None
    flags: str


class Walk(NamedTuple):
    """How an address is translated, and to what.

    `physical` is None, and `reason` says why, where there is no translation; `size` is the bytes
    of the page (or of the hole) from the address on; `permissions` as in `permissions()`.
    """

    steps: tuple[Step, ...]
    physical: int | None
    size: int
    permissions: str
    reason: str


class Window(NamedTuple):
    """Translations of neighbouring addresses: extent i is [starts[i], starts[i + 1]).

    `deltas[i]` is what to add for the physical address, None where there is none; `what[i]` is
    the rights of the mapping, or the reason there is none.
    """

    starts: list[int]
    deltas: list[int | None]
    what: list[int | str]


def permissions(rights: int) -> str:
    """Rights as text: "r", then w, x and u (user) or a dash for each that is missing."""
    return (
        "r"
        + ("w" if rights & WRITE else "-")
        + ("x" if rights & EXECUTE else "-")
        + ("u" if rights & USER else "-")
    )
