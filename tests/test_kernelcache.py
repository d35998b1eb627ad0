"""Prelinked kernels and kernel collections: each kernel and kext against its plain original."""

from __future__ import annotations

import contextlib
import functools
import random
import struct
import subprocess
import sys
import time

import pytest

from kvmtool import fileset, kernelcache
from kvmtool.errors import FaultError, FormatError, KvmError, NotFoundError, TruncatedError
from kvmtool.fileset import AUXILIARY, PAGEABLE, PRIMARY, EntrySource
from kvmtool.fixups import FixedMemory
from kvmtool.image import image_memory
from kvmtool.kernelcache import open_collection
from kvmtool.macho import MH_KEXT_BUNDLE, MachO
from kvmtool.memory import RunMemory
from kvmtool.nlist import N_STAB, type_letter
from kvmtool.source import BytesSource, FileSource, find_by_chunks
from tests import inputs
from tests.builders import chains, llvm
from tests.builders import kernelcache as build
from tests.builders.kernelcache import Kext
from tests.builders.macho import MachO as Builder
from tests.builders.macho import Section

ARM64 = "kernels/arm64-xnu-4903.221.2-release.macho"
X86 = "machine/x86_64-xnu-2422.115.4.mach_kernel"
KEXTS = ("dumps/x86_64-10.8.5/KernelMemoryAccess", "dumps/x86_64-10.13.6/KernelMemoryAccess")
ONE, TWO, KPI = "com.test.one", "com.test.two", "com.apple.kpi.bsd"
KERNEL = "com.apple.kernel"
MACH_KPI = Kext("com.apple.kpi.bsd", "13.4.0", interface_uuid=b"i" * 16)


@functools.cache
def read(name):
    with open(inputs.real(name), "rb") as file:
        return file.read()


def macho(data):
    return MachO(BytesSource(bytes(data), "file"))


def open_bytes(data):
    return open_collection(macho(data))


def symbol_lines(image):
    """What llvm-nm prints of these symbols, sorted."""
    sections = tuple((s.segname, s.sectname) for s in image.sections)
    kext = image.filetype == MH_KEXT_BUNDLE and image.is64
    lines = []
    for entry in image.symtab or ():
        if not entry.n_type & N_STAB:
            letter = type_letter(entry, sections, kext)
            value = " " * 16 if letter == "U" else f"{entry.n_value:016x}"
            lines.append(f"{value} {letter} {entry.name}")
    return sorted(lines)


def nm(data, folder, slide=0):
    """What llvm-nm prints of a plain file, all addresses `slide` higher."""
    path = folder / "plain"
    path.write_bytes(data)
    lines = llvm.run("llvm-nm", str(path)).splitlines()
    return sorted(f"{int(line[:16], 16) + slide:016x}{line[16:]}" for line in lines)


def accepted(data, folder):
    """llvm-objdump reads all headers; llvm 14 does not know MH_FILESET, so that one is called a
    MH_EXECUTE before it is asked."""
    path = folder / "built"
    path.write_bytes(data[:12] + struct.pack("<I", min(data[12], 2)) + data[16:])
    return llvm.run("llvm-objdump", "--macho", "--all-headers", str(path))


def same_bytes(plain, memory):
    """Every byte of a plain image's segments, but the commands and __LINKEDIT."""
    expected = image_memory(macho(plain))
    compared = 0
    for seg in chains.segments(plain):
        if seg.name in ("__LINKEDIT", "__PAGEZERO") or not seg.filesize:
            continue
        skip = 32 + struct.unpack_from("<I", plain, 20)[0] if seg.fileoff == 0 else 0
        theirs = expected.read(seg.vmaddr + skip, seg.filesize - skip)
        assert memory.read(seg.vmaddr + skip, seg.filesize - skip) == theirs, seg.name
        compared += len(theirs)
    return compared


