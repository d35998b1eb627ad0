"""The types of the commands' arguments: addresses, sizes, numbers, FILE@ADDRESS."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvmtool.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

    from kvmtool.kvm import Kvm

    _AddressType = click.ParamType["AddressExpr"]
    _IntType = click.ParamType[int]
    _KextType = click.ParamType[tuple[str, int]]
else:  # click before 8.4 is not generic
    _AddressType = _IntType = _KextType = click.ParamType

HIGHEST = (1 << 64) - 1

_NUMBER = "0[xX][0-9a-fA-F]{1,32}|[0-9]{1,32}"
# patterns as text: compiling all of them at start-up costs more than most commands ever use
_EXPRESSION = rf"(?s)(.+?)((?:\s*[+-]\s*(?:{_NUMBER}))*)"
_OFFSET = rf"([+-])\s*({_NUMBER})"
_SUFFIXED = rf"(?i)({_NUMBER})([kmgt]?)"
# Names of symbols, of a kext's (`kext:symbol`) and of Objective-C methods; the rest may be C.
_SYMBOL = r"(?s)[A-Za-z_$][\w$]*|[\w$.-]+:[\w$.]+|[-+]\[.*"
_OPERATORS = r"[][()*/%&|^~<>=!?.'\"]"
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class AddressExpr(NamedTuple):
    """An address as typed: `text`; `base` is the symbol in it or None, `offset` what is added.

    `base` is also whatever else stands there: `within` sees whether it is C.
    """

    text: str
    base: str | None
    offset: int

    def within(self, kvm: Kvm) -> int:
        """The address in `kvm`: as `resolve` has it, else what it means as an expression.

        That is the value of a pointer or integer, and of everything else the address. Raises what
        `kvmtool.evaluate` raises, too.
        """
        if self.base is None or re.fullmatch(_SYMBOL, self.base) or kvm.symbols.get(self.base):
            return self.resolve(kvm.address)
        from kvmtool.evaluate import address_of

        address = address_of(self.text, kvm.scope)
        if not 0 <= address <= HIGHEST:
            raise click.BadParameter(f"{self.text} is {address:#x}, expected 0 to {HIGHEST:#x}")
        return address

    def resolve(self, lookup: Callable[[str], int]) -> int:
        """The address, `lookup` giving that of a symbol.

        Raises what `lookup` raises (a `NotFoundError` for what looks like a number says how to
        write that number), and `click.BadParameter` for an address outside of 64 bits.
        """
        if self.base is None:
            return self.offset
        try:
            address = lookup(self.base) + self.offset
        except NotFoundError as error:
            if not re.fullmatch("[0-9a-fA-F]+", self.base):
                raise
            hint = f"as a number it is 0x{self.base}"
            raise NotFoundError(error.kind, error.name, error.near, hint) from error
        if not 0 <= address <= HIGHEST:
            raise click.BadParameter(f"{self.text} is {address:#x}, expected 0 to {HIGHEST:#x}")
        return address


class AddressParam(_AddressType):
    """0x…, decimal, ``symbol``, ``symbol+off``, ``symbol-off``, or C: an `AddressExpr`.

    Only what starts with a digit is a number: ``deadbeef`` and ``add`` are symbols. Zeros before a
    decimal number are refused, since nm prints hexadecimal that way and C means octal.
    """

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> AddressExpr:
        if isinstance(value, AddressExpr):
            return value
        text = str(value).strip()
        parts = re.fullmatch(_EXPRESSION, text)
        if parts is None:
            self.fail("expected an address: 0x…, decimal, symbol, symbol+offset", param, ctx)
        base, offsets = parts.groups()
        try:
            offset = sum(
                -_number(digits) if sign == "-" else _number(digits)
                for sign, digits in re.findall(_OFFSET, offsets)
            )
            if not re.match("[+-]?[0-9]", base) or re.search(_OPERATORS, base):
                return AddressExpr(text, base, offset)
            address = _number(base) + offset
        except ValueError as error:
            self.fail(f"{text}: {error}", param, ctx)
        if not 0 <= address <= HIGHEST:
            self.fail(f"{text} is {address:#x}, expected 0 to {HIGHEST:#x}", param, ctx)
        return AddressExpr(text, None, address)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The symbols that were listed last."""
        from kvmtool.cli.words import complete_symbols

        return complete_symbols(ctx, param, incomplete)


class SizeParam(_IntType):
    """A number of bytes: 4, 0x10, 4k, 1m, 2g, 1t (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        parts = re.fullmatch(_SUFFIXED, str(value).strip())
        if parts is None:
            self.fail(f"{value!r}: expected a size: 4, 0x10, 4k, 1m, 2g", param, ctx)
        digits, suffix = parts.groups()
        try:
            size = _number(digits) * _FACTORS[suffix.lower()]
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size > HIGHEST:
            self.fail(f"{value} is {size:#x} bytes, expected at most {HIGHEST:#x}", param, ctx)
        return size


class OffsetParam(_IntType):
    """A number that may be negative: 0x… or decimal."""

    name = "offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip()
        try:
            number = -_number(text[1:]) if text.startswith("-") else _number(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if abs(number) > HIGHEST:
            self.fail(f"{text}: expected at most {HIGHEST:#x}", param, ctx)
        return number


def _number(digits: str) -> int:
    """What `digits` mean. Raises ValueError."""
    if not re.fullmatch(_NUMBER, digits):
        raise ValueError(f"{digits} is not a number (0x… or decimal)")
    if digits[:2] in ("0x", "0X"):
        return int(digits, 16)
    if digits.startswith("0") and digits.strip("0"):
        plain = digits.lstrip("0")
        raise ValueError(f"{digits} is ambiguous, write 0x{plain} or {plain}")
    return int(digits)


class KextParam(_KextType):
    """FILE@ADDRESS, the address a number: the last @ divides."""

    name = "kext"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        path, _, address = str(value).rpartition("@")
        if not path:
            self.fail(f"{value!r}: expected FILE@ADDRESS, as kext@0x3bd01000", param, ctx)
        try:
            return path, _number(address)
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)


KEXT = KextParam()
ADDRESS = AddressParam()
SIZE = SizeParam()
OFFSET = OffsetParam()
