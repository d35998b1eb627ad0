/* The device switches, with 10.4's rows (bsd/dev/i386/conf.c), and the functions in them. */
#include "kernel.h"

#define NCHRDEV 43
#define NBLKDEV 24
#define D_TAPE 1
#define D_TTY 3

#define FUNCTIONS(X)                                                                              \
    X(cnopen) X(cnclose) X(cnread) X(cnwrite) X(cnioctl) X(cnselect)                              \
    X(cttyopen) X(cttyread) X(cttywrite) X(cttyioctl) X(cttyselect)                               \
    X(mmread) X(mmwrite) X(mmioctl) X(seltrue)                                                    \
    X(ptsopen) X(ptsclose) X(ptsread) X(ptswrite) X(ptsstop) X(ptyioctl) X(ttselect)              \
    X(ptcopen) X(ptcclose) X(ptcread) X(ptcwrite) X(ptcselect)                                    \
    X(logopen) X(logclose) X(logread) X(logioctl) X(logselect)                                    \
    X(kmopen) X(kmclose) X(kmread) X(kmwrite) X(kmioctl)                                          \
    X(nulldev) X(enodev) X(enodev_strat)
FUNCTIONS(DEFINE)

struct cdevsw cdevsw[NCHRDEV];
struct bdevsw bdevsw[NBLKDEV];
int nchrdev = NCHRDEV;
int nblkdev = NBLKDEV;

struct row {
    int major;
    void *open, *close, *read, *write, *ioctl, *stop, *reset, *select;
    int type;
};

/* Initialised pointers: on x86_64 the boot code has to slide them. */
static const struct row rows[] = {
    {0, cnopen, cnclose, cnread, cnwrite, cnioctl, nulldev, nulldev, cnselect, D_TTY},
    {2, cttyopen, nulldev, cttyread, cttywrite, cttyioctl, nulldev, nulldev, cttyselect, D_TTY},
    {3, nulldev, nulldev, mmread, mmwrite, mmioctl, nulldev, nulldev, seltrue, D_TAPE},
    {4, ptsopen, ptsclose, ptsread, ptswrite, ptyioctl, ptsstop, nulldev, ttselect, D_TTY},
    {5, ptcopen, ptcclose, ptcread, ptcwrite, ptyioctl, nulldev, nulldev, ptcselect, D_TTY},
    {6, logopen, logclose, logread, enodev, logioctl, enodev, nulldev, logselect, 0},
    {12, kmopen, kmclose, kmread, kmwrite, kmioctl, nulldev, nulldev, ttselect, 0},
};

static void fill(struct cdevsw *entry, const struct row *row) {
    entry->d_open = row->open;
    entry->d_close = row->close;
    entry->d_read = row->read;
    entry->d_write = row->write;
    entry->d_ioctl = row->ioctl;
    entry->d_stop = row->stop;
    entry->d_reset = row->reset;
    entry->d_ttys = NULL;
    entry->d_select = row->select;
    entry->d_mmap = enodev;
    entry->d_strategy = enodev_strat;
    cdevsw_spare(entry, enodev);
    entry->d_type = row->type;
}

void plant_devices(void) {
    const struct row none = {0, enodev, enodev, enodev, enodev, enodev, enodev, enodev, enodev, 0};
    for (int n = 0; n < NCHRDEV; n++)
        fill(&cdevsw[n], &none);
    for (uptr n = 0; n < countof(rows); n++)
        fill(&cdevsw[rows[n].major], &rows[n]);
    for (int n = 0; n < NBLKDEV; n++) {
        bdevsw[n].d_open = bdevsw[n].d_close = bdevsw[n].d_ioctl = enodev;
        bdevsw[n].d_dump = bdevsw[n].d_psize = enodev;
        bdevsw[n].d_strategy = enodev_strat;
    }
}
