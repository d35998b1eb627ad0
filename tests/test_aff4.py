"""AFF4 volumes: pyaff4's own, the real dumps' memory in them, what is absent, and damage."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tracemalloc
import zipfile

import pytest
from builders import aff4 as build
from builders import physical
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtool import formats
from kvmtool.errors import (
    FaultError,
    FormatError,
    KvmError,
    TruncatedError,
    UnknownFormatError,
    UnsupportedError,
)
from kvmtool.formats import aff4_volume
from kvmtool.formats.aff4 import Aff4
from kvmtool.formats.aff4_stream import ImageStream
from kvmtool.source import BytesSource, FileSource
from tests.inputs import DUMPS, ROOT, plain_core, real, truth
from tests.test_cli import run

pytest.importorskip("pyoxigraph", reason="extra kvmtool[aff4] is not installed")

PAGE = 4096
# what is in tests/data, written by pyaff4 0.34 (`tools/peers_aff4.py --fixtures`)
RANGES = ((0x1000, b"page" * 3072), (0x100000, bytes(range(256)) * 128 + b"\xff" * PAGE))
FIXTURES = ("zlib", "snappy")


def fixture(method: str) -> str:
    return os.path.join(ROOT, "tests", "data", f"pyaff4-{method}.aff4")


def page(seed: int) -> bytes:
    """A page that is like no other and compresses."""
    return random.Random(seed).randbytes(64) * (PAGE // 64)


def opened(data: bytes):
    """The container in `data`, recognised by its bytes."""
    source = BytesSource(data, "dump")
    return formats.load(formats.identify(source))(source)


def regions(dump) -> list[tuple[int, int]]:
    return [(r.start, r.start + r.size) for r in dump.physical().regions()]


def changed(content: dict[str, bytes], name: str, old: str, new: str) -> bytes:
    """The volume with one word of a member replaced."""
    assert old.encode() in content[name]
    return build.zipped({**content, name: content[name].replace(old.encode(), new.encode())})


# what others wrote


@pytest.mark.parametrize("method", FIXTURES)
def test_what_pyaff4_wrote(method):
    dump = formats.load(formats.identify(FileSource(fixture(method))))(FileSource(fixture(method)))
    assert isinstance(dump, Aff4)
    assert regions(dump) == [(at, at + len(data)) for at, data in RANGES]
    for at, data in RANGES:
        assert dump.physical().read(at, len(data)) == data
    assert dump.warnings == []
    assert (dump.virtual(), dump.facts.control) == (None, ())


def lime_ranges(dump: str):
    with open(real(f"dumps/{dump}/mem.lime"), "rb") as lime:
        while head := lime.read(32):
            first, last = struct.unpack_from("<QQ", head, 8)
            yield first, lime.read(last - first + 1)


@pytest.mark.parametrize(
    ("dump", "style", "method"),
    [
        (DUMPS[0], "pmem2", "zlib"),
        (DUMPS[1], "standard", "deflate"),
        (DUMPS[2], "pmem3", "snappy"),
    ],
)
def test_real_memory_answers_as_in_its_lime_form(tmp_path, dump, style, method):
    path = str(tmp_path / "memory.aff4")
    with open(path, "wb") as out:
        out.write(build.aff4(*lime_ranges(dump), style=style, method=method))
    kernel, known = ["-N", real(f"dumps/{dump}/mach_kernel")], truth(dump)
    where = [*kernel, "-M", path]
    facts = json.loads(run("info", *where, "--format", "json").stdout)
    assert facts["core"]["format"] == "aff4"
    assert facts["slide"]["slide"] == hex(known["slide"])
    assert facts["slide"]["root"] == hex(known["memory"]["kernel_page_table_root"])
    names = [f"_{name}" if not name.startswith("_") else name for name in known["symbols"]]
    for asked in (
        ["procs", "--format", "json"],
        ["nlist", *names],
        ["read", "_version", "100"],
        ["read", "_cdevsw", "0x800", "--raw"],
    ):
        for other in (real(f"dumps/{dump}/mem.lime"), plain_core(dump)):
            expected = run(*asked, *kernel, "-M", other)
            assert run(*asked, *where).stdout_bytes == expected.stdout_bytes
    memory = Aff4(FileSource(path)).physical()
    assert [(r.start, r.start + r.size) for r in memory.regions()] == [
        tuple(run) for run in known["memory"]["ram"]
    ]
    for at, data in lime_ranges(dump):
        assert memory.read(at, len(data)) == data


# what is where


@pytest.mark.parametrize("style", ["standard", "pmem3", "pmem2"])
@pytest.mark.parametrize("method", ["zlib", "deflate", "snappy", "lz4", "lz4-pyaff4", "stored"])
def test_every_style_and_compression(style, method):
    content = b"".join(map(page, range(40))) + random.Random(0).randbytes(40 * PAGE)
    ranges = ((0x3000, content), (0x200000, page(99)), (0x400000, content[:PAGE]))
    dump = opened(build.aff4(*ranges, style=style, method=method, per_bevy=3))
    assert regions(dump) == [(at, at + len(data)) for at, data in ranges]
    memory = dump.physical()
    for at, data in ranges:
        assert memory.read(at, len(data)) == data
    assert memory.read(0x3000 + 0x7FFE, 4) == content[0x7FFE:0x8002]
    assert memory.read(0x3000 + 3 * 0x8000 - 5, 10) == content[3 * 0x8000 - 5 :][:10]
    assert dump.warnings == []


@pytest.mark.parametrize("url", ["github.com/google/snappy", "github.com/google/snappy/"])
def test_a_compression_under_its_other_name(url):
    content = build.members((0, page(1)), method="snappy")
    name = build.METHODS["snappy"][0]
    data = changed(content, "information.turtle", name, "https://" + url)
    assert opened(data).physical().read(0, PAGE) == page(1)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from(["standard", "pmem2"]),
)
@settings(max_examples=60, deadline=None)
def test_runs_are_what_is_mapped(wanted, style):
    ranges, at = [], 0
    for gap, pages in wanted:
        at += gap * PAGE
        ranges.append((at, b"".join(page(at + n) for n in range(pages))))
        at += pages * PAGE
    dump = opened(build.aff4(*ranges, style=style, chunk=8192, per_bevy=2))
    assert [(r.address, r.size) for r in dump.runs()] == [(a, len(d)) for a, d in ranges]
    for start, data in ranges:
        assert dump.physical().read(start, len(data)) == data


def test_what_is_not_mapped_is_absent_and_not_zero():
    memory = opened(build.aff4((0, page(0)), (2 * PAGE, page(2)))).physical()
    with pytest.raises(FaultError, match="physical address 0x1000 is unmapped"):
        memory.read(0, 3 * PAGE)
    assert [piece.data is None for piece in memory.read_pieces(0, 3 * PAGE)] == [False, True, False]


def test_symbolic_streams():
    more = (
        (0x10000, PAGE, build.ZERO),
        (0x11000, PAGE, build.UNREADABLE),
        (0x12000, PAGE, "http://aff4.org/Schema#SymbolicStreamA5"),
        (0x20000, PAGE, "http://aff4.org/Schema#UnknownData"),
        (0x21000, 8, "http://aff4.org/Schema#FFDevice"),
    )
    dump = opened(build.aff4((0, page(0)), more=more))
    memory = dump.physical()
    assert memory.read(0x10000, PAGE) == bytes(PAGE)
    assert memory.read(0x12000, PAGE) == b"\xa5" * PAGE
    assert memory.read(0x21000, 8) == b"\xff" * 8
    for address in (0x11000, 0x20000):
        with pytest.raises(FaultError, match="is absent"):
            memory.read(address, 1)
    assert next(memory.find(b"\xa5" * 5)) == 0x12000
    assert next(memory.find(page(0)[:64])) == 0
    assert "0x2000 bytes of" in dump.warnings[0]


def test_a_stream_that_is_a_member_as_it_is():
    content = build.members((0x1000, page(1)), style="pmem3")
    del content["dev/pmem/data/00000000.index"]
    content["dev/pmem/data"] = content.pop("dev/pmem/data/00000000").ljust(PAGE)
    said = content["information.turtle"].decode()
    said = said.replace("a aff4:ImageStream", "a aff4:ZipSegment")
    content["information.turtle"] = said.encode()
    content["dev/pmem/data"] = page(1)
    assert opened(build.zipped(content)).physical().read(0x1000, PAGE) == page(1)


FLAT = """@base <{volume}> .
@prefix aff4: <http://aff4.org/Schema#> .
</PhysicalMemory> aff4:category <http://aff4.org/Schema#memory/physical> ; aff4:stored <> .
"""


def flat(content: bytes) -> dict[str, bytes]:
    """A volume as pmem's `--format raw` and `--format elf` write it."""
    return {
        "container.description": build.VOLUME.encode(),
        "PhysicalMemory": content,
        "information.turtle": FLAT.format(volume=build.VOLUME).encode(),
    }


