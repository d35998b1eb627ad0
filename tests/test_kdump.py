"""kdump-compressed and flattened files: QEMU's real ones, every compression, the traps, damage."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import shutil
import struct
import sys
import time

import pytest
from builders import halted, physical
from builders import kdump as build
from builders.kdump import LZO, SNAPPY, ZLIB, ZSTD, Stored
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import formats, macho
from kvmtool.errors import FaultError, FormatError, KvmError, TruncatedError, UnknownFormatError
from kvmtool.formats.elf_core import ElfCore
from kvmtool.formats.flattened import Flattened, FlattenedSource
from kvmtool.formats.kdump import Kdump
from kvmtool.formats.kdump_pages import PageSource
from kvmtool.source import BytesSource, FileSource

PAGE = 4096


def page(seed: int, size: int = PAGE) -> bytes:
    """A page that is like no other and compresses."""
    return random.Random(seed).randbytes(64) * (size // 64)


def opened(data: bytes):
    """The container in `data`, recognised by its bytes."""
    source = BytesSource(data, "dump")
    return formats.load(formats.identify(source))(source)


def regions(dump) -> list[tuple[int, int]]:
    return [(r.start, r.start + r.size) for r in dump.physical().regions()]


# QEMU's own


@pytest.fixture(scope="module", params=["x86_64", "i386"])
def stopped(request, tmp_path_factory):
    """A machine with the embedded sample's memory, dumped by QEMU in every form it offers."""
    if shutil.which(f"qemu-system-{request.param}") is None:
        pytest.skip(f"no qemu-system-{request.param} (Debian: qemu-system-x86)")
    return halted.dump(request.param, str(tmp_path_factory.mktemp(request.param)))


def kdumps(stopped):
    forms = [form for form in stopped.paths if form.startswith("kdump-")]
    assert "kdump-zlib" in forms
    for form in forms:
        source = FileSource(stopped.paths[form])
        yield form, formats.load(formats.identify(source))(source)


def test_qemus_kdump_is_its_elf_core_page_for_page(stopped):
    elf = ElfCore(FileSource(stopped.paths["elf"]))
    expected = elf.physical()
    for form, kdump in kdumps(stopped):
        assert isinstance(kdump, Kdump if "raw" in form else Flattened)
        assert kdump.warnings == []
        assert regions(kdump) == regions(elf)
        found = kdump.physical()
        count = 0
        for start, end in regions(elf):
            for at in range(start, end, PAGE):
                assert found.read(at, PAGE) == expected.read(at, PAGE), hex(at)
                count += 1
        assert count > 80 * 256
        size = os.path.getsize(stopped.paths[form])
        assert size < os.path.getsize(stopped.paths["elf"]) // 20


def test_qemus_kdump_has_the_registers_of_its_elf_core(stopped):
    elf = ElfCore(FileSource(stopped.paths["elf"]))
    assert elf.facts.control[0]["cr3"] == stopped.root
    for _, kdump in kdumps(stopped):
        assert kdump.facts.control == elf.facts.control
        assert kdump.facts.threads == elf.facts.threads
        # its header names the build of QEMU; the ELF core's e_machine the mode of the processor
        said = elf.facts.cputype if stopped.arch == "i386" else formats.UNSAID
        assert kdump.facts.cputype == said
        assert [(n.owner, n.size) for n in kdump.notes] == [(n.owner, n.size) for n in elf.notes]


def test_qemus_kdump_holds_the_memory_that_was_put_there(stopped):
    truth = formats.load(formats.by_name("lime"))(FileSource(stopped.lime)).physical()
    for _, kdump in kdumps(stopped):
        found = kdump.physical()
        for region in truth.regions():
            assert found.read(region.start, region.size) == truth.read(region.start, region.size)


