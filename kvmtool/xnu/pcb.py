"""Protocol control blocks: what a socket of the Internet, of a path, of a kernel control is.

Source: bsd/netinet/in_pcb.h, tcp_fsm.h, tcp_var.h, bsd/sys/unpcb.h, bsd/kern/kern_control.c
(kctl_cb), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError
from kvmtool.target import offset_of, record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import text_of
from kvmtool.xnu.sockaddr import Endpoint, ipv4, ipv6, read_sockaddr, unix_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target

INP_IPV4, INP_IPV6 = 0x1, 0x2  # inp_vflag
INPCB_STATE_DEAD = 3  # inp_state: its socket is gone
STATES = (  # t_state
    *("CLOSED", "LISTEN", "SYN_SENT", "SYN_RCVD", "ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_1"),
    *("CLOSING", "LAST_ACK", "FIN_WAIT_2", "TIME_WAIT"),
)
_MAX_KCTL_NAME = 96


@dataclass(frozen=True, slots=True)
class Inpcb:
    """An Internet pcb. Any field may be `Unreadable`.

    `local` and `foreign` are `Endpoint`s; `versions` is "4", "6" or "46"; `protocol` is inp_ip_p,
    which only raw sockets have; `ppcb` is the tcpcb of those of TCP, else 0. `dead` is whether it
    only waits to be freed.
    """

    address: int
    local: Any
    foreign: Any
    versions: Any
    protocol: Any
    socket: Any
    ppcb: Any
    flags: Any
    dead: Any


class InpcbReader:
    """Reads the Internet pcbs of one kernel, each once."""

    def __init__(self, target: Target, name_of: Callable[[int], str] = str) -> None:
        """Compiles what this kernel's layouts have; `name_of` names an interface by its index.

        Raises `NotFoundError` for types that do not know struct inpcb.
        """
        types = target.types
        types.struct("inpcb")
        self._name_of = name_of
        self.link = offset_of(types, "inpcb", "inp_list.le_next", "inp_list") or 0
        self._record = record(target, "inpcb", _INPCB)
        self._state = record(target, "tcpcb", {"state": ("i", "t_state")})
        self._known: dict[int, Inpcb] = {}

    def read(self, address: int) -> Inpcb:
        """The pcb at `address`. Never raises `FaultError`."""
        if address not in self._known:
            self._known[address] = self._read(address)
        return self._known[address]

    def _read(self, address: int) -> Inpcb:
        raw = self._record.read(address)
        local = self._endpoint(raw["vflag"], raw["laddr"], raw["lport"], raw["lscope"])
        foreign = self._endpoint(raw["vflag"], raw["faddr"], raw["fport"], raw["fscope"])
        versions = raw["vflag"]
        if isinstance(versions, int):
            both = ((INP_IPV4, "4"), (INP_IPV6, "6"))
            versions = "".join(text for bit, text in both if versions & bit)
        rest = {name: raw[name] for name in ("protocol", "socket", "ppcb", "flags")}
        dead = raw["state"]
        dead = dead == INPCB_STATE_DEAD if isinstance(dead, int) else dead
        return Inpcb(address, local, foreign, versions, **rest, dead=dead)

    def _endpoint(self, vflag: Any, address: Any, port: Any, scope: Any) -> Any:
        for value in (vflag, address, port, scope):
            if isinstance(value, Unreadable):
                return value
        number = int.from_bytes(port, "big")
        if vflag & INP_IPV6 and (vflag == INP_IPV6 or any(address[:12]) or not any(address)):
            return Endpoint(ipv6(address, scope or 0, self._name_of), number)
        return Endpoint(ipv4(address[12:]), number)  # in the last four bytes: in_addr_4in6

    def tcp_state(self, pcb: Inpcb) -> Any:
        """The state of a pcb of TCP in netstat's word; CLOSED for one that has lost its tcpcb."""
        if isinstance(pcb.ppcb, Unreadable):
            return pcb.ppcb
        state = self._state.read(pcb.ppcb)["state"] if pcb.ppcb else 0
        if isinstance(state, Unreadable):
            return state
        return STATES[state] if 0 <= state < len(STATES) else Unreadable(f"t_state is {state}")


_INPCB = {
    "fport": ("2s", "inp_fport"),
    "lport": ("2s", "inp_lport"),
    "ppcb": ("P", "inp_ppcb"),
    "socket": ("P", "inp_socket"),
    "state": ("i", "inp_state"),
    "flags": ("I", "inp_flags"),
    "vflag": ("B", "inp_vflag"),
    "protocol": ("B", "inp_ip_p"),
    "faddr": ("16s", "inp_dependfaddr"),
    "laddr": ("16s", "inp_dependladdr"),
    # beside the addresses since xnu-8019 (macOS 12.0), inside them before
    "lscope": ("I", "inp_lifscope"),
    "fscope": ("I", "inp_fifscope"),
}


@dataclass(frozen=True, slots=True)
class Unpcb:
    """The pcb of a local socket. Any field may be `Unreadable`.

    `path` is what it is bound to, None if to nothing; `vnode` the file of that, `conn` the pcb of
    the other end, both 0 if there is none.
    """

    address: int
    path: Any
    socket: Any
    vnode: Any
    conn: Any


class UnpcbReader:
    """Reads the pcbs of local sockets of one kernel, each once."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layouts have."""
        self._target = target
        self.link = offset_of(target.types, "unpcb", "unp_link.le_next", "unp_link") or 0
        self._record = record(target, "unpcb", _UNPCB)
        self._known: dict[int, Unpcb] = {}

    def read(self, address: int) -> Unpcb:
        """The pcb at `address`. Never raises `FaultError`."""
        if address not in self._known:
            raw = self._record.read(address)
            path = self._path(raw.pop("addr"))
            self._known[address] = Unpcb(address, path, **raw)
        return self._known[address]

    def _path(self, address: Any) -> Any:
        if not address or isinstance(address, Unreadable):
            return address or None
        try:
            return unix_path(read_sockaddr(self._target, address)) or None
        except FaultError as fault:
            return Unreadable.of(fault)


_UNPCB = {
    "socket": ("P", "unp_socket"),
    "vnode": ("P", "unp_vnode"),
    "conn": ("P", "unp_conn"),
    "addr": ("P", "unp_addr"),
}


class ControlReader:
    """The name of the kernel control a system socket is connected to, where types tell."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's types have; no built-in layout knows ctl_cb and kctl."""
        self.known = target.types.has("ctl_cb", "kctl") and target.types.has("kctl", "name")
        if self.known:
            self._cb = record(target, "ctl_cb", {"kctl": ("P", "kctl"), "unit": ("I", "unit")})
            self._kctl = record(target, "kctl", {"name": (f"{_MAX_KCTL_NAME}s", "name")})

    def name(self, pcb: Any) -> Any:
        """The control's name; None where there is none or types do not tell."""
        if not self.known or not pcb or isinstance(pcb, Unreadable):
            return pcb if isinstance(pcb, Unreadable) else None
        kctl = self._cb.read(pcb)["kctl"]
        if not kctl or isinstance(kctl, Unreadable):
            return kctl or None
        return text_of(self._kctl.read(kctl)["name"])
