"""Symbol tables: every entry and type letter against llvm-nm, and one name found without a walk."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import struct
import subprocess
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.errors import FormatError
from kvmtool.macho import MH_KEXT_BUNDLE, MachO
from kvmtool.nlist import N_STAB, Nlist, NlistTable, type_letter
from kvmtool.source import BytesSource, FileSource, SliceSource
from tests import inputs
from tests.builders import macho as build
from tests.builders.macho import Section, Sym

NM = shutil.which("llvm-nm")
needs_nm = pytest.mark.skipif(NM is None, reason="llvm-nm is not installed")

N_SECT, N_EXT, N_PEXT, N_UNDF, N_ABS, N_INDR, N_PBUD = 0xE, 0x1, 0x10, 0x0, 0x2, 0xA, 0xC
N_GSYM, N_FUN = 0x20, 0x24  # mach-o/stab.h


# against llvm-nm

THIN = (
    "kernels/arm64-xnu-4903.221.2-release.macho",
    "kernels/arm64e-xnu-6153.11.26-release.macho",
    "kexts/i386-KernelMemoryAccess",
    "objects/ppc-xnu-792.25.20-bsd.o",
    "objects/ppc-xnu-792.25.20-kern_proc.o",
    "objects/x86_64-xnu-2422.115.4-kern_proc.o",
    *(
        f"dumps/{dump}/{name}"
        for dump in inputs.DUMPS
        for name in ("mach_kernel", "KernelMemoryAccess")
    ),
    "machine/x86_64-xnu-2422.115.4.mach_kernel",
    "machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel",
)
FAT = ("kexts/fat-ppc-i386-zfs-102A", "kexts/fat-ppc-i386-zfs-102A.dSYM")


def nm_lines(path):
    """What llvm-nm prints, sorted; a file without symbols is no error."""
    assert NM is not None
    done = subprocess.run([NM, path], capture_output=True, text=True, check=False)
    assert not done.stderr or "no symbols" in done.stderr, done.stderr
    return sorted(done.stdout.splitlines())


def our_lines(image):
    """The same lines from our entries."""
    sections = tuple((s.segname, s.sectname) for s in image.sections)
    kext = image.filetype == MH_KEXT_BUNDLE and image.is64
    width = 16 if image.is64 else 8
    lines = []
    for entry in image.symtab or ():
        if entry.n_type & N_STAB:
            continue  # llvm-nm shows none unless asked to
        letter = type_letter(entry, sections, kext)
        value = " " * width if letter == "U" else f"{entry.n_value:0{width}x}"
        lines.append(f"{value} {letter} {entry.name}")
    return sorted(lines)


@needs_nm
@pytest.mark.parametrize("name", THIN)
def test_symbols_are_those_of_llvm_nm(name):
    path = inputs.real(name)
    source = FileSource(path)
    ours = our_lines(MachO(source))
    assert ours == nm_lines(path)
    assert len(ours) >= 8
    source.close()


@needs_nm
@pytest.mark.parametrize("name", FAT)
def test_symbols_of_each_slice_are_those_of_llvm_nm(name, tmp_path):
    source = FileSource(inputs.real(name))
    magic, count = struct.unpack(">II", source.read_at(0, 8))
    assert magic == 0xCAFEBABE
    for number in range(count):
        offset, size = struct.unpack(">8x2I4x", source.read_at(8 + 20 * number, 20))
        thin = tmp_path / f"slice{number}"
        thin.write_bytes(source.read_at(offset, size))
        ours = our_lines(MachO(SliceSource(source, offset, size)))
        assert ours == nm_lines(str(thin))
        assert (len(ours) > 2000) == (not name.endswith(".dSYM"))
    source.close()


@needs_nm
def test_an_object_that_llvm_nm_refuses_has_the_symbols_of_the_plain_one():
    # ctfmerge put a fourth load command where __text lies, and __text is zeroed in our copy
    path = inputs.real("objects/x86_64-xnu-2422.115.4-kern_proc.o.ctf")
    done = subprocess.run([str(NM), path], capture_output=True, text=True, check=False)
    assert "malformed" in done.stderr
    source = FileSource(path)
    image = MachO(source)
    assert our_lines(image) == nm_lines(inputs.real("objects/x86_64-xnu-2422.115.4-kern_proc.o"))
    assert image.warnings == ["ncmds says 0x4, the load commands end after 0x3"]
    source.close()


SECTIONS = (
    ("__TEXT", "__text"),
    ("__TEXT", "__const"),
    ("__DATA", "__data"),
    ("__DATA", "__bss"),
    ("__DATA", "__common"),
    ("__TEXT_EXEC", "__text"),
    ("__DATA_CONST", "__data"),
    ("__OBJC", "__module_info"),
    ("__DATA", "__text"),
)


@needs_nm
@pytest.mark.parametrize("filetype", [build.MH_OBJECT, build.MH_EXECUTE, build.MH_KEXT_BUNDLE])
@pytest.mark.parametrize("arch", ["i386", "x86_64", "ppc", "arm64"])
def test_letters_of_every_kind_of_symbol(arch, filetype, tmp_path):
    file = build.MachO(arch, filetype)
    sections = [
        Section(sectname, segname, 0x1000 + 16 * n, 16)
        for n, (segname, sectname) in enumerate(SECTIONS)
    ]
    file.segment("__TEXT", 0x1000, bytes(16 * len(sections)), sections=sections)
    symbols = [
        Sym(f"_{kind:x}_{binding:x}_{n_sect}", 0x1000 + 16 * n_sect, kind | binding, n_sect)
        for binding in (0, N_EXT, N_PEXT, N_PEXT | N_EXT)
        for kind, n_sect in [
            *((N_SECT, n) for n in range(len(sections) + 3)),  # NO_SECT, and some not there
            *((kind, 0) for kind in (N_ABS, N_UNDF, N_PBUD, 0x4)),  # 0x4 is no type
        ]
    ]
    symbols += [Sym(f"_undefined_{n:x}", 0, n, 0) for n in (0, N_EXT, N_PEXT, N_PEXT | N_EXT)]
    file.symtab(symbols, dysymtab=False)
    path = tmp_path / "made"
    path.write_bytes(file.build())
    ours = our_lines(MachO(BytesSource(path.read_bytes())))
    assert ours == nm_lines(str(path))
    assert len({line.split()[-2] for line in ours}) >= 8


def test_letters_that_are_not_compared():
    # llvm-nm shows stabs only when asked to, and an indirect symbol's target instead of its value
    def letter(n_type):
        return type_letter(Nlist("_x", n_type, 0, 0, 1, 0), ())

    assert letter(N_GSYM) == letter(N_FUN | N_EXT) == "-"
    assert letter(N_INDR) == "i"
    assert letter(N_INDR | N_EXT) == "I"


# against the list of every entry, stabs and all


@functools.cache
def true_entries(dump):
    """Of the kernel as Apple linked it, whose string table begins with a space: ours has a NUL."""
    with gzip.open(inputs.real(f"types/{dump}.symbols.json.gz")) as packed:
        return [(name.lstrip(" "), *rest) for name, *rest in json.load(packed)]


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_every_entry_of_a_kernel(dump):
    source = FileSource(inputs.real(f"dumps/{dump}/mach_kernel"))
    table = MachO(source).symtab
    entries = list(table)
    assert len(entries) == len(table)
    assert [entry.place for entry in entries] == list(range(len(table)))
    assert [entry[:5] for entry in entries] == true_entries(dump)
    plain = [(n, e.n_type, e.n_value) for n, e in enumerate(entries) if not e.n_type & N_STAB]
    assert list(table.values()) == plain
    external = [e for e in entries if e.n_type & N_EXT and not e.n_type & N_STAB]
    assert list(table.externals()) == external
    for at in range(0, len(entries), 997):
        assert table.entry(at) == entries[at]
    source.close()


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_one_name_is_found_as_a_walk_finds_it(dump):
    source = FileSource(inputs.real(f"dumps/{dump}/mach_kernel"))
    table = MachO(source).symtab
    by_name: dict[str, list[Nlist]] = {}
    for entry in table:
        by_name.setdefault(entry.name, []).append(entry)
    asked = {"_cdevsw", "_version", "__mh_execute_header", "_allproc", "_in", "_nosuch", "cdevsw"}
    asked.update(sorted(by_name)[1::1500])
    asked.update(sorted(by_name, key=lambda n: (-len(by_name[n]), n))[:12])  # the most frequent
    asked.discard("")
    for name in sorted(asked):
        assert table.find(name) == by_name.get(name, []), name
    source.close()


# tables made by hand: offsets into the string table are what they are about


def table_of(entries, strings, *, order="<", wide=True, before=b"head", source=None):
    """An NlistTable of (n_strx, n_type, n_sect, n_desc, n_value) rows over `strings`."""
    entry = struct.Struct(order + ("IBBhQ" if wide else "IBBhI"))
    raw = b"".join(entry.pack(*row) for row in entries)
    data = before + raw + strings
    stroff = len(before) + len(raw)
    opened = source(data) if source else BytesSource(data, "file")
    return NlistTable(opened, len(before), len(entries), stroff, len(strings), order, wide)


def defined(strx, value=0x1000):
    return (strx, N_SECT | N_EXT, 1, 0, value)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("wide", [False, True])
def test_names_may_share_their_tails(order, wide):
    strings = b"\0_my_mmread\0"
    rows = [defined(1, 0x10), defined(4, 0x20), defined(6, 0x30), defined(1, 0x40)]
    table = table_of(rows, strings, order=order, wide=wide)
    assert [entry.name for entry in table] == ["_my_mmread", "_mmread", "mread", "_my_mmread"]
    assert [entry.n_value for entry in table.find("_mmread")] == [0x20]
    assert [entry.n_value for entry in table.find("mread")] == [0x30]
    assert [entry.n_value for entry in table.find("_my_mmread")] == [0x10, 0x40]
    assert table.find("read") == []  # its letters are there, but no entry points at them


def test_the_last_name_may_lack_its_nul():
    table = table_of([defined(1, 0x10), defined(4, 0x20)], b"\0_a\0_last")
    assert [entry.name for entry in table] == ["_a", "_last"]
    assert [entry.n_value for entry in table.find("_last")] == [0x20]
    assert table.find("last") == []
    assert table.find("longer than the whole table") == []


def test_the_string_table_may_end_inside_another_that_goes_on():
    # strsize ends the names, not the next NUL of the file
    table = table_of([defined(1)], b"\0_short")
    grown = table_of([defined(1)], b"\0_short")
    grown._source = BytesSource(table._source.read_at(0, table._source.size) + b"er\0", "file")
    assert [entry.name for entry in grown] == ["_short"]
    assert grown.find("_shorter") == []
    assert len(grown.find("_short")) == 1


@pytest.mark.parametrize("strx", [8, 9, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_name_outside_the_string_table_is_named(strx):
    table = table_of([defined(1), defined(strx)], b"\0_short\0"[:8])
    with pytest.raises(FormatError, match=f"n_strx {strx:#x}, expected less than") as caught:
        list(table)
    assert caught.value.offset == 4 + 16
    with pytest.raises(FormatError):
        table.entry(1)
    assert [entry.place for entry in table.find("_short")] == [0]  # the others still stand


def test_index_zero_is_no_name():
    # mach-o/nlist.h: n_strx 0 means "no name", whatever the string table begins with
    table = table_of([defined(0, 0x10), defined(1, 0x20)], b" \0_a\0")
    assert [entry.name for entry in table] == ["", ""]
    assert table.entry(0).name == ""
    assert table_of([defined(0, 0x10)], b"_a\0").find("_a") == []
    assert [entry.name for entry in table_of([defined(0)], b"")] == [""]


@pytest.mark.parametrize("name", ["", "\0", "_a\0", "_a\0_b"])
def test_what_can_be_no_name_is_never_found(name):
    assert table_of([defined(0), defined(1), defined(4)], b"\0_a\0_b\0").find(name) == []


def test_names_that_are_not_utf8():
    table = table_of([defined(1)], b"\0_\xff\xfe\0")
    (entry,) = table
    assert entry.name == "_\udcff\udcfe"
    assert table.find(entry.name) == [entry]


def test_stabs_and_the_undefined_are_found_but_not_defined():
    rows = [
        (1, N_GSYM, 0, 0, 0),  # as in 10.4 to 10.6: the stab of a global, value 0, comes first
        (1, N_UNDF | N_EXT, 0, 0, 0),
        (1, N_UNDF | N_EXT, 0, 0, 64),  # common
        (1, N_PBUD | N_EXT, 0, 0, 0),
        (1, N_SECT | N_EXT, 1, 0, 0x441720),
        (1, N_ABS | N_EXT, 0, 0, 7),
    ]
    found = table_of(rows, b"\0_cdevsw\0").find("_cdevsw")
    assert [entry.place for entry in found] == [0, 1, 2, 3, 4, 5]
    assert [entry.defined for entry in found] == [False, False, False, False, True, True]


def test_an_index_that_lies_across_two_entries_is_not_taken_for_one():
    strings = b"\0" * 0x100 + b"\0_hit\0"
    strx = 0x101
    inside = (0x200, 0, 0, 0, strx << 8 | strx)  # the same four bytes inside n_value
    table = table_of([inside, defined(strx)], strings.ljust(0x300, b"\0"))
    assert [entry.place for entry in table.find("_hit")] == [1]


@pytest.mark.parametrize(
    ("symoff", "nsyms", "stroff", "strsize", "what"),
    [
        (0, 0x10000000, 0, 0, "symbol table"),
        (0xFFFFFFFF, 1, 0, 0, "symbol table"),
        (0, 0xFFFFFFFF, 0, 0, "symbol table"),
        (0, 0, 0xFFFFFFF0, 0x20, "string table"),
        (0, 0, 0, 0xFFFFFFFF, "string table"),
    ],
)
def test_tables_must_lie_in_the_file(symoff, nsyms, stroff, strsize, what):
    source = BytesSource(bytes(64), "file")
    with pytest.raises(FormatError, match=f"{what}: expected .*the file ends at 0x40") as caught:
        NlistTable(source, symoff, nsyms, stroff, strsize, "<", True)
    assert caught.value.offset == max(symoff, stroff)


NAMES = st.lists(st.sampled_from(["_a", "_b", "_ab", "b", "_proc", "c_proc", "c", ""]), max_size=30)


@given(NAMES, st.booleans(), st.sampled_from("<>"), st.booleans(), st.data())
def test_find_is_a_filtered_walk(names, shared, order, wide, data):
    """Names stored once or once each, in any of the tables a linker may write."""
    strings, places = b"\0", {}
    rows = []
    for number, name in enumerate(names):
        if not shared or name not in places:
            places[name] = len(strings)
            strings += name.encode() + b"\0"
        n_type = data.draw(st.sampled_from([N_SECT, N_SECT | N_EXT, N_GSYM, N_UNDF, N_FUN]))
        rows.append((places[name], n_type, 1, 0, number))
    if not strings.endswith(b"\0\0") and len(strings) > 1 and data.draw(st.booleans()):
        strings = strings[:-1]
    table = table_of(rows, strings, order=order, wide=wide)
    walked = list(table)
    assert [entry.name for entry in walked] == names
    for name in {"_a", "_b", "_ab", "b", "_proc", "c_proc", "proc", "c", "z"}:
        assert table.find(name) == [entry for entry in walked if entry.name == name]


# what hostile tables cost


def test_a_name_stored_very_often_costs_one_pass():
    count = 100_000
    strings = b"\0" + b"x\0" * count
    table = table_of([defined(1 + 2 * n, n) for n in range(count)], strings)
    started = time.process_time()
    assert len(table.find("x")) == count
    assert time.process_time() - started < 2


def test_a_lookup_does_not_hold_the_table():
    count = 200_000
    strings = b"\0" + b"".join(b"_name%06d\0" % n for n in range(count))
    table = table_of([defined(1 + 12 * n, n) for n in range(count)], strings)
    assert table.find("_name000777")[0].n_value == 777
    tracemalloc.start()
    assert table.find("_name123456")[0].n_value == 123456
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
