"""Open files, as fstat(1) and lsof list them: what every process holds, and where it stands.

Source: bsd/sys/file_internal.h (fileproc, fileglob, DTYPE_*), bsd/sys/fcntl.h (FREAD, FWRITE),
bsd/kern/kern_descrip.c (proc_fdlist), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.filedata import DataReader
from kvmtool.xnu.filedesc import (
    UF_CLOSING,
    UF_EXCLOSE,
    UF_RESERVED,
    FiledescReader,
    Slot,
    Table,
)
from kvmtool.xnu.interface import InterfaceNames
from kvmtool.xnu.socket import Socket, SocketReader
from kvmtool.xnu.vnode import Vnode, VnodeReader

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.target import Target
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.queues import Report

FREAD, FWRITE = 0x1, 0x2  # fg_flag
FP_CLOEXEC = 0x1  # fp_flags
VNODE, SOCKET = 1, 2
# fg_type, fo_type: what lsof calls them, vnodes by their own types
TYPES = {
    VNODE: "VNODE",
    SOCKET: "SOCKET",
    3: "PSXSHM",
    4: "PSXSEM",
    5: "KQUEUE",
    6: "PIPE",
    7: "FSEVENTS",
    8: "ATALK",
    9: "NPOLICY",
    10: "CHANNEL",
    11: "NEXUS",
}


class _Glob(NamedTuple):
    """A fileglob, with what it leads to."""

    type: Any = None
    flag: Any = None
    offset: Any = None
    count: Any = None
    data: Any = None
    vnode: Vnode | None = None
    socket: Socket | None = None
    detail: Any = None
    size: Any = None
    device: Any = None


_NOTHING = _Glob()


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One thing a process holds. Any field may be `Unreadable`; None says there is no such thing.

    `fd` is the descriptor, or "cwd", "rtd", "txt" for the vnodes of proc and filedesc. `type` is
    lsof's word: a vnode's (REG, DIR, CHR, …), a socket's family (IPv4, unix, …), KQUEUE, PIPE, ….
    `flag` is fg_flag, `offset` and `size` are bytes, `count` the references to the fileglob, `data`
    its fg_data. `slot` is open, reserved (half-open) or closing. `detail` says more of what is
    neither vnode nor socket: a pipe's other end, a semaphore's name.
    """

    proc: Proc
    fd: int | str
    slot: Any
    type: Any
    flag: Any
    offset: Any
    cloexec: Any
    count: Any
    fileproc: Any
    fileglob: Any
    data: Any
    vnode: Vnode | None
    socket: Socket | None
    detail: Any
    size: Any
    device: Any

    @property
    def mode(self) -> Any:
        """How it may be used: r, w, u for both; None for neither."""
        if not isinstance(self.flag, int):
            return self.flag
        return (None, "r", "w", "u")[self.flag & (FREAD | FWRITE)]


