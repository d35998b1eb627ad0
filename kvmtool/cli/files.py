"""files: what processes hold open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvmtool.cli.command import Sectioned
from kvmtool.cli.listing import Listing, listing_options, opened
from kvmtool.cli.params import pids_option
from kvmtool.cli.render import Column
from kvmtool.unreadable import Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtool.cli.params import Where
    from kvmtool.xnu.file import FileReader, OpenFile
    from kvmtool.xnu.socket import Socket

LISTING = Listing(
    "files",
    "files",
    (
        Column("command", "COMMAND"),
        Column("pid", "PID", "number"),
        Column("uid", "UID", "number"),
        Column("login", "LOGIN"),
        Column("fd", "FD"),
        Column("slot", "SLOT"),
        Column("mode", "R/W"),
        Column("type", "TYPE"),
        Column("flags", "FLAGS", "address"),
        Column("cloexec", "CLOEXEC"),
        Column("offset", "OFFSET", "number"),
        Column("size", "SIZE", "number"),
        Column("device", "DEVICE", "list", lambda pair: f"{pair[0]},{pair[1]}"),
        Column("mount", "MOUNT"),
        Column("protocol", "PROTOCOL"),
        Column("local", "LOCAL"),
        Column("remote", "REMOTE"),
        Column("state", "STATE"),
        Column("path", "PATH"),
        Column("name", "NAME"),
        Column("refs", "REFS", "number"),
        Column("vnode", "VNODE", "address"),
        Column("socket", "SOCKET", "address"),
        Column("data", "DATA", "address"),
        Column("fileproc", "FILEPROC", "address"),
        Column("fileglob", "FILEGLOB", "address"),
    ),
    ("command", "pid", "uid", "fd", "mode", "type", "offset", "mount", "name"),
)
_BEHIND = (
    *("path", "name", "mount", "device", "size", "vnode"),
    *("socket", "protocol", "local", "remote", "state"),
)
_EMPTY = dict.fromkeys(column.name for column in LISTING.columns)


def row_of(reader: FileReader, file: OpenFile) -> dict[str, Any]:
    """An open file under the names that -o and JSON have."""
    proc = file.proc
    row: dict[str, Any] = {
        **_EMPTY,
        "command": proc.name if isinstance(proc.name, str) and proc.name else proc.comm,
        "pid": proc.pid,
        "uid": proc.uid,
        "login": proc.login,
        "fd": file.fd,
        "slot": file.slot,
        "mode": file.mode,
        "type": file.type,
        "flags": file.flag,
        "cloexec": file.cloexec,
        "offset": file.offset,
        "size": file.size,
        "name": file.detail,
        "refs": file.count,
        "data": file.data,
        "fileproc": file.fileproc,
        "fileglob": file.fileglob,
    }
    if isinstance(file.device, int):
        row["device"] = [file.device >> 24 & 0xFF, file.device & 0xFFFFFF]
    elif isinstance(file.device, Unreadable):
        row["device"] = file.device
    if file.vnode is not None:
        mount = file.vnode.mount
        missing = isinstance(mount, Unreadable)
        row["mount"] = mount if missing else reader.vnodes.mounted_on(mount) or None
        row["path"] = row["name"] = file.vnode.path
        row["vnode"] = file.vnode.address
    elif file.socket is not None:
        row.update(ends(reader, file.socket))
        row["socket"] = file.socket.address
    elif isinstance(file.type, Unreadable):  # what it is, and so all of it, is not known
        row.update(dict.fromkeys(_BEHIND, file.type))
    return row


def ends(reader: FileReader, socket: Socket) -> dict[str, Any]:
    """What a socket connects, under the names of a row; `name` has all of it, as lsof's."""
    local, remote = reader.sockets.ends(socket)
    row = {
        "protocol": socket.protocol_name,
        "local": local,
        "remote": remote,
        "state": socket.state,
    }
    missing = next((value for value in row.values() if isinstance(value, Unreadable)), None)
    return {**row, "name": missing or _name(socket, row)}


def _name(socket: Socket, row: dict[str, Any]) -> str | None:
    if socket.kind == "systm":
        return f"[{' '.join(filter(None, (row['protocol'], row['local'])))}]"
    inet = socket.inet is not None
    text = str(row["protocol"]).upper() + " " if inet else ""
    text += (row["local"] or "") + (f"->{row['remote']}" if row["remote"] else "")
    if row["state"] and (inet or row["state"] == "LISTEN"):
        text += f" ({row['state']})"
    return text.strip() or None


def _rows(reader: FileReader, found: Iterable[OpenFile]) -> Iterator[dict[str, Any]]:
    return (row_of(reader, file) for file in found)


@click.command(cls=Sectioned)
@pids_option
@listing_options
def files(pid: tuple[int, ...], where: Where, columns: tuple[str, ...], format: str) -> None:
    """List what processes hold open, as fstat and lsof do.

    After the working directory (cwd), the root of a process that was given one (rtd) and its
    program (txt) stand the descriptors: files by their paths, sockets by both ends and their state.

    \b
    Example:
      kvmtool files -N mach_kernel -M core --pid 1
      kvmtool files -N mach_kernel -M core -o pid,fd,type,offset,name
    """
    from kvmtool.xnu.file import FileReader, open_files
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.space import no_process

    kvm = opened(where)
    report = Report()
    chosen = [proc for proc in kvm.procs(report) if not pid or proc.pid in pid]
    for missing in sorted(set(pid) - {proc.pid for proc in chosen}):
        raise no_process(missing, report)
    reader = FileReader(kvm.verified_target())
    found = open_files(reader, chosen, report)
    LISTING.show(_rows(reader, found), columns, format, report)
