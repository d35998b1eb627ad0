"""Address spaces: runs against a naive model, real cores against a reader of a few lines."""

from __future__ import annotations

import bisect
import itertools
import struct
import time
import tracemalloc
from array import array
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmtool.errors import FaultError, FormatError, TruncatedError
from kvmtool.formats.macho_core import MachOCore
from kvmtool.image import LoadedImage, image_memory
from kvmtool.macho import MachO
from kvmtool.memory import (
    ZERO_FILL,
    Region,
    RunMemory,
    read_cstring,
    read_partial,
    read_zero_filled,
)
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import macho as build

TOP = 1 << 64
FILE = bytes(range(256))  # every byte says at which offset it lies


class Run(NamedTuple):
    """Addresses [start, start + size) lie at file offset `offset`."""

    start: int
    size: int
    offset: int


def memory_of(runs, *, lost=(), source=None):
    columns = [array("Q", column) for column in zip(*runs, strict=True)] if runs else []
    starts, sizes, offsets = columns or (array("Q"), array("Q"), array("Q"))
    ends = array("Q", [start + size for start, size in zip(starts, sizes, strict=True)])
    return RunMemory(source or BytesSource(FILE, "file"), starts, ends, offsets, lost=lost)


# the naive model: a dictionary of single bytes, the first run that has an address keeps it


def model_of(runs):
    cells = {}
    for run in runs:
        for at in range(run.size):
            byte = 0 if run.offset == ZERO_FILL else FILE[run.offset + at]
            cells.setdefault(run.start + at, byte)
    return cells


def model_read(cells, address, size):
    """(bytes, None), or (None, first address that is not there)."""
    wanted = range(address, address + size)
    bad = next((at for at in wanted if at not in cells), None)
    return (bytes(cells[at] for at in wanted), None) if bad is None else (None, bad)


def assert_like_the_model(memory, cells, address, size):
    data, bad = model_read(cells, address, size)
    if bad is None:
        assert memory.read(address, size) == data
    else:
        with pytest.raises(FaultError) as caught:
            memory.read(address, size)
        fault = caught.value
        assert (fault.space, fault.address, fault.size) == ("kernel", bad, size)
    pieces = list(memory.read_pieces(address, size))
    at = address
    for piece in pieces:
        assert piece.address == at
        assert piece.size > 0
        at += piece.size
        here = [cells.get(a) for a in range(piece.address, piece.address + piece.size)]
        if piece.data is None:
            assert here == [None] * piece.size
            assert piece.reason
        else:
            assert list(piece.data) == here
            assert piece.reason == ""
    assert at == address + size
    assert not any(a.data is b.data is None for a, b in itertools.pairwise(pieces))
    end = address + size if bad is None else bad
    assert read_partial(memory, address, size) == model_read(cells, address, end - address)[0]
    filled = bytes(cells.get(a, 0) for a in range(address, address + size))
    assert read_zero_filled(memory, address, size) == filled


def model_regions(cells):
    regions = []
    for at in sorted(cells):
        if regions and sum(regions[-1]) == at:
            regions[-1] = Region(regions[-1].start, regions[-1].size + 1)
        else:
            regions.append(Region(at, 1))
    return regions


BASES = st.sampled_from([0, 0x1000, 0x7FFFFFFFFFFFFFF0, TOP - 70])
RUNS = st.builds(
    Run,
    st.integers(0, 60),
    st.integers(0, 30),
    st.one_of(st.integers(0, 200), st.just(ZERO_FILL)),
)


@settings(max_examples=300)
@given(BASES, st.lists(RUNS, max_size=8), st.integers(0, 69), st.integers(0, 40))
@example(0, [], 0, 5)
@example(TOP - 70, [Run(40, 29, 0)], 68, 1)
@example(0, [Run(0, 10, 0), Run(0, 10, 50)], 0, 10)  # the same range twice
@example(0, [Run(5, 10, 0), Run(0, 20, 50)], 0, 20)  # one inside another that comes later
@example(0, [Run(0, 20, 50), Run(5, 10, 0)], 0, 20)  # and that came before
@example(0, [Run(0, 10, 0), Run(10, 10, 10)], 5, 10)  # adjacent, in one piece of the file
@example(0, [Run(10, 10, 0), Run(0, 10, 100)], 5, 10)  # adjacent, the wrong way round
@example(0, [Run(0, 0, 0), Run(0, 5, 7), Run(5, 0, 9)], 0, 5)  # nothing at either end
@example(0, [Run(3, 5, ZERO_FILL), Run(0, 20, 0)], 0, 20)
def test_runs_against_the_model(base, runs, address, size):
    runs = [run._replace(start=base + run.start) for run in runs]
    runs = [run for run in runs if run.start + run.size < TOP]
    memory, cells = memory_of(runs), model_of(runs)
    size = min(size, TOP - base - address)
    assert_like_the_model(memory, cells, base + address, size)
    assert list(memory.regions()) == model_regions(cells)


