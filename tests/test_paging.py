"""Page tables: every mode against tables built by the manuals, and against real ones."""

from __future__ import annotations

import random
import time
from array import array

import pytest
from builders.pagetable import KERNEL, MODES, X86, Rights, Tables
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtool.arch import arm64_pages, x86_pages
from kvmtool.arch.arm64_pages import Arm64
from kvmtool.errors import FaultError, FormatError, UnsupportedError
from kvmtool.formats.corefile import Corefile
from kvmtool.formats.elf_core import ElfCore
from kvmtool.formats.lime import Lime
from kvmtool.formats.macho_core import MachOCore
from kvmtool.formats.raw import Raw
from kvmtool.memory import Region, RunMemory, read_partial
from kvmtool.paging import PagedMemory
from kvmtool.source import FileSource
from kvmtool.way_roots import walker
from tests.inputs import DUMPS, oracle, plain_core, real, truth

MIB = 1 << 20


def paged(tables: Tables, *holes: tuple[int, int], **options) -> PagedMemory:
    physical = tables.physical(*holes)
    return PagedMemory(physical, walker(physical, tables.mode, tables.root), **options)


def fill(tables: Tables, physical: int, size: int, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(size)
    tables.memory[physical : physical + size] = data
    return data


def fault(memory: PagedMemory, address: int, size: int = 1) -> FaultError:
    with pytest.raises(FaultError) as error:
        memory.read(address, size)
    with pytest.raises(FaultError) as checked:
        memory.check(address, size)
    assert (error.value.address, error.value.reason) == (
        checked.value.address,
        checked.value.reason,
    )
    return error.value


@pytest.fixture(params=[64 * MIB, 0], ids=["cached", "live"])
def budget(request):
    return request.param


# one page and several


@pytest.mark.parametrize("mode", MODES)
def test_pages_that_lie_apart_are_read_as_one(mode, budget):
    tables = Tables(mode, MIB)
    base, page = KERNEL[mode] + tables.page if KERNEL[mode] else 3 << 22, tables.page
    first, second = fill(tables, 4 * page, page, 1), fill(tables, 2 * page, page, 2)
    tables.map(base, 4 * page)
    tables.map(base + page, 2 * page)
    memory = paged(tables, budget=budget)
    assert memory.read(base, 2 * page) == first + second
    assert memory.read(base + page - 3, 7) == (first + second)[page - 3 : page + 4]
    assert memory.translate(base + 5) == (4 * page + 5, page - 5)
    memory.check(base, 2 * page)
    wrong = fault(memory, base + page, page + 1)
    assert (wrong.address, wrong.reason, wrong.space) == (base + 2 * page, "unmapped", "kernel")
    assert read_partial(memory, base, 4 * page) == first + second
    assert list(memory.regions()) == [Region(base, 2 * page)]
    assert len(memory) == 1


@pytest.mark.parametrize("mode", MODES)
def test_every_step_of_a_walk(mode):
    tables = Tables(mode, MIB)
    address = KERNEL[mode] + (3 << 21) + 5 * tables.page
    tables.map(address, 4 * tables.page)
    walk = paged(tables).walker.walk(address + 17)
    assert (walk.physical, walk.size, walk.reason) == (4 * tables.page + 17, tables.page - 17, "")
    assert walk.permissions == "rwx-"
    table = tables.root
    for depth, step in enumerate(walk.steps):
        shift, bits = tables.levels[depth]
        assert (step.table, step.slot) == (table, address >> shift & (1 << bits) - 1)
        assert step.entry == tables.get(tables.slot(table, depth, address))
        table = step.entry & 0xFFFFFFFFF000
    assert len(walk.steps) == len(tables.levels)
    assert table == 4 * tables.page
    below = paged(tables).walker.walk(address + tables.page)
    assert (below.physical, below.reason, below.steps[-1].entry) == (None, "unmapped", 0)


def test_the_names_of_steps_and_flags():
    tables = Tables("4-level", MIB)
    tables.map(KERNEL["4-level"], 0x4000, Rights(write=False, execute=False, user=True))
    steps = paged(tables).walker.walk(KERNEL["4-level"]).steps
    assert [step.level for step in steps] == ["PML4", "PDPT", "PD", "PT"]
    assert [step.flags for step in steps] == ["P RW US"] * 3 + ["P US NX"]
    tables = Tables("arm64 16K T1SZ 17", MIB)
    tables.map(KERNEL[tables.mode], 0x4000, Rights(write=False, execute=False))
    steps = paged(tables).walker.walk(KERNEL[tables.mode]).steps
    assert [step.level for step in steps] == ["L1", "L2", "L3"]
    assert [step.flags for step in steps] == ["V TABLE"] * 2 + ["V RO AF PXN"]


LARGE = [
    ("2-level", 4 * MIB),
    ("PAE", 2 * MIB),
    ("4-level", 2 * MIB),
    ("4-level", 1 << 30),
    ("5-level", 1 << 30),
    ("arm64 4K T1SZ 25", 2 * MIB),
    ("arm64 4K T1SZ 26", 1 << 30),
    ("arm64 16K T1SZ 17", 32 * MIB),
]


@pytest.mark.parametrize(("mode", "size"), LARGE)
def test_large_pages(mode, size, budget):
    end = 3 * MIB // 2
    tables = Tables(mode, end)
    data = fill(tables, 0, MIB)
    base = KERNEL[mode] + size
    tables.map(base, 0, size=size)
    memory = paged(tables, budget=budget)
    assert memory.read(base, MIB) == data
    assert memory.translate(base + 12345) == (12345, size - 12345)
    assert memory.walker.walk(base).size == size
    # what the page maps beyond the end of memory is absent, and so says its listing
    wrong = fault(memory, base + end - 1, 2)
    assert (wrong.address, wrong.reason) == (base + end, "absent")
    mapped, absent = memory.mappings()
    assert (mapped.start, mapped.size, mapped.physical) == (base, end, 0)
    assert (absent.start, absent.size, absent.reason) == (base + end, size - end, "absent")


def test_pse_36():
    tables = Tables("2-level", MIB)
    tables.put(tables.reach(0xC0000000, 0), 0x00400000 | 5 << 13 | 0x83)
    assert paged(tables).translate(0xC0000123) == (0x500400123, (4 * MIB) - 0x123)


# what entries allow


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("rights", "text"),
    [
        (Rights(True, True, True), "rwxu"),
        (Rights(False, False, False), "r---"),
        (Rights(False, True, False), "r-x-"),
    ],
)
def test_permissions(mode, rights, text):
    tables = Tables(mode, MIB)
    address = KERNEL[mode] + (5 << 21)
    tables.map(address, 4 * tables.page, rights)
    if mode == "2-level":
        text = text.replace("---", "-x-")  # nothing there forbids execution
    assert paged(tables).walker.walk(address).permissions == text
    assert [m.permissions for m in paged(tables).mappings()] == [text]


