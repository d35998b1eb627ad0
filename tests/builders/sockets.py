"""Sockets with what is behind them, after bsd/sys/{socketvar,protosw,domain,unpcb}.h, bsd/netinet/
{in_pcb,tcp_var}.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record, bsd_list

if TYPE_CHECKING:
    from tests.builders.ground import Ground

AF_UNIX, AF_INET, AF_INET6, AF_SYSTEM = 1, 2, 30, 32
STREAM, DGRAM, RAW = 1, 2, 3
TCP, UDP, ICMP = 6, 17, 1
STATES = {"CLOSED": 0, "LISTEN": 1, "SYN_SENT": 2, "ESTABLISHED": 4, "TIME_WAIT": 10}
SO_ACCEPTCONN, SS_ISCONNECTED = 2, 2


class Net(NamedTuple):
    """An Internet socket; addresses as text, `state` one of `STATES` for TCP."""

    family: int
    protocol: int
    local: tuple[str, int]
    foreign: tuple[str, int] = ("", 0)
    state: str | None = None
    queued: tuple[int, int] = (0, 0)  # bytes to be received, to be sent


class Unix(NamedTuple):
    """A local socket: bound to `path`, connected to the one named `peer`."""

    name: str
    path: str | None = None
    peer: str | None = None
    listening: bool = False


NET = {
    "ssh": Net(AF_INET, TCP, ("10.0.2.15", 50_022), ("192.168.1.9", 22), "ESTABLISHED", (7, 4096)),
    "http": Net(AF_INET6, TCP, ("::", 80), ("::", 0), "LISTEN"),
    "gone": Net(AF_INET6, TCP, ("2001:db8::17", 49_152), ("2001:db8::1", 443), "TIME_WAIT"),
    "syslog": Net(AF_INET, UDP, ("0.0.0.0", 514)),
    "dns": Net(AF_INET6, UDP, ("::1", 5353), ("::1", 53)),
    "ping": Net(AF_INET, ICMP, ("0.0.0.0", 0)),
}
UNIX = {
    unix.name: unix
    for unix in (
        Unix("log", "/var/run/syslog", listening=True),
        Unix("near", None, "far"),
        Unix("far", "/tmp/.X11-unix/X0", "near"),
    )
}
_KIND = {TCP: STREAM, UDP: DGRAM, ICMP: RAW}
_INFOS = {TCP: "_tcbinfo", UDP: "_udbinfo", ICMP: "_ripcbinfo"}


class Sockets:
    """Plants `NET` and `UNIX` once; `of` gives the socket of a name."""

    def __init__(self, ground: Ground, last_pid: int) -> None:
        self._ground, self._types = ground, ground.types
        self._last_pid = last_pid
        self._zone = ground.region("sockets", 4)  # apart from what lies behind them
        self._protocols: dict[tuple[int, int, int], int] = {}
        self._domains: dict[int, int] = {}
        self.of: dict[str, int] = {}
        self.pcb: dict[str, int] = {}

    def plant(self) -> dict[str, Any]:
        """All of them; the truth about each by its name."""
        truth = {name: self._net(name, net) for name, net in NET.items()}
        for protocol, info in _INFOS.items():
            self._info(info, [self.pcb[n] for n, net in NET.items() if net.protocol == protocol])
        pcbs = {name: self._ground.record("unpcb") for name in UNIX}
        for name, unix in UNIX.items():
            truth[name] = self._unix(name, unix, pcbs)
        return {"sockets": truth}

    def _socket(self, family: int, kind: int, protocol: int, pcb: int) -> Record:
        found = Record(self._types, self._zone, "socket")
        found.u16("so_type", kind)
        found.ptr("so_pcb", pcb)
        found.ptr("so_proto", self._protocol(family, kind, protocol))
        found.u32("last_pid", self._last_pid, maybe=True)
        found.u16("so_qlimit", 128)
        return found

    def _protocol(self, family: int, kind: int, protocol: int) -> int:
        """struct protosw and its domain."""
        key = (family, kind, protocol)
        if key not in self._protocols:
            if family not in self._domains:
                domain = self._ground.record("domain")
                domain.u32("dom_family", family)
                self._domains[family] = domain.address
            protosw = self._ground.record("protosw")
            protosw.u16("pr_type", kind)
            protosw.u16("pr_protocol", protocol)
            protosw.ptr("pr_domain", self._domains[family])
            self._protocols[key] = protosw.address
        return self._protocols[key]

    def _net(self, name: str, net: Net) -> dict[str, Any]:
        types = self._types
        pcb = tcp = 0
        if types.has("inpcb"):
            inpcb = self._ground.record("inpcb")
            pcb = inpcb.address
            inpcb.u8("inp_vflag", 2 if net.family == AF_INET6 else 1)
            inpcb.u8("inp_ip_p", 0 if net.protocol in (TCP, UDP) else net.protocol)
            for side, (text, port) in (("l", net.local), ("f", net.foreign)):
                self._end(inpcb, net.family, side, text, port)
            if net.state is not None:
                tcpcb = self._ground.record("tcpcb")
                tcpcb.u32("t_state", STATES[net.state])
                tcpcb.ptr("t_inpcb", pcb)
                tcp = tcpcb.address
                inpcb.ptr("inp_ppcb", tcp)
        found = self._socket(net.family, _KIND[net.protocol], net.protocol, pcb or 8)
        if pcb:
            inpcb.ptr("inp_socket", found.address)
        if net.state == "LISTEN":
            found.u16("so_options", SO_ACCEPTCONN)
        for member, count in zip(("so_rcv", "so_snd"), net.queued, strict=True):
            at = found.place(member) + types.offset("sockbuf", "sb_cc")
            self._ground.memory.put_u32(at, count)
        self.of[name], self.pcb[name] = found.address, pcb
        return {"socket": found.address, "pcb": pcb, "net": net}

    def _end(self, inpcb: Record, family: int, side: str, text: str, port: int) -> None:
        data = bytes(16)
        if text and family == AF_INET6:
            data = socket.inet_pton(socket.AF_INET6, text)
        elif text:
            data = bytes(12) + socket.inet_pton(socket.AF_INET, text)
        self._ground.memory.write(inpcb.place(f"inp_depend{side}addr"), data)
        self._ground.memory.write(inpcb.place(f"inp_{side}port"), struct.pack(">H", port))

    def _info(self, symbol: str, pcbs: list[int]) -> None:
        """struct inpcbinfo: a pointer to the head of the list."""
        ground, types = self._ground, self._types
        at = ground.image.variable(symbol, types.layout.size("inpcbinfo"), align=16)
        old = types.has("inpcbinfo", "listhead")
        place = at + types.offset("inpcbinfo", "listhead" if old else "ipi_listhead")
        head = ground.bytes(bytes(ground.memory.width))
        ground.memory.put_pointer(place, head)
        ground.memory.put_u32(at + types.offset("inpcbinfo", "ipi_count"), len(pcbs))
        if types.has("inpcb"):
            bsd_list(ground.memory, head, pcbs, types.offset("inpcb", "inp_list"))

    def _unix(self, name: str, unix: Unix, pcbs: dict[str, Record]) -> dict[str, Any]:
        unpcb = pcbs[name]
        found = self._socket(AF_UNIX, STREAM, 0, unpcb.address)
        unpcb.ptr("unp_socket", found.address)
        if unix.path is not None:
            path = unix.path.encode() + b"\0"
            unpcb.ptr("unp_addr", self._ground.bytes(bytes((len(path) + 2, AF_UNIX)) + path))
        if unix.peer is not None:
            unpcb.ptr("unp_conn", pcbs[unix.peer].address)
            found.u16("so_state", SS_ISCONNECTED)
        if unix.listening:
            found.u16("so_options", SO_ACCEPTCONN)
        self.of[name], self.pcb[name] = found.address, unpcb.address
        return {"socket": found.address, "pcb": unpcb.address, "unix": unix}
