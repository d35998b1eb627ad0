"""What the mutations begin with: small files of every kind, from the tests' builders and ../shared.

Each function yields the corpus of a target; a real input is left out where it is not here.
"""

from __future__ import annotations

import json
import os
import random
import struct
import tempfile
import zipfile
from typing import TYPE_CHECKING

import pytest

from kvmtool import sample
from kvmtool.kernel_index import _FILE, _KNOWN
from kvmtool.types import layouts
from kvmtool.types.packer import pack
from tests.builders import aff4 as aff4_builder
from tests.builders import corefile as corefiles
from tests.builders import kdump as kdumps
from tests.builders import kernelcache, pagetable, physical, profile
from tests.builders import macho as machos
from tests.builders import peel as wrap
from tests.builders import sleepimage as sleepimages
from tests.builders import vmware as vmwares
from tests.builders import wkdm as wkdms
from tests.inputs import real
from tests.test_ctf import some_of_each
from tests.test_isf import content
from tests.test_vtypes import PROC, SYMBOLS, UNCOUNTED

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
TEXT = bytes(range(256)) * 16
_MOST = 256 << 10  # bytes of a real input that are taken


def _real(name: str, most: int = _MOST) -> Iterator[bytes]:
    try:
        path = real(name)
    except pytest.skip.Exception:
        return
    with open(path, "rb") as file:
        yield file.read(most)


