"""Load averages. Source: bsd/sys/resource.h (struct loadavg), bsd/sys/param.h, xnu-792..11417."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from kvmtool.errors import FormatError

if TYPE_CHECKING:
    from kvmtool.arch import Arch
    from kvmtool.memory import Memory
    from kvmtool.symbols import SymbolTable


def loadavg(arch: Arch, memory: Memory, symbols: SymbolTable) -> tuple[float, float, float]:
    """`averunnable.ldavg` over its own `fscale`: XNU has no `_fscale`, unlike every other BSD.

    Raises `NotFoundError`, `FaultError`, or `FormatError` when fscale is 0.
    """
    wide = arch.pointer_size == 8
    layout = Struct(arch.byteorder + ("3I4xq" if wide else "3Ii"))
    address = symbols.address("_averunnable")
    *averages, fscale = layout.unpack(memory.read(address, layout.size))
    if fscale <= 0:
        raise FormatError("averunnable", None, f"fscale at {address:#x} is {fscale}, expected 2048")
    one, five, fifteen = (value / fscale for value in averages)
    return one, five, fifteen
