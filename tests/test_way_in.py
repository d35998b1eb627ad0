"""The way in: on real memory, on every kind of root, past decoys and dead ends."""

from __future__ import annotations

import os
import random
import struct
import time
from array import array
from typing import TYPE_CHECKING, NamedTuple

import pytest
from builders import tiny_kernel
from builders.pagetable import ARM64, KERNEL, Tables
from builders.tiny_kernel import BANNER, DATA, END, UUID

from kvmtool import way_places, way_scan
from kvmtool.errors import MismatchError, NotFoundError
from kvmtool.formats import UNSAID, Facts
from kvmtool.formats.elf_core import ElfCore
from kvmtool.formats.lime import Lime
from kvmtool.formats.raw import Raw
from kvmtool.macho import CPU_TYPE_ARM64, CPU_TYPE_I386, CPU_TYPE_X86_64, MachO
from kvmtool.memory import RunMemory, read_cstring, read_zero_filled
from kvmtool.source import BytesSource, FileSource
from kvmtool.way_in import Way, find_way, kernel_memory
from kvmtool.way_roots import searched
from tests.inputs import DUMPS, oracle, real, truth
from tests.test_paging import arm_physical

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20
BASE = 0xFFFFFF8000000000
LINK = 0xFFFFFF8000200000
NOTHING = Facts(UNSAID, 0)
ARM_MODE = "arm64 16K T1SZ 17"
ARM_LINK = 0xFFFFFE0007004000


# real memory


@pytest.fixture(scope="module")
def raw_of(tmp_path_factory):
    """mem.raw of a dump: the ranges of its LiME at their addresses, holes as zeros."""
    made: dict[str, str] = {}

    def make(dump: str) -> str:
        if dump not in made:
            lime = Lime(FileSource(real(f"dumps/{dump}/mem.lime")))
            made[dump] = str(tmp_path_factory.mktemp("raw") / "mem.raw")
            with open(made[dump], "wb") as out:
                for run in lime.runs():
                    out.seek(run.address)
                    out.write(lime.source.read_at(run.offset, run.size))
        return made[dump]

    yield make
    for path in made.values():
        os.unlink(path)


def kernel_of(dump: str) -> MachO:
    return MachO(FileSource(real(f"dumps/{dump}/mach_kernel")))


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
@pytest.mark.parametrize("form", ["lime", "elf", "raw"])
@pytest.mark.parametrize("dump", DUMPS)
def test_the_dumps(dump, form, with_kernel, raw_of):
    said = truth(dump)
    if form == "raw":
        container = Raw(FileSource(raw_of(dump)))
        assert container.source.size == said["formats"]["mem.raw"]["file_size"]
    else:
        container = {"lime": Lime, "elf": ElfCore}[form](
            FileSource(real(f"dumps/{dump}/mem.{form}"))
        )
    physical = container.physical()
    kernel = kernel_of(dump) if with_kernel else None
    way = find_way(physical, kernel, container.facts, dump, remember=False)
    assert (way.root, way.mode) == (
        said["memory"]["kernel_page_table_root"],
        said["memory"]["paging"],
    )
    assert way.kernel_address == said["symbols"]["_mh_execute_header"]
    assert way.slide == (said["slide"] if with_kernel else None)  # no symbols in these memories
    assert (way.version, way.uuid.hex().upper()) == (said["banner"], said["uuid"].replace("-", ""))
    memory = kernel_memory(physical, way)
    for address in said["symbols"].values():
        assert len(memory.read(address, 4)) == 4
    version = said["symbols"]["version"]
    assert read_cstring(memory, version, 512).decode() == said["banner"]


