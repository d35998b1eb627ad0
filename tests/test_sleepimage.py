"""Hibernation images of every era XNU wrote them in, what is refused, and damage.

No real image was there: all are made by `builders.sleepimage` after the writer's source, the real
dumps' memory in them. What the pages' compression is held against is in `test_wkdm`.
"""

from __future__ import annotations

import os
import random
import struct
import time

import pytest
from builders import sleepimage as build
from builders import wkdm
from builders.sleepimage import ERAS, PAGE, Span
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmtool
from kvmtool import formats, macho
from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmError,
    TruncatedError,
    UnknownFormatError,
    UnsupportedError,
)
from kvmtool.formats import sleepimage, sleepimage_pages
from kvmtool.formats.lime import Lime
from kvmtool.formats.sleepimage import SleepImage
from kvmtool.source import BytesSource, FileSource
from tests.inputs import DUMPS, real
from tests.test_wkdm import drawn

SIGNATURE_AT, PAGES = 88, 40


def memory(*numbers: int) -> dict[int, bytes]:
    """Pages of every kind by number, no two alike but the zeros."""
    kinds = ["same", "alike", "mixed", "small", "sparse"]
    out = {}
    for number in numbers or (*range(3, 3 + PAGES), 0x100, 0x101, 0x200):
        match number % 8:
            case 0:
                out[number] = bytes(PAGE)
            case 1:
                out[number] = struct.pack("<I", number) * (PAGE // 4)
            case 2:
                out[number] = random.Random(number).randbytes(PAGE)
            case kind:
                out[number] = drawn(kinds[kind - 3], number)
    return out


MEMORY = memory()
WHOLE = build.image(MEMORY, code=Span(0x100, 2), preview=(Span(5, 2), Span(9, 1)))


def opened(data: bytes) -> SleepImage:
    source = BytesSource(data, "dump")
    found = formats.load(formats.identify(source))(source)
    assert isinstance(found, SleepImage)
    return found


def regions(image: SleepImage) -> list[tuple[int, int]]:
    return [(r.start // PAGE, r.size // PAGE) for r in image.physical().regions()]


def held(image: SleepImage) -> dict[int, bytes]:
    physical = image.physical()
    return {
        number: physical.read(number * PAGE, PAGE)
        for first, count in regions(image)
        for number in range(first, first + count)
    }


def changed(data: bytes, at: int, layout: str, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(layout, out, at, *values)
    return bytes(out)


# every era


@pytest.mark.parametrize("extents", [1, 2, 7])
@pytest.mark.parametrize("era", ERAS)
def test_every_page_is_what_it_was(era, extents):
    code, preview = Span(0x100, 2), (Span(5, 2), Span(9, 1))
    image = opened(build.image(MEMORY, ERAS[era], code=code, preview=preview, extents=extents))
    assert image.warnings == []
    assert image.physical().space == "physical"
    assert image.virtual() is None
    assert held(image) == MEMORY
    assert image.physical().read(4 * PAGE - 3, 7) == MEMORY[3][-3:] + MEMORY[4][:4]
    assert image.physical().read(4 * PAGE, 0) == b""


@pytest.mark.parametrize("era", ERAS)
def test_what_is_not_in_the_image_is_absent(era):
    physical = opened(build.image(MEMORY, ERAS[era])).physical()
    for number in (0, 2, 3 + PAGES, 0xFF, 0x102, 0x201):
        with pytest.raises(FaultError, match=f"physical address {number * PAGE:#x} is unmapped"):
            physical.read(number * PAGE, 1)
    with pytest.raises(FaultError):
        physical.read((2 + PAGES) * PAGE, 2 * PAGE)


@pytest.mark.parametrize("wired", [lambda _: True, lambda _: False])
@pytest.mark.parametrize("era", ERAS)
def test_an_image_of_one_part(era, wired):
    assert held(opened(build.image(MEMORY, ERAS[era], wired=wired))) == MEMORY


def test_the_page_written_last_counts():
    data = bytearray(build.image({7: bytes(PAGE), 8: drawn("same", 1)}, wired=lambda _: True))
    at = data.index(struct.pack("<3I", 7, 2, build.TAG | 4))
    assert data.count(struct.pack("<3I", 7, 2, build.TAG | 4)) == 2
    data[at + 12 : at + 16] = b"\1\2\3\4"
    assert opened(bytes(data)).physical().read(7 * PAGE, PAGE) == bytes(PAGE)


def test_a_kernel_before_10_9_has_no_block_size_where_it_stands_later():
    data = build.image(MEMORY, ERAS["10.7"], block_size=4096)  # half of deviceBase looks like one
    assert held(opened(data)) == MEMORY


def test_10_4_gives_the_virtual_page_of_its_code():
    data = build.image(MEMORY, ERAS["10.5"], code=Span(0x100, 2), code_page=0xC0100)
    assert held(opened(data)) == MEMORY


def test_a_list_of_extents_that_fills_more_than_a_block():
    assert held(opened(build.image(MEMORY, ERAS["10.9"], extents=400))) == MEMORY


def test_a_preview_cut_to_its_size():
    data = build.image(MEMORY, preview=(Span(5, 2),))
    short = opened(changed(data, build_at(data, struct.pack("<2I", 5, 2)), "<2I", 5, 3))
    assert held(short) == MEMORY


def build_at(data: bytes, needle: bytes) -> int:
    at = data.index(needle, 512)
    assert at > 0
    return at


# what the header says


def test_facts_of_the_header():
    told = {"slide": 0x1C600000, "code_address": 0xFFFFFF801C700000}
    facts = opened(build.image(MEMORY, **told)).facts
    assert (facts.slide, facts.cputype) == (0x1C600000, macho.CPU_TYPE_X86_64)
    assert facts.said == {
        "cputype": "restore1CodeVirt 0xffffff801c700000",
        "slide": "kernVirtSlide",
    }
    facts = opened(build.image(MEMORY, code_address=0x100000)).facts
    assert (facts.slide, facts.cputype) == (None, macho.CPU_TYPE_I386)
    facts = opened(build.image(MEMORY, ERAS["10.5"])).facts
    assert (facts.slide, facts.cputype, facts.said) == (None, formats.UNSAID, {})


def refused(data: bytes) -> str:
    with pytest.raises(UnsupportedError) as caught:
        opened(data)
    return str(caught.value)


def test_an_encrypted_image():
    said = {"page_count": 0x8000, "encrypt_start": 0x2000, "slide": 0x1C600000, "slept": 1382400000}
    data = build.header(image_size=0x100000, image1_size=0x80000, **said)
    assert refused(data) == (
        "dump: is a hibernation image (whole, 0x100000 bytes, 0x8000 pages, asleep since "
        "2013-10-22T00:00:00Z, encrypted from offset 0x2000, kernel slide 0x1c600000), whose pages "
        "cannot be read without the key, which the machine kept to itself"
    )
    old = build.header(True, image_size=0x100000, image1_size=0x80000, encrypt_start=0x5000)
    assert "encrypted from offset 0x5000), whose pages cannot be read" in refused(old)


@pytest.mark.parametrize("first_form", [True, False])
@pytest.mark.parametrize(
    ("signature", "said"),
    [(0x7A7A7A7A, "void"), (0xF1E0BE9D, "not finished"), (0xFCDDFCDD, "of debug data")],
)
def test_images_in_other_states(first_form, signature, said):
    data = build.header(first_form, signature=signature, image_size=0x9000, image1_size=0x1000)
    assert f"({said}" in refused(data)
    assert "not to be relied on" in refused(build.header(first_form, signature=signature))


def test_the_slide_of_a_used_image_is_told():
    data = changed(WHOLE, SIGNATURE_AT, "<I", 0x7A7A7A7A)
    assert "kernel slide 0x1200000), whose pages are not" in refused(
        changed(data, 224, "<Q", 0x1200000)
    )


def test_other_machines():
    sizes = {"image_size": 0x100000, "image1_size": 0x80000}
    assert "of a PowerPC machine" in refused(build.header(True, order=">", **sizes))
    arm = build.header(code_address=0xFFFFFE0007004000, **sizes)
    assert "kernel at 0xfffffe0007004000 is none of an Intel machine" in refused(arm)
    assert "the disk's controller has encrypted" in refused(build.header(options=0x10, **sizes))


def test_memory_that_holds_the_signature_is_no_image():
    for sizes in ((0, 0), (5, 6), (1 << 48, 1), (5, 0)):
        data = build.header(image_size=sizes[0], image1_size=sizes[1])
        with pytest.raises(UnknownFormatError):
            opened(data)
    with pytest.raises(UnknownFormatError):
        opened(WHOLE[:511])
    with pytest.raises(FormatError, match="expected the header"):
        SleepImage(BytesSource(bytes(4096)))


# damage


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"extents_size": 16}, r"0x1dc: fileExtentMapSize 0x10"),
        ({"extents_size": 0xFFFFFFFF}, "fileExtentMapSize 0xffffffff"),
        ({"bitmap_size": 0xFFFFFFFF}, "expected a page list of 0xffffffff bytes"),
        ({"bitmap_size": 0}, "expected a page list of 0x0 bytes"),
        ({"code_pages": 0xFFFFFFFF}, "expected a page list"),
        ({"code_pages": 1}, "expected a page list"),
        ({"preview_size": 0xFFFFFFFF}, "expected a page list"),
        ({"image1_size": 520}, "the wired pages end at 0x208"),
    ],
)
@pytest.mark.parametrize("era", ERAS)
def test_a_header_that_leads_nowhere(era, field, message):
    with pytest.raises(FormatError, match=message):
        opened(build.image(MEMORY, ERAS[era], **field))


