"""Interfaces, routes and unusual sockets, after bsd/net/{if_var,if_dl,radix,route}.h,
bsd/netinet/in_pcb.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record, bsd_list, tail_queue

if TYPE_CHECKING:
    from tests.builders.ground import Ground

AF_INET, AF_LINK, AF_INET6 = 2, 18, 30
RNF_NORMAL, RNF_ROOT, RNF_ACTIVE = 1, 2, 4
RTF_UP, RTF_GATEWAY, RTF_HOST, RTF_STATIC = 1, 2, 4, 0x800


class Interface(NamedTuple):
    """An interface; `addresses` are (address, prefix length, broadcast or other end)."""

    name: str
    unit: int
    flags: int
    mtu: int
    mac: bytes = b""
    addresses: tuple[tuple[str, int, str | None], ...] = ()


class Route(NamedTuple):
    """A route; a prefix of None is a host. `gateway` is an address or an interface's number."""

    destination: str
    prefix: int | None
    gateway: str | int
    flags: int
    interface: int = 1


TYPES = {"lo": 0x18, "en": 6, "utun": 1}  # bsd/net/if_types.h
INTERFACES = (
    Interface("lo", 0, 0x8049, 16384, addresses=(("::1", 128, None), ("127.0.0.1", 8, None))),
    Interface(
        *("en", 0, 0x8863, 1500, bytes.fromhex("525400123456")),
        addresses=(
            ("fe80::5054:ff:fe12:3456", 64, None),
            ("10.0.2.15", 24, "10.0.2.255"),
            ("2001:db8::15", 60, None),
        ),
    ),
    Interface("utun", 3, 0x8051, 1380, addresses=(("10.8.0.2", 32, "10.8.0.1"),)),
)
ROUTES = (
    Route("0.0.0.0", 0, "10.0.2.2", RTF_UP | RTF_GATEWAY | RTF_STATIC, 2),
    Route("10.0.0.0", 8, "10.0.2.9", RTF_UP | RTF_GATEWAY, 2),
    Route("10.0.0.0", 24, 2, RTF_UP | 0x100, 2),
    Route("127.0.0.1", None, "127.0.0.1", RTF_UP | RTF_HOST),
    Route("fe80::", 64, 2, RTF_UP | 0x1000000, 2),
    Route("::1", None, "::1", RTF_UP | RTF_HOST),
)


def packed(address: str, scope: int = 0) -> bytes:
    """An address in network order; link-local ones with the scope inside, as the kernel's."""
    if ":" not in address:
        return socket.inet_aton(address)
    data = socket.inet_pton(socket.AF_INET6, address)
    return data[:2] + struct.pack(">H", scope) + data[4:] if data[:2] == b"\xfe\x80" else data


def sockaddr(address: str, scope: int = 0) -> bytes:
    """A sockaddr_in or sockaddr_in6."""
    data = packed(address, scope)
    if len(data) == 4:
        return struct.pack("<BBH4s8x", 16, AF_INET, 0, data)
    return struct.pack("<BBHI16sI", 28, AF_INET6, 0, 0, data, 0)


def sockaddr_dl(index: int, name: str, mac: bytes) -> bytes:
    """A sockaddr_dl."""
    text = name.encode()
    data = struct.pack("<HBBBB", index, 6, len(text), len(mac), 0) + text + mac
    return bytes((max(20, 2 + len(data)), AF_LINK)) + data.ljust(18, b"\0")