def machine(name: str):
    if name == "live":
        return oracle(name), ElfCore(FileSource(real("machine/live.elfcore")))
    return oracle(name), Raw(FileSource(real("machine/kaslr.raw")))


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
@pytest.mark.parametrize("name", ["live", "kaslr"])
def test_the_real_machine(name, with_kernel):
    said, container = machine(name)
    kernel = MachO(FileSource(real("machine/x86_64-xnu-2422.115.4.mach_kernel")))
    physical = container.physical()
    way = find_way(physical, kernel if with_kernel else None, container.facts, name, remember=False)
    assert (way.root, way.mode) == (int(said["cr3"], 16), "4-level")
    assert way.slide == int(said["slide"], 16)
    assert way.kernel_address == int(said["lowglo"]["lgStext"], 16)
    assert way.version == said["strings"]["_version"]
    memory = kernel_memory(physical, way)
    for symbol in said["symbols"].values():
        value = memory.read(int(symbol["addr"], 16), symbol["size"])
        assert int.from_bytes(value, "little") == int(symbol["value"], 16)


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
def test_the_real_arm64_kernel(with_kernel):
    said = oracle("armc")
    kernel = MachO(FileSource(real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")))
    physical, _ = arm_physical()
    way = find_way(physical, kernel if with_kernel else None, NOTHING, "armc", remember=False)
    assert (way.root, way.mode) == (int(said["ttbr1_cpu_ttep"], 16), "arm64 4K T1SZ 26")
    assert (way.slide, way.cputype) == (0, CPU_TYPE_ARM64)
    assert way.kernel_address == int(said["symbols"]["_vm_kernel_stext"]["value"], 16)
    assert way.version == said["symbols"]["_version"]["value"]


def test_a_users_table_is_no_way_in():
    """10.13.6 keeps a second table for each process, which maps next to nothing of the kernel."""
    said = truth("x86_64-10.13.6")
    root = next(p["user_cr3"] for p in said["processes"] if p.get("user_cr3"))
    physical = Lime(FileSource(real("dumps/x86_64-10.13.6/mem.lime"))).physical()
    facts = NOTHING._replace(control=({"cr0": 1 << 31, "cr3": root | 0x123, "cr4": 0x20660},))
    way = find_way(physical, kernel_of("x86_64-10.13.6"), facts, "dump", remember=False)
    assert way.root == said["memory"]["kernel_page_table_root"]
    assert any("maps no kernel (a user's table?)" in text for text in way.rejected)


@pytest.mark.parametrize("dump", DUMPS[1:])
def test_a_process_leads_to_the_kernels_own_table(dump):
    said = truth(dump)
    root = said["processes"][1]["cr3"]
    assert root != said["memory"]["kernel_page_table_root"]
    physical = Lime(FileSource(real(f"dumps/{dump}/mem.lime"))).physical()
    facts = NOTHING._replace(control=({"cr0": 1 << 31, "cr3": root, "cr4": 0x660},))
    way = find_way(physical, kernel_of(dump), facts, dump, remember=False)
    assert way.root == said["memory"]["kernel_page_table_root"]
    assert "CR3" in way.how
    assert "_IdlePML4" in way.how
    alone = find_way(physical, None, facts, dump, remember=False)
    assert (alone.root, alone.kernel_address) == (root, way.kernel_address)


def test_another_kernel_is_a_mismatch():
    physical = Lime(FileSource(real("dumps/x86_64-10.8.5/mem.lime"))).physical()
    other = kernel_of("x86_64-10.13.6")
    with pytest.raises(MismatchError) as error:
        find_way(physical, other, NOTHING, "mem.lime", remember=False)
    for name in ("x86_64-10.8.5", "x86_64-10.13.6"):
        assert truth(name)["uuid"] in str(error.value)
    elf = ElfCore(FileSource(real("dumps/x86_64-10.8.5/mem.elf")))
    with pytest.raises(MismatchError, match=r"Darwin Kernel Version 12\.5\.0"):
        find_way(elf.physical(), other, elf.facts, "mem.elf", remember=False)


# a kernel of a few pages, and what leads to its table


class World(NamedTuple):
    """A memory with one kernel, and what is true of it."""

    tables: Tables
    kernel: tiny_kernel.TinyKernel
    at: int  # the header in physical memory

    @property
    def file(self) -> MachO:
        return MachO(BytesSource(self.kernel.file, "kernel"))

    def find(self, with_kernel: bool = True, facts: Facts = NOTHING, **options) -> Way:
        physical = options.pop("physical", None) or self.tables.physical()
        options.setdefault("remember", False)
        return find_way(physical, self.file if with_kernel else None, facts, "memory", **options)


def world(
    mode: str = "4-level",
    slide: int = 0xA00000,
    *,
    link: int = LINK,
    at: int | None = None,
    table: int | None = None,
    pointers: Mapping[str, int] | None = None,
    size: int = 16 * MIB,
    **options,
) -> World:
    """A kernel, mapped page by page.

    It lies at physical `at`, or at its address less BASE; the table of names and values in
    `pointers` are relative to the root of its page table. `table` puts the root there (an offset
    in the kernel).
    """
    arch = "arm64" if mode.startswith("arm64") else "i386" if mode == "PAE" else "x86_64"
    arch = options.pop("arch", arch)
    tables = Tables(mode, size)
    at = (link + slide) % (1 << 39) if at is None else at
    if table is not None:
        tables.root = at + table
    variables = {name: tables.root + value for name, value in (pointers or {}).items()}
    kernel = tiny_kernel.build(arch, link, slide, variables=variables, **options)
    tables.memory[at : at + len(kernel.image)] = kernel.image
    if table is not None:
        assert not any(kernel.image[table : table + 32])
    for offset in range(0, END, tables.page):
        tables.map(kernel.address + offset, at + offset)
    return World(tables, kernel, at)


def test_a_pointer_to_the_table():
    """10.8 and later."""
    here = world(pointers={"_IdlePML4": BASE})
    way = here.find()
    assert (way.root, way.mode, way.slide) == (here.tables.root, "4-level", 0xA00000)
    assert way.kernel_address == LINK + 0xA00000
    assert (way.uuid, way.version, way.cputype) == (UUID, BANNER, CPU_TYPE_X86_64)
    assert "the pointer _IdlePML4" in way.how


def test_a_pointer_into_the_physical_map():
    here = world(pointers={"_IdlePML4": 0xFFFFFE8000000000})
    assert here.find().root == here.tables.root


def test_the_table_itself():
    """10.6 and 10.7, whose low globals page does not say where the kernel is."""
    spare = DATA + 0x1000
    here = world(slide=0, table=spare, tables={"_IdlePML4": spare}, stext=False)
    way = here.find()
    assert (way.root, way.slide) == (here.at + spare, 0)
    assert "the table _IdlePML4" in way.how


def test_the_table_itself_of_pae():
    """i386 10.6: 32 bytes in the kernel's data, aligned to no more than that."""
    spare = DATA + 0x1020
    here = world("PAE", 0, link=0x200000, table=spare, tables={"_IdlePDPT": spare}, stext=False)
    way = here.find()
    assert (way.root, way.mode, way.slide) == (0x200000 + spare, "PAE", 0)
    assert (way.cputype, way.kernel_address) == (CPU_TYPE_I386, 0x200000)


def test_a_32_bit_kernel_on_long_mode_tables():
    here = world("4-level", 0, link=0x200000, arch="i386", pointers={"_IdlePML4": 0}, stext=False)
    way = here.find()
    assert (way.root, way.mode, way.cputype) == (here.tables.root, "4-level", CPU_TYPE_I386)
    alone = here.find(with_kernel=False)
    assert (alone.root, alone.mode, alone.cputype) == (way.root, "4-level", CPU_TYPE_I386)


def test_a_word_in_the_pmap():
    """Where no symbol of the table is known, the kernel's pmap holds its CR3 somewhere."""
    here = world(pointers={"_kernel_pmap_store": 0})
    way = here.find()
    assert way.root == here.tables.root
    assert "_kernel_pmap_store+0x0" in way.how


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
def test_a_search_for_tables(with_kernel):
    here = world()
    process = Tables("4-level", 0, here.tables.memory)
    process.next, process.root = here.tables.next, here.tables.next - 0x1000
    process.next = process.root
    for slot in (process.slot(process.root, 0, here.kernel.address),):
        process.put(slot, here.tables.get(here.tables.slot(here.tables.root, 0, LINK)))
    process.map(0x7FFF00000000, 0x4000)  # of a user, and lower in memory than the kernel's own
    assert process.root < here.tables.root
    way = here.find(with_kernel)
    assert way.root == here.tables.root
    assert "search for a page table" in way.how
    assert way.slide == (0xA00000 if with_kernel else None)


def test_boot_tables_are_no_way_in():
    """BootPML4 maps the kernel as well, but also what is not there at addresses of its heap."""
    here = world()
    boot = Tables("4-level", 0, here.tables.memory)
    boot.root = here.tables.next - 0x1000
    boot.next = boot.root
    for start in range(0, 16 * MIB, 2 * MIB):
        boot.map(BASE + start, start, size=2 * MIB)
    low, high = boot.slot(boot.root, 0, 0), boot.slot(boot.root, 0, BASE)
    boot.put(low, boot.get(high))
    assert here.find(with_kernel=False).root == here.tables.root


# control registers


def control(**registers: int) -> Facts:
    return NOTHING._replace(control=({"cr0": 1 << 31, **registers},))


@pytest.mark.parametrize("extra", [0, 0x18, 0xFFF, 1 << 63], ids=["", "PCD", "PCID", "no flush"])
def test_cr3_with_and_without_more_in_it(extra):
    here = world()
    way = here.find(facts=control(cr3=here.tables.root | extra, cr4=0x20660))
    assert (way.root, way.slide) == (here.tables.root, 0xA00000)
    assert way.how.startswith("CR3")


def test_five_levels():
    here = world("5-level", at=0x400000)
    facts = control(cr3=here.tables.root, cr4=0x1660)
    way = here.find(facts=facts)
    assert (way.root, way.mode) == (here.tables.root, "5-level")
    assert kernel_memory(here.tables.physical(), way).read(way.kernel_address, 64)


def test_a_kernel_that_is_not_where_its_address_says():
    """Only the page table knows: nothing is assumed of where a kernel lies in memory."""
    here = world(at=0x431000)
    way = here.find(facts=control(cr3=here.tables.root, cr4=0x660))
    assert (way.slide, way.root) == (0xA00000, here.tables.root)
    assert here.find(False, control(cr3=here.tables.root, cr4=0x660)).root == here.tables.root


def test_registers_that_lead_nowhere():
    here = world(pointers={"_IdlePML4": BASE})
    wild = (0, 0x4000, here.at, 1 << 51)
    facts = NOTHING._replace(
        control=({"cr0": 0x11, "cr3": 0, "cr4": 0}, *({"cr3": cr3} for cr3 in wild))
    )
    way = here.find(facts=facts)
    assert way.root == here.tables.root
    assert sum("maps no kernel" in text for text in way.rejected) == len(wild) + 1


@pytest.mark.parametrize("tcr", [{"TCR_EL1": 1 << 30 | 17 << 16}, {}], ids=["TCR", "no TCR"])
def test_ttbr1(tcr):
    here = world(ARM_MODE, 0x1234000, link=ARM_LINK, at=0x438000)
    registers = {"TTBR1_EL1": here.tables.root | 1 << 48 | 1, **tcr}
    way = here.find(
        facts=NOTHING._replace(control=(registers,)), kernel_address=here.kernel.address
    )
    assert (way.root, way.mode) == (here.tables.root, ARM_MODE)


# passes over all memory


def test_a_slide_of_no_round_number():
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE})
    passes: list[tuple[int, int]] = []
    way = here.find(progress=lambda done, total: passes.append((done, total)))
    assert (way.slide, way.root) == (0x123000, here.tables.root)
    assert "kernel header at physical" in way.how
    assert passes == sorted(passes)
    assert {total for _, total in passes} == {16 * MIB}
    assert passes[-1][0] <= 16 * MIB


