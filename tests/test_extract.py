"""What is extracted, held against the plain original by llvm, lldb and the original's own bytes."""

from __future__ import annotations

import functools
import gzip
import os
import random
import shutil
import stat
import struct
import subprocess
import tracemalloc
import zlib

import pytest
from click.testing import CliRunner

import kvmtool
from kvmtool import cli, nlist_writer, progress
from kvmtool.cli import extract as command
from kvmtool.errors import FaultError, FormatError, KvmError, TruncatedError, UnsupportedError
from kvmtool.fixups import has_fixups
from kvmtool.kernelcache import open_collection
from kvmtool.macho import MachO
from kvmtool.macho_writer import Standalone
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import chains, llvm, peel
from tests.builders import kernelcache as build
from tests.builders.corefile import AEA, LZ4, ZLIB, Member, boss_mac, gzip_member, lz4_frame
from tests.builders.kernelcache import Kext
from tests.builders.macho import MH_CORE, MH_EXECUTE, MH_KEXT_BUNDLE, S_ZEROFILL, Section, Sym
from tests.builders.macho import MachO as Builder

ARM64 = "kernels/arm64-xnu-4903.221.2-release.macho"
ARM64E = "kernels/arm64e-xnu-6153.11.26-release.macho"
X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
KEXTS = ("dumps/x86_64-10.8.5/KernelMemoryAccess", "dumps/x86_64-10.13.6/KernelMemoryAccess")
ONE, TWO, KERNEL = "com.test.one", "com.test.two", "com.apple.kernel"
N_INDR = 0xA


@functools.cache
def read(name):
    with open(inputs.real(name), "rb") as file:
        return file.read()


def macho(data):
    return MachO(BytesSource(bytes(data), "file"))


def written(image, memory=None):
    return b"".join(Standalone(image, memory).pieces())


def on_disk(folder, data, name="file"):
    path = folder / name
    path.write_bytes(data)
    return str(path)


def nm(path):
    """Every entry llvm-nm sees, debug symbols too, in the table's order."""
    return llvm.run("llvm-nm", "--no-sort", "--debug-syms", path)


