"""The embedded sample: a made-up crash to try every command on, unpacked by `kvmtool demo`.

It is the machine of Amit Singh's article "Accessing Kernel Memory on the x86 Version of Mac OS X"
(2006), made by tools/build_sample.py from the layouts of 10.4.
"""

from __future__ import annotations

import errno
import os

from kvmtool.errors import FormatError

RESOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "sample.zip")

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


def write(directory: str) -> list[str]:
    """Unpack the sample into `directory`, made if need be; gives the paths of its files.

    Files that are there already and equal are left alone. Nothing is written if one differs.

    Raises: FileExistsError naming the file that differs; other OSErrors as open(2) and mkdir(2);
    FormatError if the resource is damaged.
    """
    contents = _unpack()
    paths = {os.path.join(directory, name): content for name, content in contents.items()}
    missing = [path for path, content in paths.items() if not _holds(path, content)]
    os.makedirs(directory, exist_ok=True)
    for path in missing:
        # never half a file under the real name: the next run would take it for the user's
        part = path + ".part"
        with open(part, "wb") as out:
            out.write(paths[path])
        os.replace(part, path)
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


def _unpack() -> dict[str, bytes]:
    """File name → content, as packed by tools/build_sample.py."""
    import zipfile  # 8 ms that only this command spends
    import zlib

    try:
        with zipfile.ZipFile(RESOURCE) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error) as exc:
        raise FormatError(RESOURCE, None, f"is damaged ({exc}): reinstall kvmtool") from exc
