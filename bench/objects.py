"""Kernel objects in bulk: a machine with 2,000 processes and 20,000 descriptors."""

from __future__ import annotations

import base64
import gzip
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from bench import peers
from bench.process import cost, kvmtool, medians

if TYPE_CHECKING:
    from bench.process import Cost
    from bench.sheet import Sheet
    from tests.builders.xnu import Built

PROCESSES, DESCRIPTORS, FEW = 2_000, 20_000, 400
_TYPES = "types/x86_64-10.8.5.types.json.gz"


class _Machine:
    """Its files: the kernel, a core, physical memory, and symbols for Volatility if there are."""

    def __init__(self, folder: str, processes: int, descriptors: int) -> None:
        from builders import bench

        os.mkdir(folder)
        built = bench.busy(processes, descriptors)
        self.kernel = self._write(folder, "kernel", built.kernel)
        self.core = self._write(folder, "core", built.core)
        self.lime = self._write(folder, "memory.lime", built.truth["ram"].lime())
        self.symbols = os.path.join(folder, "symbols")
        self.known = self._isf(built)

    def _write(self, folder: str, name: str, data: bytes) -> str:
        path = os.path.join(folder, name)
        with open(path, "wb") as out:
            out.write(data)
        return path

    def _isf(self, built: Built) -> bool:
        """The types of the real 10.8.5 with the symbols of this one; False without the former."""
        import inputs

        sys.path.insert(0, os.path.join(peers.ROOT, "tools"))
        from peers import TYPED

        path = os.path.join(inputs.DATA, _TYPES)
        if not os.path.exists(path):
            return False
        with gzip.open(path) as packed:
            isf = json.load(packed)
        symbols: dict[str, Any] = {
            name.removeprefix("_"): {"address": value} for name, value in built.symbols.items()
        }
        banner = built.truth["banner"].encode() + b"\0"
        symbols["version"]["constant_data"] = base64.b64encode(banner).decode()
        for name, struct in TYPED.items():
            symbols[name]["type"] = {"kind": "struct", "name": struct}
        os.makedirs(os.path.join(self.symbols, "mac"))
        with open(os.path.join(self.symbols, "mac", "busy.json"), "w", encoding="ascii") as out:
            json.dump({**isf, "symbols": symbols}, out)
        return True


def run(sheet: Sheet, folder: str) -> None:
    """procs with every column that needs no user memory, files, and Volatility's two plugins."""
    from kvmtool.cli.procs import LISTING

    machine = _Machine(os.path.join(folder, "many"), PROCESSES, DESCRIPTORS)
    started = {"path", "args", "env", "apple"}
    columns = ",".join(column.name for column in LISTING.columns if column.name not in started)
    where = ("-N", machine.kernel, "-M", machine.core)
    costs = medians(
        {
            "procs": kvmtool("procs", *where, "-o", columns),
            "files": kvmtool("files", *where),
            "json": kvmtool("files", *where, "--format", "json"),
        },
        5,
    )
    for name, what, most in (
        ("procs", f"procs, {PROCESSES:,} processes, all columns", 1500),
        ("files", f"files, {DESCRIPTORS:,} descriptors", 3000),
        ("json", f"files, {DESCRIPTORS:,} descriptors, json", 3000),
    ):
        ms = costs[name].ms
        sheet.add(what, _figure(costs[name]), target=f"at most {most} ms", used=ms / most)
    if not machine.known or not peers.installed("volatility3"):
        sheet.missing("procs and files, against Volatility 3", "it or its types are not here")
        return
    _volatility(sheet, machine)
    _few(sheet, _Machine(os.path.join(folder, "few"), FEW, 10 * FEW))


def _few(sheet: Sheet, machine: _Machine) -> None:
    """A machine as large as a person's, where starting up is most of it."""
    where = ("-N", machine.kernel, "-M", machine.lime, "--format", "json")
    theirs = [peers.VOLATILITY, "-q", "-s", machine.symbols, "-f", machine.lime, "-r", "json"]
    commands: dict[str, list[str] | str] = {
        "click": [sys.executable, "-c", "import click"],
        "procs": kvmtool("procs", *where),
        "pslist": [*theirs, "mac.pslist"],
    }
    costs = medians(commands, 5)
    ours, pslist = costs["procs"], costs["pslist"]
    why = (
        f"both have hardly begun: a bare `import click` takes {costs['click'].ms:.0f} ms, and a "
        f"twentieth of theirs would be {pslist.ms / 20:.0f}; each further process costs them ten "
        "times what it costs us and more, as the row of 2,000 shows"
    )
    against = f"Volatility 3 mac.pslist ({_figure(pslist)})"
    what = f"procs, {FEW} processes in LiME"
    sheet.faster(what, _figure(ours), pslist.ms / ours.ms, against, 20, why)


def _volatility(sheet: Sheet, machine: _Machine) -> None:
    """The same lists from the same physical memory; lsof takes a minute and runs once."""
    theirs = [peers.VOLATILITY, "-q", "-s", machine.symbols, "-f", machine.lime, "-r", "json"]
    where = ("-N", machine.kernel, "-M", machine.lime, "--format", "json")
    costs = medians(
        {
            "procs": kvmtool("procs", *where),
            "files": kvmtool("files", *where),
            "pslist": [*theirs, "mac.pslist"],
        },
        3,
    )
    costs["lsof"] = cost([*theirs, "mac.lsof"])
    for ours, plugin, what in (
        ("procs", "pslist", f"procs, {PROCESSES:,} processes in LiME"),
        ("files", "lsof", f"files, {DESCRIPTORS:,} descriptors in LiME"),
    ):
        against = f"Volatility 3 mac.{plugin} ({_figure(costs[plugin])})"
        ratio = costs[plugin].ms / costs[ours].ms
        sheet.faster(what, _figure(costs[ours]), ratio, against, 10)


def _figure(took: Cost) -> str:
    return f"{took.ms:.0f} ms, {took.mb:.0f} MB"
