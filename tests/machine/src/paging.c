/*
 * Page tables: four levels on x86_64, three (PAE) on i386. Runs before the kernel has its place as
 * well as in it, so there are no variables here: all state is in struct boot_args.
 */
#include "machine.h"

#if defined(__x86_64__)
#define TOP_SHIFT 39
#else
#define TOP_SHIFT 30
#endif
#define INDEX_MASK 511ul

void *at_physical(const struct boot_args *boot, u64 physical) {
    return (void *)((uptr)physical + boot->window);
}

/* An empty page right after the kernel, where virtual is physical plus STATIC_BASE; or death. */
u64 pool_page(struct boot_args *boot) {
    u64 page = boot->pool_next;
    if (page >= boot->pool_end)
        __builtin_trap();
    boot->pool_next += PAGE;
    memset(at_physical(boot, page), 0, PAGE);
    return page;
}

/* An empty page frame from anywhere; neighbours in time are none in place. */
u64 next_frame(struct boot_args *boot) {
    u64 frame = FRAMES_BASE + (uptr)(boot->frames_used++ * FRAMES_STEP % FRAMES_COUNT) * PAGE;
    memset(at_physical(boot, frame), 0, PAGE);
    return frame;
}

/* The entry for `address` in the table whose entries span 1 << `until`, tables made on the way. */
static u64 *entry_for(struct boot_args *boot, u64 root, uptr address, int until, u64 flags) {
    u64 *table = at_physical(boot, root);
    for (int shift = TOP_SHIFT; shift > until; shift -= 9) {
        u64 *entry = &table[address >> shift & INDEX_MASK];
        if (!(*entry & PTE_P)) {
            /* the four entries of a PAE page directory pointer table have no rights in them */
            u64 rights = sizeof(uptr) == 4 && shift == TOP_SHIFT ? 0 : PTE_W | (flags & PTE_U);
            *entry = pool_page(boot) | PTE_P | rights;
        }
        table = at_physical(boot, *entry & PTE_FRAME);
    }
    return &table[address >> until & INDEX_MASK];
}

void map_page(struct boot_args *boot, u64 root, uptr address, u64 physical, u64 flags) {
    *entry_for(boot, root, address, 12, flags) = physical | flags | PTE_P;
}

/* A page of 2 MiB. */
void map_large(struct boot_args *boot, u64 root, uptr address, u64 physical, u64 flags) {
    *entry_for(boot, root, address, 21, flags) = physical | flags | PTE_PS | PTE_P;
}
