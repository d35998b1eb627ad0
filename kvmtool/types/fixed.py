"""Structures that every XNU has alike, written as C writes them and laid out as its compilers do.

The database of layouts keeps what changes from release to release. These have stood as they are
since 10.4 but for the width of a pointer, so their declaration is enough: of one that grew at its
end, the members it always had. Each names its header.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from kvmtool.types.ctype import Array, Base, Compound, CType, Field, Pointer, unqualified
from kvmtool.types.flatten import flatten
from kvmtool.types.type_names import parse_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtool.types.flatten import Struct

DECLARATIONS = """
/* bsd/sys/sysctl.h; oid_link is a SLIST_ENTRY; 10.6 added more at the end */
struct sysctl_oid {
    void *oid_parent; struct sysctl_oid *oid_link; int oid_number; unsigned int oid_kind;
    void *oid_arg1; int oid_arg2; char *oid_name; void *oid_handler; char *oid_fmt;
};
/* osfmk/kern/queue.h */
struct queue_entry { struct queue_entry *next; struct queue_entry *prev; };
/* bsd/sys/time.h */
struct timeval { long tv_sec; int tv_usec; };
struct timespec { long tv_sec; long tv_nsec; };
/* bsd/sys/proc_internal.h, mount_internal.h: the heads of lists */
struct proclist { struct proc *lh_first; };
struct pidhashhead { struct proc *lh_first; };
struct pgrphashhead { struct pgrp *lh_first; };
struct sesshashhead { struct session *lh_first; };
struct mntlist { struct mount *tqh_first; struct mount **tqh_last; };
struct vnodelst { struct vnode *tqh_first; struct vnode **tqh_last; };
/* bsd/netinet/in_pcb.h, in_var.h, bsd/net/if_var.h, bsd/sys/domain.h */
struct inpcbhead { struct inpcb *lh_first; };
struct in_ifaddrhead { struct in_ifaddr *tqh_first; struct in_ifaddr **tqh_last; };
struct ifnethead { struct ifnet *tqh_first; struct ifnet **tqh_last; };
struct domains_head { struct domain *tqh_first; struct domain **tqh_last; };
/* bsd/sys/socket.h, un.h, bsd/netinet/in.h, bsd/netinet6/in6.h, bsd/net/if_dl.h: ports and
   addresses in network order; sun_path and sdl_data are as long as the length says */
