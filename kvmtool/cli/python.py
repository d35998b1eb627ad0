"""python: a program, or a prompt, in which the kernel is open as `kvm`."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import kernel_options

if TYPE_CHECKING:
    from types import TracebackType

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm


@click.command(cls=Sectioned, context_settings={"allow_interspersed_args": False})
@click.option("-c", "code", metavar="CODE", help="Run this, not a file.")
@click.argument("script", required=False, type=click.Path(allow_dash=True))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@kernel_options
def python(where: Where, code: str | None, script: str | None, arguments: tuple[str, ...]) -> None:
    """Run Python with the kernel open as `kvm`: a SCRIPT and its arguments, CODE, or what is typed.

    In it kvm["allproc"] is the kernel's variable, typed and lazy, kvm.evaluate("cdevsw[11]") any C
    expression, kvm.procs() the processes; help(kvm) lists the rest. `-` is a script on stdin.

    \b
    Example:
      kvmtool python -N mach_kernel -M core -c 'print(kvm["kernproc"].p_comm)'
    """
    if code is not None and script is not None:
        arguments, script = (script, *arguments), None
    kvm = opened(where)
    names = _names(kvm)
    if code is not None:
        _execute(code, "<-c>", ("-c", *arguments), names)
    elif script is not None and script != "-":
        _run(script, arguments, names)
    elif script == "-" or not sys.stdin.isatty():
        _execute(sys.stdin.read(), "<stdin>", ("-", *arguments), names)
    else:
        _prompt(kvm, names)


def _names(kvm: Kvm) -> dict[str, Any]:
    """What a program finds there."""
    import kvmtool

    return {"__name__": "__main__", "kvm": kvm, "kvmtool": kvmtool}


def _execute(code: str, name: str, argv: tuple[str, ...], names: dict[str, Any]) -> None:
    sys.argv = [*argv]
    sys.excepthook = partial(_tell, name)
    exec(compile(code, name, "exec"), names)  # noqa: S102  it is the user's own program


def _run(script: str, arguments: tuple[str, ...], names: dict[str, Any]) -> None:
    """Run a file as `python SCRIPT` does: its directory is searched for what it imports."""
    from runpy import run_path

    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    sys.excepthook = partial(_tell, script)
    run_path(script, {name: names[name] for name in ("kvm", "kvmtool")}, "__main__")


def _tell(
    name: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An exception of the program `name`, from its own first line on."""
    own = trace
    while own is not None and own.tb_frame.f_code.co_filename != name:
        own = own.tb_next
    sys.__excepthook__(kind, error.with_traceback(own), own)


def _prompt(kvm: Kvm, names: dict[str, Any]) -> None:
    import code
    import signal

    from kvmtool.cli import ending
    from kvmtool.errors import KvmError

    class Console(code.InteractiveConsole):
        """Errors of ours in a line."""

        def showtraceback(self) -> None:
            error = sys.exc_info()[1]
            if isinstance(error, KvmError):
                self.write("\n".join((str(error), *getattr(error, "__notes__", ()))) + "\n")
            else:
                super().showtraceback()

    _complete(names)
    ending.hand_over()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it ends a line, not the session
    Console(names).interact(f"{kvm!r}\nIt is open as kvm: help(kvm) says what it knows.", "")


def _complete(names: dict[str, Any]) -> None:
    """Tab completes, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    from rlcompleter import Completer

    readline.set_completer(Completer(names).complete)
    readline.parse_and_bind("tab: complete")
