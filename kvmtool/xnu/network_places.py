"""Where struct ifnet, ifaddr and rtentry keep what matters, found out from those in memory.

No built-in layout of 10.14 and later knows them. But interfaces and routes lead to each other and
say the same thing in several ways, and every release kept the order of their members: the link of
a list leads back to its head, an address to its interface, if_xname is if_name and if_unit, only
"lo" has IFF_LOOPBACK, only a host's route has no mask. A place that is not the only one to fit is
not believed. Source: bsd/net/if_var.h, if_var_private.h, route.h, radix.h, xnu-2422..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import FaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvmtool.target import Target

# struct ifaddr: lock, refcnt, debug, addr, dstaddr, netmask, ifp, link
IFA_ADDR, IFA_DSTADDR, IFA_NETMASK, _IFA_IFP, IFA_LINK = 24, 32, 40, 48, 56
IFI_TYPE, _IFI_ADDRLEN, _IFI_HDRLEN, IFI_MTU = 0, 3, 4, 8  # struct if_data_internal
RTF_UP, _RTF_HOST = 0x1, 0x4
_IFF_LOOPBACK, _IFT_LOOP = 0x8, 0x18
_LIMIT = 256  # interfaces, or routes, that are looked at
_WINDOW = 0x180  # bytes of an ifnet that its beginning surely lies in
_NODES = 96  # rt_nodes: what a route begins with
_ROUTE = 0x100
_NAME = 24


class IfnetPlaces(NamedTuple):
    """Offsets in struct ifnet; `data` is None where if_data was not found."""

    link: int
    heads: int
    name: int
    number: int
    unit: int
    flags: int
    data: int | None


class RoutePlaces(NamedTuple):
    """Offsets in struct rtentry."""

    refs: int
    flags: int
    gateway: int
    ifp: int


class _Seen(NamedTuple):
    """One interface: its first bytes, and the number at the end of its name."""

    address: int
    data: bytes
    loop: bool
    unit: int

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], "little")


def ifnet_places(target: Target, head: int) -> IfnetPlaces | None:
    """Of the interfaces in the list at `head`; None where they do not tell. No `FaultError`."""
    try:
        found = _interfaces(target, head)
    except FaultError:
        return None
    if found is None:
        return None
    link, seen = found
    if not {True, False} <= {one.loop for one in seen}:
        return None
    heads = _only(range(link + 16, link + 160, 8), lambda at: _addressed(target, seen, at))
    if heads is None:
        return None
    counted = range(heads + 16, heads + 96, 2)
    found_there = [(at, _flags(seen, at)) for at in counted if _numbered(seen, at)]
    known = [(index, flags) for index, flags in found_there if flags is not None]
    if len(known) != 1:
        return None
    ((index, flags),) = known
    start = -(-(flags + 2) // 8) * 8
    data = _only(range(start, start + 96, 8), lambda at: _described(seen, at))
    return IfnetPlaces(link, heads, link - 32, index, index + 2, flags, data)


def _flags(seen: Sequence[_Seen], index: int) -> int | None:
    """Where if_flags is, behind if_index, if_unit and if_timer."""
    return _only(range(index + 4, index + 10, 2), lambda at: _loops(seen, at))


def _only(places: Iterable[int], fits: Callable[[int], bool]) -> int | None:
    found = [at for at in places if fits(at)]
    return found[0] if len(found) == 1 else None


def _interfaces(target: Target, head: int) -> tuple[int, list[_Seen]] | None:
    """Where the link is, and the interfaces as far as they can be read."""
    if target.arch.pointer_size != 8 or not (first := target.pointer(head)):
        return None
    link = _only(range(48, 128, 8), lambda at: target.pointer(first + at + 8) == head)
    if link is None:
        return None
    seen: list[_Seen] = []
    address, before = first, head
    while address and len(seen) < _LIMIT:
        if target.pointer(address + link + 8) != before:
            break  # as far as the list is whole
        one = _interface(target, address, link)
        if one is None:
            return None
        seen.append(one)
        before = address + link
        address = target.pointer(before)
    return link, seen


def _interface(target: Target, address: int, link: int) -> _Seen | None:
    data = target.memory.read(address, _WINDOW)
    name, whole = (target.text(target.pointer(address + link - back), _NAME) for back in (32, 24))
    unit = whole.removeprefix(name)
    if not name or unit == whole or not unit.isascii() or not unit.isdigit():
        return None
    return _Seen(address, data, name == "lo", int(unit))


def _addressed(target: Target, seen: Sequence[_Seen], at: int) -> bool:
    """Whether if_addrhead is at `at`: its addresses lead back to it and to their interface."""
    some = False
    for one in seen:
        ifaddr = target.strip(one.number(at, 8))
        if not ifaddr:
            continue
        try:
            back = target.pointer(ifaddr + IFA_LINK + 8) == one.address + at
            if not back or target.pointer(ifaddr + _IFA_IFP) != one.address:
                return False
        except FaultError:
            return False
        some = True
    return some


def _numbered(seen: Sequence[_Seen], at: int) -> bool:
    """Whether if_index is at `at`, and if_unit behind it: no two have one number."""
    numbers = {one.number(at, 2) for one in seen}
    return (
        len(numbers) == len(seen)
        and 0 not in numbers
        and all(one.number(at + 2, 2) == one.unit for one in seen)
    )


def _loops(seen: Sequence[_Seen], at: int) -> bool:
    return all(bool(one.number(at, 2) & _IFF_LOOPBACK) == one.loop for one in seen)


def _described(seen: Sequence[_Seen], at: int) -> bool:
    """Whether if_data is at `at`: types, lengths and mtu can be an interface's."""
    return all(
        (one.data[at + IFI_TYPE] == _IFT_LOOP) == one.loop
        and one.data[at + IFI_TYPE]
        and one.data[at + _IFI_ADDRLEN] <= 20
        and one.data[at + _IFI_HDRLEN] <= 64
        and 68 <= one.number(at + IFI_MTU, 4) <= 1 << 17
        for one in seen
    )


def route_places(
    target: Target, leaves: Sequence[int], ifnets: frozenset[int], masks: Sequence[int]
) -> RoutePlaces | None:
    """Of the routes whose first nodes are `leaves`, with their masks; None where they do not tell.

    `ifnets` are all interfaces. Raises `FaultError`.
    """
    if target.arch.pointer_size != 8 or not leaves:
        return None
    data = [target.memory.read(leaf, _ROUTE) for leaf in leaves[:_LIMIT]]

    def number(one: bytes, at: int, size: int) -> int:
        return int.from_bytes(one[at : at + size], "little")

    ifp = _only(
        range(_NODES + 24, _ROUTE, 8),
        lambda at: all(target.strip(number(one, at, 8)) in ifnets for one in data),
    )
    if ifp is None:
        return None
    flags = _only(
        range(_NODES + 4, ifp - 8, 4),
        lambda at: all(
            number(one, at, 4) & RTF_UP and bool(number(one, at, 4) & _RTF_HOST) == (not mask)
            for one, mask in zip(data, masks, strict=False)
        ),
    )
    hosts = {not mask for mask in masks[: len(data)]}
    if flags is None or hosts != {True, False}:
        return None
    return RoutePlaces(flags - 4, flags, ifp - 8, ifp)
