"""Fuzzes one parser for some seconds: `python -m tests.fuzz.worker TARGET SECONDS FOLDER`.

With atheris (PyPI; not among the project's dependencies, since it has no wheel for every Python)
coverage guides it; without, `mutate` does, from seeds that go on from run to run. Findings are kept
in FOLDER and do not end the run; `stats.json` there says how much was done.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pkgutil
import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuzz.judge import Finding

PATIENCE = 4.0  # times the seconds of an input, while its code is traced
ADDRESS_SPACE = 6 << 30
_LONGEST = 60  # seconds until one input is given up
UNGUIDED = ("commands",)  # traced they do one input a second, and some thirty without
_PACKED = ("fuse",)  # modules that need what may not be here


class Session:
    """What one run does: counts inputs, keeps findings."""

    def __init__(self, name: str, folder: str, patience: float) -> None:
        from tests.fuzz.targets import TARGETS

        self.run, self.folder, self.patience = TARGETS[name].run, folder, patience
        self.name, self.inputs = name, 0
        self._began = self._told = time.monotonic()
        os.makedirs(folder, exist_ok=True)

    def one(self, data: bytes) -> None:
        """Judge one input."""
        from tests.fuzz.judge import judge

        found = judge(self.run, data, self.patience)
        self.inputs += 1
        if found is not None:
            self._keep(found, data)
        if found is not None or time.monotonic() - self._told > 2:
            self.tell()

    def _keep(self, found: Finding, data: bytes) -> None:
        """The smallest input of each place."""
        stem = os.path.join(self.folder, f"{found.kind}-{found.place or 'x'}".replace(" ", "-"))
        if os.path.exists(stem) and os.path.getsize(stem) <= len(data):
            return
        with open(stem, "wb") as out:
            out.write(data)
        with open(stem + ".txt", "w") as out:
            out.write(found.text)

    def tell(self) -> None:
        """How much was done so far."""
        self._told = time.monotonic()
        said = {"inputs": self.inputs, "seconds": round(self._told - self._began, 1)}
        with open(os.path.join(self.folder, "stats.json"), "w") as out:
            json.dump(said, out)


def main(name: str, seconds: str, folder: str) -> None:
    """Fuzz."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    os.environ["KVMTOOL_CACHE"] = ""
    warnings.simplefilter("ignore")
    atheris = _atheris(name)
    if atheris is None:
        _blind(name, float(seconds), folder)
    else:
        _guided(atheris, name, seconds, folder)


def _atheris(name: str) -> Any:
    """The module; None where it is not, or is not wanted."""
    if name in UNGUIDED:
        return None
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def _seeds(name: str) -> list[bytes]:
    from tests.fuzz import seeds
    from tests.fuzz.targets import TARGETS

    return list(getattr(seeds, TARGETS[name].seeds)())


def _blind(name: str, seconds: float, folder: str) -> None:
    from tests.fuzz.mutate import mutated

    session, corpus = Session(name, folder, 1.0), _seeds(name)
    number = int.from_bytes(os.urandom(6), "little")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        session.one(mutated(corpus[number % len(corpus)], number))
        number += 1
    session.tell()


def _guided(atheris: Any, name: str, seconds: str, folder: str) -> None:
    with atheris.instrument_imports(include=["kvmtool"], enable_loader_override=False):
        session = Session(name, folder, PATIENCE)
        _import_all()
        corpus = _seeds(name)
    inputs = os.path.join(folder, "corpus")
    os.makedirs(inputs, exist_ok=True)
    for data in corpus:
        with open(os.path.join(inputs, hashlib.sha1(data).hexdigest()), "wb") as out:
            out.write(data)
    most = max(map(len, corpus)) + 4096
    session._began = time.monotonic()
    options = (f"-max_total_time={seconds}", f"-max_len={most}", f"-timeout={_LONGEST}")
    options += ("-rss_limit_mb=3000", "-print_final_stats=1", f"-artifact_prefix={folder}/hang-")
    atheris.Setup([sys.argv[0], *options, inputs], _quietly(session.one))
    atheris.Fuzz()


def _quietly(one: Callable[[bytes], None]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            one(data)

    return run


def _import_all() -> None:
    """Every module of the package now, while imports are traced."""
    import kvmtool

    for module in pkgutil.walk_packages(kvmtool.__path__, "kvmtool."):
        if not module.name.endswith((*_PACKED, "__main__")):
            importlib.import_module(module.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