class FileReader:
    """Reads the open files of one kernel; what processes share is read once."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have of each structure."""
        self.target = target
        types = target.types
        self.vnodes = VnodeReader(target)
        self.sockets = SocketReader(target, InterfaceNames(target).by_index)
        self._tables, self._data = FiledescReader(target), DataReader(target)
        self._textvp = record(target, "proc", {"textvp": ("P", "p_textvp")})
        # xnu-8019 (macOS 12) moved close-on-exec from the table to fileproc
        self._own_flags = types.has("fileproc", "fp_guard_attrs")
        fileproc: dict[str, tuple[str, *tuple[str, ...]]] = {"glob": ("P", "fp_glob", "f_fglob")}
        if self._own_flags:
            fileproc["flags"] = ("H", "fp_flags")
        self._fileproc = record(target, "fileproc", fileproc)
        self._fileglob = record(target, "fileglob", _FILEGLOB)
        self._fo_types: dict[int, Any] = {}
        self._globs: dict[int, _Glob] = {}

    def files(self, proc: Proc, report: Report) -> Iterator[OpenFile]:
        """What `proc` holds, in lsof's order; what could not be read goes into `report`."""
        name = f"descriptors of pid {proc.pid}"
        table = self._tables.table(proc.address)
        if isinstance(table, Unreadable):
            report.stop(name, 0, f"the table is {table.reason}")
            table = None
        if table is not None:
            yield from self._held(proc, "cwd", table.cdir)
            yield from self._held(proc, "rtd", table.rdir)
        yield from self._held(proc, "txt", self._textvp.read(proc.address)["textvp"])
        if table is not None:
            yield from self._descriptors(proc, table, name, report)

    def _held(self, proc: Proc, fd: str, address: Any) -> Iterator[OpenFile]:
        """A vnode that a process holds without a descriptor."""
        if not address:
            return
        if isinstance(address, Unreadable):
            glob = _Glob(type=address, data=address)
        else:
            glob = self._vnode(address)._replace(data=None)
        yield OpenFile(proc, fd, None, **glob._asdict(), cloexec=None, fileproc=None, fileglob=None)

    def _descriptors(
        self, proc: Proc, table: Table, name: str, report: Report
    ) -> Iterator[OpenFile]:
        for slot in self._tables.slots(table, name, report):
            raw = self._fileproc.read(slot.fileproc) if slot.fileproc else {"glob": 0}
            where = raw["glob"]
            if isinstance(where, Unreadable):
                glob = _Glob(type=where, flag=where, offset=where, count=where, data=where)
            else:
                glob = self.glob(where) if where else _NOTHING
            yield OpenFile(
                proc,
                slot.fd,
                _slot_state(slot.flags),
                **glob._asdict(),
                cloexec=self._cloexec(slot, raw),
                fileproc=slot.fileproc or None,
                fileglob=where or None,
            )

    def _cloexec(self, slot: Slot, raw: dict[str, Any]) -> Any:
        flags, bit = slot.flags, UF_EXCLOSE
        if self._own_flags:
            flags, bit = raw.get("flags"), FP_CLOEXEC
        return bool(flags & bit) if isinstance(flags, int) else flags

    def glob(self, address: int) -> _Glob:
        """The fileglob at `address`, read once."""
        if address not in self._globs:
            self._globs[address] = self._glob(address)
        return self._globs[address]

    def _glob(self, address: int) -> _Glob:
        raw = self._fileglob.read(address)
        kind = raw["type"] if raw["type"] is not None else self._fo_type(raw["ops"])
        data = raw["data"]
        if isinstance(kind, Unreadable) or isinstance(data, Unreadable):
            found = _Glob(type=kind if isinstance(kind, Unreadable) else data)
        elif not data:  # half-open: nothing there yet
            found = _Glob(type=TYPES.get(kind))
        elif kind == VNODE:
            found = self._vnode(data)
        elif kind == SOCKET:
            socket = self.sockets.read(data)
            found = _Glob(type=socket.kind, socket=socket)
        elif kind in TYPES:
            detail, size = self._data.read(TYPES[kind], data)
            found = _Glob(type=TYPES[kind], detail=detail, size=size)
        else:
            found = _Glob(type=Unreadable(f"the type of fileglob {address:#x} is {kind}"))
        rest = {name: raw[name] for name in ("flag", "offset", "count", "data")}
        return found._replace(**rest)

    def _vnode(self, address: int) -> _Glob:
        vnode = self.vnodes.read(address)
        size, device = self._data.size(vnode), self._data.device(vnode)
        return _Glob(type=vnode.type, vnode=vnode, size=size, device=device)

    def _fo_type(self, ops: Any) -> Any:
        """fo_type, the first member of fileops since xnu-2422 (10.9); 0 for no operations."""
        if not ops or isinstance(ops, Unreadable):
            return ops
        if ops not in self._fo_types:
            try:
                self._fo_types[ops] = self.target.unsigned(ops, "I")
            except FaultError as fault:
                self._fo_types[ops] = Unreadable.of(fault)
        return self._fo_types[ops]


def _slot_state(flags: Any) -> Any:
    if not isinstance(flags, int):
        return flags
    if flags & UF_RESERVED:
        return "reserved"
    return "closing" if flags & UF_CLOSING else "open"


_FILEGLOB = {
    "flag": ("I", "fg_flag"),
    "type": ("I", "fg_type"),  # to xnu-2050 (10.8)
    "count": ("i", "fg_count"),
    "ops": ("P", "fg_ops"),
    "offset": ("q", "fg_offset"),
    "data": ("P", "fg_data"),
}


def open_files(reader: FileReader, procs: Iterable[Proc], report: Report) -> Iterator[OpenFile]:
    """What each of `procs` holds open, process by process; zombies hold nothing.

    What could not be read, and where a table was cut short, goes into `report`.
    """
    for proc in procs:
        if proc.zombie is not True:
            yield from reader.files(proc, report)
    if reader.sockets.missing:
        report.notes.append(f"Internet sockets have no addresses: {reader.sockets.missing}")
