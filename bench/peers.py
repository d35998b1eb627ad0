"""The peers that can be installed here, in a virtualenv of their own."""

from __future__ import annotations

import os
import subprocess
import venv

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PEERS = os.path.join(ROOT, "build", "peers")
PYTHON = os.path.join(PEERS, "bin", "python")
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


def _imports(name: str) -> bool:
    return not subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True).returncode
