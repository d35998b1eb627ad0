/*
 * x86_64: the kernel's file lies at RAW_BASE, low memory is mapped one to one, and this runs from
 * the file. It gives the kernel its place (random, a multiple of 2 MiB) and its page tables.
 */
#include "macho.h"
#include "machine.h"
#include "multiboot.h"

#define SLIDE_STEP 0x200000ul
#define SLIDES 31
#define LARGE 0x200000ul
#define SLOT(address) ((address) >> 39 & 511)

static uptr random_slide(void) {
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (1 + low % SLIDES) * SLIDE_STEP;
}

static void copy_kernel(const u8 *file, uptr slide) {
    const struct mach_header *header = (const struct mach_header *)file;
    const u8 *at = (const u8 *)(header + 1);
    for (u32 n = 0; n < header->ncmds; n++, at += ((const struct load_command *)at)->cmdsize) {
        const struct segment *seg = (const struct segment *)at;
        if (seg->cmd != LC_SEGMENT)
            continue;
        u8 *to = (u8 *)(seg->vmaddr - STATIC_BASE + slide);
        memset(to, 0, page_up(seg->vmsize));
        memcpy(to, file + seg->fileoff, seg->filesize);
    }
}

/* All of physical memory in 2 MiB pages, at its XNU place; and at 0 until the kernel runs. */
static void map_physical(struct boot_args *boot) {
    for (uptr at = 0; at < PHYSICAL_SIZE; at += LARGE)
        map_large(boot, boot->root, PHYSMAP_BASE + at, at, PTE_W);
    u64 *root = at_physical(boot, boot->root);
    root[SLOT(0ul)] = root[SLOT(PHYSMAP_BASE)];
}

/* Called by start_x86_64.s; gives the physical address of the boot arguments. */
struct boot_args *boot(const struct multiboot_info *multiboot) {
    const u8 *file = (const u8 *)RAW_BASE;
    const char *line = (const char *)(uptr)multiboot->cmdline;
    const struct multiboot_module *kext = (const void *)(uptr)multiboot->mods_addr;
    uptr low;
    uptr size = image_span((const struct mach_header *)file, &low);
    uptr slide = boot_option(line, "slide=", ~0ul);
    slide = slide == ~0ul ? random_slide() : slide;
    copy_kernel(file, slide);

    uptr start = low - STATIC_BASE + slide;
    struct boot_args *args = (struct boot_args *)(start + size);
    memset(args, 0, PAGE);
    args->slide = slide;
    args->kernel_start = low + slide;
    args->kernel_end = low + slide + size;
    args->raw_end = kext->mod_end;
    args->pool_next = start + size + PAGE;
    args->pool_end = start + size + POOL_PAGES * PAGE;
    args->debug = (u32)boot_option(line, "debug=", 0);
    args->root = pool_page(args);
    map_static_kernel(args, (const struct mach_header *)file);
    slide_image((struct mach_header *)start, slide, slide - STATIC_BASE);
    map_physical(args);
    map_heap(args);
    load_kext(args, (const u8 *)(uptr)kext->mod_start, KEXT_BASE + slide);

    args->window = STATIC_BASE;
    return args;
}
