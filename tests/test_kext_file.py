"""Kext files at an address: layout against the dumps' truth, relocations against llvm-rtdyld."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from typing import NamedTuple

import pytest

from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmError,
    MismatchError,
    TruncatedError,
    UnsupportedError,
)
from kvmtool.kext_file import load_kext
from kvmtool.macho import MachO
from kvmtool.source import BytesSource, FileSource, SliceSource
from tests import inputs
from tests.builders import llvm
from tests.builders import macho as build

ARTICLE_ADDRESS = 0x3BD01000  # Amit Singh, osxbook.com, 2006
S_ATTR_DEBUG = 0x02000000


def opened(path):
    return MachO(FileSource(path))


def zfs(arch):
    """A slice of the real fat kext; <mach-o/fat.h> by hand."""
    source = FileSource(inputs.real("kexts/fat-ppc-i386-zfs-102A"))
    magic, count = struct.unpack(">2I", source.read_at(0, 8))
    assert magic == 0xCAFEBABE
    for entry in struct.iter_unpack(">5I", source.read_at(8, 20 * count)):
        if entry[0] == build.MACHINES[arch].cputype:
            return MachO(SliceSource(source, entry[2], entry[3]))
    raise AssertionError(f"no {arch}")


def slice_file(image, folder):
    path = folder / "slice"
    path.write_bytes(image.source.read_at(0, image.source.size))
    return str(path)


def addresses(image, start, step=16):
    """An address for every name the image leaves undefined."""
    names = [e.name for e in image.symtab if not e.n_type & 0xE0 and e.n_type & 0xE == 0]
    return {name: start + step * place for place, name in enumerate(names)}


# layout


def test_the_articles_exercise():
    kext = load_kext(opened(inputs.real("kexts/i386-KernelMemoryAccess")), ARTICLE_ADDRESS)
    assert (kext.address, kext.hdr_size, kext.size) == (ARTICLE_ADDRESS, 0x1000, 0x2000)
    assert kext.symbols.address("_my_mmread") == 0x3BD020B6
    symbol, distance = kext.symbols.at(0x3BD020B6 + 4)
    assert (symbol.name, distance) == ("_my_mmread", 4)


def test_the_articles_own_number():
    """In the article's build `_my_mmread` is at 0x14f, and was found at 0x3bd0214f in cdevsw."""
    data = Object("i386", [Part("__text", bytes(0x200))], [build.Sym("_my_mmread", 0x14F)])
    kext = load_kext(data.image(), ARTICLE_ADDRESS)
    assert kext.symbols.address("_my_mmread") == 0x3BD0214F


