"""Memory objects: what a range of addresses shows, and the file behind it.

Source: osfmk/vm/vm_object.h (struct vm_object), osfmk/vm/bsd_vm.c (vnode_pager),
osfmk/vm/*_pager.c (the …_pager_ops), bsd/sys/ubc_internal.h (ubc_info), osfmk/vm/vm_page.h
(VM_PAGE_PACKED_PTR), osfmk/mach/vm_param.h, xnu-792..11417.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import offset_of, unsigned
from kvmtool.unreadable import Unreadable
from kvmtool.xnu import named
from kvmtool.xnu.members import Members
from kvmtool.xnu.vnode import TYPES

if TYPE_CHECKING:
    from kvmtool.target import Target

DEPTH = 1 << 10  # of shadows; XNU collapses chains long before
_PAGER_WORDS = 12  # of a pager's structure; vnode_pager has eight at most
_OPS = 4  # among these first ones are its operations
_HANDLE = 4  # vnode_handle is the fifth word of struct vnode_pager in every release
PAGERS = {
    "vnode": "_vnode_pager_ops",
    "compressor": "_compressor_pager_ops",
    "default": "_default_pager_ops",
    "device": "_device_pager_ops",
    "swapfile": "_swapfile_pager_ops",
    "apple protect": "_apple_protect_pager_ops",
    "shared region": "_shared_region_pager_ops",
    "fourk": "_fourk_pager_ops",
    "dyld": "_dyld_pager_ops",
}
_OBJECT: dict[str, tuple[str, *tuple[str, ...]]] = {
    "size": ("Q", "vo_un1.vou_size", "vo_size", "size"),
    "ref_count": ("i", "ref_count"),
    "resident": ("I", "resident_page_count"),
    "wired": ("I", "wired_page_count"),
    "shadow": ("P", "shadow"),
    "pager": ("P", "pager"),
    "paging": ("H", "paging_in_progress"),
    "internal": ("B", "internal"),
    "trusted": ("B", "pager_trusted"),
    "contiguous": ("B", "phys_contiguous"),
}
# mach/vm_param.h, where the kernel has no vm_page_packing_params: base, bits, shift
_PACKING = {
    "x86_64": (0xFFFFFF7F80000000, 31, 6),
    "arm64": (0xFFFFFE0000000000, 31, 6),
    "arm64e": (0xFFFFFE0000000000, 31, 6),
}


class VmObject(NamedTuple):
    """One vm_object. `size` in bytes, `resident` and `wired` in pages; addresses are the kernel's.

    `ref_count` is without the one that paging holds. Any field may be `Unreadable`.
    """

    address: int
    size: Any
    ref_count: Any
    resident: Any
    wired: Any
    shadow: Any
    pager: Any
    internal: Any
    external_pager: Any
    contiguous: Any


class Pager(NamedTuple):
    """What brings an object's pages in: a word of `PAGERS` or None, and its vnode or None."""

    kind: Any
    vnode: Any


