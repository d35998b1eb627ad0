"""mount and dd: the devices back again."""

from __future__ import annotations

import os
import subprocess
import sys

import click

from kvmtool.cli import say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.ending import hand_over
from kvmtool.cli.opening import opened
from kvmtool.cli.params import ADDRESS, SIZE, AddressExpr, Where, kernel_options

_READY = "ready"


@click.command(cls=Sectioned)
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--foreground", is_flag=True, help="Stay until it is unmounted, or interrupted.")
@click.option("--allow-other", is_flag=True, help="Let other users try, too.")
@click.option("--detached", is_flag=True, hidden=True)  # the process that stays behind
@kernel_options
def mount(
    directory: str, foreground: bool, allow_other: bool, detached: bool, where: Where
) -> None:
    """Give the kernel's memory as files in DIR: kmem, mem, symbols, info.json.

    kmem is read at the kernel's own addresses, the top bit cleared (XNU's rule for signed
    offsets), mem at physical ones. Every page of a read is checked before a byte is given: EFAULT
    on the first that is not there, ENOTSUP on a write. `kvmtool dd` prints a line to read kmem
    with. Unmount with fusermount3 -u DIR (Linux) or umount DIR.

    \b
    Example:
      kvmtool mount /mnt/kernel -N mach_kernel -M core
    """
    if not (foreground or detached):
        _in_background()
        return
    from kvmtool import devices, fuse

    kvm = opened(where, mapped=False)
    view = devices.exposed(kvm, kvm.physical)

    def ready() -> None:
        if detached:
            click.echo(_READY)
            _let_go()
        else:
            click.echo(f"{directory} is there: interrupt, or unmount it, to end")

    hand_over()  # libfuse unmounts at a signal, if nobody else listens
    fuse.mount(view, directory, allow_other=allow_other, ready=ready, on_error=say)


def _let_go() -> None:
    """Let whoever waits for our output go on."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _in_background() -> None:
    """Run the same command in a session of its own, and wait until it is mounted."""
    command = [sys.executable, "-m", "kvmtool", *sys.argv[1:], "--detached"]
    with subprocess.Popen(  # noqa: S603  our own arguments, as they were given
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True, text=True
    ) as server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if line.strip() == _READY:
                    server.returncode = 0  # it lives on: do not wait for it
                    return
        except BaseException:
            server.terminate()  # it would not hear a Ctrl-C
            raise
    click.get_current_context().exit(server.returncode or 1)


@click.command(cls=Sectioned)
@click.argument("address", type=ADDRESS)
@click.argument("count", type=SIZE)
@click.option("--directory", metavar="DIR", default=".", help="Where the kernel is mounted.")
@kernel_options
def dd(address: AddressExpr, count: int, directory: str, where: Where) -> None:
    """Print the dd line that reads COUNT bytes at ADDRESS from a mounted kmem.

    \b
    Example:
      kvmtool dd _cdevsw+0x270 4 --directory /mnt/kernel -N mach_kernel -M core
    """
    from kvmtool.devices import dd_line

    kvm = opened(where)
    start = address.within(kvm)
    click.echo(dd_line(directory, start, count, kvm.arch.pointer_size))
