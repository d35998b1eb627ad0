"""Independent judges: what others read from the same machine must be what its kernel said.

If one of these fails, the machine or its dumps are wrong, and nothing can be said about kvmtool.
Each gives the lines that say what does not hold; none is good.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import zlib
from typing import TYPE_CHECKING

from tests.machine import checks, dumps
from tests.machine.vm import RAM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.build import Images
    from tests.machine.vm import Vm

_SECONDS = 60
_GDB_ARCH = {"x86_64": "i386:x86-64", "i386": "i386"}


def llvm_nm(vm: Vm, images: Images) -> Iterator[str]:
    """The addresses the kernel has for its symbols: llvm-nm's, plus the slide."""
    slide = int(vm.said("machine")[0]["slide"], 16)
    values = {name: value for value, _, name in checks.symbols_of(images.kernel)}
    for told in vm.said("symbol"):
        address = values[told["name"]] + slide
        if address != int(told["address"], 16):
            yield f"{told['name']}: {address:#x}, the kernel says {told['address']}"


def kext(vm: Vm, images: Images) -> Iterator[str]:
    """cdevsw[11].d_read, as the kernel read it back, is llvm-nm's _my_mmread in the kext."""
    found, told = checks.my_mmread(vm, images), vm.said("cdevsw")[0]["d_read"]
    if found != int(told, 16):
        yield f"_my_mmread at {found:#x}, the kernel says {told}"


def page_walk(vm: Vm, paths: dict[str, str]) -> Iterator[str]:
    """Every range, through the page tables in the raw image."""
    with open(paths["raw"], "rb") as raw:
        tables = dumps.tables_of(vm, raw.read())
    for part in vm.said("range"):
        crc = zlib.crc32(tables.read(int(part["address"], 16), part["size"]))
        if crc != part["crc"]:
            yield f"{part['name']}: CRC {crc}, the kernel says {part['crc']}"


def same_memory(paths: dict[str, str]) -> Iterator[str]:
    """QEMU's two physical forms hold the same memory."""
    with open(paths["raw"], "rb") as file:
        raw = file.read()
    with open(paths["elf"], "rb") as file:
        elf = file.read()
    phoff, phentsize, phnum = (
        *struct.unpack_from("<Q", elf, 32),
        *struct.unpack_from("<2H", elf, 54),
    )
    for at in range(phoff, phoff + phnum * phentsize, phentsize):
        p_type, _, offset, _, address, size = struct.unpack_from("<2I4Q", elf, at)
        for start, end in RAM:
            low, high = max(start, address), min(end, address + size)
            if (
                p_type == 1
                and low < high
                and elf[offset + low - address :][: high - low] != raw[low:high]
            ):
                yield f"{low:#x} to {high:#x} of physical memory differs between elf and raw"


def gdb(vm: Vm, images: Images, folder: str) -> Iterator[str]:
    """gdb on QEMU's stub: the banner, cdevsw[11].d_read, every range."""
    symbols = {told["name"]: told["address"] for told in vm.said("symbol")}
    commands = [
        f"set architecture {_GDB_ARCH[vm.arch]}",
        f"target remote 127.0.0.1:{vm.port}",
        f"x/s {symbols['_version']}",
    ]
    paths = {}
    for number, part in enumerate(vm.said("range")):
        path = paths[part["name"]] = os.path.join(folder, f"gdb-{number}")
        low = int(part["address"], 16)
        commands.append(f"dump binary memory {path} {low:#x} {low + part['size']:#x}")
    out = _batch(["gdb", "-nx", "-batch"], "-ex", [*commands, "detach"])
    vm.monitor("stop")
    if vm.said("statics")[0]["version"] not in out:
        yield f"no banner at {symbols['_version']}: {out}"
    for part in vm.said("range"):
        with open(paths[part["name"]], "rb") as file:
            crc = zlib.crc32(file.read())
        os.unlink(paths[part["name"]])
        if crc != part["crc"]:
            yield f"{part['name']}: CRC {crc}, the kernel says {part['crc']}"


def lldb(vm: Vm, images: Images, core: str) -> Iterator[str]:
    """lldb on the core it wrote, by the DWARF of our build: where it finds the kernel, the banner,
    cdevsw[11].d_read, and the pids along allproc."""
    told = [each for each in vm.said("process") if each["task"]]
    hop, walk = "((struct proc *)allproc)", []
    for _ in told:
        walk.append(f"expression (int){hop}->p_pid")
        hop = f"((struct proc *){hop}->p_list.le_next)"
    dwarf = f"{images.kernel}.dSYM/Contents/Resources/DWARF/mach_kernel"
    commands = [
        f"target create --no-dependents {images.kernel} --core {core}",
        f"target symbols add {dwarf}",
        "image list",
        "target variable version",
        f"target variable cdevsw[{checks.MMREAD_MAJOR}].d_read",
        *walk,
    ]
    out = _batch(["lldb-14", "--no-lldbinit", "--batch"], "-o", commands)
    header = int(vm.said("symbol")[0]["address"], 16)
    listed = re.search(r"\[\s*0\] \S+ (0x[0-9a-f]+)", out)
    if listed is None or int(listed[1], 16) != header:
        yield f"the kernel is not found at {header:#x}: {out}"
    if f'"{vm.said("statics")[0]["version"]}"' not in out:
        yield f"no banner: {out}"
    reads = re.search(r"d_read = (0x[0-9a-f]+)", out)
    expected = int(vm.said("cdevsw")[0]["d_read"], 16)
    if reads is None or int(reads[1], 16) != expected:
        yield f"cdevsw[11].d_read is not {expected:#x}: {out}"
    pids = [int(pid) for pid in re.findall(r"\(int\) \$\d+ = (-?\d+)", out)]
    if pids != [each["pid"] for each in told]:
        yield f"allproc has the pids {pids}, the kernel says {[each['pid'] for each in told]}"


def _batch(program: list[str], option: str, commands: list[str]) -> str:
    options = [part for command in commands for part in (option, command)]
    done = subprocess.run(
        [*program, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
    )
    return done.stdout