class Objects:
    """The memory objects of one kernel; each is read once."""

    def __init__(self, target: Target) -> None:
        """Compiles what this kernel has of vm_object and vnode."""
        self._target = target
        self._members = Members(target, "vm_object", _OBJECT)
        self._un = offset_of(target.types, "vnode", "v_un")
        code = unsigned(target.types, "vnode", "v_type")
        self._vnode = Members(target, "vnode", {"type": (code, "v_type")})
        places = {word: named.address_of(target, name) for word, name in PAGERS.items()}
        self._kinds = {at: word for word, at in places.items() if at is not None}
        self._read: dict[int, VmObject] = {}
        self._pagers: dict[int, Pager] = {}

    def read(self, address: int) -> VmObject:
        """The object at `address`. Never raises `FaultError`."""
        if address not in self._read:
            raw = self._members.read(address)
            refs, paging = raw["ref_count"], raw["paging"]
            if isinstance(refs, int) and refs > 1 and isinstance(paging, int) and paging:
                refs -= 1
            internal, trusted = raw["internal"], raw["trusted"]
            external = internal
            if isinstance(internal, int) and isinstance(trusted, int):
                external = not internal and not trusted
            self._read[address] = VmObject(
                address,
                raw["size"],
                refs,
                raw["resident"],
                raw["wired"],
                raw["shadow"],
                raw["pager"],
                internal,
                external,
                raw["contiguous"],
            )
        return self._read[address]

    def chain(self, address: int) -> tuple[list[VmObject], Unreadable | None]:
        """The object and those it is a copy of, down to the last; what kept us from that."""
        found: list[VmObject] = []
        seen: set[int] = set()
        at: Any = address
        while isinstance(at, int) and at:
            if at in seen or len(found) >= DEPTH:
                return found, Unreadable(f"the shadows of object {address:#x} run in a circle")
            seen.add(at)
            found.append(self.read(at))
            at = found[-1].shadow
        return found, at if isinstance(at, Unreadable) else None

    def pager(self, address: int) -> Pager:
        """The memory object at `address`. Never raises `FaultError`."""
        if address not in self._pagers:
            try:
                self._pagers[address] = self._pager(address)
            except FaultError as fault:
                missing = Unreadable.of(fault)
                self._pagers[address] = Pager(missing, missing)
        return self._pagers[address]

    def _pager(self, address: int) -> Pager:
        """By its operations, and its vnode by what the vnode says of its pager."""
        width = self._target.arch.pointer_size
        words: list[int] = []
        for place in range(_PAGER_WORDS):
            try:
                words.append(self._target.pointer(address + place * width))
            except FaultError:
                if not words:
                    raise
                break  # it may be the last thing on its page
        kind = next((self._kinds[word] for word in words[:_OPS] if word in self._kinds), None)
        if kind not in (None, "vnode"):
            return Pager(kind, None)
        for word in words:
            if word and self._owns(word, address):
                return Pager("vnode", word)
        handle = words[_HANDLE] if kind == "vnode" and len(words) > _HANDLE else 0
        return Pager(kind, handle if handle and self._is_vnode(handle) else None)

    def _is_vnode(self, address: int) -> bool:
        """Whether what lies there has the type of a vnode, as far as it can be read."""
        kind = self._vnode.read(address)["type"]
        return isinstance(kind, int) and 0 < kind < len(TYPES)

    def _owns(self, vnode: int, pager: int) -> bool:
        """Whether that is a vnode whose ubc_info begins with the pager and has the vnode, too.

        struct ubc_info is ui_pager, ui_control, since 10.6 ui_flags, ui_vnode.
        """
        if self._un is None:
            return False
        target, width = self._target, self._target.arch.pointer_size
        try:
            info = target.pointer(vnode + self._un)
            if not info or target.pointer(info) != pager:
                return False
            return any(target.pointer(info + place * width) == vnode for place in (2, 3))
        except FaultError:
            return False


def unpack(target: Target, packed: int) -> Any:
    """The address of an object that is packed into 32 bits (from xnu-8020, 12.3, on).

    By the kernel's own vm_page_packing_params; else by the numbers of mach/vm_param.h.
    """
    if not packed:
        return 0
    at = named.address_of(target, "_vm_page_packing_params")
    if at is not None:
        try:
            base, shape = target.unsigned(at, "Q"), target.memory.read(at + 8, 3)
        except FaultError as fault:
            return Unreadable.of(fault)
        bits, shift, relative = shape
    elif target.arch.name in _PACKING:
        (base, bits, shift), relative = _PACKING[target.arch.name], 1
    else:
        return None
    if relative:
        return target.strip((packed << shift) + base & (1 << 64) - 1)
    number = packed & (1 << bits) - 1
    number -= 1 << bits if number >> (bits - 1) else 0
    return number << shift & (1 << 64) - 1


def kernel_object(target: Target) -> Any:
    """The address of the object of the kernel's own memory: kernel_object_default (13 on)."""
    at = named.address_of(target, "_kernel_object_default")
    return at if at is not None else named.pointer(target, "_kernel_object")