def test_memory_without_a_map():
    dump = opened(build.zipped(flat(page(0) + page(1))))
    assert regions(dump) == [(0, 2 * PAGE)]
    assert dump.physical().read(PAGE, PAGE) == page(1)


def test_an_elf_core_inside():
    core = physical.elf(physical.Segment(page(3), p_paddr=0x3000))
    dump = opened(build.zipped(flat(core)))
    assert dump.name == "elf-core (aff4)"
    assert regions(dump) == [(0x3000, 0x4000)]
    assert [run.address for run in dump.runs()] == [0x3000]
    assert dump.physical().read(0x3000, PAGE) == page(3)


@pytest.mark.parametrize("number", ["0x11a4000", "18497536"])
def test_the_root_that_pmem_wrote_down(number):
    content = build.members((0, page(0)), style="pmem3")
    yaml = f"Imager: OSXPmem 2.1\nRegisters:\n  CR3: {number}\nkaslr_slide: 0\n"
    content["dev/pmem/information.yaml"] = yaml.encode()
    assert opened(build.zipped(content)).facts.control == ({"cr3": 0x11A4000},)


@pytest.mark.parametrize("first", ["00000000", "/index"])
def test_bevies_first_as_pmem_2_may_have_them(first):
    ranges = [(n << 20, random.Random(n).randbytes(1 << 17)) for n in range(2)]
    content = build.members(*ranges, style="pmem2")
    name = next(name for name in content if name.endswith(first))
    data = build.zipped({name: content.pop(name), "other": bytes(formats.PROBE_SIZE), **content})
    assert b"information.turtle" not in data[: formats.PROBE_SIZE]
    assert opened(data).physical().read(1 << 20, 1 << 17) == ranges[1][1]