def accepted(path):
    done = subprocess.run(
        ["llvm-objdump", "--macho", "--all-headers", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), path
    return done.stdout


def same_segments(new, plain):
    """Every byte of a 64-bit plain file's segments but the load commands, and all addresses."""
    ours, compared = {seg.name: seg for seg in chains.segments(new)}, 0
    for seg in chains.segments(plain):
        if seg.name == "__LINKEDIT":
            continue
        copy = ours[seg.name]
        sizes = (seg.vmaddr, seg.vmsize, seg.filesize)
        assert (copy.vmaddr, copy.vmsize, copy.filesize) == sizes
        skip = 32 + struct.unpack_from("<I", plain, 20)[0] if seg.fileoff == 0 else 0
        theirs = plain[seg.fileoff + skip : seg.fileoff + seg.filesize]
        assert new[copy.fileoff + skip : copy.fileoff + seg.filesize] == theirs, seg.name
        compared += len(theirs)
    return compared


def section_table(text):
    """The sections llvm-objdump lists, without what a new place in the file changes."""
    kept = ("sectname", "segname", "addr", "size", "align", "flags", "type", "attributes")
    return [line.split() for line in text.splitlines() if line.split()[:1] in [[k] for k in kept]]


# plain files: nothing may change but where things are


@pytest.mark.parametrize(
    "name",
    [
        ARM64E,
        X86,
        "dumps/i386-10.5.8/mach_kernel",
        *KEXTS,
        "kexts/i386-KernelMemoryAccess",
        "objects/ppc-xnu-792.25.20-kern_proc.o",
        "objects/x86_64-xnu-2422.115.4-kern_proc.o",
    ],
)
def test_a_plain_file(name, tmp_path):
    path = inputs.real(name)
    new = on_disk(tmp_path, written(MachO(FileSource(path))))
    assert nm(new) == nm(path)
    assert section_table(accepted(new)) == section_table(accepted(path))
    assert abs(os.path.getsize(new) - os.path.getsize(path)) < 128
    tables = ("--function-starts", "--data-in-code", "--indirect-symbols", "--reloc")
    ours, theirs = (
        llvm.run("llvm-objdump", "--macho", *tables, p).partition(":")[2] for p in (new, path)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", [ARM64, ARM64E, X86, *KEXTS])
def test_segments_of_a_plain_file(name):
    plain = read(name)
    new = written(macho(plain))
    assert same_segments(new, plain) > 0x1000
    assert written(macho(new)) == new


@pytest.mark.parametrize(
    "name", ["kexts/i386-KernelMemoryAccess", "objects/ppc-xnu-792.25.20-kern_proc.o"]
)
def test_contents_of_an_object(name, tmp_path):
    path = inputs.real(name)
    new = on_disk(tmp_path, written(MachO(FileSource(path))))
    ours, theirs = (llvm.run("llvm-objdump", "--full-contents", p) for p in (new, path))
    assert ours.replace(new, path) == theirs
    assert len(theirs) > 7_000


# collections and prelinked kernels


def x86_kexts(at):
    """The two real kexts, linked from address `at` on; with the addresses of pointers."""
    kexts, pointers = [], {}
    for index, name in enumerate(KEXTS):
        data = read(name)
        low = chains.segment(data, "__TEXT").vmaddr
        found = chains.words_between(data, ["__DATA"], low, low + 0x6000)
        places = chains.places_of(data, found, low, low + 0x6000)
        slide = at + 0x100000 * index - low
        moved = build.move(data, slide=slide, pointers=places)
        kexts.append(Kext((ONE, TWO)[index], f"1.{index}", moved))
        pointers[kexts[-1].identifier] = [place.address + slide for place in places]
    return kexts, pointers


def x86_collection():
    kernel = read(X86)
    kexts, pointers = x86_kexts(0xFFFFFF8000E00000)
    pointers[KERNEL] = chains.words_between(
        kernel, ["__DATA", "__KLD"], 0xFFFFFF8000200000, 0xFFFFFF8000B60000
    )
    entries = [Kext(KERNEL, "13.4.0", kernel), *kexts]
    built = build.collection(
        "x86_64", 0xFFFFFF8000180000, entries, pointers, pointer_format=11, page_size=0x1000
    )
    return built, entries


def arm64_collection():
    at, kernel = 0xFFFFFFF007800000, read(ARM64)
    words = [0xFFFFFFF007004000, at + 0x800, at]
    one = build.small_kext("arm64", at, ["_alpha", "_beta"], b"1" * 16, words)
    two = build.small_kext("arm64", at + 0x100000, ["_gamma"], b"2" * 16)
    entries = [Kext(KERNEL, "18.2", kernel), Kext(ONE, "1", one), Kext(TWO, "2", two)]
    places = {KERNEL: chains.local_relocations(kernel), TWO: []}
    places[ONE] = [at + 0x4000 + 8 * n for n in range(3)]
    built = build.collection(
        "arm64", 0xFFFFFFF007000000, entries, places, pointer_format=8, page_size=0x4000
    )
    return built, entries


class Collected:
    """A collection on disk, and the plain files that went into it by identifier."""

    def __init__(self, made, folder):
        built, entries = made
        self.path = on_disk(folder, built.data, "collection")
        self.data, self.fileoffs = built.data, built.fileoffs
        self.plain = {entry.identifier: entry.data for entry in entries}
        self.cache = open_collection(MachO(FileSource(self.path)))

    def image(self, identifier):
        if identifier == KERNEL:
            return self.cache.kernel
        return next(k.image for k in self.cache.kexts if k.identifier == identifier)


@pytest.fixture(scope="module", params=["arm64", "x86_64"])
def collected(request, tmp_path_factory):
    made = arm64_collection() if request.param == "arm64" else x86_collection()
    return Collected(made, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("identifier", [KERNEL, ONE, TWO])
def test_an_entry_of_a_collection(collected, identifier, tmp_path):
    plain, image = collected.plain[identifier], collected.image(identifier)
    new = on_disk(tmp_path, written(image), "new")
    old = on_disk(tmp_path, plain, "old")
    assert nm(new) == nm(old)
    assert section_table(accepted(new)) == section_table(accepted(old))
    assert MachO(FileSource(new)).uuid == macho(plain).uuid
    # raw: the words of the collection
    with open(new, "rb") as file:
        data = file.read()
    for theirs, ours in zip(image.segments, chains.segments(data), strict=True):
        if theirs.segname != "__LINKEDIT" and theirs.filesize:
            skip = image.header_size + image.sizeofcmds if ours.fileoff == 0 else 0
            start, size = theirs.fileoff + skip, theirs.filesize - skip
            there = collected.data[start : start + size]
            assert data[ours.fileoff + skip :][:size] == there
    assert len(data) < len(plain) + 0x8000  # nothing of the shared __LINKEDIT but its own


@pytest.mark.parametrize("identifier", [KERNEL, ONE, TWO])
def test_decoded_pointers_are_those_of_the_original(collected, identifier, tmp_path):
    plain, image = collected.plain[identifier], collected.image(identifier)
    new = written(image, collected.cache.memory())
    assert same_segments(new, plain) > 0x1000
    assert nm(on_disk(tmp_path, new, "new")) == nm(on_disk(tmp_path, plain, "old"))


@pytest.mark.parametrize("identifier", [KERNEL, ONE, TWO])
def test_names_of_others_stay_behind(collected, identifier, tmp_path):
    lines = nm(on_disk(tmp_path, collected.plain[identifier])).splitlines()
    known = {line[17:].split(" ", 1)[-1].split()[-1] for line in lines}
    kept = {name.decode() for name in strings(written(collected.image(identifier))).split(b"\0")}
    assert kept - {""} <= known
    assert len(kept) > len(known) // 2


def test_lldb_loads_an_entry(collected, tmp_path):
    """Sizes are left out: lldb takes them from function starts, which the builder drops."""
    new = on_disk(tmp_path, written(collected.image(KERNEL)), "new")
    old = on_disk(tmp_path, collected.plain[KERNEL], "old")
    ours, theirs = (
        {
            (line.split()[-1], word)
            for line in _lldb(path)
            for word in line.split()
            if "0xff" in word
        }
        for path in (new, old)
    )
    assert len(ours) > 15_000
    strangers = {name for name, _ in theirs ^ ours if "lldb_unnamed" not in name}
    assert strangers <= {"last_kernel_symbol"}


def test_lldb_loads_a_plain_file(tmp_path):
    path = inputs.real(ARM64)
    lines = _lldb(on_disk(tmp_path, written(MachO(FileSource(path)))))
    assert lines == _lldb(path)
    assert len(lines) > 15_000


def _lldb(path):
    """lldb's list of symbols: their addresses, sizes and names."""
    if shutil.which("lldb") is None:
        pytest.skip("lldb is not installed")
    done = subprocess.run(
        ["lldb", "--no-lldbinit", "--batch", "-o", "image dump symtab -s address", path],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [line for line in done.stdout.splitlines() if line.startswith("[")]


def test_kexts_of_a_prelinked_kernel(tmp_path):
    plain = {name: read(name) for name in KEXTS}
    kexts = [Kext(i, "1", data) for i, data in zip((ONE, TWO), plain.values(), strict=True)]
    data = build.prelinked_kernel(read(X86), kexts, source=0xFFFFFF8000C00000)
    for found, old in zip(open_collection(macho(data)).kexts, plain.values(), strict=True):
        new = written(found.image)
        assert same_segments(new, old) > 0x1000
        path = on_disk(tmp_path, new)
        assert nm(path) == nm(on_disk(tmp_path, old, "old"))
        accepted(path)


def test_chained_pointers_of_a_thin_kernel(tmp_path):
    """Decoded, nothing speaks of chains any more, so that nobody decodes them twice."""
    plain = read(ARM64)
    data = chains.arm64e_kernel(plain, chains.local_relocations(plain))
    image = macho(data)
    assert has_fixups(macho(written(image)))
    new = written(image, open_collection(image).memory())
    assert not has_fixups(macho(new))
    assert same_segments(new, plain) > 6_000_000
    path = on_disk(tmp_path, new)
    assert nm(path) == nm(on_disk(tmp_path, plain, "old"))
    assert "DYLD_CHAINED_FIXUPS" not in accepted(path)


def test_threaded_pointers_of_a_thin_kernel(tmp_path):
    base = 0xFFFFFFF007004000
    plain = build.small_kernel("arm64", base, [base + 16 * n for n in range(8)])
    data = chains.threaded_kernel(plain, [base + 0x4000 + 8 * n for n in range(8)])
    image = macho(data)
    assert same_data(written(image), data)
    assert has_fixups(macho(written(image)))
    new = written(image, open_collection(image).memory())
    assert not has_fixups(macho(new))
    assert same_data(new, plain)
    assert not same_data(data, plain)
    accepted(on_disk(tmp_path, new))


def same_data(one, two):
    contents = []
    for data in (one, two):
        seg = chains.segment(data, "__DATA")
        contents.append(data[seg.fileoff : seg.fileoff + seg.filesize])
    return contents[0] == contents[1]


def test_a_pointer_nobody_knows_is_not_written():
    """Into a collection that is not given: raw it can be copied, decoded it cannot."""
    at = 0x100000
    kext = build.small_kext("x86_64", at, ["_one"], b"1" * 16, [at, at + 8])
    built = build.collection(
        "x86_64",
        0,
        [Kext(ONE, "1", kext)],
        {ONE: [at + 0x1000, at + 0x1008]},
        pointer_format=11,
        page_size=0x1000,
        top={"_BootKCID": b"b" * 16},
    )
    cache = open_collection(macho(built.data))
    assert written(cache.kexts[0].image)
    with pytest.raises(FaultError, match="boot kernel collection, which is not given"):
        written(cache.kexts[0].image, cache.memory())


# the string table


def small(symbols, *, machine="x86_64", filetype=MH_KEXT_BUNDLE, extra=(), sections=()):
    """A file of two segments with `symbols`."""
    made = Builder(machine, filetype, 0)
    made.segment("__TEXT", 0x10000, b"t" * 0x1000, fileoff=0, sections=sections)
    made.segment("__DATA", 0x12000, b"d" * 0x800, vmsize=0x3000)
    for name, vmaddr, data in extra:
        made.segment(name, vmaddr, data)
    made.symtab(symbols, linkedit=0x20000)
    return bytearray(made.build())


def symtab(data):
    """(offset of the command, symoff, nsyms, stroff, strsize)."""
    at = next(at for at, cmd, _ in chains.commands(data) if cmd == 2)
    return (at, *struct.unpack_from("<4I", data, at + 8))


def strings(data):
    _, _, _, stroff, strsize = symtab(data)
    return bytes(data[stroff : stroff + strsize])


def names(data):
    return [entry.name for entry in macho(data).symtab]


def set_strx(data, index, strx, n_type=None, value=None):
    _, symoff, *_ = symtab(data)
    struct.pack_into("<I", data, symoff + 16 * index, strx)
    if n_type is not None:
        data[symoff + 16 * index + 4] = n_type
    if value is not None:
        struct.pack_into("<Q", data, symoff + 16 * index + 8, value)


def test_names_that_share_their_tail_still_do(tmp_path):
    data = small([Sym("_my_mmread", 0x10010), Sym("_other", 0x10020), Sym("_third", 0x10030)])
    set_strx(data, 1, strings(data).index(b"mmread"))
    set_strx(data, 2, strings(data).index(b"read"))
    new = written(macho(data))
    assert names(new) == ["_my_mmread", "mmread", "read"]
    assert strings(new).rstrip(b"\0") == b"\0_my_mmread"
    assert nm(on_disk(tmp_path, new, "new")) == nm(on_disk(tmp_path, data, "old"))


def test_an_entry_without_a_name_and_one_that_lacks_its_end():
    data = small([Sym("_one", 0x10010), Sym("_two", 0x10020)])
    set_strx(data, 0, 0)
    at, _, _, _, _ = symtab(data)
    struct.pack_into("<I", data, at + 20, strings(data).index(b"_two") + 4)
    assert names(written(macho(data))) == ["", "_two"]


def test_the_name_an_indirect_symbol_stands_for(tmp_path):
    data = small([Sym("_alias", 0x10010), Sym("_gone", 0x10020), Sym("_target", 0x10030)])
    set_strx(data, 0, strings(data).index(b"_alias"), N_INDR | 1, strings(data).index(b"_target"))
    set_strx(data, 1, strings(data).index(b"_alias"))
    set_strx(data, 2, strings(data).index(b"_alias"))
    new = written(macho(data))
    (_, symoff, *_), table = symtab(new), strings(new)
    (value,) = struct.unpack_from("<Q", new, symoff + 8)
    assert table[value:].startswith(b"_target\0")
    assert b"_gone" not in table
    assert "(indirect for _target)" in nm(on_disk(tmp_path, new))


@pytest.mark.parametrize("machine", ["ppc", "ppc64", "i386"])
def test_other_words_and_byte_orders(machine, tmp_path):
    """Of 40 symbols the file speaks of the last 20 alone, as one of several images does."""
    made = Builder(machine, MH_EXECUTE, 1)
    text = Section("__text", "__TEXT", 0x10800, 0x100)
    made.segment("__TEXT", 0x10000, b"t" * 0x1000, fileoff=0, sections=[text])
    made.segment("__DATA", 0x12000, b"d" * 0x800)
    symbols = [Sym(f"_name{n}", 0x10800 + n) for n in range(40)]
    made.symtab(symbols, linkedit=0x20000, dysymtab=False)
    plain = bytearray(made.build())
    order, size = made.machine.order, 16 if made.machine.width == 8 else 12
    at = plain.index(struct.pack(order + "2I", 2, 24))
    symoff, nsyms = struct.unpack_from(order + "2I", plain, at + 8)
    struct.pack_into(order + "2I", plain, at + 8, symoff + 20 * size, nsyms - 20)
    new = written(macho(plain))
    path = on_disk(tmp_path, new, "new")
    assert nm(path) == nm(on_disk(tmp_path, plain, "old"))
    assert [entry.name for entry in macho(new).symtab] == [s.name for s in symbols[20:]]
    assert b"_name19\0" not in new
    accepted(path)


def test_a_stripped_file(tmp_path):
    made = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    bss = Section("__bss", "__DATA", 0x12800, 0x1800, S_ZEROFILL)
    made.segment("__DATA", 0x12000, b"d" * 0x800, vmsize=0x2000, sections=[bss])
    made.segment("__TEXT", 0x10000, b"t" * 0x1000, fileoff=0)
    made.segment("__EMPTY", 0x15000, vmsize=0x1000)
    new = written(macho(made.build()))
    text = accepted(on_disk(tmp_path, new))
    assert text.count("segname __DATA") == 2
    data = chains.segment(new, "__DATA")
    assert data[2:6] == (0x12000, 0x2000, 0x1000, 0x800)
    assert chains.segment(new, "__EMPTY")[2:6] == (0x15000, 0x1000, 0, 0)
    assert new[0x1000:] == b"d" * 0x800


# damage


def bad(data, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        written(macho(data))
    assert str(caught.value).startswith("file: ")


def test_collections_and_cores_are_no_single_image(collected):
    with pytest.raises(UnsupportedError, match="is a kernel collection, expected one kernel"):
        Standalone(collected.cache.image)
    core = Builder("x86_64", MH_CORE, 0).build()
    with pytest.raises(UnsupportedError, match="file is a core"):
        Standalone(macho(core))


def test_damaged_symbol_tables():
    data = small([Sym("_one", 0x10010), Sym("_two", 0x10020)])
    _, symoff, _, _, strsize = symtab(data)
    for index, strx, n_type, value in ((1, strsize, 15, 0), (0, 0, N_INDR, 1 << 40)):
        copy = data.copy()
        set_strx(copy, index, strx, n_type, value)
        bad(copy, f"offset {symoff + 16 * index:#x}: symbol: n_.* less than strsize {strsize:#x}")
    twice = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    twice.segment("__TEXT", 0x10000, b"t" * 0x1000, fileoff=0)
    for _ in range(2):
        twice.symtab([Sym("_one", 0x10010)], dysymtab=False)
    bad(twice.build(), "a second LC_SYMTAB")


def test_too_many_symbols(monkeypatch):
    monkeypatch.setattr(nlist_writer, "MOST_SYMBOLS", 1)
    bad(small([Sym("_one", 1), Sym("_two", 2)]), "expected at most 0x1 entries, got 0x2")


def test_sections_outside_of_their_segment():
    section = Section("__text", "__TEXT", 0x10800, 0x400)
    data = small([], sections=[section])
    at = chains.segment(data, "__TEXT").at + 72
    for offset in (0xC01, 0x1000, 0xFFFFFFFF):
        copy = data.copy()
        struct.pack_into("<I", copy, at + 48, offset)
        bad(copy, f"offset {at:#x}: section __text: 0x400 bytes at offset {offset:#x}, segment")


def test_segments_that_are_cut_off_or_leave_the_address_space():
    data = small([])
    at = chains.segment(data, "__DATA").at
    copy = data.copy()
    struct.pack_into("<2Q", copy, at + 40, len(copy) - 0x7FF, 0x800)
    bad(copy, "segment __DATA: expected 0x800 bytes, got 0x7ff", TruncatedError)
    struct.pack_into("<Q", data, at + 24, (1 << 64) - 0x2FFF)
    bad(data, f"offset {at:#x}: segment __DATA: vmaddr 0xffffffffffffd001 . 0x3000 leaves")


def test_parts_that_overlap_cannot_become_large():
    made = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    made.segment("__TEXT", 0x10000, b"t" * 0x8000, fileoff=0)
    for index in range(50):
        made.segment(
            f"__S{index}", 0x20000 + 0x8000 * index, fileoff=1, filesize=0x7000, vmsize=0x7000
        )
    bad(made.build(), "segments of .* overlap")
    made = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    made.segment("__TEXT", 0x10000, b"t" * 0x8000, fileoff=0)
    for _ in range(50):
        made.command(0x26, struct.pack("<2I", 0, 0x8000))
    bad(made.build(), "tables of .* overlap")


@pytest.mark.parametrize(
    ("cmd", "body", "match"),
    [
        (0x26, (0x100, 0xFFFFFFF0), r"load command 0x26: expected 0xfffffff0 bytes, got"),
        (0x80000034, (0xFFFFFFFF, 1), r"load command 0x80000034: expected 0x1 bytes, got 0x0"),
        (0x29, (), "load command 0x29: cmdsize 0x8, expected 0x10 or more"),
        (0x22, (0,) * 8, "load command 0x22: cmdsize 0x28, expected 0x30 or more"),
        (0xB, (*(0,) * 9, 0xFFFFFFFF, *(0,) * 8), "load command 0xb: expected 0x37ffffffc8 bytes"),
    ],
)
def test_tables_that_are_not_there(cmd, body, match):
    made = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    made.segment("__TEXT", 0x10000, b"t" * 0x1000, fileoff=0)
    made.command(cmd, struct.pack(f"<{len(body)}I", *body))
    bad(made.build(), match)


def test_mutated_images_are_refused_or_written(collected):
    """Whatever a few wrong bytes do: one of our errors, or a file that is no larger and opens."""
    base = small([Sym(f"_n{n}", 0x10000 + n) for n in range(20)])
    chance, refused = random.Random(3), 0
    for _ in range(1500):
        data = base.copy()
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice((chance.randrange(0x300), chance.randrange(len(data))))
            width = chance.choice((1, 4, 8))
            value = chance.choice((0, 1, 0x7FFFFFFF, (1 << 64) - 1, chance.randrange(1 << 16)))
            data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        try:
            new = written(macho(data))
        except KvmError:
            refused += 1
        else:
            assert len(new) < 3 * len(base) + 0x10000
            image = macho(new)
            assert len(image.sections) >= 0
            assert len(list(image.symtab or ())) < 0x10000
    assert 200 < refused < 1400


def test_memory_is_bounded():
    """64 MiB are written in pieces."""
    made = Builder("x86_64", MH_KEXT_BUNDLE, 0)
    made.segment("__TEXT", 0x10000, bytes(64 << 20), fileoff=0)
    image = macho(made.build())
    tracemalloc.start()
    try:
        sizes = [len(piece) for piece in Standalone(image).pieces()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) == image.source.size
    assert max(sizes) <= 1 << 20
    assert peak < 8 << 20


# the command


def run(monkeypatch, *arguments, status=0):
    monkeypatch.setitem(
        cli.COMMANDS, "extract", ("extract", "A kernel, a kext or a core by itself.")
    )
    environment = {"KVMTOOL_KERNEL": "", "KVMTOOL_CORE": ""}
    result = CliRunner().invoke(cli.cli, ["extract", *arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, (result.output, result.stderr)
    return result


def content(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def extract(monkeypatch, tmp_path):
    """Runs the command with OUT for the last argument's place; gives (result, bytes of OUT)."""
    out = tmp_path / "out" / "file"
    out.parent.mkdir()

    def call(*arguments, status=0):
        words = [str(out) if word == "OUT" else str(word) for word in arguments]
        result = run(monkeypatch, *words, status=status)
        found = sorted(path.name for path in out.parent.iterdir())
        assert found in ([], ["file"]), "something was left behind"
        return result, content(out) if found else None

    call.out = out
    return call


@pytest.mark.parametrize("name", ["kernel", "kext", "core", ""])
def test_help_has_an_example(monkeypatch, name):
    text = run(monkeypatch, *filter(None, [name]), "--help").stdout
    line = text.splitlines()[text.splitlines().index("  Example:") + 1].strip()
    assert line.startswith(f"kvmtool extract {name}".rstrip())


def test_a_wrapped_kernel_comes_out_byte_for_byte(extract, tmp_path):
    plain = build.small_kernel("x86_64", 0xFFFFFF8000200000, [1, 2])
    other = build.small_kernel("arm64", 0xFFFFFFF007004000, [1, 2])
    packed = peel.comp("lzss", peel.lzss(plain), plain)
    fat = peel.fat([(0x0100000C, 0, other), (0x01000007, 3, packed)])
    path = on_disk(tmp_path, peel.im4p(fat))
    result, data = extract("kernel", "OUT", "-N", path, "--arch", "x86_64")
    assert data == plain
    assert result.stdout == f"wrote {extract.out}: {len(plain):#x} bytes\n"
    assert extract("kernel", "OUT", "-N", path, "--arch", "arm64", "--overwrite")[1] == other
    extract.out.unlink()
    assert extract("kernel", "OUT", "-N", path, "--arch", "arm64", "--whole")[1] == other


def test_a_real_kernel_comes_out_byte_for_byte(extract, tmp_path):
    path = on_disk(tmp_path, gzip.compress(read(ARM64E), 1))
    assert extract("kernel", "OUT", "-N", path)[1] == read(ARM64E)


@pytest.mark.parametrize("decode", [False, True])
def test_round_trip_of_a_collections_kernel(collected, extract, tmp_path, decode):
    """kvmtool reads the same names and bytes from what it wrote."""
    path = on_disk(tmp_path, gzip.compress(collected.data, 1))
    options = ["--decode-pointers"] if decode else []
    extract("kernel", "OUT", "-N", path, *options)
    with kvmtool.open(path) as whole, kvmtool.open(str(extract.out)) as kernel:
        assert kernel.kernel.uuid == whole.kernel.uuid
        assert list(kernel.symbols) == list(whole.symbols)
        names = ["_allproc", "_version", "_cdevsw", "_no_such_thing"]
        assert kernel.nlist(names) == whole.nlist(names)
        assert len([found for found in kernel.nlist(names) if found]) == 3
        memory = whole.memory if decode else whole.raw_memory
        compared = 0
        for segment in kernel.kernel.segments:
            if segment.segname not in ("__TEXT", "__LINKEDIT", "__PAGEZERO") and segment.vmsize:
                ours = kernel.read(segment.vmaddr, segment.filesize)
                assert ours == memory.read(segment.vmaddr, segment.filesize)
                compared += len(ours)
        assert compared > 900_000


def test_a_kext_by_identifier(collected, extract, tmp_path):
    plain = collected.plain[TWO]
    _, data = extract("kext", "two", "OUT", "-N", collected.path)
    assert nm(str(extract.out)) == nm(on_disk(tmp_path, plain, "old"))
    assert data == written(collected.image(TWO))
    _, data = extract("kext", ONE, "OUT", "-N", collected.path, "--overwrite", "--decode-pointers")
    assert same_segments(data, collected.plain[ONE]) > 0x1000
    result, after = extract("kext", "com.test.on", "OUT", "-N", collected.path, status=1)
    assert "is there already" in result.stderr
    assert after == data
    extract.out.unlink()
    result, _ = extract("kext", "com.test.on", "OUT", "-N", collected.path, status=1)
    assert (
        result.stderr
        == "kvmtool: kext com.test.on not found (did you mean com.test.one, com.test.two?)\n"
    )


def test_the_whole_collection(collected, extract, tmp_path):
    path = on_disk(tmp_path, gzip.compress(collected.data, 1))
    assert extract("kernel", "OUT", "-N", path, "--whole")[1] == collected.data


def test_a_kext_without_an_executable(extract, tmp_path):
    kernel = build.small_kernel("arm64", 0xFFFFFFF007004000, [1])
    kext = build.small_kext("arm64", 0xFFFFFFF004004000, ["_one"], b"1" * 16)
    data = build.prelinked_kernel(kernel, [Kext(ONE, "1", kext), Kext(TWO, "2")])
    path = on_disk(tmp_path, data)
    result, nothing = extract("kext", TWO, "OUT", "-N", path, status=1)
    assert nothing is None
    assert result.stderr == f"kvmtool: kext {TWO} has nothing to write: none: no executable\n"
    assert extract("kernel", "OUT", "-N", path)[1] == data


def test_collections_without_a_kernel(extract, tmp_path):
    at = 0x100000
    kext = build.small_kext("x86_64", at, ["_one"], b"1" * 16, [at])
    built = build.collection(
        "x86_64", 0, [Kext(ONE, "1", kext)], {ONE: []}, pointer_format=11, page_size=0x1000
    )
    path = on_disk(tmp_path, built.data)
    assert "holds no kernel" in extract("kernel", "OUT", "-N", path, status=1)[0].stderr
    extract("kext", ONE, "OUT", "-N", path)
    assert nm(str(extract.out)) == nm(on_disk(tmp_path, kext, "old"))


def test_no_kernel_but_in_a_core(extract):
    core = inputs.real("machine/crash.kdp-core")
    result, nothing = extract("kernel", "OUT", "-M", core, status=1)
    assert nothing is None
    assert "name its file with -N" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("kernel", "OUT"), "no kernel and no core"),
        (("kernel", "OUT", "--whole"), "--whole needs a kernel's file"),
        (
            ("kernel", "OUT", "--whole", "--decode-pointers", "-N", "x"),
            "leave --decode-pointers out",
        ),
        (("core", "OUT"), "no core: name the file"),
        (("kernel", "OUT", "-N", "/nowhere/x"), "/nowhere/x: No such file"),
        (("core", "OUT", "/nowhere/x"), "/nowhere/x: No such file"),
    ],
)
def test_what_is_missing_is_said(extract, arguments, says):
    usage = "--whole" in arguments or arguments == ("core", "OUT")
    result, nothing = extract(*arguments, status=2 if usage else 1)
    assert says in result.stderr
    assert nothing is None


# cores


CORE = random.Random(7).randbytes(3000) * 1000


def corefile(*members):
    return boss_mac(b"a panic", list(members))


def test_cores_of_a_corefile(extract, tmp_path):
    other = b"another" * 9000
    kernel = Member(b"kernel", gzip_member(CORE), ZLIB)
    second = Member(b"sptm", lz4_frame(other), LZ4)
    path = on_disk(tmp_path, corefile(second, kernel, Member(b"plain", other)))
    assert extract("core", "OUT", path)[1] == CORE
    assert extract("core", "OUT", "-M", path, "--member", "sptm", "--overwrite")[1] == other
    assert extract("core", "OUT", path, "--member", "plain", "--overwrite")[1] == other
    extract.out.unlink()
    result, nothing = extract("core", "OUT", path, "--member", "kernl", status=1)
    assert "member kernl not found (did you mean sptm, kernel, plain?)" in result.stderr
    assert nothing is None


def test_a_real_corefile(extract):
    path = inputs.real("machine/armc.corefile")
    _, data = extract("core", "OUT", path)
    packed = content(path)[0x6000:]
    assert data == zlib.decompressobj(31).decompress(packed)
    assert data[:4] == b"\xcf\xfa\xed\xfe"


def test_a_gzip_file(extract, tmp_path):
    path = on_disk(tmp_path, gzip.compress(CORE))
    assert extract("core", "OUT", path)[1] == CORE
    inside = on_disk(tmp_path, gzip.compress(corefile(Member(b"kernel", CORE))))
    assert extract("core", "OUT", inside, "--overwrite")[1] == CORE


def test_what_is_no_container(extract, tmp_path):
    result, _ = extract("core", "OUT", on_disk(tmp_path, CORE), status=1)
    assert "expected a corefile or a gzip file" in result.stderr
    path = on_disk(tmp_path, gzip.compress(CORE))
    result, nothing = extract("core", "OUT", path, "--member", "kernel", status=1)
    assert "expected a corefile" in result.stderr
    assert nothing is None


def test_an_encrypted_core(extract, tmp_path):
    path = on_disk(tmp_path, corefile(Member(b"kernel", CORE, AEA)))
    result, nothing = extract("core", "OUT", path, status=1)
    assert "encrypted" in result.stderr
    assert nothing is None


def _cut_gzip():
    stored = gzip_member(CORE)
    return Member(b"kernel", stored[: len(stored) // 2], ZLIB)


def _wrong_gzip():
    stored = bytearray(gzip_member(CORE))
    stored[-6] ^= 1
    return Member(b"kernel", bytes(stored), ZLIB)


def _cut_lz4():
    stored = lz4_frame(CORE)
    return Member(b"kernel", stored[: len(stored) // 2], LZ4)


def _corrupt_lz4():
    stored = bytearray(lz4_frame(CORE))
    at = stored.index(b"bv4", len(stored) // 2)
    stored[at] ^= 1
    return Member(b"kernel", bytes(stored), LZ4)


def _bad_block():
    """Its size is as it should be; only decoding it tells."""
    stored = bytearray(lz4_frame(b"".join(bytes([n]) * 65536 for n in range(40))))
    at = stored.index(b"bv41", 1) + 12
    (size,) = struct.unpack_from("<I", stored, at - 4)
    stored[at : at + size] = b"\xff" * size
    return Member(b"kernel", bytes(stored), LZ4)


@pytest.mark.parametrize("make", [_cut_gzip, _wrong_gzip, _cut_lz4, _corrupt_lz4, _bad_block])
def test_a_damaged_core(extract, tmp_path, make):
    path = on_disk(tmp_path, corefile(make()))
    result, nothing = extract("core", "OUT", path, status=1)
    assert nothing is None
    result, data = extract("core", "OUT", path, "--partial", status=3)
    assert f"{extract.out} is not whole: " in result.stderr
    if make is _wrong_gzip:
        assert data == CORE
    elif make is _bad_block:
        assert data == bytes(65536)
    else:
        assert len(CORE) // 4 < len(data) < len(CORE)
        assert CORE.startswith(data)


# the file that is written


@pytest.fixture
def kernel_path(tmp_path):
    return on_disk(tmp_path, gzip.compress(build.small_kernel("x86_64", 0xFFFFFF8000200000, [1])))


def test_nothing_is_overwritten_unless_it_is_asked_for(extract, kernel_path):
    extract.out.write_bytes(b"mine")
    result, data = extract("kernel", "OUT", "-N", kernel_path, status=1)
    assert result.stderr == f"kvmtool: {extract.out} is there already: --overwrite replaces it\n"
    assert data == b"mine"
    assert extract("kernel", "OUT", "-N", kernel_path, "--overwrite")[1] != b"mine"


def test_nor_if_it_came_meanwhile(extract, kernel_path, monkeypatch):
    def late(pieces, size):
        yield from pieces
        extract.out.write_bytes(b"mine")

    monkeypatch.setattr(command, "_watched", late)
    _, data = extract("kernel", "OUT", "-N", kernel_path, status=1)
    assert data == b"mine"


def test_nor_what_is_read_or_is_no_file(extract, kernel_path, tmp_path):
    shutil.copy(kernel_path, extract.out)
    result, data = extract("kernel", "OUT", "-N", extract.out, "--overwrite", status=1)
    assert result.stderr.endswith("is the file that is read\n")
    assert data == content(kernel_path)
    extract.out.unlink()
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    extract.out.symlink_to(tmp_path / "elsewhere")
    result = extract("kernel", "OUT", "-N", kernel_path, "--overwrite", status=1)[0]
    assert result.stderr.endswith("is there already, and no regular file\n")
    assert content(tmp_path / "elsewhere") == b"theirs"


def test_a_folder_that_is_not_there(extract, kernel_path, monkeypatch):
    result = run(monkeypatch, "kernel", "/nowhere/file", "-N", kernel_path, status=1)
    assert result.stderr == "kvmtool: /nowhere/file: No such file or directory\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_no_part_of_a_file_survives(extract, kernel_path, monkeypatch, error):
    def broken(pieces, size):
        yield next(iter(pieces))[:100]
        assert not extract.out.exists()
        raise error

    monkeypatch.setattr(command, "_watched", broken)
    result, nothing = extract("kernel", "OUT", "-N", kernel_path, status=1)
    assert nothing is None
    if isinstance(error, OSError):
        assert result.stderr == f"kvmtool: {extract.out}: No space left on device\n"


def test_the_mode_is_that_of_a_new_file(extract, kernel_path, tmp_path):
    (tmp_path / "new").touch()
    extract("kernel", "OUT", "-N", kernel_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (extract.out, tmp_path / "new")}
    assert len(modes) == 1


def test_how_far_it_is_is_told():
    heard = []
    pieces = [b"x" * 10] * 5
    with progress.listening(heard.append):
        assert list(command._watched(pieces, 50)) == pieces
    assert [step[:3] for step in heard[:5]] == [("writing", n, 50) for n in (10, 20, 30, 40, 50)]