def test_by_the_low_globals_page():
    """The header is gone, and there is no other trace of the slide than lgStext."""
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE})
    header = (here.at, here.at + 0x4000)
    way = here.find(physical=here.tables.physical(header))
    assert (way.slide, way.root, way.version) == (0x123000, here.tables.root, BANNER)
    assert "low globals page at physical" in way.how


def test_by_the_banner():
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE}, stext=False)
    holes = ((here.at, here.at + 0x4000), (here.at + 0x8000, here.at + 0xC000))
    way = here.find(physical=here.tables.physical(*holes))
    assert (way.slide, way.root) == (0x123000, here.tables.root)
    assert "banner at physical" in way.how


@pytest.mark.parametrize("stext", [True, False], ids=["lgStext", "header"])
def test_arm64_lies_anywhere(stext):
    here = world(
        ARM_MODE, 0x1234000, link=ARM_LINK, at=0x438000, pointers={"_cpu_ttep": 0}, stext=stext
    )
    way = here.find()
    assert (way.root, way.mode, way.slide) == (here.tables.root, ARM_MODE, 0x1234000)
    memory = kernel_memory(here.tables.physical(), way)
    assert memory.read(way.kernel_address, END) == here.kernel.image


@pytest.mark.parametrize("linkedit", [True, False], ids=["symbols in memory", "no symbols"])
def test_arm64_without_the_kernels_file(linkedit):
    here = world(
        *(ARM_MODE, 0x1234000),
        link=ARM_LINK,
        at=0x438000,
        pointers={"_cpu_ttep": 0, "_vm_kernel_slide": 0},
        linkedit=linkedit,
    )
    way = here.find(with_kernel=False)
    assert (way.root, way.mode) == (here.tables.root, ARM_MODE)
    assert (way.kernel_address, way.version) == (here.kernel.address, BANNER)
    assert ("search for a page table" in way.how) != linkedit