@pytest.mark.parametrize("name", ["PhysicalMemory", "dev/pmem", "proc/kcore"])
def test_memory_first_as_pmem_may_have_it(name):
    said = FLAT.format(volume=build.VOLUME).replace("PhysicalMemory", name)
    content = {name: page(0) * 20, "information.turtle": said.encode()}
    assert regions(opened(build.zipped(content))) == [(0, 20 * PAGE)]


def test_a_second_image_is_named():
    content = build.members((0, page(0)), style="pmem3")
    more = "</zz> aff4:category memory:physical ; a aff4:Map .\n"
    content["information.turtle"] += more.encode()
    (warning,) = opened(build.zipped(content)).warnings
    assert "/dev/pmem is read, not" in warning
    assert warning.endswith("/zz")


def test_the_urn_may_stand_in_the_comment_or_in_a_member():
    content = build.members((0, page(0)), style="pmem3")
    assert opened(build.zipped(content, comment="")).physical().read(0, PAGE) == page(0)
    del content["container.description"]
    data = build.zipped(content, comment=build.VOLUME + "\0")
    assert opened(data).physical().read(0, PAGE) == page(0)
    with pytest.raises(FormatError, match="says the volume's URN"):
        opened(build.zipped(content, comment=""))


def test_reads_are_exact_and_decoded_chunks_are_kept_within_a_bound():
    content = bytes(96 << 20)
    dump = opened(build.aff4((0, content)))
    stream = dump._runs.source._parts[0]
    assert isinstance(stream, ImageStream)
    tracemalloc.start()
    for at in range(0, len(content), 1 << 20):
        dump.physical().read(at, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, stream._chunks.values())) == 32 << 20
    assert peak < 48 << 20
    for off, size in ((len(content) - 1, 2), (-1, 2), (len(content) + 5, 0)):
        for source in (stream, dump._runs.source):
            with pytest.raises(TruncatedError):
                source.read_at(off, size)
    stream.close()
    assert stream.read_at(5, 3) == bytes(3)


