/*
 * Processes: proc, task, threads, credentials, groups, sessions, terminals, the lists they are on,
 * and for two of them an address space of their own with arguments in it.
 * After bsd/kern/kern_fork.c, kern_proc.c, bsd_init.c and osfmk/kern/{task,thread}.c.
 */
#include "kernel.h"

#define SRUN 2 /* <sys/proc.h> */
#define SSTOP 4
#define SZOMB 5
#define P_CONTROLT 0x2
#define P_LP64 0x4
#define P_SYSTEM 0x200
#define P_EXEC 0x4000
#define TH_WAIT 1 /* osfmk/kern/thread.h */
#define TH_RUN 4
#define TH_UNINT 8
#define PTY_MAJOR 16
#define MAXPROC 532
#define PIDHASH 64 /* buckets */
#define EPOCH 1388534400 /* 2014-01-01 */
#define NO_TTY -1
#define MAX 16

struct spec {
    int pid, ppid, pgid, sid;
    u32 uid, ruid, gid;
    int tty; /* minor number of the session's terminal, or NO_TTY */
    u8 stat;
    signed char nice;
    u16 xstat;
    int threads, state;
    const char *comm, *name, *login;
    const char *arguments; /* as exec leaves them: separated by '\n' here, by NUL there */
    int argc;
};

static const struct spec specs[] = {
    {0, 0, 0, 0, 0, 0, 0, NO_TTY, SRUN, 0, 0, 3, TH_RUN, "kernel_task", "", "root", NULL, 0},
    {1, 0, 1, 1, 0, 0, 0, NO_TTY, SRUN, 0, 0, 3, TH_WAIT, "launchd", "launchd", "root",
     "/sbin/launchd\n", 1},
    {11, 1, 11, 11, 0, 0, 0, NO_TTY, SRUN, 0, 0, 2, TH_WAIT, "kextd", "kextd", "root", NULL, 0},
    {16, 1, 16, 16, 0, 0, 0, NO_TTY, SRUN, 0, 0, 5, TH_WAIT | TH_UNINT, "diskarbitrationd",
     "diskarbitrationd", "root", NULL, 0},
    {17, 1, 17, 17, 65, 65, 65, NO_TTY, SRUN, 0, 0, 2, TH_WAIT, "mDNSResponder", "mDNSResponder",
     "root", NULL, 0},
    {88, 1, 88, 88, 501, 501, 20, NO_TTY, SRUN, 0, 0, 4, TH_WAIT, "loginwindow", "loginwindow",
     "amit", NULL, 0},
    {143, 88, 143, 88, 501, 501, 20, NO_TTY, SRUN, 10, 0, 1, TH_WAIT, "com.apple.dock.extra",
     "com.apple.dock.extra.and.a.very.long.name", "amit", NULL, 0},
    {201, 88, 201, 201, 0, 501, 20, 0, SRUN, 0, 0, 1, TH_WAIT, "login", "login", "amit", NULL, 0},
    {202, 201, 202, 201, 501, 501, 20, 0, SRUN, 0, 0, 1, TH_WAIT, "bash", "bash", "amit",
     "-bash\n-i\nTERM=vt100\nHOME=/Users/amit\n", 2},
    {215, 202, 215, 201, 501, 501, 20, 0, SSTOP, 0, 0, 1, TH_WAIT, "vim", "vim", "amit", NULL, 0},
    {216, 202, 216, 201, 0, 501, 20, 0, SRUN, -5, 0, 1, TH_RUN, "dd", "dd", "amit", NULL, 0},
    {217, 202, 217, 201, 501, 501, 20, 0, SZOMB, 0, 512, 0, 0, "make", "make", "amit", NULL, 0},
};
#define FOREGROUND 216 /* the group that has the terminal */
#define COUNT countof(specs)

void *allproc, *zombproc;
struct proc *kernproc, *initproc;
struct task *kernel_task;
struct proc proc0 __attribute__((aligned(16)));
struct pgrp pgrp0 __attribute__((aligned(16)));
struct session session0 __attribute__((aligned(16)));
struct queue_entry tasks, threads;
int tasks_count, threads_count;
int nprocs, maxproc = MAXPROC;
void **pidhashtbl;
uptr pidhash = PIDHASH - 1;

