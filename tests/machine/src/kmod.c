/* The kext: slid, started, and listed as OSKext lists it. */
#include "kernel.h"
#include "macho.h"

#define LC_UUID 0x1b

struct kmod_info *kmod;
#ifdef HAS__loaded_kext_summary
struct _loaded_kext_summary_header *gLoadedKextSummaries;
#endif
static uptr my_mmread;

typedef int kmod_start_func(struct kmod_info *ki, void *data);

#ifdef HAS__loaded_kext_summary
static const u8 *uuid_of(const struct mach_header *header) {
    const u8 *at = (const u8 *)(header + 1);
    for (u32 n = 0; n < header->ncmds; n++, at += ((const struct load_command *)at)->cmdsize)
        if (((const struct load_command *)at)->cmd == LC_UUID)
            return at + 8;
    __builtin_trap();
}

static void plant_summary(const struct boot_args *boot) {
    struct _loaded_kext_summary_header *header;
    header = zalloc(sizeof *header + sizeof(struct _loaded_kext_summary));
    struct _loaded_kext_summary *entry = (struct _loaded_kext_summary *)(header + 1);
    header->version = 2;
    header->entry_size = sizeof *entry;
    header->numSummaries = 1;
    copy_text(entry->name, kmod->name, sizeof entry->name);
    memcpy(entry->uuid, uuid_of(header_at(boot->kext_start)), sizeof entry->uuid);
    entry->address = boot->kext_start;
    entry->size = boot->kext_end - boot->kext_start;
    entry->version = 100039000; /* 1.0.3, as OSKextParseVersionString makes it */
    entry->loadTag = kmod->id;
    gLoadedKextSummaries = header;
}
#endif

/* __KLD, by which a kernel is known, holds what starts the first kexts; here, which one is due. */
__attribute__((section("__KLD,__const_kld"))) const char kld_first_kext[] =
    "org.kvmtool.machine.mmread";

void plant_kext(const struct boot_args *boot) {
    struct mach_header *header = header_at(boot->kext_start);
    uptr low;
    image_span(header, &low);
    uptr slide = boot->kext_start - low;
    slide_image(header, slide, slide);
    my_mmread = image_symbol(header, "_my_mmread") + slide;
    kmod = (struct kmod_info *)(image_symbol(header, "_kmod_info") + slide);
    if (strcmp(kmod->name, kld_first_kext))
        __builtin_trap();
    kmod->id = 1;
    kmod->address = boot->kext_start;
    kmod->size = boot->kext_end - boot->kext_start;
    kmod->hdr_size = PAGE;
    ((kmod_start_func *)kmod->start)(kmod, cdevsw);
#ifdef HAS__loaded_kext_summary
    plant_summary(boot);
#endif
}

void tell_kext(void) {
    print("{\"kind\": \"kext\", \"name\": \"%s\", \"version\": \"%s\"", kmod->name, kmod->version);
    print(", \"address\": %p, \"size\": %u, \"kmod_info\": %p", kmod->address, (u32)kmod->size,
          kmod);
    print(", \"my_mmread\": %p, \"code\": \"", my_mmread);
    for (int n = 0; n < 16; n++)
        print("%b", ((const u8 *)my_mmread)[n]);
    print("\"}\n{\"kind\": \"cdevsw\", \"major\": 11, \"d_read\": %p}\n", cdevsw[11].d_read);
}
