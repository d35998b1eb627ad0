/* The kernel's variables, the low globals page, the message buffer. */
#include "kernel.h"

#define FSCALE 2048 /* <sys/resource.h> 1 << FSHIFT */
#define MSG_MAGIC 0x063061
#define MSG_SIZE 0x2000

#if defined(__x86_64__)
const char version[] = "Darwin Kernel Version 13.4.0: Sat Jan  1 00:00:00 UTC 2000; "
                       "kvmtool-machine:xnu-2422.115.4~1/RELEASE_X86_64";
const int version_major = 13, version_minor = 4, version_revision = 0;
const char osrelease[] = "13.4.0";
#define LG_STEXT 0x10 /* osfmk/x86_64/lowglobals.h */
#define LG_VERSION 0x30
#define LG_KMOD 0x8f8
#define LG_OSVERSION 0x920
#else
const char version[] = "Darwin Kernel Version 9.8.0: Sat Jan  1 00:00:00 UTC 2000; "
                       "kvmtool-machine:xnu-1228.15.4~1/RELEASE_I386";
const int version_major = 9, version_minor = 8, version_revision = 0;
const char osrelease[] = "9.8.0";
#define LG_VERSION 0x1c /* osfmk/i386/lowglobals.h */
#define LG_KMOD 0x480
#define LG_OSVERSION 0x494
#endif

const char ostype[] = "Darwin";
char osversion[256];
char hostname[256];
char lowGlo[PAGE] __attribute__((aligned(4096)));
struct loadavg averunnable;
u32 avenrun[3] = {1250, 640, 125}; /* of LOAD_SCALE, 1000 */
u32 mach_factor[3] = {750, 1360, 1875};
struct machine_info machine_info;
int hz = 100;
struct msgbuf *msgbufp;
void *rootvnode;
u32 vm_page_free_count = 24000, vm_page_active_count = 3000, vm_page_inactive_count = 1500;
u32 vm_page_wire_count = 2200, vm_page_speculative_count = 120;
struct pmap kernel_pmap_store;
struct pmap *kernel_pmap = &kernel_pmap_store;
static struct _vm_map kernel_map_store;
struct _vm_map *kernel_map = &kernel_map_store;
#if defined(__x86_64__)
uptr vm_kernel_slide, vm_kernel_stext;
uptr physmap_base, physmap_max;
u64 *IdlePML4;
/* As XNU's: the tables the processor started with, which map low memory at both ends. */
__attribute__((section("__HIB,__bootPT"), aligned(4096))) u64 BootPML4[512];
__attribute__((section("__HIB,__bootPT"), aligned(4096))) u64 BootPDPT[512];
__attribute__((section("__HIB,__bootPT"), aligned(4096))) u64 BootPD[512];
#else
u64 *IdlePDPT, *IdlePTD;
#endif

static const char boot_messages[] =
    "npvhash=4095\n"
    "standard timeslicing quantum is 10000 us\n"
    "vm_page_bootstrap: 24000 free pages and 2200 wired pages\n"
    "kvmtool machine: this is no Darwin, but it has its structures\n"
    "kext org.kvmtool.machine.mmread 1.0.3 loaded\n";

static void low_pointer(uptr at, const void *to) {
    memcpy(lowGlo + at, &to, sizeof to);
}

static void plant_low_globals(void) {
    memcpy(lowGlo, "Catfish ", 8);
#if defined(__x86_64__)
    low_pointer(LG_STEXT, (void *)vm_kernel_stext);
#endif
    low_pointer(LG_VERSION, version);
    low_pointer(LG_KMOD, &kmod);
    low_pointer(LG_OSVERSION, osversion);
}

static void plant_message_buffer(void) {
    msgbufp = zalloc(sizeof *msgbufp);
    msgbufp->msg_magic = MSG_MAGIC;
    msgbufp->msg_size = MSG_SIZE;
    msgbufp->msg_bufc = zalloc(MSG_SIZE);
    msgbufp->msg_bufx = sizeof boot_messages - 1;
    memcpy(msgbufp->msg_bufc, boot_messages, sizeof boot_messages - 1);
}

