"""Sockets: what is at either end, what waits in their queues, who used them last.

Source: bsd/sys/socketvar.h, protosw.h, domain.h, sys_domain.h, bsd/kern/uipc_socket.c,
xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import NotFoundError
from kvmtool.target import Record, offset_of, record, unsigned
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.pcb import ControlReader, Inpcb, InpcbReader, Unpcb, UnpcbReader
from kvmtool.xnu.sockaddr import (
    AF_INET,
    AF_INET6,
    AF_KEY,
    AF_NDRV,
    AF_ROUTE,
    AF_SYSTEM,
    AF_UNIX,
    Endpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target

SO_ACCEPTCONN, SS_ISCONNECTED = 0x2, 0x2  # so_options, so_state
# so_type
TYPES = {1: "stream", 2: "dgram", 3: "raw", 4: "rdm", 5: "seqpacket"}
# dom_family in lsof's words (lsof's dialects/darwin/kmem/dsock.c)
KINDS = {
    AF_UNIX: "unix",
    AF_INET: "IPv4",
    AF_INET6: "IPv6",
    AF_ROUTE: "rte",
    AF_NDRV: "ndrv",
    AF_KEY: "key",
    AF_SYSTEM: "systm",
}
IPPROTO_TCP, IPPROTO_UDP, IPPROTO_DIVERT, IPPROTO_RAW = 6, 17, 254, 255
# pr_protocol and inp_ip_p: bsd/netinet/in.h
PROTOCOLS = {1: "icmp", 2: "igmp", IPPROTO_TCP: "tcp", IPPROTO_UDP: "udp", 58: "icmp6"} | {
    IPPROTO_DIVERT: "divert",
    IPPROTO_RAW: "raw",
}
SYSTEM_PROTOCOLS = {1: "event", 2: "control"}  # SYSPROTO_EVENT, SYSPROTO_CONTROL


@dataclass(frozen=True, slots=True)
class Socket:
    """One socket. Any field may be `Unreadable`.

    `family` is its domain's AF_ number, None for one whose protocol is gone (it is being freed).
    `inet`, `unix` is its pcb if it is of these families, `control` the kernel control's name.
    `state` is a state of TCP, or of local sockets LISTEN or CONNECTED. Queues count bytes;
    `last_pid` is None in kernels that do not keep it (to 10.6).
    """

    address: int
    family: Any
    type: Any
    protocol: Any
    state: Any
    options: Any
    pcb: Any
    recv_q: Any
    send_q: Any
    qlen: Any
    incqlen: Any
    qlimit: Any
    last_pid: Any
    inet: Inpcb | None
    unix: Unpcb | None
    control: Any

    @property
    def kind(self) -> Any:
        """The family in lsof's word; "sock" for one it has no word for."""
        return (
            self.family if isinstance(self.family, Unreadable) else KINDS.get(self.family, "sock")
        )

    @property
    def of_internet(self) -> bool:
        """Whether it is of IPv4 or IPv6."""
        return self.family in (AF_INET, AF_INET6)

    @property
    def protocol_name(self) -> Any:
        """tcp, udp, icmp, …; control or event of system sockets; stream or dgram of local ones."""
        if isinstance(self.family, Unreadable):
            return self.family
        if self.of_internet:
            lost = self.inet is None and isinstance(self.pcb, Unreadable)
            known = self.protocol in (IPPROTO_TCP, IPPROTO_UDP)
            return self.pcb if lost and not known else inet_protocol(self.protocol, self.inet)
        if self.family == AF_SYSTEM:
            return named(SYSTEM_PROTOCOLS, self.protocol)
        return self.type_name

    @property
    def type_name(self) -> Any:
        """The type in a word: stream, dgram, …"""
        return named(TYPES, self.type)


def named(words: dict[int, str], number: Any) -> Any:
    """The word for a number; the number itself as text where there is none."""
    return words.get(number, str(number)) if isinstance(number, int) else number


def inet_protocol(protocol: Any, pcb: Inpcb | None) -> Any:
    """The protocol's name; of a raw socket that of the packets it gets."""
    if protocol in (IPPROTO_TCP, IPPROTO_UDP):
        return PROTOCOLS[protocol]
    wanted = pcb.protocol if pcb is not None else 0
    if isinstance(wanted, Unreadable):
        return wanted
    return named(PROTOCOLS, wanted or protocol or IPPROTO_RAW)