@pytest.mark.parametrize(
    ("mode", "taken", "text"),
    [
        ("4-level", 1 << 63, "rw-u"),
        ("PAE", 1 << 63, "rw-u"),
        ("4-level", -2, "r-xu"),
        ("4-level", -4, "rwx-"),
        ("arm64 16K T1SZ 17", 1 << 59, "rw-u"),
        ("arm64 16K T1SZ 17", 1 << 61, "rwx-"),
        ("arm64 4K T1SZ 25", 1 << 62, "r-xu"),
    ],
)
def test_a_table_takes_rights_from_all_below(mode, taken, text):
    """`taken` is a bit to set in the entry above the last, or minus one to clear."""
    tables = Tables(mode, MIB)
    address = KERNEL[mode] + (5 << 21)
    tables.map(address, 4 * tables.page, Rights(user=True))
    at = tables.reach(address, len(tables.levels) - 2)
    entry = tables.get(at)
    tables.put(at, entry | taken if taken > 0 else entry & ~-taken)
    assert paged(tables).walker.walk(address).permissions == text


def test_mappings_break_where_rights_change():
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    for number in range(6):
        tables.map(base + number * 4096, 0x4000 + number * 4096, Rights(write=number < 4))
    found = [(m.start - base, m.size, m.physical, m.permissions) for m in paged(tables).mappings()]
    assert found == [(0, 0x4000, 0x4000, "rwx-"), (0x4000, 0x2000, 0x8000, "r-x-")]
    assert list(paged(tables).regions()) == [Region(base, 0x6000)]


