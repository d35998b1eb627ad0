"""read: kernel memory as bytes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmtool.cli import PARTIAL, say
from kvmtool.cli.command import Sectioned
from kvmtool.cli.opening import opened
from kvmtool.cli.params import (
    ADDRESS,
    SIZE,
    AddressExpr,
    Where,
    format_option,
    kernel_options,
)
from kvmtool.cli.words import complete_pids
from kvmtool.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.hexdump import Piece
    from kvmtool.kvm import Kvm
    from kvmtool.memory import Memory

_CHUNK = 1 << 20  # bytes held at a time, whatever was asked for


class Reading:
    """One range of memory, read piece by piece; counts what could not be read."""

    def __init__(self, memory: Memory, address: int, size: int, zero_fill: bool) -> None:
        self._memory, self._address, self._size = memory, address, size
        self._zero_fill = zero_fill
        self.missing = 0

    def pieces(self) -> Iterator[Piece]:
        """The range in address order; zeros for holes only when the user asked for them."""
        from kvmtool.cli.hexdump import Piece
        from kvmtool.unreadable import Unreadable

        end = self._address + self._size
        for start in range(self._address, end, _CHUNK):
            for piece in self._memory.read_pieces(start, min(_CHUNK, end - start)):
                if piece.data is not None:
                    yield Piece(piece.address, piece.data, piece.size)
                    continue
                self.missing += piece.size
                if self._zero_fill:
                    yield Piece(piece.address, bytes(piece.size), piece.size)
                else:
                    why = Unreadable(f"{piece.reason} at {piece.address:#x}")
                    yield Piece(piece.address, why, piece.size)


@click.command(cls=Sectioned)
@click.argument("address", type=ADDRESS)
@click.argument("count", type=SIZE)
@click.option(
    "-t",
    "--type",
    "unit",
    metavar="UNIT",
    help="As od: x1 x2 x4 x8, d1.., u1.., o1.., c, a; s for one string.",
)
@click.option("--raw", is_flag=True, help="The bytes alone, for a pipe.")
@click.option("--partial", is_flag=True, help="Read around holes; they are shown as what they are.")
@click.option("--zero-fill", is_flag=True, help="Read holes as zeros.")
@click.option("--physical", is_flag=True, help="ADDRESS is a physical one.")
@click.option(
    "--pid", type=int, shell_complete=complete_pids, help="ADDRESS is one of this process's."
)
@format_option
@kernel_options
def read(
    address: AddressExpr,
    count: int,
    unit: str | None,
    raw: bool,
    partial: bool,
    zero_fill: bool,
    physical: bool,
    pid: int | None,
    format: str,
    where: Where,
) -> None:
    """Read COUNT bytes of kernel memory at ADDRESS: 0x…, decimal, symbol, symbol+offset, or C.

    symbol+offset counts bytes from the symbol. Anything else is an expression as `print` has it: of
    a pointer or a number its value, of everything else where it lies. So cdevsw[11].d_read is where
    that function begins, and cdevsw[11] where the row lies.

    All or nothing: a range with a hole in it is refused before anything is printed. With --partial
    or --zero-fill the rest is printed and the exit status is 3. With --raw, --partial ends at the
    first hole, as a short read does.

    A dump of physical memory also has physical addresses (--physical) and those of each process
    (--pid).

    Pointers that a kernel's file holds packed (chained fixups) are shown as they will be in memory;
    --raw gives the bytes of the file.

    \b
    Example:
      kvmtool read _version 64 -N mach_kernel -M core
    """
    kvm = opened(where)
    start = address.within(kvm)
    memory = _space(kvm, physical, pid, raw)
    if not (partial or zero_fill):
        memory.check(start, count)
    reading = Reading(memory, start, count, zero_fill)
    if not raw and pid is None and kvm.decoded(start, count):
        say("pointers here are decoded, as they will be in memory; --raw gives the file's bytes")
    if raw:
        _write_raw(reading)
    else:
        _show(kvm, reading, start, unit, format)
    if reading.missing:
        say(f"{reading.missing:#x} of {count:#x} bytes at {start:#x} could not be read")
        click.get_current_context().exit(PARTIAL)


def _space(kvm: Kvm, physical: bool, pid: int | None, raw: bool) -> Memory:
    """The address space the user named."""
    if physical and pid is not None:
        raise click.UsageError("--physical and --pid are two address spaces: choose one")
    if pid is not None:
        return kvm.process(pid)
    if not physical:
        return kvm.raw_memory if raw else kvm.memory
    if kvm.physical is None:
        raise UnsupportedError("this is no dump of physical memory: leave --physical out")
    return kvm.physical


def _write_raw(reading: Reading) -> None:
    out = sys.stdout.buffer
    for piece in reading.pieces():
        if not isinstance(piece.data, bytes):
            break
        out.write(piece.data)
    out.flush()


def _show(kvm: Kvm, reading: Reading, start: int, unit: str | None, format: str) -> None:
    from kvmtool.cli import hexdump

    if unit is not None and unit not in hexdump.UNITS:
        every = " ".join(hexdump.UNITS)
        raise click.BadParameter(f"{unit!r}, expected one of {every}", param_hint="-t")
    order = "little" if kvm.arch.byteorder == "<" else "big"
    width = kvm.arch.pointer_size * 2
    if format != "table":
        from kvmtool.cli.render import render

        rows = hexdump.hexdump_rows(reading.pieces(), start, unit, byteorder=order)  # type: ignore[arg-type]
        render(rows, hexdump.columns_for(unit), format)
    elif unit is None:
        hexdump.hexdump(reading.pieces(), start, address_width=width, out=sys.stdout)
    else:
        hexdump.dump_units(
            reading.pieces(),
            start,
            unit,
            byteorder=order,  # type: ignore[arg-type]
            address_width=width,
            out=sys.stdout,
        )
