"""Descriptors of processes, after bsd/sys/{filedesc,file_internal,pipe}.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record
from tests.builders.sockets import NET, UNIX

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.builders.filesystem import FileSystem
    from tests.builders.ground import Ground
    from tests.builders.sockets import Sockets

VNODE, SOCKET = 1, 2
OTHERS = {3: "PSXSHM", 4: "PSXSEM", 5: "KQUEUE", 6: "PIPE", 7: "FSEVENTS", 9: "NPOLICY"}
FREAD, FWRITE, UF_EXCLOSE, UF_RESERVED = 1, 2, 1, 4


class Fd(NamedTuple):
    """An open file: of a vnode its path and type, of a socket its name, of others the type."""

    what: str
    kind: str | int
    flag: int = FREAD | FWRITE
    offset: int = 0
    cloexec: bool = False


def plan(pid: int) -> dict[int, Fd | None]:
    """What the process has open; None is a slot that is being opened. 71 has some of everything."""
    found: dict[int, Fd | None] = {fd: Fd("/dev/null", "CHR", fd + 1) for fd in range(3)}
    found[3] = Fd(f"/private/var/log/of {pid}.log", "REG", FWRITE, pid << 33, cloexec=True)
    if pid != 71:
        return found
    found[4] = None
    found[7] = Fd("/Volumes/Büro/Brief", "REG", FREAD, 17)
    found[8] = Fd("/Users", "DIR", FREAD)
    found |= {10 + place: Fd(name, SOCKET) for place, name in enumerate((*NET, *UNIX))}
    found |= {30 + kind: Fd(name, kind, cloexec=bool(kind % 2)) for kind, name in OTHERS.items()}
    return found


class Descriptors:
    """Tables for every live process but the kernel's own, which has an empty one."""

    def __init__(
        self,
        ground: Ground,
        files: FileSystem,
        sockets: Sockets,
        planned: Callable[[int], dict[int, Fd | None]] = plan,
    ) -> None:
        self._ground, self._types = ground, ground.types
        self._plan = planned
        self._files, self._sockets = files, sockets
        self._embedded = ground.types.has("proc", "p_fd.fd_ofiles")
        self._operations: dict[int, int] = {}

    def plant(self) -> dict[str, Any]:
        """The truth by (pid, descriptor); "cwd" and "rtd" are descriptors, too."""
        found: dict[tuple[int, int | str], dict[str, Any]] = {}
        for spec in self._ground.processes.specs:
            if spec.zombie:
                continue
            wanted = self._plan(spec.pid) if spec.pid else {}
            table = self._table(spec.pid)
            for fd, truth in self._fill(table, wanted).items():
                found[spec.pid, fd] = truth
            if spec.pid:
                home = f"/Users/of {spec.pid}"
                table.ptr("fd_cdir", self._files.vnode(home))
                found[spec.pid, "cwd"] = {"path": home, "kind": "DIR"}
            if spec.pid == 400:
                table.ptr("fd_rdir", self._files.vnode("/jail"))
                found[spec.pid, "rtd"] = {"path": "/jail", "kind": "DIR"}
        return {"descriptors": found}

    def _table(self, pid: int) -> Record:
        proc = self._ground.processes.procs[pid]
        if self._embedded:
            zones = self._ground.zones
            zone = zones["proc"] if zones["proc"].base <= proc.address < zones["proc"].end else None
            region = zone or self._ground.image.common
            return Record(self._types, region, "filedesc", proc.place("p_fd"))
        table = self._ground.record("filedesc")
        proc.ptr("p_fd", table.address)
        return table

    def _fill(self, table: Record, wanted: dict[int, Fd | None]) -> dict[int, dict[str, Any]]:
        ground, types = self._ground, self._types
        slots = max(25, max(wanted, default=0) + 7)
        width = ground.memory.width
        files = ground.bytes(bytes(slots * width))
        flags = ground.bytes(bytes(slots))
        table.ptr("fd_ofiles", files)
        table.ptr("fd_ofileflags", flags)
        table.u32("fd_nfiles", slots)
        last = max(wanted, default=-1)
        if types.has("filedesc", "fd_afterlast"):
            table.u32("fd_afterlast", last + 1)
        else:  # 16 bits in 10.4, where fd_freefile follows
            table.u16("fd_lastfile", last)
            if (
                types.offset("filedesc", "fd_freefile") - types.offset("filedesc", "fd_lastfile")
                >= 4
            ):
                table.u32("fd_lastfile", last)
        found = {}
        for fd, file in wanted.items():
            if file is None:
                ground.memory.write(flags + fd, bytes([UF_RESERVED]))
                found[fd] = {"slot": "reserved"}
                continue
            fileproc, truth = self._open(file)
            own = types.has("fileproc", "fp_guard_attrs")
            if file.cloexec and own:
                fileproc.u16("fp_flags", 1)
            elif file.cloexec:
                ground.memory.write(flags + fd, bytes([UF_EXCLOSE]))
            where = types.sign(fileproc.address, files + fd * width)
            signed = ("filedesc", "fd_ofiles") in types.signed
            ground.memory.put_pointer(files + fd * width, where if signed else fileproc.address)
            found[fd] = truth | {"slot": "open", "fileproc": fileproc.address}
            found[fd]["places"] = [table.address, files + fd * width, flags + fd]
        return found

    def _open(self, file: Fd) -> tuple[Record, dict[str, Any]]:
        """A fileproc and a fileglob with what is behind it."""
        kind = VNODE if isinstance(file.kind, str) else file.kind
        fileproc, glob = self._ground.record("fileproc"), self._ground.record("fileglob")
        fileproc.ptr("f_fglob", glob.address, maybe=True)
        fileproc.ptr("fp_glob", glob.address, maybe=True)
        glob.u32("fg_flag", file.flag)
        glob.u32("fg_count", 1)
        glob.u64("fg_offset", file.offset)
        if self._types.has("fileglob", "fg_type"):
            glob.u32("fg_type", kind)
        glob.ptr("fg_ops", self._fileops(kind))
        data = self._behind(file, kind)
        glob.ptr("fg_data", data)
        return fileproc, {
            "type": kind,
            "kind": file.kind,
            "what": file.what,
            "flag": file.flag,
            "offset": file.offset,
            "cloexec": file.cloexec,
            "fileglob": glob.address,
            "data": data,
        }

    def _fileops(self, kind: int) -> int:
        """struct fileops; its first member is fo_type from xnu-2422 (10.9) on."""
        if kind not in self._operations:
            data = bytearray(0x60)
            if self._types.has("fileglob", "fg_type"):
                read = self._ground.image.function("_fo_read")
                data[:4] = (read & 0xFFFFFFFF).to_bytes(4, "little")
            else:
                data[:4] = kind.to_bytes(4, "little")
            self._operations[kind] = self._ground.bytes(bytes(data))
        return self._operations[kind]

    def _behind(self, file: Fd, kind: int) -> int:
        if kind == VNODE:
            return self._files.vnode(file.what, str(file.kind))
        if kind == SOCKET:
            return self._sockets.of[file.what]
        names = {"PIPE": "pipe", "KQUEUE": "kqueue"}
        tag = names.get(file.what, "")
        if tag and self._types.has(tag):
            return self._ground.record(tag).address
        return self._ground.bytes(bytes(0x40))
