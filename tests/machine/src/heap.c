/* The kernel's heap: given out once, never taken back. */
#include "kernel.h"

static uptr next = HEAP_BASE;

/* Zeros, aligned as malloc would; never across the page that is not mapped, but across others. */
void *zalloc(uptr size) {
    uptr hole = HEAP_BASE + HEAP_HOLE * PAGE;
    uptr end = HEAP_BASE + (HEAP_PAGES - NOISE_PAGES) * PAGE;
    if (next < hole && next + size > hole)
        next = hole + PAGE;
    if (next + size > end)
        __builtin_trap();
    void *found = (void *)next;
    next += (size + 15) & ~15ul;
    return found;
}

/* xorshift32: the same in every run, and like nothing else in memory. */
void fill_noise(void) {
    u32 *at = (u32 *)(HEAP_BASE + (HEAP_PAGES - NOISE_PAGES) * PAGE);
    u32 *end = (u32 *)(HEAP_BASE + HEAP_PAGES * PAGE);
    for (u32 x = 2463534242u; at < end; *at++ = x) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
    }
}

uptr heap_used(void) {
    return next - HEAP_BASE;
}
