"""Every command line in the documents is run, and what it prints is what is shown.

A page's ```console blocks run in order in one shell, in a folder of their own; its ```python blocks
run there too. In a console block `$ ` begins a command and `> ` continues it; what follows is its
output, then what it said on stderr, and is compared where it is shown: a line `...` stands for any
lines, `...` inside a line for any text. A comment before a block says what is special:

    <!-- needs fuse -->            left out, with that reason, where there is none
    <!-- needs data FILE... -->    files of ../shared/data, by their names there without .xz
    <!-- needs program jq -->
    <!-- needs stub -->            the machine sample behind a gdb stub at localhost:1234
    <!-- needs vmware -->          the same suspended: machine.vmss, machine.vmem
    <!-- needs a Mac -->           never run here
    <!-- exits 3 -->               the exit status of the block's last command; 0 otherwise
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmtool import sample
from kvmtool.formats.lime import Lime
from kvmtool.source import FileSource
from tests.builders import gdbserver, vmware
from tests.builders.gdbserver import Stub
from tests.inputs import DATA, ROOT, real

if TYPE_CHECKING:
    from collections.abc import Iterator

FENCE = re.compile(
    r"(?P<said>(?:^<!-- (?:needs|exits) [^\n]* -->\n+)*)"
    r"^```(?P<kind>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SAID = re.compile(r"<!-- (needs|exits) (.*?) -->")
MARK = "\x1e"
STUB = "gdb://localhost:1234"  # QEMU's -s
RAM = """FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-0000000007ffffff (prio 0, ram): pc.ram
"""
LIMIT = 120  # seconds a page may take


class Block(NamedTuple):
    """A fenced block of a page: its `kind`, where it is, what the comments before it say."""

    page: str
    line: int
    kind: str
    body: str
    needs: tuple[str, ...]
    exits: int

    def commands(self) -> list[tuple[str, str]]:
        """(command, output) of a console block; a python block is one command."""
        if self.kind == "python":
            return [(f"python3 - <<'END_OF_PYTHON'\n{self.body}END_OF_PYTHON", "")]
        found: list[tuple[str, str]] = []
        for line in self.body.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], ""))
            elif f"{line} ".startswith("> ") and found and not found[-1][1]:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", "")
            else:
                assert found, f"{self.page}:{self.line}: output before a command"
                found[-1] = (found[-1][0], f"{found[-1][1]}{line.rstrip()}\n")
        return found


def pages() -> list[str]:
    """The documents, relative to the checkout."""
    found = ["README.md", "CONTRIBUTING.md"]
    for folder, _, names in os.walk(os.path.join(ROOT, "docs")):
        paths = [os.path.join(folder, name) for name in names if name.endswith(".md")]
        found += [os.path.relpath(path, ROOT) for path in paths]
    return sorted(found)


def blocks_of(page: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    with open(os.path.join(ROOT, page), encoding="utf-8") as file:
        text = file.read()
    for found in FENCE.finditer(text):
        said = SAID.findall(found["said"])
        needs = tuple(value for key, value in said if key == "needs")
        exits = next((int(value) for key, value in said if key == "exits"), 0)
        line = text.count("\n", 0, found.start("kind")) + 1
        yield Block(page, line, found["kind"], found["body"], needs, exits)


ALL = [block for page in pages() for block in blocks_of(page)]
RUN = [block for block in ALL if block.kind in ("console", "python")]


def missing(block: Block) -> str | None:
    """Why the block is not run here; None when it is."""
    for need in block.needs:
        what, _, rest = need.partition(" ")
        if what == "fuse":
            here = os.access("/dev/fuse", os.R_OK | os.W_OK) and shutil.which("fusermount3")
            here = here and importlib.util.find_spec("mfusepy") is not None
        elif what in ("stub", "vmware"):
            here = True
        elif what == "program":
            here = shutil.which(rest) is not None
        elif what == "data":
            here = all(map(at_hand, rest.split()))
        else:
            here = False
        if not here:
            return f"{block.page}:{block.line}: needs {need}"
    return None


def at_hand(name: str) -> bool:
    """Whether ../shared/data has the file, packed or not."""
    path = os.path.join(DATA, name)
    return os.path.exists(path) or os.path.exists(f"{path}.xz")


def unpack(block: Block, folder: str) -> None:
    """Put the files of ../shared/data that the block needs into the folder."""
    for need in block.needs:
        for name in need.split()[1:] if need.startswith("data ") else ():
            link = os.path.join(folder, os.path.basename(name))
            if not os.path.exists(link):
                os.symlink(real(name), link)


def machine_memory(folder: str) -> tuple[list[tuple[int, bytes]], int]:
    """The machine sample: its memory as (address, bytes), and its page table's root."""
    paths = {os.path.basename(path): path for path in sample.write(folder, "machine")}
    with open(paths["serial.jsonl"]) as lines:
        root = int(json.loads(next(lines))["root"], 16)
    with contextlib.closing(FileSource(paths["memory.lime"])) as source:
        return [(r.address, source.read_at(r.offset, r.size)) for r in Lime(source).runs()], root


