/*
 * The booter's part: Mach-O images into memory. As paging.c it has no variables; on x86_64 it runs
 * from the raw file before anything is where it belongs.
 */
#include "macho.h"
#include "machine.h"

#define for_each_command(header, lc)                                                              \
    struct load_command *lc = (struct load_command *)((header) + 1);                              \
    for (u32 lc##_left = (header)->ncmds; lc##_left;                                              \
         lc##_left--, lc = (struct load_command *)((u8 *)lc + lc->cmdsize))

struct mach_header *header_at(uptr address) {
    return (struct mach_header *)address;
}

/* Bytes from the lowest segment's start to the highest one's end. */
uptr image_span(const struct mach_header *header, uptr *lowest) {
    uptr low = ~0ul, high = 0;
    for_each_command(header, lc) {
        const struct segment *seg = (const struct segment *)lc;
        if (lc->cmd != LC_SEGMENT || !seg->vmsize)
            continue;
        low = seg->vmaddr < low ? seg->vmaddr : low;
        high = seg->vmaddr + seg->vmsize > high ? seg->vmaddr + seg->vmsize : high;
    }
    *lowest = low;
    return page_up(high - low);
}

static u64 rights_of(const struct segment *seg) {
    u64 rights = seg->initprot & PROT_WRITE ? PTE_W : 0;
    if (sizeof(uptr) == 8 && !(seg->initprot & PROT_EXECUTE))
        rights |= PTE_NX;
    return rights;
}

/* The kernel's pages, and the pool's behind it: virtual is physical plus STATIC_BASE. */
void map_static_kernel(struct boot_args *boot, const struct mach_header *header) {
    for_each_command(header, lc) {
        const struct segment *seg = (const struct segment *)lc;
        if (lc->cmd != LC_SEGMENT)
            continue;
        for (uptr at = 0; at < page_up(seg->vmsize); at += PAGE) {
            uptr address = seg->vmaddr + boot->slide + at;
            map_page(boot, boot->root, address, address - STATIC_BASE, rights_of(seg));
        }
    }
    u64 rights = sizeof(uptr) == 8 ? PTE_W | PTE_NX : PTE_W;
    for (uptr at = page_up(boot->kernel_end); at < STATIC_BASE + boot->pool_end; at += PAGE)
        map_page(boot, boot->root, at, at - STATIC_BASE, rights);
}

void map_heap(struct boot_args *boot) {
    u64 rights = sizeof(uptr) == 8 ? PTE_W | PTE_NX : PTE_W;
    for (uptr page = 0; page < HEAP_PAGES; page++)
        if (page != HEAP_HOLE)
            map_page(boot, boot->root, HEAP_BASE + page * PAGE, next_frame(boot), rights);
}

/* Copies and maps the kext, every page of it somewhere else; its pointers are still as linked. */
void load_kext(struct boot_args *boot, const u8 *file, uptr address) {
    const struct mach_header *header = (const struct mach_header *)file;
    uptr low;
    uptr size = image_span(header, &low);
    boot->kext_start = address;
    boot->kext_end = address + size;
    for_each_command(header, lc) {
        const struct segment *seg = (const struct segment *)lc;
        if (lc->cmd != LC_SEGMENT)
            continue;
        for (uptr at = 0; at < page_up(seg->vmsize); at += PAGE) {
            u64 frame = next_frame(boot);
            uptr left = seg->filesize > at ? seg->filesize - at : 0;
            memcpy(at_physical(boot, frame), file + seg->fileoff + at, left < PAGE ? left : PAGE);
            map_page(boot, boot->root, seg->vmaddr - low + address + at, frame, rights_of(seg));
        }
    }
}

static const struct segment *segment_at(const struct mach_header *header, u32 index) {
    for_each_command(header, lc) {
        if (lc->cmd == LC_SEGMENT && index-- == 0)
            return (const struct segment *)lc;
    }
    __builtin_trap();
}

static uptr uleb(const u8 **at) {
    uptr value = 0;
    int shift = 0;
    u8 byte;
    do {
        byte = *(*at)++;
        value |= (uptr)(byte & 0x7f) << shift;
        shift += 7;
    } while (byte & 0x80);
    return value;
}

/* REBASE_OPCODE_* of <mach-o/loader.h>: each pointer they name moves with the image. */
static void rebase(const struct mach_header *header, const u8 *op, const u8 *end, uptr moved,
                   uptr slide) {
    uptr at = 0;
    while (op < end) {
        u8 immediate = *op & 0x0f;
        uptr count = 0, skip = 0;
        switch (*op++ & 0xf0) {
        case 0x00: /* DONE */
            return;
        case 0x10: /* SET_TYPE_IMM */
            break;
        case 0x20: /* SET_SEGMENT_AND_OFFSET_ULEB */
            at = segment_at(header, immediate)->vmaddr + moved + uleb(&op);
            break;
        case 0x30: /* ADD_ADDR_ULEB */
            at += uleb(&op);
            break;
        case 0x40: /* ADD_ADDR_IMM_SCALED */
            at += immediate * sizeof(uptr);
            break;
        case 0x50: /* DO_REBASE_IMM_TIMES */
            count = immediate;
            break;
        case 0x60: /* DO_REBASE_ULEB_TIMES */
            count = uleb(&op);
            break;
        case 0x70: /* DO_REBASE_ADD_ADDR_ULEB */
            count = 1;
            skip = uleb(&op);
            break;
        case 0x80: /* DO_REBASE_ULEB_TIMES_SKIPPING_ULEB */
            count = uleb(&op);
            skip = uleb(&op);
            break;
        default:
            __builtin_trap();
        }
        for (; count; count--, at += sizeof(uptr) + skip)
            *(uptr *)at += slide;
    }
}

static const struct segment *linkedit_of(const struct mach_header *header) {
    for_each_command(header, lc) {
        if (lc->cmd == LC_SEGMENT && !strcmp(((struct segment *)lc)->segname, "__LINKEDIT"))
            return (const struct segment *)lc;
    }
    __builtin_trap();
}

/*
 * Slides an image that lies in memory: its pointers, and as the booter does the addresses in its
 * load commands. `moved` is how far it can be written to from where it was linked.
 */
void slide_image(struct mach_header *header, uptr slide, uptr moved) {
    const struct segment *linkedit = linkedit_of(header);
    const u8 *tables = (const u8 *)(linkedit->vmaddr + moved) - linkedit->fileoff;
    for_each_command(header, lc) {
        if (lc->cmd == LC_DYLD_INFO || lc->cmd == LC_DYLD_INFO_ONLY) {
            const struct dyld_info *info = (const struct dyld_info *)lc;
            const u8 *first = tables + info->rebase_off;
            rebase(header, first, first + info->rebase_size, moved, slide);
        }
    }
    for_each_command(header, move) {
        struct segment *seg = (struct segment *)move;
        if (move->cmd != LC_SEGMENT)
            continue;
        seg->vmaddr += slide;
        struct section *sect = (struct section *)(seg + 1);
        for (u32 n = 0; n < seg->nsects; n++)
            sect[n].addr += slide;
    }
}

/* n_value of a symbol of an image in memory whose load commands have been slid; or death. */
uptr image_symbol(const struct mach_header *header, const char *name) {
    const struct segment *linkedit = linkedit_of(header);
    const u8 *tables = (const u8 *)linkedit->vmaddr - linkedit->fileoff;
    for_each_command(header, lc) {
        const struct symtab *symtab = (const struct symtab *)lc;
        if (lc->cmd != LC_SYMTAB)
            continue;
        const struct nlist *symbols = (const struct nlist *)(tables + symtab->symoff);
        const char *strings = (const char *)tables + symtab->stroff;
        for (u32 n = 0; n < symtab->nsyms; n++)
            if (!(symbols[n].n_type & N_STAB) && !strcmp(strings + symbols[n].n_strx, name))
                return symbols[n].n_value;
    }
    __builtin_trap();
}

/* The number after `name` (which ends in '=') on the command line, in hex; no 0x needed. */
uptr boot_option(const char *line, const char *name, uptr otherwise) {
    uptr length = strlen(name);
    for (; *line; line++) {
        uptr n = 0;
        while (n < length && line[n] == name[n])
            n++;
        if (n < length)
            continue;
        uptr value = 0;
        for (line += length; *line && *line != ' '; line++) {
            u8 digit = (u8)(*line | 0x20);
            if (digit == 'x')
                continue;
            value = value << 4 | (u8)(digit > '9' ? digit - 'a' + 10 : digit - '0');
        }
        return value;
    }
    return otherwise;
}
