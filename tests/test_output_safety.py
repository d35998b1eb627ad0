"""Dumps whose every name is an attack: terminal escapes, formulas for spreadsheets, paths.

Each string in a dump's memory gets the attack in the place of its first characters; all commands
are run on what is left.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvmtool import sample
from kvmtool.cli import COMMANDS, cli
from kvmtool.cli.render import visible
from tests.builders import aff4, corefile, kernelcache
from tests.inputs import ROOT, real
from tests.test_builders_xnu import crash

if TYPE_CHECKING:
    from collections.abc import Callable

    Made = Callable[[str], tuple[str, str]]

ARGUMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dd": (("_version", "4"),),
    "nlist": (("_version", "_allproc"),),
    "print": (("*allproc.lh_first",), ("*kernproc",)),
    "procs": ((), ("--tree",), ("-o", "pid,comm,login,args")),
    "read": (("_version", "256"),),
    "search": (("a",),),
    "symbol": (("_version",),),
    "type": (("proc",),),
    "vmmap": (("kernel",), ("1",)),
    "vtop": (("_version",),),
    "walk": (("allproc", "--next", "p_list", "-o", "p_pid,p_comm"),),
}
OTHERS = {
    *("completion", "convert", "demo", "doctor", "extract", "kernels", "mount"),
    *("python", "regions", "types"),
}
NO_FORMAT = {"dd", "dmesg", "type"}
BANNER = "Darwin Kernel Version 13.4.0: x; root:xnu-2422.115.4~1/RELEASE_X86_64"
ESCAPES = (b"\x1b[7m", b"\x9b7m\r", b"\xe2\x80\xae\x07")  # CSI in 7 bits and in 8, a bidi override
FORMULA = b"=1+1"
MARK = "kvmtool-evil"
PATH = f"/tmp/{MARK}/x".encode()


def tainted(data: bytes, attack: bytes, start: int) -> bytes:
    """`data` with `attack` at the start of every string, from offset `start` on, with room for it.

    Symbols' names begin with an underscore and are let be, as is the kernel's banner.
    """
    string = rb"(?<=\0)(?!Darwin|kernel_task|x86_64|i386)[A-Za-z/][\x20-\x7e]{%d,}(?=\0)"
    string %= len(attack)

    def attacked(found: re.Match[bytes]) -> bytes:
        return attack + found[0][len(attack) :]

    return data[:start] + re.sub(string, attacked, data[start:])


def _made(folder: str) -> tuple[str, str]:
    """The article's machine: kernel, core."""
    sample.write(folder)
    return os.path.join(folder, "mach_kernel"), os.path.join(folder, "core")


def _built(folder: str) -> tuple[str, str]:
    paths = os.path.join(folder, "built.kernel"), os.path.join(folder, "built.core")
    built = crash("10.9.5 x86_64", banner=BANNER)
    for path, data in zip(paths, (built.kernel, built.core), strict=True):
        with open(path, "wb") as file:
            file.write(data)
    return paths


def _ran(folder: str) -> tuple[str, str]:
    """A real kernel that really ran."""
    kernel = "machine/x86_64-xnu-2422.115.4.mach_kernel"
    return real(kernel), real("machine/crash.kdp-core")


MACHINES: dict[str, Callable[[str], tuple[str, str]]] = {
    "made": _made,
    "built": _built,
    "ran": _ran,
}


def attacked(machine: str, attack: bytes, folder: str) -> tuple[str, str]:
    """Kernel and core, the core with the attack in it."""
    kernel, core = MACHINES[machine](folder)
    with open(core, "rb") as file:
        data = file.read()
    # the container's own header must go on saying what it says
    bad = tainted(data, attack, 0x1000 if machine == "made" else 0x8000)
    assert bad.count(attack) >= (1000 if machine == "ran" else 1)
    out = os.path.join(folder, f"{machine}.attacked")
    with open(out, "wb") as file:
        file.write(bad)
    return kernel, out


def commands() -> list[tuple[str, ...]]:
    names = sorted(set(COMMANDS) - OTHERS)
    return [(name, *more) for name in names for more in ARGUMENTS.get(name, ((),))]


def said(*arguments: str) -> tuple[str, str]:
    """What a command prints on stdout and stderr, as characters."""
    result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), arguments
    assert result.exit_code in (0, 1, 3), (arguments, result.output)
    return result.stdout, result.stderr


