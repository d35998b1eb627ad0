"""What tests of `check` share: the command's answer, and cores to write into."""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import NamedTuple

from click.testing import CliRunner

from kvmtool.cli import cli
from kvmtool.macho import MachO
from kvmtool.source import FileSource


class Answer(NamedTuple):
    """What the command said."""

    code: int
    rows: list
    said: str


def checked(kernel, core, *options):
    args = ["check", "-N", kernel, "-M", core, "--format", "json", *options]
    if core.endswith(".raw"):
        args += ["--core-format", "raw"]
    found = CliRunner().invoke(cli, args)
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    return Answer(found.exit_code, json.loads(found.stdout or "[]"), found.stderr)


class Core:
    """A copy of a Mach-O core to write into, by the kernel's addresses."""

    def __init__(self, tmp_path, core, name=None):
        self.path = str(tmp_path / (name or os.path.basename(core)))
        shutil.copyfile(core, self.path)
        source = FileSource(core)
        self._segments = [(s.vmaddr, s.filesize, s.fileoff) for s in MachO(source).segments]
        source.close()

    def write(self, address, data):
        at = next(
            offset + address - start
            for start, size, offset in self._segments
            if start <= address < start + size
        )
        with open(self.path, "r+b") as file:
            file.seek(at)
            file.write(data)

    def pointer(self, address, value):
        self.write(address, struct.pack("<Q", value))
