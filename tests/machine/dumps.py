"""The machine's memory in every form: QEMU's own, and those made from them here."""

from __future__ import annotations

import lzma
import os
import struct
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from tests.machine import pagewalk
from tests.machine.proxy import Proxy
from tests.machine.vm import MEMORY, RAM, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.machine.build import Images
    from tests.machine.toolchain import Tool
    from tests.machine.vm import Vm

LIME_MAGIC = 0x4C694D45
_LLDB_SECONDS = 60
_CORE_LIMIT = 64 << 20  # bytes; what lldb may write at most
PAGE = 4096
_WAYS = (("lzo", "-l"), ("snappy", "-p"), ("zstd", "-z"))  # of makedumpfile


class _Elf(NamedTuple):
    """Sizes and places in the headers of one ELF class."""

    size: int
    phentsize: int
    word: str
    e_phoff: int
    e_phnum: int


_ELF_64, _ELF_32 = _Elf(64, 56, "<Q", 32, 56), _Elf(52, 32, "<I", 28, 44)


def dump_all(vm: Vm, images: Images, folder: str, makedumpfile: Tool) -> dict[str, str]:
    """Form to path, for every form of a file QEMU or makedumpfile offers; `folder` gets them."""
    paths = {name: os.path.join(folder, name) for name in ("elf", "elf-paging", "raw", "lime")}
    for name, paging in (("elf", False), ("elf-paging", True)):
        _dump(vm, paths[name], paging=paging)
    for kind in vm.monitor("query-dump-guest-memory-capability")["formats"]:
        if kind.startswith("kdump-"):
            paths[kind] = os.path.join(folder, kind)
            _dump(vm, paths[kind], paging=False, format=kind)
    paths |= write_kdumps(paths["elf"], folder, makedumpfile)
    _fresh(paths["raw"])
    vm.monitor("pmemsave", val=0, size=MEMORY << 20, filename=paths["raw"])
    with open(paths["raw"], "rb") as raw:
        memory = raw.read()
    with open(paths["lime"], "wb") as out:
        out.writelines(lime(memory, RAM))
    paths["macho-core"] = os.path.join(folder, "macho-core")
    write_macho_core(vm, images, memory, paths["macho-core"])
    return paths


def _fresh(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)  # QEMU's are mode 0400


def _dump(vm: Vm, path: str, **arguments: object) -> None:
    _fresh(path)
    vm.monitor("dump-guest-memory", protocol=f"file:{path}", **arguments)


def write_kdumps(elf: str, folder: str, makedumpfile: Tool) -> dict[str, str]:
    """Form to path, of the ELF core rewritten by makedumpfile in each way it was built for."""
    said = makedumpfile.said("-v").splitlines()
    ways = {"makedumpfile": (), "makedumpfile-zlib": ("-c",)}
    ways |= {f"makedumpfile-{name}": (way,) for name, way in _WAYS if f"{name}\tenabled" in said}
    paths = {name: os.path.join(folder, name) for name in ways}
    whole = os.path.join(folder, "elf-plain")
    write_plain(elf, whole)
    for name, way in ways.items():
        _fresh(paths[name])
        arguments = (*way, "--message-level", "4", "-d", "0", whole, paths[name])
        makedumpfile.run(*arguments, cwd=folder)
    os.unlink(whole)
    return paths


def write_plain(elf: str, path: str) -> None:
    """The core with its program headers right behind its header and no sections.

    QEMU 7.2 puts sections between them; makedumpfile 1.7.2 does not look at e_phoff.
    """
    with open(elf, "rb") as file:
        core = bytearray(file.read())
    layout = _ELF_64 if core[4] == 2 else _ELF_32
    (phoff,) = struct.unpack_from(layout.word, core, layout.e_phoff)
    (count,) = struct.unpack_from("<H", core, layout.e_phnum)
    size = count * layout.phentsize
    core[layout.size : layout.size + size] = core[phoff : phoff + size]
    struct.pack_into(layout.word, core, layout.e_phoff, layout.size)
    struct.pack_into(layout.word, core, layout.e_phoff + struct.calcsize(layout.word), 0)  # e_shoff
    struct.pack_into("<2H", core, layout.e_phnum + 4, 0, 0)  # e_shnum, e_shstrndx
    with open(path, "wb") as out:
        out.write(core)


def lime(memory: bytes, ranges: Iterable[tuple[int, int]]) -> Iterable[bytes]:
    """LiME version 1 of parts of a raw image: (start, end) each; a range's end is inclusive."""
    for start, end in ranges:
        yield struct.pack("<2I3Q", LIME_MAGIC, 1, start, end - 1, 0)
        yield memory[start:end]


def tables_of(vm: Vm, memory: bytes) -> pagewalk.Tables:
    """The kernel's page tables in the raw image, by the root the kernel itself has named."""
    return pagewalk.Tables(memory, int(vm.said("machine")[0]["root"], 16), vm.arch)


def write_macho_core(vm: Vm, images: Images, memory: bytes, path: str) -> None:
    """An MH_CORE written by lldb from QEMU's stub, of what the kernel maps in 4 KiB pages."""
    _fresh(path)
    regions = pagewalk.regions(tables_of(vm, memory).pages())
    commands = (
        f"target create --no-dependents {images.kernel}",
        "gdb-remote 127.0.0.1:{port}",
        f"process save-core --style full {path}",
        "process detach",
    )
    with Proxy(vm.arch, vm.port, regions) as proxy:
        options = [part for c in commands for part in ("-o", c.format(port=proxy.port))]
        done = subprocess.run(
            [
                *("prlimit", f"--fsize={_CORE_LIMIT}", "lldb-14", "--no-lldbinit", "--batch"),
                *(*options, "-k", "process detach"),
            ],
            capture_output=True,
            text=True,
            timeout=_LLDB_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    vm.monitor("stop")  # detaching lets the processor go on
    if done.returncode or not os.path.exists(path):
        raise MachineError(f"lldb wrote no core: {done.stdout}{done.stderr}")


def write_sample(vm: Vm, memory: bytes, path: str) -> int:
    """The pages the kernel uses, as LiME in xz; gives its size in bytes.

    Page tables and everything mapped in 4 KiB pages, zeros included; nothing of the firmware.
    """
    tables = tables_of(vm, memory)
    kept = {page.physical for page in tables.pages() if page.size == PAGE} | tables.seen
    for process in vm.said("process"):
        if "cr3" in process:
            user = pagewalk.Tables(memory, int(process["cr3"], 16), vm.arch)
            kept |= {page.physical for page in user.pages() if page.size == PAGE} | user.seen
    ranges: list[tuple[int, int]] = []
    for page in sorted(kept):
        if ranges and ranges[-1][1] == page:
            ranges[-1] = (ranges[-1][0], page + PAGE)
        else:
            ranges.append((page, page + PAGE))
    packed = lzma.compress(b"".join(lime(memory, ranges)), preset=9 | lzma.PRESET_EXTREME)
    with open(path, "wb") as out:
        out.write(packed)
    return len(packed)