static struct proc *procs[MAX];
static struct pgrp *pgrps[MAX];
static struct session *sessions[MAX];
static struct ucred *creds[MAX];
static int ncreds;
static struct tty *terminal;

/* Index of the process whose pid is `pid`; groups and sessions go by their leaders. */
static uptr index_of(int pid) {
    uptr n = 0;
    while (specs[n].pid != pid)
        n++;
    return n;
}

static void *static_or_new(uptr n, void *object, uptr size) {
    return n == 0 ? object : zalloc(size);
}

/* Credentials are shared by all who are alike (kauth_cred_update). */
static struct ucred *credential(const struct spec *spec) {
    for (int n = 0; n < ncreds; n++) {
        const struct posix_cred *known = posix_cred_of(creds[n]);
        if (known->cr_uid == spec->uid && known->cr_ruid == spec->ruid &&
            known->cr_groups[0] == spec->gid) {
            creds[n]->cr_ref++;
            return creds[n];
        }
    }
    struct ucred *cred = creds[ncreds++] = zalloc(sizeof *cred);
    struct posix_cred *posix = posix_cred_of(cred);
    cred->cr_ref = 1;
    posix->cr_uid = posix->cr_svuid = posix->cr_gmuid = spec->uid;
    posix->cr_ruid = spec->ruid;
    posix->cr_rgid = posix->cr_svgid = posix->cr_groups[0] = spec->gid;
    posix->cr_ngroups = 1;
    if (spec->uid == 501) {
        posix->cr_groups[1] = 12;
        posix->cr_groups[2] = 80;
        posix->cr_ngroups = 3;
    }
    return cred;
}

static void join_group(uptr n) {
    const struct spec *spec = &specs[n];
    uptr leader = index_of(spec->pgid), session = index_of(spec->sid);
    if (!sessions[session]) {
        struct session *new = static_or_new(session, &session0, sizeof *new);
        sessions[session] = new;
        new->s_sid = spec->sid;
        new->s_leader = procs[session];
        copy_text(new->s_login, spec->login, sizeof new->s_login);
    }
    sessions[session]->s_count++;
    if (!pgrps[leader]) {
        struct pgrp *new = static_or_new(leader, &pgrp0, sizeof *new);
        pgrps[leader] = new;
        new->pg_id = spec->pgid;
        new->pg_session = sessions[session];
    }
    procs[n]->p_pgrp = pgrps[leader];
    list_insert_head(&pgrps[leader]->pg_members, procs[n], offsetof(struct proc, p_pglist));
}

static void open_terminal(void) {
    struct session *session = sessions[index_of(201)];
    terminal = zalloc(sizeof *terminal);
    terminal->t_dev = PTY_MAJOR << 24 | 0;
    terminal->t_session = session;
    terminal->t_pgrp = pgrps[index_of(FOREGROUND)];
    session->s_ttyp = terminal;
    session->s_ttypgrpid = FOREGROUND;
}

static void new_thread(struct task *task, struct proc *proc, int state) {
    static u32 thread_id;
    struct thread *thread = zalloc(sizeof *thread);
    struct uthread *uthread = zalloc(sizeof *uthread);
    thread->task = task;
    thread->state = state;
    thread->sched_pri = thread->priority = 31;
    thread->wait_event = state & TH_WAIT ? (uptr)&proc->p_list : 0;
    SET_thread_thread_id(thread, ++thread_id);
    thread->active = 1;
    thread->uthread = uthread;
    uthread->uu_proc = proc;
    SET_uthread_uu_thread(uthread, thread);
    tailq_insert_tail(&proc->p_uthlist, uthread, offsetof(struct uthread, uu_list));
    queue_enter(&task->threads, thread, offsetof(struct thread, task_threads));
    queue_enter(&threads, thread, offsetof(struct thread, threads));
    threads_count++;
}