def test_decoys_are_passed_over():
    """The kernel's file in a file cache, its banner in a log, low globals pages in both."""
    here = world(slide=0x800000, pointers={"_IdlePML4": BASE})
    for at in (0x200000, 0x400000, 0x600000, 0x60D000):
        here.tables.memory[at : at + len(here.kernel.file)] = here.kernel.file
    log = b"localhost kernel[0]: " + BANNER.encode() + b"\n"
    here.tables.memory[0x100000 : 0x100000 + len(log)] = log
    here.tables.memory[0x101000:0x101008] = b"Catfish "
    for with_kernel in (True, False):
        way = here.find(with_kernel)
        assert (way.root, way.kernel_address) == (here.tables.root, LINK + 0x800000)
        assert any("kernel header at physical 0x200000" in text for text in way.rejected)


def test_an_older_kernel_left_in_memory():
    here = world(slide=0x800000, pointers={"_IdlePML4": BASE})
    before = tiny_kernel.build("x86_64", LINK, 0x200000, uuid=bytes(16), banner=BANNER + "?")
    here.tables.memory[0x400000 : 0x400000 + END] = before.image
    way = here.find()
    assert (way.root, way.slide) == (here.tables.root, 0x800000)
    assert any("another kernel (00000000-" in text for text in way.rejected)


