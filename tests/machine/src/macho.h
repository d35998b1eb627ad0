/* <mach-o/loader.h> and <mach-o/nlist.h>, as far as the boot code reads them. */
#pragma once
#include "machine.h"

struct mach_header {
    u32 magic, cputype, cpusubtype, filetype, ncmds, sizeofcmds, flags;
#if defined(__x86_64__)
    u32 reserved;
#endif
};

struct load_command {
    u32 cmd, cmdsize;
};

struct segment {
    u32 cmd, cmdsize;
    char segname[16];
    uptr vmaddr, vmsize, fileoff, filesize;
    u32 maxprot, initprot, nsects, flags;
};

struct section {
    char sectname[16], segname[16];
    uptr addr, size;
    u32 offset, align, reloff, nreloc, flags, reserved1, reserved2;
#if defined(__x86_64__)
    u32 reserved3;
#endif
};

struct symtab {
    u32 cmd, cmdsize, symoff, nsyms, stroff, strsize;
};

struct dyld_info {
    u32 cmd, cmdsize, rebase_off, rebase_size;
};

struct nlist {
    u32 n_strx;
    u8 n_type, n_sect;
    u16 n_desc;
    uptr n_value;
};

#if defined(__x86_64__)
#define LC_SEGMENT 0x19
#else
#define LC_SEGMENT 0x1
#endif
#define LC_SYMTAB 0x2
#define LC_DYLD_INFO 0x22
#define LC_DYLD_INFO_ONLY 0x80000022
#define N_STAB 0xe0
#define PROT_WRITE 2
#define PROT_EXECUTE 4