def bank_list(*numbers: int) -> bytes:
    return build.page_list(dict.fromkeys(numbers or MEMORY, b""))


@pytest.mark.parametrize(
    ("at", "layout", "values", "message"),
    [
        (8, "<I", [0xFFFFFFFF], "0xffffffff banks of memory"),
        (12, "<3I", [9, 8, 1], "a bank of pages 0x9 to 0x8"),
        (12, "<3I", [3, 42, 1], "a bank of pages 0x3 to 0x2a with 0x1 words"),
        (12, "<3I", [0, 0xFFFFFFFF, 0xFFFFFFFF], "0x3 banks of memory"),
    ],
)
def test_page_lists_that_cannot_be(at, layout, values, message):
    start = WHOLE.index(bank_list())
    with pytest.raises(FormatError, match=message):
        opened(changed(WHOLE, start + at, layout, *values))


def first_run(data: bytes) -> int:
    return data.index(bank_list()) + len(bank_list())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([4, 0xFFFFFFFF], "0xffffffff pages from page 0x4 on are in no bank of memory"),
        ([2, 1], "0x1 pages from page 0x2 on are in no bank"),
        ([0xFFFFFFFF, 2], "in no bank"),
        ([40, 4], "0x4 pages from page 0x28 on are in no bank"),
    ],
)
def test_a_first_run_that_is_none(values, message):
    with pytest.raises(FormatError, match=message):
        opened(changed(WHOLE, first_run(WHOLE), "<2I", *values))


