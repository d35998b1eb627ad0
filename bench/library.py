"""The library in one process: lookups, small reads, large tables, structures."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import kvmtool
from bench.images import STATIC, write_image
from bench.process import ENVIRONMENT, cost

if TYPE_CHECKING:
    from bench.sheet import Sheet

_LOOKUPS, _READS, _SEGMENTS = 10_000, 200_000, 1_000_000
_BASE = 0xFFFFFF8000000000
_OPEN = """
import sys, time
import kvmtool
begin = time.process_time()
path, address, kernel = sys.argv[1:]
kvm = kvmtool.open(kernel or None, path, format="raw" if kernel else None)
kvm.memory.read(int(address, 0), 4)
print(time.process_time() - begin)
"""


def write_segments(folder: str, count: int) -> str:
    """A core of `count` segments of a page each, their bytes the same 64 pages over and over."""
    path = os.path.join(folder, "segments.core")
    command = struct.Struct("<II16s4Q4I")
    start = -(-(32 + count * command.size) // 4096) * 4096
    with open(path, "wb") as out:
        size = count * command.size
        out.write(struct.pack("<8I", 0xFEEDFACF, 0x01000007, 3, 4, count, size, 0, 0))
        for first in range(0, count, 4096):
            out.write(
                b"".join(
                    command.pack(
                        *(0x19, command.size, b"", _BASE + n * 8192, 4096),
                        *(start + n % 64 * 4096, 4096, 7, 3, 0, 0),
                    )
                    for n in range(first, min(first + 4096, count))
                )
            )
        out.truncate(start + 64 * 4096)
    return path


def large(sheet: Sheet, folder: str) -> None:
    """A core of a million segments, and an image of 64 GB."""
    address = _BASE + 777_777 * 8192
    seconds, peak = _opened(write_segments(folder, _SEGMENTS), None, address)
    what = "open of a core with 1,000,000 segments"
    figure, used = f"{seconds:.2f} s CPU, {peak:.0f} MB", max(seconds / 0.5, peak / 150)
    sheet.add(what, figure, target="0.5 s, 150 MB", used=used)
    image = write_image(os.path.join(folder, "sparse"), 64 << 30, 0)
    seconds, peak = _opened(image.path, image.kernel, image.at + STATIC)
    what = "open of a sparse image of 64 GB, the kernel at its end"
    sheet.add(what, f"{seconds:.2f} s CPU, {peak:.0f} MB", target="0.5 s", used=seconds / 0.5)


def _opened(path: str, kernel: str | None, address: int) -> tuple[float, float]:
    """CPU seconds of open and one read in a process of its own, and that process's MB."""
    command = [sys.executable, "-c", _OPEN, path, hex(address), kernel or ""]
    done = [
        subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    return min(map(float, done)), cost(command).mb


def lookups(sheet: Sheet, kernel: str, core: str) -> None:
    """10,000 names at once, and 4-byte reads one by one."""
    with kvmtool.open(kernel, core) as kvm:
        every = [symbol.name for symbol in kvm.symbols if symbol.name]
        names = every[:: max(1, len(every) // _LOOKUPS)][:_LOOKUPS]
    with kvmtool.open(kernel, core) as kvm:
        kvm.nlist(names[:1])
        begin = time.process_time()
        found = kvm.nlist(names)
        took = 1000 * (time.process_time() - begin)
        assert None not in found
        what = f"{len(names):,} lookups after the first"
        sheet.add(what, f"{took:.0f} ms CPU", target="at most 60 ms", used=took / 60)
        _reads(sheet, kvm, "random 4-byte reads, Mach-O core")


def _reads(sheet: Sheet, kvm: kvmtool.Kvm, what: str) -> None:
    base, read = kvm.address("_cdevsw"), kvm.read
    places = [base + n * 2654435761 % 2000 for n in range(_READS)]
    read(base, 4)
    begin = time.process_time()
    for address in places:
        read(address, 4)
    rate = _READS / (time.process_time() - begin)
    target = "at least 400,000 a second"
    sheet.add(what, f"{rate:,.0f} a second", target=target, used=400_000 / rate)


def paged_reads(sheet: Sheet, kernel: str, image: str) -> None:
    """4-byte reads through page tables."""
    with kvmtool.open(kernel, image) as kvm:
        _reads(sheet, kvm, "random 4-byte reads, page tables")


def structures(sheet: Sheet, kernel: str, core: str) -> None:
    """The fields of a process, read at once."""
    from kvmtool.xnu.proc import ProcReader

    with kvmtool.open(kernel, core) as kvm:
        reader = ProcReader(kvm.verified_target())
        address = kvm["kernproc"].value()
        begin = time.process_time()
        for _ in range(5000):
            reader.read(address, ("allproc",))
        rate = 5000 / (time.process_time() - begin)
    sheet.add("processes decoded, 33 fields each", f"{rate:,.0f} a second")
