"""The programs the machine is built and judged with, and the Debian packages that have them."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import NamedTuple

# program: the package of Debian 12 it comes from
PROGRAMS = {
    "clang-14": "clang-14",
    "dsymutil-14": "llvm-14",
    "llvm-nm-14": "llvm-14",
    "lldb-14": "lldb-14",
    "gdb": "gdb",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-i386": "qemu-system-x86",
}
# The last linker that puts a Mach-O image where XNU's kernels lie; it is unpacked, not installed,
# because lld-13 and a newer lld do not go together.
LINKER = "ld64.lld.darwinold"
LINKER_PACKAGES = ("lld-13", "libllvm13")


class MissingToolsError(RuntimeError):
    """Programs that are not there; the message names the packages."""


class Linker(NamedTuple):
    """How to run the linker."""

    path: str
    libraries: str

    def run(self, *arguments: str, cwd: str) -> None:
        """Link. Raises `subprocess.CalledProcessError` after the linker has said why."""
        # what this linker leaves between two objects is memory it has not cleared: malloc must
        settings = {"LD_LIBRARY_PATH": self.libraries, "MALLOC_PERTURB_": "255"}
        subprocess.run([self.path, *arguments], cwd=cwd, env=os.environ | settings, check=True)


def require_programs() -> None:
    """Raises `MissingToolsError` naming every package that has to be installed."""
    missing = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name)})
    if missing:
        names = ", ".join(name for name in PROGRAMS if not shutil.which(name))
        packages = " ".join(missing)
        raise MissingToolsError(
            f"{names} not found; on Debian 12: apt-get install --no-install-recommends {packages}"
        )


def linker(folder: str) -> Linker:
    """The linker, installed or unpacked into `folder`/toolchain (fetched with apt-get download)."""
    root = os.path.abspath(os.path.join(folder, "toolchain"))
    for base in ("/", root):
        found = Linker(
            os.path.join(base, "usr/lib/llvm-13/bin", LINKER),
            os.path.join(base, "usr/lib/x86_64-linux-gnu"),
        )
        if os.access(found.path, os.X_OK):
            return found
    _unpack(root)
    return found


def _unpack(root: str) -> None:
    """apt-get download and dpkg -x, which need no root and install nothing."""
    what = f"{LINKER} not found; on Debian 12: apt-get download {' '.join(LINKER_PACKAGES)}"
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise MissingToolsError(f"{what}, and unpack both into {root}")
    debs = os.path.join(root, "debs")
    os.makedirs(debs, exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "-qq", "download", *LINKER_PACKAGES],
            cwd=debs,
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise MissingToolsError(f"{what} failed (apt-get update first?): {error.stderr}") from error
    for name in sorted(os.listdir(debs)):
        subprocess.run(["dpkg", "-x", os.path.join(debs, name), root], check=True)