class SocketReader:
    """Reads the sockets of one kernel, each once; protocols and domains, too."""

    def __init__(self, target: Target, name_of: Callable[[int], str] = str) -> None:
        """Compiles what this kernel's layouts have; `name_of` names an interface by its index."""
        types = target.types
        options = unsigned(types, "socket", "so_options")  # 16 bits up to 10.7
        fields = {**_SOCKET, "options": (options, "so_options")}
        buffers = {
            name: (_buffered(target, member), "I")
            for name, member in (("recv_q", "so_rcv"), ("send_q", "so_snd"))
        }
        offsets: dict[str, tuple[int | None, str]] = {
            name: (offset_of(types, "socket", member), code)
            for name, (code, member) in fields.items()
        }
        self._socket = Record(target, {**offsets, **buffers})
        self._protosw = record(target, "protosw", _PROTOSW)
        self._domain = record(target, "domain", {"family": ("i", "dom_family")})
        self.missing: str | None = None  # why addresses of the Internet could not be told
        self._without = ""
        try:
            self.inpcbs: InpcbReader | None = InpcbReader(target, name_of)
        except NotFoundError as missing:
            self.inpcbs, self._without = None, str(missing)
        self.unpcbs = UnpcbReader(target)
        self._controls = ControlReader(target)
        self._protocols: dict[int, tuple[Any, Any]] = {}
        self._known: dict[int, Socket] = {}

    def read(self, address: int) -> Socket:
        """The socket at `address`. Never raises `FaultError`."""
        if address not in self._known:
            self._known[address] = self._read(address)
        return self._known[address]

    def _read(self, address: int) -> Socket:
        raw = self._socket.read(address)
        family, protocol = self._protocol(raw.pop("proto"))
        flags = raw.pop("state")
        pcb = raw["pcb"]
        there = isinstance(pcb, int) and pcb != 0
        inet = unix = control = None
        state = family if isinstance(family, Unreadable) else None
        if isinstance(pcb, Unreadable) and family in (AF_INET, AF_INET6):
            state = pcb if protocol == IPPROTO_TCP else None
        if family in (AF_INET, AF_INET6) and there:
            if self.inpcbs is None:
                self.missing = self._without
            else:
                inet = self.inpcbs.read(pcb)
                state = self.inpcbs.tcp_state(inet) if protocol == IPPROTO_TCP else None
        elif family == AF_UNIX:
            unix = self.unpcbs.read(pcb) if there else None
            state = _local_state(raw["options"], flags)
        elif family == AF_SYSTEM and protocol == 2:
            control = self._controls.name(pcb)
        return Socket(
            address=address,
            family=family,
            protocol=protocol,
            state=state,
            inet=inet,
            unix=unix,
            control=control,
            **raw,
        )

    def ends(self, socket: Socket) -> tuple[Any, Any]:
        """(local, remote) end as text: address and port, path, or the name of a control.

        A local socket's other end is its path, or the address of its pcb where it has none.
        """
        if socket.inet is not None:
            local, foreign = socket.inet.local, socket.inet.foreign
            none = isinstance(foreign, Endpoint) and not foreign.port and foreign.host == "*"
            return _colon(local), None if none else _colon(foreign)
        if socket.unix is not None:
            peer = socket.unix.conn
            if peer and not isinstance(peer, Unreadable):
                path = self.unpcbs.read(peer).path
                peer = f"{peer:#x}" if path is None else path
            return socket.unix.path, peer or None
        lost = socket.family
        if not isinstance(lost, Unreadable):
            lost = socket.pcb if socket.family in (AF_UNIX, AF_INET, AF_INET6) else None
        return (lost, lost) if isinstance(lost, Unreadable) else (socket.control, None)

    def _protocol(self, protosw: Any) -> tuple[Any, Any]:
        """(family, protocol) by the protocol switch entry; (None, None) for a socket without."""
        if not protosw or isinstance(protosw, Unreadable):
            return (protosw, protosw) if protosw else (None, None)
        if protosw not in self._protocols:
            raw = self._protosw.read(protosw)
            family = domain = raw["domain"]
            if not isinstance(domain, Unreadable):
                family = self._domain.read(domain)["family"] if domain else None
            self._protocols[protosw] = family, raw["protocol"]
        return self._protocols[protosw]


def _colon(end: Any) -> Any:
    return end.colon if isinstance(end, Endpoint) else end


def _buffered(target: Target, member: str) -> int:
    """Where a socket keeps the number of bytes in one of its buffers: sb_cc."""
    types = target.types
    return types.offset("socket", member) + types.offset("sockbuf", "sb_cc")


def _local_state(options: Any, flags: Any) -> Any:
    for value in (options, flags):
        if isinstance(value, Unreadable):
            return value
    if options & SO_ACCEPTCONN:
        return "LISTEN"
    return "CONNECTED" if flags & SS_ISCONNECTED else None


_SOCKET = {
    "type": ("H", "so_type"),
    "state": ("H", "so_state"),
    "pcb": ("P", "so_pcb"),
    "proto": ("P", "so_proto"),
    "qlen": ("H", "so_qlen"),
    "incqlen": ("H", "so_incqlen"),
    "qlimit": ("H", "so_qlimit"),
    "last_pid": ("i", "last_pid"),
}
_PROTOSW = {"domain": ("P", "pr_domain"), "protocol": ("H", "pr_protocol")}
