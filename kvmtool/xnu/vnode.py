"""Vnodes: the kernel's files, and the paths that lead to them.

Source: bsd/sys/vnode_internal.h, bsd/sys/vnode.h, bsd/vfs/vfs_cache.c (build_path), xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import record, unsigned
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.mount import MountReader

if TYPE_CHECKING:
    from kvmtool.target import Target

VROOT = 0x1  # v_flag: the root of its file system
TYPES = (
    "NON",
    "REG",
    "DIR",
    "BLK",
    "CHR",
    "LNK",
    "SOCK",
    "FIFO",
    "BAD",
    "STR",
    "CPLX",
)  # enum vtype
_PATH_LIMIT = 1024  # components: MAXPATHLEN
_NAME_LIMIT = 1024  # bytes of one component, far above NAME_MAX
_FIELDS = {
    "flag": ("I", "v_flag"),
    "type": ("H", "v_type"),
    "un": ("P", "v_un"),
    "name": ("P", "v_name"),
    "parent": ("P", "v_parent"),
    "mount": ("P", "v_mount"),
    "usecount": ("i", "v_usecount"),
}


class Vnode(NamedTuple):
    """One vnode: kernel addresses, `type` in lsof's word (REG, DIR, CHR, …), `path` from the root.

    Any field may be `Unreadable`. `path` is None where the kernel keeps no name; one that starts
    with "…/" lacks the beginning: the name cache has dropped a parent.
    """

    address: int
    type: Any
    path: Any
    mount: Any
    flag: Any
    usecount: Any
    un: Any


class VnodeReader:
    """Reads vnodes of one kernel; names and mounts are read once each."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's layout has of vnode and mount."""
        self.target = target
        # an enum in 10.4, 16 bits from 10.5, a byte from xnu-11417 (15.5)
        kind = unsigned(target.types, "vnode", "v_type")
        fields = {**_FIELDS, "type": (kind, "v_type")}
        self._record = record(target, "vnode", fields)
        self.mounts = MountReader(target)
        self._raw: dict[int, dict[str, Any]] = {}
        self._on: dict[int, Any] = {}
        self._names: dict[int, Any] = {}
        self._paths: dict[int, Any] = {}

    def read(self, address: int) -> Vnode:
        """The vnode at `address`. Never raises `FaultError`."""
        raw = self._fields(address)
        kind = raw["type"]
        if isinstance(kind, int):
            kind = TYPES[kind] if kind < len(TYPES) else Unreadable(f"v_type is {kind}")
        return Vnode(
            address,
            kind,
            self.path(address),
            raw["mount"],
            raw["flag"],
            raw["usecount"],
            raw["un"],
        )

    def path(self, address: int) -> Any:
        """The path of the vnode at `address`, by its names up to the root of its file system.

        `Unreadable` where a name or a parent's page is; None for a vnode without a name.
        """
        if address not in self._paths:
            self._paths[address] = self._path(address)
        return self._paths[address]

    def _path(self, address: int) -> Any:
        parts: list[str] = []
        seen = {address}
        at = address
        while True:
            raw = self._fields(at)
            if (missing := _unreadable(raw)) is not None:
                return missing
            if raw["flag"] & VROOT:
                on = self.mounted_on(raw["mount"])
                return on if isinstance(on, Unreadable) else _joined(on, parts)
            if not raw["name"]:
                break
            name = self._name(raw["name"])
            if isinstance(name, Unreadable):
                return name
            parts.append(name)
            at = raw["parent"]
            if not at:
                break
            if at in seen or len(parts) >= _PATH_LIMIT:
                return Unreadable(f"the parents of vnode {address:#x} run in a circle")
            seen.add(at)
        return "…/" + "/".join(reversed(parts)) if parts else None

    def mounted_on(self, mount: int) -> Any:
        """Where the mount at `mount` is: f_mntonname; "" for none."""
        if not mount:
            return ""
        if mount not in self._on:
            self._on[mount] = self.mounts.read(mount).on
        return self._on[mount]

    def _fields(self, address: int) -> dict[str, Any]:
        if address not in self._raw:
            self._raw[address] = self._record.read(address)
        return self._raw[address]

    def _name(self, address: int) -> Any:
        if address not in self._names:
            try:
                self._names[address] = self.target.text(address, _NAME_LIMIT)
            except FaultError as fault:
                self._names[address] = Unreadable.of(fault)
        return self._names[address]


def _unreadable(raw: dict[str, Any]) -> Unreadable | None:
    for name in ("flag", "mount", "name", "parent"):
        if isinstance(raw[name], Unreadable):
            missing: Unreadable = raw[name]
            return missing
    return None


def _joined(on: str, parts: list[str]) -> str:
    """The names, innermost first, below the mount point `on`."""
    if not parts:
        return on
    return on.rstrip("/") + "/" + "/".join(reversed(parts))
