"""Measure reads of memory against peers in the same run, and print the ratios.

Reads that only compute are measured in CPU time (user + system); the scan, the mount and the gdb
line in wall time, for there others do part of the work. Medians of 5, contestants in turn, files in
the page cache. What cannot run here is said to be not measured, and fails nothing.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import zlib
from typing import TYPE_CHECKING

from bench import peers
from bench.images import DATA, LARGE, MIB, PAGE, write_image
from bench.process import kvmtool, medians
from bench.reads import READ_SIZE, ROUNDS, bench_reads, cpu
from kvmtool.formats.kdump import Kdump
from kvmtool.formats.raw import Raw
from kvmtool.macho import MachO
from kvmtool.source import BytesSource, FileSource
from kvmtool.way_in import find_way

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.images import Image
    from bench.sheet import Sheet

SCAN_SIZE = 1 << 30
KDUMP_SIZE = 32 * MIB


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
    target = "at least 1 GB/s"
    sheet.add(what, f"{rate:.1f} GB/s wall", target=target, used=1 / rate)
    _against_banners(sheet, image)


def _against_banners(sheet: Sheet, image: Image) -> None:
    """The same scan as a whole process, the kernel unknown, and Volatility's scan for banners."""
    what = f"kernel found in {image.at / 1e9:.2f} GB, the whole process"
    if not peers.installed("volatility3"):
        sheet.missing(what, "volatility3 cannot be installed here")
        return
    costs = medians(
        {
            "ours": kvmtool("info", "-M", image.path, "--core-format", "raw"),
            "banners": [peers.VOLATILITY, "-q", "-f", image.path, "banners"],
        },
        3,
    )
    ours, theirs = costs["ours"], costs["banners"]
    against = f"Volatility 3 banners ({theirs.ms:.0f} ms, {theirs.mb:.0f} MB)"
    figure = f"{ours.ms:.0f} ms, {ours.mb:.0f} MB"
    sheet.faster(what, figure, theirs.ms / ours.ms, against, 10)


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
    path, size = os.path.join(folder, "image"), READ_SIZE + 8 * MIB
    for page, mean, what in (
        (LARGE, 1, "2 MiB pages, shuffled"),
        (PAGE, 1, "4 KiB pages, shuffled"),
        (PAGE, 16, "4 KiB pages in runs of 16"),
    ):
        image = write_image(path, size, READ_SIZE, page=page, mean=mean)
        bench_reads(sheet, image, f"virtual reads, {what}", aimed=mean == 16)
    bench_mount(sheet, image, folder)
    os.unlink(path)
    bench_kdump(sheet, folder)
    bench_scan(sheet, write_image(path, SCAN_SIZE + 8 * MIB, SCAN_SIZE, page=0))
