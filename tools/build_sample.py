"""Build the embedded sample: python tools/build_sample.py [--check]

The machine of Amit Singh's "Accessing Kernel Memory on the x86 Version of Mac OS X" (2006): an
Intel Mac with 10.4 that has loaded his kext, which put its own read routine into cdevsw[11]. The
file kvmtool/data/sample.zip is made here from nothing but the structure layouts: no byte of it is
Apple's. --check only says whether it is up to date.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import sys
import zipfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kvmtool.sample import README, RESOURCE  # noqa: E402
from kvmtool.types import layouts  # noqa: E402
from tests.builders import macho  # noqa: E402
from tests.builders.macho import N_SECT, Section, Sym  # noqa: E402
from tests.builders.xnu import (  # noqa: E402
    KERNEL_TASK,
    Built,
    CoreShape,
    KextSpec,
    Places,
    ProcSpec,
    build,
)

# The form is 10.4.6's; this kernel never was.
BANNER = (
    "Darwin Kernel Version 8.6.1: Tue Mar  7 16:55:45 PST 2006; "
    "root:xnu-792.9.22.obj~1/RELEASE_I386"
)
CDEVSW = 0x441720  # the article's
BDEVSW = 0x441480
KEXT = 0x3BD01000  # the article's
KEXT_HEADER = 0x1000
KEXT_SIZE = 0x3000
MAJOR = 11  # of the kext's devices
PLACES = Places(text=0x111000, data=0x405000, common=0x446000, full=True)

# The kext's symbols, in its object file; _my_mmread is at 0x114f in its memory, as in the article.
KEXT_TEXT = {
    "_KernelMemoryAccess_start": 0x0,
    "_KernelMemoryAccess_stop": 0x6A,
    "_verify_access": 0xB0,
    "_my_mmopen": 0x12B,
    "_my_mmclose": 0x13D,
    "_my_mmread": 0x14F,
    "_my_mmwrite": 0x1A8,
    "_my_mmioctl": 0x1BA,
    "_my_mmrw": 0x1CC,
}
KEXT_UNDEFINED = ["_cdevsw_add", "_cdevsw_remove", "_devfs_make_node", "_devfs_remove"]
KEXT_UNDEFINED += ["_kernel_pmap", "_panic", "_pmap_find_phys", "_printf", "_uiomove"]
_KMOD_INFO = 0x1F50  # in the object; KEXT_SIZE - up(sizeof(kmod_info), 16) - KEXT_HEADER

BOOT = 1_147_598_400  # 2006-05-14 09:20:00 UTC
AMIT = {"uid": 501, "gid": 501, "login": "amit", "groups": (501, 80, 81, 79)}
ROOT_GROUPS = (0, 1, 2, 3, 4, 5, 20, 29, 80)
TTYP1, TTYP2 = (4, 1), (4, 2)
SUGID = 0x4102  # P_SUGID | P_CONTROLT | P_EXEC: set-uid programs on a terminal
WAITING, RUNNING, SUSPENDED = 1, 4, 3
STOPPED = 4

MESSAGES = """\
standard timeslicing quantum is 10000 us
vm_page_bootstrap: 506210 free pages
mig_table_max_displ = 71
using 10485 buffer headers and 4096 cluster IO buffer headers
BSD root: disk0s2, major 14, minor 2
Jettisoning kernel linker.
"""

FUNCTIONS = """\
_bcopy _bzero _copyin _copyinstr _copyout _cpu_number _current_proc _current_task _current_thread
_devfs_make_node _devfs_remove _exit1 _falloc _fdfree _forkproc _get_bsdtask_info _hashinit _hzto
_kalloc _kernel_thread _kernel_trap _kfree _kmem_alloc _kmem_free _kvtophys _lck_mtx_lock
_lck_mtx_unlock _lo_alltraps _mach_msg_overwrite_trap _malloc _microtime _msleep _namei _pfind
_pgfind _pmap_enter _pmap_find_phys _pmap_map _pmap_pte _printf _proc_exit _psignal _seltrue
_securelevel_check _suser _sysctlbyname _task_suspend _task_terminate _thread_block
_thread_call_enter _thread_continue _tsleep _uiomove _unix_syscall _vfs_context_create _vm_fault
_vm_map_enter _vm_map_lookup_entry _vm_pageout _vnode_get _vnode_put _wakeup _zalloc _zfree _zinit
"""


def processes() -> list[ProcSpec]:
    """What ran, oldest first."""

    def daemon(pid: int, comm: str, after: int, **more: object) -> ProcSpec:
        facts: dict[str, object] = {"start": (BOOT + after, pid * 4099 % 1_000_000)}
        if "uid" not in more:
            facts["groups"] = ROOT_GROUPS
        return ProcSpec(pid, comm, **facts | more)  # type: ignore[arg-type]

    def shell(pid: int, comm: str, ppid: int, sid: int, after: int, **more: object) -> ProcSpec:
        tty = TTYP1 if sid == 231 else TTYP2
        owner = {} if "uid" in more else AMIT
        return daemon(pid, comm, after, ppid=ppid, sid=sid, tty=tty, **owner | more)

    root_here = {"uid": 0, "gid": 0, "groups": ROOT_GROUPS, "login": "amit"}
    login = root_here | {"ruid": 501, "rgid": 501, "flag": SUGID}
    return [
        KERNEL_TASK._replace(start=(BOOT, 0), groups=ROOT_GROUPS),
        daemon(1, "launchd", 0, ppid=0, threads=(WAITING,) * 3),
        daemon(27, "dynamic_pager", 9),
        daemon(31, "kextd", 10, threads=(WAITING,) * 2),
        daemon(36, "notifyd", 12, threads=(WAITING,) * 2),
        daemon(37, "syslogd", 12),
        daemon(38, "configd", 12, threads=(WAITING,) * 3),
        daemon(41, "diskarbitrationd", 13),
        daemon(56, "WindowServer", 15, uid=88, gid=88, threads=(WAITING,) * 2),
        daemon(61, "loginwindow", 16, threads=(WAITING,) * 3, **AMIT),
        daemon(150, "Dock", 48, ppid=56, pgid=56, sid=56, threads=(WAITING,) * 2, **AMIT),
        daemon(152, "Finder", 49, ppid=56, pgid=56, sid=56, threads=(WAITING,) * 4, **AMIT),
        daemon(228, "Terminal", 620, ppid=56, pgid=56, sid=56, threads=(WAITING,) * 4, **AMIT),
        shell(231, "login", 228, 231, 622, **login),
        shell(232, "bash", 231, 231, 622),
        shell(240, "vim", 232, 231, 705, stat=STOPPED, suspend_count=1, threads=(SUSPENDED,)),
        shell(244, "login", 228, 244, 760, **login),
        shell(245, "bash", 244, 244, 760),
        shell(251, "make", 245, 244, 801, xstat=0x200, zombie=True),
        shell(263, "sudo", 245, 244, 833, **login),
        shell(264, "dd", 263, 244, 833, pgid=263, threads=(RUNNING,), **root_here),
    ]


def kext_text() -> bytes:
    """The kext's __text: each function only returns; EFAULT where the real one would copy."""
    text = bytearray(0x1000)
    for at in KEXT_TEXT.values():
        code = bytes.fromhex("5589e5b80e0000005dc3")  # push ebp; mov ebp,esp; mov eax,14; pop; ret
        text[at : at + len(code)] = code
    return bytes(text)


