"""The embedded samples to try every command on, unpacked by `kvmtool demo`.

The first is the machine of Amit Singh's article "Accessing Kernel Memory on the x86 Version of Mac
OS X" (2006), made by tools/build_sample.py from the layouts of 10.4; the second is physical memory
of a kernel of our own that ran under QEMU (tools/pack_machine_sample.py).
"""

from __future__ import annotations

import errno
import os

from kvmtool.errors import FormatError
from kvmtool.new_file import new_file

_DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
RESOURCE = os.path.join(_DATA, "sample.zip")
RESOURCES = {"article": RESOURCE, "machine": os.path.join(_DATA, "machine.zip")}

README = """\
A made-up crash of an Intel Mac with Mac OS X 10.4

This is the machine of Amit Singh's article "Accessing Kernel Memory on the x86 Version of
Mac OS X" (2006). His kext KernelMemoryAccess gives the machine a /dev/kmem again: it puts its own
routines into the kernel's table of character devices, cdevsw, as major number 11.

No byte here is Apple's. The structures lie where a 10.4 kernel has them, and the addresses that
the article prints are the article's; processes, times and all else are invented.

  mach_kernel         the kernel's file, with symbols
  core                the kernel's memory when it crashed
  KernelMemoryAccess  the kext's file

What to type in this folder:

  kvmtool -N mach_kernel nlist _cdevsw
      the table is at 0x441720

  kvmtool -N mach_kernel -M core read 0x441990 4
      0x441990 is cdevsw[11].d_read: an entry has 0x38 bytes, d_read is 8 bytes into it.
      The four bytes 4f 21 d0 3b are the address 0x3bd0214f, and no routine of the kernel lies
      that high: the kext was loaded at 0x3bd01000, its code begins 0x1000 bytes later, and
      _my_mmread is 0x14f bytes into that.

  kvmtool -N KernelMemoryAccess nlist _my_mmread
      where the routine is in the kext's file

  kvmtool -N mach_kernel -M core procs
      who was running: one process is stopped, one is a zombie. Without -N it works too: the
      kernel's symbols are in the core.

  kvmtool -N mach_kernel -M core info
      everything known about both files
"""

MACHINE_README = """\
Physical memory of a machine that really ran

A small kernel of the project's own (tests/machine in its source) booted under QEMU, slid by a
random amount, with the structures of 10.9 and a kext whose read routine sits in cdevsw[11]. This is
its memory as LiME, the pages it mapped only. No byte here is Apple's.

  mach_kernel   the kernel's file, with symbols
  memory.lime   physical memory
  serial.jsonl  what the kernel said of itself on its serial line: the truth to compare with

What to type in this folder:

  kvmtool -N mach_kernel -M memory.lime info      where the page tables and the slide were found
  kvmtool -N mach_kernel -M memory.lime procs
  kvmtool -N mach_kernel -M memory.lime vtop _cdevsw
  kvmtool -N mach_kernel -M memory.lime regions
"""


def write(directory: str, which: str = "article") -> list[str]:
    """Unpack a sample into `directory`, made if need be; gives the paths of its files.

    `which` is "article" (the machine of Amit Singh's article) or "machine" (memory of a kernel of
    our own that ran under QEMU).

    Files that are there already and equal are left alone. Nothing is written if one differs.

    Raises: FileExistsError naming the file that differs; other OSErrors as open(2) and mkdir(2);
    FormatError if the resource is damaged.
    """
    contents = _unpack(RESOURCES[which])
    paths = {os.path.join(directory, name): content for name, content in contents.items()}
    missing = [path for path, content in paths.items() if not _holds(path, content)]
    os.makedirs(directory, exist_ok=True)
    for path in missing:
        with new_file(path) as out:
            out.write(paths[path])
    return list(paths)


def _holds(path: str, content: bytes) -> bool:
    """Whether `path` has exactly `content`; False if there is no such file."""
    try:
        with open(path, "rb") as existing:
            same = existing.read(len(content) + 1) == content
    except FileNotFoundError:
        return False
    if not same:
        raise FileExistsError(errno.EEXIST, "is there already and differs from the sample", path)
    return True


def _unpack(resource: str) -> dict[str, bytes]:
    """File name → content, as packed by tools/build_sample.py or pack_machine_sample.py."""
    import zipfile  # 8 ms that only this command spends
    import zlib
    from lzma import LZMAError

    try:
        with zipfile.ZipFile(resource) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error, LZMAError) as exc:
        raise FormatError(resource, None, f"is damaged ({exc}): reinstall kvmtool") from exc
