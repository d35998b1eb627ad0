/* The kernel: plants everything, says what there is, and stops the processor for good. */
#include "kernel.h"
#include "macho.h"

char kernel_stack[KERNEL_STACK_SIZE] __attribute__((aligned(16)));

extern char zombproc[], kernproc[], initproc[], nprocs[], maxproc[], pidhashtbl[];
extern char pidhash[], tasks[], tasks_count[], threads_count[], kernel_task[];
extern char bdevsw[], nchrdev[], msgbufp[], averunnable[], avenrun[], lowGlo[];
extern char kernel_pmap[], version_major[], sysctl__children[], first_zone[];
#if defined(__x86_64__)
extern char IdlePML4[], BootPML4[], gLoadedKextSummaries[], physmap_base[], vm_kernel_slide[];
#define ROOTS(X)                                                                                  \
    X(IdlePML4) X(BootPML4) X(gLoadedKextSummaries) X(physmap_base) X(vm_kernel_slide)
#else
extern char IdlePDPT[], IdlePTD[];
#define ROOTS(X) X(IdlePDPT) X(IdlePTD)
#endif
#define SYMBOLS(X)                                                                                \
    X(allproc) X(zombproc) X(kernproc) X(initproc) X(nprocs) X(maxproc) X(pidhashtbl) X(pidhash)  \
    X(tasks) X(threads) X(tasks_count) X(threads_count) X(kernel_task) X(cdevsw) X(bdevsw)        \
    X(nchrdev) X(mountlist) X(msgbufp) X(averunnable) X(lowGlo) X(hostname) X(osversion)          \
    X(version) X(version_major) X(kmod) X(kernel_map) X(kernel_pmap) X(kernel_pmap_store)         \
    X(rootvnode) X(machine_info) X(avenrun) X(ostype) X(osrelease) X(sysctl__children)            \
    X(first_zone) ROOTS(X)

static void tell_symbol(const char *name, uptr address) {
    print("{\"kind\": \"symbol\", \"name\": \"%s\", \"address\": %p}\n", name, address);
}

static void tell_symbols(const struct boot_args *boot) {
    tell_symbol("__mh_execute_header", boot->kernel_start);
#define TELL(name) tell_symbol("_" #name, (uptr)&name);
    SYMBOLS(TELL)
}

static void tell_range(const char *name, uptr start, uptr end) {
    print("{\"kind\": \"range\", \"name\": \"%s\", \"address\": %p, \"size\": %u, \"crc\": %u}\n", name,
          start, (u32)(end - start), crc32((const void *)start, end - start));
}

/* What is mapped, with its checksum; nothing of it changes any more, but the stack. */
static void tell_ranges(const struct boot_args *boot) {
    uptr hole = HEAP_BASE + HEAP_HOLE * PAGE;
    uptr noise = HEAP_BASE + (HEAP_PAGES - NOISE_PAGES) * PAGE;
    const struct mach_header *header = header_at(boot->kernel_start);
    const struct segment *text = (const struct segment *)(header + 1);
    tell_range("text", boot->kernel_start, boot->kernel_start + text->vmsize);
    print("{\"kind\": \"image\", \"address\": %p, \"size\": %u, \"pool\": %u}\n", boot->kernel_start,
          (u32)(boot->kernel_end - boot->kernel_start), (u32)(POOL_PAGES * PAGE));
    tell_range("heap", HEAP_BASE, hole);
    tell_range("heap beyond the hole", hole + PAGE, noise);
    tell_range("noise", noise, HEAP_BASE + HEAP_PAGES * PAGE);
    tell_range("kext", boot->kext_start, boot->kext_end);
    print("{\"kind\": \"hole\", \"address\": %p, \"size\": %u}\n", hole, (u32)PAGE);
}

static uptr read_cr3(void) {
    uptr value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

/* What the boot code leaves behind would look like a second kernel, a second page table root. */
static void wipe(struct boot_args *boot) {
#if defined(__x86_64__)
    memset((void *)(PHYSMAP_BASE + RAW_BASE), 0, boot->raw_end - RAW_BASE);
    memset((void *)(PHYSMAP_BASE + 0x70000), 0, 3 * PAGE);
    *(u64 *)at_physical(boot, boot->root) = 0;
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" : : : "rax", "memory");
    if (boot->debug)
        map_page(boot, boot->root, LOW_GLOBALS_ALIAS, (uptr)lowGlo - STATIC_BASE, PTE_W | PTE_NX);
#else
    (void)boot;
#endif
}

void kernel_main(struct boot_args *boot);

void kernel_main(struct boot_args *boot) {
    wipe(boot);
    plant_devices();
    plant_statics(boot);
    plant_mounts();
    plant_kext(boot);
    plant_processes(boot);
    plant_stacks();
    plant_files();
    plant_sysctl();
    plant_zones();
    fill_noise();

    print("{\"kind\": \"machine\", \"arch\": \"%s\", \"layout\": \"%s\", \"slide\": %p, \"root\": %p}\n",
          MACHINE_ARCH, MACHINE_LAYOUT, boot->slide, read_cr3());
    tell_symbols(boot);
    tell_statics();
    tell_mounts();
    tell_kext();
    tell_processes();
    tell_threads();
    tell_files();
    tell_sysctl();
    tell_zones();
    tell_ranges(boot);
    print("{\"kind\": \"ready\", \"heap_used\": %u}\n", (u32)heap_used());
}
