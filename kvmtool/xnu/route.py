"""Routing tables, as netstat -r lists them: the radix trees of rt_tables.

Source: bsd/net/radix.h (struct radix_node, which never changed), radix.c (rn_walktree),
bsd/net/route.h (struct rtentry, RTF_*), xnu-1228..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtool.errors import FaultError, NotFoundError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.interface import DEDUCED, InterfaceNames, interfaces
from kvmtool.xnu.network_places import route_places
from kvmtool.xnu.queues import LIMIT, Report
from kvmtool.xnu.sockaddr import (
    AF_INET,
    AF_INET6,
    guarded_sockaddr,
    netmask,
    prefix_length,
    sockaddr_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

_RNF_ROOT = 0x2  # a leaf that only ends the tree
RTF_HOST = 0x4
# rt_flags, and netstat's letter (network_cmds, netstat.tproj/route.c)
FLAGS = (
    *((0x1, "U"), (0x2, "G"), (RTF_HOST, "H"), (0x8, "R"), (0x10, "D"), (0x20, "M")),
    *((0x800000, "m"), (0x40, "d"), (0x100, "C"), (0x200, "X"), (0x400, "L"), (0x800, "S")),
    *((0x8000, "1"), (0x4000, "2"), (0x20000, "W"), (0x10000, "c"), (0x40000, "3")),
    *((0x1000, "B"), (0x400000, "b"), (0x1000000, "I"), (0x4000000, "i"), (0x8000000, "Y")),
    *((0x10000000, "r"), (0x40000000, "g")),
)


@dataclass(frozen=True, slots=True)
class Route:
    """One route. Any field may be `Unreadable`.

    `destination` is an address; of a network `prefix` is the length of its mask, None for a host
    or where the mask has gaps. `gateway` is an address, "link#N", or a hardware address.
    """

    address: int
    family: str
    destination: Any
    prefix: Any
    gateway: Any
    flags: Any
    refs: Any
    interface: Any
    mtu: Any

    @property
    def letters(self) -> Any:
        """`flags` in netstat's letters."""
        if not isinstance(self.flags, int):
            return self.flags
        return "".join(letter for bit, letter in FLAGS if self.flags & bit)