@pytest.mark.parametrize("arch", ["i386", "ppc"])
def test_symbols_are_llvm_nms_at_the_load_address(arch, tmp_path):
    image = zfs(arch)
    kext = load_kext(image, ARTICLE_ADDRESS)
    printed = llvm.run("llvm-nm", slice_file(image, tmp_path))
    theirs = {}
    for line in printed.splitlines():
        value, letter, name = (line[:8], *line[9:].split(" ", 1))
        if letter not in "uUcC-":
            theirs.setdefault(name, set()).add(int(value, 16) + ARTICLE_ADDRESS + 0x1000)
    ours = {}
    for symbol in kext.symbols:
        ours.setdefault(symbol.name, set()).add(symbol.address)
    assert len(theirs) > 1000
    assert ours == theirs


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_where_the_dumps_have_it(dump):
    truth = inputs.truth(dump)
    said = next(k for k in truth["kexts"] if k["name"] == "com.osxbook.kext.KernelMemoryAccess")
    kext = load_kext(opened(inputs.real(f"dumps/{dump}/KernelMemoryAccess")), said["address"])
    row = next(e for e in truth["cdevsw"]["entries"] if 0 < e["d_read"] - said["address"] < 0x5000)
    address = kext.symbols.address
    assert kext.size == said["size"]
    assert kext.uuid.hex() == said["uuid"].replace("-", "").lower()
    assert address("_kmod_info") == said["kmod_info"]
    assert address("_KernelMemoryAccess_start") == said["start"]
    for member in ("open", "close", "read", "write", "ioctl"):
        assert address(f"_my_mm{member}") == row[f"d_{member}"]
    assert kext.unresolved == kext.notes == ()


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_linked_kexts_header_is_what_the_dump_holds(dump):
    from kvmtool.formats.macho_core import MachOCore

    said = next(k for k in inputs.truth(dump)["kexts"] if "KernelMemoryAccess" in k["name"])
    kext = load_kext(opened(inputs.real(f"dumps/{dump}/KernelMemoryAccess")), said["address"])
    core = MachOCore(FileSource(inputs.plain_core(dump))).virtual()
    header = kext.memory.read(said["address"], 0xB00)
    assert header == core.read(said["address"], 0xB00)
    assert header[:4] in (b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe")
    assert max(region.start + region.size for region in kext.memory.regions()) <= (
        said["address"] + said["size"]
    )


def test_a_linked_kext_somewhere_else_says_so():
    kext = load_kext(opened(inputs.real("dumps/x86_64-10.8.5/KernelMemoryAccess")), 0x10000)
    assert "linked for 0xffffff7f8434f000" in kext.notes[0]
    assert kext.symbols.address("_my_mmread") == 0x10C10
    with pytest.raises(FaultError, match="absent"):  # its header would be another
        kext.memory.read(0x10000, 4)


# who it is


def test_kmod_info_names_it():
    kext = load_kext(zfs("ppc"), ARTICLE_ADDRESS)
    assert (kext.identifier, kext.version) == ("com.apple.filesystems.zfs", "8.0")
    assert kext.identity.how == "_kmod_info in the file"


PLIST = """<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple Computer//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/P.dtd">
<plist version="1.0"><dict><key>CFBundleExecutable</key><string>{}</string>
<key>CFBundleIdentifier</key><string>org.example.plist</string>
<key>CFBundleVersion</key><string>4.2</string></dict></plist>
"""


@pytest.mark.parametrize("place", ["Info.plist", "../Info.plist"])
def test_the_info_plist_names_it(tmp_path, place):
    folder = tmp_path / "Contents" / "MacOS"
    folder.mkdir(parents=True)
    file = folder / "KernelMemoryAccess"
    shutil.copy(inputs.real("kexts/i386-KernelMemoryAccess"), file)
    (folder / place).write_text(PLIST.format("KernelMemoryAccess"))
    kext = load_kext(opened(str(file)), ARTICLE_ADDRESS)
    assert (kext.identifier, kext.version) == ("org.example.plist", "4.2")
    (folder / place).write_text(PLIST.format("AnotherKext"))
    kext = load_kext(opened(str(file)), ARTICLE_ADDRESS)
    assert kext.identifier == "com.osxbook.kext.KernelMemoryAccess"


def test_the_real_info_plist(tmp_path):
    shutil.copy(inputs.real("kexts/i386-KernelMemoryAccess"), tmp_path / "KernelMemoryAccess")
    shutil.copy(inputs.real("kexts/i386-KernelMemoryAccess.Info.plist"), tmp_path / "Info.plist")
    kext = load_kext(opened(str(tmp_path / "KernelMemoryAccess")), ARTICLE_ADDRESS)
    assert kext.identity.how.endswith("Info.plist")
    assert kext.identifier == "com.osxbook.kext.KernelMemoryAccess"
    assert kext.version == "1.0.0"


def test_a_damaged_info_plist_is_not_passed_over_silently(tmp_path):
    shutil.copy(inputs.real("kexts/i386-KernelMemoryAccess"), tmp_path / "KernelMemoryAccess")
    (tmp_path / "Info.plist").write_text("<plist><dict><key>CFBundleExec")
    kext = load_kext(opened(str(tmp_path / "KernelMemoryAccess")), ARTICLE_ADDRESS)
    assert kext.identifier == "com.osxbook.kext.KernelMemoryAccess"
    assert "Info.plist" in kext.identity.how


def test_without_either_it_has_its_files_name(tmp_path):
    path = tmp_path / "Nameless"
    path.write_bytes(Object("i386", [Part("__text", bytes(16))]).data())
    kext = load_kext(opened(str(path)), ARTICLE_ADDRESS)
    assert (kext.identifier, kext.version) == ("Nameless", None)


# relocations against an independent linker


def relocated(kext):
    """(section, link address, size) of what relocation entries change; GOT entries left out."""
    image = kext.image
    order, wide = image.byteorder, image.cputype in (0x01000007, 0x0100000C)
    for section in image.sections:
        if section.flags & S_ATTR_DEBUG:
            continue
        raw = image.source.read_at(section.reloff, 8 * section.nreloc)
        skip = False
        for first, second in struct.iter_unpack(order + "2I", raw):
            assert order == "<"
            scattered = first & 0x80000000 and not wide
            kind = first >> 24 & 15 if scattered else second >> 28
            length = first >> 28 & 3 if scattered else second >> 25 & 3
            address = first & 0xFFFFFF if scattered else first
            paired, skip = skip, kind in ((5,) if wide else (2, 4))
            if not paired and not (image.cputype == 0x01000007 and kind in (3, 4)):
                yield section, address, 1 << length


TRIPLES = {"i386": "i386-apple-macosx10.4", "x86_64": "x86_64-apple-macosx10.9"}
TRIPLES["arm64"] = "arm64-apple-macosx11"


def rtdyld(kext, path, arch, externs, checks, tmp_path):
    """Whether LLVM's run-time linker has `checks` {(section, offset, size): value} too."""
    if shutil.which("llvm-rtdyld") is None:
        pytest.skip("llvm-rtdyld is not installed")
    name = os.path.basename(path)
    lines = [
        f"# rtdyld-check: *{{{size}}}(section_addr({name}, {section})+{offset:#x}) = {value:#x}\n"
        for (section, offset, size), value in checks.items()
    ]
    (tmp_path / "checks").write_text("".join(lines))
    command = ["llvm-rtdyld", f"-triple={TRIPLES[arch]}", "-verify", path]
    command.append(f"-check={tmp_path / 'checks'}")
    for section in kext.image.sections:
        where = section.addr + kext.slide
        command += ["-map-section", f"{name},{section.sectname}={where:#x}"]
    for extern, address in externs.items():
        command += ["-dummy-extern", f"{extern}={address:#x}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "is false" in done.stdout + done.stderr or done.returncode == 0, done.stderr
    return done.returncode == 0


def values(kext):
    memory, slide = kext.memory, kext.slide
    return {
        (s.sectname, at, size): int.from_bytes(memory.read(s.addr + at + slide, size), "little")
        for s, at, size in relocated(kext)
    }


REAL = {
    "kma": ("i386", ARTICLE_ADDRESS, 65),
    "zfs": ("i386", ARTICLE_ADDRESS, 18946),
    "kern_proc": ("x86_64", 0xFFFFFF7F84350000, 753),
}


def real_object(name):
    if name == "zfs":
        return zfs("i386")
    files = {
        "kma": "kexts/i386-KernelMemoryAccess",
        "kern_proc": "objects/x86_64-xnu-2422.115.4-kern_proc.o",
    }
    return opened(inputs.real(files[name]))


@pytest.mark.parametrize("name", REAL)
def test_every_relocated_word_is_what_llvm_makes_of_it(name, tmp_path):
    arch, address, count = REAL[name]
    image = real_object(name)
    externs = addresses(image, address - 0x100000)
    kext = load_kext(image, address, externs.get)
    found = values(kext)
    assert len(found) == count
    assert kext.unresolved == ()
    path = slice_file(image, tmp_path)
    assert rtdyld(kext, path, arch, externs, found, tmp_path)
    at = random.Random(3).choice([*found])
    assert not rtdyld(kext, path, arch, externs, found | {at: found[at] + 1}, tmp_path)


ASSEMBLY = {
    "i386": """
        .text
        .globl _f
_f:     calll _extern
        calll _extern+0x10
        movl $_table+4, %eax
        movl _extern_data, %ecx
        movl $_extern_data+0x20, L_local-0x100
        calll _g
        movl L_local-_f(%ebx), %eax
        .globl _g
_g:     jmp _extern
        .data
L_local: .long _f
_table: .long _extern_data+8
        .long _g-L_local
        .long L_local-0x1000
""",
    "x86_64": """
        .text
        .globl _f
_f:     callq _extern
        callq _extern+0x10
        callq _g
        leaq _extern_data(%rip), %rax
        leaq _extern_data+0x11(%rip), %rax
        movb $1, _extern_data(%rip)
        movw $1, _extern_data(%rip)
        movl $1, _extern_data+4(%rip)
        leaq L_local(%rip), %rax
        .globl _g
_g:     jmp _extern
        .data
L_local: .quad _f
_table: .quad _extern_data+8
        .quad L_local
        .quad _g-_f
        .quad _table-_g+7
        .long _table-_g
""",
    "arm64": """
        .text
        .globl _f
_f:     bl _extern
        bl _g
        nop
        .globl _g
_g:     b _extern
        .data
        .p2align 3
_table: .quad _extern_data+8
        .quad _f
        .quad _g-_table
        .quad _g-_f+4
""",
}

COUNTS = {"i386": 12, "x86_64": 15, "arm64": 5}


@pytest.mark.parametrize("arch", ASSEMBLY)
def test_instructions_are_what_llvm_makes_of_them(arch, tmp_path):
    source, path = tmp_path / "in.s", str(tmp_path / "in.o")
    source.write_text(ASSEMBLY[arch])
    llvm.run("llvm-mc", f"-triple={TRIPLES[arch]}", "-filetype=obj", str(source), "-o", path)
    image = opened(path)
    where = ARTICLE_ADDRESS if arch == "i386" else 0xFFFFFF7F84350000
    externs = {"_extern": where - 0x123450, "_extern_data": where + 0x654328}
    kext = load_kext(image, where, externs.get)
    found = values(kext)
    assert len(found) == COUNTS[arch]
    assert rtdyld(kext, path, arch, externs, found, tmp_path)


# ppc, which no linker here knows: what its instructions compute


@pytest.mark.parametrize("target", [0x00227FFC, 0x00228000, 0x0022FFFC, 0x3BD0FFFF, 0xFFFF8000])
def test_ppc_halves_make_the_address_up(target):
    """`lis rX,hi(s+a); ori` and `lis rX,ha(s+a); addi`, as a processor executes them."""
    for addend in (0, 4, 0x8000, 0x12345678, -4):
        hi, lo = addend >> 16 & 0xFFFF, addend & 0xFFFF
        ha = addend + 0x8000 >> 16 & 0xFFFF
        words = [0x3C600000 | hi, 0x60630000 | lo, 0x3C600000 | ha, 0x38630000 | lo]
        entries = []
        for place, (kind, other) in enumerate([(4, lo), (5, hi), (6, lo), (5, ha)]):
            entries += [plain(">", 4 * place, 0, 0, 2, 1, kind), plain(">", other, 0, 0, 2, 0, 1)]
        kext = Object("ppc", [Part("__text", words, entries)], [undefined("_s")]).load(
            ARTICLE_ADDRESS, {"_s": target}.get
        )
        first, second, third, fourth = struct.unpack(">4I", kext.memory.read(0x3BD02000, 16))
        wanted = target + addend & 0xFFFFFFFF
        assert (first & 0xFFFF) << 16 | second & 0xFFFF == wanted
        low = (fourth & 0xFFFF ^ 0x8000) - 0x8000
        assert ((third & 0xFFFF) << 16) + low & 0xFFFFFFFF == wanted
        assert [w >> 16 for w in (first, second, third, fourth)] == [w >> 16 for w in words]


def test_ppc_local_halves_move_with_the_image():
    entries = [
        *(plain(">", 0, 1, 0, 2, 0, 6), plain(">", 0x9000, 0xFFFFFF, 0, 2, 0, 1)),
        *(scattered(4, 0, 2, 5, 0x8), scattered(0x1, 0, 2, 1, 0)),
        *(plain(">", 8, 1, 0, 2, 0, 7), plain(">", 0, 0, 0, 2, 0, 1)),
    ]
    words = [0x3C600001, 0x38639000, 0xE8639002]  # lis, addi, ld's cousin lwa
    kext = Object("ppc", [Part("__text", words, entries)]).load(0x20004000)
    found = struct.unpack(">3I", kext.memory.read(0x20005000, 12))
    # 0x9000 linked = 0x1_0000 + (s16)0x9000; loaded 0x2000e000 = 0x2001_0000 + (s16)0xe000
    assert found == (0x3C602001, 0x3863E000, 0xE863E002)


def test_ppc_branches():
    """bl to the kernel and inside; JBSR goes straight where it can, else to its island."""
    entries = [
        plain(">", 0, 0, 1, 2, 1, 3),  # bl _s
        plain(">", 4, 1, 1, 2, 0, 3),  # bl to our own section
        *(plain(">", 8, 0, 0, 2, 1, 13), plain(">", 0x10, 0, 0, 2, 0, 1)),  # jbsr _s+0x10
        *(plain(">", 12, 1, 0, 2, 0, 13), plain(">", 0x40, 0, 0, 2, 0, 1)),  # jbsr into __text
        *(plain(">", 16, 1, 0, 2, 1, 13), plain(">", 0, 0, 0, 2, 0, 1)),  # jbsr _far
    ]
    words = [0x48000001, 0x48000021, 0x48000101, 0x48000101, 0x48000101]
    symbols = [undefined("_s"), undefined("_far")]
    parts = [Part("__text", [*words, *[0] * 16], entries)]
    kext = Object("ppc", parts, symbols).load(
        0x01000000, {"_s": 0x00200000, "_far": 0x70000000}.get
    )
    start = 0x01001000
    found = struct.unpack(">5I", kext.memory.read(start, 20))
    to = [
        start + 4 * place + ((word & 0x03FFFFFC ^ 0x02000000) - 0x02000000)
        for place, word in enumerate(found)
    ]
    assert to == [0x00200000, start + 4 + 0x20, 0x00200010, start + 0x40, start + 16 + 0x100]
    assert {word & 0xFC000003 for word in found} == {0x48000001}


def test_ppc_jbsr_counts_from_the_start_of_its_section():
    island = [plain(">", 0, 2, 0, 2, 0, 13), plain(">", 8, 0, 0, 2, 0, 1)]
    inside = [scattered(4, 0, 2, 13, 0x24), scattered(8, 0, 2, 1, 0)]
    parts = [Part("__text", [0x48000001] * 8, island + inside), Part("__more", [0] * 4)]
    kext = Object("ppc", parts).load(0x01000000)
    found = struct.unpack(">2I", kext.memory.read(0x01001000, 8))
    assert found == (0x48000001 + 0x20 + 8, 0x48000001 + 0x20 + 8 - 4)


def test_absolute_targets_do_not_move():
    """r_symbolnum R_ABS: `call 0x200000` moves away from its target, `.long 0x200000` stays."""
    entries = [plain("<", 0, 0, 0, 2, 0, 0), plain("<", 4, 0, 1, 2, 0, 0)]
    words = [0x200000, 0x200000 - 8]
    symbols = [build.Sym("_fixed", 0x1234, build.N_ABS | build.N_EXT, 0)]
    entries.append(plain("<", 8, 0, 0, 2, 1, 0))
    kext = Object("i386", [Part("__text", [*words, 4], entries)], symbols).load(ARTICLE_ADDRESS)
    start = ARTICLE_ADDRESS + 0x1000
    first, second, third = struct.unpack("<3I", kext.memory.read(start, 12))
    assert (first, second + start + 8 & 0xFFFFFFFF, third) == (0x200000, 0x200000, 0x1238)


def test_debug_sections_are_not_loaded():
    body = struct.pack("<2I", *plain("<", 0x7FFFFFFF, 0xFFFFFF, 1, 3, 1, 15))
    data = bytearray(
        Object("i386", [Part("__text", bytes(64)), Part("__debug_x", body, [(1, 2)])]).data()
    )
    flags = data.index(b"__debug_x") + 56
    struct.pack_into("<I", data, flags, S_ATTR_DEBUG)
    kext = load_bytes(data)
    assert kext.memory.read(0x20001000, 64) == bytes(64)
    with pytest.raises(FaultError, match="unmapped"):
        kext.memory.read(0x20001040, 4)
    struct.pack_into("<I", data, flags, 0)
    with pytest.raises(FormatError):
        load_bytes(data).memory.read(0x20001000, 64)


@pytest.mark.parametrize("name", ["zfs", "bsd"])
def test_ppc_words_by_llvm_objdumps_reading_of_the_tables(name, tmp_path):
    """Every VANILLA entry: the word in the file, plus its symbol's address or the slide."""
    image = (
        zfs("ppc") if name == "zfs" else opened(inputs.real(f"objects/ppc-xnu-792.25.20-{name}.o"))
    )
    externs = addresses(image, 0x00300000)
    kext = load_kext(image, 0x1D000000, externs.get)
    printed = llvm.run("llvm-objdump", "--macho", "-r", slice_file(image, tmp_path))
    section, count = None, 0
    for line in printed.splitlines():
        if found := re.match(r"Relocation information \(.*,(\S+)\)", line):
            section = next(s for s in image.sections if s.sectname == found[1])
        found = re.match(r"([0-9a-f]{8}) (True|False) +long +(\S+) +0 +\S+ +(\S.*)", line)
        if not found or section.flags & S_ATTR_DEBUG:
            continue
        address, pcrel, extern, target = found.groups()
        assert pcrel == "False"
        at = section.addr + int(address, 16)
        stored = int.from_bytes(image.source.read_at(section.offset + int(address, 16), 4), "big")
        if extern == "True":
            own = next((e for e in image.symtab.find(target) if e.defined), None)
            moved = own.n_value + kext.slide if own else externs[target]
        else:
            moved = kext.slide
        word = int.from_bytes(kext.memory.read(at + kext.slide, 4), "big")
        assert word == stored + moved & 0xFFFFFFFF, line
        count += 1
    assert count == {"zfs": 680, "bsd": 7192}[name]


# kext bundles


@pytest.mark.parametrize("arch", ["x86_64", "arm64", "arm64e"])
@pytest.mark.parametrize("vmaddr", [0, 0xFFFFFF8000000000])
def test_a_bundles_local_and_external_entries(arch, vmaddr):
    kext = bundle(arch, vmaddr).load(0xFFFFFF7F80001000, {"_printf": 0xFFFFFF7F81234560}.get)
    assert (kext.hdr_size, kext.size) == (0, 0x8000)
    data = kext.symbols.address("_data")
    assert data == 0xFFFFFF7F80005000
    words = struct.unpack("<4Q", kext.memory.read(data, 32))
    assert words == (data + 8, 0xFFFFFF7F81234560 + 0x18, 0x1111, 0x2222)
    to = call_target(arch, kext, kext.symbols.address("_text"))
    assert to == 0xFFFFFF7F81234560
    assert kext.memory.read(data + 0x3000, 16) == bytes(16)  # zero-filled
    assert kext.unresolved == ("_weird",)
    for address in (kext.address, kext.address + 0x8000):  # header, __LINKEDIT
        with pytest.raises(FaultError, match="absent"):
            kext.memory.read(address, 4)


def test_a_bundle_loaded_where_it_was_linked_keeps_its_header():
    kext = bundle("x86_64", 0xFFFFFF7F80001000).load(0xFFFFFF7F80001000)
    assert kext.memory.read(kext.address, 4) == b"\xcf\xfa\xed\xfe"


def call_target(arch, kext, at):
    if arch == "x86_64":
        opcode, away = struct.unpack("<Bi", kext.memory.read(at, 5))
        assert opcode == 0xE8
        return at + 5 + away
    word = int.from_bytes(kext.memory.read(at, 4), "little")
    assert word >> 26 == 0x25
    return at + ((word << 2 & 0x0FFFFFFC ^ 0x08000000) - 0x08000000)


def test_what_nobody_defines_stays_and_is_listed():
    kext = bundle("x86_64", 0).load(0xFFFFFF7F80001000)
    assert kext.unresolved == ("_printf", "_weird")
    data = kext.symbols.address("_data")
    assert struct.unpack("<2Q", kext.memory.read(data, 16)) == (data + 8, 0x18)
    assert kext.memory.read(kext.symbols.address("_text"), 5) == b"\xe8\0\0\0\0"


def test_an_address_from_which_a_call_cannot_reach():
    kext = bundle("x86_64", 0).load(0x1000, {"_printf": 0xFFFFFF7F81234560}.get)
    with pytest.raises(MismatchError, match="cannot reach"):
        kext.memory.read(kext.symbols.address("_text"), 5)
    assert kext.memory.read(kext.symbols.address("_data"), 8)  # the rest can be read


def test_got_slots_lie_behind_the_sections_in_symbol_order():
    entries = [plain("<", 3, 1, 1, 2, 1, 3), plain("<", 10, 0, 1, 2, 1, 4)]
    entries.append(plain("<", 17, 2, 1, 2, 1, 3))
    code = b"\x48\x8b\x05\0\0\0\0" * 3 + b"\x90"
    symbols = [undefined("_a"), undefined("_b"), undefined("_nobody")]
    where = 0xFFFFFF7F80001000
    externs = {"_a": 0xFFFFFF8000200000, "_b": 0xFFFFFF8000300000}
    kext = Object("x86_64", [Part("__text", code, entries)], symbols).load(where, externs.get)
    text, slots = where + 0x1000, where + 0x1000 + 24
    reaches = [
        text + at + 4 + int.from_bytes(kext.memory.read(text + at, 4), "little") for at in (3, 10)
    ]
    assert reaches == [slots + 8, slots]
    assert struct.unpack("<2Q", kext.memory.read(slots, 16)) == (*externs.values(),)
    with pytest.raises(FaultError, match="absent"):  # its bytes are nowhere
        kext.memory.read(slots + 16, 8)
    assert kext.memory.read(text + 17, 4) == bytes(4)
    assert kext.unresolved == ("_nobody",)


# reading in pieces, and only when asked


def test_pieces_are_the_whole():
    kext = load_kext(real_object("kma"), ARTICLE_ADDRESS, lambda name: 0x00221100 + len(name))
    start, size = 0x3BD02000, 0x794
    whole = kext.memory.read(start, size)
    for step in (1, 3, 5, 64):
        pieces = [
            kext.memory.read(at, min(step, start + size - at))
            for at in range(start, start + size, step)
        ]
        assert b"".join(pieces) == whole
    raw = kext.image.source.read_at(kext.image.sections[0].offset, size)
    changed = {at for at in range(size) if raw[at] != whole[at]}
    touched = {s.addr + at + n for s, at, width in relocated(kext) for n in range(width)}
    assert changed
    assert changed <= touched


def test_find_sees_the_loaded_bytes():
    kext = load_kext(real_object("kma"), ARTICLE_ADDRESS)
    pointer = struct.pack("<I", kext.symbols.address("_my_mmread"))
    (found,) = kext.memory.find(pointer, 4)
    assert found == kext.symbols.address("_my_mm_cdevsw") + 8  # d_open, d_close, d_read


class Counting(BytesSource):
    def __init__(self, data):
        super().__init__(data, "counted")
        self.touched = []

    def read_at(self, off, size):
        self.touched.append((off, size))
        return super().read_at(off, size)


def test_relocations_are_read_when_bytes_are():
    with open(inputs.real("kexts/i386-KernelMemoryAccess"), "rb") as file:
        source = Counting(file.read())
    kext = load_kext(MachO(source), ARTICLE_ADDRESS)
    assert kext.symbols.address("_my_mmread")
    tables = [(s.reloff, 8 * s.nreloc) for s in kext.image.sections if s.nreloc]
    assert not set(tables) & set(source.touched)
    kext.memory.read(0x3BD02000, 4)
    assert set(tables) <= set(source.touched)


# files that lie


def entry_error(order, *entries, arch="i386", symbols=(), data=bytes(64)):
    kext = Object(arch, [Part("__text", data, list(entries))], list(symbols)).load(0x20000000)
    with pytest.raises(FormatError) as caught:
        kext.memory.read(kext.address + kext.hdr_size, 4)
    assert caught.value.offset is not None
    assert str(caught.value).startswith("kext: at offset 0x")
    return str(caught.value)


PLAIN = ("<", 0, 1, 0, 2, 0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"address": 61}, "r_address 0x3d is not one of its bytes"),
        ({"address": 0x7FFFFFFF}, "r_address 0x7fffffff"),
        ({"symbolnum": 2}, "r_symbolnum 0x2, expected at most 0x1"),
        ({"extern": 1, "symbolnum": 1}, "r_symbolnum 0x1, expected at most 0x0"),
        ({"extern": 1, "symbolnum": 0xFFFFFF}, "r_symbolnum 0xffffff"),
        ({"length": 0}, "r_length of 1 bytes, expected 4"),
        ({"length": 3}, "r_length of 8 bytes, expected 4"),
        ({"kind": 1}, "r_type 1, expected one of 0, 2, 4"),
        ({"kind": 15}, "r_type 15"),
        ({"kind": 2}, "expected r_type 1 to follow, got nothing"),
    ],
)
def test_entries_that_lie(change, said):
    fields = dict(
        zip(
            ("order", "address", "symbolnum", "pcrel", "length", "extern", "kind"),
            PLAIN,
            strict=True,
        )
    )
    assert said in entry_error("<", plain(**(fields | change)), symbols=[undefined("_s")])


