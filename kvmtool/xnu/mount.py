"""Mounted file systems, as mount(8) lists them.

Source: bsd/sys/mount_internal.h (struct mount, mnt_vfsstat), bsd/sys/mount.h (vfsstatfs, MNT_*),
bsd/vfs/vfs_subr.c (mountlist), xnu-792..11417.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvmtool.errors import NotFoundError
from kvmtool.target import Record, offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import text_of
from kvmtool.xnu.queues import Report, walk_tail_queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.target import Target

MFSTYPENAMELEN, MAXPATHLEN = 16, 1024
# bsd/sys/mount.h: the bit, and mount(8)'s word for it
FLAGS = (
    (0x1, "read-only"),
    (0x2, "synchronous"),
    (0x4, "noexec"),
    (0x8, "nosuid"),
    (0x10, "nodev"),
    (0x20, "union"),
    (0x40, "asynchronous"),
    (0x80, "protect"),
    (0x100, "NFS exported"),
    (0x200, "removable"),
    (0x400, "quarantine"),
    (0x1000, "local"),
    (0x2000, "with quotas"),
    (0x4000, "rootfs"),
    (0x100000, "nobrowse"),
    (0x200000, "noowners"),
    (0x400000, "automounted"),
    (0x800000, "journaled"),
    (0x1000000, "nouserxattr"),
    (0x2000000, "defwrite"),
    (0x4000000, "multilabel"),
    (0x10000000, "noatime"),
    (0x40000000, "snapshot"),
)


@dataclass(frozen=True, slots=True)
class Mount:
    """One mounted file system. Any field may be `Unreadable`.

    `address` and `vnodecovered` (the vnode it hides; 0 for the root) are kernel addresses; sizes
    are in blocks of `bsize` bytes; `flags` is mnt_flag.
    """

    address: int
    on: Any
    from_: Any
    type: Any
    flags: Any
    bsize: Any
    iosize: Any
    blocks: Any
    bfree: Any
    bavail: Any
    bused: Any
    files: Any
    ffree: Any
    fsid: Any
    owner: Any
    vnodecovered: Any

    @property
    def options(self) -> Any:
        """`flags` in mount(8)'s words."""
        if isinstance(self.flags, Unreadable):
            return self.flags
        return [word for bit, word in FLAGS if self.flags & bit]


class MountReader:
    """Reads the mounts of one kernel."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel has of mount and vfsstatfs."""
        types = target.types
        self._byteorder = target.arch.byteorder
        inside = types.offset("mount", "mnt_vfsstat")
        self.link = offset_of(types, "mount", "mnt_list.tqe_next", "mnt_list") or 0
        wide = target.arch.pointer_size == 8
        fields: dict[str, tuple[int | None, str]] = {
            "vnodecovered": (types.offset("mount", "mnt_vnodecovered"), "P"),
            "flags": (types.offset("mount", "mnt_flag"), "I"),
        }
        for name, code in _STATFS.items():
            member = f"f_{name}"
            narrow = "I" if name == "iosize" and not wide else code
            fields[name] = (inside + types.offset("vfsstatfs", member), narrow)
        self._record = Record(target, fields)

    def read(self, address: int) -> Mount:
        """The mount at `address`. Never raises `FaultError`."""
        raw = self._record.read(address)
        texts = {"on": "mntonname", "from_": "mntfromname", "type": "fstypename"}
        values = {ours: text_of(raw.pop(name)) for ours, name in texts.items()}
        fsid = raw.pop("fsid")
        order: Literal["little", "big"] = "little" if self._byteorder == "<" else "big"
        values["fsid"] = (
            fsid
            if isinstance(fsid, Unreadable)
            else [int.from_bytes(fsid[at : at + 4], order, signed=True) for at in (0, 4)]
        )
        return Mount(address=address, **values, **raw)


# f_… of struct vfsstatfs; f_iosize is a size_t
_STATFS = {
    "bsize": "I",
    "iosize": "Q",
    "blocks": "Q",
    "bfree": "Q",
    "bavail": "Q",
    "bused": "Q",
    "files": "Q",
    "ffree": "Q",
    "fsid": "8s",
    "owner": "I",
    "fstypename": f"{MFSTYPENAMELEN}s",
    "mntonname": f"{MAXPATHLEN}s",
    "mntfromname": f"{MAXPATHLEN}s",
}


def mounts(target: Target, report: Report | None = None) -> Iterator[Mount]:
    """Every mount in the order of mountlist; where the walk stopped goes into `report`.

    Raises `NotFoundError` for a kernel without the symbol _mountlist.
    """
    report = report if report is not None else Report()
    head = target.symbols.get("_mountlist")
    if head is None:
        raise NotFoundError("symbol", "_mountlist", hint=target.symbols.hint)
    reader = MountReader(target)
    for address in walk_tail_queue(target, head.address, reader.link, "mountlist", report):
        yield reader.read(address)