def kext_file() -> bytes:
    """KernelMemoryAccess, an object file as kexts of that time are."""
    file = macho.MachO("i386", macho.MH_OBJECT)
    data = bytearray(0x1000)
    name = b"com.osxbook.kext.KernelMemoryAccess"
    struct.pack_into("<3I64s64s", data, _KMOD_INFO - 0x1000, 0, 1, 0xFFFFFFFF, name, b"1.0.0")
    sections = [
        Section("__text", "__TEXT", 0, 0x1000),
        Section("__data", "__DATA", 0x1000, 0x1000),
    ]
    file.segment("", 0, kext_text() + bytes(data), sections=sections)
    symbols = [Sym(name, at, N_SECT) for name, at in KEXT_TEXT.items()]
    symbols += [Sym("_kmod_info", _KMOD_INFO, n_sect=2)]
    symbols += [Sym(name, 0, macho.N_UNDF | macho.N_EXT, 0) for name in KEXT_UNDEFINED]
    file.symtab(symbols)
    return file.build()


def machine() -> Built:
    """The machine, its kext loaded and its devices opened to the kext."""
    base = KEXT + KEXT_HEADER
    slots = ("open", "close", "read", "write", "ioctl")
    patch = {f"d_{slot}": base + KEXT_TEXT[f"_my_mm{slot}"] for slot in slots}
    kexts = [
        KextSpec("com.apple.iokit.IOPCIFamily", 0x3A2C4000, 0x9000, "2.0"),
        KextSpec("com.apple.iokit.IOACPIFamily", 0x3A2D1000, 0x5000, "1.2.0"),
        KextSpec("com.apple.iokit.IOStorageFamily", 0x3A318000, 0x12000, "1.5"),
        KextSpec(
            "com.osxbook.kext.KernelMemoryAccess", KEXT, KEXT_SIZE, "1.0.0", image=kext_text()
        ),
    ]
    kexts[1] = kexts[1]._replace(references=(kexts[0].name,))
    return build(
        layouts.table("10.4.11 i386"),
        "i386",
        processes(),
        banner=BANNER,
        kexts=kexts,
        cdevsw={MAJOR: patch},
        loadavg=(655, 512, 389),
        osversion="8I1119",
        hostname="amits-mac-mini.local",
        msgbuf=MESSAGES,
        maxproc=532,
        places=PLACES,
        keep_linkedit=True,  # kern_dump wrote TEXT, DATA, PRELINK and LINK
        pinned={"_cdevsw": CDEVSW, "_bdevsw": BDEVSW},
        functions=FUNCTIONS.split(),
        core=CoreShape(pages=1 << 16),  # a segment per region, as kern_dump of that time
    )


def files() -> dict[str, bytes]:
    """The sample's files by name."""
    built = machine()
    return {
        "mach_kernel": built.kernel,
        "core": built.core,
        "KernelMemoryAccess": kext_file(),
        "README.txt": README.encode(),
    }


def pack(contents: dict[str, bytes]) -> bytes:
    """A zip whose bytes depend on the contents alone."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in contents.items():
            info = zipfile.ZipInfo(name, (2006, 5, 14, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return out.getvalue()


def unpacked() -> dict[str, bytes] | None:
    """What the resource holds now; None if there is none."""
    if not os.path.exists(RESOURCE):
        return None
    with zipfile.ZipFile(RESOURCE) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def main() -> int:
    """Exit status: 1 if --check finds the resource stale."""
    parser = argparse.ArgumentParser(description="build the embedded sample")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    contents = files()
    # contents are compared, not zips: another zlib packs the same bytes differently
    if unpacked() == contents:
        print(f"{os.path.relpath(RESOURCE, ROOT)} is up to date")
        return 0
    if check:
        print(f"{os.path.relpath(RESOURCE, ROOT)} is stale: run make sample")
        return 1
    packed = pack(contents)
    with open(RESOURCE, "wb") as out:
        out.write(packed)
    total = sum(map(len, contents.values()))
    print(f"{os.path.relpath(RESOURCE, ROOT)}: {len(packed):,} bytes for {total:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
