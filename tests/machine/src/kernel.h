/* The kernel's own: heap, lists, and what each file plants at start. */
#pragma once
#include "machine.h"
#include "structs.h"

#define KERNEL_STACK_SIZE 0x4000 /* start_*.s have it too */

/* A function that does nothing; each is a place of its own, as in a kernel. */
#define DEFINE(name)                                                                              \
    int name(void);                                                                               \
    __attribute__((noinline)) int name(void) {                                                    \
        __asm__ volatile("");                                                                     \
        return sizeof(#name) > 7;                                                                 \
    }

/* <sys/queue.h> and osfmk/kern/queue.h: links of structures, `link` bytes in */
void list_insert_head(void **head, void *element, uptr link);
void tailq_insert_tail(struct tailq_head *head, void *element, uptr link);
void queue_init(struct queue_entry *head);
void queue_enter(struct queue_entry *head, void *element, uptr link);

/* heap.c */
void *zalloc(uptr size);
void fill_noise(void);
uptr heap_used(void);

/* Each plants its part of the kernel; all addresses are those in memory. */
void plant_devices(void);
void plant_statics(const struct boot_args *boot);
void plant_mounts(void);
void plant_processes(struct boot_args *boot);
void plant_kext(const struct boot_args *boot);
void plant_sysctl(void);
void plant_zones(void);
void plant_files(void);
void plant_stacks(void);

/* ... and says what it planted, in lines of JSON. */
void tell_statics(void);
void tell_mounts(void);
void tell_processes(void);
void tell_kext(void);
void tell_sysctl(void);
void tell_zones(void);
void tell_files(void);
void tell_threads(void);

extern struct cdevsw cdevsw[];
extern struct kmod_info *kmod;
extern struct pmap kernel_pmap_store;
extern struct _vm_map *kernel_map;
extern const char version[];
extern char osversion[256], hostname[256];
extern const char ostype[], osrelease[];
extern struct machine_info machine_info;
extern struct tailq_head mountlist;
extern struct queue_entry threads;
extern void *allproc, *rootvnode;