def test_entries_that_lie_together():
    assert "got r_type 0" in entry_error("<", scattered(0, 0, 2, 2, 0), plain(*PLAIN))
    assert "r_value 0x1000, expected 0x0 to 0x40" in entry_error("<", scattered(0, 0, 2, 0, 0x1000))
    stab = build.Sym("_stab", 0, 0x24)
    said = entry_error("<", plain("<", 0, 0, 0, 2, 1, 0), symbols=[stab])
    assert "it is a stab" in said


def test_more_entries_than_any_kext_has():
    data = bytearray(Object("i386", [Part("__text", bytes(64), [plain(*PLAIN)])]).data())
    at = data.index(b"__text") + 52  # nreloc
    struct.pack_into("<I", data, at, 0x10000000)
    with pytest.raises(FormatError, match="0x10000000 relocation entries"):
        load_bytes(data).memory.read(0x20001000, 4)
    struct.pack_into("<I", data, at, 0x1000)
    with pytest.raises(TruncatedError):
        load_bytes(data).memory.read(0x20001000, 4)


def test_entries_of_a_machine_nobody_knows():
    kext = Object("arm", [Part("__text", bytes(64), [plain(*PLAIN)])]).load(0x20000000)
    with pytest.raises(UnsupportedError, match="relocations of arm are not known"):
        kext.memory.read(0x20001000, 4)
    bare = Object("arm", [Part("__text", b"\x01\x02\x03\x04")]).load(0x20000000)
    assert bare.memory.read(0x20001000, 4) == b"\x01\x02\x03\x04"