# what cannot be translated


@pytest.mark.parametrize(
    ("mode", "address", "gap"),
    [
        ("4-level", 0x0000800000000000, 0xFFFF800000000000),
        ("4-level", 0xFFFF7FFFFFFFFFFF, 0xFFFF800000000000),
        ("5-level", 0x0100000000000000, 0xFF00000000000000),
        ("PAE", 1 << 32, 2 << 64),
        ("2-level", 1 << 32, 2 << 64),
        ("arm64 16K T1SZ 17", 0x7FFFFFFFFFFF, 0xFFFF800000000000),
        ("arm64 4K T1SZ 26", 0xFFFFFFBFFFFFFFFF, 0xFFFFFFC000000000),
    ],
)
def test_addresses_that_are_not_canonical(mode, address, gap, budget):
    memory = paged(Tables(mode, MIB), budget=budget)
    assert fault(memory, address, 8).reason == "non-canonical"
    assert memory.walker.walk(address).steps == ()
    size = gap - address
    (piece,) = memory.read_pieces(address, size)  # at once, however wide
    assert (piece.size, piece.data, piece.reason) == (size, None, "non-canonical")


@pytest.mark.parametrize(
    ("mode", "depth", "entry"),
    [
        ("4-level", 0, 0x4083),  # no level so high can map a page
        ("5-level", 1, 0x4083),
        ("4-level", 1, 0x201083),  # bits below a page of 1 GiB
        ("4-level", 2, 0x5083),
        ("PAE", 0, 0x4003),  # RW is reserved in a PDPTE
        ("PAE", 0, 0x4001 | 1 << 63),
        ("2-level", 0, 0x400083 | 1 << 21),
        ("arm64 16K T1SZ 17", 0, 0x4401),  # 64 GiB
        ("arm64 4K T1SZ 16", 0, 0x4401),
        ("arm64 4K T1SZ 25", 2, 0x4401),  # a page's entry has both bits
    ],
)
def test_reserved_bits(mode, depth, entry, budget):
    tables = Tables(mode, MIB)
    address = KERNEL[mode] + (1 << 30)
    tables.put(tables.reach(address, depth), entry)
    memory = paged(tables, budget=budget)
    assert fault(memory, address, 8).reason == "malformed"
    assert memory.walker.walk(address).reason == "malformed"


@pytest.mark.parametrize(
    ("mode", "entry"),
    [
        ("4-level", 1 << 62 | 0x1234000),
        ("4-level", 1 << 62 | 1 << 61 | 0x5678000),
        ("PAE", 1 << 62 | 0x1234000),
        ("arm64 16K T1SZ 17", 1 << 63 | 0x1234),
        ("arm64 4K T1SZ 26", 1 << 63 | 1 << 62),
    ],
)
def test_compressed_pages(mode, entry, budget):
    tables = Tables(mode, MIB)
    address, page = KERNEL[mode] + (5 << 21), tables.page
    tables.map(address, 4 * page)
    for number in (1, 2):
        tables.put(tables.reach(address + number * page, len(tables.levels) - 1), entry)
    memory = paged(tables, budget=budget)
    wrong = fault(memory, address, 2 * page)
    assert (wrong.address, wrong.reason) == (address + page, "compressed")
    walk = memory.walker.walk(address + page)
    assert (walk.reason, walk.steps[-1].flags) == ("compressed", "COMPRESSED")
    readable, compressed = memory.mappings()
    assert (compressed.start, compressed.size) == (address + page, 2 * page)
    assert (compressed.physical, compressed.reason) == (None, "compressed")
    assert list(memory.regions()) == [Region(readable.start, page)]


