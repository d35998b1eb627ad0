"""Measure reads of memory against peers in the same run, and print the ratios.

Reads that only compute are measured in CPU time (user + system); the scan, the mount and the gdb
line in wall time, for there others do part of the work. Medians of 5, contestants in turn, files in
the page cache. What cannot run here is said to be not measured, and fails nothing.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import math
import mmap
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.peers import PYTHON, installed
from kvmtool.formats.kdump import Kdump
from kvmtool.formats.raw import Raw
from kvmtool.macho import MachO
from kvmtool.paging import PagedMemory
from kvmtool.source import BytesSource, FileSource
from kvmtool.way_in import find_way
from kvmtool.way_roots import walker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.sheet import Sheet

MIB = 1 << 20
ROUNDS = 5
MEAN_RUN = 16  # pages
READ_SIZE = 512 * MIB
SCAN_SIZE = 1 << 30
KDUMP_SIZE = 32 * MIB
STATIC = 0xFFFFFF8000000000  # the virtual minus the physical address of a static kernel
LINK = STATIC + 0x200000
DATA = 0xFFFFFF8400000000  # where the pages to be read are mapped


class Run(NamedTuple):
    """`size` bytes at DATA + `offset` that lie at `physical`."""

    offset: int
    physical: int
    size: int


class Image(NamedTuple):
    """A raw image of physical memory with a kernel in it, and its kernel's file."""

    path: str
    kernel: str
    root: int
    at: int  # the kernel's header in physical memory
    runs: list[Run]


def fragments(size: int) -> list[Run]:
    """[0, size) shuffled in pieces of a geometric distribution, MEAN_RUN pages on average."""
    rand = random.Random(4)
    pieces, page = [], 0
    while page < size >> 12:
        count = 1 + int(math.log(1 - rand.random()) / math.log(1 - 1 / MEAN_RUN))
        count = min(count, (size >> 12) - page)
        pieces.append((page << 12, count << 12))
        page += count
    rand.shuffle(pieces)
    runs, offset = [], 0
    for physical, length in pieces:
        runs.append(Run(offset, physical, length))
        offset += length
    return runs


def write_image(folder: str, name: str, size: int, data: int, skew: int = 0x23000) -> Image:
    """`data` random bytes, mapped in fragments; 4 MiB before the end a kernel; else holes.

    It begins `skew` bytes behind a 2 MiB boundary: on one, it is found without a scan.
    """
    from builders import tiny_kernel
    from builders.pagetable import Tables

    path = os.path.join(folder, name)
    at = size - 4 * MIB + skew
    with open(path, "wb+") as file:
        for _ in range(0, data, 16 * MIB):
            file.write(os.urandom(16 * MIB))
        file.truncate(size)
        memory: Any = mmap.mmap(file.fileno(), size)
        tables = Tables("4-level", 0, memory)
        slide = at + STATIC - LINK
        pointers = {"_IdlePML4": tables.root + STATIC}
        kernel = tiny_kernel.build("x86_64", LINK, slide, variables=pointers)
        memory[at : at + len(kernel.image)] = kernel.image
        for offset in range(0, tiny_kernel.END, 4096):
            tables.map(kernel.address + offset, at + offset)
        runs = fragments(data)
        for run in runs:
            for inside in range(0, run.size, 4096):
                tables.map(DATA + run.offset + inside, run.physical + inside)
        memory.close()
    with open(path + ".mach_kernel", "wb") as out:
        out.write(kernel.file)
    return Image(path, path + ".mach_kernel", tables.root, at, runs)


# virtual reads


# drgn knows the runs beforehand and walks no table: a segment is a run, over the same mapping. Its
# callback slices the mapping, as one writes it, which copies; and a view of it, which does not.
DRGN_SIDE = """
import json, mmap, sys, time, zlib
from drgn import Architecture, Platform, Program
path, base, size, chunk, runs = json.loads(sys.stdin.readline())
with open(path, "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
def program(memory):
    prog = Program(Platform(Architecture.X86_64))
    for offset, physical, length in runs:
        def get(address, count, inside, is_physical, at=physical):
            return memory[at + inside : at + inside + count]
        prog.add_memory_segment(base + offset, length, get)
    return prog
programs = {"slice": program(mapping), "view": program(memoryview(mapping))}
for prog in programs.values():
    check = 0
    for at in range(0, size, chunk):
        check = zlib.crc32(prog.read(base + at, chunk), check)
print(check, flush=True)
for line in sys.stdin:
    prog = programs[line.strip()]
    begin = time.process_time()
    for at in range(0, size, chunk):
        prog.read(base + at, chunk)
    print(time.process_time() - begin, flush=True)
"""


