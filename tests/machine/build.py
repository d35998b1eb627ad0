"""Builds kernel and kext for one architecture, the same bytes from the same sources every time."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from tests.machine import headers, postlink

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.machine.toolchain import Tool

_SOURCES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "src")
_KERNEL = (
    *("lib", "serial", "paging", "loader", "heap", "queues", "devices", "statics", "mounts"),
    *("kmod", "procs", "stacks", "files", "sysctl", "zones", "main", "boot_{arch}"),
)
_KEXT = "org.kvmtool.machine.mmread"
_EPOCH = 1_000_000_000  # the time stamp of every object file: stabs hold it
_FLAGS = (
    "-ffreestanding -fno-builtin -mkernel -mno-sse -mno-mmx -msoft-float -fno-stack-protector "
    "-fno-jump-tables -O1 -g -gdwarf-{dwarf} -Wall -Wextra -Werror "
    "-Wno-address-of-packed-member"  # XNU's queues are made of such addresses
)


class Machine(NamedTuple):
    """What one architecture needs of the compiler, the linker and QEMU."""

    target: tuple[str, ...]
    dwarf: int
    macosx: str
    image_base: str
    kext_base: str  # on i386 where it will be loaded: this linker does not rebase code there


MACHINES = {
    "x86_64": Machine(
        ("-target", "x86_64-apple-macosx10.10", "-mno-red-zone"),
        *(4, "10.10", "0xffffff8000200000", "0"),
    ),
    "i386": Machine(
        ("-target", "i386-apple-macosx10.5", "-static"), 2, "10.5", "0x430000", "0x1e800000"
    ),
}


class Images(NamedTuple):
    """Paths of what was built."""

    kernel: str
    kext: str


def build(arch: str, folder: str, linker: Tool) -> Images:
    """Kernel and kext in `folder`. Raises `subprocess.CalledProcessError`."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "structs.h"), "w") as out:
        out.write(headers.header(arch))
    names = ["start", *(name.format(arch=arch) for name in _KERNEL)]
    objects = [_compile(arch, folder, name) for name in names]
    kernel = _link(arch, folder, linker, objects, "mach_kernel", "_mb_header")
    kext = _link(arch, folder, linker, [_compile(arch, folder, "kext")], _KEXT, "_my_start")
    return Images(kernel, kext)


def _compile(arch: str, folder: str, name: str) -> str:
    machine = MACHINES[arch]
    output = f"{name}.o"
    if name == "start":
        flags, source = [], f"start_{arch}.s"
    else:
        flags, source = _FLAGS.format(dwarf=machine.dwarf).split(), f"{name}.c"
    command = ["clang-14", *machine.target, *flags, "-I.", f"-I{_SOURCES}"]
    command += ["-c", os.path.join(_SOURCES, source), "-o", output]
    subprocess.run(command, cwd=folder, check=True)
    os.utime(os.path.join(folder, output), (_EPOCH, _EPOCH))
    return output


def _link(arch: str, folder: str, linker: Tool, objects: list[str], name: str, entry: str) -> str:
    machine, kernel = MACHINES[arch], name == "mach_kernel"
    path = os.path.join(folder, name)
    linker.run(
        *("-preload", "-pie", "-arch", arch, "-macosx_version_min", machine.macosx, "-e", entry),
        *("-image_base", machine.image_base if kernel else machine.kext_base, *objects, "-o", name),
        cwd=folder,
    )
    _rewrite(path, lambda data: postlink.finish(data, kernel=kernel))
    subprocess.run(["dsymutil-14", name, "-o", f"{name}.dSYM"], cwd=folder, check=True)
    _rewrite(path, lambda data: postlink.strip(data, kernel=kernel))
    return path


def _rewrite(path: str, change: Callable[[bytes], bytes]) -> None:
    with open(path, "rb") as image:
        data = image.read()
    with open(path, "wb") as image:
        image.write(change(data))