@pytest.mark.parametrize("mode", MODES)
def test_tables_that_are_not_in_the_dump(mode, budget):
    tables = Tables(mode, MIB)
    address = KERNEL[mode] + (5 << 21)
    tables.map(address, 4 * tables.page)
    for step in paged(tables).walker.walk(address).steps:
        memory = paged(tables, (step.table, step.table + tables.page), budget=budget)
        assert fault(memory, address, 8).reason == "absent"
        walk = memory.walker.walk(address)
        assert (walk.reason, walk.steps[-1].table, walk.steps[-1].entry) == (
            *("absent", step.table),
            None,
        )
        assert list(memory.regions()) == []


def test_a_page_that_is_not_in_the_dump(budget):
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    for number in range(4):
        tables.map(base + number * 4096, 0x4000 + number * 4096)
    memory = paged(tables, (0x5000, 0x6000), budget=budget)
    memory.read(base, 16)  # what is known of a window must not make a page readable
    wrong = fault(memory, base + 0xFF8, 16)
    assert (wrong.address, wrong.reason, wrong.space) == (base + 0x1000, "absent", "kernel")
    assert fault(memory, base + 0x1010, 4).address == base + 0x1010
    pieces = [(p.address - base, p.size, p.reason) for p in memory.read_pieces(base, 0x5000)]
    assert pieces == [
        (0, 0x1000, ""),
        (0x1000, 0x1000, "absent"),
        (0x2000, 0x2000, ""),
        (0x4000, 0x1000, "unmapped"),
    ]
    assert list(memory.regions()) == [Region(base, 0x1000), Region(base + 0x2000, 0x2000)]


# tables that lead in circles


@pytest.mark.parametrize("mode", ["4-level", "5-level", "arm64 16K T1SZ 17"])
def test_a_table_of_nothing_but_itself(mode):
    tables = Tables(mode, MIB)
    for slot in range(1 << tables.levels[0][1]):
        tables.put(tables.root + slot * 8, tables.to_table(0, tables.root))
    memory = paged(tables)
    address = KERNEL[mode]
    assert memory.translate(address)[0] == tables.root
    assert len(memory.walker.walk(address).steps) == len(tables.levels)
    start = time.process_time()
    with pytest.raises(FormatError, match="lead in circles"):
        len(memory)
    assert time.process_time() - start < 5


def test_a_recursive_slot_maps_the_tables():
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    tables.map(base, 0x4000)
    tables.put(tables.root + 500 * 8, tables.to_table(0, tables.root))
    memory = paged(tables)
    itself = 0xFFFF << 48 | 500 << 39 | 500 << 30 | 500 << 21 | 500 << 12
    assert memory.read(itself, 4096) == bytes(tables.memory[tables.root : tables.root + 4096])
    assert Region(base, 0x1000) in list(memory.regions())


# roots and registers


def test_what_is_taken_off_cr3():
    physical = Tables("4-level", MIB).physical()
    assert walker(physical, "4-level", 0x8000000012345FFF).root == 0x12345000
    assert walker(physical, "PAE", 0x1234567F).root == 0x12345660
    assert walker(physical, "2-level", 0x12345018).root == 0x12345000
    assert walker(physical, "arm64 16K T1SZ 17", 0x1234000012344001).root == 0x12344000
    with pytest.raises(UnsupportedError):
        walker(physical, "arm64 64K T1SZ 17", 0)


@pytest.mark.parametrize(
    ("registers", "modes"),
    [
        ({"cr0": 0x60000011, "cr4": 0}, ()),
        ({"cr0": 0x80000011, "cr4": 0x10}, ("2-level",)),
        ({"cr0": 0x80000011, "cr4": 0x660}, ("4-level", "PAE")),
        ({"cr0": 0x80000011, "cr4": 0x660, "efer": 0xD01}, ("4-level",)),
        ({"cr0": 0x80000011, "cr4": 0x660, "efer": 0x900}, ("PAE",)),
        ({"cr0": 0x80000011, "cr4": 0x1660, "efer": 0xD01}, ("5-level",)),
    ],
)
def test_modes_by_control_registers(registers, modes):
    assert x86_pages.modes_of(registers) == modes


def test_sizes_by_tcr():
    # TG1 2 and 1 are 4K and 16K
    assert arm64_pages.kernel_size(2 << 30 | 26 << 16) == (12, 26)
    assert arm64_pages.kernel_size(1 << 30 | 17 << 16) == (14, 17)
    with pytest.raises(UnsupportedError, match="TG1"):
        arm64_pages.kernel_size(3 << 30)