@contextlib.contextmanager
def stub(blocks: list[Block], folder: str) -> Iterator[str]:
    """Where the machine sample answers as one halted under QEMU does, if a block needs that."""
    if not any("stub" in block.needs for block in blocks):
        yield STUB
        return
    memory, root = machine_memory(f"{folder}/.stub")
    registers = gdbserver.registers(cr0=0x80000011, cr3=root, cr4=0x20, efer=0xD01)
    with Stub(physical=memory, registers=registers, monitor=RAM) as served:
        yield served.url


def suspend(folder: str) -> None:
    """machine.vmss and machine.vmem, as VMware leaves a suspended machine."""
    memory, root = machine_memory(f"{folder}/.vmware")
    regions, page = [], 0
    with open(f"{folder}/machine.vmem", "wb") as out:
        for address, data in memory:
            regions.append((address >> 12, page, len(data) >> 12))
            page += out.write(data) >> 12
    groups = {"memory": vmware.regions(*regions), "cpu": [vmware.number("CR", root, 0, 3)]}
    with open(f"{folder}/machine.vmss", "wb") as out:
        out.write(vmware.state(groups))


def script(blocks: list[Block]) -> str:
    """The blocks as one shell script that marks where each command's output begins and ends."""
    lines = []
    for block in blocks:
        for number, (command, _) in enumerate(block.commands()):
            name = f"{block.line}.{number}"
            lines.append(f"printf '{MARK}{name}\\n'\n{{ {command}\n}} 2>\"$HOME/stderr\"")
            lines.append(f"status=$?; cat \"$HOME/stderr\"; printf '{MARK}%d\\n' $status\n")
    return "\n".join(lines)


def run_page(page: str, folder: str) -> dict[str, tuple[str, int]]:
    """The output and exit status of each command of a page, by "line.number"."""
    blocks = [block for block in RUN if block.page == page and missing(block) is None]
    for block in blocks:
        unpack(block, folder)
    if any("vmware" in block.needs for block in blocks):
        suspend(folder)
    home = os.path.join(folder, ".home")
    os.mkdir(home)
    env = {
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "HOME": home,
        "LANG": "C.UTF-8",
    }
    with stub(blocks, folder) as url:
        done = subprocess.run(
            ["bash", "-s"],
            input=script(blocks).replace(STUB, url).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=env,
            timeout=LIMIT,
            check=False,
        )
    text = done.stdout.decode(errors="backslashreplace").replace(url, STUB)
    found = re.findall(f"{MARK}([\\d.]+)\\n(.*?){MARK}(\\d+)\\n", text, re.DOTALL)
    return {name: (output, int(status)) for name, output, status in found}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[str, int]]]:
    """What the commands of each page said; a page is run when it is first asked for."""

    class Pages(dict[str, dict[str, tuple[str, int]]]):
        def __missing__(self, page: str) -> dict[str, tuple[str, int]]:
            self[page] = run_page(page, str(tmp_path_factory.mktemp("page")))
            return self[page]

    return Pages()


def pattern(shown: str) -> str:
    """What is shown, as a regular expression: `...` stands for what is left out."""
    lines = []
    for line in shown.splitlines():
        if line == "...":
            lines.append("(?:.*\n)*?")
        else:
            lines.append(".*".join(map(re.escape, line.split("..."))) + "[ \t]*\n")
    return "".join(lines)


@pytest.mark.parametrize("block", RUN, ids=[f"{block.page}:{block.line}" for block in RUN])
def test_what_is_shown_is_what_is_printed(block, ran):
    reason = missing(block)
    if reason is not None:
        pytest.skip(reason)
    results = ran[block.page]
    commands = block.commands()
    for number, (command, shown) in enumerate(commands):
        assert f"{block.line}.{number}" in results, f"the shell ended before: {command}"
        output, status = results[f"{block.line}.{number}"]
        wanted = block.exits if number == len(commands) - 1 else 0
        assert status == wanted, f"$ {command}\n{output}"
        if shown and not re.fullmatch(pattern(shown), output.rstrip("\n") + "\n"):
            pytest.fail(f"$ {command}\nshown:\n{shown}\nprinted:\n{output}")


def test_no_command_line_escapes():
    """Commands stand in console blocks, and in those every line belongs to a command."""
    loose = [f"{b.page}:{b.line}" for b in ALL if b.kind in ("sh", "bash", "shell", "zsh")]
    loose += [f"{b.page}:{b.line}" for b in ALL if b.kind == "text" and "\n$ " in f"\n{b.body}"]
    assert not loose, "not in a console block, so never run"
    for block in RUN:
        assert block.commands(), f"{block.page}:{block.line}: no command"


@pytest.mark.parametrize(
    ("shown", "output", "fits"),
    [
        ("a\n...\nc\n", "a\nb\nb\nc\n", True),
        ("a\n...\n", "a\n", True),
        ("a ... c\n", "a b c\n", True),
        ("a\n", "a\nb\n", False),
        ("a.c\n", "abc\n", False),
        ("...\nb\n", "a\nc\n", False),
    ],
)
def test_what_is_left_out(shown, output, fits):
    assert bool(re.fullmatch(pattern(shown), output)) is fits


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the site needs kvmtool[docs]")
    pytest.importorskip("myst_parser", reason="the site needs kvmtool[docs]")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "docs",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "index.html").exists()
