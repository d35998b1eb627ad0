"""net: connections, interfaces, routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.render import Column
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.cli.params import Where
    from kvmtool.kvm import Kvm
    from kvmtool.xnu.interface import Interface
    from kvmtool.xnu.net import Connection
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.route import Route
    from kvmtool.xnu.socket import Socket, SocketReader

LISTING = Listing(
    "net",
    "sockets",
    (
        Column("proto", "PROTO"),
        Column("type", "TYPE"),
        Column("recv_q", "RECV-Q", "number"),
        Column("send_q", "SEND-Q", "number"),
        Column("local", "LOCAL"),
        Column("foreign", "FOREIGN"),
        Column("state", "STATE"),
        Column("pid", "PID", "number"),
        Column("command", "COMMAND"),
        Column("pids", "PIDS", "list"),
        Column("last_pid", "LAST PID", "number"),
        Column("local_address", "LOCAL ADDRESS"),
        Column("local_port", "LOCAL PORT", "number"),
        Column("foreign_address", "FOREIGN ADDRESS"),
        Column("foreign_port", "FOREIGN PORT", "number"),
        Column("qlen", "QLEN", "number"),
        Column("incqlen", "INCQLEN", "number"),
        Column("qlimit", "MAXQLEN", "number"),
        Column("vnode", "VNODE", "address"),
        Column("conn", "CONN", "address"),
        Column("pcb", "PCB", "address"),
        Column("tcpcb", "TCPCB", "address"),
        Column("socket", "SOCKET", "address"),
        Column("dead", "DEAD"),
        Column("lists", "LISTS", "list"),
    ),
    ("proto", "type", "recv_q", "send_q", "local", "foreign", "state", "pid", "command"),
)
_EMPTY = dict.fromkeys(column.name for column in LISTING.columns)
_ENDS = ("local_address", "local_port", "foreign_address", "foreign_port", "tcpcb", "dead")


def _shown(addresses: list[dict[str, Any]]) -> str:
    """An interface's addresses as ifconfig writes them."""
    return ", ".join(map(_address, addresses))


def _address(one: dict[str, Any]) -> str:
    seen = {key: "?" if isinstance(value, Unreadable) else value for key, value in one.items()}
    text = f"{seen['family']} {seen['address']}"
    if seen["netmask"] is not None:
        text += f" netmask {seen['netmask']}"
    elif seen["prefix"] is not None:
        text += f" prefixlen {seen['prefix']}"
    return text + (f" broadcast {seen['broadcast']}" if seen["broadcast"] else "")


INTERFACES = Listing(
    "net --interfaces",
    "interfaces",
    (
        Column("name", "NAME"),
        Column("index", "INDEX", "number"),
        Column("options", "FLAGS", "list", ",".join),
        Column("flags", "FLAG BITS", "address"),
        Column("mtu", "MTU", "number"),
        Column("type", "TYPE", "number"),
        Column("mac", "MAC"),
        Column("addresses", "ADDRESSES", "list", _shown),
        Column("ipackets", "IPKTS", "number"),
        Column("ierrors", "IERRS", "number"),
        Column("ibytes", "IBYTES", "number"),
        Column("opackets", "OPKTS", "number"),
        Column("oerrors", "OERRS", "number"),
        Column("obytes", "OBYTES", "number"),
        Column("collisions", "COLL", "number"),
        Column("address", "IFNET", "address"),
    ),
    ("name", "options", "mtu", "mac", "addresses", "ipackets", "opackets"),
)
ROUTES = Listing(
    "net --routes",
    "routes",
    (
        Column("family", "FAMILY"),
        Column("destination", "DESTINATION"),
        Column("prefix", "PREFIX", "number"),
        Column("gateway", "GATEWAY"),
        Column("flags", "FLAGS"),
        Column("flag_bits", "FLAG BITS", "address"),
        Column("refs", "REFS", "number"),
        Column("mtu", "MTU", "number"),
        Column("interface", "NETIF"),
        Column("address", "RTENTRY", "address"),
    ),
    ("family", "destination", "prefix", "gateway", "flags", "refs", "mtu", "interface"),
)


def row_of(sockets: SocketReader, found: Connection, names: dict[Any, Any]) -> dict[str, Any]:
    """A connection under the names that -o and JSON have; `names` has processes' by pid."""
    socket, pcb = found.socket, found.inet or found.unix
    row = {
        **_EMPTY,
        "proto": found.proto,
        "state": found.state,
        "pid": found.pid,
        "command": names.get(found.pid),
        "pids": list(found.pids),
        "pcb": pcb.address if pcb is not None else socket and (socket.pcb or None),
        "lists": list(found.lists),
    }
    if socket is not None:
        wanted = ("recv_q", "send_q", "last_pid", "qlen", "incqlen", "qlimit")
        row |= {name: getattr(socket, name) for name in wanted}
        row["type"], row["socket"] = socket.type_name, socket.address
        row["local"], row["foreign"] = sockets.ends(socket)
    if found.inet is not None:
        row |= _ends("local", found.inet.local) | _ends("foreign", found.inet.foreign)
        row["dead"], row["tcpcb"] = found.inet.dead, found.inet.ppcb or None
    elif found.unix is not None:
        row["local"] = found.unix.path
        row["vnode"], row["conn"] = found.unix.vnode or None, found.unix.conn or None
    elif socket is not None:
        row |= _unreached(socket)
    if found.protocol != "tcp":
        row["tcpcb"] = found.protocol if isinstance(found.protocol, Unreadable) else None
    return row


