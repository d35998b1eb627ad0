/* The sysctl tree: two nodes, leaves of each kind that memory answers, one that computes. */
#include "kernel.h"

#define CTLTYPE_NODE 1 /* <sys/sysctl.h> */
#define CTLTYPE_INT 2
#define CTLTYPE_STRING 3
#define CTLTYPE_QUAD 4
#define CTLFLAG_RD 0x80000000
#define CTLFLAG_WR 0x40000000

#define FUNCTIONS(X)                                                                              \
    X(sysctl_handle_int) X(sysctl_handle_string) X(sysctl_handle_quad) X(sysctl_procname)
FUNCTIONS(DEFINE)

extern int maxproc;
void *sysctl__children;
static const int vectorunit = -1;
static void *kern_children, *hw_children;

static const struct leaf {
    void **list;
    const char *node, *name;
    int node_number, number;
    u32 kind;
    const void *arg1;
    int arg2;
    void *handler;
    const char *fmt;
} leaves[] = {
    {&kern_children, "kern", "ostype", 1, 1, CTLFLAG_RD | CTLTYPE_STRING, ostype, 0,
     sysctl_handle_string, "A"},
    {&kern_children, "kern", "osrelease", 1, 2, CTLFLAG_RD | CTLTYPE_STRING, osrelease, 0,
     sysctl_handle_string, "A"},
    {&kern_children, "kern", "maxproc", 1, 6, CTLFLAG_RD | CTLFLAG_WR | CTLTYPE_INT, &maxproc, 0,
     sysctl_handle_int, "I"},
    {&kern_children, "kern", "hostname", 1, 10, CTLFLAG_RD | CTLFLAG_WR | CTLTYPE_STRING, hostname,
     sizeof hostname, sysctl_handle_string, "A"},
    {&kern_children, "kern", "procname", 1, 62, CTLFLAG_RD | CTLTYPE_STRING, NULL, 0,
     sysctl_procname, "A"},
    {&hw_children, "hw", "ncpu", 6, 3, CTLFLAG_RD | CTLTYPE_INT, NULL, 1, sysctl_handle_int, "I"},
    {&hw_children, "hw", "memsize", 6, 24, CTLFLAG_RD | CTLTYPE_QUAD, &machine_info.max_mem, 0,
     sysctl_handle_quad, "Q"},
    {&hw_children, "hw", "vectorunit", 6, 13, CTLFLAG_RD | CTLTYPE_INT, &vectorunit, 0,
     sysctl_handle_int, "I"},
};
/* SLIST_INSERT_AFTER the last, as sysctl_register_oid keeps them in order. */
static struct sysctl_oid *append(void **list, int number, u32 kind, const char *name) {
    struct sysctl_oid *oid = zalloc(sizeof *oid);
    oid->oid_parent = list;
    oid->oid_number = number;
    oid->oid_kind = (int)kind;
    oid->oid_name = name;
    while (*list)
        list = &((struct sysctl_oid *)*list)->oid_link;
    *list = oid;
    return oid;
}

void plant_sysctl(void) {
    for (uptr n = 0; n < countof(leaves); n++) {
        const struct leaf *leaf = &leaves[n];
        if (!*leaf->list) {
            struct sysctl_oid *node = append(&sysctl__children, leaf->node_number,
                                             CTLFLAG_RD | CTLTYPE_NODE, leaf->node);
            node->oid_arg1 = leaf->list;
            node->oid_fmt = "N";
        }
        struct sysctl_oid *oid = append(leaf->list, leaf->number, leaf->kind, leaf->name);
        oid->oid_arg1 = (void *)leaf->arg1;
        oid->oid_arg2 = leaf->arg2;
        oid->oid_handler = leaf->handler;
        oid->oid_fmt = leaf->fmt;
    }
}

static void tell_value(const struct sysctl_oid *oid) {
    if (oid->oid_handler == (void *)sysctl_handle_string)
        print("\"%s\"", (const char *)oid->oid_arg1);
    else if (oid->oid_handler == (void *)sysctl_handle_int)
        print("%d", oid->oid_arg1 ? *(const int *)oid->oid_arg1 : oid->oid_arg2);
    else if (oid->oid_handler == (void *)sysctl_handle_quad)
        print("%u", (u32)*(const u64 *)oid->oid_arg1);
    else
        print("null");
}

void tell_sysctl(void) {
    for (const struct sysctl_oid *node = sysctl__children; node; node = node->oid_link)
        for (const struct sysctl_oid *oid = *(void **)node->oid_arg1; oid; oid = oid->oid_link) {
            print("{\"kind\": \"sysctl\", \"name\": \"%s.%s\", \"mib\": [%d, %d], \"value\": ",
                  node->oid_name, oid->oid_name, node->oid_number, oid->oid_number);
            tell_value(oid);
            print(", \"address\": %p, \"handler\": %p}\n", oid, oid->oid_handler);
        }
}
