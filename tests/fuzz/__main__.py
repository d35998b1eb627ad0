"""All targets, two at a time: `python -m tests.fuzz [--seconds N] [--jobs N] [TARGET ...]`.

Findings lie in build/fuzz/TARGET/ beside the corpus; each is tried once more without tracing before
it is told. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

from tests.fuzz.judge import judge
from tests.fuzz.targets import TARGETS

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FOLDER = os.path.join(ROOT, "build", "fuzz")
_AT_LEAST = 5  # seconds left for which a worker that ended early is started again


def _fuzz(name: str, seconds: float) -> None:
    folder = os.path.join(FOLDER, name)
    os.makedirs(folder, exist_ok=True)
    end = time.monotonic() + seconds
    done = {"inputs": 0, "seconds": 0.0}
    with open(os.path.join(folder, "log"), "ab") as log:
        while (left := int(end - time.monotonic())) >= _AT_LEAST:
            command = [sys.executable, "-m", "tests.fuzz.worker", name, str(left), folder]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
            said = _stats(folder)
            done = {key: done[key] + said[key] for key in done}
    with open(os.path.join(folder, "done.json"), "w") as out:
        json.dump(done, out)
    print(f"{name:18} {done['seconds']:7.0f} s {done['inputs']:9} inputs", flush=True)


def _stats(folder: str) -> dict[str, float]:
    path = os.path.join(folder, "stats.json")
    if not os.path.exists(path):
        return {"inputs": 0, "seconds": 0.0}
    with open(path) as file:
        said: dict[str, float] = json.load(file)
    os.unlink(path)
    return said


def _findings(name: str) -> list[str]:
    """What the kept inputs do without tracing; those that do nothing any more are taken away."""
    folder, told = os.path.join(FOLDER, name), []
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if not os.path.isfile(path) or entry.endswith((".txt", ".json")) or entry == "log":
            continue
        with open(path, "rb") as file:
            data = file.read()
        found = judge(TARGETS[name].run, data)
        if found is None:
            os.unlink(path)
            continue
        last = found.text.strip().splitlines()[-1]
        told.append(f"{found.kind} {found.place} {last}: {os.path.relpath(path, ROOT)}")
    return told


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    seconds = float(os.environ.get("FUZZ_SECONDS", "600"))
    parser.add_argument("--seconds", type=float, default=seconds, help="for each target")
    parser.add_argument("--jobs", type=int, default=2)
    said = parser.parse_args()
    names = said.targets or list(TARGETS)
    warnings.simplefilter("ignore")
    os.environ["KVMTOOL_CACHE"] = ""
    os.environ["PYTHONPATH"] = os.pathsep.join((ROOT, os.path.join(ROOT, "tests")))
    with ThreadPoolExecutor(said.jobs) as pool:
        list(pool.map(lambda name: _fuzz(name, said.seconds), names))
    told = [f"{name}: {line}" for name in names for line in _findings(name)]
    print("\n".join(told) or "no findings")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
