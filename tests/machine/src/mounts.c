/* mountlist: a root file system, devfs, and a disk image with a space in its name. */
#include "kernel.h"

#define MNT_RDONLY 0x1
#define MNT_LOCAL 0x1000
#define MNT_ROOTFS 0x4000
#define MNT_DONTBROWSE 0x100000

struct tailq_head mountlist;
int nummounts;

static const struct {
    const char *type, *from, *on;
    u32 flags, blocks, free;
} mounts[] = {
    {"hfs", "/dev/disk0s2", "/", MNT_LOCAL | MNT_ROOTFS, 121568240, 61437012},
    {"devfs", "devfs", "/dev", MNT_LOCAL | MNT_DONTBROWSE, 366, 0},
    {"hfs", "/dev/disk1s1", "/Volumes/Disk Image", MNT_LOCAL | MNT_RDONLY, 20480, 118},
};

void plant_mounts(void) {
    for (uptr n = 0; n < countof(mounts); n++) {
        struct mount *mount = zalloc(sizeof *mount);
        struct vfsstatfs *stat = (struct vfsstatfs *)mount->mnt_vfsstat;
        mount->mnt_flag = mounts[n].flags;
        stat->f_flags = mounts[n].flags;
        stat->f_bsize = 4096;
        stat->f_blocks = mounts[n].blocks;
        stat->f_bfree = stat->f_bavail = mounts[n].free;
        copy_text(stat->f_fstypename, mounts[n].type, sizeof stat->f_fstypename);
        copy_text(stat->f_mntonname, mounts[n].on, sizeof stat->f_mntonname);
        copy_text(stat->f_mntfromname, mounts[n].from, sizeof stat->f_mntfromname);
        tailq_insert_tail(&mountlist, mount, offsetof(struct mount, mnt_list));
        nummounts++;
    }
}

void tell_mounts(void) {
    for (struct mount *mount = mountlist.tqh_first; mount; mount = mount->mnt_list.le_next) {
        const struct vfsstatfs *stat = (const struct vfsstatfs *)mount->mnt_vfsstat;
        print("{\"kind\": \"mount\", \"address\": %p, \"type\": \"%s\"", mount, stat->f_fstypename);
        print(", \"from\": \"%s\", \"on\": \"%s\"", stat->f_mntfromname, stat->f_mntonname);
        print(", \"flags\": %u, \"blocks\": %u, \"free\": %u}\n", mount->mnt_flag,
              (u32)stat->f_blocks, (u32)stat->f_bfree);
    }
}