@pytest.mark.parametrize("attack", ESCAPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_escape_reaches_the_terminal(machine, attack, tmp_path) -> None:
    kernel, core = attacked(machine, attack, str(tmp_path))
    showed = set()
    for command in commands():
        for text in said("-N", kernel, "-M", core, *command):
            bad = {char for char in text if not char.isprintable()} - {"\n"}
            assert not bad - ({"\t"} if command[0] == "dmesg" else set()), (command, bad)
            if visible(attack.decode("utf-8", "surrogateescape")) in text:
                showed.add(command[0])
    assert len(showed) >= (8 if machine == "ran" else 2), showed


@pytest.mark.parametrize("machine", MACHINES)
def test_no_formula_reaches_a_spreadsheet(machine, tmp_path) -> None:
    kernel, core = attacked(machine, FORMULA, str(tmp_path))
    quoted = set()
    for command in commands():
        if command[0] in NO_FORMAT:
            continue
        text, _ = said("-N", kernel, "-M", core, *command, "--format", "csv")
        for row in csv.reader(io.StringIO(text)):
            for cell in row:
                number = re.fullmatch(r"-?[0-9.e+]+", cell)
                assert number or not cell.startswith(("=", "+", "-", "@")), (command, cell)
                if cell.startswith("'=1+1"):
                    quoted.add(command[0])
    assert len(quoted) >= (4 if machine == "ran" else 1), quoted


# Runs the commands of stdin and prints the paths, of all that were touched, that hold the mark.
WATCHED = """
import json, os, sys, warnings
touched, found = 0, []
MARK = sys.argv[1]
KINDS = ("open", "os.", "shutil.", "subprocess.", "glob.", "tempfile.", "sqlite3.", "ctypes.dlopen")

def hook(event, args):
    global touched
    if event.startswith(KINDS):
        touched += 1
        if MARK in repr(args):
            found.append(f"{event} {args!r}")

from typing import TYPE_CHECKING
from click.testing import CliRunner
from kvmtool.cli import cli
commands = json.load(sys.stdin)
sys.addaudithook(hook)
codes = [CliRunner().invoke(cli, command).exit_code for command in commands]
json.dump({"touched": touched, "found": found, "codes": codes}, sys.stdout)
"""


def watched(commands: list[list[str]]) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, MARK],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("machine", MACHINES)
def test_no_path_of_a_dump_is_touched(machine, tmp_path) -> None:
    kernel, core = attacked(machine, PATH, str(tmp_path))
    lines = [["-N", kernel, "-M", core, *command] for command in commands()]
    told = watched(lines)
    assert told["found"] == []
    assert told["touched"] > len(lines)
    assert 0 in told["codes"]


def test_no_path_of_a_container_is_touched(tmp_path) -> None:
    """Names inside of volumes, corefiles and kernel collections."""
    evil = PATH.decode()
    base = 0xFFFFFF8000200000
    kernel = kernelcache.small_kernel("x86_64", base, [base + 8])
    kext = kernelcache.Kext(
        "../" + evil,
        "1",
        kernelcache.small_kext("x86_64", base + (1 << 20), ["_a"], b"x" * 16),
        path=evil,
    )
    member = corefile.Member(evil.encode()[:15], corefile.gzip_member(kernel))
    volume = aff4.members((0x1000, bytes(4096)))
    volume[evil] = b"x"
    files = {
        "cache": kernelcache.prelinked_kernel(kernel, [kext]),
        "corefile": corefile.rad_mac(b"panic", [corefile.Member(b"kernel", kernel), member]),
        "volume": aff4.zipped(volume),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = {name: str(tmp_path / name) for name in files}
    told = watched(
        [
            ["-N", paths["cache"], "kexts"],
            ["-N", paths["cache"], "info"],
            ["extract", "kext", "../" + evil, str(tmp_path / "out"), "-N", paths["cache"]],
            ["-M", paths["corefile"], "info"],
            ["-M", paths["volume"], "info"],
        ]
    )
    assert told["found"] == []
    assert told["codes"][:3] == [0, 0, 0]
    assert (tmp_path / "out").exists()


def test_the_watch_sees_what_is_touched(tmp_path) -> None:
    told = watched([["-N", str(tmp_path / MARK), "info"]])
    assert MARK in told["found"][0]