# what is missing


def test_what_lies_in_another_volume_is_absent():
    content = build.members((0, b"".join(map(page, range(12)))), chunk=PAGE, per_bevy=4)
    folder = build.STREAM.replace("://", "%3A%2F%2F")
    del content[f"{folder}/00000001"]
    content[f"{folder}/00000002.index"] = content[f"{folder}/00000002.index"][: 2 * 12]
    dump = opened(build.zipped(content))
    assert regions(dump) == [(0, 4 * PAGE), (8 * PAGE, 10 * PAGE)]
    memory = dump.physical()
    assert memory.read(3 * PAGE, PAGE) == page(3)
    assert memory.read(8 * PAGE, 2 * PAGE) == page(8) + page(9)
    for address in (4 * PAGE, 8 * PAGE - 1, 10 * PAGE, 12 * PAGE - 1):
        with pytest.raises(FaultError, match="is absent"):
            memory.read(address, 1)
    assert dump.warnings == [
        f"{6 * PAGE:#x} bytes of {build.MAP} are not in this volume, or could not be read"
    ]


def test_a_stream_of_another_volume_of_a_striped_set_is_absent():
    more = ((0x10000, PAGE, "aff4://eeee0000-366a-4997-8f10-cfbff91256f4"),)
    dump = opened(build.aff4((0, page(0)), more=more))
    assert regions(dump) == [(0, PAGE)]
    with pytest.raises(FaultError, match="is absent"):
        dump.physical().read(0x10000, 1)
    assert "0x1000 bytes of" in dump.warnings[0]


def test_a_range_past_the_end_of_its_stream_is_absent():
    content = build.members((0, page(0)))
    folder = build.MAP.replace("://", "%3A%2F%2F")
    content[f"{folder}/map"] = build.entry(0x1000, 3 * PAGE, 0, 0) + b"rest"
    dump = opened(build.zipped(content))
    assert regions(dump) == [(0x1000, 0x2000)]
    with pytest.raises(FaultError, match="is absent"):
        dump.physical().read(0x2000, 1)
    assert "ends with 0x4 bytes that are no entry" in dump.warnings[0]
    assert "0x2000 bytes of" in dump.warnings[1]


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoxigraph", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'kvmtool\[aff4\]'"):
        opened(build.aff4((0, page(0))))


def test_without_the_package_for_snappy(monkeypatch):
    data = build.aff4((0, page(0)), method="snappy")
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'kvmtool\[aff4\]'"):
        opened(data)


@pytest.mark.parametrize("name", ["information.turtle", "dev/pmem/map", "dev/pmem/idx"])
def test_a_member_that_is_missing_is_named(name):
    content = build.members((0, page(0)), style="pmem3")
    del content[name]
    with pytest.raises(FormatError, match=f"dump: the volume has no member .*{name}"):
        opened(build.zipped(content))


def test_a_volume_without_memory():
    content = build.members((0, page(0)))
    with pytest.raises(UnsupportedError, match=r"without an image of physical memory .*DiskImage"):
        opened(changed(content, "information.turtle", "aff4:MemoryImage", "aff4:DiskImage"))