class Drgn:
    """drgn in its own process and virtualenv; `seconds` is the CPU time of one pass."""

    def __init__(self, image: Image, size: int, chunk: int) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-c", DRGN_SIDE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.check = int(self._ask(json.dumps([image.path, DATA, size, chunk, image.runs])))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def seconds(self, callback: str) -> float:
        return float(self._ask(callback))

    def close(self) -> None:
        self._process.communicate()


def cpu(read: Callable[[int], object], size: int, chunk: int) -> float:
    """CPU seconds of one pass over [0, size)."""
    begin = time.process_time()
    for at in range(0, size, chunk):
        read(at)
    return time.process_time() - begin


def bench_reads(sheet: Sheet, image: Image, what: str) -> None:
    """Reads through page tables against a copy out of the mapping, and against drgn."""
    size, chunk = READ_SIZE, MIB
    source = FileSource(image.path)
    physical = Raw(source).physical()
    tables = walker(physical, "4-level", image.root)
    memory = PagedMemory(physical, tables)
    check = 0
    for at in range(0, size, chunk):
        check = zlib.crc32(memory.read(DATA + at, chunk), check)
    drgn = Drgn(image, size, chunk) if installed("drgn") else None
    if drgn is not None and drgn.check != check:
        raise SystemExit("drgn reads other bytes: the comparison means nothing")
    times: dict[str, list[float]] = {
        name: [] for name in ("copy", "ours", "first", "slice", "view")
    }
    for _ in range(ROUNDS):
        times["copy"].append(cpu(lambda at: source.read_at(at, chunk), size, chunk))
        times["ours"].append(cpu(lambda at: memory.read(DATA + at, chunk), size, chunk))
        fresh = PagedMemory(physical, tables)
        times["first"].append(cpu(lambda at, m=fresh: m.read(DATA + at, chunk), size, chunk))
        if drgn is not None:
            for callback in ("slice", "view"):
                times[callback].append(drgn.seconds(callback))
    source.close()
    rate = {name: size / statistics.median(each) / 1e9 for name, each in times.items() if each}
    ours, copy = rate["ours"], rate["copy"]
    figure = f"{ours:.1f} GB/s CPU"
    sheet.faster(what, figure, ours / copy, f"a copy from the mapping ({copy:.1f})", 0.4)
    first = f"{rate['first']:.1f} GB/s CPU"
    against = f"a copy from the mapping ({copy:.1f})"
    sheet.add(
        f"{what}, nothing known of the tables", first, against=against, ratio=rate["first"] / copy
    )
    if drgn is None:
        sheet.missing(f"{what}, drgn", "drgn cannot be installed here")
        return
    drgn.close()
    theirs = f"drgn, callback that copies ({rate['slice']:.1f})"
    sheet.faster(what, figure, ours / rate["slice"], theirs, 1.3)
    # one copy is the least either does: what the copy itself is to drgn's best is the ceiling
    theirs = f"drgn, callback that does not ({rate['view']:.1f})"
    sheet.add(what, figure, against=theirs, ratio=ours / rate["view"])


# compressed pages


