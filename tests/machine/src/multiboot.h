/* Multiboot 1, section 3.3: what the loader (QEMU) hands over. */
#pragma once
#include "machine.h"

struct multiboot_info {
    u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr;
};

struct multiboot_module {
    u32 mod_start, mod_end, string, reserved;
};
