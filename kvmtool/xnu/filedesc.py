"""A process's table of descriptors: where it lies, how long it is, what its slots hold.

Source: bsd/sys/filedesc.h, bsd/sys/file_internal.h, bsd/kern/kern_descrip.c, xnu-792..11417.
"""

from __future__ import annotations

from contextlib import suppress
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import Record, offset_of, unsigned
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target
    from kvmtool.xnu.queues import Report

UF_EXCLOSE, UF_RESERVED, UF_CLOSING = 0x01, 0x04, 0x08  # fd_ofileflags
_MOST = 1 << 18  # slots of one table, whatever the kernel allows
_ALL = 1 << 20  # slots that are taken, of all tables
_LEAST = 10240  # OPEN_MAX, its default: a table may have grown before it was lowered


class Table(NamedTuple):
    """A filedesc: where its arrays lie, how many slots they have, two vnodes (0 is none).

    Any field may be `Unreadable`.
    """

    ofiles: Any
    ofileflags: Any
    nfiles: Any
    last: Any
    cdir: Any
    rdir: Any


class Slot(NamedTuple):
    """A slot that is taken: the descriptor's number, its fileproc (0 while it is being opened).

    `flags` is fd_ofileflags, perhaps `Unreadable`.
    """

    fd: int
    fileproc: int
    flags: Any


class FiledescReader:
    """Reads the tables of descriptors of one kernel's processes."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of filedesc."""
        self._target = target
        types = target.types
        # xnu-8019 (macOS 12) on it is a part of proc
        self._embedded = types.has("proc", "p_fd.fd_ofiles")
        self._p_fd = types.offset("proc", "p_fd")
        last = "fd_afterlast" if types.has("filedesc", "fd_afterlast") else "fd_lastfile"
        self._after = last == "fd_afterlast"
        wanted = {"ofiles": "P", "ofileflags": "P", "cdir": "P", "rdir": "P", "nfiles": "i"}
        fields: dict[str, tuple[int | None, str]] = {
            name: (offset_of(types, "filedesc", f"fd_{name}"), code)
            for name, code in wanted.items()
        }
        # 16 bits in 10.4
        fields["last"] = types.offset("filedesc", last), unsigned(types, "filedesc", last)
        self._record = Record(target, fields)
        self._word = "Q" if target.arch.pointer_size == 8 else "I"
        self._limit = _most(target)
        self._taken = 0

    def table(self, proc: int) -> Table | Unreadable | None:
        """The table of the process at `proc`; None for one that has none (it is exiting)."""
        address = proc + self._p_fd
        if not self._embedded:
            try:
                address = self._target.pointer(address)
            except FaultError as fault:
                return Unreadable.of(fault)
            if not address:
                return None
        raw = self._record.read(address)
        if isinstance(raw["last"], int):
            # an int that is -1 for no descriptors: what it says is the number of the last
            raw["last"] = (raw["last"] + (0 if self._after else 1)) & 0xFFFFFFFF
        return Table(**raw)

    def slots(self, table: Table, name: str, report: Report) -> Iterator[Slot]:
        """The slots that are taken; what cannot be read goes into `report` under `name`."""
        if isinstance(table.ofiles, Unreadable):
            report.stop(name, 0, f"fd_ofiles is {table.ofiles.reason}")
            return
        count = self._count(table, name, report) if table.ofiles else 0
        files, lost = self._array(table.ofiles, count, self._word)
        flags: list[int] | list[Any] = [None] * count
        if isinstance(table.ofileflags, int) and table.ofileflags:
            flags, _ = self._array(table.ofileflags, count, "B")
        for gap in lost:
            report.stops.append(f"{name}: slots {gap}")
        strip = self._target.strip
        for fd, (pointer, taken) in enumerate(zip(files, flags, strict=True)):
            reserved = isinstance(taken, int) and taken & UF_RESERVED
            if isinstance(pointer, int) and (pointer or reserved):
                self._taken += 1
                if self._taken > _ALL:
                    report.stop(name, fd, f"more than {_ALL} descriptors in all")
                    return
                yield Slot(fd, strip(pointer), taken)

    def _count(self, table: Table, name: str, report: Report) -> int:
        """How many slots to read: fd_nfiles as far as the kernel allows, else up to the last."""
        nfiles, last = table.nfiles, table.last
        if isinstance(nfiles, int) and 0 <= nfiles <= self._limit:
            return nfiles
        known = isinstance(last, int) and 0 <= last <= self._limit
        if not isinstance(nfiles, Unreadable):
            said = f"the table says {nfiles} slots, the kernel allows {self._limit}"
            report.stop(name, last if known else 0, said)
        elif not known:
            report.stop(name, 0, f"the length of the table is {nfiles.reason}")
        return last if known else 0

    def _array(self, address: int, count: int, code: str) -> tuple[list[Any], list[str]]:
        """`count` numbers of a `struct` code, `Unreadable` where they cannot be read; the gaps."""
        one = Struct(self._target.arch.byteorder + code)
        memory = self._target.memory
        lost: list[str] = []
        try:
            data = memory.read(address, count * one.size)
            return [value for (value,) in one.iter_unpack(data)], lost
        except FaultError as fault:
            values: list[Any] = [Unreadable.of(fault)] * count
        for piece in memory.read_pieces(address, count * one.size):
            start, end = piece.address - address, piece.address - address + piece.size
            if piece.data is None:
                first, last = start // one.size, (end - 1) // one.size
                lost.append(f"{first} to {last} are {piece.reason} at {piece.address:#x}")
                continue
            first, end = -(-start // one.size), end // one.size
            whole = piece.data[first * one.size - start : end * one.size - start]
            values[first:end] = [value for (value,) in one.iter_unpack(whole)]
        return values, lost


def _most(target: Target) -> int:
    """How many slots a table can have: kern.maxfilesperproc, kern.maxfiles."""
    said = []
    for name in ("_maxfilesperproc", "_maxfiles"):
        symbol = target.symbols.get(name)
        if symbol is not None:
            with suppress(FaultError):
                said.append(target.integer(symbol.address))
    known = [number for number in said if number > 0]
    return min(max(known[0], _LEAST), _MOST) if known else _MOST
