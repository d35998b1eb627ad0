"""Write the manual pages, kvmtool.1 and one for each command, from the commands' own help.

As `tools/man.py DIR`. setup.py calls `write` when a wheel is built, so this needs click alone.
"""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
import time

import click

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kvmtool import __version__  # noqa: E402
from kvmtool.cli import COMMANDS, cli, groups  # noqa: E402
from kvmtool.cli.command import SHARED  # noqa: E402
from kvmtool.cli.doctor import VARIABLES  # noqa: E402

STATUS = {
    "0": "All is well.",
    "1": "An error: one line on standard error says what and where.",
    "2": "A usage error, or an expression that is not C.",
    "3": "A partial result: what is missing is named on standard error.",
    "129, 130, 141, 143": "Ended by SIGHUP, SIGINT, SIGPIPE, SIGTERM.",
}
CACHE = "$XDG_CACHE_HOME/kvmtool, ~/.cache/kvmtool, ~/Library/Caches/kvmtool"


def escaped(text: str) -> str:
    """`text` as roff has it: backslashes, dashes, and what begins a line with a dot or a quote."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\b", "")
    text = text.replace("…", "...").replace("^", "\\(ha").replace("~", "\\(ti")
    lines = (f"\\&{line}" if line[:1] in (".", "'") else line for line in text.split("\n"))
    return "\n".join(lines)


def filled(text: str) -> str:
    """A paragraph in lines that are not too long, for whoever reads the source."""
    return "\n".join(escaped(line) for line in textwrap.wrap(" ".join(text.split()), 72))


def tagged(entries: dict[str, str]) -> list[str]:
    """A list of terms, each with its text below."""
    found = []
    for term, text in entries.items():
        found += [".TP", f".B {escaped(term)}", filled(text)]
    return found


def paragraphs(text: str) -> list[str]:
    """The parts of a docstring; what stands behind a \\b keeps its lines."""
    found = []
    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith("\b"):
            found += [".PP", ".nf", escaped(part.removeprefix("\b\n")), ".fi"]
        else:
            found += [".PP", filled(part)]
    return found


def split_example(text: str) -> tuple[str, list[str]]:
    """What a docstring says before its example, and the lines of that."""
    before, _, example = text.partition("\b\n")
    return before.rstrip(), [line.strip() for line in example.splitlines()[1:] if line.strip()]


def options(command: click.Command, context: click.Context) -> list[str]:
    """OPTIONS, then those that say which kernel."""
    own: dict[str, str] = {}
    shared: dict[str, str] = {}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None and not isinstance(param, click.Argument):
            (shared if param.name in SHARED else own)[record[0]] = record[1]
    found = [".SH OPTIONS", *tagged(own)] if own else []
    return found + ([".SH WHICH KERNEL", *tagged(shared)] if shared else [])


def title(path: str, date: str) -> list[str]:
    """The first line; no word is divided, since one looks for names and copies them."""
    name = path.replace(" ", "-").upper()
    head = f'.TH {escaped(name)} 1 "{date}" "kvmtool {__version__}" "kvmtool"'
    return [head, ".nh", ".ad l"]


def page(path: str, line: str, command: click.Command, context: click.Context, date: str) -> str:
    """The page of the command called by `path` ("kvmtool procs"); `line` is what it does."""
    before, example = split_example(inspect.cleandoc(command.help or ""))
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        *title(path, date),
        ".SH NAME",
        f"{escaped(path.replace(' ', '-'))} \\- {escaped(line.rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {escaped(path)}",
        escaped(usage),
        ".SH DESCRIPTION",
        *paragraphs(before)[1:],
    ]
    if isinstance(command, click.Group) and command is not cli:
        names = command.list_commands(context)
        inner = {name: command.get_command(context, name) for name in names}
        lines = {name: found.get_short_help_str(120) for name, found in inner.items() if found}
        parts += [".SH COMMANDS", *tagged(lines)]
    if command is cli:
        parts.append(".SH COMMANDS")
        for heading, names in groups():
            parts += [f".SS {escaped(heading)}", *tagged({n: COMMANDS[n][1] for n in names})]
    parts += options(command, context)
    parts += [".SH EXIT STATUS", *tagged(STATUS), ".SH ENVIRONMENT", *tagged(VARIABLES)]
    if command is cli:
        parts += [".SH FILES", *tagged({CACHE: "What was costly to find out; safe to remove."})]
    parts += [".SH EXAMPLES", ".nf", *map(escaped, example), ".fi"]
    others = ["kvmtool"] if command is not cli else [f"kvmtool-{name}" for name in sorted(COMMANDS)]
    *most, last = (f".BR {escaped(name)} (1)" for name in others)
    parts += [".SH SEE ALSO", *(f"{name}," for name in most), last]
    return "\n".join(parts) + "\n"


def pages(date: str) -> dict[str, str]:
    """Every page by its file name."""
    top = click.Context(cli, info_name="kvmtool", help_option_names=["-h", "--help"])
    line = "read the kernel memory of Mac OS X, live or dead, on any host"
    made = {"kvmtool.1": page("kvmtool", line, cli, top, date)}
    waiting = [(("kvmtool", name), cli, top) for name in COMMANDS]
    for words, group, above in waiting:
        command = group.get_command(above, words[-1])
        assert command is not None
        context = click.Context(command, info_name=words[-1], parent=above)
        about = COMMANDS[words[-1]][1] if len(words) == 2 else command.get_short_help_str(120)
        made[f"{'-'.join(words)}.1"] = page(" ".join(words), about, command, context, date)
        if isinstance(command, click.Group):
            names = command.list_commands(context)
            waiting += [((*words, name), command, context) for name in names]
    return made


def write(directory: str) -> list[str]:
    """Write every page; returns their paths. The date is SOURCE_DATE_EPOCH's, or today."""
    now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(now))
    os.makedirs(directory, exist_ok=True)
    written = []
    for name, text in sorted(pages(date).items()):
        path = os.path.join(directory, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        written.append(path)
    return written


if __name__ == "__main__":
    for written_page in write(sys.argv[1] if len(sys.argv) > 1 else "build/man"):
        print(written_page)
