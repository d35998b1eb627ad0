"""Compare with Volatility 3, in a virtualenv of its own: the same processes in converted memory.

Volatility 3 cannot open a kernel that was not slid (it takes a slide of 0 for no answer), so the
10.5.8 dump is left out, by that name. Symbols and types are the data's own, in Volatility's form.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import venv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

PEERS = os.path.join(ROOT, "build", "peers")
VOLATILITY = "volatility3==2.28.2"
NOT_SLID = "Volatility 3 takes a slide of 0 for no answer"
DUMPS = {"i386-10.5.8": NOT_SLID, "x86_64-10.8.5": "", "x86_64-10.13.6": ""}
# the types of the two symbols that pslist asks for, which a symbol table alone does not have
TYPED = {"allproc": "proclist", "tasks": "queue_entry"}


def install() -> str:
    """Volatility 3 in build/peers; the path of its `vol`."""
    vol = os.path.join(PEERS, "bin", "vol")
    if not os.path.exists(vol):
        venv.create(PEERS, with_pip=True, clear=True)
        pip = [os.path.join(PEERS, "bin", "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", VOLATILITY], check=True)
    return vol


def write_isf(folder: str, dump: str, truth: dict[str, Any]) -> None:
    """Volatility's symbol file for one of the dumps."""
    import gzip

    import inputs

    with gzip.open(inputs.real(f"types/{dump}.types.json.gz")) as packed:
        isf = json.load(packed)
    banner = truth["banner"].encode() + b"\0"
    isf["symbols"]["version"]["constant_data"] = base64.b64encode(banner).decode()
    for name, struct in TYPED.items():
        isf["symbols"][name]["type"] = {"kind": "struct", "name": struct}
    os.makedirs(os.path.join(folder, "mac"), exist_ok=True)
    with open(os.path.join(folder, "mac", f"{dump}.json"), "w", encoding="utf-8") as out:
        json.dump(isf, out)


def theirs(vol: str, symbols: str, image: str, method: str) -> set[int]:
    """The pids mac.pslist lists."""
    command = [vol, "-q", "--clear-cache", "-s", symbols, "-f", image, "-r", "json"]
    command += ["mac.pslist", "--pslist-method", method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Volatility 3 failed on {image}:\n{done.stderr[-2000:]}")
    return {row["PID"] for row in json.loads(done.stdout[done.stdout.index("[") :])}


def compare(vol: str, dump: str, folder: str) -> bool:
    """Convert a dump's LiME to raw and LiME, and hold both lists against ours."""
    import inputs

    write_isf(folder, dump, inputs.truth(dump))
    where = ["-N", inputs.real(f"dumps/{dump}/mach_kernel")]
    where += ["-M", inputs.real(f"dumps/{dump}/mem.lime")]
    kvmtool = [sys.executable, "-m", "kvmtool"]
    listed = subprocess.run(
        [*kvmtool, "procs", "--format", "json", *where], capture_output=True, check=True
    )
    ours = {row["pid"] for row in json.loads(listed.stdout) if not row["zombie"]}
    same = True
    for form in ("raw", "lime"):
        image = os.path.join(folder, f"{dump}.{form}")
        convert = [*kvmtool, "convert", image, "--to", form, *where]
        subprocess.run(convert, capture_output=True, check=True)
        for method in ("allproc", "tasks"):
            found = theirs(vol, folder, image, method)
            same &= found == ours
            verdict = "agree" if found == ours else f"DIFFER: {sorted(found ^ ours)}"
            print(f"{dump:16} {form:5} {method:8} {len(found)} processes: {verdict}")
    return same


def each_dump(compare: Callable[[str, str, str], bool]) -> int:
    """Exit status 0 if `compare`, given Volatility's path, a dump and a folder, agrees for all."""
    if not os.path.isdir(os.path.join(ROOT, "..", "shared", "data", "dumps")):
        print("the real dumps are not here (../shared/data): nothing to compare")
        return 0
    vol = install()
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for dump, why in DUMPS.items():
            if why:
                print(f"{dump:16} left out: {why}")
            else:
                same &= compare(vol, dump, folder)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(each_dump(compare))
