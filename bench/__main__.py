"""Run the benchmarks and write docs/benchmarks.md: `python -m bench [SECTION ...]`."""

from __future__ import annotations

import os
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

from bench import commands, files, library, live, memory, objects, types  # noqa: E402
from bench.sheet import Sheet  # noqa: E402

DUMP = "dumps/x86_64-10.8.5"
SYMBOLS = "kernels/arm64e-xnu-6153.11.26-release.macho"


def _real(name: str) -> str | None:
    import inputs

    there = os.path.join(inputs.DATA, name)
    return inputs.real(name) if os.path.exists(there) or os.path.exists(there + ".xz") else None


def _symbols(sheet: Sheet, folder: str) -> None:
    from builders import bench

    small, large = _real(SYMBOLS), _real(f"{DUMP}/mach_kernel")
    if small:
        commands.nlist(sheet, small, "nlist, 24,634 symbols", 1 / 3)
    if large:
        commands.nlist(sheet, large, "nlist, 94,693 symbols", 1 / 1.1)
    generated = bench.write_symbols(folder, 500_000)
    commands.nlist(sheet, generated, "nlist, 500,000 symbols", 8)
    commands.cache(sheet, folder)
    commands.startup(sheet)


def _library(sheet: Sheet, folder: str) -> None:
    import inputs

    library.large(sheet, folder)
    kernel = _real(f"{DUMP}/mach_kernel")
    if kernel is None:
        sheet.missing("lookups and reads", "the real dumps are not here")
        return
    core = inputs.plain_core("x86_64-10.8.5")
    library.lookups(sheet, kernel, core)
    library.paged_reads(sheet, kernel, inputs.real(f"{DUMP}/mem.lime"))
    library.structures(sheet, kernel, core)


def _objects(sheet: Sheet, folder: str) -> None:
    commands.procs(sheet, folder)
    objects.run(sheet, folder)
    files.volatility(sheet, folder)


def _files(sheet: Sheet, folder: str) -> None:
    files.gzipped(sheet, folder)
    files.converted(sheet, folder)


def _memory(sheet: Sheet, folder: str) -> None:
    memory.run(sheet, folder)
    live.run(sheet, folder)


SECTIONS = {
    "Symbols": _symbols,
    "The library": _library,
    "Memory": _memory,
    "Types": types.run,
    "Kernel objects": _objects,
    "Files": _files,
}


def main() -> int:
    """The sections named, or all; only a whole run writes the page."""
    wanted = [name for name in SECTIONS if name.lower() in map(str.lower, sys.argv[1:])]
    sheet = Sheet()
    for name in wanted or SECTIONS:
        sheet.section = name
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](sheet, folder)
    if not wanted:
        with open(os.path.join(ROOT, "docs", "benchmarks.md"), "w", encoding="utf-8") as page:
            page.write(sheet.page())
    for row in sheet.missed:
        print(f"missed: {row.what}: {row.ours} {row.ratio} {row.against}, {row.target}")
    return 1 if sheet.missed else 0


if __name__ == "__main__":
    sys.exit(main())
