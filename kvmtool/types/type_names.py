"""The name of a type as C writes it in a cast: "struct proc *", "const char[17]", "pid_t".

A small part of the grammar: qualifiers and words, then stars, then array brackets. Functions have
no name here but through a typedef.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvmtool.errors import KvmError, NotFoundError
from kvmtool.types.ctype import Array, Base, Pointer, Qualified, Void
from kvmtool.types.near import near_misses, whose_types

if TYPE_CHECKING:
    from kvmtool.types.ctype import CType
    from kvmtool.types.model import TypeSource

_TOKEN = re.compile(r"\s*([A-Za-z_$][\w$:]*|\*|\[|\]|0[xX][0-9a-fA-F]{1,16}|[0-9]{1,18})")
_QUALIFIERS = ("const", "volatile", "restrict", "_Atomic")
_TAGS = ("struct", "union", "class", "enum")
_BASE_WORDS = ("signed", "unsigned", "char", "short", "int", "long", "float", "double", "_Bool")
_POINTERS_LIMIT = 8


def parse_type(text: str, source: TypeSource) -> CType:
    """The type that `text` names in `source`.

    Raises: NotFoundError("type") with near misses; `KvmError` for what is no type's name.
    """
    tokens = _tokens(text)
    found, rest = _specifier(tokens, text, source)
    stars = 0
    while rest and (rest[0] == "*" or rest[0] in _QUALIFIERS):
        if rest[0] == "*":
            stars += 1
            found = Pointer(found, source.pointer_size)
        else:
            found = Qualified(rest[0], found)
        rest = rest[1:]
        if stars > _POINTERS_LIMIT:
            raise KvmError(f"{text!r}: expected at most {_POINTERS_LIMIT} stars")
    return _arrays(found, rest, text)


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    text = text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise KvmError(f"{text!r}: expected the name of a type, got {text[at:]!r}")
        tokens.append(match.group(1))
        at = match.end()
    return tokens


def _specifier(tokens: list[str], text: str, source: TypeSource) -> tuple[CType, list[str]]:
    """The type before the stars, and the tokens from there on."""
    qualifiers, words = [], []
    at = 0
    while at < len(tokens) and re.match(r"[A-Za-z_$]", tokens[at]):
        if tokens[at] in _QUALIFIERS:
            qualifiers.append(tokens[at])
        else:
            words.append(tokens[at])
        at += 1
    if not words:
        raise KvmError(f"{text!r}: expected the name of a type")
    found = _named(words, source)
    for qualifier in reversed(qualifiers):
        found = Qualified(qualifier, found)
    return found, tokens[at:]


def _named(words: list[str], source: TypeSource) -> CType:
    name = " ".join(words)
    if words == ["void"]:
        return Void()
    if words[0] in _TAGS and len(words) == 2:
        kinds, name = ["tag"], words[1]
    elif set(words) <= set(_BASE_WORDS):
        return source.find("base", name) or _base(words, source.pointer_size)
    else:
        # the own names of base types first: "bool", "wchar_t" of a compiler
        kinds = ["typedef", "tag", "base"]
    for kind in kinds if len(words) <= 2 else ():
        found = source.find(kind, name)
        if found is not None:
            return found
    known = {other for kind in kinds for other in source.names(kind)}
    hint = whose_types(source.name, source.origin)
    raise NotFoundError("type", " ".join(words), near_misses(name, sorted(known)), hint)


def _base(words: list[str], pointer_size: int) -> Base:
    """C's own numbers in Apple's LP64 and ILP32. Raises `KvmError` for words C does not combine."""
    name = " ".join(words)
    if not _is_number(words):
        raise KvmError(f"{name!r}: expected the name of a type")
    if "float" in words or "double" in words:
        size = 4 if "float" in words else 16 if "long" in words else 8
        return Base(name, size, "float")
    if "_Bool" in words:
        return Base(name, 1, "bool", signed=False)
    if "char" in words:
        return Base(name, 1, "char", signed="unsigned" not in words)
    longs = words.count("long")
    size = 2 if "short" in words else 8 if longs == 2 else pointer_size if longs else 4
    return Base(name, size, "int", signed="unsigned" not in words)


def _is_number(words: list[str]) -> bool:
    """Whether C has a number of that name, its words in any order."""
    one = [word for word in ("float", "double", "_Bool", "char") if word in words]
    signs = words.count("signed") + words.count("unsigned")
    if one == ["char"]:
        return len(words) == 1 + signs <= 2
    if one:
        return len(words) == 1 or sorted(words) == ["double", "long"]
    widths = words.count("short"), words.count("long")
    return signs <= 1 and words.count("int") <= 1 and widths in ((0, 0), (1, 0), (0, 1), (0, 2))


def _arrays(found: CType, rest: list[str], text: str) -> CType:
    counts: list[int | None] = []
    while rest:
        if len(rest) >= 3 and rest[0] == "[" and rest[1][0].isdigit() and rest[2] == "]":
            counts.append(_count(rest[1], text))
            rest = rest[3:]
        elif rest[:2] == ["[", "]"]:
            counts.append(None)
            rest = rest[2:]
        else:
            raise KvmError(f"{text!r}: expected the name of a type, got {rest[0]!r}")
    for count in reversed(counts):
        found = Array(found, count)
    return found


def _count(digits: str, text: str) -> int:
    try:
        return int(digits, 0)
    except ValueError:  # 017 is octal in C, and a mistake in most mouths
        raise KvmError(
            f"{text!r}: expected a number without zeros before it, got {digits}"
        ) from None