@pytest.mark.parametrize("tag", [0, 0x52000010, 0x53001001, 0x53008004, 0x53007FFF, 0xFFFFFFFF])
def test_a_tag_that_is_none_ends_the_wired_pages(tag):
    whole = build.image(MEMORY)
    at = first_run(whole)
    first, count, size = struct.unpack_from("<3I", whole, at)
    assert count == 2
    second = at + 12 + (size - build.TAG + 3 & ~3)
    image = opened(changed(whole, second, "<I", tag))
    assert f"torn at offset {second:#x}: {tag:#x} is no tag of a page" in image.warnings[0]
    assert len(image.warnings) == 1
    got = held(image)
    assert got == {number: MEMORY[number] for number in got}
    assert first in got
    assert set(got) >= {n for n in MEMORY if n % 3 == 0}  # the other part is whole
    with pytest.raises(FaultError, match="is absent"):
        image.physical().read((first + 1) * PAGE, 1)


@pytest.mark.parametrize("era", ERAS)
def test_a_file_cut_off_anywhere(era):
    whole = build.image(MEMORY, ERAS[era], code=Span(0x100, 2))
    lengths = random.Random(era).sample(range(512, len(whole)), 60)
    counts = []
    for length in sorted(lengths):
        try:
            image = opened(whole[:length])
        except FormatError:
            counts.append(0)
            continue
        got = held(image)
        assert got == {number: MEMORY[number] for number in got}
        assert image.warnings or length > len(whole) - ERAS[era].block
        assert len(got) == len(MEMORY) or image.warnings
        counts.append(len(got))
    assert counts == sorted(counts)
    assert len(set(counts)) > 10


def test_no_page_at_all():
    with pytest.raises(FormatError, match="no page is there: the image ends before the run"):
        opened(WHOLE[: first_run(WHOLE)])


