/*
 * Threads that wait: one on a kernel stack of its own, with the registers it saved when it gave up
 * the processor (osfmk/i386/cswitch.s, osfmk/i386/thread.h), one that goes on at a continuation.
 */
#include "kernel.h"

#define BLOCKED 16  /* the process whose first thread keeps its stack */
#define CONTINUES 1 /* ... whose first thread has none */
#define INTO 4      /* bytes: how far into its function a return address lies */

#define FUNCTIONS(X)                                                                              \
    X(thread_block_reason) X(msleep0) X(biowait) X(vn_read) X(mach_msg_continue)
FUNCTIONS(DEFINE)

/* Who called whom, the innermost first. */
static void *const callers[] = {thread_block_reason, msleep0, biowait, vn_read};
static u8 stack[KERNEL_STACK_SIZE] __attribute__((aligned(4096)));
static const struct thread *blocked;

/* struct x86_kernel_state, the last thing on a stack; up to xnu-1228 a link lies above it. */
struct saved {
#if defined(__x86_64__)
    uptr rbx, rsp, rbp, r12, r13, r14, r15, rip;
#else
    uptr ebx, rsp, rbp, edi, esi, rip, link;
#endif
};

struct frame {
    struct frame *caller;
    uptr returns;
};

static struct thread *first_thread(int pid) {
    struct thread *thread = threads.next;
    while (thread->task->bsd_info->p_pid != pid)
        thread = thread->threads.next;
    return thread;
}

void plant_stacks(void) {
    struct saved *saved = (struct saved *)(stack + sizeof stack) - 1;
    struct frame *frames = (struct frame *)saved - countof(callers);
    for (uptr n = 1; n < countof(callers); n++) {
        frames[n - 1].caller = n + 1 < countof(callers) ? &frames[n] : NULL;
        frames[n - 1].returns = (uptr)callers[n] + INTO;
    }
    saved->rip = (uptr)callers[0] + INTO;
    saved->rbp = (uptr)frames;
    saved->rsp = (uptr)frames - 4 * sizeof(uptr);
    struct thread *thread = first_thread(BLOCKED);
    thread->kernel_stack = (uptr)stack;
    blocked = thread;
    first_thread(CONTINUES)->continuation = mach_msg_continue;
}

static void tell_pointer(const char *name, uptr value) {
    if (value)
        print(", \"%s\": %p", name, value);
    else
        print(", \"%s\": null", name);
}

static void tell_frames(const struct thread *thread) {
    const struct saved *saved =
        (const struct saved *)(thread->kernel_stack + KERNEL_STACK_SIZE) - 1;
    print("{\"kind\": \"backtrace\", \"thread\": %p, \"pcs\": [%p", thread, saved->rip);
    for (const struct frame *at = (const struct frame *)saved->rbp; at; at = at->caller)
        print(", %p", at->returns);
    print("]}\n");
}

void tell_threads(void) {
    for (const struct thread *thread = threads.next; (const void *)thread != &threads;
         thread = thread->threads.next) {
        print("{\"kind\": \"thread\", \"address\": %p, \"pid\": %d, \"th_state\": %p", thread,
              thread->task->bsd_info->p_pid, (uptr)thread->state);
        print(", \"pri\": %d, \"base\": %d, \"task\": %p", (int)thread->sched_pri,
              (int)thread->priority, thread->task);
        print(", \"kernel_stack\": %p", thread->kernel_stack);
        tell_pointer("wait_event", thread->wait_event);
        tell_pointer("continuation", (uptr)thread->continuation);
        print("}\n");
    }
    tell_frames(blocked);
}
