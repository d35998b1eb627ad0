"""Network interfaces and their addresses, as ifconfig(8) lists them.

Source: bsd/net/if_var.h (struct ifnet, ifaddr, if_data_internal), if.h (IFF_*),
bsd/netinet/in_var.h, bsd/netinet6/in6_var.h, xnu-1228..11417.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.network_places import (
    IFA_ADDR,
    IFA_DSTADDR,
    IFA_LINK,
    IFA_NETMASK,
    IFI_MTU,
    IFI_TYPE,
    ifnet_places,
)
from kvmtool.xnu.queues import Report, walk_tail_queue
from kvmtool.xnu.sockaddr import (
    AF_INET,
    AF_INET6,
    AF_LINK,
    guarded_sockaddr,
    link_address,
    netmask,
    prefix_length,
    sockaddr_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

_IFNAMSIZ = 16
IFF_BROADCAST, IFF_POINTOPOINT = 0x2, 0x10
# bsd/net/if.h: the bit, and ifconfig's word for it
FLAGS = (
    (0x1, "UP"),
    (IFF_BROADCAST, "BROADCAST"),
    (0x4, "DEBUG"),
    (0x8, "LOOPBACK"),
    (IFF_POINTOPOINT, "POINTOPOINT"),
    (0x20, "SMART"),
    (0x40, "RUNNING"),
    (0x80, "NOARP"),
    (0x100, "PROMISC"),
    (0x200, "ALLMULTI"),
    (0x400, "OACTIVE"),
    (0x800, "SIMPLEX"),
    (0x1000, "LINK0"),
    (0x2000, "LINK1"),
    (0x4000, "LINK2"),
    (0x8000, "MULTICAST"),
)
DEDUCED = "no types know struct {}: where it keeps what was found out from those in memory"
FAMILIES = {AF_INET: "inet", AF_INET6: "inet6", AF_LINK: "link"}


class Address(NamedTuple):
    """An address of an interface. Any field may be `Unreadable`.

    `family` is inet, inet6 or the family's number as text; `broadcast` is that, or the other end
    of a point-to-point interface; `prefix` the length of `netmask`, None where that has gaps.
    """

    family: Any
    address: Any
    netmask: Any
    prefix: Any
    broadcast: Any
    ifaddr: int


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface. Any field may be `Unreadable`; None says the kernel has no such thing.

    `mac` is its hardware address, None if it has none; counters are packets and bytes.
    """

    address: int
    name: Any
    index: Any
    flags: Any
    mtu: Any
    type: Any
    mac: Any
    addresses: list[Address]
    ipackets: Any
    ierrors: Any
    ibytes: Any
    opackets: Any
    oerrors: Any
    obytes: Any
    collisions: Any

    @property
    def options(self) -> Any:
        """`flags` in ifconfig's words."""
        if not isinstance(self.flags, int):
            return self.flags
        return [word for bit, word in FLAGS if self.flags & bit]