static void new_task(uptr n) {
    struct task *task = zalloc(sizeof *task);
    procs[n]->task = task;
    task->bsd_info = procs[n];
    task->active = 1;
    task->map = kernel_map;
    task->thread_count = specs[n].threads;
    task->suspend_count = specs[n].stat == SSTOP;
    queue_init(&task->threads);
    for (int thread = 0; thread < specs[n].threads; thread++)
        new_thread(task, procs[n], thread ? TH_WAIT : specs[n].state);
    queue_enter(&tasks, task, offsetof(struct task, tasks));
    tasks_count++;
}

static void new_proc(uptr n) {
    const struct spec *spec = &specs[n];
    struct proc *proc = procs[n];
    proc->p_pid = spec->pid;
    proc->p_ppid = spec->ppid;
    proc->p_pgrpid = spec->pgid;
    proc->p_pptr = procs[index_of(spec->ppid)];
    proc->p_ucred = credential(spec);
    SET_proc_p_uid(proc, spec->uid);
    SET_proc_p_gid(proc, spec->gid);
    SET_proc_p_ruid(proc, spec->ruid);
    SET_proc_p_rgid(proc, spec->gid);
    SET_proc_p_svuid(proc, spec->uid);
    SET_proc_p_svgid(proc, spec->gid);
    SET_proc_p_uniqueid(proc, (u32)spec->pid + 1);
    SET_proc_p_puniqueid(proc, (u32)spec->ppid + 1);
    proc->p_idversion = (u32)spec->pid + 1;
    proc->p_stat = spec->stat;
    proc->p_nice = spec->nice;
    proc->p_xstat = spec->xstat;
    proc->p_flag = spec->pid ? P_EXEC : P_SYSTEM;
    proc->p_flag |= (spec->tty == NO_TTY ? 0 : P_CONTROLT) | (sizeof(uptr) == 8 ? P_LP64 : 0);
    proc->p_start.tv_sec = EPOCH + spec->pid;
    proc->p_start.tv_usec = spec->pid * 4001;
    copy_text(proc->p_comm, spec->comm, sizeof proc->p_comm);
    copy_text(proc->p_name, spec->name, sizeof proc->p_name);
    if (spec->pid)
        list_insert_head(&proc->p_pptr->p_children, proc, offsetof(struct proc, p_sibling));
}

static void link_proc(uptr n) {
    struct proc *proc = procs[n];
    int zombie = specs[n].stat == SZOMB;
    list_insert_head(zombie ? &zombproc : &allproc, proc, offsetof(struct proc, p_list));
    if (specs[n].pid) /* proc 0 is never hashed: bsd_init.c */
        list_insert_head(&pidhashtbl[(uptr)specs[n].pid & pidhash], proc,
                         offsetof(struct proc, p_hash));
    nprocs++;
}

/* The strings exec leaves at the top of the stack: the path, padding, arguments, environment. */
static u32 write_arguments(u8 *page, const struct spec *spec) {
    static u8 text[512];
    u32 size = 0;
    const char *end = spec->arguments;
    while (*end != '\n')
        text[size++] = (u8)(*end++ == '-' ? '/' : end[-1]);
    for (text[size++] = 0; size % sizeof(uptr); size++)
        text[size] = 0;
    for (const char *at = spec->arguments; *at; at++)
        text[size++] = *at == '\n' ? 0 : (u8)*at;
    for (; size % sizeof(uptr); size++)
        text[size] = 0;
    memcpy(page + PAGE - size, text, size);
    return size;
}

/* A page table of its own, as XNU has it: on x86_64 with the kernel's half in it, on i386 without. */
static void new_space(struct boot_args *boot, uptr n) {
    struct pmap *pmap = zalloc(sizeof *pmap);
    struct _vm_map *map = zalloc(sizeof *map);
    u64 root = pool_page(boot), page = pool_page(boot);
    if (sizeof(uptr) == 8)
        memcpy((u64 *)at_physical(boot, root) + 256, (u64 *)at_physical(boot, boot->root) + 256,
               PAGE / 2);
    map_page(boot, root, USER_STACK - PAGE, page, PTE_W | PTE_U | (sizeof(uptr) == 8 ? PTE_NX : 0));
    pmap->pm_cr3 = root;
    map->pmap = pmap;
    procs[n]->task->map = map;
    procs[n]->p_argslen = (int)write_arguments(at_physical(boot, page), &specs[n]);
    procs[n]->p_argc = specs[n].argc;
    procs[n]->user_stack = USER_STACK;
}