# what the user says


def test_force_takes_another_kernel():
    here = world()
    other = tiny_kernel.build("x86_64", LINK, uuid=bytes(16), banner=BANNER + "?")
    image = MachO(BytesSource(other.file, "other"))
    with pytest.raises(MismatchError, match=r"other .* is not the kernel of memory"):
        find_way(here.tables.physical(), image, NOTHING, "memory", remember=False)
    way = find_way(here.tables.physical(), image, NOTHING, "memory", force=True, remember=False)
    assert (way.root, way.slide) == (here.tables.root, 0xA00000)


def test_the_user_knows_the_slide():
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE})
    way = here.find(kernel_address=LINK + 0x123000)
    assert (way.root, way.slide) == (here.tables.root, 0x123000)
    with pytest.raises(NotFoundError):
        here.find(kernel_address=LINK + 0x124000)


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
def test_no_kernel(with_kernel):
    here = world()
    empty = RunMemory(*_columns(bytes(4 * MIB)), space="physical")
    with pytest.raises(NotFoundError, match="kernel in memory not found") as error:
        here.find(with_kernel, physical=empty)
    assert ("name the kernel's file with -N" in str(error.value)) != with_kernel


def _columns(data: bytes):
    return BytesSource(data), array("Q", [0]), array("Q", [len(data)]), array("Q", [0])


def test_a_kernel_without_a_table():
    here = world()
    here.tables.memory[here.tables.root : here.tables.root + 4096] = bytes(4096)
    with pytest.raises(NotFoundError, match="no page table found that maps it"):
        here.find()


def test_raw_memory_that_begins_elsewhere():
    here = world(ARM_MODE, 0x1234000, link=ARM_LINK, at=0x438000, pointers={"_cpu_ttep": 0})
    raw = Raw(BytesSource(bytes(here.tables.memory), "memory"))
    way = find_way(raw.physical(), here.file, raw.facts, "memory", remember=False)
    assert way.root == here.tables.root
    elsewhere = Raw(BytesSource(bytes(here.tables.memory), "memory"), 0x800000000)
    with pytest.raises(NotFoundError, match="_cpu_ttep"):
        find_way(elsewhere.physical(), here.file, raw.facts, "memory", remember=False)


# raw memory that begins where nobody says