def python_itself() -> bytes:
    """KDUMP_SIZE bytes of Python's library: machine code, tables and text, as memory has them."""
    library = sysconfig.get_path("stdlib")
    content = b""
    for pattern in ("lib-dynload/*.so", "*.py"):
        for path in sorted(glob.glob(os.path.join(library, pattern))):
            with open(path, "rb") as file:
                content += file.read()
    return (content * (KDUMP_SIZE // len(content) + 1))[:KDUMP_SIZE]


def bench_kdump(sheet: Sheet, folder: str) -> None:
    """Reads of 1 MiB of a kdump, no page of it decoded before, against zlib on the bare pages."""
    from builders import kdump

    content = python_itself()
    pages = [kdump.deflated(content[at : at + 4096]) for at in range(0, KDUMP_SIZE, 4096)]
    path = os.path.join(folder, "kdump")
    with open(path, "wb") as out:
        out.write(kdump.kdump(dict(enumerate(pages))))
    packed = [page.data for page in pages if page.flags]
    source = FileSource(path)
    ours, bare = [], []
    for _ in range(ROUNDS):
        memory = Kdump(source).physical()
        assert memory is not None
        ours.append(cpu(lambda at, m=memory: m.read(at, MIB), KDUMP_SIZE, MIB))
        begin = time.process_time()
        for data in packed:
            zlib.decompress(data, bufsize=4096)
        bare.append(time.process_time() - begin)
    if memory.read(0, KDUMP_SIZE) != content:
        raise SystemExit("the kdump reads as other bytes")
    source.close()
    mine = KDUMP_SIZE / statistics.median(ours) / 1e6
    theirs = len(packed) * 4096 / statistics.median(bare) / 1e6
    what, figure = "zlib kdump, pages not seen before", f"{mine:.0f} MB/s CPU"
    sheet.faster(what, figure, mine / theirs, f"zlib alone ({theirs:.0f} MB/s)", 1)


# the scan for the way in


def bench_scan(sheet: Sheet, image: Image) -> None:
    """The whole search for the way in; what it passes over is counted up to the kernel."""
    source = FileSource(image.path)
    raw = Raw(source)
    with open(image.kernel, "rb") as file:
        kernel = MachO(BytesSource(file.read(), image.kernel))
    seconds = []
    for _ in range(ROUNDS + 1):  # the first brings the file into the page cache
        begin = time.perf_counter()
        way = find_way(raw.physical(), kernel, raw.facts, image.path, remember=False)
        seconds.append(time.perf_counter() - begin)
        if way.root != image.root or "kernel header at physical" not in way.how:
            raise SystemExit(f"the scan found another way in: {way}")
    source.close()
    rate = image.at / statistics.median(seconds[1:]) / 1e9
    what = f"scan of {image.at / 1e9:.2f} GB for the way in"
    sheet.add(what, f"{rate:.1f} GB/s wall", target="at least 1 GB/s", met=rate >= 1)


# the mounted kmem


def fuse_is_missing() -> str:
    """What stands against a mount; empty if nothing."""
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed (pip install mfusepy)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "there is no /dev/fuse, or no right to open it"
    return "" if shutil.which("fusermount3") else "there is no fusermount3 (apt-get install fuse3)"


def dd(path: str, offset: int, size: int) -> float:
    """Wall seconds in which dd reads a range in blocks of 1 MiB."""
    begin = time.perf_counter()
    where = ["iflag=skip_bytes,count_bytes", f"skip={offset}", f"count={size}"]
    command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none", *where]
    subprocess.run(command, check=True)
    return time.perf_counter() - begin


@contextlib.contextmanager
def mounted(image: Image, directory: str) -> Iterator[str]:
    """The path of kmem; the server has ended afterwards."""
    os.mkdir(directory)
    command = [sys.executable, "-m", "kvmtool", "mount", directory, "--foreground"]
    command += ["-N", image.kernel, "-M", image.path, "--core-format", "raw"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        path = os.path.join(directory, "kmem")
        try:
            while not os.path.exists(path):
                if server.poll() is not None:
                    raise SystemExit(f"kvmtool mount ended with status {server.returncode}")
                time.sleep(0.05)
            yield path
        finally:
            server.terminate()


def bench_mount(sheet: Sheet, image: Image, folder: str) -> None:
    """kmem of a running `kvmtool mount` against the dump's own file, both by dd."""
    what = "mounted kmem, dd bs=1M"
    why = fuse_is_missing()
    if why:
        sheet.missing(what, why)
        return
    offset = DATA & (1 << 63) - 1
    ours, plain = [], []
    with mounted(image, os.path.join(folder, "mount")) as kmem:
        for _ in range(ROUNDS + 1):
            plain.append(dd(image.path, 0, READ_SIZE))
            ours.append(dd(kmem, offset, READ_SIZE))
    mine, theirs = (READ_SIZE / statistics.median(each[1:]) / 1e9 for each in (ours, plain))
    figure = f"{mine:.2f} GB/s wall"
    sheet.faster(what, figure, mine / theirs, f"dd of a plain file ({theirs:.1f})", 0.1)


def run(sheet: Sheet, folder: str) -> None:
    """Virtual reads, kdump, the scan, and the mount."""
    image = write_image(folder, "fragments", READ_SIZE + 8 * MIB, READ_SIZE)
    bench_reads(sheet, image, "virtual reads, 4 KiB pages in runs of 16")
    bench_kdump(sheet, folder)
    bench_scan(sheet, write_image(folder, "sparse", SCAN_SIZE, 0))
    bench_mount(sheet, image, folder)
