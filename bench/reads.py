"""Virtual reads through page tables, against a copy out of the mapping and against drgn.

CPU time, medians of 5, contestants in turn, the file in the page cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
import zlib
from typing import TYPE_CHECKING

from bench.images import DATA, MIB
from bench.peers import PYTHON, installed
from kvmtool.formats.raw import Raw
from kvmtool.paging import PagedMemory
from kvmtool.source import FileSource
from kvmtool.way_roots import walker

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.images import Image
    from bench.sheet import Sheet

ROUNDS = 5
READ_SIZE = 512 * MIB


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


def bench_reads(sheet: Sheet, image: Image, what: str, aimed: bool) -> None:
    """Reads through page tables against a copy out of the mapping, and against drgn.

    `aimed` is whether there is a target.
    """
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
    if drgn is not None:
        drgn.close()
    _tell(sheet, what, aimed, {n: size / statistics.median(t) / 1e9 for n, t in times.items() if t})


def _tell(sheet: Sheet, what: str, aimed: bool, rate: dict[str, float]) -> None:
    """The rows of the rates in GB/s: ours, with nothing known, a copy, and drgn's two if there."""

    def row(ours: str, theirs: str, least: float, name: str, against: str) -> None:
        figure, ratio = f"{rate[ours]:.1f} GB/s CPU", rate[ours] / rate[theirs]
        against = f"{against} ({rate[theirs]:.1f})"
        if aimed and least:
            sheet.faster(name, figure, ratio, against, least)
        else:
            sheet.add(name, figure, ratio=ratio, against=against)

    row("ours", "copy", 0.4, what, "a copy from the mapping")
    row("first", "copy", 0, f"{what}, nothing known of the tables", "a copy from the mapping")
    if "slice" not in rate:
        sheet.missing(f"{what}, drgn", "drgn cannot be installed here")
        return
    row("ours", "slice", 1.3, what, "drgn, callback that copies")
    # one copy is the least either does: what the copy itself is to drgn's best is the ceiling
    row("ours", "view", 0, what, "drgn, callback that does not")