def _sample(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        sample.write(folder)
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()


def kernel() -> Iterator[bytes]:
    from tests.test_mutations import _images

    with tempfile.TemporaryDirectory() as folder:
        yield from _images(folder)


def macho() -> Iterator[bytes]:
    yield _sample("KernelMemoryAccess")
    for arch in ("i386", "x86_64", "arm64"):
        yield kernelcache.small_kernel(arch, 0x200000, [0x200008, 0x200010])
    yield from _real("kexts/i386-KernelMemoryAccess")
    yield from _real("objects/ppc-xnu-792.25.20-kern_proc.o", 64 << 10)
    yield from _real("objects/x86_64-xnu-2422.115.4-kern_proc.o", 64 << 10)


def macho_core() -> Iterator[bytes]:
    for arch in ("i386", "x86_64", "ppc", "arm64"):
        file = machos.MachO(arch, machos.MH_CORE)
        file.segment("", 0x1000, TEXT)
        file.segment("", 0x8000, TEXT * 2)
        for name, payload in (
            ("main bin spec", struct.pack("<2IQ16s2I", 1, 1, 0x1000, bytes(16), 0, 0)),
            ("kern ver str", struct.pack("<I256s", 1, b"Darwin Kernel Version 17.7.0: x")),
            ("addrable bits", struct.pack("<2IQ", 3, 39, 0)),
        ):
            file.note(name, payload)
        yield file.build()
    yield from _real("machine/crash.kdp-core", 32 << 10)


def mac_memory_reader() -> Iterator[bytes]:
    for bits in (32, 64):
        yield physical.mac_memory_reader(
            ("available", 0, TEXT), ("LoaderData", 0x10000, TEXT * 2), bits=bits
        )


def corefile() -> Iterator[bytes]:
    core = b"\xcf\xfa\xed\xfe" + TEXT * 3
    log = b"panic(cpu 0): x\n"
    stored = corefiles.gzip_member(core)
    yield corefiles.sad_mac(log, stored)
    yield corefiles.rad_mac(log, [corefiles.Member(b"kernel", stored)])
    for flags, data in ((corefiles.ZLIB, stored), (corefiles.LZ4, corefiles.lz4_frame(core))):
        member = corefiles.Member(b"kernel", data)
        yield corefiles.boss_mac(log, [member._replace(flags=flags)])
    yield from _real("machine/armc.corefile", 40 << 10)


def lime() -> Iterator[bytes]:
    yield physical.lime((0, TEXT), (0x10000, TEXT * 2))
    for dump in ("i386-10.5.8", "x86_64-10.8.5"):
        yield from _real(f"dumps/{dump}/mem.lime", 16 << 10)


def elf_core() -> Iterator[bytes]:
    seg = physical.Segment
    names = {"rip": 0xFFFFFF8000200000, "cr3": 0x1000, "cr0": 0x80000001}
    notes = physical.qemu_note(names) + physical.prstatus64(names)
    vbox = physical.vbox_notes(names)
    yield physical.elf(seg(notes, p_type=physical.PT_NOTE), seg(TEXT), seg(TEXT, 0x10000))
    yield physical.elf(seg(vbox, p_type=physical.PT_NOTE), seg(TEXT), extended=True)
    yield physical.elf(seg(TEXT), bits=32, machine=physical.EM_386)
    arm = physical.prstatus_arm64(list(range(31)), 1, 2, 3)
    yield physical.elf(seg(arm, p_type=physical.PT_NOTE), seg(TEXT), machine=physical.EM_AARCH64)
    yield from _real("machine/live.elfcore", 16 << 10)


def _pages() -> dict[int, bytes | kdumps.Stored]:
    found: dict[int, bytes | kdumps.Stored] = {
        n: random.Random(n).randbytes(64) * 64 for n in (0, 1, 5)
    }
    return found | {6: bytes(PAGE), 7: kdumps.Stored(TEXT, 0)}


def kdump() -> Iterator[bytes]:
    notes = physical.qemu_note({"cr3": 0x1000})
    yield kdumps.kdump(_pages(), notes=notes)
    yield kdumps.kdump(_pages(), bits=32, version=3)
    yield kdumps.kdump(_pages(), version=5, split=(0, 6))
    for method, flags in (("snappy", kdumps.SNAPPY), ("zstd", kdumps.ZSTD)):
        data = aff4_builder._snappy(TEXT) if method == "snappy" else wrap.zstd(TEXT)
        yield kdumps.kdump({0: kdumps.Stored(data, flags)}, version=6)
    yield kdumps.kdump({0: kdumps.Stored(b"\x14abc\x11\0\0", kdumps.LZO)}, version=6)


def flattened() -> Iterator[bytes]:
    for data in kdump():
        yield kdumps.flattened(*kdumps.in_records(data, PAGE))
        break
    yield kdumps.flattened((0x2000, TEXT), (0, next(elf_core())), (0x1000, TEXT))


def vmware() -> Iterator[bytes]:
    number = vmwares.number
    memory = vmwares.Tag("Memory", TEXT * 6, (0, 0), 63)
    regions = vmwares.regions((0, 0, 4), (1 << 20, 4, 2))
    cpus = [number("cpu:numVCPUs", 2), *(number("CR", 0x1000 * n, 0, n) for n in range(5))]
    for magic in (0xBED2BED2, 0xBED0BED0, 0xBAD1BAD1):
        yield vmwares.state({"cpu": cpus, "memory": [memory, *regions]}, magic)
    yield vmwares.state({"memory": regions, "cpu": cpus})


def aff4() -> Iterator[bytes]:
    ranges = ((0x1000, TEXT), (0x100000, TEXT * 2))
    for style in ("standard", "pmem3", "pmem2"):
        yield aff4_builder.aff4(*ranges, style=style)
    for method in ("snappy", "lz4"):
        yield aff4_builder.aff4(*ranges, method=method)
    folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data")
    for name in sorted(os.listdir(folder)):
        if name.endswith(".aff4"):
            with open(os.path.join(folder, name), "rb") as file:
                yield file.read()


def sleepimage() -> Iterator[bytes]:
    memory = {n: TEXT if n % 3 else bytes(PAGE) for n in (*range(3, 12), 0x100, 0x101)}
    span = sleepimages.Span
    for era in sleepimages.ERAS.values():
        yield sleepimages.image(memory, era)
    yield sleepimages.image(memory, code=span(0x100, 2), preview=(span(5, 2), span(9, 1)))


def peel() -> Iterator[bytes]:
    image = kernelcache.small_kernel("x86_64", 0xFFFFFF8000200000, [0xFFFFFF8000200008])
    yield wrap.fat([(0x01000007, 3, image), (7, 3, image)])
    yield wrap.fat([(0x01000007, 3, image)], wide=True)
    yield wrap.im4p(wrap.lzfse(image), wrap.compression(1, len(image)))
    yield wrap.img4(wrap.im4p(image))
    yield wrap.im4p(wrap.comp("lzss", wrap.lzss(image), image))
    yield wrap.comp("lzvn", wrap.lzvn(image), image)
    yield from (wrap.gzip(image), wrap.xz(image), wrap.zstd(image), wrap.lzfse_stored(image))
    for name in ("lzvn-1071.bin", "lzvn-1165.bin", "lzfse-102400.bin"):
        yield from _real(f"codecs/{name}", 128 << 10)


def codecs() -> Iterator[bytes]:
    data = random.Random(1).randbytes(3000) * 40
    yield wrap.gzip(data)
    yield wrap.gzip(TEXT) + wrap.gzip(TEXT)
    yield corefiles.lz4_frame(data)
    yield corefiles.lz4_frame(data, block=4096, linked=False)


def wkdm() -> Iterator[bytes]:
    from tests.test_wkdm import drawn

    for seed, kind in enumerate(("same", "alike", "mixed", "small", "sparse")):
        for form in (0, 1):
            yield wkdms.packed(drawn(kind, seed), form)
    yield wkdms.pairs(drawn("sparse", 3))


def dwarf() -> Iterator[bytes]:
    from tests.test_dwarf_hostile import file_of, images, integer, member, struct

    proc = struct("proc", 8, member("p_pid", "int"), member("p_next", "proc"))
    for version, order in ((2, "<"), (4, ">"), (5, "<")):
        arch = "x86_64" if order == "<" else "ppc"
        yield file_of(integer(), proc, version=version, order=order, arch=arch)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield from images(folder)
    except (pytest.skip.Exception, AssertionError):
        return  # no compiler here


def ctf() -> Iterator[bytes]:
    from tests.test_type_mutations import _kernel

    for version, order in ((2, "<"), (3, ">"), (4, "<")):
        yield some_of_each(version, order).build()
    yield some_of_each(2, "<").build(compress=True)
    yield _kernel(some_of_each(2, "<").build())


def isf() -> Iterator[bytes]:
    yield json.dumps(content()).encode()
    yield json.dumps(content(), indent=1).encode()


def vtypes() -> Iterator[bytes]:
    files = {"a.symbol.dsymutil": SYMBOLS, "a.vtypes": profile.vtypes(PROC)}
    yield profile.archive(files, zipfile.ZIP_STORED)
    yield profile.archive(files)
    yield profile.vtypes(PROC).encode()
    yield profile.vtypes(UNCOUNTED).encode()


def listing() -> Iterator[bytes]:
    yield SYMBOLS.encode()


def plist() -> Iterator[bytes]:
    shared = kernelcache.Shared("x & y")
    kext = {
        "CFBundleIdentifier": "com.example.one",
        "CFBundleVersion": "1.0",
        "_PrelinkExecutableLoadAddr": kernelcache.Hex(0xFFFFFF7F80001000),
        "_PrelinkExecutableSize": kernelcache.Hex(0x1000),
        "OSBundleLibraries": {"com.apple.kpi.bsd": "8.0", "again": shared, "twice": shared},
        "_PrelinkInterfaceUUID": bytes(range(16)),
    }
    yield kernelcache.plist({"_PrelinkInfoDictionary": [kext, {**kext, "yes": True}]})
    yield kernelcache.plist([kext])
    yield from _real("kexts/i386-KernelMemoryAccess.Info.plist")


def gdb_packets() -> Iterator[bytes]:
    from tests.builders import gdbserver

    packet = gdbserver.packet
    yield b"+".join(
        packet(p)
        for p in (b"PacketSize=1000;qXfer:features:read+", b"T05thread:01;", b"OK", b"E14", b"m01")
    )
    yield packet(b"b" + gdbserver.escaped(bytes(range(64)))) + packet(b"0" * 64, True)
    yield gdbserver.X86_64_XML.encode()
    yield gdbserver.CORE_XML.encode()


def gdb_stub() -> Iterator[bytes]:
    """What the stub of the tests said in whole sessions."""
    from kvmtool.formats import gdb
    from tests.builders import gdbserver
    from tests.fuzz import looks
    from tests.fuzz.recording import recorded

    memory = ((0xFFFFFF8000200000, TEXT), (0, TEXT))
    for options in (
        {"memory": memory, "registers": gdbserver.registers(rip=0xFFFFFF8000200000)},
        {"memory": memory, "no_ack_offered": True, "binary": True, "run_lengths": True},
        {"memory": memory, "physical": ((0, TEXT * 4),), "unasked": True},
    ):
        with gdbserver.Stub(**options) as stub, recorded() as heard:
            target = gdb.open_gdb(stub.url)
            looks.dump(target)
            target.close()
        yield bytes(heard)


def page_tables() -> Iterator[bytes]:
    for index, mode in enumerate(sorted(pagetable.MODES)):
        tables = pagetable.Tables(mode, 0x30000 if "16K" in mode else 0xC000)
        base = pagetable.KERNEL[mode] or 3 << 22
        tables.map(base + tables.page, 0x1000 & -tables.page)
        tables.map(base + 3 * tables.page, tables.page)
        yield bytes([index]) + struct.pack("<I", tables.root) + bytes(tables.memory)


def expression() -> Iterator[bytes]:
    for text in (
        *(
            "head->next->key",
            "table[1].d_open + 0x40",
            "(*head).name[2]",
            "sizeof(struct node [3])",
        ),
        *("&table[1] - table", "offsetof(struct node, cells[2].d_open)", "(key_t)-1 << 3 | 7"),
        *(
            "head ? (long)(node_t *)8 : 'proc' / 0",
            '"main" + 1',
            "-7 % 2 >> 1 == !0",
            "const char *",
        ),
        *("unsigned long long[7]", "*(node **)&plain", "head->rate * 1", "((((1))))", "plain"),
    ):
        yield text.encode()


def type_cache() -> Iterator[bytes]:
    from tests.test_packed import Made

    source = layouts.table("10.9.5 x86_64").source
    yield pack(source, [("tag", "proc"), ("tag", "task"), ("tag", "nonesuch")])
    yield pack(Made())


def cached() -> Iterator[bytes]:
    yield b"0\n1000\n4-level\n1000007\nffffff8000200000\nCR3"
    known = _KNOWN.pack(16, 0, 6, 3) + bytes(16) + b"x86_64" + b"abc"
    yield _FILE.pack(1, 2, 4, 2) + b"/a/b" + known * 2 + _FILE.pack(1, 2, 2, 0) + b"/c"


def cores() -> Iterator[bytes]:
    """Dumps whose kernel and symbols are inside."""
    from tests.test_builders_xnu import crash

    for name, release in (
        ("10.9.5 x86_64", "2422.115.4"),
        ("15.5 arm64", "11417.121.6"),
        ("10.6.8 i386", "1504.15.3"),
    ):
        arch = name.split()[1].upper()
        banner = f"Darwin Kernel Version 1.2.3: x; root:xnu-{release}~1/RELEASE_{arch}"
        yield crash(name, banner=banner, keep_linkedit=True).core
