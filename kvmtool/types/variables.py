"""What XNU's variables and everyday typedefs are, for kernels whose own types are not at hand.

A variable's type may have changed; then several are listed, and the first that this kernel's
structures allow is taken: the condition names a structure, or a member of one. Sources are the XNU
files named, from xnu-792 (10.4) to xnu-11417 (15.5).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.types.ctype import Array, Typedef

if TYPE_CHECKING:
    from kvmtool.types.ctype import CType
    from kvmtool.types.layout_types import LayoutTypes

# Name, type text (of `layout_texts`; "[]" is an array of unsaid length), condition or nothing.
_TABLE = """
# bsd/kern/bsd_init.c, kern_proc.c, kern_fork.c
kernproc proc*
initproc proc*
proc0 proc
allproc proclist
zombproc proclist
nprocs int
maxproc int
maxprocperuid int
pidhashtbl pidhashhead*
pidhash unsigned long
pgrphashtbl pgrphashhead*
pgrphash unsigned long
sesshashtbl sesshashhead*
nfiles int
maxfiles int
filehead filelist
proc_struct_size unsigned long
hz int
tick int
hostname char[256]
domainname char[256]
hostid long
boothowto int
# config/version.c, bsd/kern/kern_sysctl.c
version char[]
version_major int
version_minor int
version_revision int
ostype char[]
osrelease char[]
osversion char[]
osproductversion char[48]
panicstr char*
debugger_panic_str char*
debug_buf_ptr char*
debug_buf_base char*
debug_buf_size unsigned int
kernel_uuid_string char[37]
# bsd/kern/bsd_stubs.c, bsd/sys/conf.h
cdevsw cdevsw[]
bdevsw bdevsw[]
linesw linesw[]
nchrdev int
nblkdev int
nlinesw int
constty tty*
# bsd/kern/init_sysent.c
sysent sysent[]
nsysent int
# bsd/vfs/vfs_subr.c, vfs_conf.c
mountlist mntlist
rootvnode vnode*
rootvp vnode*
rootdev int
vfsconf vfstable*
desiredvnodes int
# bsd/kern/subr_log.c, bsd/sys/msgbuf.h
msgbufp msgbuf*
msgbuf msgbuf
aslbufp msgbuf*
# libkern/c++/OSKext.cpp, osfmk/kern/kmod.c, libkern/OSKextLibPrivate.h
kmod kmod_info*
gLoadedKextSummaries _loaded_kext_summary_header*
# osfmk/kern/task.c, thread.c, startup.c
kernel_task task*
tasks queue_entry
tasks_count int
terminated_tasks queue_entry
threads queue_entry
threads_count int
default_pset processor_set
pset0 processor_set
# osfmk/kern/processor.c, machine.c, host.c
processor_list processor*
processor_count unsigned int
processor_array processor*[]
master_processor processor*
realhost host
machine_info machine_info
avenrun unsigned int[3]
mach_factor unsigned int[3]
averunnable loadavg
# osfmk/vm
kernel_map _vm_map*
kernel_pmap pmap*
kernel_pmap_store pmap
kernel_object vm_object*
vm_page_free_count unsigned int
vm_page_active_count unsigned int
vm_page_inactive_count unsigned int
vm_page_wire_count unsigned int
vm_page_speculative_count unsigned int
vm_page_throttled_count unsigned int
vm_page_purgeable_count unsigned int
max_mem unsigned long long
sane_size unsigned long long
vm_kernel_slide unsigned long
vm_kernel_stext unsigned long
vm_kernel_base unsigned long
vm_kernel_top unsigned long
# osfmk/kern/zalloc.c: a list up to 10.11, an array since
first_zone zone*
last_zone zone**
zone_array zone[]
num_zones unsigned short zone.z_self
num_zones unsigned int
# bsd/netinet, bsd/net, bsd/kern/uipc_domain.c
tcbinfo inpcbinfo
udbinfo inpcbinfo
ripcbinfo inpcbinfo
tcb inpcbhead
udb inpcbhead
ifnet_head ifnethead
ifnet ifnethead
in_ifaddrhead in_ifaddrhead
domains domain* domain.dom_next
domains domains_head
localdomain domain*
lo_ifp ifnet*
# bsd/kern/tty_ptmx.c, bsd/kern/tty_pty.c
pt_tty tty*[]
# pexpert/gen
PE_state PE_state
# osfmk/i386, osfmk/x86_64
lowGlo lowglo
cpu_data_ptr cpu_data*[]
BootPML4 unsigned long long[512]
BootPDPT unsigned long long[512]
IdlePML4 unsigned long long*
IdlePDPT unsigned long long*
IdlePTD unsigned long long*
"""

# bsd/sys/types.h, bsd/<arch>/types.h, osfmk/mach/<arch>/vm_types.h, osfmk/kern/kern_types.h
_TYPEDEFS = """
int8_t signed char
int16_t short
int32_t int
int64_t long long
uint8_t unsigned char
uint16_t unsigned short
uint32_t unsigned int
uint64_t unsigned long long
u_int8_t unsigned char
u_int16_t unsigned short
u_int32_t unsigned int
u_int64_t unsigned long long
u_char unsigned char
u_short unsigned short
u_int unsigned int
u_long unsigned long
uint unsigned int
ushort unsigned short
intptr_t long
uintptr_t unsigned long
size_t unsigned long
ssize_t long
boolean_t int
bool _Bool
caddr_t char*
daddr_t int
dev_t int
fixpt_t unsigned int
gid_t unsigned int
id_t unsigned int
ino_t unsigned int
mode_t unsigned short
off_t long long
pid_t int
uid_t unsigned int
time_t long
uuid_t unsigned char[16]
addr64_t unsigned long long
mach_vm_address_t unsigned long long
mach_vm_size_t unsigned long long
natural_t unsigned int
integer_t int
user_addr_t unsigned long long
vm_address_t unsigned long
vm_offset_t unsigned long
vm_size_t unsigned long
mach_port_name_t unsigned int
ppnum_t unsigned int
proc_t proc*
task_t task*
thread_t thread*
vnode_t vnode*
mount_t mount*
socket_t socket*
ifnet_t ifnet*
kauth_cred_t ucred*
vm_map_t _vm_map*
pmap_t pmap*
zone_t zone*
processor_t processor*
ipc_space_t ipc_space*
ipc_port_t ipc_port*
uthread_t uthread*
queue_t queue_entry*
queue_head_t queue_entry
queue_chain_t queue_entry
kmod_info_t kmod_info
"""

TYPEDEFS = dict(line.split(" ", 1) for line in _TYPEDEFS.strip().splitlines())


class _Entry(NamedTuple):
    """A variable's type text, and the structure's member that must be there for it."""

    text: str
    condition: tuple[str, str] | None


@functools.cache
def entries() -> dict[str, list[_Entry]]:
    table: dict[str, list[_Entry]] = {}
    for line in _TABLE.strip().splitlines():
        if line.startswith("#"):
            continue
        name, _, text = line.partition(" ")
        first, _, last = text.rpartition(" ")
        tag, dot, member = last.partition(".")
        entry = _Entry(first, (tag, member)) if dot else _Entry(text, None)
        table.setdefault(name, []).append(entry)
    return table


def variable(name: str, source: LayoutTypes) -> CType | None:
    """The type of XNU's variable `name`; None if it is not in the table, or its structure not.

    An array of unsaid length is one of no `count`.
    """
    for entry in entries().get(name, ()):
        if entry.condition is not None:
            tag, member = entry.condition
            flat = source.flat(tag)
            if flat is None or member not in flat.members:
                continue
        text = entry.text.removesuffix("[]")
        found = source.named(text)
        return Array(found, None) if found is not None and text != entry.text else found
    return None


def typedef(name: str, source: LayoutTypes) -> CType | None:
    """The everyday typedef `name`; None if it is none of those."""
    text = TYPEDEFS.get(name)
    found = None if text is None else source.named(text)
    return None if found is None else Typedef(name, found)