class InterfaceReader:
    """Reads the interfaces of one kernel."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's types have of ifnet and ifaddr.

        Built-in layouts know them from 10.5 to 10.13; for later ones `deduced` says that places
        were found out from the interfaces themselves. Raises `NotFoundError` where they do not
        tell, and for types that lack one of the structures.
        """
        self._target = target
        self.deduced = not target.types.has("ifnet")
        if self.deduced:
            self._find_out()
            return
        types = target.types
        self.link = types.offset("ifnet", "if_link")
        self._heads = types.offset("ifnet", "if_addrhead")
        fields: dict[str, tuple[int | None, str]] = {
            name: (types.offset("ifnet", member), code) for name, (code, member) in _IFNET.items()
        }
        data = types.offset("ifnet", "if_data")
        for name, (code, member) in _IF_DATA.items():
            inside = offset_of(types, "if_data_internal", member)
            fields[name] = (None if inside is None else data + inside, code)
        self._ifnet = Record(target, fields)
        self.ifa_link = types.offset("ifaddr", "ifa_link")
        pointers = ("ifa_addr", "ifa_netmask", "ifa_dstaddr")
        self._ifaddr = Record(
            target, {name: (types.offset("ifaddr", name), "P") for name in pointers}
        )

    def _find_out(self) -> None:
        """As if types knew; but for the counters, whose places nothing bears out."""
        head = self._target.symbols.get("_ifnet_head")
        found = None if head is None else ifnet_places(self._target, head.address)
        if found is None:
            self._target.types.struct("ifnet")  # says that there is none
            raise NotFoundError("structure", "ifnet")
        self.link, self._heads, self.ifa_link = found.link, found.heads, IFA_LINK
        fields: dict[str, tuple[int | None, str]] = {
            "if_name": (found.name, "P"),
            "unit": (found.unit, "h"),
            "index": (found.number, "H"),
            "flags": (found.flags, "H"),
            **{name: (None, code) for name, (code, _) in _IF_DATA.items()},
        }
        if found.data is not None:
            fields["type"] = (found.data + IFI_TYPE, "B")
            fields["mtu"] = (found.data + IFI_MTU, "I")
        self._ifnet = Record(self._target, fields)
        places = {"ifa_addr": IFA_ADDR, "ifa_netmask": IFA_NETMASK, "ifa_dstaddr": IFA_DSTADDR}
        self._ifaddr = Record(self._target, {name: (at, "P") for name, at in places.items()})

    def head(self) -> int:
        """Where the list of interfaces begins. Raises `NotFoundError`."""
        symbols = self._target.symbols
        found = symbols.get("_ifnet_head") or symbols.get("_ifnet")  # the latter up to 10.6
        if found is None:
            raise NotFoundError("symbol", "_ifnet_head", hint=symbols.hint)
        return found.address

    def read(self, address: int, report: Report) -> Interface:
        """The interface at `address`; where its list of addresses ends early goes to `report`."""
        raw = self._ifnet.read(address)
        name = self._name(raw.pop("if_name"), raw.pop("unit"))
        links: list[Any] = []  # what the hardware's addresses are
        lost: Unreadable | None = None  # where one may have been
        addresses = []
        start, stops = address + self._heads, len(report.stops)
        walk = f"addresses of {name if isinstance(name, str) else hex(address)}"
        for ifaddr in walk_tail_queue(self._target, start, self.ifa_link, walk, report):
            one = self._address(ifaddr, raw["flags"], name)
            if one.family != FAMILIES[AF_LINK]:
                addresses.append(one)
                lost = one.family if isinstance(one.family, Unreadable) else lost
            else:
                links.append(one.address)
        if len(report.stops) > stops:
            lost = Unreadable(report.stops[-1])
        mac = next(filter(None, links), None) if links else lost
        return Interface(address, name, mac=mac, addresses=addresses, **raw)

    def name(self, address: int) -> Any:
        """The name of the interface at `address`: lo0."""
        raw = self._ifnet.read(address)
        return self._name(raw["if_name"], raw["unit"])

    def _name(self, pointer: Any, unit: Any) -> Any:
        for value in (pointer, unit):
            if isinstance(value, Unreadable):
                return value
        try:
            return f"{self._target.text(pointer, _IFNAMSIZ)}{unit}"
        except FaultError as fault:
            return Unreadable.of(fault)

    def _address(self, ifaddr: int, flags: Any, name: Any) -> Address:
        raw = self._ifaddr.read(ifaddr)
        data = guarded_sockaddr(self._target, raw["ifa_addr"])
        if isinstance(data, Unreadable) or not data or len(data) < 2:
            odd = data if isinstance(data, Unreadable) else None
            return Address(odd, odd, odd, odd, odd, ifaddr)
        family = data[1]
        word = FAMILIES.get(family, str(family))
        if family == AF_LINK:
            link = link_address(data, self._target.arch.byteorder)
            mac = str(link) if link and link.address else None
            return Address(word, mac, None, None, None, ifaddr)

        def text(data: Any) -> Any:
            own = str(name)
            order = self._target.arch.byteorder
            return sockaddr_text(data, lambda _: own, order) if isinstance(data, bytes) else data

        mask, prefix = self._mask(raw["ifa_netmask"], family)
        other = None
        if isinstance(flags, int) and flags & (IFF_BROADCAST | IFF_POINTOPOINT):
            other = text(guarded_sockaddr(self._target, raw["ifa_dstaddr"]))
        return Address(word, text(data), mask, prefix, other, ifaddr)

    def _mask(self, pointer: Any, family: int) -> tuple[Any, Any]:
        data = guarded_sockaddr(self._target, pointer)
        if not isinstance(data, bytes) or family not in (AF_INET, AF_INET6):
            return (data, data) if isinstance(data, Unreadable) else (None, None)
        mask = netmask(data, family)
        return "0x" + mask.hex() if family == AF_INET else None, prefix_length(mask)


_IFNET = {
    "if_name": ("P", "if_name"),
    "unit": ("h", "if_unit"),
    "index": ("H", "if_index"),
    "flags": ("H", "if_flags"),
}
_IF_DATA = {
    "type": ("B", "ifi_type"),
    "mtu": ("I", "ifi_mtu"),
    "ipackets": ("Q", "ifi_ipackets"),
    "ierrors": ("Q", "ifi_ierrors"),
    "ibytes": ("Q", "ifi_ibytes"),
    "opackets": ("Q", "ifi_opackets"),
    "oerrors": ("Q", "ifi_oerrors"),
    "obytes": ("Q", "ifi_obytes"),
    "collisions": ("Q", "ifi_collisions"),
}


def interfaces(target: Target, report: Report | None = None) -> Iterator[Interface]:
    """Every interface in the kernel's order; where the walk stopped goes into `report`.

    Raises `NotFoundError` for types that do not know struct ifnet, and for a kernel without the
    symbol _ifnet_head (_ifnet up to 10.6).
    """
    report = report if report is not None else Report()
    reader = InterfaceReader(target)
    if reader.deduced:
        report.notes.append(DEDUCED.format("ifnet"))
    for address in walk_tail_queue(target, reader.head(), reader.link, "ifnet_head", report):
        yield reader.read(address, report)


class InterfaceNames:
    """Names of interfaces by index or address, read when the first is asked for."""

    def __init__(self, target: Target) -> None:
        """Reads nothing."""
        self._target = target
        self._indexed: dict[int, str] | None = None
        self._named: dict[int, Any] = {}

    @cached_property
    def _reader(self) -> InterfaceReader | None:
        try:
            return InterfaceReader(self._target)
        except NotFoundError:
            return None  # numbers stand for names

    def by_index(self, index: int) -> str:
        """The name, or the number where it is not known."""
        if self._indexed is None:
            self._indexed = {}
            if self._reader is not None:
                with suppress(NotFoundError):
                    for found in interfaces(self._target):
                        if isinstance(found.index, int) and isinstance(found.name, str):
                            self._indexed[found.index] = found.name
        return self._indexed.get(index, str(index))

    def by_address(self, ifnet: Any) -> Any:
        """The name of the struct ifnet at an address; its address where types do not know it."""
        if not isinstance(ifnet, int) or not ifnet:
            return ifnet or None
        if self._reader is None:
            return f"{ifnet:#x}"
        if ifnet not in self._named:
            self._named[ifnet] = self._reader.name(ifnet)
        return self._named[ifnet]
