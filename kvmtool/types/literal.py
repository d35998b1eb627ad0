"""Python's literals, without Python: what Volatility 2 profiles are written in.

Strings in quotes, whole numbers (Python 2's too: 0x10L), lists and dictionaries. `ast.literal_eval`
refuses Python 2's numbers and needs a hundred bytes of memory for each byte of text.
"""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'[^'\\\n]*'|"[^"\\\n]*")"""
    r"|(?P<number>-?(?:0[xX][0-9a-fA-F]{1,32}|[0-9]{1,40})[lL]?)"
    r"|(?P<sign>[][{},:]))"
)
_DEPTH_LIMIT = 32
_TOKENS_LIMIT = 200_000


class LiteralError(ValueError):
    """No literal: `offset` is where in the text."""

    def __init__(self, offset: int, message: str) -> None:
        self.offset = offset
        super().__init__(message)


class _Tokens:
    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self.left = _TOKENS_LIMIT
        self.depth = 0
        self.step()

    def step(self) -> None:
        """Go to the next token: `kind` is "text", "number" or "sign", `value` as it stands."""
        self.left -= 1
        found = _TOKEN.match(self.text, self.at)
        if found is None or self.left < 0:
            what = "more than any structure has" if self.left < 0 else "a literal"
            got = self.text[self.at : self.at + 20].strip()
            raise LiteralError(self.at, f"expected {what}, got {got!r}")
        self.kind, self.at = found.lastgroup, found.end()
        self.value = found[found.lastgroup or 0]

    def take(self, sign: str) -> None:
        """The present token must be this one; on to the next, but not beyond the last bracket."""
        if self.kind != "sign" or self.value != sign:
            raise LiteralError(self.at, f"expected {sign!r}, got {self.value!r:.20}")
        if self.depth > 1 or sign not in "]}":
            self.step()


def parse_literal(text: str, at: int) -> Any:
    """The list or dictionary that begins at `at` of `text`, wherever it ends.

    Raises `LiteralError` for anything else, and for one deeper or longer than a structure's.
    """
    return _value(_Tokens(text, at))


def whole_number(text: str) -> int:
    """What the token of a number stands for: "0x10", "16", "16L"."""
    return int(text.rstrip("lL"), 16 if "x" in text.lower() else 10)


def _value(tokens: _Tokens) -> Any:
    if tokens.kind == "text":
        text = tokens.value[1:-1]
        tokens.step()
        return text
    if tokens.kind == "number":
        number = whole_number(tokens.value)
        tokens.step()
        return number
    if tokens.value not in "[{":
        raise LiteralError(tokens.at, f"expected a literal, got {tokens.value!r}")
    tokens.depth += 1
    if tokens.depth > _DEPTH_LIMIT:
        raise LiteralError(tokens.at, f"nested deeper than {_DEPTH_LIMIT}")
    found = _list(tokens) if tokens.value == "[" else _dictionary(tokens)
    tokens.depth -= 1
    return found


def _list(tokens: _Tokens) -> list[Any]:
    tokens.take("[")
    found = []
    while tokens.value != "]" or tokens.kind == "text":
        found.append(_value(tokens))
        if tokens.value != "]":
            tokens.take(",")
    tokens.take("]")
    return found


def _dictionary(tokens: _Tokens) -> dict[Any, Any]:
    tokens.take("{")
    found = {}
    while tokens.value != "}" or tokens.kind == "text":
        if tokens.kind == "sign":
            raise LiteralError(tokens.at, f"expected a key, got {tokens.value!r}")
        key = _value(tokens)
        tokens.take(":")
        found[key] = _value(tokens)
        if tokens.value != "}":
            tokens.take(",")
    tokens.take("}")
    return found
