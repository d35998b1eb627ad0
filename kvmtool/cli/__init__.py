"""The command line. Each command parses, makes one library call, and renders the answer.

This is the one place where an error becomes a line on stderr and an exit status: 0 all is well,
1 an error, 2 a usage error, 3 a partial result.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from signal import SIGPIPE
from typing import TYPE_CHECKING, Any

import click

from kvmtool import __version__, progress
from kvmtool.cli.command import write_options
from kvmtool.cli.ending import Ended, die, listen
from kvmtool.cli.params import VERBOSE, Where, kernel_options
from kvmtool.cli.stderr import say as say
from kvmtool.errors import ExpressionError, FaultError, KvmError, KvmWarning, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.shell_completion import CompletionItem

ERROR, USAGE, PARTIAL = 1, 2, 3
_GC_THRESHOLD = 10_000  # objects made before cycles are looked for; Python: 700

# command -> (module in kvmtool.cli, help line); loaded when it is used
COMMANDS = {
    "args": ("args", "What processes were started with: arguments and environment."),
    "backtrace": ("backtrace", "Kernel stacks: of a thread, of a process, of each CPU."),
    "check": ("check", "What a rootkit changes: pointers to code, lists, and code."),
    "completion": ("completion", "What makes bash, zsh or fish complete our words."),
    "convert": ("convert", "Write the memory of a core in another form."),
    "cpus": ("cpus", "The processors, and what each was doing."),
    "dd": ("devices", "The dd line that reads an address from a mounted kmem."),
    "demo": ("demo", "Write the embedded sample, and say what to type."),
    "devsw": ("devsw", "The device switches, and which driver owns each slot."),
    "doctor": ("doctor", "What is available here, and what each missing extra would add."),
    "dmesg": ("dmesg", "The kernel's message buffer."),
    "extract": ("extract", "A kernel, a kext or a core as a file by itself."),
    "files": ("files", "What processes hold open: files, sockets, pipes."),
    "host": ("host", "The machine: version, names, boot time, memory, processors."),
    "info": ("info", "Everything known about a kernel and a core."),
    "kernels": ("images", "The kernels in the directories of --kernel-path, by UUID."),
    "kexts": ("kexts", "The loaded kexts, as kextstat shows them; or those in an image."),
    "load": ("load", "The load averages, the boot time, how many processes there are."),
    "mount": ("devices", "The kernel's memory as files: kmem, mem, symbols."),
    "mounts": ("mounts", "The mounted file systems, as mount shows them."),
    "net": ("net", "Connections and local sockets, interfaces, routes."),
    "nlist": ("symbols", "Look symbols up, as kvm_nlist does."),
    "print": ("objects", "The value of a C expression: structures, pointers, members."),
    "panic": ("panic", "Why this Mac died: panic string, log, stack, kexts in it."),
    "procs": ("procs", "List the processes, as ps does."),
    "python": ("python", "Python with the kernel open as kvm: a script, code, a prompt."),
    "read": ("memory", "Read kernel memory."),
    "regions": ("space", "What memory there is, and what is absent."),
    "search": ("space", "Find a string, bytes or a pointer in memory."),
    "sysctl": ("sysctl", "The sysctl names, and the values that lie in memory."),
    "syscalls": ("syscalls", "The system calls and Mach traps, and what answers them."),
    "symbol": ("images", "What lies at an address: name+offset [kext]."),
    "symbols": ("symbols", "List symbols, as nm does."),
    "threads": ("threads", "List the threads: state, what each waits for, where it goes on."),
    "type": ("types", "A type's declaration, with the place of every member."),
    "types": ("types", "List the structures, unions, enums and typedefs."),
    "vm": ("vm", "The counters of virtual memory, as vm_stat shows them."),
    "vmmap": ("vmmap", "The ranges of an address space, as vmmap shows them."),
    "vtop": ("space", "How an address is translated to a physical one."),
    "walk": ("objects", "Walk any list of the kernel's, with members of its elements."),
    "zones": ("zones", "The zones of the kernel's allocator, as zprint shows them."),
}

# heading in the help -> its commands, as they are listed there
GROUPS = {
    "Look up": "nlist symbols symbol",
    "Read memory": "read print walk search regions vtop python",
    "Processes": "procs args threads backtrace files vmmap",
    "The kernel's state": "host load cpus dmesg panic vm zones "
    "kexts devsw syscalls sysctl net mounts",
    "Types": "type types",
    "Images and dumps": "info check kernels convert extract",
    "Devices": "mount dd",
    "Help": "demo doctor completion",
}

# what other programs call what a command does
ELSEWHERE = {
    **dict.fromkeys(("ps", "pslist", "pstree", "top"), "procs"),
    **dict.fromkeys(("lsof", "fstat"), "files"),
    **dict.fromkeys(("netstat", "ifconfig", "route"), "net"),
    **dict.fromkeys(("od", "hexdump", "xxd", "x"), "read"),
    **dict.fromkeys(("bt", "stack"), "backtrace"),
    **dict.fromkeys(("ptype", "pahole", "whatis"), "type"),
    **dict.fromkeys(("uname", "hostinfo", "sw_vers"), "host"),
    **dict.fromkeys(("otool", "file"), "info"),
    "nm": "symbols",
    "kextstat": "kexts",
    "lsmod": "kexts",
    "vm_stat": "vm",
    "zprint": "zones",
    "uptime": "load",
    "p": "print",
    "shell": "python",
    "repl": "python",
    "strings": "search",
    "df": "mounts",
    "atos": "symbol",
}


def groups() -> list[tuple[str, list[str]]]:
    """Every command under its heading; those that `GROUPS` lacks come last."""
    found = [(heading, names.split()) for heading, names in GROUPS.items()]
    rest = sorted(COMMANDS.keys() - {name for _, names in found for name in names})
    return found + ([("More", rest)] if rest else [])


# what is not found -> the command that lists what there is
_LISTERS = {"process": "procs", "kext": "kexts", "symbol": "symbols", "type": "types"}


class Failure(click.ClickException):
    """A `KvmError` or OSError on its way out: one line on stderr, exit status 1.

    Of one met in an expression two more lines show the place.
    """

    exit_code = ERROR

    def __init__(self, error: BaseException, message: str) -> None:
        super().__init__(message)
        self._notes = getattr(error, "__notes__", ())

    def show(self, file: Any = None) -> None:
        """The lines. Control characters in them (from a file's contents) are escaped."""
        say(self.message)
        from kvmtool.cli.render import visible

        for line in "\n".join(self._notes).splitlines():
            click.echo(f"  {visible(line)}", err=True)


class Misunderstood(Failure):
    """An expression that is not C: exit status 2."""

    exit_code = USAGE


class Commands(click.Group):
    """Commands that are imported when they are called, and the translator of errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"kvmtool.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and options that begin so, without importing a command."""
        from click.shell_completion import CompletionItem

        names = [name for name in sorted(COMMANDS) if name.startswith(incomplete)]
        commands = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands first: they are what is looked for; then the options."""
        self.format_commands(ctx, formatter)
        write_options(self.get_params(ctx), ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in groups, with their help lines, without importing one of them."""
        width = max(map(len, COMMANDS))
        for heading, names in groups():
            with formatter.section(heading):
                formatter.write_dl([(f"{n:<{width}}", COMMANDS[n][1]) for n in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, but a command that is none is told with those that are like it."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(_no_command(name), ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _watched():
            return self._translated(ctx)

    def _translated(self, ctx: click.Context) -> Any:
        """The command; its errors as a line each."""
        try:
            return super().invoke(ctx)
        except ExpressionError as error:
            raise Misunderstood(error, str(error)) from error
        except KvmError as error:
            if ctx.meta.get(VERBOSE):
                for text in error.tried:
                    say(f"rejected: {text}")
            raise Failure(error, f"{error}{_next(error)}") from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise Ended(SIGPIPE) from error
            name = f"{error.filename}: " if error.filename is not None else ""
            text = f"{name}{error.strerror or error}{_named_in(error.filename)}"
            raise Failure(error, text) from error


def _next(error: KvmError) -> str:
    """What to type next, where the error itself does not say it."""
    if isinstance(error, FaultError):
        return "; kvmtool regions lists what there is"
    if isinstance(error, NotFoundError) and not error.near:
        lister = _LISTERS.get(error.kind)
        return f"; kvmtool {lister} lists them" if lister else ""
    return ""


def _named_in(path: object) -> str:
    """The variable that names a file, which the user may not think of."""
    names = ("KVMTOOL_KERNEL", "KVMTOOL_CORE", "KVMTOOL_TYPES")
    said = next((name for name in names if path and os.environ.get(name) == path), None)
    return f" (it is named in {said})" if said else ""


def _no_command(name: str) -> str:
    """What to say of a command that is none: those like it, or what to do with a file's name."""
    if name in ELSEWHERE:
        return f"no command {name!r}: {ELSEWHERE[name]} does that"
    if os.path.isfile(name):
        from kvmtool.misnamed import kind_of

        kind = kind_of(name)
        option = "-N" if kind is not None and kind[0] == "kernel" else "-M"
        return f"no command {name!r}, which is a file: try kvmtool info {option} {name}"
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 3)
    if near:
        return f"no command {name!r}: did you mean {' or '.join(near)}?"
    return f"no command {name!r}: kvmtool --help lists them"


@contextmanager
def _watched() -> Iterator[None]:
    """Show how far the command is, on a terminal; whatever ends it, the line is taken away."""
    if not sys.stderr.isatty():
        yield
        return
    from kvmtool.cli.progress_line import ProgressLine

    line = ProgressLine()
    try:
        with progress.listening(line):
            yield
    finally:
        line.clear()


def _show_warning(message: Warning | str, *_: Any) -> None:
    say(f"warning: {message}")


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 all is well, 1 an error, 2 a usage error, 3 a partial result.",
)
@click.version_option(__version__, prog_name="kvmtool")
@kernel_options
def cli(where: Where) -> None:
    """libkvm for XNU: read the kernel memory of Mac OS X, live or dead, on any host.

    \b
    Example:
      kvmtool -N mach_kernel -M core procs
    """
    ctx = click.get_current_context()
    ctx.with_resource(warnings.catch_warnings())
    warnings.simplefilter("always", KvmWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def main() -> None:
    """The command line; never returns. A signal ends it as `ending` says."""
    gc.set_threshold(_GC_THRESHOLD)
    try:
        listen()
        if "_KVMTOOL_COMPLETE" in os.environ:
            from kvmtool.cli import shells

            shells.register()
        cli(prog_name="kvmtool")
    except Ended as end:
        die(end.number)
    finally:
        gc.freeze()  # the process ends: nobody need look for cycles in all that was imported