def load_bytes(data, address=0x20000000):
    return load_kext(MachO(BytesSource(bytes(data), "kext")), address)


def test_what_is_no_kext():
    for filetype in (build.MH_EXECUTE, build.MH_CORE, build.MH_DSYM):
        file = build.MachO("i386", filetype)
        file.segment("__TEXT", 0x1000, bytes(16))
        with pytest.raises(FormatError, match="expected a kext"):
            load_bytes(file.build())
    with pytest.raises(FormatError, match="no segment"):
        load_bytes(build.MachO("i386", build.MH_OBJECT).build())


@pytest.mark.parametrize("address", [-1, 0xFFFFE000, 1 << 32, 1 << 64])
def test_where_it_does_not_fit(address):
    with pytest.raises(MismatchError, match="do not fit into 32-bit addresses"):
        Object("i386", [Part("__text", bytes(64))]).load(address)


def test_a_section_that_is_not_in_the_file():
    data = bytearray(Object("i386", [Part("__text", bytes(64))]).data())
    struct.pack_into("<I", data, data.index(b"__text") + 36, 0x10000000)  # size
    with pytest.raises(TruncatedError, match="section __text"):
        load_bytes(data)


def test_damaged_kexts_give_only_our_errors():
    with open(inputs.real("kexts/i386-KernelMemoryAccess"), "rb") as file:
        good = file.read()
    image = real_object("kma")
    places = [*range(28, 28 + image.sizeofcmds)]
    places += [s.reloff + n for s in image.sections for n in range(8 * s.nreloc)]
    chance = random.Random(20060512)
    outcomes = set()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.choice(places)] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
        try:
            kext = load_bytes(data, ARTICLE_ADDRESS)
            for region in kext.memory.regions():
                kext.memory.read(region.start, min(region.size, 0x4000))
            outcomes.add((kext.identifier != "", len(kext.unresolved) > 0))
        except KvmError as error:
            outcomes.add(type(error))
    assert {FormatError, TruncatedError, (True, True)} <= outcomes