class Elsewhere:
    """Memory from physical address `base` on, for a table's builder to write into."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.data = base, bytearray(size)

    def __len__(self) -> int:
        return self.base + len(self.data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self.data[part.start - self.base : part.stop - self.base])

    def __setitem__(self, part: slice, content: bytes) -> None:
        self.data[part.start - self.base : part.stop - self.base] = content


FAR = 0x8_0000_0000
SLIDE = 0x1234000


def far(
    mode: str = ARM_MODE,
    base: int = FAR,
    *,
    said: bool = False,
    ttep: bool = True,
    **options,
) -> World:
    """An arm64 kernel in memory from `base` on, its tables full of addresses from there on.

    `said`: whether its gPhysBase and gVirtBase say so; `ttep`: whether cpu_ttep names the table.
    """
    memory = Elsewhere(base, 16 * MIB)
    tables = Tables(mode, 0, memory)
    at, link = base + 0x438000, KERNEL[mode] + 0x7004000
    variables = {"_cpu_ttep": tables.root} if ttep else {}
    if said:
        variables |= {"_gVirtBase": link + SLIDE - 0x38000, "_gPhysBase": base + 0x400000}
    kernel = tiny_kernel.build("arm64", link, SLIDE, variables=variables, **options)
    memory[at : at + len(kernel.image)] = kernel.image
    for offset in range(0, END, tables.page):
        tables.map(kernel.address + offset, at + offset)
    return World(tables, kernel, at)


def raw_way(here: World, with_kernel: bool = True, **options) -> Way:
    raw = Raw(BytesSource(bytes(here.tables.memory.data), "memory"))
    assert raw.movable
    options.setdefault("remember", False)
    kernel = here.file if with_kernel else None
    way = find_way(raw.physical(), kernel, raw.facts, "memory", movable=True, **options)
    memory = kernel_memory(raw.move(way.base), way)
    assert memory.read(here.kernel.address, END) == here.kernel.image
    assert memory.translate(here.kernel.address)[0] == here.at
    return way


@pytest.mark.parametrize("base", [FAR, 0x4000, 0x100_0000_0000])
def test_the_kernel_says_where_memory_begins(base):
    here = far(base=base, said=True)
    way = raw_way(here)
    assert (way.base, way.root, way.slide) == (base, here.tables.root, SLIDE)
    assert f"memory from {base:#x} on by gPhysBase, kernel header at physical {here.at:#x}" in (
        way.how
    )


@pytest.mark.parametrize("mode", ARM64)
@pytest.mark.parametrize("ttep", [True, False], ids=["cpu_ttep", "no symbol"])
def test_page_tables_say_where_memory_begins(mode, ttep):
    here = far(mode, ttep=ttep)
    way = raw_way(here)
    assert (way.base, way.root, way.mode) == (FAR, here.tables.root, mode)
    assert ("search for page tables" in way.how) != ttep


@pytest.mark.parametrize("linkedit", [True, False], ids=["symbols in memory", "no symbols"])
@pytest.mark.parametrize("said", [True, False])
def test_where_memory_begins_without_the_kernels_file(linkedit, said):
    here = far(linkedit=linkedit, said=said)
    way = raw_way(here, with_kernel=False)
    assert (way.base, way.root, way.version) == (FAR, here.tables.root, BANNER)


@pytest.mark.parametrize(
    ("mode", "size"), [("arm64 16K T1SZ 17", 32 * MIB), ("arm64 4K T1SZ 25", 2 * MIB)]
)
def test_blocks_say_where_memory_begins(mode, size):
    """A kernel that is mapped by blocks lies in them as in memory: so it does at 0x438000."""
    memory = Elsewhere(FAR, 16 * MIB)
    tables = Tables(mode, 0, memory)
    address = KERNEL[mode] + 64 * MIB + 0x438000
    kernel = tiny_kernel.build("arm64", address, 0)
    at = FAR + 0x438000
    memory[at : at + END] = kernel.image
    for offset in range(0, 16 * MIB, size):
        tables.map(KERNEL[mode] + 64 * MIB + offset, FAR + offset, size=size)
    way = raw_way(World(tables, kernel, at))
    assert (way.base, way.root, way.mode) == (FAR, tables.root, mode)


def test_random_pages_and_copies_do_not_say_where_memory_begins():
    here = far(ttep=False)
    memory = here.tables.memory.data
    memory[8 * MIB : 12 * MIB] = random.Random(5).randbytes(4 * MIB)
    memory[: len(here.kernel.file)] = here.kernel.file
    for table in range(here.tables.next - FAR, 16 * MIB, here.tables.page):  # stale ones
        stale = 2 * MIB + table % MIB
        memory[stale : stale + here.tables.page] = memory[table : table + here.tables.page]
    assert raw_way(here).base == FAR


def test_tables_that_do_not_lead_to_each_other():
    """An entry in the middle is wrong by a page: no place for memory makes a way of them."""
    here = far(ttep=False)
    slot = here.tables.reach(here.kernel.address, 1)
    here.tables.put(slot, here.tables.get(slot) + here.tables.page)
    with pytest.raises(NotFoundError, match="raw@ADDRESS says where") as error:
        raw_way(here)
    assert "no page tables that tell where memory begins" in str(error.value)


def test_what_is_not_raw_stays_where_it_is():
    here = far(said=True)
    raw = Raw(BytesSource(bytes(here.tables.memory.data), "memory"), 0)
    assert not raw.movable
    with pytest.raises(NotFoundError) as error:
        find_way(raw.physical(), here.file, raw.facts, "memory", remember=False)
    assert "raw@ADDRESS" not in str(error.value)
    told = Raw(BytesSource(bytes(here.tables.memory.data), "memory"), FAR)
    way = find_way(told.physical(), here.file, told.facts, "memory", remember=False)
    assert (way.base, way.root) == (0, here.tables.root)


def test_where_memory_begins_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path))
    here = far(ttep=False, uuid=UUID[::-1])  # samples of memory and the UUID are what it goes by
    passes: list[int] = []

    def progress(done: int, total: int) -> None:
        passes.append(done)

    first = raw_way(here, remember=True, progress=progress)
    assert passes
    passes.clear()
    again = raw_way(here, remember=True, progress=progress)
    assert passes == []
    assert again._replace(rejected=()) == first._replace(rejected=())
    physical = Raw(BytesSource(bytes(here.tables.memory.data), "memory"), 0).physical()
    with pytest.raises(NotFoundError):  # the same bytes, of which it is known that they begin at 0
        find_way(physical, here.file, NOTHING, "memory")


@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "alone"])
@pytest.mark.parametrize("variables", [True, False], ids=["gPhysBase", "tables"])
def test_the_real_arm64_kernel_cut_at_its_header(with_kernel, variables, monkeypatch):
    """Its memory below the kernel is gone: the file begins at 0x3004000."""
    said = oracle("armc")
    kernel = MachO(FileSource(real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")))
    physical, _ = arm_physical()
    regions = list(physical.regions())
    start, end = regions[0].start, regions[-1].start + regions[-1].size
    raw = Raw(BytesSource(read_zero_filled(physical, start, end - start), "armc.raw"))
    if not variables:
        monkeypatch.setattr("kvmtool.way_base.of_variables", lambda *_: None)
    way = find_way(
        *(raw.physical(), kernel if with_kernel else None, NOTHING, "armc.raw"),
        remember=False,
        movable=True,
    )
    assert start == 0x3004000
    assert (way.base, way.root) == (start, int(said["ttbr1_cpu_ttep"], 16))
    memory = kernel_memory(raw.move(way.base), way)
    for symbol in said["symbols"].values():
        assert memory.translate(int(symbol["addr"], 16))[0] == int(symbol["pa"], 16)


# what is remembered


def test_a_pass_is_made_once():
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE})
    passes: list[int] = []

    def progress(done: int, total: int) -> None:
        passes.append(done)

    first = here.find(remember=True, progress=progress)
    assert passes
    passes.clear()
    again = here.find(remember=True, progress=progress)
    assert passes == []
    assert again._replace(rejected=()) == first._replace(rejected=())


def test_what_is_remembered_is_verified():
    here = world(slide=0x123000, pointers={"_IdlePML4": BASE}, size=24 * MIB)
    first = here.find(remember=True)
    # the table moves, where no sample is taken: the same key, another truth
    old = here.tables.root
    new = here.tables.next - 0x1000
    here.tables.memory[new : new + 0x1000] = here.tables.memory[old : old + 0x1000]
    here.tables.memory[old : old + 0x1000] = bytes(0x1000)
    at = here.at + DATA + 0x200
    here.tables.memory[at : at + 8] = (BASE + new).to_bytes(8, "little")
    second = here.find(remember=True)
    assert (first.root, second.root) == (old, new)


# speed and damage


def test_a_pass_runs_at_a_gigabyte_a_second():
    physical = Raw(FileSource(real("machine/kaslr.raw"))).physical()
    size = sum(region.size for region in physical.regions())
    heads = frozenset(way_scan.word(m.head) for m in way_places.MACHINES)

    def heads_only() -> None:
        assert list(way_scan.page_heads(physical, heads, None))

    def tables() -> None:
        at = way_places.Place(way_places.X86_64, LINK + 0xA00000, 0xC00000, "", 0)
        assert list(searched(physical, at, None))

    for scan in (heads_only, tables):
        scan()  # the file comes into the page cache
        begin = time.process_time()
        scan()
        rate = size / (time.process_time() - begin)
        print(f"{scan.__name__}: {rate / 1e9:.1f} GB/s")
        assert rate >= 1e9


def test_every_whole_page_is_seen_once():
    regions = [(0x1800, 3 * MIB + 0x2800), (3 * MIB + 0x4000, 3 * MIB + 0x4FFF), (8 * MIB, 9 * MIB)]
    data = b"".join(n.to_bytes(8, "little") * 512 for n in range(9 * MIB >> 12))
    starts, ends = (array("Q", column) for column in zip(*regions, strict=True))
    physical = RunMemory(BytesSource(data), starts, ends, array("Q", starts), space="physical")
    done: list[tuple[int, int]] = []
    seen = [
        (at + index * 4096, word)
        for at, words in way_scan.chunks(physical, lambda *args: done.append(args))
        for index, word in enumerate(words[::512])
    ]
    pages = [*range(2, (3 * MIB >> 12) + 2), *range(8 * MIB >> 12, 9 * MIB >> 12)]
    assert seen == [(page << 12, page) for page in pages]
    assert done == sorted(done)
    assert done[-1][0] == done[-1][1] == sum(end - start for start, end in regions)


@pytest.mark.parametrize("ahead", [b"", bytes(0x20)])
def test_the_holes_of_64_gigabytes_are_not_read(tmp_path, ahead):
    """A page lies across two blocks of the file where a header stands ahead of it."""
    slide = 0x123000
    here = world(slide=slide, pointers={"_IdlePML4": BASE}, at=0x423000)
    path = tmp_path / "memory"
    with open(path, "wb") as out:
        if ahead:
            out.write(struct.pack("<IIQQQ", 0x4C694D45, 1, 0, (64 << 30) - 1, 0))
        for at in range(0, len(here.tables.memory), 4096):
            page = bytes(here.tables.memory[at : at + 4096])
            out.seek(len(ahead) + at)
            if any(page):
                out.write(page)
        out.truncate(len(ahead) + (64 << 30))
    if os.stat(path).st_blocks * 512 > 1 << 30:
        pytest.skip("this file system keeps no holes")
    physical = (Lime if ahead else Raw)(FileSource(str(path))).physical()
    begin = time.process_time()
    seen = {at for at, words in way_scan.chunks(physical, None)}
    assert time.process_time() - begin < 1
    assert len(seen) < 1000
    assert here.find(physical=physical).root == here.tables.root


@pytest.mark.parametrize("seed", range(6))
def test_garbage_ends_soon(seed):
    import random

    here = world(slide=0x123000, pointers={"_IdlePML4": BASE}, size=12 * MIB)
    rand = random.Random(seed)
    for _ in range(64):
        at = rand.randrange(0, 12 * MIB - 4096, 4096)
        here.tables.memory[at : at + 4096] = rand.randbytes(4096)
    here.tables.memory[0x400000:0x500000] = b"\xff" * MIB if seed % 2 else b"\x01" * MIB
    begin = time.process_time()
    for with_kernel in (True, False):
        try:
            way = here.find(with_kernel)
        except (NotFoundError, MismatchError):
            continue
        assert (way.root, way.slide) in ((here.tables.root, 0x123000), (here.tables.root, None))
    assert time.process_time() - begin < 10


class Holed(RunMemory):
    """Memory that tells which part of it is stored."""

    def stored(self, start, end):
        yield start, end


@pytest.mark.parametrize("link", [None, 0x3000])
@pytest.mark.parametrize("machine", way_places.MACHINES, ids=lambda machine: hex(machine.cputype))
def test_a_header_where_its_file_says_or_where_it_may_slide(machine, link):
    """Of memory with holes, too, and for a machine whose kernels slide by no known step."""
    at = 0x3000 if link is not None else machine.first + machine.step
    data = machine.head.ljust(0x100, b"\0")
    columns = [array("Q", [value]) for value in (at, at + len(data), 0)]
    found = [at] if link is not None or machine.slides else []
    for kind in (RunMemory, Holed):
        memory = kind(BytesSource(data, "x"), *columns)
        assert list(way_places.addresses(memory, machine, link)) == found