def test_runs_keep_nothing_that_is_shadowed():
    memory = memory_of([Run(0, 100, 0), *(Run(n, 1, 200) for n in range(100))])
    assert memory.read(0, 100) == FILE[:100]
    assert len(memory) == 1


# the edges, one by one

MIDDLE = [Run(0x1000, 0x40, 0), Run(0x1080, 0x40, 0x40)]  # a hole of 0x40 between


@pytest.mark.parametrize(
    ("address", "size", "bad"),
    [
        (0x0FFF, 2, 0x0FFF),  # the first byte
        (0x0, 1, 0x0),
        (0x1000, 0x41, 0x1040),  # the last
        (0x103F, 0x42, 0x1040),  # the middle
        (0x1040, 1, 0x1040),
        (0x107F, 2, 0x107F),
        (0x10C0, 1, 0x10C0),  # behind all
        (0x1080, 0x1000, 0x10C0),
        (TOP - 1, 1, TOP - 1),
    ],
)
def test_one_bad_byte_refuses_the_whole_read(address, size, bad):
    with pytest.raises(FaultError) as caught:
        memory_of(MIDDLE).read(address, size)
    assert (caught.value.address, caught.value.reason) == (bad, "unmapped")
    assert f"kernel address {bad:#x} is unmapped (reading {size:#x} bytes)" == str(caught.value)


@pytest.mark.parametrize("address", [0, 0x1000, 0x1040, 0x10C0, TOP - 1])
def test_nothing_can_be_read_anywhere(address):
    memory = memory_of(MIDDLE)
    assert memory.read(address, 0) == b""
    assert list(memory.read_pieces(address, 0)) == []
    assert read_partial(memory, address, 0) == read_zero_filled(memory, address, 0) == b""


def test_pieces_alternate():
    pieces = list(memory_of(MIDDLE, lost=[(0x1060, 0x1080)]).read_pieces(0xFF0, 0xE0))
    assert [(p.address, p.size, p.data and len(p.data)) for p in pieces] == [
        (0xFF0, 0x10, None),
        (0x1000, 0x40, 0x40),
        (0x1040, 0x40, None),
        (0x1080, 0x40, 0x40),
        (0x10C0, 0x10, None),
    ]


def test_what_the_file_promised_is_absent_what_nobody_promised_unmapped():
    memory = memory_of(MIDDLE, lost=[(0x2000, 0x2010), (0x1060, 0x1080), (0x10C0, 0x1100)])
    reasons = {}
    for address in (0xFFF, 0x1040, 0x105F, 0x1060, 0x107F, 0x10C0, 0x10FF, 0x1100, 0x2000, 0x2010):
        with pytest.raises(FaultError) as caught:
            memory.read(address, 1)
        reasons[address] = caught.value.reason
        assert next(iter(memory.read_pieces(address, 1))).reason == caught.value.reason
    absent = {0x1060, 0x107F, 0x10C0, 0x10FF, 0x2000}
    assert reasons == {at: "absent" if at in absent else "unmapped" for at in reasons}


def test_addresses_do_not_wrap_round():
    # an array of 64-bit numbers cannot say 2^64: the last byte of all is never in a run
    runs = [Run(0, 16, 0), Run(TOP - 0x11, 0x10, 32)]
    memory = memory_of(runs)
    assert memory.read(TOP - 0x11, 0x10) == FILE[32:48]
    with pytest.raises(FaultError) as caught:
        memory.read(TOP - 0x11, 0x12)
    assert caught.value.address == TOP - 1
    with pytest.raises(FaultError):
        memory.read(TOP - 4, 8)  # would be 4 bytes there and 4 bytes at address 0
    assert len(read_partial(memory, TOP - 0x11, 0x100)) == 0x10


