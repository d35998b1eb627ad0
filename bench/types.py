"""Measure `kvmtool type proc` from dSYMs, whole process, against targets and pyelftools' walk.

CPU time, the median of 7, on generated dSYMs of 30 and 160 MB: the first time (no cache) and the
second. Needs clang, dsymutil and pyelftools.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from typing import TYPE_CHECKING

from bench.process import ENVIRONMENT, cost, kvmtool

if TYPE_CHECKING:
    from bench.sheet import Sheet

ROUNDS = 7
MB = 1_000_000


def medians(path: str, folder: str) -> tuple[float, float]:
    """(first time, second time) in seconds."""
    command = kvmtool("--types", path, "type", "proc")
    times: list[tuple[float, float]] = []
    for number in range(ROUNDS + 1):
        ENVIRONMENT["KVMTOOL_CACHE"] = os.path.join(folder, f"cache{number}")
        times.append((cost(command).ms / 1000, cost(command).ms / 1000))
    first, second = zip(*times[1:], strict=True)
    return statistics.median(first), statistics.median(second)


def elftools_walk(path: str, units: int) -> float:
    """Seconds that pyelftools needs for every entry of the file, measured on `units` units."""
    from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DwarfConfig, DWARFInfo

    from kvmtool.macho import MachO
    from kvmtool.source import FileSource

    image = MachO(FileSource(path))
    given = dict.fromkeys(
        name for name in DWARFInfo.__init__.__code__.co_varnames if "_sec" in name
    )
    for section in image.sections:
        key = section.sectname.replace("__debug_", "debug_") + "_sec"
        if section.segname == "__DWARF" and key in given:
            data = image.source.read_at(section.offset, section.size)
            given[key] = DebugSectionDescriptor(io.BytesIO(data), key, 0, section.size, 0)
    info = DWARFInfo(DwarfConfig(True, "x64", 8), **given)
    total = given["debug_info_sec"].size
    began, walked = time.process_time(), 0
    for unit in info.iter_CUs():
        walked += unit.size
        for _ in unit.iter_DIEs():
            pass
        units -= 1
        if not units:
            break
    return (time.process_time() - began) * total / walked


def run(sheet: Sheet, folder: str) -> None:
    """dSYMs of 30 and 160 MB, the first time and the second, against pyelftools' full walk."""
    from tests.builders import dwarf_big

    for size, targets in ((30 * MB, (0.35, 0.15)), (160 * MB, (1.0, 0.15))):
        path = dwarf_big.write_dsym(folder, size)
        what = f"type proc, dSYM of {os.path.getsize(path) / MB:.0f} MB"
        took = medians(path, folder)
        for name, each, most in zip(("first", "second"), took, targets, strict=True):
            target = f"at most {1000 * most:.0f} ms"
            figure = f"{1000 * each:.0f} ms CPU"
            sheet.add(f"{what}, {name} time", figure, target=target, used=each / most)
        walk = elftools_walk(path, 3)
        theirs = f"pyelftools, full walk ({walk:.0f} s)"
        sheet.faster(what, f"{1000 * took[0]:.0f} ms CPU", walk / took[0], theirs, 100)
