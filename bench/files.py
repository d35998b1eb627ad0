"""Files: gzip'ed cores, conversion, and Volatility 3 on the same image."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from bench import peers
from bench.process import ENVIRONMENT, cost, kvmtool, medians

if TYPE_CHECKING:
    from bench.sheet import Sheet

_DUMP = "x86_64-10.8.5"


def gzipped(sheet: Sheet, folder: str) -> None:
    """A gzip'ed core: the first command makes an index, the second has it."""
    import inputs

    packed = inputs.real(f"dumps/{_DUMP}/core.macho.gz")
    kernel = inputs.real(f"dumps/{_DUMP}/mach_kernel")
    ENVIRONMENT["KVMTOOL_CACHE"] = os.path.join(folder, "cache")
    command = kvmtool("procs", "-N", kernel, "-M", packed)
    first = cost(command)
    again = medians(
        {"gz": command, "plain": kvmtool("procs", "-N", kernel, "-M", inputs.plain_core(_DUMP))}, 5
    )
    size = os.path.getsize(inputs.plain_core(_DUMP)) / 1e6
    sheet.add(f"procs on a gzip'ed core of {size:.0f} MB, first", f"{first.ms:.0f} ms CPU")
    sheet.add(
        f"procs on a gzip'ed core of {size:.0f} MB, again",
        f"{again['gz'].ms:.0f} ms CPU",
        against=f"the plain core ({again['plain'].ms:.0f} ms)",
        ratio=again["plain"].ms / again["gz"].ms,
    )


def converted(sheet: Sheet, folder: str) -> None:
    """A dump of physical memory written as another form, against cp."""
    import inputs

    image = inputs.real(f"dumps/{_DUMP}/mem.lime")
    kernel = inputs.real(f"dumps/{_DUMP}/mach_kernel")
    out = os.path.join(folder, "out")
    where = f"-N {kernel} -M {image}"
    ours = f"{sys.executable} -m kvmtool convert {where} --physical --to elf {out}; rm -f {out}"
    costs = medians({"ours": ours, "cp": f"cp {image} {out}; rm -f {out}"}, 5)
    size = os.path.getsize(image) / 1e6
    sheet.add(
        f"convert, LiME of {size:.0f} MB to ELF",
        f"{costs['ours'].ms:.0f} ms CPU, {costs['ours'].mb:.0f} MB",
        against=f"cp ({costs['cp'].ms:.0f} ms)",
        ratio=costs["cp"].ms / costs["ours"].ms,
    )


def volatility(sheet: Sheet, folder: str) -> None:
    """pslist and banners on the same image; Volatility's own caches are warm."""
    import inputs

    if not peers.installed("volatility3"):
        sheet.missing("procs, against Volatility 3", "volatility3 cannot be installed here")
        return
    sys.path.insert(0, os.path.join(peers.ROOT, "tools"))
    import peers as compare

    lime, kernel = (inputs.real(f"dumps/{_DUMP}/{n}") for n in ("mem.lime", "mach_kernel"))
    symbols = os.path.join(folder, "symbols")
    compare.write_isf(symbols, _DUMP, inputs.truth(_DUMP))
    theirs = [peers.VOLATILITY, "-q", "-s", symbols, "-f", lime, "-r", "json"]
    costs = medians(
        {
            "ours": kvmtool("procs", "-N", kernel, "-M", lime),
            "pslist": [*theirs, "mac.pslist"],
            "banners": [*theirs, "banners"],
            "info": kvmtool("info", "-M", lime),
        },
        3,
    )
    figure = f"{costs['ours'].ms:.0f} ms, {costs['ours'].mb:.0f} MB"
    against = f"Volatility 3 mac.pslist ({costs['pslist'].ms:.0f} ms, {costs['pslist'].mb:.0f} MB)"
    ratio = costs["pslist"].ms / costs["ours"].ms
    sheet.add("procs, 60 processes in LiME", figure, ratio=ratio, against=against)
    figure = f"{costs['info'].ms:.0f} ms, {costs['info'].mb:.0f} MB"
    against = f"Volatility 3 banners ({costs['banners'].ms:.0f} ms)"
    ratio = costs["banners"].ms / costs["info"].ms
    sheet.faster("kernel found in LiME of 130 MB", figure, ratio, against, 10)
