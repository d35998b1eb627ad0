"""The Mach-O files we test with, read by others: llvm's tools, and a few lines of struct."""

from __future__ import annotations

import struct

import pytest

from tests.builders import macho
from tests.builders.heap import Region, Signer
from tests.builders.llvm import run
from tests.builders.macho import MachO, Section, Sym, thread_state
from tests.builders.xnu import filler_symbols


@pytest.mark.parametrize("arch", sorted(macho.MACHINES))
def test_object_file_reads_back_in_llvm(arch, tmp_path):
    """Header, sections and symbols of every machine and both byte orders."""
    file = MachO(arch, macho.MH_OBJECT)
    text = Section("__text", "__TEXT", 0, 32)
    bss = Section("__bss", "__DATA", 64, 16, flags=macho.S_ZEROFILL)
    data = Section("__data", "__DATA", 32, 32)
    file.segment("", 0, bytes(range(64)), vmsize=80, sections=[text, data, bss])
    wide = macho.MACHINES[arch].width == 8
    far = 0xFFFFFE0007004000 if wide else 0xFEDC0000
    file.symtab(
        [
            Sym("_undefined", 0, macho.N_UNDF | 1, 0),
            Sym("_main", 4),
            Sym("_table", 32, n_sect=2),
            Sym("_static", 64, macho.N_SECT, 3),
            Sym("_absolute", far, macho.N_ABS | 1, 0),
        ]
    )
    path = tmp_path / "object"
    path.write_bytes(file.build())
    names = run("llvm-nm", str(path)).splitlines()
    found = {line.split()[-1]: line.split()[:-1] for line in names}
    assert found.keys() == {"_undefined", "_main", "_table", "_static", "_absolute"}
    letters = {name: columns[-1] for name, columns in found.items()}
    assert letters == {
        "_undefined": "U",
        "_main": "T",
        "_table": "D",
        "_static": "b",
        "_absolute": "A",
    }
    assert int(found["_absolute"][0], 16) == far
    contents = run("llvm-objdump", "-s", "--section=__data", str(path))
    assert "20212223" in contents


def test_note_bytes_follow_all_segments():
    """LC_NOTE may come first; what it points to does not."""
    file = MachO("x86_64", macho.MH_CORE)
    file.note("addrable bits", b"\x03" + bytes(15))
    file.segment("", 0x1000, b"\xee" * 0x1000)
    built = file.build()
    owner, offset, size = struct.unpack_from("<16s2Q", built, 32 + 8)
    assert (owner, offset, size) == (b"addrable bits\0\0\0", 0x2000, 16)
    assert built[offset:] == b"\x03" + bytes(15)
    assert built[0x1000:0x2000] == b"\xee" * 0x1000


def test_big_endian_core_with_thread():
    """A ppc core: 28-byte header, LC_THREAD with srr0 first."""
    file = MachO("ppc", macho.MH_CORE)
    file.segment("", 0xC0000000, b"page", vmsize=0x1000)
    file.thread(thread_state("ppc", srr0=0x1234, r1=0x5678))
    built = file.build()
    magic, cputype, _, filetype, ncmds, sizeofcmds, _ = struct.unpack_from(">7I", built)
    assert (magic, cputype, filetype, ncmds) == (0xFEEDFACE, 18, 4, 2)
    assert sizeofcmds == 56 + 8 + 8 + 160
    assert struct.unpack_from(">2I", built, 28) == (macho.LC_SEGMENT, 56)
    at = 28 + 56
    assert struct.unpack_from(">6I", built, at) == (4, 176, 1, 40, 0x1234, 0)
    assert struct.unpack_from(">I", built, at + 16 + 4 * 3)[0] == 0x5678


def test_false_claims_are_written_as_asked():
    """ncmds, sizeofcmds, cmdsize, strsize and offsets that are not true."""
    file = MachO("i386", macho.MH_CORE)
    file.command(0x7E, b"abc", cmdsize=0x7FFFFFF0)
    file.segment("", 0x1000, vmsize=0x1000, filesize=0x1000, fileoff=0x7000000)
    file.symtab([Sym("_a", 1)], strsize=0xFFFFFFFF, dysymtab=False)
    built = file.build(ncmds=0xFFFFFFFF, sizeofcmds=0xFFFFFFF0)
    assert struct.unpack_from("<2I", built, 16) == (0xFFFFFFFF, 0xFFFFFFF0)
    assert struct.unpack_from("<2I4s", built, 28) == (0x7E, 0x7FFFFFF0, b"abc\0")
    assert struct.unpack_from("<2I", built, 40 + 32) == (0x7000000, 0x1000)
    assert struct.unpack_from("<6I", built, 40 + 56)[5] == 0xFFFFFFFF
    assert len(built) < 0x2000


def test_version_commands():
    """LC_BUILD_VERSION and LC_SOURCE_VERSION in their packed forms."""
    file = MachO("arm64", macho.MH_EXECUTE)
    file.build_version(1, 0x000B0000, 0x000B0100)
    file.source_version(11417, 121, 6)
    built = file.build()
    assert struct.unpack_from("<6I", built, 32) == (0x32, 24, 1, 0x000B0000, 0x000B0100, 0)
    cmd, size, version = struct.unpack_from("<2IQ", built, 56)
    assert (cmd, size, version) == (0x2A, 16, 11417 << 40 | 121 << 30 | 6 << 20)


def test_half_a_million_symbols():
    """Bulk symbol tables: the last name and value are where they should be."""
    symbols = filler_symbols(500_000, 0xFFFFFF8000300000)
    entries, strings = macho.symbol_table(macho.MACHINES["x86_64"], symbols)
    strx, _, _, _, value = struct.unpack_from("<IBBHQ", entries, 499_999 * 16)
    assert strings[strx : strings.index(b"\0", strx)] == b"_filler_function_499999"
    assert value == 0xFFFFFF8000300000 + 499_999 * 16


def test_signer_keeps_null_and_address():
    """Null stays null; the low 47 bits and bit 55 stay; without a width nothing changes."""
    sign = Signer(47)
    assert sign(0, 0x1000) == 0
    for address in range(0xFFFFFE0007004000, 0xFFFFFE0007004400, 8):
        signed = sign(address, 0x1000)
        assert signed != address
        kept = (1 << 47) - 1 | 1 << 55
        assert signed & kept == address & kept
    assert Signer(None)(0x1234, 0) == 0x1234


def test_region_pins():
    """Allocation goes round what is pinned, and a taken place cannot be pinned."""
    region = Region("__data", 0x1000)
    assert region.pin(0x1020, 0x20) == 0x1020
    assert region.alloc(0x10) == 0x1000
    assert region.alloc(0x20) == 0x1040
    with pytest.raises(ValueError):
        region.pin(0x1050, 8)
