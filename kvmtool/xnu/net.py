"""Connections, as netstat(1) lists them: every socket of the Internet, of paths, of the kernel.

The kernel chains the pcbs of each protocol; the descriptors of processes lead to the same sockets.
Both ways are gone, so what is on no list is found all the same, and shown to be on none.
Source: bsd/netinet/in_pcb.h (inpcbinfo), tcp_subr.c, udp_usrreq.c, raw_ip.c, bsd/kern/uipc_usrreq.c
(unp_shead, unp_dhead), kern_control.c (ctl_head), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.pcb import Inpcb, Unpcb
from kvmtool.xnu.queues import Report, walk_list
from kvmtool.xnu.sockaddr import AF_INET, AF_INET6, AF_SYSTEM, AF_UNIX
from kvmtool.xnu.socket import (
    IPPROTO_DIVERT,
    IPPROTO_RAW,
    IPPROTO_TCP,
    IPPROTO_UDP,
    inet_protocol,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.xnu.file import FileReader
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.socket import Socket

# the kernel's struct inpcbinfo -> the protocol of what is on its list
_INPCBS = {
    "tcbinfo": IPPROTO_TCP,
    "udbinfo": IPPROTO_UDP,
    "ripcbinfo": IPPROTO_RAW,
    "divcbinfo": IPPROTO_DIVERT,
}
_LIST_OF = {IPPROTO_TCP: "tcbinfo", IPPROTO_UDP: "udbinfo"}
_UNPCBS = ("unp_shead", "unp_dhead")
_LIMIT = 1 << 18  # pcbs of one protocol
_INET = (AF_INET, AF_INET6)
_SYSTEM = {"control": "kctl", "event": "kevt"}
DESCRIPTORS = "descriptors"


@dataclass(frozen=True, slots=True)
class Connection:
    """One socket, with the pcb and the processes that belong to it.

    `socket` is None for a pcb that has none any more; `inet` and `unix` are the pcb. `pids` are the
    processes with a descriptor of it, in the order of the process list. `lists` names what led
    here: the kernel's lists, "descriptors", or "peer" for the other end of a local socket.
    """

    socket: Socket | None
    inet: Inpcb | None
    unix: Unpcb | None
    protocol: Any
    state: Any
    pids: tuple[Any, ...]
    lists: tuple[str, ...]

    @property
    def proto(self) -> Any:
        """netstat's word: tcp4, udp46, icmp4, …; unix; kctl, kevt; else lsof's for the family."""
        if self.inet is not None:
            for value in (self.protocol, self.inet.versions):
                if isinstance(value, Unreadable):
                    return value
            return f"{self.protocol}{self.inet.versions}"
        if self.unix is not None:
            return "unix"
        if self.socket is None or isinstance(self.socket.family, Unreadable):
            return self.socket and self.socket.family
        if self.socket.family == AF_SYSTEM:
            return _SYSTEM.get(self.protocol, self.socket.kind)
        return self.protocol if self.socket.family in _INET else self.socket.kind

    @property
    def pid(self) -> Any:
        """The process that used it last; where the kernel does not keep that (10.6), its first."""
        last = self.socket.last_pid if self.socket is not None else None
        known = last and not isinstance(last, Unreadable)
        return self.pids[0] if self.pids and not known else last or None

    @property
    def listening(self) -> bool:
        """Whether it accepts connections."""
        return bool(self.state == "LISTEN")


class _Finder:
    """Every way to a socket, each taken once: `order` is how they were met."""

    def __init__(self, reader: FileReader, report: Report) -> None:
        """Goes no way yet; what cannot be read will go into `report`."""
        self._reader, self._target, self._report = reader, reader.target, report
        self._sockets = reader.sockets
        self.order: list[int] = []
        self.lists: dict[int, dict[str, None]] = {}
        self.pids: dict[int, dict[Any, None]] = {}
        self.pcbs: dict[int, Inpcb | Unpcb] = {}
        self.orphans: list[tuple[Inpcb | Unpcb, str]] = []
        self._whole: set[str] = set()

    def find(self, procs: Iterable[Proc]) -> None:
        """Go all ways, then compare them."""
        for name in _INPCBS:
            self._inpcbs(name)
        self._unpcbs()
        self._controls()
        for proc in procs:
            if proc.zombie is not True:
                self._descriptors(proc)
        self._peers()
        self._compare()

    def _add(self, socket: int, name: str) -> None:
        """Note that `name` leads to a socket."""
        if socket not in self.lists:
            self.order.append(socket)
        self.lists.setdefault(socket, {})[name] = None

    def _chain(self, head: int, link: int, name: str) -> Iterator[int]:
        return walk_list(self._target, head, link, name, self._report, _LIMIT)

    def _inpcbs(self, name: str) -> None:
        """The chain of a struct inpcbinfo."""
        target, pcbs = self._target, self._sockets.inpcbs
        found = target.symbols.get(f"_{name}")
        if found is None or pcbs is None:
            return
        at = offset_of(target.types, "inpcbinfo", "ipi_listhead", "listhead") or 0
        stops, count = len(self._report.stops), 0
        try:
            head = target.pointer(found.address + at)
            said = target.integer(found.address + target.types.offset("inpcbinfo", "ipi_count"))
        except FaultError as fault:
            self._report.stop(name, 0, f"{fault.address:#x} is {fault.reason}")
            return
        if not head:
            return  # this protocol was never set up
        for address in self._chain(head, pcbs.link, name):
            count += 1
            self._owner(pcbs.read(address), name)
        if len(self._report.stops) == stops:
            self._whole.add(name)
            if count != said:
                text = f"{name}: {count} pcbs are on its list, ipi_count is {said}"
                self._report.notes.append(text)

    def _owner(self, pcb: Inpcb | Unpcb, name: str) -> None:
        """A pcb on a list leads to its socket."""
        if isinstance(pcb.socket, int) and pcb.socket:
            self._add(pcb.socket, name)
            self.pcbs[pcb.socket] = pcb
        else:
            self.orphans.append((pcb, name))

    def _unpcbs(self) -> None:
        """The chains of local sockets: their heads are static, so symbols may be stripped."""
        for name in _UNPCBS:
            found = self._target.symbols.get(f"_{name}")
            if found is not None:
                pcbs = self._sockets.unpcbs
                for address in self._chain(found.address, pcbs.link, name):
                    self._owner(pcbs.read(address), name)

    def _controls(self) -> None:
        """The sockets of each kernel control, where types know struct kctl."""
        target, types = self._target, self._target.types
        head = target.symbols.get("_ctl_head")
        members = (("kctl", "next"), ("kctl", "kcb_head"), ("ctl_cb", "next"), ("ctl_cb", "so"))
        if head is None or not all(types.has(*member) for member in members):
            return
        next_kctl, blocks, next_cb, so = (types.offset(*member) for member in members)
        for kctl in self._chain(head.address, next_kctl, "ctl_head"):
            for block in self._chain(kctl + blocks, next_cb, f"kctl {kctl:#x}"):
                try:
                    socket = target.pointer(block + so)
                except FaultError as fault:
                    self._report.stops.append(f"ctl_cb {block:#x}: so is {fault.reason}")
                    continue
                if socket:
                    self._add(socket, "ctl_head")

    def _descriptors(self, proc: Proc) -> None:
        lost: list[str] = []
        for file in self._reader.files(proc, self._report):
            if file.socket is not None:
                self._add(file.socket.address, DESCRIPTORS)
                self.pids.setdefault(file.socket.address, {})[proc.pid] = None
            elif isinstance(file.type, Unreadable) and isinstance(file.fd, int):
                lost += [file.type.reason] if file.vnode is None else []
        if lost:
            text = f"pid {proc.pid}: {len(lost)} descriptors cannot be read, they may be sockets: "
            text += lost[0]
            self._report.stops.append(text)

    def _peers(self) -> None:
        """The other ends of local sockets, which may be in no process any more."""
        for address in self.order:  # grows on the way
            unix = self._sockets.read(address).unix
            if unix is None or not isinstance(unix.conn, int) or not unix.conn:
                continue
            peer = self._sockets.unpcbs.read(unix.conn).socket
            if isinstance(peer, int) and peer and peer not in self.lists:
                self._add(peer, "peer")

    def _compare(self) -> None:
        """Note sockets that processes have and the whole list of their protocol has not."""
        missing = dict.fromkeys(self._whole, 0)
        for address, lists in self.lists.items():
            socket = self._sockets.read(address)
            name = _LIST_OF.get(socket.protocol) if socket.family in _INET else None
            if name in missing and name not in lists:
                missing[name] += 1
        for name, count in missing.items():
            if count:
                text = f"{name}: {count} of the sockets that processes have are not on its list"
                self._report.notes.append(text)

    def connection(self, address: int) -> Connection:
        """What was found about a socket; of an unreadable one, what its pcb knows."""
        socket, pcb = self._sockets.read(address), self.pcbs.get(address)
        lists = tuple(self.lists[address])
        pids = tuple(self.pids.get(address, ()))
        if socket.inet is None and socket.unix is None and pcb is not None:
            return replace(self.orphan(pcb, lists[0]), socket=socket, pids=pids, lists=lists)
        protocol, state = socket.protocol_name, socket.state
        return Connection(socket, socket.inet, socket.unix, protocol, state, pids, lists)

    def orphan(self, pcb: Inpcb | Unpcb, name: str) -> Connection:
        """A pcb on the list `name` without a socket."""
        if isinstance(pcb, Unpcb):
            return Connection(None, None, pcb, None, None, (), (name,))
        number = _INPCBS[name]
        state = None
        if number == IPPROTO_TCP and self._sockets.inpcbs is not None:
            state = self._sockets.inpcbs.tcp_state(pcb)
        return Connection(None, pcb, None, inet_protocol(number, pcb), state, (), (name,))


def connections(
    reader: FileReader, procs: Iterable[Proc], report: Report | None = None
) -> list[Connection]:
    """Every socket: TCP, UDP and what else is of the Internet, local ones, the kernel's, others.

    Within a kind they stand in the order of the kernel's list. What could not be read, and where
    the ways disagree, goes into `report`.
    """
    report = report if report is not None else Report()
    finder = _Finder(reader, report)
    finder.find(procs)
    found = [finder.connection(address) for address in finder.order]
    found += [finder.orphan(pcb, name) for pcb, name in finder.orphans]
    if reader.sockets.missing:
        report.notes.append(f"Internet sockets have no addresses: {reader.sockets.missing}")
    return sorted(found, key=_kind)


def _kind(connection: Connection) -> int:
    """Where netstat prints it: the Internet's by protocol, then local ones, then the kernel's."""
    if connection.inet is not None:
        return {"tcp": 0, "udp": 1}.get(str(connection.protocol), 2)
    family = connection.socket.family if connection.socket is not None else None
    if family in _INET:
        return 2
    return 3 if connection.unix is not None or family == AF_UNIX else 4
