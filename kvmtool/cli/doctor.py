"""doctor: what is available here, and what each missing extra would add."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvmtool import __version__, cache
from kvmtool.cli.command import Sectioned
from kvmtool.cli.params import choose_columns, columns_option, format_option
from kvmtool.cli.render import Column, render

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Package(NamedTuple):
    """A package of an extra: its name on PyPI, the module to import, what it is for."""

    name: str
    module: str
    adds: str
    until: tuple[int, int] = (9, 0)  # from this Python on the standard library has it


_ZSTD = ("backports.zstd", "backports.zstd")
BASE = ("click", "macholib", "rich", "construct")
# as in pyproject.toml, where a test holds the two against each other
EXTRAS = {
    "gzip": (Package("rapidgzip", "rapidgzip", "random access to big gzip'ed cores"),),
    "lz4": (Package("lz4", "lz4.block", "corefiles of macOS 13 and later read fast"),),
    "kernelcache": (
        Package("lzfse", "lzfse", "kernelcaches packed with LZFSE or LZVN"),
        Package(*_ZSTD, "kernels packed with zstd", (3, 14)),
    ),
    "types": (Package(*_ZSTD, "types (ISF) packed with zstd", (3, 14)),),
    "mount": (Package("mfusepy", "mfusepy", "mount: the kernel's memory as files"),),
    "kdump": (
        Package("deflate", "deflate", "kdump files with zlib at twice the speed"),
        Package("lzallright", "lzallright", "kdump files with LZO"),
        Package("cramjam", "cramjam", "kdump files with snappy"),
        Package(*_ZSTD, "kdump files with zstd", (3, 14)),
    ),
    "aff4": (
        Package("pyoxigraph", "pyoxigraph", "AFF4 volumes"),
        Package("cramjam", "cramjam", "AFF4 volumes that are compressed"),
    ),
}
_TOOLS = {
    "fusermount3": "unmounts what mount has mounted: apt-get install fuse3",
    "less": "--pager",
    "xz": "unpacks dumps packed with xz",
    "zstd": "unpacks dumps packed with zstd",
}
VARIABLES = {
    "KVMTOOL_KERNEL": "as -N",
    "KVMTOOL_CORE": "as -M",
    "KVMTOOL_KERNEL_PATH": "as --kernel-path",
    "KVMTOOL_TYPES": "as --types",
    "KVMTOOL_CACHE": "the cache directory; empty: no cache",
    "KVMTOOL_PAGER": "the pager of --pager, before PAGER",
    "KVMTOOL_TEST_DATA": "the real inputs of the tests",
}
_FILES = ("KVMTOOL_KERNEL", "KVMTOOL_TYPES")
COLUMNS = (
    Column("kind", "KIND"),
    Column("name", "NAME"),
    Column("state", "STATE"),
    Column("version", "VERSION"),
    Column("note", "NOTE"),
)
Found = dict[str, Any]


def _row(kind: str, name: str, state: str, note: str, version: str | None = None) -> Found:
    return {"kind": kind, "name": name, "state": state, "version": version, "note": note}


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _state(module: str) -> str:
    """Whether a module can be used: ok, missing, or what is wrong with it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return "missing"
    except (ImportError, OSError, AttributeError) as error:  # a library it loads is not there
        return f"broken: {error}"
    return "ok"


def _python() -> Iterator[Found]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield _row("kvmtool", "kvmtool", "ok", os.path.dirname(cache.__file__), __version__)
    yield _row("kvmtool", "python", "ok", f"{sys.executable} on {sys.platform}", version)
    for name in BASE:
        yield _row("kvmtool", name, _state(name), "needed", _version(name))


def _extras() -> Iterator[Found]:
    for extra, packages in EXTRAS.items():
        for package in packages:
            if sys.version_info >= package.until:
                note = f"{package.adds} (Python has it)"
                yield _row(f"extra {extra}", package.name, "ok", note)
                continue
            state = _state(package.module)
            hint = "" if state == "ok" else f": pip install 'kvmtool[{extra}]'"
            note, version = f"{package.adds}{hint}", _version(package.name)
            yield _row(f"extra {extra}", package.name, state, note, version)


def _system() -> Iterator[Found]:
    there = os.access("/dev/fuse", os.R_OK | os.W_OK)
    state = "ok" if there else "not allowed" if os.path.exists("/dev/fuse") else "missing"
    if sys.platform == "linux":
        yield _row("system", "/dev/fuse", state, "mount; a container needs it passed")
    for tool, use in _TOOLS.items():
        path = shutil.which(tool)
        yield _row("system", tool, "ok" if path else "missing", use)


def _cache() -> Found:
    where = cache.directory()
    if where is None:
        return _row("cache", "none", "off", "KVMTOOL_CACHE is empty, or there is no home directory")
    entries, size = cache.usage(where)
    note = f"{entries} entries, {size >> 20} MiB of at most {cache.LIMIT >> 20} MiB"
    return _row("cache", where, _usable(where), note)


def _usable(folder: str) -> str:
    """Whether `folder` can be written to, or be made."""
    at = folder = os.path.abspath(folder)
    while not os.path.lexists(at):
        at = os.path.dirname(at)
    if not os.path.isdir(at) or not os.access(at, os.W_OK | os.X_OK):
        return "not writable"
    return "ok" if at == folder else "not made yet"


def _environment() -> Iterator[Found]:
    for name, value in sorted(os.environ.items()):
        if not name.startswith("KVMTOOL_"):
            continue
        state = "ok" if name in VARIABLES else "not known"
        if name in _FILES and value and not os.path.exists(value):
            state = "no such file"
        use = VARIABLES.get(name, f"expected one of {', '.join(VARIABLES)}")
        yield _row("environment", name, state, f"{value} ({use})")


def examine() -> Iterable[Found]:
    """What there is, a row each."""
    yield from _python()
    yield from _extras()
    yield from _system()
    yield _cache()
    yield from _environment()


@click.command(cls=Sectioned)
@columns_option
@format_option
def doctor(columns: tuple[str, ...], format: str) -> None:
    """Say what is available: Python, packages, FUSE, the cache, the environment.

    Of an extra that is missing, what it would add and how to get it. Nothing of a kernel is looked
    at, and nothing is changed.

    \b
    Example:
      kvmtool doctor
    """
    render(examine(), choose_columns(COLUMNS, columns), format)