# what is where


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("version", [1, 5, 6])
def test_headers_of_both_sizes(bits, version):
    pages = {0: page(0), 1: page(1), 9: page(9), 70: page(70)}
    dump = opened(build.kdump(pages, bits=bits, version=version))
    assert isinstance(dump, Kdump)
    assert (dump.bits, dump.warnings) == (bits, [])
    assert regions(dump) == [(0, 2 * PAGE), (9 * PAGE, 10 * PAGE), (70 * PAGE, 71 * PAGE)]
    for frame, content in pages.items():
        assert dump.physical().read(frame * PAGE, PAGE) == content
    assert dump.physical().read(PAGE - 8, 16) == page(0)[-8:] + page(1)[:8]


def test_a_32_bit_header_whose_max_mapnr_looks_like_a_block_size():
    dump = opened(build.kdump({0: page(0)}, bits=32, mapnr=0x10000))
    assert dump.bits == 32
    assert dump.physical().read(0, PAGE) == page(0)


@pytest.mark.parametrize("size", [PAGE, 16 << 10, 64 << 10])
def test_every_size_of_page(size):
    dump = opened(build.kdump({3: page(1, size), 4: page(2, size)}, block=size))
    assert regions(dump) == [(3 * size, 5 * size)]
    assert dump.physical().read(3 * size, 2 * size) == page(1, size) + page(2, size)


