"""The options that commands share: --format, -o, and those that say which kernel."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click
from click.core import ParameterSource

from kvmtool.cli.arguments import ADDRESS, KEXT, OFFSET, SIZE, AddressExpr
from kvmtool.cli.words import complete_archs, complete_formats, complete_pids

if TYPE_CHECKING:
    from kvmtool.cli.render import Column

__all__ = [
    "ADDRESS",
    "FORMATS",
    "KEXT",
    "OFFSET",
    "SIZE",
    "VERBOSE",
    "AddressExpr",
    "Command",
    "Where",
    "choose_columns",
    "columns_option",
    "core_argument",
    "format_option",
    "kernel_options",
    "pids_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])

FORMATS = ("table", "json", "jsonl", "csv")
VERBOSE = "kvmtool.verbose"  # in `click.Context.meta`: whether the user wants to be told more


def format_option(command: Command) -> Command:
    """``--format``, for the argument `format`. No short form: -f belongs to ps and fstat."""
    option = click.option(
        "--format",
        type=click.Choice(FORMATS),
        metavar="FORMAT",
        default="table",
        help="table, json, jsonl or csv.",
    )
    return option(command)


def pids_option(command: Command) -> Command:
    """``--pid``, for the argument `pid`: a tuple of process ids."""
    option = click.option(
        "--pid",
        type=int,
        shell_complete=complete_pids,
        multiple=True,
        help="Only this process. Repeatable.",
    )
    return option(command)


def columns_option(command: Command) -> Command:
    """``-o``, for the argument `columns`: as `choose_columns` takes it."""
    option = click.option(
        "-o",
        "--columns",
        metavar="LIST",
        multiple=True,
        help="Columns: NAME,NAME=HEADING; +NAME adds to the usual; all. Repeatable.",
    )
    return option(command)


def choose_columns(
    columns: Sequence[Column], lists: Sequence[str], default: Sequence[str] = ()
) -> list[Column]:
    """The `columns` that the -o `lists` name, in their order; without lists `default`, or all.

    As in POSIX ps, names are separated by commas or blanks, and ``name=heading`` ends its list:
    the heading may hold both. ``all`` stands for every column, and a list that begins with ``+``
    comes after the default. Raises `click.BadParameter` for a name that is none.
    """
    known = {column.name: column for column in columns}
    usual = [known[name] for name in default or known]
    if not lists:
        return usual
    chosen = usual if lists[0].startswith("+") else []
    for text in lists:
        names, equals, heading = text.removeprefix("+").partition("=")
        for name in re.split(r"[,\s]+", names.strip(", \t\n")):
            chosen += _named(known, name.lower())
        if equals:
            chosen[-1] = chosen[-1]._replace(heading=heading)
    return list({column.name: column for column in chosen}.values())


def _named(known: Mapping[str, Column], name: str) -> list[Column]:
    if name == "all":
        return [*known.values()]
    if name not in known:
        every = ", ".join(known)
        raise click.BadParameter(f"no column {name!r}, expected: {every}", param_hint="-o")
    return [known[name]]


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
        help="The kernel's file, for its symbols (KVMTOOL_KERNEL).",
    ),
    click.option(
        "-M",
        "--core",
        type=click.Path(),
        metavar="FILE",
        envvar="KVMTOOL_CORE",
        help="The memory: a dump, an image, gdb://… (KVMTOOL_CORE).",
    ),
    click.option(
        "--slide",
        type=OFFSET,
        metavar="BYTES",
        help="How far the kernel was moved, if that is found wrong.",
    ),
    click.option(
        "--arch",
        metavar="NAME",
        shell_complete=complete_archs,
        help="Which part of a fat file: i386, x86_64, arm64.",
    ),
    click.option(
        "--core-format",
        "format_name",
        metavar="NAME",
        shell_complete=complete_formats,
        help="What the core is if its bytes do not say: raw[@ADDR].",
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
        help="Find kernels here, by UUID (KVMTOOL_KERNEL_PATH).",
    ),
    click.option(
        "--types",
        type=click.Path(),
        metavar="FILE",
        envvar="KVMTOOL_TYPES",
        help="Types: dSYM, CTF, ISF, a profile (KVMTOOL_TYPES).",
    ),
    click.option("--layout", metavar="NAME", help="Use this built-in layout of structures."),
)
_HOW_OPTIONS = (
    click.option("-v", "--verbose", is_flag=True, help="Tell on stderr how each fact was found."),
    click.option("--pager", is_flag=True, help="Page the answer: $KVMTOOL_PAGER, $PAGER or less."),
)


def kernel_options(command: Command) -> Command:
    """-N, -M, --slide and what else says which kernel, as the one argument `where`.

    For the group as for its commands: what is typed after the command wins over what is typed
    before it, and that over the environment. --verbose and --pager come with them.
    """

    @functools.wraps(command)
    def with_where(*args: Any, **kwargs: Any) -> Any:
        ctx = click.get_current_context()
        if kwargs.pop("verbose") and not ctx.meta.get(VERBOSE):
            from kvmtool import cache
            from kvmtool.cli.verbose import explain_cache

            ctx.meta[VERBOSE] = True
            ctx.find_root().with_resource(cache.watching(explain_cache))
        if kwargs.pop("pager"):
            from kvmtool.cli.pager import start_pager

            start_pager(ctx)
        outer = ctx.find_object(Where)
        here = Where(**{name: kwargs.pop(name) for name in Where._fields})
        if outer is not None:
            typed = {name: getattr(here, name) for name in Where._fields if _is_typed(ctx, name)}
            here = outer._replace(**typed)
        ctx.obj = here
        return command(*args, where=here, **kwargs)

    decorated: Callable[..., Any] = with_where
    for option in reversed((*_HOW_OPTIONS, *_KERNEL_OPTIONS)):  # the first comes first in the help
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