# building


def plain(order, address, symbolnum, pcrel, length, extern, kind):
    """struct relocation_info of <mach-o/reloc.h>: bit fields fill from the order's first bit."""
    if order == "<":
        bits = symbolnum | pcrel << 24 | length << 25 | extern << 27 | kind << 28
    else:
        bits = symbolnum << 8 | pcrel << 7 | length << 5 | extern << 4 | kind
    return address, bits


def scattered(address, pcrel, length, kind, value):
    """struct scattered_relocation_info, which is one word and a value in either byte order."""
    return 1 << 31 | pcrel << 30 | length << 28 | kind << 24 | address, value


def undefined(name):
    return build.Sym(name, 0, build.N_EXT, 0)


class Part(NamedTuple):
    """A section: its bytes, or words in the file's byte order, and its entries."""

    sectname: str
    content: bytes | list[int]
    entries: list[tuple[int, int]] = []  # noqa: RUF012  never changed


class Object:
    """An MH_OBJECT under construction: sections after each other from address 0."""

    def __init__(self, arch, parts, symbols=()):
        self.arch, self.parts, self.symbols = arch, parts, symbols

    def data(self):
        reloff = self._build(0).head_size()
        return self._build(build.up(reloff, 4)).build()

    def _build(self, start):
        order = build.MACHINES[self.arch].order
        content, sections, tables = b"", [], b""
        bodies = [
            part.content
            if isinstance(part.content, bytes)
            else struct.pack(f"{order}{len(part.content)}I", *part.content)
            for part in self.parts
        ]
        reloff = start + sum(build.up(len(body), 16) for body in bodies)
        for part, body in zip(self.parts, bodies, strict=True):
            sections.append(
                build.Section(
                    part.sectname,
                    "__TEXT",
                    len(content),
                    len(body),
                    reloff=reloff + len(tables) if part.entries else 0,
                    nreloc=len(part.entries),
                )
            )
            content += body.ljust(build.up(len(body), 16), b"\0")
            words = [word for entry in part.entries for word in entry]
            tables += struct.pack(f"{order}{len(words)}I", *words)
        file = build.MachO(self.arch, build.MH_OBJECT)
        file.segment("", 0, content + tables, vmsize=len(content), sections=sections)
        file.symtab(self.symbols, dysymtab=False)
        return file

    def image(self):
        return MachO(BytesSource(self.data(), "kext"))

    def load(self, address, resolve=None):
        return load_kext(self.image(), address, resolve)


