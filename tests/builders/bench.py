"""Inputs for tools/bench.py: many symbols, many processes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmtool.types import layouts
from tests.builders import peel, xnu
from tests.builders.descriptors import Descriptors, Fd
from tests.builders.filesystem import FileSystem
from tests.builders.maps import Maps
from tests.builders.ram import Ram
from tests.builders.sockets import NET, UNIX, Sockets
from tests.builders.specs import ProcSpec
from tests.builders.usage import Usage

if TYPE_CHECKING:
    from tests.builders.ground import Ground

BANNER = (
    "Darwin Kernel Version 13.4.0: Wed Mar 18 16:20:14 PDT 2015; "
    "root:xnu-2422.115.14~1/RELEASE_X86_64"
)
BUSY_BANNER = (
    "Darwin Kernel Version 12.5.0: Mon Jul 29 16:33:49 PDT 2013; "
    "root:xnu-2050.48.11~1/RELEASE_X86_64"
)


def _write(folder: str, name: str, data: bytes) -> str:
    path = os.path.join(folder, name)
    with open(path, "wb") as out:
        out.write(data)
    return path


def write_symbols(folder: str, count: int) -> str:
    """A kernel with about `count` symbols, `_cdevsw` among them; its path."""
    built = xnu.build(
        layouts.table("10.9.5 x86_64"),
        "x86_64",
        [ProcSpec(pid=0, ppid=0, comm="kernel_task")],
        banner=BANNER,
        more_symbols=xnu.filler_symbols(count, 0xFFFFFF8000300000),
    )
    return _write(folder, "symbols.mach_kernel", built.kernel)


def write_procs(folder: str, count: int) -> tuple[str, str]:
    """A kernel and its core with `count` processes; their paths."""
    procs = [
        ProcSpec(pid=0, ppid=0, comm="kernel_task"),
        *(ProcSpec(pid=pid, ppid=1, comm=f"worker{pid}") for pid in range(1, count)),
    ]
    layout = layouts.table("10.9.5 x86_64")
    built = xnu.build(layout, "x86_64", procs, banner=BANNER)
    return (
        _write(folder, "procs.mach_kernel", built.kernel),
        _write(folder, "procs.core", built.core),
    )


def busy(count: int, descriptors: int) -> xnu.Built:
    """A 10.8.5 with `count` processes, whose `descriptors` in all are files and sockets.

    Its truth has "ram", the physical memory of the machine.
    """
    each = descriptors // count
    sockets = (*NET, *UNIX)

    def plan(pid: int) -> dict[int, Fd | None]:
        paths = (f"/private/var/folder {pid % 97}/file {fd} of {pid}" for fd in range(each))
        found: dict[int, Fd | None] = {fd: Fd(path, "REG", 1) for fd, path in enumerate(paths)}
        found |= {fd: Fd(sockets[fd % len(sockets)], 2) for fd in range(each // 5)}
        return found

    def everything(ground: Ground) -> dict[str, Any]:
        files, maps, net = FileSystem(ground), Maps(ground), Sockets(ground, last_pid=1)
        truth = files.plant() | maps.plant() | net.plant()
        truth |= Descriptors(ground, files, net, plan).plant()
        return truth | Usage(ground, files).plant() | Ram(ground, maps, 256 << 20).plant()

    procs = [
        ProcSpec(1, "launchd", ppid=0),
        *(ProcSpec(pid, f"worker{pid}", threads=(1, 1, 1)) for pid in range(2, count)),
    ]
    built = xnu.build(
        layouts.table("10.8.5 x86_64"),
        "x86_64",
        procs,
        banner=BUSY_BANNER,
        slide=0xA00000,
        uuid=bytes(range(16)),
        parts=[everything],
    )
    built.truth["ram"].finish(built)
    return built


def write_busy(folder: str, count: int, descriptors: int) -> tuple[str, str]:
    """A kernel and the core of such a machine; their paths."""
    built = busy(count, descriptors)
    return (
        _write(folder, "busy.mach_kernel", built.kernel),
        _write(folder, "busy.core", built.core),
    )


def write_cache(folder: str, size: int) -> tuple[str, str]:
    """A kernel of `size` bytes, plain and as an IM4P with LZFSE; their paths."""
    with open(write_symbols(folder, 100_000), "rb") as file:
        kernel = file.read()
    # text compresses about as machine code does: to a third
    filler = b"".join(b"mov %d, [rax+%x]; " % (n * 7919 % 65521, n) for n in range(size // 18))
    kernel += filler[: max(0, size - len(kernel))]
    packed = peel.im4p(peel.lzfse(kernel), peel.compression(1, len(kernel)))
    return _write(folder, "plain.mach_kernel", kernel), _write(folder, "kernelcache", packed)
