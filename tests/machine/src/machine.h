/*
 * A machine that runs: what boot code, kernel and kext share.
 *
 * The structures are those of a real release: structs.h is generated from kvmtool's layouts, so
 * every member lies where that release has it, and nothing is declared that is not filled in.
 */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long uptr; /* a pointer as a number, on either word size */

#define NULL ((void *)0)
#define PACKED __attribute__((packed))
#define offsetof(type, member) __builtin_offsetof(type, member)
#define countof(array) (sizeof(array) / sizeof((array)[0]))

#define PAGE 0x1000ul
#define page_up(n) (((n) + PAGE - 1) & ~(PAGE - 1))

/* Where the raw kernel file and the kext wait for the boot code (multiboot.s, postlink.py). */
#define RAW_BASE 0x4400000ul
/* Page frames for heap and kext, taken from here in an order that is not ascending. */
#define FRAMES_BASE 0x4600000ul
#define FRAMES_COUNT 2003ul
#define FRAMES_STEP 1237ul
#define PHYSICAL_SIZE 0x5000000ul /* QEMU is told so: vm.py */

#if defined(__x86_64__)
#define LINK_ADDRESS 0xffffff8000200000ul
#define STATIC_BASE 0xffffff8000000000ul /* a static kernel address minus its physical one */
#define HEAP_BASE 0xffffff801e000000ul
#define KEXT_BASE 0xffffff7f80800000ul
#define PHYSMAP_BASE 0xfffffe8000000000ul
#define LOW_GLOBALS_ALIAS 0xffffff8000002000ul
#define USER_STACK 0x7fff5fc00000ul
#else
#define LINK_ADDRESS 0x430000ul
#define STATIC_BASE 0ul
#define HEAP_BASE 0x2a400000ul
#define KEXT_BASE 0x1e800000ul
#define LOW_GLOBALS_ALIAS 0x2000ul
#define USER_STACK 0xbffff000ul
#endif

#define HEAP_PAGES 64ul
#define HEAP_HOLE 48ul  /* this page of the heap is not mapped */
#define NOISE_PAGES 8ul /* at the heap's end: pages of numbers nobody could guess */
#define POOL_PAGES 48ul /* page tables and user pages, right after the kernel */

/* Page table entries */
#define PTE_P 0x1ull
#define PTE_W 0x2ull
#define PTE_U 0x4ull
#define PTE_PS 0x80ull
#define PTE_NX 0x8000000000000000ull
#define PTE_FRAME 0x000ffffffffff000ull

/* What the boot code leaves for the kernel, in the first page of the pool. */
struct boot_args {
    uptr slide;
    uptr kernel_start, kernel_end; /* virtual */
    uptr kext_start, kext_end;     /* virtual */
    uptr raw_end;                  /* physical */
    u64 root;                      /* physical address of the topmost page table */
    u64 pool_next, pool_end;       /* physical */
    u32 frames_used;
    u32 debug;   /* boot-arg debug=: whether the low globals get their alias */
    uptr window; /* where physical addresses can be read: address minus physical address */
};

/* paging.c */
u64 pool_page(struct boot_args *boot);
u64 next_frame(struct boot_args *boot);
void *at_physical(const struct boot_args *boot, u64 physical);
void map_page(struct boot_args *boot, u64 root, uptr address, u64 physical, u64 flags);
void map_large(struct boot_args *boot, u64 root, uptr address, u64 physical, u64 flags);

/* loader.c: used before and after paging is on */
struct mach_header *header_at(uptr address);
void load_kext(struct boot_args *boot, const u8 *file, uptr address);
void map_static_kernel(struct boot_args *boot, const struct mach_header *header);
void map_heap(struct boot_args *boot);
uptr image_span(const struct mach_header *header, uptr *lowest);
void slide_image(struct mach_header *header, uptr slide, uptr linkedit_moved);
uptr image_symbol(const struct mach_header *header, const char *name);
uptr boot_option(const char *line, const char *name, uptr otherwise);

/* lib.c */
void *memcpy(void *to, const void *from, uptr size);
void *memset(void *to, int value, uptr size);
uptr strlen(const char *text);
int strcmp(const char *a, const char *b);
void copy_text(char *to, const char *from, uptr room);
u32 crc32(const void *data, uptr size);

/* serial.c */
void print(const char *format, ...);
