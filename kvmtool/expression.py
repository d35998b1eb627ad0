"""Expressions as C writes them: text to a small tree. Nothing is looked up here.

What there is: names, integers (decimal, 0x…), character constants, ``. -> [] * & - + ! ~``, casts,
``sizeof``, ``offsetof``, ``* / % + - << >> < <= > >= == != & ^ | && || ?:`` and parentheses, with
C's precedence. ``.`` and ``->`` are one, as in gdb. A kext's symbol is ``kext:symbol`` without
blanks; behind an open ``?``, where a colon is C's, and for names that are no identifiers, it is
written in double quotes: ``"com.apple.driver.AppleRTC:_start"``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import ExpressionError
from kvmtool.expression_tree import (
    Binary,
    Cast,
    Choice,
    Constant,
    Index,
    Member,
    Name,
    Node,
    OffsetOf,
    SizeOf,
    Unary,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH_LIMIT = 4096  # characters
TOKEN_LIMIT = 256
DEPTH_LIMIT = 48  # of parentheses, of operators before an operand


class Token(NamedTuple):
    """`kind` is "number", "char", "name", "quoted", "op", or "end"."""

    kind: str
    text: str
    column: int


_NAME = r"[A-Za-z_$][\w$]*"
_TOKEN = re.compile(
    rf"""(?P<number>[0-9][\w.]*)
    | (?P<char>'(?:[^'\\]|\\.)*')
    | "(?P<quoted>[^"]*)"
    | (?P<name>{_NAME})
    | (?P<op>->|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^~!<>?:()\[\].,=])""",
    re.VERBOSE | re.ASCII,
)
_KEXT_SYMBOL = re.compile(rf"(?:{_NAME})(?:\.[\w$]+)*:(?:{_NAME})", re.ASCII)
_ESCAPES = {"n": 10, "t": 9, "r": 13, "0": 0, "a": 7, "b": 8, "f": 12, "v": 11}
_CHARACTER = re.compile(r"\\x([0-9a-fA-F]{1,2})|\\(.)|(.)", re.DOTALL)

_BINARY = {
    op: power
    for power, ops in enumerate(
        ("||", "&&", "|", "^", "&", "== !=", "< <= > >=", "<< >>", "+ -", "* / %"), 2
    )
    for op in ops.split()
}
_CHOICE = 1
_PREFIX = ("*", "&", "-", "+", "!", "~")
_TAGS = ("struct", "union", "class", "enum")
_TYPE_WORDS = (
    *_TAGS,
    *("const", "volatile", "restrict", "_Atomic", "signed", "unsigned", "void", "char", "short"),
    *("int", "long", "float", "double", "_Bool"),
)


def tokens(text: str) -> list[Token]:
    """The tokens of `text`, an "end" last. Raises `ExpressionError`."""
    if len(text) > LENGTH_LIMIT:
        raise ExpressionError(f"an expression of {len(text)} characters, at most {LENGTH_LIMIT}")
    found: list[Token] = []
    at = choices = 0
    while (at := _first(text, at)) < len(text):
        kext = None if choices else _KEXT_SYMBOL.match(text, at)
        match = kext or _TOKEN.match(text, at)
        if match is None:
            raise ExpressionError(f"{text[at]!r} means nothing here", text, at)
        kind = "quoted" if kext else match.lastgroup or ""
        found.append(Token(kind, match.group(0 if kext else kind), at))
        choices += (found[-1].text == "?") - (found[-1].text == ":" and choices > 0)
        at = match.end()
        if len(found) > TOKEN_LIMIT:
            raise ExpressionError(f"more than {TOKEN_LIMIT} words", text, at)
    return [*found, Token("end", "the end", len(text))]


def _first(text: str, at: int) -> int:
    """Where the next token begins."""
    while text[at : at + 1] == " ":
        at += 1
    return at


def parse(text: str, is_type: Callable[[str], bool]) -> Node:
    """The tree of `text`; `is_type` tells whether a name that is in parentheses is a type's.

    Raises `ExpressionError`, and what `is_type` raises.
    """
    text = re.sub(r"\s", " ", text)
    return _Parser(text, is_type).whole()


class _Parser:
    def __init__(self, text: str, is_type: Callable[[str], bool]) -> None:
        self._text, self._is_type = text, is_type
        self._tokens = tokens(text)
        self._at = self._depth = 0

    def whole(self) -> Node:
        """The expression, and nothing behind it."""
        found = self._expression(0)
        self._expect("end", "an operator")
        return found

    # tokens

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    def _take(self) -> Token:
        token = self._next
        self._at += 1
        return token

    def _is(self, *texts: str) -> bool:
        return self._next.kind in ("op", "name") and self._next.text in texts

    def _wrong(self, expected: str) -> ExpressionError:
        token = self._next
        got = token.text if token.kind == "end" else repr(token.text)
        hint = ": memory is never written, to compare write ==" if token.text == "=" else ""
        return ExpressionError(f"expected {expected}, got {got}{hint}", self._text, token.column)

    def _expect(self, text: str, what: str = "") -> Token:
        if not (self._next.kind == text or self._is(text)):
            raise self._wrong(what or repr(text))
        return self._take()

    # expressions

    def _expression(self, power: int) -> Node:
        """What binds more tightly than `power`."""
        self._depth += 1
        if self._depth > DEPTH_LIMIT:
            what = f"nested deeper than {DEPTH_LIMIT}"
            raise ExpressionError(what, self._text, self._next.column)
        left = self._postfix(self._operand())
        while True:
            token = self._next
            binds = _BINARY.get(token.text, 0) if token.kind == "op" else 0
            if binds > power:
                self._take()
                left = Binary(token.column, token.text, left, self._expression(binds))
            elif self._is("?") and power < _CHOICE:
                left = self._choice(left)
            else:
                self._depth -= 1
                return left

    def _choice(self, test: Node) -> Node:
        column = self._take().column
        then = self._expression(0)
        self._expect(":")
        return Choice(column, test, then, self._expression(_CHOICE - 1))

    def _operand(self) -> Node:
        token = self._next
        if token.kind == "op" and token.text in _PREFIX:
            self._take()
            return Unary(token.column, token.text, self._tight())
        if self._is("("):
            return self._parenthesis()
        if self._is("sizeof"):
            return self._sizeof()
        if self._is("offsetof"):
            return self._offsetof()
        if token.kind in ("name", "quoted"):
            self._take()
            return Name(token.column, token.text)
        if token.kind == "number":
            return Constant(self._take().column, _number(token, self._text))
        if token.kind == "char":
            return Constant(self._take().column, _character(token, self._text))
        raise self._wrong("a value")

    def _tight(self) -> Node:
        """An operand with what stands behind it: what a unary operator and a cast apply to."""
        return self._expression(max(_BINARY.values()))

    def _postfix(self, left: Node) -> Node:
        while self._is(".", "->", "["):
            token = self._take()
            if token.text == "[":
                left = Index(token.column, left, self._expression(0))
                self._expect("]")
            else:
                name = self._expect("name", "the name of a member")
                left = Member(name.column, left, name.text)
        return left

    def _parenthesis(self) -> Node:
        opening = self._take()
        cast = self._type_before(")")
        if cast is not None:
            self._expect(")")
            return Cast(opening.column, cast, self._tight())
        inner = self._expression(0)
        self._expect(")")
        return inner

    def _sizeof(self) -> Node:
        column = self._take().column
        if self._is("("):
            before = self._at
            self._take()
            named = self._type_before(")")
            if named is not None:
                self._expect(")")
                return SizeOf(column, named)
            self._at = before
        return SizeOf(column, self._tight())

    def _offsetof(self) -> Node:
        column = self._take().column
        self._expect("(")
        named = self._type_before(",", sure=True)
        if named is None:
            raise self._wrong("the name of a type")
        self._expect(",")
        path = [self._expect("name", "the name of a member").text]
        while self._is(".", "["):
            if self._take().text == ".":
                path.append("." + self._expect("name", "the name of a member").text)
            else:
                path.append(f"[{_number(self._expect('number', 'a number'), self._text)}]")
                self._expect("]")
        self._expect(")")
        return OffsetOf(column, named, "".join(path))

    # names of types

    def _type_before(self, end: str, sure: bool = False) -> str | None:
        """The name of a type that stands here, with `end` behind it; None if there is none.

        Words like struct and unsigned, and stars before the `end`, make it one; another name alone
        is one if the kernel says so, or if nothing else can stand here (`sure`).
        """
        at, words = self._at, []
        while self._tokens[at].kind == "name":
            words.append(self._tokens[at].text)
            at += 1
        names = len(words)
        while self._tokens[at].text in ("*", "[", "]", "const") or (
            self._tokens[at].kind == "number" and self._tokens[at - 1].text == "["
        ):
            words.append(self._tokens[at].text)
            at += 1
        if not names or self._tokens[at].text != end:
            return None
        text = " ".join(words)
        known = words[0] in _TYPE_WORDS or "*" in words or names > 1
        if not (known or sure or self._is_type(words[0])):
            return None
        self._at = at
        return text


def _number(token: Token, text: str) -> int:
    parts = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)[uUlL]{0,3}", token.text, re.ASCII)
    if parts is None:
        raise ExpressionError(f"{token.text} is not an integer", text, token.column)
    digits = parts.group(1)
    if digits[:2] not in ("0x", "0X") and digits[0] == "0" and digits.strip("0"):
        plain = digits.lstrip("0")
        what = f"{digits} is ambiguous, write 0x{plain} or {plain}"
        raise ExpressionError(what, text, token.column)
    if len(digits) > 40 or int(digits, 0) >> 64:
        raise ExpressionError(f"{digits} has more than 64 bits", text, token.column)
    return int(digits, 0)


def _character(token: Token, text: str) -> int:
    """Up to four characters, the first the highest byte, as Apple's compilers have 'proc'."""
    value = count = 0
    for digits, escaped, plain in _CHARACTER.findall(token.text[1:-1]):
        code = int(digits, 16) if digits else _ESCAPES.get(escaped, ord(escaped or plain))
        value, count = value << 8 | code, count + 1
        if code > 0xFF:
            raise ExpressionError(f"{token.text} is not ASCII", text, token.column)
    if not 0 < count <= 4:
        raise ExpressionError(f"{token.text}: expected 1 to 4 characters", text, token.column)
    return value