#if defined(__x86_64__)
static void plant_roots(const struct boot_args *boot) {
    vm_kernel_slide = boot->slide;
    vm_kernel_stext = LINK_ADDRESS + boot->slide;
    physmap_base = PHYSMAP_BASE;
    physmap_max = PHYSMAP_BASE + PHYSICAL_SIZE;
    IdlePML4 = (u64 *)(uptr)(boot->root + STATIC_BASE);
    kernel_pmap->pm_pml4 = IdlePML4;
    BootPML4[0] = BootPML4[511] = ((uptr)BootPDPT - STATIC_BASE) | PTE_P | PTE_W;
    BootPDPT[0] = ((uptr)BootPD - STATIC_BASE) | PTE_P | PTE_W;
    for (u64 n = 0; n < countof(BootPD); n++)
        BootPD[n] = n << 21 | PTE_PS | PTE_P | PTE_W;
}
#else
static void plant_roots(const struct boot_args *boot) {
    IdlePDPT = (u64 *)(uptr)boot->root;
    IdlePTD = (u64 *)(uptr)(IdlePDPT[0] & PTE_FRAME);
    kernel_pmap->pm_pdpt = IdlePDPT;
}
#endif

void plant_statics(const struct boot_args *boot) {
    copy_text(osversion, sizeof(uptr) == 8 ? "13F34" : "9L31a", sizeof osversion);
    copy_text(hostname, "machine.kvmtool.test", sizeof hostname);
    averunnable.ldavg[0] = 5 * FSCALE / 2;
    averunnable.ldavg[1] = FSCALE;
    averunnable.ldavg[2] = FSCALE / 4;
    averunnable.fscale = FSCALE;
    machine_info.max_mem = PHYSICAL_SIZE;
    machine_info.max_cpus = 4;
    machine_info.physical_cpu = machine_info.physical_cpu_max = 1;
    machine_info.logical_cpu = machine_info.logical_cpu_max = 1;
    kernel_pmap->pm_cr3 = boot->root;
    kernel_map->pmap = kernel_pmap;
    plant_roots(boot);
    plant_message_buffer();
    plant_low_globals();
}

void tell_statics(void) {
    print("{\"kind\": \"statics\", \"version\": \"%s\", \"osversion\": \"%s\"", version, osversion);
    print(", \"hostname\": \"%s\", \"fscale\": %d", hostname, (int)averunnable.fscale);
    print(", \"ldavg\": [%u, %u, %u]", averunnable.ldavg[0], averunnable.ldavg[1],
          averunnable.ldavg[2]);
    print(", \"avenrun\": [%u, %u, %u]", avenrun[0], avenrun[1], avenrun[2]);
    print(", \"mach_factor\": [%u, %u, %u]", mach_factor[0], mach_factor[1], mach_factor[2]);
    print(", \"ostype\": \"%s\", \"osrelease\": \"%s\", \"hz\": %d", ostype, osrelease, hz);
    print(", \"max_mem\": %u, \"max_cpus\": %d", (u32)machine_info.max_mem, machine_info.max_cpus);
    print(", \"physical_cpu\": %d, \"logical_cpu\": %d", machine_info.physical_cpu,
          machine_info.logical_cpu);
    print(", \"pages\": {\"free\": %u, \"active\": %u", vm_page_free_count, vm_page_active_count);
    print(", \"inactive\": %u, \"speculative\": %u", vm_page_inactive_count,
          vm_page_speculative_count);
    print(", \"wired\": %u}", vm_page_wire_count);
    print(", \"msgbuf\": {\"address\": %p, \"bufx\": %u, \"crc\": %u}}\n", msgbufp,
          msgbufp->msg_bufx, crc32(msgbufp->msg_bufc, msgbufp->msg_bufx));
}