class RouteReader:
    """Reads the routes of one kernel."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's types have of rtentry.

        Built-in layouts know it from 10.5 to 10.13; for later ones `deduced` says that places were
        found out from the routes themselves. Raises `NotFoundError` where they do not tell, and
        for types that lack a member.
        """
        self._target = target
        types, word = target.types, target.arch.pointer_size
        self._node = Record(target, {"bit": (2 * word, "h"), "flags": (2 * word + 3, "B")})
        names = ("key", "mask", "duped")  # rn_u.rn_leaf; of a node rn_Off, rn_L, rn_R
        self._union = Record(target, {name: ((3 + n) * word, "P") for n, name in enumerate(names)})
        self._names = InterfaceNames(target)
        self.deduced = not types.has("rtentry")
        if self.deduced:
            self._rtentry = self._found_out()
            return
        fields: dict[str, tuple[int | None, str]] = {
            name: (types.offset("rtentry", member), code)
            for name, (code, member) in _RTENTRY.items()
        }
        metrics = offset_of(types, "rtentry", "rt_rmx")
        fields["mtu"] = (None if metrics is None else metrics + 4, "I")  # after rmx_locks
        self._rtentry = Record(target, fields)

    def _found_out(self) -> Record:
        """As if types knew; but for the MTU, whose place nothing bears out."""
        found = None
        try:
            report = Report()
            leaves = [leaf for _, leaf in every_leaf(self._target, self, report)]
            masks = [self._union.read(leaf)["mask"] for leaf in leaves]
            ifnets = frozenset(one.address for one in interfaces(self._target, report))
            if not report.stops and all(isinstance(mask, int) for mask in masks):
                found = route_places(self._target, leaves, ifnets, masks)
        except (FaultError, NotFoundError):
            pass  # of what is missing nothing can be told
        if found is None:
            self._target.types.struct("rtentry")  # says that there is none
            raise NotFoundError("structure", "rtentry")
        fields: dict[str, tuple[int | None, str]] = {
            name: (getattr(found, name), code) for name, (code, _) in _RTENTRY.items()
        }
        return Record(self._target, {**fields, "mtu": (None, "I")})

    def leaves(self, top: int, name: str, report: Report) -> Iterator[int]:
        """The leaves below the node at `top`, in order, with those that share a key."""
        waiting, seen = [top], set[int]()
        while waiting:
            node = waiting.pop()
            if not node:
                continue
            if node in seen or len(seen) >= LIMIT:
                report.stop(name, len(seen), f"the tree comes back to {node:#x}")
                return
            seen.add(node)
            raw = {**self._node.read(node), **self._union.read(node)}
            lost = next((v for v in raw.values() if isinstance(v, Unreadable)), None)
            if lost is not None:
                report.stops.append(f"{name}: the node at {node:#x} is {lost.reason}")
            elif raw["bit"] >= 0:
                waiting += [raw["duped"], raw["mask"]]  # rn_R, then rn_L on top
            else:
                waiting.append(raw["duped"])
                if not raw["flags"] & _RNF_ROOT:
                    yield node

    def read(self, leaf: int, family: int) -> Route:
        """The route whose first node is the leaf at `leaf`. Never raises `FaultError`."""
        raw = self._rtentry.read(leaf)
        node = self._union.read(leaf)
        host = isinstance(raw["flags"], int) and raw["flags"] & RTF_HOST
        return Route(
            address=leaf,
            family="inet" if family == AF_INET else "inet6",
            destination=self._text(node["key"]),
            prefix=None if host else self._prefix(node["mask"], family),
            gateway=self._text(raw["gateway"]),
            flags=raw["flags"],
            refs=raw["refs"],
            interface=self._names.by_address(raw["ifp"]),
            mtu=raw["mtu"],
        )

    def _text(self, pointer: Any) -> Any:
        data = guarded_sockaddr(self._target, pointer)
        if not isinstance(data, bytes):
            return data
        return sockaddr_text(data, self._names.by_index, self._target.arch.byteorder)

    def _prefix(self, pointer: Any, family: int) -> Any:
        data = guarded_sockaddr(self._target, pointer)
        if data is None:
            return 32 if family == AF_INET else 128
        return prefix_length(netmask(data, family)) if isinstance(data, bytes) else data


_RTENTRY = {
    "refs": ("i", "rt_refcnt"),
    "flags": ("I", "rt_flags"),
    "gateway": ("P", "rt_gateway"),
    "ifp": ("P", "rt_ifp"),
}


def routes(target: Target, report: Report | None = None) -> Iterator[Route]:
    """Every route, those of IPv4 first; where a walk stopped goes into `report`.

    Raises `NotFoundError` for types that do not know struct rtentry, and for a kernel without the
    symbol _rt_tables.
    """
    report = report if report is not None else Report()
    reader = RouteReader(target)
    if reader.deduced:
        report.notes.append(DEDUCED.format("rtentry"))
    for family, leaf in every_leaf(target, reader, report):
        yield reader.read(leaf, family)


def every_leaf(target: Target, reader: RouteReader, report: Report) -> Iterator[tuple[int, int]]:
    """(family, first node) of every route. Raises `NotFoundError` without _rt_tables."""
    tables = target.symbols.get("_rt_tables")
    if tables is None:
        raise NotFoundError("symbol", "_rt_tables", hint=target.symbols.hint)
    for family in (AF_INET, AF_INET6):
        name = f"rt_tables[{family}]"
        try:
            head = target.pointer(tables.address + family * target.arch.pointer_size)
            top = target.pointer(head) if head else 0  # rnh_treetop
        except FaultError as fault:
            report.stop(name, 0, f"{fault.address:#x} is {fault.reason}")
            continue
        for leaf in reader.leaves(top, name, report):
            yield family, leaf
