/*
 * The kext of the article: a device whose read function replaces that of cdevsw[11]. It is a
 * Mach-O image of its own. A real one would be linked against the kernel; this is handed the table.
 */
#include "machine.h"
#include "structs.h"

#define MMREAD_MAJOR 11
#define ENOTSUP 45

static int reads;

int my_mmread(int dev, void *uio, int ioflag) {
    (void)uio;
    (void)ioflag;
    reads++;
    return dev & 0xffffff ? ENOTSUP : 0;
}

int my_start(struct kmod_info *ki, void *data);
int my_stop(struct kmod_info *ki, void *data);

int my_start(struct kmod_info *ki, void *data) {
    struct cdevsw *table = data;
    (void)ki;
    table[MMREAD_MAJOR].d_read = my_mmread;
    return 0;
}

int my_stop(struct kmod_info *ki, void *data) {
    (void)ki;
    (void)data;
    return ENOTSUP;
}

/* As KMOD_EXPLICIT_DECL leaves it, but for start and stop, whose places are the layout's. */
struct kmod_info kmod_info = {
    .info_version = 1,
    .id = ~0u,
    .name = "org.kvmtool.machine.mmread",
    .version = "1.0.3",
    .start = my_start,
    .stop = my_stop,
};
