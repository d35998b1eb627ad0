"""The peers that can be installed here, in a virtualenv of their own."""

from __future__ import annotations

import os
import subprocess
import venv

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PEERS = os.path.join(ROOT, "build", "peers")
PYTHON = os.path.join(PEERS, "bin", "python")
VOLATILITY = os.path.join(PEERS, "bin", "vol")
# what it is imported as → what is installed
PACKAGES = {
    "volatility3": "volatility3==2.28.2",
    "drgn": "drgn==0.3.0",
    "lief": "lief",
    "macholib": "macholib",
}


def installed(name: str) -> bool:
    """Whether the peer of that name can be imported there, having tried to install it."""
    if not os.path.exists(PYTHON):
        venv.create(PEERS, with_pip=True)
    if _imports(name):
        return True
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, PACKAGES[name]], capture_output=True, check=False)
    return _imports(name)


def versions() -> list[str]:
    """Name and version of each peer that is installed."""
    if not os.path.exists(PYTHON):
        return []
    code = (
        "import importlib.metadata as m, sys\n"
        "known = {d.name: d.version for d in m.distributions()}\n"
        "print(*(f'{n} {known[n]}' for n in sys.argv[1:] if n in known), sep='\\n')"
    )
    done = subprocess.run([PYTHON, "-c", code, *PACKAGES], capture_output=True, text=True)
    return done.stdout.splitlines()


def _imports(name: str) -> bool:
    return not subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True).returncode