void plant_processes(struct boot_args *boot) {
    queue_init(&tasks);
    queue_init(&threads);
    pidhashtbl = zalloc(PIDHASH * sizeof *pidhashtbl);
    for (uptr n = 0; n < COUNT; n++)
        procs[n] = static_or_new(n, &proc0, sizeof(struct proc));
    for (uptr n = 0; n < COUNT; n++) {
        new_proc(n);
        join_group(n);
        if (specs[n].stat != SZOMB) /* proc_exit: task = TASK_NULL */
            new_task(n);
        link_proc(n);
        if (specs[n].arguments)
            new_space(boot, n);
    }
    open_terminal();
    kernproc = procs[0];
    initproc = procs[1];
    kernel_task = procs[0]->task;
}

static void tell_arguments(const struct spec *spec) {
    const char *at = spec->arguments;
    print(", \"strings\": [");
    while (at && *at) {
        char text[64] = {0};
        uptr size = 0;
        while (*at != '\n')
            text[size++] = *at++;
        at++;
        print("\"%s\"%s", text, *at ? ", " : "");
    }
    print("]");
}

/* Told from the structures, along the kernel's own lists. */
static void tell_process(const struct proc *proc) {
    const struct pgrp *pgrp = proc->p_pgrp;
    const struct session *session = pgrp->pg_session;
    const struct posix_cred *posix = posix_cred_of(proc->p_ucred);
    print("{\"kind\": \"process\", \"pid\": %d, \"ppid\": %d, \"pgid\": %d, \"sid\": %d", proc->p_pid,
          proc->p_pptr->p_pid, pgrp->pg_id, session->s_sid);
    print(", \"uid\": %u, \"ruid\": %u, \"svuid\": %u, \"rgid\": %u, \"svgid\": %u", posix->cr_uid,
          posix->cr_ruid, posix->cr_svuid, posix->cr_rgid, posix->cr_svgid);
    print(", \"gid\": %u, \"groups\": [%u", posix->cr_groups[0], posix->cr_groups[0]);
    for (int n = 1; n < posix->cr_ngroups; n++)
        print(", %u", posix->cr_groups[n]);
    print("], \"login\": \"%s\", \"tdev\": ", session->s_login);
    if (session->s_ttyp)
        print("%p", (uptr)session->s_ttyp->t_dev);
    else
        print("null");
    print(", \"stat\": %d, \"flag\": %u, \"nice\": %d, \"xstat\": %d", (int)proc->p_stat, proc->p_flag,
          (int)proc->p_nice, (int)proc->p_xstat);
    print(", \"start_raw\": [%u, %d], \"comm\": \"%s\", \"name\": \"%s\"", (u32)proc->p_start.tv_sec,
          proc->p_start.tv_usec, proc->p_comm, proc->p_name);
    print(", \"threads\": %d, \"address\": %p, \"task\": ", proc->task ? proc->task->thread_count : 0,
          proc);
    if (proc->task)
        print("%p", proc->task);
    else
        print("null");
    print(", \"ucred\": %p, \"parent\": %p, \"pgrp\": %p, \"session\": %p", proc->p_ucred,
          proc->p_pptr, pgrp, session);
    if (proc->p_argc)
        print(", \"argc\": %d, \"argslen\": %d, \"user_stack\": %p, \"cr3\": %p", proc->p_argc,
              proc->p_argslen, (uptr)proc->user_stack, (uptr)proc->task->map->pmap->pm_cr3);
    tell_arguments(&specs[index_of(proc->p_pid)]);
    print("}\n");
}

void tell_processes(void) {
    for (const struct proc *proc = allproc; proc; proc = proc->p_list.le_next)
        tell_process(proc);
    for (const struct proc *proc = zombproc; proc; proc = proc->p_list.le_next)
        tell_process(proc);
}
