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
# because lld-13 and a newer lld do not go together. So is makedumpfile: a few files are all of it.
LINKER = "usr/lib/llvm-13/bin/ld64.lld.darwinold"
LINKER_PACKAGES = ("lld-13", "libllvm13")
MAKEDUMPFILE = "usr/bin/makedumpfile"
MAKEDUMPFILE_PACKAGES = ("makedumpfile", "liblzo2-2", "libdw1", "libelf1")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")


class MissingToolsError(RuntimeError):
    """Programs that are not there; the message names the packages."""


class Tool(NamedTuple):
    """How to run a program that may be unpacked only; `libraries` is for LD_LIBRARY_PATH."""

    path: str
    libraries: str

    def run(self, *arguments: str, cwd: str) -> None:
        """Raises `subprocess.CalledProcessError` after the program has said why."""
        # what the linker leaves between two objects is memory it has not cleared: malloc must
        settings = {"LD_LIBRARY_PATH": self.libraries, "MALLOC_PERTURB_": "255"}
        subprocess.run([self.path, *arguments], cwd=cwd, env=os.environ | settings, check=True)

    def said(self, *arguments: str) -> str:
        """What it prints. Raises as `run`."""
        environment = os.environ | {"LD_LIBRARY_PATH": self.libraries}
        done = subprocess.run(
            [self.path, *arguments], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout


def require_programs() -> None:
    """Raises `MissingToolsError` naming every package that has to be installed."""
    missing = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name)})
    if missing:
        names = ", ".join(name for name in PROGRAMS if not shutil.which(name))
        packages = " ".join(missing)
        raise MissingToolsError(
            f"{names} not found; on Debian 12: apt-get install --no-install-recommends {packages}"
        )


def linker(folder: str) -> Tool:
    """The linker, installed or unpacked into `folder`/toolchain (fetched with apt-get download)."""
    return _tool(folder, LINKER, LINKER_PACKAGES)


def makedumpfile(folder: str) -> Tool:
    """The program that writes kdumps from ELF cores, likewise."""
    return _tool(folder, MAKEDUMPFILE, MAKEDUMPFILE_PACKAGES)


def _tool(folder: str, program: str, packages: tuple[str, ...]) -> Tool:
    root = os.path.abspath(os.path.join(folder, "toolchain"))
    for base in ("/", root):
        libraries = ":".join(os.path.join(base, part) for part in _LIBRARIES)
        found = Tool(os.path.join(base, program), libraries)
        if os.access(found.path, os.X_OK):
            return found
    _unpack(root, os.path.basename(program), packages)
    return found


def _unpack(root: str, program: str, packages: tuple[str, ...]) -> None:
    """apt-get download and dpkg -x, which need no root and install nothing."""
    what = f"{program} not found; on Debian 12: apt-get download {' '.join(packages)}"
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise MissingToolsError(f"{what}, and unpack them into {root}")
    debs = os.path.join(root, "debs", program)
    os.makedirs(debs, exist_ok=True)
    try:
        subprocess.run(
            ["apt-get", "-qq", "download", *packages],
            cwd=debs,
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        raise MissingToolsError(f"{what} failed (apt-get update first?): {error.stderr}") from error
    for name in sorted(os.listdir(debs)):
        subprocess.run(["dpkg", "-x", os.path.join(debs, name), root], check=True)
