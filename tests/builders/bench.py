"""Inputs for tools/bench.py: many symbols, many processes."""

from __future__ import annotations

import os

from builders import peel, xnu
from builders.specs import ProcSpec
from kvmtool.types import layouts

BANNER = (
    "Darwin Kernel Version 13.4.0: Wed Mar 18 16:20:14 PDT 2015; "
    "root:xnu-2422.115.14~1/RELEASE_X86_64"
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


def write_cache(folder: str, size: int) -> tuple[str, str]:
    """A kernel of `size` bytes, plain and as an IM4P with LZFSE; their paths."""
    with open(write_symbols(folder, 100_000), "rb") as file:
        kernel = file.read()
    # text compresses about as machine code does: to a third
    filler = b"".join(b"mov %d, [rax+%x]; " % (n * 7919 % 65521, n) for n in range(size // 18))
    kernel += filler[: max(0, size - len(kernel))]
    packed = peel.im4p(peel.lzfse(kernel), peel.compression(1, len(kernel)))
    return _write(folder, "plain.mach_kernel", kernel), _write(folder, "kernelcache", packed)