def x86_kexts(at=None):
    """The two real kexts, as linked or from address `at` on; with the addresses of pointers."""
    kexts, pointers = [], {}
    for index, name in enumerate(KEXTS):
        data = read(name)
        low = chains.segment(data, "__TEXT").vmaddr
        found = chains.words_between(data, ["__DATA"], low, low + 0x6000)
        places = chains.places_of(data, found, low, low + 0x6000)
        slide = 0 if at is None else at + 0x100000 * index - low
        data = build.move(data, slide=slide, pointers=places)
        identifier = (ONE, TWO)[index]
        kexts.append(Kext(identifier, f"1.{index}", data, (KPI, ONE)[: index + 1]))
        pointers[identifier] = [place.address + slide for place in places]
    return kexts, pointers


# a kernel alone


def test_a_plain_kernel():
    image = MachO(FileSource(inputs.real(ARM64)))
    cache = open_collection(image)
    assert cache.kernel is cache.image is image
    assert (cache.kind, cache.kexts, cache.info, cache.level) == ("kernel", (), None, PRIMARY)
    assert repr(cache).endswith(" kernel>")
    assert isinstance(cache.memory(), RunMemory)


def test_a_plain_kernel_costs_no_parser():
    code = (
        "import sys; from kvmtool.kernelcache import open_collection\n"
        "from kvmtool.macho import MachO; from kvmtool.source import FileSource\n"
        f"open_collection(MachO(FileSource({inputs.real(ARM64)!r}))).kernel.symtab\n"
        "heavy = 'xml pyexpat construct macholib kvmtool.fixups kvmtool.prelink_info'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# prelinked kernels


@pytest.fixture(scope="module")
def x86_prelinked():
    kexts, _ = x86_kexts()
    source = 0xFFFFFF8000C00000
    return build.prelinked_kernel(read(X86), [*kexts, MACH_KPI], source=source)


def test_the_kernel_of_a_prelinked_kernel(x86_prelinked, tmp_path):
    cache = open_bytes(x86_prelinked)
    assert cache.kind == "prelinked kernel"
    assert cache.kernel is cache.image
    assert symbol_lines(cache.kernel) == nm(read(X86), tmp_path)
    assert same_bytes(read(X86), cache.memory()) > 6_000_000
    headers = accepted(x86_prelinked, tmp_path)
    assert headers.count("segname __PRELINK_TEXT") == 2
    assert nm(x86_prelinked, tmp_path) == nm(read(X86), tmp_path)


def test_the_kexts_of_a_prelinked_kernel(x86_prelinked, tmp_path):
    one, two, kpi = open_bytes(x86_prelinked).kexts
    assert one[:4] == (ONE, "1.0", one.image.uuid, 0xFFFFFF7F8434F000)
    assert two[:4] == (TWO, "1.1", two.image.uuid, 0xFFFFFF7F88B4F000)
    for kext, name in ((one, KEXTS[0]), (two, KEXTS[1])):
        plain = read(name)
        assert kext.image.source.read_at(0, kext.size) == plain.ljust(kext.size, b"\0")
        assert kext.size == 0x4000, "a value that both share by an IDREF"
        assert symbol_lines(kext.image) == nm(plain, tmp_path)
        assert same_bytes(plain, image_memory(kext.image)) > 0x1000
        assert kext.origin == "own symbol table"
        assert kext.path == "/System/Library/Extensions/Test.kext"
        (path := tmp_path / "kext").write_bytes(kext.image.source.read_at(0, kext.size))
        assert "LC_SYMTAB" in llvm.run("llvm-objdump", "--macho", "--all-headers", str(path))
    assert (one.dependencies, two.dependencies) == ((KPI,), (KPI, ONE))
    assert kpi[:6] == (KPI, "13.4.0", b"i" * 16, 0, 0, ())
    assert kpi[7:9] == (None, "none: no executable")
    assert one.info.source_address == 0xFFFFFF8000C00000
    assert two.info.link_state == 0xFFFFFF8000C04100


def test_symbols_of_a_kext_by_name(x86_prelinked):
    one = open_bytes(x86_prelinked).kexts[0]
    (found,) = one.image.symtab.find("_my_mmread")
    assert one.address <= found.n_value < one.address + one.size


@pytest.mark.parametrize("bare", [False, True])
def test_an_arm64_prelinked_kernel(bare, tmp_path):
    """Kexts lie where they will run; an old list is a bare array."""
    one = build.small_kext("arm64", 0xFFFFFFF004004000, ["_alpha", "_beta"], b"1" * 16)
    two = build.small_kext("arm64", 0xFFFFFFF004014000, ["_gamma"], b"2" * 16)
    data = build.prelinked_kernel(
        read(ARM64), [Kext(ONE, "1", one), Kext(TWO, "2", two)], bare=bare
    )
    cache = open_bytes(data)
    accepted(data, tmp_path)
    assert symbol_lines(cache.kernel) == nm(read(ARM64), tmp_path)
    assert [(kext.identifier, kext.uuid) for kext in cache.kexts] == [
        (ONE, b"1" * 16),
        (TWO, b"2" * 16),
    ]
    for kext, plain in zip(cache.kexts, (one, two), strict=True):
        assert symbol_lines(kext.image) == nm(plain, tmp_path)
        assert same_bytes(plain, cache.memory()) > 0x3000
        assert same_bytes(plain, image_memory(kext.image)) > 0x3000
    assert cache.info.kcid == (None if bare else b"K" * 16)


def test_an_i386_prelinked_kernel(tmp_path):
    """The article's own kext, an MH_OBJECT as all kexts of its day, in a 32-bit kernel."""
    plain = read("kexts/i386-KernelMemoryAccess")
    macho = Builder("i386", 2, 1)
    macho.segment("__TEXT", 0x200000, bytes(0x1000), fileoff=0)
    macho.segment("__PRELINK_TEXT", 0x800000, plain)
    entry = build.kext_dictionary(Kext(ONE, "1.0.0", plain), 0x800000, 0x800000, len(plain))
    text = build.plist([entry]) + b"\0"
    section = Section("__info", "__PRELINK_INFO", 0x900000, len(text))
    macho.segment("__PRELINK_INFO", 0x900000, text, sections=[section])
    (kext,) = open_bytes(macho.build()).kexts
    assert (kext.version, kext.address, kext.size) == ("1.0.0", 0x800000, len(plain))
    (path := tmp_path / "kext").write_bytes(plain)
    theirs = sorted(line.split()[-1] for line in llvm.run("llvm-nm", str(path)).splitlines())
    ours = sorted(e.name for e in kext.image.symtab if not e.n_type & N_STAB)
    assert ours == theirs
    assert "_my_mmread" in ours


# kernel collections


@pytest.fixture(scope="module")
def arm64_collection():
    at = 0xFFFFFFF007800000
    pointers = [0xFFFFFFF007004000, at + 0x800, 0xFFFFFFF007000000]
    one = build.small_kext("arm64", at, ["_alpha", "_beta"], b"1" * 16, pointers)
    two = build.small_kext("arm64", at + 0x100000, ["_gamma"], b"2" * 16)
    entries = [
        Kext(KERNEL, "18.2", read(ARM64)),
        Kext(ONE, "1.2", one, (KPI,)),
        Kext(TWO, "3", two, (ONE,)),
    ]
    places = {
        KERNEL: chains.local_relocations(read(ARM64)),
        ONE: [at + 0x4000, at + 0x4008, at + 0x4010],
        TWO: [],
    }
    built = build.collection(
        "arm64",
        0xFFFFFFF007000000,
        entries,
        places,
        pointer_format=8,
        page_size=0x4000,
        codeless=[MACH_KPI],
    )
    return built, entries


@pytest.fixture(scope="module")
def x86_collection():
    """The header lies at 0xffffff8000180000, __HIB below it: pointers count from __HIB."""
    kernel = read(X86)
    base, low = 0xFFFFFF8000180000, 0xFFFFFF8000100000
    kexts, pointers = x86_kexts(0xFFFFFF8000E00000)
    pointers[KERNEL] = chains.words_between(
        kernel, ["__DATA", "__KLD", "__CTF"], 0xFFFFFF8000200000, 0xFFFFFF8000B60000
    )
    built = build.collection(
        "x86_64",
        base,
        [Kext(KERNEL, "13.4.0", kernel), *kexts],
        pointers,
        pointer_format=11,
        page_size=0x1000,
        low=low,
        hib=struct.pack("<2Q", low, base).ljust(0x1000, b"\x90"),
        hib_pointers=[low, low + 8],
        codeless=[MACH_KPI],
    )
    return built, [Kext(KERNEL, "13.4.0", kernel), *kexts]


@pytest.fixture(params=["arm64_collection", "x86_collection"])
def collection(request):
    return request.getfixturevalue(request.param)


def test_the_kernel_of_a_collection(collection, tmp_path):
    built, entries = collection
    cache = open_bytes(built.data)
    assert (cache.kind, cache.level) == ("kernel collection", PRIMARY)
    kernel = cache.kernel
    assert kernel.uuid == macho(entries[0].data).uuid
    assert symbol_lines(kernel) == nm(entries[0].data, tmp_path)
    assert [s.sectname for s in kernel.sections] == [
        s.sectname for s in macho(entries[0].data).sections
    ]
    accepted(built.data, tmp_path)
    # llvm-nm, too, when the entry's header is put before the file
    view = EntrySource(BytesSource(built.data), built.fileoffs[KERNEL], "view")
    assert nm(view.read_at(0, view.size), tmp_path) == nm(entries[0].data, tmp_path)


def test_the_bytes_of_a_collection(collection):
    built, entries = collection
    memory = open_bytes(built.data).memory()
    assert isinstance(memory, FixedMemory)
    compared = sum(same_bytes(entry.data, memory) for entry in entries)
    assert compared > 6_000_000
    fixups = list(memory.fixups)
    assert len(fixups) > 10_000
    changed = sum(memory.raw.read(f.address, 8) != struct.pack("<Q", f.value) for f in fixups)
    assert changed == len(fixups)


def test_the_number_of_pointers(arm64_collection, x86_collection):
    """arm64: relocations of the kernel that are not null, 3 of a kext; x86_64: at any byte."""
    memory = open_bytes(arm64_collection[0].data).memory()
    assert len(list(memory.fixups)) == 20211 + 3
    found = [f.address for f in open_bytes(x86_collection[0].data).memory().fixups]
    assert len(found) > 25_000
    assert sum(1 for address in found if address % 8) > 20


def test_pointers_of_x86_count_from_the_lowest_segment(x86_collection):
    cache = open_bytes(x86_collection[0].data)
    assert cache.base == 0xFFFFFF8000100000
    memory = cache.memory()
    assert memory.read(cache.base, 16) == struct.pack("<2Q", 0xFFFFFF8000100000, 0xFFFFFF8000180000)
    raw = struct.unpack("<2Q", memory.raw.read(cache.base, 16))
    assert [word & 0x3FFFFFFF for word in raw] == [0, 0x80000]


def test_pointers_of_arm64_count_from_the_header():
    """arm_slide_rebase_and_sign_image() takes the header for the base, wherever segments lie."""
    data = bytearray(small_collection().data)
    segment = chains.segment(data, "__PRELINK_INFO")
    struct.pack_into("<Q", data, segment.at + 24, 0xFFFFFFF006000000)
    assert open_bytes(data).base == 0xFFFFFFF007000000


def test_the_kexts_of_a_collection(collection, tmp_path):
    built, entries = collection
    *kexts, kpi = open_bytes(built.data).kexts
    assert [kext.identifier for kext in kexts] == [ONE, TWO]
    for kext, entry in zip(kexts, entries[1:], strict=True):
        plain = macho(entry.data)
        assert kext.version == entry.version
        assert kext.uuid == plain.uuid
        assert kext.address == plain.segment("__TEXT").vmaddr
        assert kext.size == plain.segment("__TEXT").vmsize
        assert kext.dependencies == entry.dependencies
        assert kext.origin == "fileset __LINKEDIT"
        assert symbol_lines(kext.image) == nm(entry.data, tmp_path)
        some = symbol_lines(kext.image)[0].split()[-1]
        assert [found.name for found in kext.image.symtab.find(some)] == [some]
    assert kpi[:6] == (KPI, "13.4.0", b"i" * 16, 0, 0, ())


def test_kexts_keep_the_symbols_they_were_built_from(x86_collection, tmp_path):
    """The real kexts, not the moved copies the builder made of them."""
    kexts = open_bytes(x86_collection[0].data).kexts
    for kext, name in zip(kexts, KEXTS, strict=False):
        low = chains.segment(read(name), "__TEXT").vmaddr
        assert symbol_lines(kext.image) == nm(read(name), tmp_path, kext.address - low)


def small_collection(machine="arm64", *, kernel=True, top=None, base=None, words=None, **more):
    """A few pages: perhaps a kernel, and a kext with pointers to itself."""
    if base is None:
        base = 0xFFFFFF8000200000 if machine == "x86_64" else 0xFFFFFFF007000000
    page = 0x1000 if machine == "x86_64" else 0x4000
    at = base + 0x100000
    words = [at + 0x800, at, base + 0x10] if words is None else words
    one = build.small_kext(machine, at, ["_alpha"], b"1" * 16, words)
    entries, places = [Kext(ONE, "1", one, (KPI,))], {ONE: [at + page + 8 * n for n in range(3)]}
    if kernel:
        places[KERNEL] = [base + 0x4000 + page + 8 * n for n in range(4)]
        plain = build.small_kernel(machine, base + 0x4000, [base + n for n in range(4)])
        entries.insert(0, Kext(KERNEL, "1", plain))
    number = 11 if machine == "x86_64" else 8
    return build.collection(
        machine, base, entries, places, pointer_format=number, page_size=page, top=top, **more
    )


@pytest.mark.parametrize(
    ("machine", "kernel", "top", "level"),
    [
        ("x86_64", True, {}, PRIMARY),
        ("x86_64", False, {"_BootKCID": b"b" * 16}, PAGEABLE),
        ("x86_64", False, {"_BootKCID": b"b" * 16, "_PageableKCID": b"p" * 16}, AUXILIARY),
        ("arm64", True, {}, PRIMARY),
        ("arm64", False, {"_BootKCID": b"b" * 16}, AUXILIARY),
    ],
)
def test_which_collection_it_is(machine, kernel, top, level):
    cache = open_bytes(small_collection(machine, kernel=kernel, top=top).data)
    assert cache.level == level
    assert cache.info.boot_kcid == top.get("_BootKCID")
    assert [kext.identifier for kext in cache.kexts] == [ONE]


def test_a_collection_without_a_kernel_says_so():
    cache = open_bytes(small_collection(kernel=False).data)
    with pytest.raises(NotFoundError, match=r"com\.apple\.kernel not found; file is the auxiliary"):
        _ = cache.kernel


def system_collection():
    """As dyld writes it for x86_64: linked at 0, a chain of its own for every kext, pointers into
    the boot collection (level 0) and into itself (level 1)."""
    data = bytearray(
        small_collection("x86_64", kernel=False, base=0, top={"_BootKCID": b"b" * 16}).data
    )
    kext = 0x4000
    at = next(off for off, cmd, _ in chains.commands(data) if cmd == 0x80000034)
    linkedit = chains.segment(data, "__LINKEDIT")
    words = chains.segments(data, kext)[1]
    struct.pack_into("<2Q", data, words.fileoff, 0x1234 | 8 << 51, 0x100800 | 1 << 30)
    starts = chains.Starts(words.vmaddr - 0x100000, (0,))
    payload = chains.chained_payload([None, starts, None], 0x1000, 11)
    struct.pack_into("<2I", data, at + 8, 0, 0)  # the outer command is there, and empty
    off = chains.append_linkedit(data, payload)
    view = data[kext : kext + 0x800]
    chains.add_command(view, struct.pack("<4I", 0x80000034, 16, off, len(payload)))
    data[kext : kext + 0x800] = view
    assert linkedit.fileoff < off
    return bytes(data), words.vmaddr


def test_a_system_collection_has_chains_for_each_kext():
    data, at = system_collection()
    cache = open_bytes(data)
    assert (cache.level, cache.base) == (PAGEABLE, 0)
    memory = cache.memory()
    assert [(f.address, f.value) for f in memory.fixups] == [(at, None), (at + 8, 0x100800)]
    with pytest.raises(FaultError, match="a pointer into the boot kernel collection, which is not"):
        memory.read(at, 16)
    assert memory.read(at + 8, 8) == struct.pack("<Q", 0x100800)
    boot = open_bytes(small_collection("x86_64").data)
    given = cache.memory(bases={boot.level: boot.base})
    assert given.read(at, 16) == struct.pack("<2Q", boot.base + 0x1234, 0x100800)


def test_an_entry_reads_as_the_file_does():
    built = small_collection()
    source = BytesSource(built.data, "file")
    off = built.fileoffs[ONE]
    entry = EntrySource(source, off, "entry")
    head = 32 + struct.unpack_from("<I", built.data, off + 20)[0]
    whole = built.data[off : off + head] + built.data[head:]
    assert entry.read_at(0, entry.size) == whole
    chance = random.Random(1)
    for _ in range(300):
        at = chance.choice((chance.randrange(len(whole)), head - 4 + chance.randrange(8)))
        size = min(chance.randrange(40), len(whole) - at)
        assert entry.read_at(at, size) == whole[at : at + size]
        needle = whole[at : at + chance.randrange(1, 5)]
        start, end = chance.choice((0, head - 2, head, at)), chance.choice((len(whole), at + 9))
        assert entry.find(needle, start, end) == whole.find(needle, start, end)
        assert find_by_chunks(entry, needle, start, end) == whole.find(needle, start, end)
    for at, size in ((-1, 4), (len(whole), 1), (4, -1), (0, len(whole) + 1)):
        with pytest.raises(TruncatedError):
            entry.read_at(at, size)
    entry.close()
    assert source.read_at(0, 4)


# kexts that are linked into the kernel


def modules_kernel(words, *, index=0, chained=True):
    """A kernel with two Mach-Os inside: __kmod_start has where they begin, and an end."""
    base = 0xFFFFFFF007004000
    macho = Builder("arm64e", 2, 1)
    kexts = []
    for at in (0x8000, 0xC000):
        kext = Builder("arm64e", MH_KEXT_BUNDLE, 0)
        text = [Section("__text", "__TEXT", base + at + 0x800, 0x100)]
        kext.segment("__TEXT", base + at, bytes(0x4000), fileoff=0, sections=text)
        kext.uuid(bytes([at >> 8]) * 16)
        kexts.append(kext.build())
    macho.segment("__TEXT", base, bytes(0x4000), fileoff=0)
    macho.segment("__DATA", base + 0x4000, bytes(0x100))
    macho.segment("__PLK_TEXT", base + 0x8000, kexts[0] + kexts[1])
    starts = struct.pack(f"<{len(words)}Q", *words)
    text = build.plist(
        [
            {"CFBundleIdentifier": ONE, "CFBundleVersion": "1", "ModuleIndex": index},
            {"CFBundleIdentifier": TWO, "CFBundleVersion": "2", "ModuleIndex": index + 1},
        ]
    )
    at = base + 0x10000
    sections = [
        Section("__kmod_start", "__PRELINK_INFO", at, len(starts)),
        Section("__info", "__PRELINK_INFO", at + 0x100, len(text)),
    ]
    macho.segment("__PRELINK_INFO", at, starts.ljust(0x100, b"\0") + text, sections=sections)
    macho.symtab([], linkedit=base + 0x20000)
    data = macho.build()
    places = [at + 8 * n for n in range(len(words))]
    return chains.arm64e_kernel(data, places) if chained else data


def test_built_in_kexts():
    """Their pointers are chained, too."""
    base = 0xFFFFFFF007004000
    data = modules_kernel([base + 0x8000, base + 0xC000, base + 0x10000])
    one, two = open_bytes(data).kexts
    assert one[:6] == (ONE, "1", b"\x80" * 16, base + 0x8000, 0x4000, ())
    assert two[:6] == (TWO, "2", b"\xc0" * 16, base + 0xC000, 0x4000, ())
    assert two.image.segment("__TEXT").vmaddr == base + 0xC000
    assert one.origin == two.origin == "none: stripped"


def test_built_in_kexts_that_are_not_there():
    base = 0xFFFFFFF007004000
    data = modules_kernel([base + 0x8000, base + 0xC000])
    one, two = open_bytes(data).kexts
    assert one.image is not None
    assert (two.image, two.size) == (None, 0)
    assert two.origin == "none: module 0x1 of __kmod_start, which has 0x10 bytes"
    data = modules_kernel([base + 0x8000, 0x1000, 0x2000], chained=False)
    one, two = open_bytes(data).kexts
    assert "expected 0x4 bytes" in two.origin
    assert one.size == 0x4000, "what its own segments say"


# damage


def entry_command(data, number=0):
    found = [at for at, cmd, _ in chains.commands(data) if cmd == fileset.LC_FILESET_ENTRY]
    return found[number]


@pytest.mark.parametrize("entry_id", [0, 31, 56, 0xFFFFFFFF])
def test_an_entry_whose_name_is_outside(entry_id):
    data = bytearray(small_collection().data)
    at = entry_command(data)
    struct.pack_into("<I", data, at + 24, entry_id)
    with pytest.raises(FormatError, match=f"entry_id at {entry_id:#x}, expected 0x20 to") as caught:
        _ = open_bytes(data).kernel
    assert caught.value.offset == at


def test_an_entry_that_is_too_small():
    data = bytearray(small_collection().data)
    at, (size,) = entry_command(data, 1), struct.unpack_from("<I", data, 20)
    struct.pack_into("<I", data, at + 4, 24)
    struct.pack_into("<2I", data, 16, len(chains.commands(data[:16] + data[16:])), size)
    data[20:24] = struct.pack("<I", at + 24 - 32)
    with pytest.raises(FormatError, match="LC_FILESET_ENTRY: cmdsize 0x18, expected 0x20"):
        _ = open_bytes(data).kexts


@pytest.mark.parametrize("fileoff", [0x1000, 0x40000000, 0xFFFFFFFFFFFFFFFF])
def test_a_damaged_kext_does_not_hide_the_others(fileoff):
    data = bytearray(small_collection().data)
    struct.pack_into("<Q", data, entry_command(data, 1) + 16, fileoff)
    cache = open_bytes(data)
    assert cache.kernel.symtab is not None
    (kext,) = cache.kexts
    assert (kext.identifier, kext.image, kext.uuid) == (ONE, None, None)
    assert kext.origin.startswith("none: file")
    assert "\n" not in kext.origin
    struct.pack_into("<Q", data, entry_command(data) + 16, fileoff)
    with pytest.raises(FormatError):
        _ = open_bytes(data).kernel


def test_a_prelinked_kext_outside_of_the_kernel():
    kernel = build.small_kernel("x86_64", 0xFFFFFF8000200000, [])
    kexts = [Kext(ONE, "1", build.small_kext("x86_64", 0x5000, ["_a"], b"1" * 16))]
    for key, value, problem in (
        ("SourceAddr", 0x1234, "no segment of the kernel holds address 0x1234"),
        ("Size", 0x7FFFFFFF, "expected 0x7fffffff bytes"),
    ):
        entry = build.kext_dictionary(kexts[0], 0x5000, 0xFFFFFF8000300000, 0x3000)
        entry[f"_PrelinkExecutable{key}"] = build.Hex(value)
        data = build.prelinked_kernel(
            kernel, kexts, source=0xFFFFFF8000300000, info=build.plist([entry])
        )
        (kext,) = open_bytes(data).kexts
        assert kext.image is None
        assert problem in kext.origin


def test_a_damaged_list_is_an_error_of_the_kexts_alone():
    kernel = build.small_kernel("x86_64", 0xFFFFFF8000200000, [])
    kexts = [Kext(ONE, "1", build.small_kext("x86_64", 0x5000, ["_a"], b"1" * 16))]
    data = build.prelinked_kernel(kernel, kexts, source=0xFFFFFF8000300000, info=b"<dict><key>")
    cache = open_bytes(data)
    assert cache.kind == "prelinked kernel"
    assert len(cache.kernel.symtab) == 2
    with pytest.raises(FormatError, match="no element found") as caught:
        _ = cache.kexts
    assert caught.value.offset == chains.segment(data, "__PRELINK_INFO").fileoff + 11


def test_a_list_that_is_not_in_the_file():
    data = bytearray(small_collection().data)
    section = chains.segment(data, "__PRELINK_INFO").at + 72
    struct.pack_into("<Q", data, section + 40, 0xFFFFFFFF)
    with pytest.raises(TruncatedError):
        _ = open_bytes(data).kexts


def test_one_large_header_cannot_be_thousands():
    """Each of 3,000 kexts is said to begin with the same 64 KiB of load commands."""
    big = Builder("x86_64", MH_KEXT_BUNDLE)
    big.segment("__TEXT", 0x5000, bytes(0x1000), fileoff=0)
    for _ in range(8000):
        big.command(0x26, bytes(8))
    kexts = [Kext(f"com.test.k{n}", "1", big.build()) for n in range(1)]
    entry = build.kext_dictionary(kexts[0], 0x5000, 0xFFFFFF8000300000, len(kexts[0].data))
    entries = [entry | {"CFBundleIdentifier": f"com.test.k{n}"} for n in range(3000)]
    data = build.prelinked_kernel(
        build.small_kernel("x86_64", 0xFFFFFF8000200000, []),
        kexts,
        source=0xFFFFFF8000300000,
        info=build.plist(entries),
    )
    start = time.process_time()
    found = open_bytes(data).kexts
    assert time.process_time() - start < 3
    assert len(found) == 3000
    assert [kext.image is not None for kext in found].count(True) == len(data) // (8000 * 16)
    assert "the load commands of all kexts are larger than the file" in found[-1].origin


def test_the_number_of_entries_is_limited(monkeypatch):
    monkeypatch.setattr(fileset, "ENTRY_LIMIT", 1)
    with pytest.raises(FormatError, match="more than 0x1 fileset entries"):
        _ = open_bytes(small_collection().data).kexts


def small_prelinked():
    kernel = build.small_kernel("x86_64", 0xFFFFFF8000200000, [])
    kexts = [
        Kext(name, "1", build.small_kext("x86_64", at, ["_a", "_b"], b"1" * 16), (KPI,))
        for name, at in ((ONE, 0x5000), (TWO, 0x9000))
    ]
    return build.prelinked_kernel(kernel, [*kexts, MACH_KPI], source=0xFFFFFF8000300000)


HOSTILE = {
    "prelinked": small_prelinked,
    "boot arm64": lambda: small_collection().data,
    "boot x86_64": lambda: small_collection("x86_64").data,
    "system": lambda: system_collection()[0],
    "modules": lambda: modules_kernel([0xFFFFFFF007004000 + n for n in (0x8000, 0xC000, 0x10000)]),
}


def use(data):
    """Ask for everything."""
    cache = open_bytes(data)
    for kext in cache.kexts:
        if kext.image is not None:
            list(kext.image.symtab or ())
            if kext.image.symtab is not None:
                kext.image.symtab.find("_alpha")
    with contextlib.suppress(NotFoundError):
        list(cache.kernel.symtab or ())
    memory = cache.memory(bases={0: 0x1000})
    if isinstance(memory, FixedMemory):
        for fixup in memory.fixups:
            memory.read(fixup.address, 8)


@pytest.mark.parametrize("name", HOSTILE)
def test_mutated_caches(name):
    """Only a KvmError, in time."""
    data = HOSTILE[name]()
    use(data)
    spots = [(0, 0x600), (0x4000, 0x400)]
    spots += [(seg.fileoff, seg.filesize) for seg in chains.segments(data)[1:] if seg.filesize]
    chance = random.Random(name)
    errors = 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 5)):
            start, size = chance.choice(spots)
            at = min(start + chance.randrange(size), len(data) - 8)
            if chance.random() < 0.5:
                changed[at] ^= 1 << chance.randrange(8)
            else:
                word = chance.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
                struct.pack_into("<I", changed, at, word)
        if chance.random() < 0.2:
            del changed[chance.randrange(len(changed)) :]
        start = time.process_time()
        try:
            use(changed)
        except KvmError as error:
            errors += "\n" not in str(error)
        assert time.process_time() - start < 1
    assert 10 < errors < 200


def test_names_are_those_of_the_headers():
    from macholib import mach_o

    assert fileset.LC_FILESET_ENTRY == mach_o.LC_FILESET_ENTRY
    assert kernelcache.MH_FILESET == mach_o.MH_FILESET
    fields = [(name, kind._size_) for name, kind in mach_o.fileset_entry_command._fields_]
    assert fields == [("vmaddr", 8), ("fileoff", 8), ("entry_id", 4), ("reserved", 4)]
    assert fileset._ENTRY["<"].size == 8 + sum(size for _, size in fields)