# laws


@st.composite
def layouts(draw):
    """A mode and its pages: address page number -> physical page number, compressed or hole."""
    mode = draw(st.sampled_from(sorted(MODES)))
    pages = draw(st.dictionaries(st.integers(0, 40), st.integers(0, 15), max_size=30))
    marks = draw(st.sets(st.integers(0, 40), max_size=4)) if mode not in ("2-level",) else set()
    hole = draw(st.integers(0, 15))
    return mode, pages, marks - set(pages), hole


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 50), st.integers(-70, 70), st.integers(0, 8), st.booleans())
def test_reads_are_those_of_a_naive_model(layout, page, beside, pages, live):
    mode, mapped, marks, hole = layout
    tables = Tables(mode, 2 * MIB)
    size, base = tables.page, KERNEL[mode] + (5 << 21) - 20 * tables.page
    data = fill(tables, 0, 16 * size)
    for at, to in mapped.items():
        tables.map(base + at * size, to * size)
    compressed = 1 << (62 if mode in X86 else 63)
    for at in marks:
        tables.put(tables.reach(base + at * size, len(tables.levels) - 1), compressed)
    memory = paged(tables, (hole * size, (hole + 1) * size), budget=0 if live else MIB)

    def byte(address):
        number, inside = divmod(address - base, size)
        if number in marks:
            return "compressed"
        if number not in mapped:
            return "unmapped"
        at = mapped[number] * size + inside
        return "absent" if mapped[number] == hole else data[at : at + 1]

    start, length = base + page * size + beside, pages * (size // 2)
    pieces = list(memory.read_pieces(start, length))
    edges = sorted({start, start + length, *range(start - start % size, start + length, size)})
    points = [edge for edge in edges if start <= edge < start + length]
    expected = [byte(point) for point in points]
    for point, value in zip(points, expected, strict=True):
        piece = next(p for p in pieces if p.address <= point < p.address + p.size)
        inside = point - piece.address
        assert (piece.reason or piece.data[inside : inside + 1]) == value
    assert sum(piece.size for piece in pieces) == length
    wrong = [(p, v) for p, v in zip(points, expected, strict=True) if isinstance(v, str)]
    if wrong:
        error = fault(memory, start, length)
        assert (error.address, error.reason) == wrong[0]
    else:
        assert memory.read(start, length) == b"".join(piece.data for piece in pieces)
    readable = sorted(at for at, to in mapped.items() if to != hole)
    found = [page for r in memory.regions() for page in range(r.start, r.start + r.size, size)]
    assert found == [base + at * size for at in readable]


@pytest.mark.parametrize("mode", ["4-level", "PAE", "arm64 16K T1SZ 25"])
def test_find_sees_across_pages_that_lie_apart(mode, budget):
    tables = Tables(mode, MIB)
    base, page = KERNEL[mode] + (5 << 21), tables.page
    for number, to in enumerate((7, 3, 5)):
        tables.map(base + number * page, to * page)
    tables.map(base + 4 * page, 6 * page)
    needle = b"Darwin Kernel Version "
    tables.memory[8 * page - 5 : 8 * page] = needle[:5]
    tables.memory[3 * page : 3 * page + len(needle) - 5] = needle[5:]
    tables.memory[5 * page + 64 : 5 * page + 64 + len(needle)] = needle
    memory = paged(tables, budget=budget)
    assert list(memory.find(needle)) == [base + page - 5, base + 2 * page + 64]
    assert list(memory.find(needle, 64)) == [base + 2 * page + 64]
    assert list(memory.find(b"D", 1)) == [base + page - 5, base + 2 * page + 64]


def test_find_over_more_than_one_piece():
    tables = Tables("4-level", 8 * MIB)
    base = KERNEL["4-level"]
    for number in range(2):
        tables.map(base + number * 2 * MIB, number * 2 * MIB, size=2 * MIB)
    for at in (MIB - 3, 2 * MIB - 1, 3 * MIB, 4 * MIB - 8):
        tables.memory[at : at + 8] = b"needle!!"
    found = [address - base for address in paged(tables).find(b"needle!!")]
    assert found == [MIB - 3, 2 * MIB - 1, 3 * MIB, 4 * MIB - 8]


# what is kept


class Counting:
    """Physical memory that counts its reads, and can be written to."""

    space = "physical"

    def __init__(self, data: bytearray) -> None:
        self.data, self.reads = data, 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        return bytes(self.data[address : address + size])

    def regions(self):
        yield Region(0, len(self.data))


def in_a_file(memory: bytes, runs: list[tuple[int, int]], path) -> RunMemory:
    """Physical memory of these (start, end) in a mapped file that holds the last of them first."""
    starts, ends, offsets, at = array("Q"), array("Q"), array("Q"), 0
    with open(path, "wb") as out:
        for start, end in reversed(runs):
            out.write(memory[start:end])
            starts.append(start)
            ends.append(end)
            offsets.append(at)
            at += end - start
    return RunMemory(FileSource(str(path)), starts, ends, offsets, space="physical")


def outcome(memory: PagedMemory, address: int, size: int) -> bytes | tuple[int, str]:
    try:
        return memory.read(address, size)
    except FaultError as error:
        return error.address, error.reason


@pytest.mark.parametrize("mode", ["PAE", "4-level", "arm64 16K T1SZ 17"])
def test_long_reads_of_a_mapped_file_are_those_of_single_pages(mode, tmp_path):
    """In extents that lie in one run of the file, in two, or where the file has nothing."""
    tables = Tables(mode, 8 * MIB)
    base, page, rand = KERNEL[mode], tables.page, random.Random(mode)
    fill(tables, 0, 6 * MIB)
    at, end = base, base + 6 * MIB
    while at < end:
        count = min(rand.randint(1, 40), (end - at) // page)
        physical = rand.randrange(0, 6 * MIB // page - count) * page
        for number in range(count if rand.random() < 0.97 else 0):
            tables.map(at + number * page, physical + number * page)
        at += count * page
    runs = [(0, 2 * MIB), (2 * MIB, 5 * MIB), (5 * MIB + 2 * page, 8 * MIB)]
    physical = in_a_file(tables.memory, runs, tmp_path / "memory")
    fast = PagedMemory(physical, walker(physical, mode, tables.root))
    plain = paged(tables, (5 * MIB, 5 * MIB + 2 * page), budget=0)
    whole = 0
    for _ in range(150):
        address = base + rand.randrange(6 * MIB)
        size = rand.randrange(1 << rand.randint(1, 20))
        expected = outcome(plain, address, size)
        assert outcome(fast, address, size) == expected
        whole += isinstance(expected, bytes) and size > 32 << 10
    assert whole > 10
    assert fast._places
    assert None in [place for places in fast._places.values() for place in places]
    physical.source.close()  # no slice of it was kept


def test_translations_are_kept_within_a_budget():
    tables = Tables("4-level", 2 * MIB)
    base = KERNEL["4-level"]
    for number in range(64):
        tables.map(base + number * 2 * MIB, 0x4000)
    physical = Counting(tables.memory)
    memory = PagedMemory(physical, walker(physical, "4-level", tables.root), budget=4000)
    for number in range(64):
        memory.read(base + number * 2 * MIB, 8)
    physical.reads = 0
    memory.read(base + 63 * 2 * MIB, 8)
    assert physical.reads == 1
    memory.read(base, 8)  # forgotten to make room
    assert physical.reads == 1 + 5
    assert sum(400 + 164 * len(w.deltas) for w in memory._windows.values()) <= 4000


def test_places_in_the_file_go_with_their_translations(tmp_path):
    tables = Tables("4-level", 4 * MIB)
    base = KERNEL["4-level"]
    for number in range(16):
        for inside in range(0, 64 << 10, 4096):
            tables.map(base + number * 2 * MIB + inside, number << 16 | inside)
    physical = in_a_file(tables.memory, [(0, 4 * MIB)], tmp_path / "memory")
    memory = PagedMemory(physical, walker(physical, "4-level", tables.root), budget=3000)
    for number in range(16):
        memory.read(base + number * 2 * MIB, 64 << 10)
        assert memory.read(base + number * 2 * MIB, 60 << 10)  # one extent: nothing is sliced
    for number in range(16):
        memory._slices(physical, base + number * 2 * MIB, base + number * 2 * MIB + 8)
    assert 0 < len(memory._places) == len(memory._windows) <= 4
    memory.forget()
    assert not memory._places
    physical.source.close()


def test_a_live_memory_is_translated_anew():
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    tables.map(base, 0x4000)
    tables.memory[0x4000], tables.memory[0x5000] = 4, 5
    physical = Counting(tables.memory)
    live = PagedMemory(physical, walker(physical, "4-level", tables.root), budget=0)
    kept = PagedMemory(physical, walker(physical, "4-level", tables.root))
    assert (live.read(base, 1), kept.read(base, 1)) == (b"\4", b"\4")
    tables.map(base, 0x5000)
    assert (live.read(base, 1), kept.read(base, 1)) == (b"\5", b"\4")


def test_a_machine_that_ran_is_translated_anew():
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    tables.map(base, 0x4000)
    tables.memory[0x4000], tables.memory[0x5000] = 4, 5
    physical = Counting(tables.memory)
    watchers: list[PagedMemory] = []
    physical.watch = watchers.append
    memory = PagedMemory(physical, walker(physical, "4-level", tables.root))
    assert watchers == [memory]
    assert memory.read(base, 1) == b"\4"
    tables.map(base, 0x5000)
    assert memory.read(base, 1) == b"\4"
    memory.forget()
    assert memory.read(base, 1) == b"\5"


def test_a_fault_keeps_no_view_of_the_file(tmp_path):
    tables = Tables("4-level", MIB)
    base = KERNEL["4-level"]
    tables.map(base, 0x4000)
    tables.map(base + 4096, 4 * MIB)
    path = tmp_path / "memory"
    path.write_bytes(tables.memory)
    physical = Raw(FileSource(str(path))).physical()
    memory = PagedMemory(physical, walker(physical, "4-level", tables.root))
    with pytest.raises(FaultError, match="absent") as error:
        memory.read(base, 8192)
    physical.source.close()
    assert error.value.address == base + 4096


# real tables


@pytest.mark.parametrize("dump", DUMPS)
def test_the_memory_of_the_mach_o_core(dump):
    said = truth(dump)
    physical = Lime(FileSource(real(f"dumps/{dump}/mem.lime"))).physical()
    tables = walker(physical, said["memory"]["paging"], said["memory"]["kernel_page_table_root"])
    memory = PagedMemory(physical, tables)
    core = FileSource(plain_core(dump))
    for part in said["formats"]["core.macho"]["table"]:
        assert memory.read(part["vmaddr"], part["size"]) == core.read_at(
            part["fileoff"], part["size"]
        )


def test_i386_has_two_roots_for_the_kernel():
    said = truth("i386-10.5.8")["memory"]
    physical = Lime(FileSource(real("dumps/i386-10.5.8/mem.lime"))).physical()
    pae = PagedMemory(physical, walker(physical, "PAE", said["pdpt"]))
    long_mode = PagedMemory(physical, walker(physical, "4-level", said["pml4"]))
    low = [r for r in long_mode.regions() if r.start < 1 << 32]
    assert low == list(pae.regions())


def machine(name: str) -> tuple[dict, RunMemory]:
    if name == "live":
        return oracle(name), ElfCore(FileSource(real("machine/live.elfcore"))).physical()
    return oracle(name), Raw(FileSource(real("machine/kaslr.raw"))).physical()


@pytest.mark.parametrize("name", ["live", "kaslr"])
def test_the_real_machine(name):
    said, physical = machine(name)
    memory = PagedMemory(physical, walker(physical, "4-level", int(said["cr3"], 16)))
    for address, pa in said["page_table_samples"].values():
        assert memory.translate(int(address, 16))[0] == int(pa, 16)


@pytest.mark.parametrize("name", ["live", "kaslr"])
def test_the_symbols_of_the_real_machine(name):
    said, physical = machine(name)
    memory = PagedMemory(physical, walker(physical, "4-level", int(said["cr3"], 16)))
    for symbol in said["symbols"].values():
        address = int(symbol["addr"], 16)
        assert memory.translate(address)[0] == int(symbol["pa"], 16)
        value = int.from_bytes(memory.read(address, symbol["size"]), "little")
        assert value == int(symbol["value"], 16)


def arm_physical() -> tuple[RunMemory, RunMemory]:
    """(physical memory, kernel memory) of the arm64 core.

    Two parts of the core are at known physical addresses: the static kernel (virtBase, physBase),
    and what lies around the page tables (cpu_tte is the address of what cpu_ttep is).
    """
    said = oracle("armc")
    symbols = said["symbols"]
    static = int(said["virtBase"], 16) - int(said["physBase"], 16)
    around = int(symbols["_cpu_tte"]["value"], 16) - int(symbols["_cpu_ttep"]["value"], 16)
    starts, ends, offsets = array("Q"), array("Q"), array("Q")
    outer = Corefile(FileSource(real("machine/armc.corefile")))
    core = MachOCore(outer.open_member(outer.kernel_member()))
    for run in core.runs():
        for delta, first in ((static, static + 0x3004000), (around, around + 0x3ED0000)):
            if first <= run.address < delta + int(said["memSize"], 16):
                starts.append(run.address - delta)
                ends.append(run.address - delta + run.size)
                offsets.append(run.offset)
                break
    return RunMemory(core.source, starts, ends, offsets, space="physical"), core.virtual()


def test_the_real_arm64_kernel():
    said = oracle("armc")
    physical, core = arm_physical()
    tables = Arm64(physical, int(said["ttbr1_cpu_ttep"], 16), 12, 26)
    memory = PagedMemory(physical, tables)
    for symbol in said["symbols"].values():
        assert memory.translate(int(symbol["addr"], 16))[0] == int(symbol["pa"], 16)
    # the kernel, the low globals page at its fixed address, the tables themselves
    compared = 0
    for region in core.regions():
        for piece in memory.read_pieces(region.start, region.size):
            if piece.data is not None:
                assert piece.data == core.read(piece.address, piece.size)
                compared += piece.size
    assert compared > 15 * MIB
    assert memory.read(0xFFFFFFF000002000, 8) == b"Kraken  "


# speed


def read_rates(size: int = 64 * MIB, chunk: int = MIB) -> tuple[float, float, float]:
    """Bytes a second of CPU: a copy of the mapped file, and reads through 4K pages of it.

    Physically contiguous runs are 16 pages long on average; first with nothing known of the
    tables, then again.
    """
    import tempfile

    tables = Tables("4-level", size + 2 * MIB)
    rand, base = random.Random(1), KERNEL["4-level"]
    starts = sorted({0, *(rand.randrange(size >> 12) for _ in range(size >> 16))})
    runs = list(zip(starts, [*starts[1:], size >> 12], strict=True))
    rand.shuffle(runs)
    pages = (page for start, end in runs for page in range(start, end))
    for number, page in enumerate(pages):
        tables.map(base + (number << 12), page << 12)
    with tempfile.NamedTemporaryFile() as file:
        file.write(tables.memory)
        file.flush()
        source = FileSource(file.name)
        physical = Raw(source).physical()
        tables_walker = walker(physical, "4-level", tables.root)
        memory = fresh = PagedMemory(physical, tables_walker)

        def rate(read) -> float:
            best = float("inf")
            for _ in range(5):
                begin = time.process_time()
                for at in range(0, size, chunk):
                    read(at)
                best = min(best, time.process_time() - begin)
            return size / best

        def cold(at: int) -> None:
            nonlocal fresh
            if at == 0:
                fresh = PagedMemory(physical, tables_walker)
            fresh.read(base + at, chunk)

        rates = (
            rate(lambda at: source.read_at(at, chunk)),
            rate(cold),
            rate(lambda at: memory.read(base + at, chunk)),
        )
        source.close()
        return rates


def test_reads_run_at_a_fair_part_of_a_copy():
    copy, cold, warm = read_rates()
    print(f"copy {copy / 1e9:.1f} GB/s, first read {cold / copy:.2f}, further {warm / copy:.2f}")
    assert warm >= 0.4 * copy