class Bundle:
    """Bytes of a kext bundle, to be loaded."""

    def __init__(self, data):
        self._data = data

    def load(self, address, resolve=None):
        return load_kext(MachO(BytesSource(self._data, "kext")), address, resolve)


def bundle(arch, vmaddr):
    """__TEXT with a call of _printf, __DATA with a local pointer and _printf+0x18, __LINKEDIT."""
    x86 = arch == "x86_64"
    code = bytes.fromhex("e800000000") if x86 else bytes.fromhex("00000094")
    data = struct.pack("<4Q", vmaddr + 0x4008, 0x18, 0x1111, 0x2222).ljust(0x1000, b"\0")
    text = (bytes(0x800) + code).ljust(0x4000, b"\0")
    relocs = [
        plain("<", 0x801 if x86 else 0x800, 2, 1, 2, 1, 2),  # external: BRANCH, BRANCH26
        plain("<", 0x4008, 2, 0, 3, 1, 0),  # UNSIGNED
        plain("<", 0x4010, 3, 0, 3, 1, 0),
        plain("<", 0x4000, 2, 0, 3, 0, 0),  # local
    ]
    symbols = [
        build.Sym("_text", vmaddr + 0x800, build.N_SECT | build.N_EXT, 1),
        build.Sym("_data", vmaddr + 0x4000, build.N_SECT | build.N_EXT, 2),
        undefined("_printf"),
        undefined("_weird"),
    ]
    entries, strings = build.symbol_table(build.MACHINES[arch], symbols)
    file = build.MachO(arch, build.MH_KEXT_BUNDLE)
    section = build.Section("__text", "__TEXT", vmaddr + 0x800, len(code))
    file.segment("__TEXT", vmaddr, text, fileoff=0, sections=[section])
    section = build.Section("__data", "__DATA", vmaddr + 0x4000, 0x20)
    file.segment("__DATA", vmaddr + 0x4000, data, vmsize=0x4000, sections=[section])
    tables = b"".join(struct.pack("<2I", *entry) for entry in relocs)
    linkedit = build.up(0x5000, build.MACHINES[arch].page)
    file.segment("__LINKEDIT", vmaddr + 0x8000, tables + entries + strings)
    symoff = linkedit + len(tables)
    file.command(
        build.LC_SYMTAB,
        struct.pack("<4I", symoff, len(symbols), symoff + len(entries), len(strings)),
    )
    tail = (linkedit, 3, linkedit + 24, 1)
    file.command(build.LC_DYSYMTAB, struct.pack("<18I", 0, 0, 0, 2, 2, 2, *(0,) * 8, *tail))
    return Bundle(file.build())