@pytest.mark.parametrize("runs", [[], MIDDLE, [Run(TOP - 0x11, 0x10, 0)]])
@pytest.mark.parametrize("address", [TOP - 8, TOP, TOP + 8, TOP << 8])
def test_a_sum_past_the_last_address_is_a_fault(runs, address):
    # a member of a structure that a wild pointer leads to
    memory = memory_of(runs)
    with pytest.raises(FaultError):
        memory.read(address, 64)
    assert memory.read(address, 0) == b""
    assert read_partial(memory, address + 8, 64) == b""
    assert [piece.data for piece in memory.read_pieces(address + 8, 64)] == [None]


@pytest.mark.parametrize("size", [TOP, 1 << 70])
def test_an_absurd_size_is_a_fault_and_costs_nothing(size):
    tracemalloc.start()
    with pytest.raises(FaultError) as caught:
        memory_of(MIDDLE).read(0x1000, size)
    assert read_partial(memory_of(MIDDLE), 0x1000, size) == FILE[:0x40]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert caught.value.address == 0x1040


# strings


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_strings_end_at_their_nul(chunk):
    source = BytesSource(b"x" * 100 + b"\0" + b"y" * 27, "file")
    memory = memory_of([Run(0x1000, 128, 0)], source=source)
    assert read_cstring(memory, 0x1000, 512, chunk) == b"x" * 100
    assert read_cstring(memory, 0x1000, 5, chunk) == b"xxxxx"
    assert read_cstring(memory, 0x1064, 512, chunk) == b""
    assert read_cstring(memory, 0x1000, 0, chunk) == b""
    with pytest.raises(FaultError) as caught:
        read_cstring(memory, 0x1065, 512, chunk)
    assert caught.value.address == 0x1080


@pytest.mark.parametrize("at", range(4096 - 70, 4096))
def test_a_string_that_ends_in_its_page_needs_no_other(at):
    source = BytesSource(b"s" * 4095 + b"\0", "file")
    memory = memory_of([Run(0x10000, 4096, 0)], source=source)  # the next page is not there
    assert read_cstring(memory, 0x10000 + at, 512) == b"s" * (4095 - at)


# search


@given(
    st.lists(st.integers(0, 2), min_size=30, max_size=60).map(bytes),
    st.lists(st.integers(0, 2), min_size=1, max_size=3).map(bytes),
    st.integers(1, 4),
    st.lists(st.integers(0, 29), min_size=2, max_size=2, unique=True).map(sorted),
)
def test_find_is_a_search_in_every_run(data, needle, step, cut):
    runs = [Run(100, cut[0], 0), Run(200, cut[1] - cut[0], cut[0]), Run(150, 5, ZERO_FILL)]
    memory = memory_of(runs, source=BytesSource(data, "file"))
    expected = [
        run.start + at
        for run in runs[:2]
        for at in range(run.size - len(needle) + 1)
        if data[run.offset + at : run.offset + at + len(needle)] == needle
        and (run.start + at) % step == 0
    ]
    assert list(memory.find(needle, step)) == expected


def test_holes_of_the_file_are_passed_over_and_nothing_else_is(tmp_path):
    size = 16 << 20
    with open(tmp_path / "memory", "wb") as out:
        for at in (5 << 20, (9 << 20) + 4094, size - 6):
            out.seek(at)
            out.write(b"needle")
        out.truncate(size)
    source = FileSource(str(tmp_path / "memory"))
    memory = memory_of([Run(0x1000, size, 0)], source=source)
    plain = memory_of([Run(0x1000, size, 0)], source=BytesSource(source.read_at(0, size), "file"))
    for needle in (b"needle", b"e", b"\0n", b"e\0\0", b"\0needle\0"):
        assert list(memory.find(needle, 2)) == list(plain.find(needle, 2)), needle
    parts = list(memory.stored(0x1000, 0x1000 + size))
    for at in plain.find(b"needle"):
        assert any(first <= at and at + 6 <= last for first, last in parts)
    source.close()


# very many runs


def test_a_million_runs_are_arrays():
    count = 1_000_000
    starts = array("Q", range(0, count * 16, 16))
    ends = array("Q", range(8, count * 16 + 8, 16))
    offsets = array("Q", bytes(8 * count))
    started = time.process_time()
    memory = RunMemory(BytesSource(FILE), starts, ends, offsets)
    assert time.process_time() - started < 0.5
    assert memory.read(16 * 777_777, 8) == FILE[:8]
    with pytest.raises(FaultError):
        memory.read(16 * 777_777, 9)