def test_another_zip_is_not_taken_for_one():
    with pytest.raises(UnknownFormatError):
        opened(build.zipped({"mach_kernel": b"x", "folder/00000000.txt": b""}, comment=""))


# damage

KNOWN = build.members((0, b"".join(map(page, range(9)))), style="pmem3", chunk=PAGE, per_bevy=4)
WHOLE = build.zipped(KNOWN)


@pytest.mark.parametrize("cut", [1 + len(build.VOLUME), 300, len(WHOLE) // 2])
def test_a_volume_that_was_cut_off(cut):
    with pytest.raises(FormatError, match="dump: the directory at the end of the zip file"):
        opened(WHOLE[:-cut])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</dev/pmem>", "<<dev/pmem>", "information.turtle is damaged: .*line"),
        ("aff4:category", "aff5:category", "information.turtle is damaged: .*aff5"),
        (
            "aff4:chunkSize 4096",
            "aff4:chunkSize 1099511627776",
            "chunkSize 1099511627776, expected",
        ),
        ("aff4:chunkSize 4096", "aff4:chunkSize 0", "has chunkSize 0, expected from 0x200"),
        ("aff4:chunkSize 4096", "aff4:chunksSize 4096", "has chunkSize nothing, expected"),
        ("aff4:chunksInSegment 4", "aff4:chunksInSegment -4", "has chunksInSegment -4"),
        ("aff4:size 36864", "aff4:size 99999999999999999999999", "has size 9999999"),
        ("a aff4:ImageStream", "a aff4:Stream", "neither describes nor holds the stream"),
    ],
)
def test_metadata_that_cannot_be(old, new, message):
    with pytest.raises(FormatError, match=message):
        opened(changed(KNOWN, "information.turtle", old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("www.ietf.org/rfc/rfc1950.txt", "example.org/brotli", "compressed by https://example.org"),
        ("a aff4:ImageStream", "a aff4:EncryptedStream", "is encrypted"),
        ("a aff4:ImageStream", "a aff4:Map", "refers to another map"),
    ],
)
def test_what_is_not_supported(old, new, message):
    with pytest.raises(UnsupportedError, match=message):
        opened(changed(KNOWN, "information.turtle", old, new))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (build.entry(0, PAGE, 0, 7), "refers to stream 0x7, .*/idx has 0x1"),
        (build.entry(1 << 60, PAGE, 0, 0), "at address 0x1000000000000000"),
        (build.entry((1 << 64) - PAGE, PAGE, 0, 0), "that cannot be"),
        (build.entry(0, PAGE, 1 << 63, 0), "from offset 0x8000000000000000"),
    ],
)
def test_a_map_that_cannot_be(table, message):
    with pytest.raises(FormatError, match=message):
        opened(build.zipped({**KNOWN, "dev/pmem/map": table}))


def test_more_of_a_symbolic_stream_than_any_machine_has():
    with pytest.raises(FormatError, match="has 0x8000000000000 bytes of"):
        opened(build.aff4((0, page(0)), more=((0, 1 << 51, build.ZERO),)))


BEVY, INDEX = "dev/pmem/data/00000001", "dev/pmem/data/00000001.index"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({BEVY: bytes(600)}, "chunk 0x4 of .* cannot be decoded"),
        ({BEVY: KNOWN[BEVY][:9]}, "chunk 0x[4-7] of .* takes .* of a bevy of 0x9"),
        ({INDEX: bytes(48)}, "chunk 0x4 of .* takes 0x0 bytes at 0x0"),
        ({INDEX: struct.pack("<QI", 1 << 62, 9) * 4}, "takes 0x9 bytes at 0x4000000000000000"),
        ({INDEX: struct.pack("<QI", 0, 1 << 31) * 4}, "takes 0x80000000 bytes"),
    ],
)
def test_a_damaged_chunk_is_named_and_the_rest_is_read(change, message):
    memory = opened(build.zipped({**KNOWN, **change})).physical()
    with pytest.raises(FormatError, match=message):
        memory.read(4 * PAGE, 4 * PAGE)
    assert memory.read(0, 4 * PAGE) == b"".join(map(page, range(4)))
    assert memory.read(8 * PAGE, PAGE) == page(8)


