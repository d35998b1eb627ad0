"""What a name that was not found may have meant, and names from files in messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def one_line(text: str) -> str:
    """`text` with what does not print escaped: a damaged name must not break a message."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def near_misses(wanted: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """Up to `limit` names of `known` that `wanted` may have meant, likeliest first."""
    from difflib import get_close_matches  # 4 ms, and only a mistake needs it

    return get_close_matches(wanted, known, limit)


def near_members(wanted: str, known: Sequence[str], limit: int = 3) -> list[str]:
    """As near_misses, but first what has the same last component ("fd_cdir" → "p_fd.fd_cdir")."""
    last = wanted.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return list(dict.fromkeys([*same, *near_misses(wanted, known, limit)]))[:limit]


def whose_types(name: str, origin: str) -> str:
    """The end of a message about something that types lack; what to do where they are built in."""
    if not origin.startswith("built-in"):
        return f"types are those of {name}"
    return f"types are the built-in ones of {name}: --types takes more (a dSYM, CTF, ISF)"