def test_many_runs_in_disorder():
    count = 100_000
    runs = [Run(16 * ((n * 7919) % count), 8, n % 200) for n in range(count)]
    started = time.process_time()
    memory = memory_of(runs)
    assert time.process_time() - started < 2
    for run in runs[:: count // 100]:
        assert memory.read(run.start, 8) == FILE[run.offset : run.offset + 8]


# the real cores, by a reader that shares nothing with ours


class PlainCore:
    """The segments of an MH_CORE, byte by byte what its load commands say."""

    def __init__(self, path):
        with open(path, "rb") as core:
            self.data = core.read()
        magic, ncmds = struct.unpack_from("<I12xI", self.data)
        wide = magic == 0xFEEDFACF
        at = 32 if wide else 28
        self.ranges = []
        for _ in range(ncmds):
            cmd, cmdsize = struct.unpack_from("<II", self.data, at)
            if cmd in (0x1, 0x19):
                code = "<24xQ8xQQ" if wide else "<24xI4xII"
                vmaddr, fileoff, filesize = struct.unpack_from(code, self.data, at)
                if filesize:
                    self.ranges.append((vmaddr, vmaddr + filesize, fileoff))
            at += cmdsize
        self.ranges.sort()
        self._starts = [start for start, _, _ in self.ranges]

    def byte(self, address):
        at = bisect.bisect_right(self._starts, address) - 1
        start, end, fileoff = self.ranges[at] if at >= 0 else (0, 0, 0)
        return self.data[fileoff + address - start] if start <= address < end else None


CORES = [*inputs.DUMPS, "crash"]


@pytest.fixture(scope="module", params=CORES)
def core(request):
    crash = request.param == "crash"
    path = inputs.real("machine/crash.kdp-core") if crash else inputs.plain_core(request.param)
    source = FileSource(path)
    yield MachOCore(source).virtual(), PlainCore(path)
    source.close()


def test_every_mapped_range_is_what_the_file_holds(core):
    memory, plain = core
    for start, end, fileoff in plain.ranges:
        expected = plain.data[fileoff : fileoff + end - start]
        assert memory.read(start, end - start) == expected
        middle = start + (end - start) // 2
        assert memory.read(middle, end - middle) == expected[middle - start :]
    assert sum(region.size for region in memory.regions()) == sum(
        end - start for start, end, _ in plain.ranges
    )


def test_adjacent_ranges_are_read_as_one(core):
    memory, plain = core
    touching = [(a, b) for a, b in itertools.pairwise(plain.ranges) if a[1] == b[0]]
    for (_, seam, _), _ in touching[:50]:
        expected = bytes(plain.byte(at) for at in range(seam - 100, seam + 100))
        assert memory.read(seam - 100, 200) == expected


def test_a_read_across_a_hole_is_refused_whole(core):
    memory, plain = core
    holes = [(a[1], b[0]) for a, b in itertools.pairwise(plain.ranges) if a[1] < b[0]]
    assert holes
    for start, end in holes:
        across = end - start + 32
        with pytest.raises(FaultError) as caught:
            memory.read(start - 16, across)
        fault = caught.value
        assert (fault.address, fault.size, fault.reason) == (start, across, "unmapped")
        before = bytes(plain.byte(at) for at in range(start - 16, start))
        assert read_partial(memory, start - 16, across) == before
        with pytest.raises(FaultError) as caught:
            memory.read(end - 1, 2)
        assert caught.value.address == end - 1
        if across < 1 << 20:
            after = bytes(plain.byte(at) for at in range(end, end + 16))
            zeros = bytes(end - start)
            assert read_zero_filled(memory, start - 16, across) == before + zeros + after


def test_nothing_lies_before_the_first_range_or_behind_the_last(core):
    memory, plain = core
    first, last = plain.ranges[0][0], plain.ranges[-1][1]
    for address, bad in ((first - 1, first - 1), (last - 1, last)):
        with pytest.raises(FaultError) as caught:
            memory.read(address, 2)
        assert caught.value.address == bad


# a file's image at its link addresses, and an image in memory as its file


def linked():
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.segment("__PAGEZERO", 0, vmsize=0x1000)
    text = b"\0" * 0x800 + b"text" * 0x200  # the file's head overwrites the zeros
    file.segment("__TEXT", 0x100000, text, fileoff=0, prot=5)
    file.segment("__DATA", 0x102000, b"data" * 0x400, vmsize=0x3000, prot=3)
    file.symtab([build.Sym("_a", 0x100800)], linkedit=0x105000, dysymtab=False)
    return file


def test_an_image_lies_at_its_link_addresses():
    memory = image_memory(MachO(BytesSource(linked().build(), "kernel")))
    assert memory.read(0x100800, 8) == b"texttext"
    assert memory.read(0x102000, 0x3000) == b"data" * 0x400 + bytes(0x2000)  # its bss is zero
    assert memory.read(0x100000, 4) == b"\xcf\xfa\xed\xfe"
    for nowhere in (0, 0x101000):  # __PAGEZERO says what must fault
        with pytest.raises(FaultError):
            memory.read(nowhere, 1)


def test_a_segment_longer_in_the_file_than_in_memory_is_cut():
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.segment("__TEXT", 0x100000, b"t" * 0x2000, vmsize=0x1000)
    memory = image_memory(MachO(BytesSource(file.build(), "kernel")))
    with pytest.raises(FaultError) as caught:
        memory.read(0x100FFF, 2)
    assert caught.value.address == 0x101000


@pytest.mark.parametrize(
    ("vmaddr", "vmsize", "fileoff", "error", "match"),
    [
        (0x1000, 0x1000, 0x7FFFFFFF, TruncatedError, "segment __X: expected 0x1000 bytes"),
        (0x1000, 0x1000, TOP - 8, TruncatedError, "segment __X"),
        (TOP - 8, 0x1000, 0x1000, FormatError, "leaves the address space"),
        (0, TOP - 1, TOP - 1, TruncatedError, "segment __X"),
    ],
)
def test_an_image_with_impossible_segments(vmaddr, vmsize, fileoff, error, match):
    file = build.MachO("x86_64", build.MH_EXECUTE)
    file.segment("__T", 0x900000, b"t" * 0x4000)
    file.segment("__X", vmaddr, vmsize=vmsize, filesize=0x1000, fileoff=fileoff)
    with pytest.raises(error, match=match):
        image_memory(MachO(BytesSource(file.build(), "kernel")))


def loaded(slide, *, without=None):
    """The memory of `linked()` as a booter leaves it, `slide` bytes higher."""
    file = linked()
    raw = bytearray(file.build())
    raw[: file.head_size()] = file.head(slide)
    image = MachO(BytesSource(bytes(raw), "kernel"))
    runs = [
        Run(s.vmaddr, s.filesize, s.fileoff)
        for s in image.segments
        if s.filesize and s.segname != without
    ]
    return memory_of(runs, source=image.source)


@pytest.mark.parametrize("slide", [0, 0x200000])
def test_an_image_in_memory_reads_as_its_file(slide):
    image = MachO(LoadedImage(loaded(slide), 0x100000 + slide, "dump"))
    assert image.segment("__DATA").vmaddr == 0x102000 + slide
    assert [(entry.name, entry.n_value) for entry in image.symtab] == [("_a", 0x100800)]
    assert [entry.place for entry in image.symtab.find("_a")] == [0]
    assert image.source.read_at(image.segment("__DATA").fileoff, 4) == b"data"


def test_pages_of_an_image_that_are_not_in_memory_are_cut_off():
    image = MachO(LoadedImage(loaded(0, without="__LINKEDIT"), 0x100000, "dump"))
    assert image.segment("__LINKEDIT") is not None
    with pytest.raises(TruncatedError, match="dump at 0x100000") as caught:
        list(image.symtab)
    assert caught.value.got == 0


@pytest.mark.parametrize("address", [0x100004, 0x102000, 0x50])
def test_where_there_is_no_header_there_is_no_image(address):
    with pytest.raises((FormatError, FaultError)):
        LoadedImage(loaded(0), address, "dump")


def test_a_header_in_memory_that_lies_is_bounded():
    head = bytearray(build.MachO("x86_64", build.MH_EXECUTE).build())
    struct.pack_into("<II", head, 16, 0x1000000, 0x7FFFFFFF)
    memory = memory_of([Run(0x100000, len(head), 0)], source=BytesSource(bytes(head), "file"))
    tracemalloc.start()
    with pytest.raises(FormatError):
        LoadedImage(memory, 0x100000, "dump")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
