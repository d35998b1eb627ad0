"""Measure whole commands against llvm-nm and bare imports, and print the ratios.

CPU time (user + system) of the finished process, the commands in turn, the median of 7.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

ROUNDS = 7
PYTHON = sys.executable


def cpu_ms(command: list[str] | str) -> float:
    """Milliseconds of CPU that one run of `command` takes, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command,
        shell=isinstance(command, str),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def medians(commands: dict[str, list[str] | str]) -> dict[str, float]:
    """Median milliseconds of each command, the commands taking turns."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        cpu_ms(command)  # warm the page cache and the bytecode
    for _ in range(ROUNDS):
        for name, command in commands.items():
            times[name].append(cpu_ms(command))
    return {name: statistics.median(values) for name, values in times.items()}


def kvmtool(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "kvmtool", *arguments]


def row(what: str, ours: float, theirs: float, against: str, target: float) -> bool:
    ratio = ours / theirs
    met = "met" if ratio <= target else "MISSED"
    print(f"{what:<44} {ours:7.1f} ms  {ratio:5.2f} x {against:<24} target {target:.3g}: {met}")
    return ratio <= target


def bench_nlist(kernel: str, what: str, target: float) -> list[bool]:
    nm = shutil.which("llvm-nm")
    commands: dict[str, list[str] | str] = {
        "nlist": kvmtool("nlist", "_cdevsw", "-N", kernel),
        "click": [PYTHON, "-c", "import click"],
    }
    if nm:
        commands["nm"] = f"'{nm}' '{kernel}' | grep ' _cdevsw$'"
    ms = medians(commands)
    met = []
    if nm:
        met.append(row(what, ms["nlist"], ms["nm"], f"llvm-nm ({ms['nm']:.1f} ms)", target))
    else:
        print(f"{what}: llvm-nm is not installed, no comparison")
    over = ms["nlist"] - ms["click"]
    print(
        f"{what:<44} {over:+7.1f} ms over 'import click' ({ms['click']:.1f} ms)"
        f"   target +30: {'met' if over <= 30 else 'MISSED'}"
    )
    return [*met, over <= 30]


def bench_procs(folder: str) -> bool:
    from builders import bench

    kernel, core = bench.write_procs(folder, 2000)
    ms = medians({"procs": kvmtool("procs", "-N", kernel, "-M", core)})["procs"]
    met = ms <= 500
    print(f"{'procs, 2,000 processes':<44} {ms:7.1f} ms   target 500: {'met' if met else 'MISSED'}")
    return met


def bench_cache(folder: str) -> bool:
    """A compressed kernelcache of 60 MB: the codec bounds the first time, the cache the second."""
    from builders import bench

    plain, packed = bench.write_cache(folder, 60_000_000)
    os.environ["KVMTOOL_CACHE"] = os.path.join(folder, "cache")
    first = cpu_ms(kvmtool("nlist", "_cdevsw", "-N", packed))
    commands = {
        "plain": kvmtool("nlist", "_cdevsw", "-N", plain),
        "packed": kvmtool("nlist", "_cdevsw", "-N", packed),
    }
    ms = medians(dict(commands))
    over = ms["packed"] - ms["plain"]
    met = over <= 40
    name = "nlist, 60 MB kernelcache (IM4P, LZFSE)"
    verdict = "met" if met else "MISSED"
    print(
        f"{name:<44} {ms['packed']:7.1f} ms  {over:+.1f} ms over the plain kernel   "
        f"target +40: {verdict} (first time {first:.0f} ms)"
    )
    return met


def main() -> int:
    from builders import bench

    met: list[bool] = []
    real = os.path.join(ROOT, "..", "shared", "data", "dumps", "x86_64-10.8.5", "mach_kernel.xz")
    with tempfile.TemporaryDirectory() as folder:
        if os.path.exists(real):
            import inputs

            path = inputs.real("dumps/x86_64-10.8.5/mach_kernel")
            met += bench_nlist(path, "nlist, 10.8.5 kernel, 94,693 symbols", 1.1)
        else:
            print("the 10.8.5 kernel is not here: its row is left out")
        big = bench.write_symbols(folder, 500_000)
        met += bench_nlist(big, "nlist, generated, 500,000 symbols", 1 / 8)
        met.append(bench_procs(folder))
        met.append(bench_cache(folder))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