struct sockaddr { unsigned char sa_len; unsigned char sa_family; char sa_data[14]; };
struct in_addr { unsigned int s_addr; };
struct sockaddr_in {
    unsigned char sin_len; unsigned char sin_family; unsigned short sin_port;
    struct in_addr sin_addr; char sin_zero[8];
};
struct sockaddr_in6 {
    unsigned char sin6_len; unsigned char sin6_family; unsigned short sin6_port;
    unsigned int sin6_flowinfo; unsigned int sin6_addr[4]; unsigned int sin6_scope_id;
};
struct sockaddr_un { unsigned char sun_len; unsigned char sun_family; char sun_path[104]; };
struct sockaddr_dl {
    unsigned char sdl_len; unsigned char sdl_family; unsigned short sdl_index;
    unsigned char sdl_type; unsigned char sdl_nlen; unsigned char sdl_alen;
    unsigned char sdl_slen; char sdl_data[12];
};
/* pexpert/pexpert/pexpert.h; what v_resv is has had names since 10.6 */
struct PE_Video {
    unsigned long v_baseAddr; unsigned long v_rowBytes; unsigned long v_width;
    unsigned long v_height; unsigned long v_depth; unsigned long v_display;
    char v_pixelFormat[64]; long v_resv[4];
};
struct PE_state {
    int initialized; struct PE_Video video; void *deviceTreeHead; void *bootArgs;
};
/* bsd/sys/mount_internal.h, bsd/sys/mount.h: a file system, and what it answers */
struct vfstable {
    struct vfsops *vfc_vfsops; char vfc_name[15]; int vfc_typenum; int vfc_refcount; int vfc_flags;
    void *vfc_mountroot; struct vfstable *vfc_next;
};
struct vfsops {
    void *vfs_mount; void *vfs_start; void *vfs_unmount; void *vfs_root; void *vfs_quotactl;
    void *vfs_getattr; void *vfs_sync; void *vfs_vget; void *vfs_fhtovp; void *vfs_vptofh;
    void *vfs_init; void *vfs_sysctl; void *vfs_setattr;
};
/* security/mac_internal.h, mac_policy.h: from 10.5 on */
struct mac_policy_list {
    unsigned int numloaded; unsigned int max; unsigned int maxindex; unsigned int staticmax;
    unsigned int chunks; unsigned int freehint; void *entries;
};
struct mac_policy_conf {
    char *mpc_name; char *mpc_fullname; void *mpc_labelnames; unsigned int mpc_labelname_count;
    void *mpc_ops; int mpc_loadtime_flags; void *mpc_field_off; int mpc_runtime_flags;
    struct mac_policy_conf *mpc_list; void *mpc_data;
};
/* bsd/sys/resource.h, bsd/vm/vm_unix.c */
struct loadavg { unsigned int ldavg[3]; long fscale; };
"""
_STRUCT = re.compile(r"struct (\w+) \{(.*?)\};", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_MEMBER = re.compile(r"(.*?[\s*])(\w+)((?:\[\d+\])*)$", re.DOTALL)


class FixedTypes:
    """A `TypeSource` of `DECLARATIONS` for one pointer size (4: the i386 ABI's alignment)."""

    name = "those that never changed"
    origin = "structures that no release changed"
    byteorder = "<"

    def __init__(
        self, pointer_size: int, known: Callable[[str], CType | None] | None = None
    ) -> None:
        """Parses nothing but the names; `known` finds structures that are declared elsewhere."""
        self.pointer_size, self._known = pointer_size, known
        self._texts = dict(_STRUCT.findall(_COMMENT.sub("", DECLARATIONS)))
        self._made: dict[str, Compound] = {}

    def find(self, kind: str, name: str) -> CType | None:
        """See `TypeSource.find`."""
        if kind != "tag" or name not in self._texts:
            return None
        if name not in self._made:
            self._made[name] = self._lay_out(name)
        return self._made[name]

    def flat(self, name: str) -> Struct | None:
        """The structure with that tag, flattened; None if it is not one of these."""
        found = self.find("tag", name)
        return flatten(found) if isinstance(found, Compound) else None

    def names(self, kind: str) -> Iterable[str]:
        """See `TypeSource.names`."""
        return self._texts if kind == "tag" else ()

    def variable(self, name: str) -> CType | None:
        """None: these are types only."""
        return None

    def _lay_out(self, tag: str) -> Compound:
        fields, at, widest = [], 0, 1
        for text in filter(None, map(str.strip, self._texts[tag].split(";"))):
            member = _MEMBER.match(text)
            assert member is not None, f"struct {tag}: {text}"
            kind = self._type(member.group(1).strip() + member.group(3))
            size, align = kind.size or 0, self._alignment(kind)
            at = -(-at // align) * align
            fields.append(Field(member.group(2), kind, at))
            at, widest = at + size, max(widest, align)
        return Compound("struct", tag, -(-at // widest) * widest, fields)

    def _type(self, text: str) -> CType:
        pointer = re.match(r"struct \w+ (\*+)$", text)
        if pointer is None:
            return parse_type(text, self)
        # a structure may point at itself, or at one that is declared elsewhere
        tag = text.split()[1]
        kind: CType = Pointer(
            functools.partial(self._pointed, tag),
            self.pointer_size,
        )
        for _ in pointer.group(1)[1:]:
            kind = Pointer(kind, self.pointer_size)
        return kind

    def _pointed(self, tag: str) -> CType:
        found = self._known(tag) if self._known is not None else self.find("tag", tag)
        return found or Compound("struct", tag, None)

    def _alignment(self, ctype: CType) -> int:
        found = unqualified(ctype)
        if isinstance(found, Array):
            return self._alignment(found.target)
        if isinstance(found, Compound):
            return max((self._alignment(field.type) for field in found.fields), default=1)
        if isinstance(found, (Base, Pointer)):
            return min(found.size, 8 if self.pointer_size == 8 else 4)
        return 1
