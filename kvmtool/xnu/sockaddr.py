"""Socket addresses: the bytes of a sockaddr, and how addresses and ports are written.

Source: bsd/sys/socket.h (AF_*), bsd/netinet/in.h, bsd/netinet6/in6.h, bsd/net/if_dl.h,
bsd/sys/un.h, xnu-792..11417: none of these structures ever changed. Scoped IPv6 addresses carry
their interface's index in bytes 2 and 3 inside the kernel (bsd/netinet6/scope6.c).
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.target import Target

AF_UNIX, AF_INET, AF_ROUTE, AF_LINK, AF_NDRV, AF_KEY, AF_INET6, AF_SYSTEM = (
    *(1, 2, 17, 18, 27, 29, 30, 32),
)
_LONGEST = 255  # sa_len is one byte
_ANY = ("0.0.0.0", "::")  # noqa: S104  INADDR_ANY, in6addr_any
_SUN_PATH, _SDL_DATA = 2, 8  # offsets in sockaddr_un and sockaddr_dl


class Endpoint(NamedTuple):
    """One end of a connection: a numeric address and a port; port 0 is none."""

    address: str
    port: int

    @property
    def host(self) -> str:
        """The address, "*" for any."""
        return "*" if self.address in _ANY else self.address

    @property
    def dotted(self) -> str:
        """As netstat -n writes it: 127.0.0.1.631, *.68, ::1.631, *.*."""
        return f"{self.host}.{self.port or '*'}"

    @property
    def colon(self) -> str:
        """As lsof -n writes it: 127.0.0.1:631, *:68, [::1]:631, *:*."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port or '*'}"


class LinkAddress(NamedTuple):
    """A sockaddr_dl: the interface's number and name, its IFT_ type, and its hardware address."""

    number: int
    type: int
    name: str
    address: bytes

    def __str__(self) -> str:
        return self.address.hex(":")


def ipv4(data: bytes) -> str:
    """Four bytes in network order as dotted numbers."""
    return ".".join(map(str, data[:4]))


def ipv6(data: bytes, scope: int = 0, name_of: Callable[[int], str] = str) -> str:
    """Sixteen bytes in network order; link-local ones with "%" and the interface they are of.

    `scope` is the interface's index where it is kept beside the address (macOS 12 on); else it is
    the one inside. `name_of` gives the interface's name for its index.
    """
    link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
    scoped = link_local or (data[0] == 0xFF and data[1] & 0x0F in (1, 2))
    if scoped:
        scope = scope or int.from_bytes(data[2:4], "big")
        data = data[:2] + bytes(2) + data[4:]
    text = socket.inet_ntop(socket.AF_INET6, data)
    return f"{text}%{name_of(scope)}" if scoped and scope else text


def read_sockaddr(target: Target, address: int) -> bytes:
    """The sockaddr at `address`, as long as its first byte says. Raises `FaultError`."""
    length = target.unsigned(address, "B")
    return target.memory.read(address, length) if length else b""


def unix_path(data: bytes) -> str:
    """The path in a sockaddr_un."""
    return data[_SUN_PATH:].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def link_address(data: bytes, byteorder: str = "<") -> LinkAddress | None:
    """What a sockaddr_dl says; None if its lengths do not fit it."""
    if len(data) < _SDL_DATA:
        return None
    names, length = data[5], data[6]
    if _SDL_DATA + names + length > len(data):
        return None
    name = data[_SDL_DATA : _SDL_DATA + names].decode("ascii", "surrogateescape")
    (number,) = Struct(byteorder + "H").unpack_from(data, 2)
    return LinkAddress(number, data[4], name, data[_SDL_DATA + names : _SDL_DATA + names + length])


def sockaddr_text(
    data: bytes, name_of: Callable[[int], str] = str, byteorder: str = "<"
) -> str | None:
    """An address of a family we know, without its port; None for others and for too few bytes.

    A netmask may be cut short and say no family: see `netmask`.
    """
    family = data[1] if len(data) > 1 else None
    if family == AF_INET and len(data) >= 8:
        return ipv4(data[4:8])
    if family == AF_INET6 and len(data) >= 24:
        scope = Struct(byteorder + "I").unpack_from(data, 24)[0] if len(data) >= 28 else 0
        return ipv6(data[8:24], scope, name_of)
    if family == AF_LINK:
        link = link_address(data, byteorder)
        if link is None:
            return None
        return str(link) if link.address else f"link#{link.number}"
    return None


def netmask(data: bytes, family: int) -> bytes:
    """The mask in a sockaddr whose trailing zeros may have been left out: 4 or 16 bytes."""
    start, size = (4, 4) if family == AF_INET else (8, 16)
    return data[start : start + size].ljust(size, b"\0")


def prefix_length(mask: bytes) -> int | None:
    """How many leading bits of a mask are set; None if others are, too."""
    bits = f"{int.from_bytes(mask, 'big'):0{8 * len(mask)}b}"
    length = len(bits.rstrip("0"))
    return length if "0" not in bits[:length] else None


def guarded_sockaddr(target: Target, address: Any) -> Any:
    """The bytes of the sockaddr at a pointer; None for a null one, `Unreadable` with its reason."""
    if not address or isinstance(address, Unreadable):
        return address or None
    try:
        return read_sockaddr(target, address)
    except FaultError as fault:
        return Unreadable.of(fault)
