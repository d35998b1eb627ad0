"""Mounted file systems and vnodes, after bsd/sys/mount_internal.h and vnode_internal.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.builders.heap import Record, tail_queue

if TYPE_CHECKING:
    from tests.builders.ground import Ground

VROOT = 0x1
TYPES = {"NON": 0, "REG": 1, "DIR": 2, "BLK": 3, "CHR": 4, "LNK": 5, "SOCK": 6, "FIFO": 7}
MNT_RDONLY, MNT_NOSUID, MNT_LOCAL, MNT_ROOTFS, MNT_JOURNALED = 1, 8, 0x1000, 0x4000, 0x800000


class MountSpec(NamedTuple):
    """A mounted file system; sizes in blocks of `bsize` bytes."""

    on: str
    source: str
    kind: str
    flags: int = 0
    bsize: int = 4096
    iosize: int = 1 << 20
    blocks: int = 0
    bfree: int = 0
    bavail: int = 0
    bused: int = 0
    files: int = 0
    ffree: int = 0
    fsid: tuple[int, int] = (0, 0)
    owner: int = 0


MOUNTS = (
    MountSpec(
        *("/", "/dev/disk0s2", "hfs", MNT_LOCAL | MNT_ROOTFS | MNT_JOURNALED),
        blocks=0x1_2345_6789,
        bfree=70_000_000,
        bavail=69_000_000,
        bused=5_000_000_001,
        files=0x1_0000_0010,
        ffree=0x1_0000_0001,
        fsid=(0x0E000002, 17),
    ),
    MountSpec("/dev", "devfs", "devfs", 0x100000, 512, 512, 213, fsid=(-1640988672, 19)),
    MountSpec(
        *("/Volumes/Büro", "/dev/disk1s1", "msdos", MNT_RDONLY | MNT_NOSUID | MNT_LOCAL, 512, 4096),
        blocks=2000,
        bfree=1,
        fsid=(0x0E000005, 1),
        owner=501,
    ),
)


class FileSystem:
    """Mounts, and a tree of vnodes over them that grows as paths are asked for."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._mounts: dict[str, Record] = {}
        self._vnodes: dict[str, Record] = {}
        self.kinds: dict[str, str] = {}

    def plant(self, specs: tuple[MountSpec, ...] = MOUNTS) -> dict[str, Any]:
        """mountlist and rootvnode; the truth about the mounts."""
        ground = self._ground
        for spec in specs:
            self._mounts[spec.on] = ground.record("mount")
        covered = [self._fill(spec) for spec in specs]
        width = ground.memory.width
        head = ground.image.variable("_mountlist", 2 * width)
        addresses = [self._mounts[spec.on].address for spec in specs]
        tail_queue(ground.memory, head, addresses, ground.types.offset("mount", "mnt_list"))
        ground.pointer_variable("_rootvnode", self.vnode("/"))
        return {
            "mounts": [
                {"address": address, "vnodecovered": over, **spec._asdict()}
                for address, over, spec in zip(addresses, covered, specs, strict=True)
            ]
        }

    def _fill(self, spec: MountSpec) -> int:
        """Its fields; gives the vnode it covers."""
        ground, mount = self._ground, self._mounts[spec.on]
        over = 0 if spec.on == "/" else self._make(spec.on, "DIR", covered=True)
        mount.ptr("mnt_vnodecovered", over)
        mount.u32("mnt_flag", spec.flags)
        inside = Record(ground.types, ground.zones["kalloc"], "vfsstatfs", self._stat(mount))
        inside.u32("f_bsize", spec.bsize)
        inside.word("f_iosize", spec.iosize)
        for member in ("blocks", "bfree", "bavail", "bused", "files", "ffree"):
            inside.u64(f"f_{member}", getattr(spec, member))
        inside.u32("f_fsid", spec.fsid[0])
        inside.u32("f_fsid", spec.fsid[1], at=4)
        inside.u32("f_owner", spec.owner)
        inside.text("f_fstypename", spec.kind, 16)
        inside.text("f_mntonname", spec.on, 1024)
        inside.text("f_mntfromname", spec.source, 1024)
        return over

    def _stat(self, mount: Record) -> int:
        return mount.place("mnt_vfsstat")

    def mount_of(self, path: str) -> int:
        """The address of the mount that `path` lies on."""
        return self._mounts[self._mount_point(path)].address

    def _mount_point(self, path: str) -> str:
        held = (on for on in self._mounts if path == on or path.startswith(on.rstrip("/") + "/"))
        return max(held, key=len)

    def vnode(self, path: str, kind: str = "DIR") -> int:
        """The vnode of `path`, of that type; directories above it are made as needed."""
        return self._make(path, kind)

    def _make(self, path: str, kind: str, covered: bool = False) -> int:
        key = f"under {path}" if covered else path
        if key in self._vnodes:
            return self._vnodes[key].address
        vnode = self._vnodes[key] = self._ground.record("vnode")
        self.kinds[key] = kind
        vnode.u8("v_type", TYPES[kind])
        vnode.u32("v_usecount", 1)
        vnode.u32("v_id", len(self._vnodes))
        above, _, name = path.rpartition("/")
        if path in self._mounts and not covered:
            vnode.u32("v_flag", VROOT)
            vnode.ptr("v_mount", self._mounts[path].address)
            return vnode.address
        on = self._mount_point(above or "/") if covered else self._mount_point(path)
        vnode.ptr("v_mount", self._mounts[on].address)
        vnode.ptr("v_name", self._ground.text(name))
        vnode.ptr("v_parent", self._make(above or "/", "DIR"))
        return vnode.address