def mask(prefix: int, family: int) -> bytes:
    """The sockaddr of a mask as rn_addmask keeps it: without its trailing zeros."""
    size = 32 if family == AF_INET else 128
    bits = ((1 << prefix) - 1 << size - prefix).to_bytes(size // 8, "big")
    head = b"\xff" * (4 if family == AF_INET else 8)
    data = (head + bits).rstrip(b"\0") if prefix else b"\0\0"
    return bytes([len(data) if prefix else 0]) + data[1:]


class Network:
    """Plants `INTERFACES` and `ROUTES`."""

    def __init__(self, ground: Ground) -> None:
        self._ground, self._types = ground, ground.types
        self.ifnets: list[int] = []

    def plant(self) -> dict[str, Any]:
        """Both, with the truth of where they lie."""
        self.ifnets = [self._interface(n, one) for n, one in enumerate(INTERFACES, 1)]
        # the name is as old as the lock of ifaddr: xnu-1699 (10.7)
        name = "_ifnet_head" if self._types.has("ifaddr", "ifa_lock") else "_ifnet"
        head = self._ground.image.variable(name, 2 * self._ground.memory.width)
        tail_queue(self._ground.memory, head, self.ifnets, self._types.offset("ifnet", "if_link"))
        return {"ifnets": self.ifnets, "rtentries": self._routes()}

    def _interface(self, index: int, one: Interface) -> int:
        ground, types = self._ground, self._types
        ifnet = ground.record("ifnet")
        ifnet.ptr("if_name", ground.text(one.name))
        ifnet.ptr("if_xname", ground.text(f"{one.name}{one.unit}"), maybe=True)
        for member, value in (("if_unit", one.unit), ("if_index", index), ("if_flags", one.flags)):
            ifnet.u16(member, value)
        data = Record(types, ground.zones["kalloc"], "if_data_internal", ifnet.place("if_data"))
        data.u8("ifi_type", TYPES[one.name])
        data.u32("ifi_mtu", one.mtu)
        data.u64("ifi_ipackets", index * 1000)
        data.u64("ifi_obytes", index << 33)
        links = [self._ifaddr(ifnet, sockaddr_dl(index, f"{one.name}{one.unit}", one.mac))]
        for address, prefix, other in one.addresses:
            ifaddr = self._ifaddr(ifnet, sockaddr(address, index))
            family = AF_INET6 if ":" in address else AF_INET
            full = sockaddr(address)[:2] + mask(prefix, family)[2:]
            ifaddr.ptr("ifa_netmask", ground.bytes(full.ljust(28, b"\0")))
            if other is not None:
                ifaddr.ptr("ifa_dstaddr", ground.bytes(sockaddr(other)))
            links.append(ifaddr)
        head, link = ifnet.place("if_addrhead"), types.offset("ifaddr", "ifa_link")
        tail_queue(ground.memory, head, [ifaddr.address for ifaddr in links], link)
        return ifnet.address

    def _ifaddr(self, ifnet: Record, data: bytes) -> Record:
        ifaddr = self._ground.record("ifaddr")
        ifaddr.ptr("ifa_ifp", ifnet.address)
        ifaddr.ptr("ifa_addr", self._ground.bytes(data))
        return ifaddr

    def _routes(self) -> list[int]:
        """A tree for each family: the first route shares the key of the leaf that ends the tree."""
        ground = self._ground
        width = ground.memory.width
        tables = ground.image.variable("_rt_tables", 38 * width)
        found = []
        for family in (AF_INET, AF_INET6):
            routes = [self._route(one, family) for one in ROUTES if self._family(one) == family]
            first, last = (self._leaf(RNF_ROOT | RNF_ACTIVE, b"\0" * 8) for _ in range(2))
            if family == AF_INET:
                self._duped(first, routes[0])
                self._duped(routes[1], routes[2])
                tree = self._node(34, self._node(36, first, routes[1]), routes[3])
            else:
                tree = self._node(64, self._node(67, first, routes[0]), routes[1])
            top = self._node(32, tree, last)
            head = ground.bytes(bytes(32 * width))
            ground.memory.put_pointer(head, top)
            ground.memory.put_pointer(tables + family * width, head)
            found += routes
        return found

    def _family(self, route: Route) -> int:
        return AF_INET6 if ":" in route.destination else AF_INET

    def _route(self, one: Route, family: int) -> int:
        ground = self._ground
        rtentry = ground.record("rtentry")
        key = ground.bytes(sockaddr(one.destination, one.interface))
        cover = 0 if one.prefix is None else ground.bytes(mask(one.prefix, family).ljust(28, b"\0"))
        self._fill(rtentry.address, -1, RNF_ACTIVE, (key, cover, 0))
        rtentry.u32("rt_flags", one.flags)
        rtentry.u32("rt_refcnt", 1)
        gateway = one.gateway
        data = sockaddr_dl(gateway, "", b"") if isinstance(gateway, int) else sockaddr(gateway)
        rtentry.ptr("rt_gateway", ground.bytes(data))
        rtentry.ptr("rt_ifp", self.ifnets[one.interface - 1])
        rtentry.u32("rt_rmx", 1280, at=4)
        return rtentry.address

    def _fill(self, at: int, bit: int, flags: int, union: tuple[int, int, int]) -> None:
        """struct radix_node."""
        memory = self._ground.memory
        memory.write(at + 2 * memory.width, struct.pack("<hBB", bit, 0, flags))
        self._ground.words(at + 3 * memory.width, *union)

    def _leaf(self, flags: int, key: bytes) -> int:
        at = self._ground.bytes(bytes(6 * self._ground.memory.width))
        self._fill(at, -33, flags, (self._ground.bytes(key), 0, 0))
        return at

    def _node(self, bit: int, left: int, right: int) -> int:
        at = self._ground.bytes(bytes(6 * self._ground.memory.width))
        self._fill(at, bit, RNF_ACTIVE, (bit // 8, left, right))
        return at

    def _duped(self, leaf: int, after: int) -> None:
        width = self._ground.memory.width
        self._ground.memory.put_pointer(leaf + 5 * width, after)


class Odd(NamedTuple):
    """A pcb of UDP that is not like others."""

    vflag: int
    local: bytes
    foreign: bytes
    scope: int = 0
    on_list: bool = True
    has_socket: bool = True
    dead: bool = False


_ANY6 = bytes(16)
ODD = {
    "both": Odd(3, _ANY6, _ANY6),
    "mapped": Odd(2, bytes(10) + b"\xff\xff" + packed("10.0.2.15"), _ANY6),
    "both, used by IPv4": Odd(3, bytes(12) + packed("10.0.2.15"), bytes(12) + packed("10.0.2.2")),
    "link-local": Odd(2, packed("fe80::17"), packed("fe80::1"), scope=2),
    "hidden": Odd(
        1, bytes(12) + packed("10.0.2.15"), bytes(12) + packed("10.9.8.7"), on_list=False
    ),
    "without socket": Odd(1, bytes(12) + packed("1.2.3.4"), _ANY6, has_socket=False),
    "dead": Odd(1, bytes(12) + packed("4.3.2.1"), _ANY6, dead=True),
}


def plant_odd(ground: Ground, family: int = AF_INET6) -> dict[str, Any]:
    """`ODD` on udbinfo, each with a socket; the truth is their places by name."""
    domain, protosw = ground.record("domain"), ground.record("protosw")
    domain.u32("dom_family", family)
    protosw.u16("pr_protocol", 17)
    protosw.ptr("pr_domain", domain.address)
    pcbs, sockets = {}, {}
    for port, (name, odd) in enumerate(ODD.items(), 5000):
        inpcb, so = ground.record("inpcb"), ground.record("socket")
        own = ground.types.has("inpcb", "inp_lifscope")
        for side, data in (("l", odd.local), ("f", odd.foreign)):
            if odd.scope and own:
                inpcb.u32(f"inp_{side}ifscope", odd.scope)
            elif odd.scope:
                data = data[:2] + struct.pack(">H", odd.scope) + data[4:]
            ground.memory.write(inpcb.place(f"inp_depend{side}addr"), data)
            ground.memory.write(inpcb.place(f"inp_{side}port"), struct.pack(">H", port))
        inpcb.u8("inp_vflag", odd.vflag)
        inpcb.u32("inp_state", 3 if odd.dead else 1)
        so.u16("so_type", 2)
        so.ptr("so_proto", protosw.address)
        so.ptr("so_pcb", inpcb.address)
        if odd.has_socket:
            inpcb.ptr("inp_socket", so.address)
        pcbs[name], sockets[name] = inpcb.address, so.address
    listed = [pcbs[name] for name, odd in ODD.items() if odd.on_list]
    info = ground.record("inpcbinfo", address=None)
    types = ground.types
    where = "listhead" if types.has("inpcbinfo", "listhead") else "ipi_listhead"
    head = ground.bytes(bytes(ground.memory.width))
    info.ptr(where, head)
    info.u32("ipi_count", len(listed) + 2)
    bsd_list(ground.memory, head, listed, types.offset("inpcb", "inp_list"))
    size = types.layout.size("inpcbinfo")
    at = ground.image.variable("_udbinfo", size, align=16)
    ground.memory.write(at, ground.memory.read(info.address, size))
    return {"pcbs": pcbs, "sockets": sockets}
