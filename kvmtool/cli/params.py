"""What the commands have in common: the types of their arguments, and the options they share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click
from click.core import ParameterSource

from kvmtool.errors import NotFoundError

if TYPE_CHECKING:
    from kvmtool.cli.render import Column
    from kvmtool.kvm import Kvm

    _AddressType = click.ParamType["AddressExpr"]
    _IntType = click.ParamType[int]
    _KextType = click.ParamType[tuple[str, int]]
else:  # click before 8.4 is not generic
    _AddressType = _IntType = _KextType = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = ("table", "json", "jsonl", "csv")
HIGHEST = (1 << 64) - 1

_NUMBER = "0[xX][0-9a-fA-F]{1,32}|[0-9]{1,32}"
_EXPRESSION = re.compile(rf"(.+?)((?:\s*[+-]\s*(?:{_NUMBER}))*)", re.DOTALL)
_OFFSET = re.compile(rf"([+-])\s*({_NUMBER})")
_SUFFIXED = re.compile(rf"({_NUMBER})([kmgt]?)", re.IGNORECASE)
# Names of symbols, of a kext's (`kext:symbol`) and of Objective-C methods; the rest may be C.
_SYMBOL = re.compile(r"[A-Za-z_$][\w$]*|[\w$.-]+:[\w$.]+|[-+]\[.*", re.DOTALL)
_OPERATORS = re.compile(r"[][()*/%&|^~<>=!?.'\"]")
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
        if self.base is None or _SYMBOL.fullmatch(self.base) or kvm.symbols.get(self.base):
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
        parts = _EXPRESSION.fullmatch(text)
        if parts is None:
            self.fail("expected an address: 0x…, decimal, symbol, symbol+offset", param, ctx)
        base, offsets = parts.groups()
        try:
            offset = sum(
                -_number(digits) if sign == "-" else _number(digits)
                for sign, digits in _OFFSET.findall(offsets)
            )
            if not re.match("[+-]?[0-9]", base) or _OPERATORS.search(base):
                return AddressExpr(text, base, offset)
            address = _number(base) + offset
        except ValueError as error:
            self.fail(f"{text}: {error}", param, ctx)
        if not 0 <= address <= HIGHEST:
            self.fail(f"{text} is {address:#x}, expected 0 to {HIGHEST:#x}", param, ctx)
        return AddressExpr(text, None, address)


class SizeParam(_IntType):
    """A number of bytes: 4, 0x10, 4k, 1m, 2g, 1t (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        parts = _SUFFIXED.fullmatch(str(value).strip())
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


def format_option(command: Command) -> Command:
    """``--format``, for the argument `format`. No short form: -f belongs to ps and fstat."""
    option = click.option(
        "--format",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How to print the answer. Addresses are 0x… in each.",
    )
    return option(command)


def columns_option(command: Command) -> Command:
    """``-o``, for the argument `columns`: as `choose_columns` takes it."""
    option = click.option(
        "-o",
        "--columns",
        metavar="LIST",
        multiple=True,
        help="Columns to show, as ps has it: pid,comm; NAME=HEADING gives a heading. Repeatable.",
    )
    return option(command)


def choose_columns(
    columns: Sequence[Column], lists: Sequence[str], default: Sequence[str] = ()
) -> list[Column]:
    """The `columns` that the -o `lists` name, in their order; without lists `default`, or all.

    As in POSIX ps, names are separated by commas or blanks, and ``name=heading`` ends its list:
    the heading may hold both. Raises `click.BadParameter` for a name that is none.
    """
    known = {column.name: column for column in columns}
    if not lists:
        return [known[name] for name in default or known]
    chosen = []
    for text in lists:
        names, equals, heading = text.partition("=")
        for name in re.split(r"[,\s]+", names.strip(", \t\n")):
            column = known.get(name.lower())
            if column is None:
                every = ", ".join(known)
                raise click.BadParameter(f"no column {name!r}, expected: {every}", param_hint="-o")
            chosen.append(column)
        if equals:
            chosen[-1] = chosen[-1]._replace(heading=heading)
    return chosen


class Where(NamedTuple):
    """Which kernel to look into, as the user said it; None where nothing was said."""

    kernel: str | None = None
    core: str | None = None
    slide: int | None = None  # bytes
    arch: str | None = None
    format_name: str | None = None  # of the core: `kvmtool.formats` has the names
    force: bool = False
    kexts: tuple[tuple[str, int], ...] = ()  # files, and the addresses they are loaded at
    kernel_path: tuple[str, ...] = ()  # directories with kernels; none: KVMTOOL_KERNEL_PATH
    types: str | None = None  # a file with the kernel's types
    layout: str | None = None  # the name of a built-in layout


_KERNEL_OPTIONS = (
    click.option(
        "-N",
        "--kernel",
        type=click.Path(),
        metavar="FILE",
        envvar="KVMTOOL_KERNEL",
        show_envvar=True,
        help="The kernel, for its symbols.",
    ),
    click.option(
        "-M",
        "--core",
        type=click.Path(),
        metavar="FILE",
        envvar="KVMTOOL_CORE",
        show_envvar=True,
        help="The memory to read: a crash dump, a memory image.",
    ),
    click.option(
        "--slide",
        type=OFFSET,
        metavar="BYTES",
        help="How far the kernel was moved, where that is not found or found wrong.",
    ),
    click.option("--arch", metavar="NAME", help="Which part of a fat file: i386, x86_64, arm64."),
    click.option(
        "--core-format",
        "format_name",
        metavar="NAME",
        help="What the core is, when its bytes do not say so: raw, or raw@ADDRESS where it begins.",
    ),
    click.option("--force", is_flag=True, help="Go on though kernel and core do not match."),
    click.option(
        "--kext",
        "kexts",
        type=KEXT,
        metavar="FILE@ADDRESS",
        multiple=True,
        help="A kext's file, loaded at an address. Repeatable.",
    ),
    click.option(
        "--kernel-path",
        type=click.Path(),
        metavar="DIR",
        multiple=True,
        help="Look here for the core's kernel, by UUID (or KVMTOOL_KERNEL_PATH). Repeatable.",
    ),
    click.option(
        "--types",
        type=click.Path(),
        metavar="FILE",
        envvar="KVMTOOL_TYPES",
        show_envvar=True,
        help="The kernel's types: a dSYM, CTF, ISF, a Volatility 2 profile.",
    ),
    click.option(
        "--layout",
        metavar="NAME",
        help="Use this built-in structure layout; info says which it is.",
    ),
)


def kernel_options(command: Command) -> Command:
    """-N, -M, --slide and what else says which kernel, as the one argument `where`.

    For the group as for its commands: what is typed after the command wins over what is typed
    before it, and that over the environment.
    """

    @functools.wraps(command)
    def with_where(*args: Any, **kwargs: Any) -> Any:
        ctx = click.get_current_context()
        outer = ctx.find_object(Where)
        here = Where(**{name: kwargs.pop(name) for name in Where._fields})
        if outer is not None:
            typed = {name: getattr(here, name) for name in Where._fields if _is_typed(ctx, name)}
            here = outer._replace(**typed)
        ctx.obj = here
        return command(*args, where=here, **kwargs)

    decorated: Callable[..., Any] = with_where
    for option in reversed(_KERNEL_OPTIONS):  # the first comes first in the help
        decorated = option(decorated)
    return cast("Command", decorated)


def core_argument(command: Command) -> Command:
    """An optional argument CORE, which is -M by another name. Stands below `kernel_options`.

    Typing both, in whichever place, is a usage error; CORE wins over the environment.
    """

    @functools.wraps(command)
    def with_core(*args: Any, where: Where, core_file: str | None, **kwargs: Any) -> Any:
        ctx: click.Context | None = click.get_current_context()
        if core_file is not None:
            while ctx is not None:
                if _is_typed(ctx, "core"):
                    raise click.UsageError(f"two cores given: {where.core} (-M) and {core_file}")
                ctx = ctx.parent
            where = where._replace(core=core_file)
        return command(*args, where=where, **kwargs)

    argument = click.argument("core_file", metavar="[CORE]", required=False, type=click.Path())
    return cast("Command", argument(with_core))


def _is_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
