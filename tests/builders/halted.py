"""The memory of the embedded sample in a QEMU that halts at once: dumps by a real writer.

Needs QEMU and nothing else: no kernel runs. The machine's ROM is a few instructions that set CR3 as
the sample's kernel had it, and the sample's pages are put where they were.
"""

from __future__ import annotations

import json
import os
from typing import NamedTuple

from kvmtool import sample
from kvmtool.formats.lime import Lime
from kvmtool.memory import read_zero_filled
from kvmtool.source import FileSource
from tests.machine.vm import MEMORY, MachineError, Qemu

_ROM_SIZE = 64 << 10
_RESET = 16  # bytes before the end of the ROM, where the processor begins
_SAID = b"K"


class Halted(NamedTuple):
    """A dump of one machine in every form QEMU offers, by its name for it, and what is in it."""

    arch: str
    paths: dict[str, str]  # "elf", "kdump-zlib", ...
    kernel: str
    lime: str
    root: int


def dump(arch: str, folder: str) -> Halted:
    """All that into `folder`. Raises `MachineError`."""
    kernel, lime, serial = (
        os.path.join(folder, name) for name in ("mach_kernel", "memory.lime", "serial.jsonl")
    )
    sample.write(folder, "machine")
    with open(serial, encoding="ascii") as lines:
        root = next(int(row["root"], 16) for row in map(json.loads, lines) if "root" in row)
    pages, said, rom = (os.path.join(folder, name) for name in ("pages", "said", "rom"))
    start = _write_pages(lime, pages)
    with open(rom, "wb") as out:
        out.write(_rom(root))
    options = (
        *("-bios", rom, "-debugcon", f"file:{said}"),
        *("-device", f"loader,file={pages},addr={start:#x},force-raw=on"),
    )
    paths = {}
    with Qemu(arch, folder, options) as qemu:
        if not qemu.wait(lambda: os.path.exists(said) and os.path.getsize(said) > 0):
            raise MachineError(f"{arch}: the ROM was not run; QEMU: {qemu.complaints()}")
        for form in qemu.monitor("query-dump-guest-memory-capability")["formats"]:
            if form.startswith("win-"):  # of Windows alone
                continue
            path = paths[form] = os.path.join(folder, form)
            qemu.monitor("dump-guest-memory", protocol=f"file:{path}", paging=False, format=form)
    return Halted(arch, paths, kernel, lime, root)


def _write_pages(lime: str, path: str) -> int:
    """The sample's memory from its first page on, zeros where it has none; gives the address."""
    source = FileSource(lime)
    memory = Lime(source).physical()
    assert memory is not None
    regions = list(memory.regions())
    start, end = regions[0].start, regions[-1].start + regions[-1].size
    assert 1 << 20 <= start < end <= MEMORY << 20
    with open(path, "wb") as out:
        out.write(read_zero_filled(memory, start, end - start))
    source.close()
    return start


def _rom(root: int) -> bytes:
    code = b"\x66\xb8" + root.to_bytes(4, "little")  # mov eax, root
    code += b"\x0f\x22\xd8"  # mov cr3, eax
    code += b"\xb0" + _SAID + b"\xe6\xe9"  # mov al, 'K'; out 0xe9, al
    code += b"\xf4\xeb\xfd"  # hlt; jmp to it
    begin = b"\xea\x00\x00\x00\xf0"  # jmp f000:0000
    return code.ljust(_ROM_SIZE - _RESET, b"\0") + begin.ljust(_RESET, b"\0")