def test_a_page_left_out_is_absent_and_not_zero():
    memory = opened(build.kdump({0: page(0), 2: page(2)})).physical()
    with pytest.raises(FaultError, match="physical address 0x1000 is unmapped"):
        memory.read(0, 3 * PAGE)
    assert [piece.data is None for piece in memory.read_pieces(0, 3 * PAGE)] == [False, True, False]


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(0, 300), st.integers(0, 300))
def test_runs_are_the_set_bits(frames, first, end):
    dump = opened(build.kdump(dict.fromkeys(frames, bytes(PAGE)), split=(first, end)))
    held = {at // PAGE for start, stop in regions(dump) for at in range(start, stop, PAGE)}
    assert held == {frame for frame in frames if first <= frame < end}
    assert sum(run.size for run in dump.runs()) == len(held) * PAGE


def test_the_single_bitmap_of_an_old_writer():
    dump = opened(build.kdump({1: page(1), 5: page(5)}, one_bitmap=True, version=1))
    assert regions(dump) == [(PAGE, 2 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert dump.physical().read(5 * PAGE, PAGE) == page(5)


@pytest.mark.parametrize("version", [3, 6])
@pytest.mark.parametrize("bits", [64, 32])
def test_one_piece_of_a_split_dump(version, bits):
    pages = {frame: page(frame) for frame in (0, 3, 4, 5, 9)}
    dump = opened(build.kdump(pages, split=(4, 8), version=version, bits=bits))
    assert "page frames from 0x4 to 0x8" in dump.warnings[0]
    assert regions(dump) == [(4 * PAGE, 6 * PAGE)]
    assert dump.physical().read(4 * PAGE, 2 * PAGE) == page(4) + page(5)


def test_the_page_of_zeros_is_stored_and_decoded_once(monkeypatch):
    decoded = []
    plain = PageSource._decode
    monkeypatch.setattr(PageSource, "_decode", lambda *a: decoded.append(a[4]) or plain(*a))
    pages = {0: page(0), **dict.fromkeys(range(1, 600), bytes(PAGE))}
    dump = opened(build.kdump(pages))
    assert dump.physical().read(0, 600 * PAGE) == page(0) + bytes(599 * PAGE)
    assert len(decoded) == 2


def test_decoded_pages_are_kept_within_a_bound():
    size = 64 << 10
    dump = opened(build.kdump({n: page(n, size) for n in range(600)}, block=size))
    assert dump.physical().read(599 * size, 4) == page(599, size)[:4]
    assert dump.physical().read(0, 600 * size)[-4:] == page(599, size)[-4:]
    assert sum(map(len, dump.memory_source._kept.values())) == 32 << 20


# compressions


def lzo(content: bytes) -> Stored:
    module = pytest.importorskip("lzallright")
    return Stored(module.LZOCompressor().compress(content), LZO)


def snappy(content: bytes) -> Stored:
    module = pytest.importorskip("cramjam")
    return Stored(bytes(module.snappy.compress_raw(content)), SNAPPY)


def zstd(content: bytes) -> Stored:
    try:
        from compression import zstd as module
    except ImportError:
        module = pytest.importorskip("backports.zstd")
    return Stored(module.compress(content), ZSTD)


@pytest.mark.parametrize("pack", [build.deflated, lzo, snappy, zstd, lambda p: Stored(p, 0)])
def test_every_compression(pack):
    assert opened(build.kdump({7: pack(page(7))})).physical().read(7 * PAGE, PAGE) == page(7)


# by hand from the LZO documentation (Documentation/lzo.txt of Linux), not by an encoder: a literal,
# a long match at distance 1, the end mark
LZO_PAGE = b"\x12a" + b"\x20" + b"\0" * 15 + bytes([4095 - 33 - 15 * 255]) + b"\0\0" + b"\x11\0\0"
# by hand from format_description.txt of snappy: the size, a literal, copies of 64 at distance 1
SNAPPY_PAGE = b"\x80\x20" + b"\x00a" + b"\xfe\x01\0" * 63 + bytes([62 << 2 | 2]) + b"\x01\0"


@pytest.mark.parametrize(
    ("stored", "package"),
    [(Stored(LZO_PAGE, LZO), "lzallright"), (Stored(SNAPPY_PAGE, SNAPPY), "cramjam")],
)
def test_streams_written_by_hand(stored, package):
    pytest.importorskip(package)
    assert opened(build.kdump({0: stored})).physical().read(0, PAGE) == b"a" * PAGE


# a page as the libraries that QEMU and makedumpfile are built with compress it: lzo1x_1_compress of
# liblzo2 2.10, snappy_compress of libsnappy 1.1.9, ZSTD_compress of libzstd 1.5.4 (base 85)
POINTERS = struct.pack("<512Q", *(0xFFFFFF8000200000 + (n * n % 61 << 8) for n in range(512)))
LZO_POINTERS = (
    "3IG5g0D%Ah{{R6X0Dye}1l<4$-2f2X02$o?B;5cp-2emK02JK-C*1%%-2fKd059DD4c!1L-2e>T04?1B6Wstf-2fup"
    "01n*%Io$v$-2fZi01w>&1>FET-2gP*05IJEE-f4Y`~v(0{0968{0jUG{0{sO{1W^W{1*He{2Kfm{2u%u{384${3iS;"
    "{3`q`{4V@3{4)GB{5JeJ{W<{L9{d6P1N;U22mA^A3;YfI5Bw4Q6Z{qY7yKFg8~h#oAN(QwBm5=&C;Tb=EBr0|FZ?n5"
    "GyFCDH~cvu000000000000000|C|Q^0ssI1068E4fdBvh04X2<fdBvh5dZ)"
)
SNAPPY_POINTERS = (
    "fFL9Q03ZN>|Ns900SyQM1PurP2@MDU5Df?f86XKL03;0v05J^+00RvO02B=f04EIy06Yx{02U1h051&)01XWY04fa#"
    "01OQX04)s&022)e05}Z@03r<t01gcZ067f^04WU!02>Vm01pia00j*Q06Gl_05lB<05A;*04_QR01+4wC=oajND){O"
    "Xc2f3h!L0(s1djk$Pw5P=n?oa2r(EjC^0xONHJJ3Xfb#(hy)oRDVQ;+F}N|vG1&g-0siO#{^$Yz=mGxd0siO#{^$Yz"
    "=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz"
    "=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz=mGxd0siO#{^$Yz"
    "=mA>j0R"
)
ZSTD_POINTERS = (
    "D77#BU;qz23;<@}Ss1_-2mk;7zw7^hS!|6vQQI(%MxrK?B4twmQUFo_A_!vElX|rI9Y*z7#$)Ofs^WLPdHbRu?J06*"
    "Pes`M*@l*H86tupW<9A#o8Mtnk7YcjPN6D(=bN`L3euh;XZBQt-Jfk}`IaFf1VIo8fDi(IwxQ))hKL}DSx@TG=64v?"
    "V;PUBQ>cpH`R475g0!c|nLQO@_h%bgzGa9Af|&KB9&LVyQ9YLNm^y{3_?>Uwz9>k0ik#U~5q5vJq2*hK1SxW6Pes`M"
    "*@l*H86tupW<9A#o8Mtnk7YcjPN6D(=bN`L3euh;XZBQt-Jfk}`IaFf2x8WgdbIf+M)g?6W9k&D;&;Az`=TK2DRO2{"
    "Mc4&F5Cj5%_7pj@ry}hBY(vYp3=u&Pv!2wW&F?U($1)yMr%)BY^Ud2A1!+%_GkYq+?$0)~e9I6K1TpJLJ=**Zqk1gk"
    "F?9-6@jKtVeNmA1f%d2o;O`sZuK^K^zh_8d6FW9-V#g+S9N$q@0R"
)


@pytest.mark.parametrize(
    ("text", "flags", "package"),
    [
        (LZO_POINTERS, LZO, "lzallright"),
        (SNAPPY_POINTERS, SNAPPY, "cramjam"),
        (ZSTD_POINTERS, ZSTD, "compression" if sys.version_info >= (3, 14) else "backports.zstd"),
    ],
)
def test_pages_that_the_writers_libraries_have_compressed(text, flags, package):
    pytest.importorskip(package)
    stored = Stored(base64.b85decode(text), flags)
    assert opened(build.kdump({0: stored})).physical().read(0, PAGE) == POINTERS


@pytest.mark.parametrize("pack", [build.deflated, lzo, snappy, zstd])
@pytest.mark.parametrize("change", ["short", "long", "cut", "garbage"])
def test_a_page_that_does_not_decode(pack, change):
    content = {"short": page(1)[:-1], "long": page(1) * 2}.get(change, page(1))
    data, flags, *_ = pack(content)
    data = {"cut": data[:-1], "garbage": b"\xa5" * len(data)}.get(change, data)
    dump = opened(build.kdump({0: page(0), 1: Stored(data, flags)}))
    assert dump.physical().read(0, PAGE) == page(0)
    with pytest.raises(FormatError, match=r"the page (cannot be decoded|decodes to)"):
        dump.physical().read(PAGE, 16)


def test_a_bomb_costs_no_more_than_a_page():
    packed = zstd(bytes(64 << 20))
    assert len(packed.data) <= PAGE
    with pytest.raises(FormatError, match="the page decodes to 0x1001 bytes"):
        opened(build.kdump({0: packed})).physical().read(0, PAGE)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (Stored(page(0)[:16], 0), "a page of 0x10 stored bytes, expected 0x1000"),
        (Stored(b"x", ZLIB, size=0), "a page of 0x0 stored bytes"),
        (Stored(page(0) * 2, ZLIB), "a page of 0x2000 stored bytes"),
        (Stored(b"abc", ZLIB | LZO), "page flags 0x3 name more than one compression"),
    ],
)
def test_descriptors_that_cannot_be(stored, message):
    with pytest.raises(FormatError, match=message):
        opened(build.kdump({0: stored})).physical().read(0, 16)


# notes


def test_registers_are_in_the_notes():
    notes = physical.prstatus64({"rip": 5}) + physical.qemu_note({"rip": 5, "cr3": 0x1234000})
    dump = opened(build.kdump({0: page(0)}, notes=notes))
    assert [note.owner for note in dump.notes] == ["CORE", "QEMU"]
    assert dump.facts.control[0]["cr3"] == 0x1234000
    assert len(dump.facts.threads) == 1
    assert dump.facts.cputype == formats.UNSAID


def test_a_32_bit_machine_says_so():
    notes = physical.prstatus32({"eip": 5}) + physical.qemu_note({"rip": 5})
    dump = opened(build.kdump({0: page(0)}, notes=notes, bits=32, machine=b"i686"))
    assert dump.facts.cputype == macho.CPU_TYPE_I386
    arm = physical.prstatus_arm64([0] * 31, 0, 0, 0)
    dump = opened(build.kdump({0: page(0)}, notes=arm, machine=b"aarch64"))
    assert dump.facts.cputype == macho.CPU_TYPE_ARM64


# cut off


def test_a_file_cut_off_in_its_pages():
    whole = build.kdump({n: page(n) for n in range(10)})
    kept = len(build.deflated(page(8)).data) + len(build.deflated(page(9)).data)
    dump = opened(whole[: len(whole) - kept + 1])
    assert "0x2 of 0xa pages are absent" in dump.warnings[0]
    assert regions(dump) == [(0, 8 * PAGE)]
    with pytest.raises(FaultError, match="0x8000 is absent"):
        dump.physical().read(7 * PAGE, 2 * PAGE)


def test_a_file_cut_off_in_its_descriptors():
    pages = {n: page(n) for n in range(10)}
    data = sum(len(build.deflated(content).data) for content in pages.values())
    whole = build.kdump(pages)
    dump = opened(whole[: len(whole) - data - 30])  # in the last but one descriptor
    assert regions(dump) == []
    assert "0xa of 0xa pages are absent" in dump.warnings[0]


def test_pages_the_writer_had_no_room_for():
    missing = Stored(b"", ZLIB, offset=0, size=0)
    pages = {0: page(0), 1: missing, 2: page(2), 3: missing, 4: missing, 5: page(5)}
    dump = opened(build.kdump(pages, status=8 | 1))
    assert "0x3 of 0x6 pages are absent" in dump.warnings[0]
    assert regions(dump) == [(0, PAGE), (2 * PAGE, 3 * PAGE), (5 * PAGE, 6 * PAGE)]
    assert dump.physical().read(5 * PAGE, PAGE) == page(5)
    with pytest.raises(FaultError, match="0x3000 is absent"):
        dump.physical().read(3 * PAGE, 1)


def test_a_file_cut_off_before_a_tail_of_zeros():
    pages = {n: page(n) for n in range(4)} | dict.fromkeys(range(4, 40000), bytes(PAGE))
    pages[0] = bytes(PAGE)
    dump = opened(build.kdump(pages)[:-1])
    assert "0x1 of 0x9c40 pages are absent" in dump.warnings[0]
    with pytest.raises(FaultError, match="0x3000 is absent"):
        dump.physical().read(0, 40000 * PAGE)


# headers that cannot be


def changed(data: bytes, at: int, layout: str, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(layout, out, at, *values)
    return bytes(out)


WHOLE = build.kdump({0: page(0), 5: page(5)}, notes=physical.qemu_note({"cr3": 0x1000}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(WHOLE, 8, "<I", 7), "header_version 0x7"),
        (changed(WHOLE, 428, "<I", 4095), "no block size"),
        (changed(WHOLE, 432, "<I", 0), "no block size"),
        (changed(WHOLE, 436, "<I", 1 << 20), "the bitmaps take 0x100000000 bytes"),
        (changed(WHOLE, PAGE + 96, "<Q", 1 << 40), "max_mapnr 0x10000000000 is no page frame"),
        (changed(WHOLE, PAGE + 96, "<Q", 1 << 32), "needs 0x20000000 bytes of bitmap"),
        (WHOLE[:400], "kdump header"),
        (WHOLE[:5000], "file is cut off|bitmaps take"),
    ],
)
def test_header_errors(data, message):
    with pytest.raises(FormatError, match=message):
        opened(data)


# flattened


def test_records_in_any_order_make_the_file():
    whole = build.kdump({n: page(n) for n in range(50)})
    records = build.in_records(whole, 700)
    random.Random(1).shuffle(records)
    dump = opened(build.flattened(*records))
    assert dump.warnings == []
    assert dump.physical().read(0, 50 * PAGE) == b"".join(page(n) for n in range(50))


def test_a_later_record_overwrites_an_earlier_one():
    flat = build.flattened((0, b"first file"), (20, b"end"), (0, b"later"), (3, b"st"))
    source = FlattenedSource(BytesSource(flat))
    assert source.read_at(0, 23) == b"latst file" + bytes(10) + b"end"
    assert source.find(b"end", 0, 23) == 20
    with pytest.raises(TruncatedError):
        source.read_at(20, 4)


def test_a_flattened_elf_core():
    whole = physical.elf(physical.Segment(page(1), 0x1000))
    dump = opened(build.flattened(*build.in_records(whole, 1000)))
    assert dump.name == "elf-core (flattened)"
    assert dump.physical().read(0x1000, PAGE) == page(1)


def test_flattened_and_cut_off():
    whole = build.kdump({n: page(n) for n in range(10)})
    flat = build.flattened(*build.in_records(whole, 512))
    dump = opened(flat[:-200])
    assert "its last record is missing" in dump.warnings[0]
    held = sum(end - start for start, end in regions(dump)) // PAGE
    assert 0 < held < 10
    assert dump.physical().read(0, held * PAGE) == b"".join(page(n) for n in range(held))


def test_flattened_in_flattened_is_refused():
    inner = build.flattened((0, WHOLE))
    with pytest.raises(UnknownFormatError, match="a flattened file in a flattened file"):
        opened(build.flattened((0, inner)))


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 8), (0, 0), (0, -5), (1 << 60, 8), ((1 << 56) - 4, 8), (-1, -2)]
)
def test_records_that_cannot_be(offset, size):
    flat = build.flattened((0, WHOLE), end=False) + struct.pack(">qq", offset, size) + bytes(8)
    with pytest.raises(FormatError, match="a record of"):
        opened(flat)


