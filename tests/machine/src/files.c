/* What one process holds open: its program, a directory, a file, both ends of a pipe. */
#include "kernel.h"

#define OWNER 202
#define SLOTS 25 /* NDEXTENT, <sys/filedesc.h> */
#define VROOT 0x1
#define VREG 1 /* enum vtype */
#define VDIR 2
#define DTYPE_VNODE 1 /* <sys/file_internal.h> */
#define DTYPE_PIPE 6
#define FREAD 1
#define FWRITE 2
#define UF_EXCLOSE 1

static struct fileops vnops, pipeops;
static struct filedesc *table;
static const struct vnode *text;

static struct vnode *new_vnode(struct vnode *parent, u16 type, const char *name) {
    struct vnode *vnode = zalloc(sizeof *vnode);
    vnode->v_type = type;
    vnode->v_flag = parent ? 0 : VROOT;
    vnode->v_name = name;
    vnode->v_parent = parent;
    vnode->v_mount = mountlist.tqh_first;
    vnode->v_usecount = 1;
    return vnode;
}

static void open_slot(int fd, int type, void *data, u32 flag, u32 offset) {
    struct fileproc *fileproc = zalloc(sizeof *fileproc);
    struct fileglob *glob = zalloc(sizeof *glob);
    fileproc->f_fglob = glob;
    glob->fg_flag = flag;
    glob->fg_count = 1;
    glob->fg_ops = type == DTYPE_VNODE ? &vnops : &pipeops;
    SET_fileglob_fg_type(glob, type);
    glob->fg_offset = offset;
    glob->fg_data = data;
    table->fd_ofiles[fd] = fileproc;
    table->fd_lastfile = fd;
}

void plant_files(void) {
    struct vnode *root = rootvnode = new_vnode(NULL, VDIR, NULL);
    struct vnode *bin = new_vnode(root, VDIR, "bin"), *etc = new_vnode(root, VDIR, "etc");
    struct vnode *hosts = new_vnode(etc, VREG, "hosts");
    struct pipe *reader = zalloc(sizeof *reader), *writer = zalloc(sizeof *writer);
    struct proc *proc = allproc;
    while (proc->p_pid != OWNER)
        proc = proc->p_list.le_next;
    reader->pipe_peer = writer;
    writer->pipe_peer = reader;
    SET_fileops_fo_type(&vnops, DTYPE_VNODE);
    SET_fileops_fo_type(&pipeops, DTYPE_PIPE);
    proc->p_textvp = new_vnode(bin, VREG, "bash");
    text = proc->p_textvp;
    proc->p_fd = table = zalloc(sizeof *table);
    table->fd_ofiles = zalloc(SLOTS * sizeof *table->fd_ofiles);
    table->fd_ofileflags = zalloc(SLOTS);
    table->fd_nfiles = SLOTS;
    table->fd_cdir = etc;
    open_slot(0, DTYPE_VNODE, hosts, FREAD, 158);
    open_slot(3, DTYPE_PIPE, reader, FREAD, 0);
    open_slot(5, DTYPE_PIPE, writer, FWRITE, 0);
    table->fd_ofileflags[5] = UF_EXCLOSE;
}

static void tell_path(const struct vnode *vnode) {
    if (!vnode->v_parent)
        return;
    tell_path(vnode->v_parent);
    print("/%s", vnode->v_name);
}

static void tell_vnode(const char *fd, const struct vnode *vnode) {
    print("{\"kind\": \"file\", \"pid\": %d, \"fd\": \"%s\", \"vnode\": %p, \"path\": \"", OWNER, fd,
          vnode);
    tell_path(vnode);
    print("\"}\n");
}

void tell_files(void) {
    tell_vnode("cwd", table->fd_cdir);
    tell_vnode("txt", text);
    for (int fd = 0; fd <= table->fd_lastfile; fd++) {
        const struct fileproc *fileproc = table->fd_ofiles[fd];
        if (!fileproc)
            continue;
        const struct fileglob *glob = fileproc->f_fglob;
        print("{\"kind\": \"file\", \"pid\": %d, \"fd\": %d, \"flag\": %u, \"offset\": %u", OWNER, fd,
              glob->fg_flag, (u32)glob->fg_offset);
        print(", \"data\": %p, \"cloexec\": %s", glob->fg_data,
              table->fd_ofileflags[fd] & UF_EXCLOSE ? "true" : "false");
        if (glob->fg_ops == &pipeops) {
            print(", \"peer\": %p}\n", ((const struct pipe *)glob->fg_data)->pipe_peer);
            continue;
        }
        print(", \"path\": \"");
        tell_path(glob->fg_data);
        print("\"}\n");
    }
}
