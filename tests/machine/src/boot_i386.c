/*
 * i386: the kernel has its place already, paging is off. This makes the page tables: the kernel's
 * pages are where they are, the low globals page has its alias, heap and kext lie anywhere.
 */
#include "macho.h"
#include "machine.h"
#include "multiboot.h"

extern char lowGlo[];

/* Called by start_i386.s. */
struct boot_args *boot(const struct multiboot_info *multiboot) {
    const struct mach_header *header = header_at(LINK_ADDRESS);
    const struct multiboot_module *kext = (const void *)multiboot->mods_addr;
    uptr low;
    uptr size = image_span(header, &low);
    struct boot_args *args = (struct boot_args *)(low + size);
    memset(args, 0, PAGE);
    args->kernel_start = low;
    args->kernel_end = low + size;
    args->raw_end = kext->mod_end;
    args->pool_next = low + size + PAGE;
    args->pool_end = low + size + POOL_PAGES * PAGE;
    args->root = pool_page(args);
    map_static_kernel(args, header);
    map_page(args, args->root, LOW_GLOBALS_ALIAS, (uptr)lowGlo, PTE_W);
    map_heap(args);
    load_kext(args, (const u8 *)kext->mod_start, KEXT_BASE);
    memset((void *)RAW_BASE, 0, args->raw_end - RAW_BASE);
    return args;
}