def test_an_index_of_pmem_2_that_is_cut_within_an_entry():
    content = build.members((0, page(0)), style="pmem2", chunk=1024)
    content["dev/pmem/data/00000000/index"] = content["dev/pmem/data/00000000/index"][:-1]
    dump = opened(build.zipped(content))
    assert regions(dump) == [(0, 3 * 1024)]
    assert dump.physical().read(0, 3 * 1024) == page(0)[: 3 * 1024]


def test_a_chunk_that_decodes_to_less_or_more():
    for plain, message in ((page(0)[:-1], "decodes to 0xfff bytes"), (page(0) * 9, "0x1001 bytes")):
        packed = build.METHODS["zlib"][1](plain)
        change = {BEVY: packed, INDEX: struct.pack("<QI", 0, len(packed)) * 4}
        memory = opened(build.zipped({**KNOWN, **change})).physical()
        with pytest.raises(FormatError, match=message):
            memory.read(4 * PAGE, 1)


def test_a_damaged_small_member_is_told_by_its_checksum():
    at = WHOLE.index(KNOWN["dev/pmem/map"])
    with pytest.raises(FormatError, match=r"dev/pmem/map is damaged: expected 0x1c bytes of CRC"):
        opened(WHOLE[:at] + b"\x10" + WHOLE[at + 1 :])


def test_a_bevy_that_is_deflated_as_a_whole(tmp_path):
    path = str(tmp_path / "volume")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as volume:
        for name, data in KNOWN.items():
            volume.writestr(name, data)
        volume.comment = build.VOLUME.encode()
    memory = Aff4(FileSource(path)).physical()
    with pytest.raises(UnsupportedError, match="is compressed as a whole"):
        memory.read(0, 1)


def test_claims_of_size_are_checked_before_memory_is_taken(monkeypatch):
    content = {**KNOWN, "information.turtle": KNOWN["information.turtle"] + b"\n" * (9 << 20)}
    with pytest.raises(FormatError, match=r"information\.turtle claims 0x9"):
        opened(build.zipped(content))
    many = {f"file{number:06}": b"" for number in range(400)}
    monkeypatch.setattr(aff4_volume, "_DIRECTORY_LIMIT", 16384)
    with pytest.raises(FormatError, match="a directory of 0x"):
        opened(build.zipped({**KNOWN, **many}))


def read_all(data: bytes) -> None:
    """Everything a command would read of it; any error but ours escapes."""
    try:
        dump = opened(data)
        list(dump.runs())
        memory = dump.physical()
        for region in list(memory.regions())[:20]:
            memory.read(region.start, min(region.size, 1 << 20))
    except KvmError:
        pass


@given(st.data(), st.sampled_from(["standard", "pmem2"]))
@settings(max_examples=400, deadline=None)
def test_any_byte_may_be_damaged(data, style):
    ranges = ((0, page(0)), (0x4000, page(4)))
    volume = bytearray(build.aff4(*ranges, style=style, chunk=1024, per_bevy=3))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(volume) - 1))
        volume[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del volume[data.draw(st.integers(4, len(volume) - 1)) :]
    read_all(bytes(volume))


@given(st.data(), st.sampled_from(["standard", "pmem2"]))
@settings(max_examples=300, deadline=None)
def test_any_member_may_hold_anything(data, style):
    ranges = ((0, page(0)), (0x4000, page(4)))
    content = build.members(*ranges, style=style, chunk=1024, per_bevy=3)
    name = data.draw(st.sampled_from(sorted(content)))
    plain = bytearray(content[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(plain)))
        plain[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    content[name] = bytes(plain)
    read_all(build.zipped(content))
