"""The words a shell may complete: symbols, types and pids, from the last time they were listed.

A command that lists them leaves them in the cache; completion looks there and nowhere else, since a
shell cannot wait for a dump to be opened. A name comes from a file that may be hostile and ends up
on a command line: only those of harmless characters are kept.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import click
    from click.shell_completion import CompletionItem

    from kvmtool.cli.params import Where

_KIND = "words"
_ARCHS = ("arm", "arm64", "arm64e", "i386", "ppc", "ppc64", "x86_64")
_HARMLESS = r"[A-Za-z0-9_][A-Za-z0-9_.]*"
_SILENT = r"[^\w ./()-]"  # what does not stand in a description
_MOST = 200  # words offered at once; of more, how they go on
_LIMIT = 32 << 20  # bytes of words kept for one kernel


def remember(what: str, where: Where, words: Callable[[], Iterable[tuple[str, str]]]) -> None:
    """Keep "symbols", "types" or "pids" of a kernel; `words` gives each, with a description or "".

    It is asked only if they are not kept yet: files are known by inode, size and time of change.
    """
    from kvmtool import cache

    if cache.directory() is None:
        return
    key = _key(what, where.kernel, where.core)
    path = cache.path_for(_KIND, key)
    if path is None or not os.path.exists(path):
        harmless, silent = re.compile(_HARMLESS), re.compile(_SILENT)
        lines = {
            f"{word}\t{silent.sub('', text)[:40]}" if text else word
            for word, text in words()
            if harmless.fullmatch(word)
        }
        payload = "\n".join(sorted(lines)).encode()
        if len(payload) <= _LIMIT:
            cache.store(_KIND, key, payload)
    last = f"{what}-last"
    if cache.load(_KIND, last) != key.encode():
        cache.store(_KIND, last, key.encode())


def complete_symbols(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Symbols that begin so, with an underscore in front where only those do."""
    return _offered("symbols", ctx, incomplete) or _offered("symbols", ctx, f"_{incomplete}")


def complete_types(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of types that begin so."""
    return _offered("types", ctx, incomplete)


def complete_pids(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Pids that begin so, with the processes' names."""
    return _offered("pids", ctx, incomplete)


def complete_archs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The machines that XNU has run on."""
    return [name for name in _ARCHS if name.startswith(incomplete)]


def complete_formats(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The formats of cores."""
    from kvmtool.formats import FORMATS

    return [entry.name for entry in FORMATS if entry.name.startswith(incomplete)]


def matching(words: list[str], start: str) -> list[str]:
    """Those of the sorted `words` that begin with `start`; of too many, how they go on."""
    from bisect import bisect_left
    from itertools import takewhile

    first = bisect_left(words, start)
    last = bisect_left(words, f"{start}\U0010ffff")
    found = words[first:last]
    if len(found) <= _MOST:
        return found
    pairs = zip(found[0], found[-1], strict=False)
    length = 1 + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return sorted({word[:length].partition("\t")[0] for word in found})


def _offered(what: str, ctx: click.Context, start: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    items = (line.partition("\t") for line in matching(_known(what, ctx), start))
    return [CompletionItem(word, help=text or None) for word, _, text in items]


def _known(what: str, ctx: click.Context) -> list[str]:
    """The words of the kernel that is named so far; where none is, those listed last."""
    from kvmtool import cache

    kernel, core = _named(ctx, "kernel"), _named(ctx, "core") or _named(ctx, "core_file")
    if kernel or core:
        key = _key(what, kernel, core)
    else:
        key = (cache.load(_KIND, f"{what}-last") or b"none").decode()
    payload = cache.load(_KIND, key)
    return payload.decode().split("\n") if payload else []


def _named(ctx: click.Context, name: str) -> str | None:
    """What was typed for an option, after the command or before it, or stands in the environment.

    Completion parses without running anything, so that nothing has joined them.
    """
    at: click.Context | None = ctx
    while at is not None:
        value = at.params.get(name)
        if value:
            return os.path.expanduser(str(value))
        at = at.parent
    return None


def _key(what: str, kernel: str | None, core: str | None) -> str:
    named = (kernel, core if what == "pids" or kernel is None else None)
    return "-".join((what, *(_file(path) for path in named if path is not None)))


def _file(path: str) -> str:
    """What tells a file from others; of what is none, a sum of its name.

    No hash: for those of hashlib OpenSSL is loaded, which takes longer than to list processes.
    """
    from zlib import crc32

    try:
        status = os.stat(path)
    except OSError:
        return f"{crc32(os.fsencode(path)):x}"
    return f"{status.st_dev:x}.{status.st_ino:x}.{status.st_size:x}.{status.st_mtime_ns:x}"