def _unreached(socket: Socket) -> dict[str, Unreadable]:
    """What a socket's pcb would have told, of one whose pcb, or even family, cannot be read."""
    family, pcb = socket.family, socket.pcb
    if isinstance(family, Unreadable):
        return dict.fromkeys((*_ENDS, "vnode", "conn"), family)
    if not isinstance(pcb, Unreadable):
        return {}
    if socket.of_internet:
        return dict.fromkeys(_ENDS, pcb)
    return dict.fromkeys(("vnode", "conn"), pcb) if socket.kind == "unix" else {}


def _ends(name: str, end: Any) -> dict[str, Any]:
    """One end of a connection in three columns: netstat's form, the address, the port."""
    if isinstance(end, Unreadable):
        return {name: end, f"{name}_address": end, f"{name}_port": end}
    return {name: end.dotted, f"{name}_address": end.address, f"{name}_port": end.port}


def interface_row(interface: Interface) -> dict[str, Any]:
    """An interface under the names that -o and JSON have."""
    row = {column.name: getattr(interface, column.name) for column in INTERFACES.columns}
    fields = ("family", "address", "netmask", "prefix", "broadcast")
    row["addresses"] = [
        {name: getattr(one, name) for name in fields} for one in interface.addresses
    ]
    return row


def route_row(route: Route) -> dict[str, Any]:
    """A route under the names that -o and JSON have."""
    row = {c.name: getattr(route, c.name) for c in ROUTES.columns if c.name != "flag_bits"}
    return {**row, "flags": route.letters, "flag_bits": route.flags}


def _connections(kvm: Kvm, kinds: set[str], listening: bool, report: Report) -> Iterator[Any]:
    from kvmtool.xnu.file import FileReader
    from kvmtool.xnu.net import connections

    procs = list(kvm.procs(report))
    names = {
        proc.pid: proc.name if isinstance(proc.name, str) and proc.name else proc.comm
        for proc in procs
    }
    reader = FileReader(kvm.verified_target())
    for found in connections(reader, procs, report):
        if (not kinds or kind_of(found) in kinds) and (not listening or found.listening):
            yield row_of(reader.sockets, found, names)


def kind_of(found: Connection) -> str:
    """Which option asks for it: tcp, udp, raw, unix, system."""
    if found.inet is not None or (found.socket is not None and found.socket.of_internet):
        return found.protocol if found.protocol in ("tcp", "udp") else "raw"
    return "unix" if found.proto == "unix" else "system"


@click.command(cls=Sectioned)
@click.option("--tcp", is_flag=True, help="Only sockets of TCP.")
@click.option("--udp", is_flag=True, help="Only sockets of UDP.")
@click.option("--raw", is_flag=True, help="Only other sockets of the Internet.")
@click.option("--unix", is_flag=True, help="Only local sockets.")
@click.option("--system", is_flag=True, help="Only the rest: kernel controls and events, routing.")
@click.option("--listening", is_flag=True, help="Only sockets that accept connections.")
@click.option("--interfaces", is_flag=True, help="The interfaces and their addresses instead.")
@click.option("--routes", is_flag=True, help="The routing tables instead.")
@listing_options
def net(
    listening: bool,
    interfaces: bool,
    routes: bool,
    where: Where,
    columns: tuple[str, ...],
    format: str,
    **only: bool,
) -> None:
    """List all connections and local sockets with the process that owns each, as netstat does.

    Sockets are found by the kernel's lists and by the descriptors of processes; where symbols do
    not say where local ones are chained (10.11 on), those are listed that descriptors lead to.
    Options that say "only" add up.

    --interfaces lists what ifconfig -a does, --routes what netstat -rn does. Where no types know
    them (10.14 on, without --types), where they keep what is found out from those in memory, which
    stderr says; counters, and the MTU of routes, are empty then.

    \b
    Example:
      kvmtool net -N mach_kernel -M core --tcp --listening
      kvmtool net -N mach_kernel -M core --interfaces
    """
    from kvmtool.xnu.queues import Report

    kinds = {name for name, wanted in only.items() if wanted}
    if interfaces and routes:
        raise click.UsageError("--interfaces and --routes are two different lists: choose one")
    if (interfaces or routes) and (kinds or listening):
        raise click.UsageError("--interfaces and --routes list no sockets to choose from")
    kvm, report = opened(where), Report()
    if interfaces:
        from kvmtool.xnu.interface import interfaces as walk

        found = map(interface_row, walk(kvm.verified_target(), report))
        INTERFACES.show(found, columns, format, report)
    elif routes:
        from kvmtool.xnu.route import routes as walk_routes

        found = map(route_row, walk_routes(kvm.verified_target(), report))
        ROUTES.show(found, columns, format, report)
    else:
        LISTING.show(_connections(kvm, kinds, listening, report), columns, format, report)