def test_a_page_that_does_not_decode():
    page = wkdm.packed(MEMORY[4], wkdm.SECOND)
    assert WHOLE.count(page) == 2
    image = opened(WHOLE.replace(page, page[:12] + b"\xff" * 4 + page[16:]))
    assert image.warnings == []
    assert image.physical().read(3 * PAGE, PAGE) == MEMORY[3]
    with pytest.raises(FormatError, match=r"the page cannot be decoded \(new words, places"):
        image.physical().read(4 * PAGE, 1)


def test_compressed_pages_of_no_known_form():
    page = drawn("same", 1)
    data = build.image({7: page, 8: bytes(PAGE)}, wired=lambda _: True)
    packed = wkdm.packed(page, wkdm.SECOND)
    image = opened(data.replace(packed, b"\xff" * len(packed)))
    assert image.physical().read(8 * PAGE, PAGE) == bytes(PAGE)
    with pytest.raises(FormatError, match="do not tell which form of WKdm"):
        image.physical().read(7 * PAGE, 1)


def test_a_page_of_no_bytes_where_no_kernel_wrote_them():
    packed = wkdm.packed(MEMORY[4], wkdm.FIRST)
    whole = build.image({4: MEMORY[4], 5: bytes(PAGE)}, ERAS["10.9"], wired=lambda _: True)
    old = whole.replace(wkdm.packed(MEMORY[4], wkdm.SECOND) + struct.pack("<I", build.TAG), b"")
    assert opened(whole).physical().read(5 * PAGE, PAGE) == bytes(PAGE)
    run = struct.pack("<3I", 4, 2, build.TAG | len(packed)) + packed + struct.pack("<I", build.TAG)
    at = first_run_of(whole, 4, 5)
    old = whole[:at] + run + bytes(8) + whole[at + len(run) + 8 :].ljust(PAGE, b"\0")
    image = opened(changed(old, 0, "<2Q", len(old), len(old)))
    assert image.physical().read(4 * PAGE, PAGE) == MEMORY[4]
    with pytest.raises(FormatError, match="cannot be decoded"):
        image.physical().read(5 * PAGE, 1)


def first_run_of(data: bytes, *numbers: int) -> int:
    return data.index(bank_list(*numbers)) + len(bank_list(*numbers))


# bounds


def test_runs_are_counted(monkeypatch):
    monkeypatch.setattr(sleepimage, "_RUNS_LIMIT", 10)
    with pytest.raises(FormatError, match="more than 0xa runs of pages"):
        opened(WHOLE)


def test_an_image_of_nothing_but_tags_costs_what_it_is_long():
    count = 1 << 20
    pages = dict.fromkeys(range(16, 16 + count), bytes(PAGE))
    data = build.image(pages, ERAS["10.9"], wired=lambda _: True)
    started = time.process_time()
    image = opened(data)
    assert time.process_time() - started < 20
    assert regions(image) == [(16, count)]
    assert len(image.memory_source) == 2 * count
    assert image.memory_source._index.itemsize == 8


def test_decoded_pages_are_kept(monkeypatch):
    decoded = []
    unpack = sleepimage_pages.wkdm.unpack
    monkeypatch.setattr(
        sleepimage_pages.wkdm, "unpack", lambda *told: decoded.append(told) or unpack(*told)
    )
    physical = opened(WHOLE).physical()
    for _ in range(3):
        physical.read(3 * PAGE, PAGES * PAGE)
    assert 0 < len(decoded) <= PAGES


def test_no_more_pages_are_kept_than_a_bound(monkeypatch):
    monkeypatch.setattr(sleepimage_pages, "_KEEP", 5)
    image = opened(WHOLE)
    for number, page in MEMORY.items():
        assert image.physical().read(number * PAGE, PAGE) == page
    assert len(image.memory_source._kept) == 5


def test_reading_past_the_pages():
    pages = opened(WHOLE).memory_source
    assert pages.find(MEMORY[12][:64], 0, pages.size) >= 0
    with pytest.raises(TruncatedError):
        pages.read_at(pages.size - 1, 2)
    pages.close()


@given(st.integers(0, 511), st.binary(min_size=1, max_size=8), st.sampled_from(sorted(ERAS)))
def test_any_header_is_read_or_refused(at, change, era):
    data = bytearray(build.image(MEMORY, ERAS[era], code=Span(0x100, 2)))
    data[at : at + len(change)] = change
    survive(bytes(data))


