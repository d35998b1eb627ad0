"""What is behind a descriptor that is neither a file nor a socket, and the size of a file.

Source: bsd/sys/pipe.h, eventvar.h (kqueue), bsd/kern/posix_shm.c, posix_sem.c, bsd/sys/ubc.h,
specdev.h, xnu-792..11417. Types that do not know a structure leave its answer None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.target import offset_of, record
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.proc import text_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtool.target import Record, Target
    from kvmtool.xnu.vnode import Vnode

_NAME = 32  # PSHMNAMLEN, PSEMNAMLEN + 1
_PIPE = {"peer": ("P", "pipe_peer"), "count": ("I", "pipe_buffer.cnt")}
_KQUEUE = {"count": ("I", "kq_count")}
_INFO = {
    "PSXSHM": ("pshmnode", "pshminfo", ("pshm_name", "pshm_hdr.pshm_name"), "pshm_length"),
    "PSXSEM": ("psemnode", "pseminfo", ("psem_name", "psem_hdr.psem_name"), ""),
}


class DataReader:
    """Reads pipes, kqueues, shared memory and semaphores; sizes of files, numbers of devices."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel's types have."""
        self._target = target
        self._pipe = self._maybe("pipe", _PIPE)
        self._kqueue = self._maybe("kqueue", _KQUEUE)
        self._ubc = self._maybe("ubc_info", {"size": ("q", "ui_size")})
        self._spec = self._maybe("specinfo", {"rdev": ("i", "si_rdev")})
        self._posix = {kind: self._posix_records(kind) for kind in _INFO}
        self._known: dict[tuple[str, int], tuple[Any, Any]] = {}

    def _maybe(self, struct: str, wanted: Mapping[str, tuple[str, str]]) -> Record | None:
        return record(self._target, struct, wanted) if self._target.types.has(struct) else None

    def _posix_records(self, kind: str) -> tuple[Record, Record] | None:
        node, info, names, length = _INFO[kind]
        types = self._target.types
        if not types.has(node, "pinfo") or offset_of(types, info, *names) is None:
            return None
        wanted: dict[str, tuple[str, *tuple[str, ...]]] = {"name": (f"{_NAME}s", *names)}
        if length:
            wanted["size"] = ("q", length)
        first = record(self._target, node, {"info": ("P", "pinfo")})
        return first, record(self._target, info, wanted)

    def read(self, kind: str, address: Any) -> tuple[Any, Any]:
        """(what lsof's NAME shows, size in bytes) of what lies at fg_data; None for unknown."""
        if not isinstance(address, int) or not address:
            return (address or None), None
        key = (kind, address)
        if key not in self._known:
            self._known[key] = self._read(kind, address)
        return self._known[key]

    def _read(self, kind: str, address: int) -> tuple[Any, Any]:
        if kind == "PIPE" and self._pipe is not None:
            raw = self._pipe.read(address)
            peer = raw["peer"]
            known = f"->{peer:#x}" if isinstance(peer, int) and peer else peer or None
            return known, raw["count"]
        if kind == "KQUEUE" and self._kqueue is not None:
            count = self._kqueue.read(address)["count"]
            return (f"count={count}" if isinstance(count, int) else count), None
        if (records := self._posix.get(kind)) is not None:
            node, info = records
            at = node.read(address)["info"]
            if not at or isinstance(at, Unreadable):
                return at or None, None
            raw = info.read(at)
            return text_of(raw["name"]), raw.get("size")
        return None, None

    def size(self, vnode: Vnode) -> Any:
        """The size of a regular file as the buffer cache knows it, in bytes."""
        if isinstance(vnode.type, Unreadable):
            return vnode.type
        if vnode.type != "REG" or self._ubc is None:
            return None
        return self._behind(self._ubc, "size", vnode.un)

    def device(self, vnode: Vnode) -> Any:
        """dev_t of a character or block device."""
        if isinstance(vnode.type, Unreadable):
            return vnode.type
        if vnode.type not in ("CHR", "BLK") or self._spec is None:
            return None
        return self._behind(self._spec, "rdev", vnode.un)

    def _behind(self, found: Record, field: str, pointer: Any) -> Any:
        """A field of what v_un points at; None for a null one."""
        if isinstance(pointer, Unreadable):
            return pointer
        return found.read(pointer)[field] if pointer else None
