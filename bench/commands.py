"""nlist and procs as whole processes, and what a command costs before it does anything."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from bench import peers
from bench.process import cost, kvmtool, medians

if TYPE_CHECKING:
    from bench.sheet import Sheet

_CLICK = ["-c", "import click"]
# one symbol by the peers' own means
_LIEF = "import lief; b=lief.parse({0!r}); print(hex(b.get_symbol('_cdevsw').value))"
_MACHOLIB = """
from macholib.MachO import MachO
from macholib.SymbolTable import SymbolTable
table = SymbolTable(MachO({0!r}))
print([hex(e.n_value) for e, name in table.nlists if name == b"_cdevsw"])
"""


def nlist(sheet: Sheet, kernel: str, what: str, least: float) -> None:
    """One cold lookup against llvm-nm, lldb, LIEF and macholib."""
    import sys

    commands: dict[str, list[str] | str] = {
        "ours": kvmtool("nlist", "_cdevsw", "-N", kernel),
        "click": [sys.executable, *_CLICK],
    }
    if shutil.which("llvm-nm"):
        commands["llvm-nm"] = f"llvm-nm '{kernel}' | grep ' _cdevsw$'"
    if shutil.which("lldb-14"):
        commands["lldb"] = ["lldb-14", "-b", "-o", "image lookup -s cdevsw", kernel]
    for name, code in {"lief": _LIEF, "macholib": _MACHOLIB}.items():
        if peers.installed(name):
            commands[name] = [peers.PYTHON, "-c", code.format(kernel)]
    costs = medians(commands, 5)
    ours = costs["ours"]
    over = ours.ms - costs["click"].ms
    figure = f"{ours.ms:.0f} ms, {ours.mb:.0f} MB"
    sheet.add(
        what, figure, against=f"import click, {over:+.0f} ms", target="+30 ms", used=over / 30
    )
    for name, theirs in costs.items():
        if name in ("ours", "click"):
            continue
        against = f"{name} ({theirs.ms:.0f} ms, {theirs.mb:.0f} MB)"
        if name == "llvm-nm":
            sheet.faster(f"{what}, {name}", figure, theirs.ms / ours.ms, against, least)
        else:
            sheet.add(f"{what}, {name}", figure, against=against, ratio=theirs.ms / ours.ms)


def startup(sheet: Sheet) -> None:
    """Every command's help against a bare `import click`; the slowest is shown."""
    import sys

    from kvmtool.cli import COMMANDS

    commands: dict[str, list[str] | str] = {
        name: kvmtool(name, "--help") for name in sorted(COMMANDS)
    }
    costs = medians({"click": [sys.executable, *_CLICK], **commands}, 5)
    click = costs.pop("click").ms
    slowest = max(costs, key=lambda name: costs[name].ms)
    over = costs[slowest].ms - click
    what = f"start-up of {len(costs)} commands, the slowest: {slowest}"
    against = f"import click ({click:.0f} ms)"
    sheet.add(what, f"{over:+.0f} ms", against=against, target="+40 ms", used=over / 40)


def procs(sheet: Sheet, folder: str) -> None:
    """2,000 processes as a list."""
    from builders import bench

    kernel, core = bench.write_procs(folder, 2000)
    took = medians({"list": kvmtool("procs", "-N", kernel, "-M", core)}, 5)["list"]
    figure = f"{took.ms:.0f} ms, {took.mb:.0f} MB"
    sheet.add("procs, 2,000 processes", figure, target="at most 500 ms", used=took.ms / 500)


def cache(sheet: Sheet, folder: str) -> None:
    """A compressed kernelcache of 60 MB: the codec bounds the first time, the cache the second."""
    from builders import bench

    from bench.process import ENVIRONMENT

    plain, packed = bench.write_cache(folder, 60_000_000)
    ENVIRONMENT["KVMTOOL_CACHE"] = os.path.join(folder, "cache")
    first = cost(kvmtool("nlist", "_cdevsw", "-N", packed)).ms
    costs = medians(
        {
            "plain": kvmtool("nlist", "_cdevsw", "-N", plain),
            "packed": kvmtool("nlist", "_cdevsw", "-N", packed),
        }
    )
    over = costs["packed"].ms - costs["plain"].ms
    sheet.add("nlist, 60 MB kernelcache (IM4P, LZFSE), first", f"{first:.0f} ms")
    sheet.add(
        "nlist, 60 MB kernelcache (IM4P, LZFSE), again",
        f"{costs['packed'].ms:.0f} ms",
        against=f"the plain kernel, {over:+.0f} ms",
        target="+40 ms",
        used=over / 40,
    )
