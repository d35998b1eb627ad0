"""Compare vmmap with Volatility 3's mac.proc_maps, row by row: each range of each process.

On the two dumps whose kernels were slid. What Volatility gets wrong is set aside by name:

- NAME: no range has a file's name in a kernel that was slid: vnode_pager_ops is looked up by its
  address without the slide being taken off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests"), os.path.join(ROOT, "tools")]

import peers  # noqa: E402


def theirs(vol: str, symbols: str, image: str) -> list[tuple[Any, ...]]:
    """(pid, start, end, protection, name) of every row of mac.proc_maps."""
    command = [vol, "-q", "--clear-cache", "-s", symbols, "-f", image, "-r", "json"]
    done = subprocess.run([*command, "mac.proc_maps"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Volatility 3 failed on {image}:\n{done.stderr[-2000:]}")
    columns = ("PID", "Start", "End", "Protection", "Map Name")
    return [
        tuple(row[name] for name in columns)
        for row in json.loads(done.stdout[done.stdout.index("[") :])
    ]


def ours(kernel: str, core: str) -> list[tuple[Any, ...]]:
    """The same of kvmtool's entries; of processes that have a map."""
    import kvmtool
    from kvmtool.cli.vmmap import protection
    from kvmtool.xnu.vmmap import Maps

    found = []
    with kvmtool.open(kernel, core) as kvm:
        maps = Maps(kvm.verified_target())
        for proc in kvm.procs():
            if not proc.zombie:
                for entry in maps.entries(maps.reader.of_process(proc)):
                    word = protection(entry.protection)
                    found.append((proc.pid, entry.start, entry.end, word, entry.path or ""))
        if maps.report.partial:
            raise SystemExit(f"{core}: {maps.report.stops[0]}")
    return found


def compare(vol: str, dump: str, folder: str) -> bool:
    """Both lists of one dump, as raw memory."""
    import inputs

    peers.write_isf(folder, dump, inputs.truth(dump))
    kernel, core = inputs.real(f"dumps/{dump}/mach_kernel"), inputs.real(f"dumps/{dump}/mem.lime")
    image = os.path.join(folder, f"{dump}.raw")
    convert = [sys.executable, "-m", "kvmtool", "convert", image, "--to", "raw"]
    subprocess.run([*convert, "-N", kernel, "-M", core], capture_output=True, check=True)
    rows, known = theirs(vol, folder, image), ours(kernel, core)
    wrong = [row for row in rows if row[4] and row not in known]
    same = Counter(row[:4] for row in rows) == Counter(row[:4] for row in known) and not wrong
    unnamed = sum(1 for row in known if row[4]) - sum(1 for row in rows if row[4])
    verdict = "agree" if same else "DIFFER"
    print(f"{dump:16} raw   maps     {len(rows)} ranges: {verdict} (NAME: {unnamed} set aside)")
    if not same:
        for row in sorted({r[:4] for r in rows} ^ {r[:4] for r in known})[:10]:
            print("   ", row)
    return same


if __name__ == "__main__":
    sys.exit(peers.each_dump(compare))