@settings(max_examples=200)
@given(st.data())
def test_any_damage_is_survived(data):
    out = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(512, len(out) - 8))
        out[at : at + 4] = data.draw(
            st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff"]) | st.binary(min_size=4, max_size=4)
        )
    survive(bytes(out))


@given(st.binary(max_size=700))
def test_any_bytes_may_be_looked_at(data):
    if SleepImage.probe(data):
        survive(data)


def survive(data: bytes) -> None:
    try:
        image = opened(data)
    except KvmError:
        return
    for number in range(0x210):
        try:
            assert len(image.physical().read(number * PAGE, 16)) == 16
        except KvmError:
            continue


# the memory of the real dumps


@pytest.fixture(scope="module")
def image_of(tmp_path_factory):
    """The memory of a dump's LiME as an image of an era."""
    made: dict[tuple[str, str], str] = {}

    def make(dump: str, era: str) -> str:
        if (dump, era) not in made:
            lime = Lime(FileSource(real(f"dumps/{dump}/mem.lime")))
            pages = build.in_pages(
                (run.address, lime.source.read_at(run.offset, run.size)) for run in lime.runs()
            )
            path = str(tmp_path_factory.mktemp("sleep") / "sleepimage")
            with open(path, "wb") as out:
                out.write(build.image(pages, ERAS[era], code=Span(0x100, 10), extents=3))
            made[dump, era] = path
        return made[dump, era]

    yield make
    for path in made.values():
        os.unlink(path)


FITTING = [
    *(("i386-10.5.8", "10.5"), ("x86_64-10.8.5", "10.7")),
    *(("x86_64-10.13.6", "10.9"), ("x86_64-10.13.6", "10.11"), ("x86_64-10.13.6", "12")),
]


@pytest.mark.parametrize(("dump", "era"), FITTING)
def test_the_dumps_answer_as_their_lime_does(dump, era, image_of):
    kernel = real(f"dumps/{dump}/mach_kernel")
    with (
        kvmtool.open(kernel, real(f"dumps/{dump}/mem.lime")) as lime,
        kvmtool.open(kernel, image_of(dump, era)) as image,
    ):
        assert image.nlist(["_allproc", "_version"]) == lime.nlist(["_allproc", "_version"])
        assert (image.boot.slide, image.boot.uuid) == (lime.boot.slide, lime.boot.uuid)
        procs = list(image.getprocs())
        assert len(procs) > 20
        assert procs == list(lime.getprocs())
        (version,) = lime.nlist(["_version"])
        assert image.read(version.address, 200) == lime.read(version.address, 200)


@pytest.mark.parametrize("dump", DUMPS)
def test_every_page_of_a_dump(dump, image_of):
    era = dict(FITTING)[dump]
    image = SleepImage(FileSource(image_of(dump, era)))
    lime = Lime(FileSource(real(f"dumps/{dump}/mem.lime")))
    assert image.warnings == []
    found, expected = image.physical(), lime.physical()
    assert list(found.regions()) == list(expected.regions())
    for region in expected.regions():
        for at in range(region.start, region.start + region.size, 1 << 20):
            size = min(1 << 20, region.start + region.size - at)
            assert found.read(at, size) == expected.read(at, size), hex(at)


def test_memory_of_a_machine_that_ran(tmp_path):
    kernel, raw = (
        real("machine/x86_64-xnu-2422.115.4.mach_kernel"),
        real("machine/kaslr.raw"),
    )
    with open(raw, "rb") as file:
        low = file.read(0xA0000)
        file.seek(0x100000)
        pages = build.in_pages([(0, low), (0x100000, file.read())])
    path = tmp_path / "sleepimage"
    told = {"slide": 0xA00000, "code_address": 0xFFFFFF8000B00000}
    path.write_bytes(build.image(pages, ERAS["10.9"], code=Span(0xB00, 0x40), **told))
    with (
        kvmtool.open(kernel, str(path)) as image,
        kvmtool.open(kernel, raw, format="raw") as memory,
        kvmtool.open(None, str(path)) as alone,
    ):
        assert image.dump.facts.slide == image.boot.slide == told["slide"]
        assert alone.boot.kernel_address == image.boot.kernel_address
        assert len(image.getprocs()) == 7
        assert image.getprocs() == memory.getprocs() == alone.getprocs()
        (table,) = image.nlist(["_cdevsw"])
        assert image.read(table.address, 4096) == memory.read(table.address, 4096)
