"""Containers of physical memory: the real ones, the writers' traps, and damage."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import zlib

import pytest
from builders import physical as build
from builders.physical import Segment
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import formats, macho
from kvmtool.arch import arm64, x86
from kvmtool.errors import FaultError, FormatError, KvmError, UnknownFormatError
from kvmtool.formats.elf_core import ElfCore
from kvmtool.formats.lime import Lime
from kvmtool.formats.mac_memory_reader import MacMemoryReader
from kvmtool.formats.macho_core import MachOCore
from kvmtool.formats.raw import Raw
from kvmtool.memory import Region
from kvmtool.source import BytesSource, FileSource
from tests.inputs import DUMPS, oracle, real, truth


def opened(data: bytes):
    """The container in `data`, recognised by its bytes."""
    source = BytesSource(data, "dump")
    return formats.load(formats.identify(source))(source)


def runs(dump) -> list[tuple[int, int, int]]:
    return [(run.address, run.address + run.size, run.offset) for run in dump.runs()]


def registers(arch, thread) -> dict[str, int]:
    return {k: v for state in thread.states for k, v in arch.registers(*state).items()}


PAGE = bytes(range(256)) * 16


# the real dumps


@pytest.mark.parametrize("dump", DUMPS)
def test_lime_has_the_ranges_of_the_truth(dump):
    source = FileSource(real(f"dumps/{dump}/mem.lime"))
    assert formats.identify(source).name == "lime"
    lime = Lime(source)
    assert [(first, last + 1, at) for first, last, at in expected_lime(dump)] == runs(lime)
    assert lime.warnings == []
    assert lime.virtual() is None
    regions = [(r.start, r.start + r.size) for r in lime.physical().regions()]
    assert regions == [tuple(run) for run in truth(dump)["memory"]["ram"]]


def expected_lime(dump: str) -> list[tuple[int, int, int]]:
    return [tuple(entry) for entry in truth(dump)["formats"]["mem.lime"]["ranges"]]


@pytest.mark.parametrize("dump", DUMPS)
def test_elf_has_the_loads_and_registers_of_the_truth(dump):
    said = truth(dump)
    elf = ElfCore(FileSource(real(f"dumps/{dump}/mem.elf")))
    assert runs(elf) == [tuple(load) for load in said["formats"]["mem.elf"]["loads"]]
    assert [cpu["cr3"] for cpu in elf.facts.control] == [said["memory"]["cr3"]]
    arch = x86.I386 if said["arch"] == "i386" else x86.X86_64
    found = registers(arch, elf.facts.threads[0])
    assert {name: found[name] for name in said["cpu"]["registers"]} == said["cpu"]["registers"]
    assert elf.warnings == []


@pytest.mark.parametrize("dump", DUMPS)
def test_lime_and_elf_hold_the_same_memory(dump):
    lime = Lime(FileSource(real(f"dumps/{dump}/mem.lime"))).physical()
    elf = ElfCore(FileSource(real(f"dumps/{dump}/mem.elf"))).physical()
    assert list(lime.regions()) == list(elf.regions())
    for region in lime.regions():
        sums = [zlib.crc32(memory.read(region.start, region.size)) for memory in (lime, elf)]
        assert sums[0] == sums[1]


@pytest.mark.parametrize("dump", DUMPS)
def test_a_hole_is_not_zeros(dump):
    memory = Lime(FileSource(real(f"dumps/{dump}/mem.lime"))).physical()
    (hole, end), _ = truth(dump)["formats"]["mem.raw"]["holes_read_as_zero"]
    assert len(memory.read(hole - 16, 16)) == 16
    assert len(memory.read(end, 16)) == 16
    with pytest.raises(FaultError, match="unmapped") as fault:
        memory.read(hole - 16, 32)
    assert (fault.value.address, fault.value.space) == (hole, "physical")


def test_only_a_cpu_outside_long_mode_tells_the_kernels_machine():
    said = {dump: ElfCore(FileSource(real(f"dumps/{dump}/mem.elf"))).facts for dump in DUMPS}
    assert said["i386-10.5.8"].cputype == macho.CPU_TYPE_I386
    assert said["x86_64-10.8.5"].cputype == formats.UNSAID


def test_qemus_core_of_the_real_machine():
    path = real("machine/live.elfcore")
    elf = ElfCore(FileSource(path))
    assert elf.facts.control[0]["cr3"] == int(oracle("live")["cr3"], 16)
    assert runs(elf) == readelf_loads(path)
    assert [note.owner for note in elf.notes] == ["CORE", "QEMU"]


@pytest.mark.parametrize("dump", DUMPS)
def test_readelf_sees_the_same_loads(dump):
    path = real(f"dumps/{dump}/mem.elf")
    assert runs(ElfCore(FileSource(path))) == readelf_loads(path)


def readelf_loads(path: str) -> list[tuple[int, int, int]]:
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("readelf is not here")
    text = subprocess.run([tool, "-lW", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^ +LOAD +(\S+) (\S+) (\S+) (\S+) (\S+)", text, re.MULTILINE)
    numbers = [[int(number, 16) for number in row] for row in found]
    return [(paddr, paddr + filesz, offset) for offset, _, paddr, filesz, _ in numbers]


# LiME


def test_lime_ends_are_inclusive():
    lime = opened(build.lime((0x1000, PAGE), (0x8000, b"x")))
    assert list(lime.physical().regions()) == [Region(0x1000, 0x1000), Region(0x8000, 1)]
    assert lime.physical().read(0x8000, 1) == b"x"


@pytest.mark.parametrize(
    ("second", "at", "message"),
    [
        (build.lime_header(0x5000, 0x4FFE), 0x1020, "range from 0x5000 to 0x4ffe"),
        (
            build.lime_header(0, 0, magic=0x4C694D46),
            0x1020,
            "magic 0x4c694d46, expected 0x4c694d45",
        ),
        (build.lime_header(0, 0, version=2), 0x1020, "version 0x2, expected 1"),
        (build.lime_header(0, 1 << 52), 0x1020, "leaves the address space"),
        (build.lime_header(0, (1 << 64) - 1), 0x1020, "leaves the address space"),
    ],
)
def test_lime_errors_name_the_offset(second, at, message):
    with pytest.raises(FormatError, match=message) as error:
        opened(build.lime((0, PAGE)) + second)
    assert (error.value.source, error.value.offset) == ("dump", at)


def test_lime_cut_off_in_a_range():
    lime = opened(build.lime((0x1000, PAGE), (0x4000, PAGE))[:-16])
    assert "0x10 bytes of memory are absent" in lime.warnings[0]
    with pytest.raises(FaultError, match="0x4ff0 is absent"):
        lime.physical().read(0x4FE0, 32)
    assert len(lime.physical().read(0x4FE0, 16)) == 16


def test_lime_cut_off_in_a_header():
    whole = build.lime((0x1000, PAGE), (0x4000, PAGE))
    lime = opened(whole[: 0x1020 + 31])
    assert "0x1f bytes at offset 0x1020 are no range header" in lime.warnings[0]
    with pytest.raises(FormatError, match="ends inside the first range header"):
        Lime(BytesSource(whole[:31], "dump"))


# ELF


def test_p_paddr_counts_and_the_first_of_overlapping_loads_wins():
    kernel = 0xFFFFFF8000200000
    elf = opened(
        build.elf(
            Segment(b"A" * 0x2000, 0x1000, kernel),
            Segment(b"B" * 0x1000, 0x2000, 0xFFFF000000001000),  # a user's, sign bits set
            Segment(b"C" * 0x1000, 0x3000, kernel + 0x1000),
        )
    )
    assert elf.physical().read(0x1000, 0x3000) == b"A" * 0x2000 + b"C" * 0x1000
    assert list(elf.physical().regions()) == [Region(0x1000, 0x3000)]


@pytest.mark.parametrize("bits", [32, 64])
def test_extended_numbering(bits):
    segments = [Segment(PAGE, n << 12) for n in range(3)]
    plain = opened(build.elf(*segments, bits=bits))
    extended = opened(build.elf(*segments, bits=bits, extended=True))
    assert extended.physical().read(0, 0x3000) == plain.physical().read(0, 0x3000) == PAGE * 3


def test_extended_numbering_without_a_section():
    data = bytearray(build.elf(Segment(PAGE)))
    data[56:58] = b"\xff\xff"
    with pytest.raises(FormatError, match="e_phnum is 0xffff"):
        opened(bytes(data))


def test_i386_in_a_64_bit_core():
    notes = build.prstatus32({"eip": 0x1234}) + build.qemu_note({"rip": 0x1234, "cr3": 0x5000})
    elf = opened(
        build.elf(Segment(notes, p_type=build.PT_NOTE), Segment(PAGE), machine=build.EM_386)
    )
    assert elf.facts.cputype == macho.CPU_TYPE_I386
    assert registers(x86.I386, elf.facts.threads[0])["eip"] == 0x1234


def test_the_registers_of_prstatus_when_there_is_no_other_note():
    wide = {"rip": 0xFFFFFF8000333333, "rsp": 0xFFFFFF8012345678, "r15": 15, "cs": 8, "rflags": 70}
    elf = opened(build.elf(Segment(build.prstatus64(wide), p_type=build.PT_NOTE)))
    found = registers(x86.X86_64, elf.facts.threads[0])
    assert {name: found[name] for name in wide} == wide
    assert elf.facts.control == ()
    narrow = {"eip": 0x333333, "esp": 0x12345678, "ebp": 5, "ss": 16, "eflags": 70}
    elf = opened(build.elf(Segment(build.prstatus32(narrow), p_type=build.PT_NOTE), bits=32))
    found = registers(x86.I386, elf.facts.threads[0])
    assert {name: found[name] for name in narrow} == narrow


def test_the_registers_of_an_aarch64_core():
    notes = build.prstatus_arm64(list(range(100, 131)), 0x5000, 0xFFFFFFF007001234, 0x3C5)
    elf = opened(build.elf(Segment(notes, p_type=build.PT_NOTE), machine=build.EM_AARCH64))
    found = registers(arm64.ARM64, elf.facts.threads[0])
    assert (found["x0"], found["fp"], found["lr"]) == (100, 129, 130)
    assert (found["sp"], found["pc"], found["cpsr"]) == (0x5000, 0xFFFFFFF007001234, 0x3C5)
    assert elf.facts.cputype == macho.CPU_TYPE_ARM64


def test_virtualbox():
    said = {"rip": 0xFFFFFF8000333333, "cr0": 1 << 31, "cr3": 0x5000, "cr4": 0x660, "efer": 0xD01}
    mmio = Segment(b"", 0xE0000000, p_memsz=0x1000000, p_filesz=0)
    elf = opened(
        build.elf(
            Segment(build.vbox_notes(said), p_type=build.PT_NOTE),
            Segment(PAGE, 0),
            mmio,
            machine=build.EM_386,  # a 32-bit build of VirtualBox, whatever ran in it
        )
    )
    control = {name: said[name] for name in ("cr0", "cr3", "cr4", "efer")}
    assert elf.facts.control == ({**control, "cr2": 0},)
    assert registers(x86.X86_64, elf.facts.threads[0])["rip"] == said["rip"]
    assert elf.facts.cputype == formats.UNSAID
    with pytest.raises(FaultError, match="absent"):
        elf.physical().read(0xE0000000, 1)


def test_virtualboxs_first_format_has_registers_that_are_not_read():
    notes = build.vbox_notes({"cr3": 0x5000}, version=0x00010000)
    elf = opened(build.elf(Segment(notes, p_type=build.PT_NOTE)))
    assert elf.facts.control == ()
    assert "VBCORE format 0x10000 are not understood" in elf.warnings[0]


def test_what_is_larger_in_memory_than_in_the_file_is_absent():
    elf = opened(build.elf(Segment(PAGE, 0x1000, p_memsz=0x3000)))
    with pytest.raises(FaultError, match="0x2000 is absent"):
        elf.physical().read(0x1000, 0x1001)


def test_kernel_memory_up_to_the_last_address():
    start = (1 << 64) - 0x1000
    elf = opened(build.elf(Segment(PAGE, (1 << 64) - 1, p_vaddr=start)))
    assert elf.physical() is None
    assert elf.virtual().read(start, 0xFFF) == PAGE[:-1]  # no array holds the number 2^64
    assert [(run.space, run.address) for run in elf.runs()] == [("virtual", start)]


def test_a_big_endian_core():
    elf = opened(build.elf(Segment(PAGE, 0x1000), order=">", machine=build.EM_PPC64))
    assert elf.physical().read(0x1000, 0x1000) == PAGE


def test_an_elf_cut_off_in_a_segment():
    elf = opened(build.elf(Segment(PAGE, 0x1000), Segment(PAGE, 0x2000))[:-1])
    assert "0x1 bytes of memory are absent" in elf.warnings[0]
    with pytest.raises(FaultError, match="0x2fff is absent"):
        elf.physical().read(0x2000, 0x1000)


def test_a_note_that_ends_past_its_segment():
    notes = build.qemu_note({"cr3": 0x5000})
    elf = opened(build.elf(Segment(notes + notes[:-8], p_type=build.PT_NOTE)))
    assert len(elf.facts.control) == 1
    assert "ends past its segment" in elf.warnings[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (build.elf(Segment(PAGE, 1 << 52)), "PT_LOAD 0: 0x10000000000000"),
        (build.elf(Segment(PAGE, (1 << 64) - 0x2000)), "leaves the address space"),
        (build.elf(Segment(PAGE))[:80], "program headers take 0x38 bytes"),
        (build.elf(Segment(PAGE))[:40], "ELF header"),
    ],
)
def test_elf_errors(data, message):
    with pytest.raises(FormatError, match=message):
        opened(data)


def test_an_executable_is_no_core():
    with pytest.raises(UnknownFormatError):
        opened(build.elf(Segment(PAGE), e_type=2))


# raw


def test_raw_is_never_guessed():
    with pytest.raises(UnknownFormatError):
        opened(PAGE)
    assert formats.load(formats.by_name("raw")) is Raw


def test_raw_begins_where_it_is_said_to():
    memory = Raw(BytesSource(PAGE), 0x40000000).physical()
    assert memory.read(0x40000010, 4) == PAGE[0x10:0x14]
    with pytest.raises(FaultError, match="unmapped"):
        memory.read(0x10, 4)


def test_an_empty_file_is_no_raw_image():
    with pytest.raises(FormatError, match="empty"):
        Raw(BytesSource(b""))


# Mac Memory Reader


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("filetype", [0, 2, 4])
def test_mac_memory_reader_is_no_kernel_core(bits, filetype):
    data = build.mac_memory_reader(
        ("available", 0, PAGE), ("LoaderData", 0x8000, PAGE), bits=bits, filetype=filetype
    )
    dump = opened(data)
    assert isinstance(dump, MacMemoryReader)
    assert dump.facts.cputype == formats.UNSAID
    assert runs(dump) == [(0, 0x1000, 0x1000), (0x8000, 0x9000, 0x2000)]
    assert dump.physical().read(0x8000, 0x1000) == PAGE
    with pytest.raises(FaultError, match="unmapped"):
        dump.physical().read(0x1000, 1)


def test_mac_memory_reader_cut_off():
    data = build.mac_memory_reader(("available", 0, PAGE), ("RT_data", 0x8000, PAGE))[:-16]
    dump = opened(data)
    assert "segment 1 (0x8000) ends past the end of the file" in dump.warnings[0]
    with pytest.raises(FaultError, match="0x8ff0 is absent"):
        dump.physical().read(0x8000, 0x1000)


@pytest.mark.parametrize("dump", DUMPS)
def test_a_kernel_core_is_not_taken_for_mac_memory_reader(dump):
    data = struct.pack("<7I", 0xFEEDFACE, 7, 3, 4, 1, 56, 0) + struct.pack("<II16s", 1, 56, b"")
    assert not MacMemoryReader.probe(data)
    kernel = FileSource(real(f"dumps/{dump}/mach_kernel"))
    assert not MacMemoryReader.probe(kernel.read_at(0, 65536))


# damage

WHOLE = (
    build.lime((0x1000, PAGE), (0x4000, PAGE)),
    build.elf(
        Segment(build.qemu_note({"cr3": 0x5000}), p_type=build.PT_NOTE), Segment(PAGE, 0x1000)
    ),
    build.elf(Segment(PAGE), bits=32, extended=True),
    build.elf(Segment(build.vbox_notes({}), p_type=build.PT_NOTE), Segment(PAGE, 0x1000)),
    build.mac_memory_reader(("available", 0, PAGE), ("LoaderData", 0x8000, PAGE)),
)


@given(
    st.sampled_from(range(len(WHOLE))),
    st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=8),
    st.integers(0, 10000),
)
def test_damage_is_an_error_of_ours_or_none(which, changes, size):
    data = bytearray(WHOLE[which])
    for at, value in changes:
        data[at % len(data)] = value
    with contextlib.suppress(KvmError):
        dump = opened(bytes(data[:size]))
        memory = dump.virtual() if isinstance(dump, MachOCore) else dump.physical()
        for region in memory.regions():
            assert len(memory.read(region.start, min(region.size, 64))) == min(region.size, 64)