def test_another_version_of_the_flattened_form():
    with pytest.raises(FormatError, match="flattened header of type 1"):
        opened(changed(build.flattened((0, WHOLE)), 24, ">q", 2))


# damage


CASES = (
    WHOLE,
    build.kdump({n: page(n) for n in range(9)}, bits=32, version=3),
    build.flattened(*build.in_records(WHOLE, 3000)),
)


@given(
    st.sampled_from(CASES),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    st.integers(0, 1 << 16),
)
def test_damage_is_an_error_of_ours_or_none(data, changes, size):
    broken = bytearray(data)
    hot = [*range(400, 480), *range(4096, 4220), *range(len(data) - 400, len(data))]
    for at, value in changes:
        broken[hot[at % len(hot)] if at % 3 else at % len(broken)] = value
    with contextlib.suppress(KvmError):
        dump = opened(bytes(broken[: max(size, 4000)]))
        memory = dump.physical()
        for region in list(memory.regions())[:20]:
            assert len(memory.read(region.start, min(region.size, 9000))) <= 9000


def test_a_big_dump_opens_at_once():
    frames = 1 << 21  # 8 GiB, in runs of two pages
    bitmap = random.Random(3).randbytes(frames // 8)
    count = int.from_bytes(bitmap, "little").bit_count()
    head = build.kdump({}, mapnr=frames)[: 2 * PAGE]
    row = struct.pack("<QIIQ", 2 * PAGE + 2 * len(bitmap) + 24 * count, 4, 0, 0)
    data = head + bytes(len(bitmap)) + bitmap + row * count + page(0)
    data = changed(data, 436, "<I", 2 * len(bitmap) // PAGE)
    start = time.perf_counter()
    dump = opened(data)
    assert time.perf_counter() - start < 2
    assert sum(run.size for run in dump.runs()) == count * PAGE
