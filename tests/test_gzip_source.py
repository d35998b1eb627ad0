"""gzip read at any offset: against Python's gzip and zlib, on real cores, whole and damaged."""

from __future__ import annotations

import gzip
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import cache, checkpoints, gzip_source
from kvmtool.errors import FormatError, KvmWarning, TruncatedError
from kvmtool.gzip_source import GzipSource
from kvmtool.inflate import Inflater
from kvmtool.source import BytesSource, FileSource, SliceSource, open_source
from tests import inputs

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_chunks(monkeypatch):
    """The same machinery with chunks of 4 KiB, so that a megabyte is a big file."""
    monkeypatch.setattr(checkpoints, "CHUNK", 4096)


@pytest.fixture
def indexed(monkeypatch):
    """Every stream is big enough for rapidgzip and the cache."""
    pytest.importorskip("rapidgzip", reason="extra kvmtool[gzip] is not installed")
    for bound in ("_INDEX_FROM", "_CACHE_FROM", "_PLAIN_PREFIX"):
        monkeypatch.setattr(gzip_source, bound, 0)


def pages(count: int, seed: int = 7) -> bytes:
    """Bytes that look like memory: pages of zeros, of pointers and of noise."""
    rng = random.Random(seed)
    kinds = (
        lambda: bytes(4096),
        lambda: struct.pack(
            "<512Q", *(0xFFFFFF8000000000 + rng.getrandbits(28) for _ in range(512))
        ),
        lambda: rng.randbytes(4096),
    )
    return b"".join(rng.choice(kinds)() for _ in range(count))


DATA = pages(300)


def member(data: bytes, flags: int = 0, extra: bytes = b"", crc: int = 0, isize: int = 0) -> bytes:
    """A gzip member by RFC 1952; `crc` and `isize` are errors to add to the trailer."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = packer.compress(data) + packer.flush()
    header = struct.pack("<HBBIBB", 0x8B1F, 8, flags, 0, 0, 255) + extra
    return header + body + struct.pack("<II", zlib.crc32(data) ^ crc, (len(data) ^ isize) % 2**32)


def source_of(stream: bytes) -> GzipSource:
    return GzipSource(BytesSource(stream, "core.gz"))


def on_disk(folder, stream: bytes, name: str = "core.gz") -> str:
    path = folder / name
    path.write_bytes(stream)
    return str(path)


def assert_same(source, data: bytes, reads: int = 60) -> None:
    assert source.size == len(data)
    rng = random.Random(1)
    for _ in range(reads):
        off = rng.randrange(len(data))
        size = min(rng.choice((1, 20, 4096, 9000)), len(data) - off)
        assert source.read_at(off, size) == data[off : off + size]
    assert source.read_at(0, len(data)) == data
    assert source.read_at(len(data), 0) == b""


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_real_core_reads_as_python_gzip_decodes_it(dump):
    path = inputs.real(f"dumps/{dump}/core.macho.gz")
    with gzip.open(path) as whole:
        data = whole.read()
    source = open_source(path)
    assert_same(source, data)
    assert not source.truncated
    assert source.problems == ()
    source.close()


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_a_real_core_that_is_cut_off_reads_up_to_the_cut(dump):
    path = inputs.real(f"dumps/{dump}/damaged/core.truncated.macho.gz")
    with open(path, "rb") as file:
        stream = file.read()
    there = zlib.decompressobj(31).decompress(stream)
    with open(inputs.plain_core(dump), "rb") as whole:
        assert whole.read(len(there)) == there
    source = open_source(path)
    assert source.read_at(0, 4096) == there[:4096]
    with pytest.warns(KvmWarning, match=rf"{path}: at offset {len(stream):#x}: .*cut off"):
        assert source.size == len(there)
    assert_same(source, there)
    assert source.truncated
    with pytest.raises(TruncatedError, match=f"expected 0x10 bytes, got 0x{6:x}"):
        source.read_at(len(there) - 6, 16)
    source.close()


def test_reading_the_beginning_does_not_decode_the_rest():
    source = source_of(member(bytes(64 * MIB)))
    assert source.read_at(0, 4096) == bytes(4096)
    assert source._plain.run(0) <= checkpoints.CHUNK


@pytest.mark.parametrize(
    ("flags", "extra"),
    [
        (0x04, b"\5\0extra"),
        (0x08, b"core\0"),
        (0x10, b"a comment\0"),
        (0x1D, b"\2\0xxname\0comment\0"),
        (0x01, b""),
    ],
)
def test_header_fields_are_skipped(flags, extra):
    assert_same(source_of(member(DATA, flags, extra)), DATA, 3)


def test_the_header_crc_is_checked():
    fixed = struct.pack("<HBBIBB", 0x8B1F, 8, 0x0A, 0, 0, 255) + b"name\0"
    good = struct.pack("<H", zlib.crc32(fixed) & 0xFFFF)
    assert source_of(member(DATA, 0x0A, b"name\0" + good)).read_at(0, 9) == DATA[:9]
    with pytest.raises(FormatError, match=r"core.gz: at offset 0xf: gzip header CRC") as caught:
        source_of(member(DATA, 0x0A, b"name\0" + bytes([good[0] ^ 1]) + good[1:]))
    assert caught.value.offset == 15


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"PK\3\4" + bytes(20), "magic"),
        (b"\x1f\x8b\x07" + bytes(20), "method 8, got 0x7"),
        (b"\x1f\x8b\x08\x20" + bytes(20), "flags=0x20"),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (MIB // 2), "longer than"),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"name", "cut off"),
        (b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xffxx", "cut off"),
        (b"\x1f\x8b\x08\x04" + bytes(6), "cut off"),
        (b"\x1f\x8b\x08", "cut off"),
        (b"", "cut off"),
    ],
)
def test_what_is_no_gzip_header_is_refused_at_once(stream, message):
    with pytest.raises(FormatError, match=message):
        source_of(stream)


def test_members_follow_one_another():
    stream = member(DATA) + member(b"") + member(b"tail") + member(DATA[:5000])
    assert_same(source_of(stream), DATA + b"tail" + DATA[:5000])


def test_padding_is_no_part_of_the_stream():
    assert_same(source_of(member(DATA) + bytes(100_000)), DATA, 3)


@pytest.mark.parametrize("rubbish", [b"rubbish", b"\x1f\x8b\x07" + bytes(20)])
def test_what_follows_is_ignored_with_a_word(rubbish):
    stream = member(DATA)
    source = source_of(stream + rubbish)
    with pytest.warns(KvmWarning, match=rf"core.gz: at offset {len(stream):#x}: .*ignored"):
        assert source.size == len(DATA)
    assert not source.truncated


@pytest.mark.parametrize("left", [1, 4, 7])
def test_a_cut_in_the_trailer_loses_nothing_but_is_told(left):
    source = source_of(member(DATA)[: left - 8])
    with pytest.warns(KvmWarning, match="cut off inside its trailer"):
        assert source.size == len(DATA)
    assert_same(source, DATA, 3)
    assert source.truncated


def test_a_cut_in_the_header_of_a_later_member_is_told():
    source = source_of(member(DATA) + member(DATA)[:5])
    with pytest.warns(KvmWarning, match="cut off inside the header"):
        assert source.size == len(DATA)


@pytest.mark.parametrize(
    ("errors", "where", "message"),
    [({"crc": 1}, 8, "CRC-32.*expected 0x"), ({"isize": 1}, 4, "decoded size: expected 0x")],
)
def test_a_wrong_checksum_is_told_and_the_bytes_can_be_read(errors, where, message):
    stream = member(DATA, **errors)
    source = source_of(stream)
    told = rf"core.gz: at offset {len(stream) - where:#x}: {message}"
    with pytest.warns(KvmWarning, match=told):
        assert source.size == len(DATA)
    assert_same(source, DATA, 3)
    assert len(source.problems) == 1


def test_the_size_in_the_trailer_is_not_believed():
    """4 GiB and more: ISIZE is the size modulo 2^32, and here it is simply 0."""
    source = source_of(member(DATA, isize=len(DATA)))
    with pytest.warns(KvmWarning, match="decoded size"):
        assert source.size == len(DATA)


@pytest.mark.parametrize("level", [1, 9])
def test_a_corrupt_stream_reads_exactly_up_to_the_damage(small_chunks, level):
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    sound = packer.compress(DATA) + packer.flush(zlib.Z_FULL_FLUSH)
    stream = member(b"")[:10] + sound + b"\x07" + bytes(50)  # 7: last block, of the forbidden type
    source = source_of(stream)
    with pytest.warns(KvmWarning, match="corrupt .*invalid block type"):
        assert source.size == len(DATA)
    assert_same(source, DATA)
    with pytest.raises(FormatError, match=r"core.gz: at offset 0x\w+: deflate") as caught:
        source.read_at(len(DATA) - 1, 2)
    assert not isinstance(caught.value, TruncatedError)
    assert caught.value.offset == 10 + len(sound)
    assert not source.truncated


@given(st.data())
def test_no_overwritten_byte_changes_the_result_untold(data):
    """Some change nothing: the filling bits of a stored block, a code that is never used."""
    whole = DATA[:60_000]
    stream = bytearray(member(whole))
    at = data.draw(st.integers(12, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    source = source_of(bytes(stream))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        size = source.size
        got = source.read_at(0, size)
        assert len(got) == size
        assert got == whole or source.problems
    assert len(told) == len(source.problems)
    with pytest.raises(FormatError):
        source.read_at(size, 1)


@given(st.data())
def test_any_cut_leaves_a_prefix(data):
    whole = member(DATA[:60_000])
    stream = whole[: data.draw(st.integers(10, len(whole) - 1))]
    expected = zlib.decompressobj(31).decompress(stream)
    source = source_of(stream)
    with pytest.warns(KvmWarning, match="cut off"):
        assert source.size == len(expected)
    assert source.read_at(0, source.size) == expected


def test_states_and_chunks_are_bounded_whatever_is_read(small_chunks):
    data = pages(600, seed=3)
    source = source_of(member(data))
    source._plain = checkpoints.Checkpoints(
        Inflater(BytesSource(member(data)), {}), states=4, chunks=3
    )
    assert_same(source, data)
    assert len(source._plain._states) <= 4
    assert len(source._plain._chunks) <= 3
    assert source._plain._spacing >= len(data) // 8


def test_reading_on_behind_the_frontier_decodes_each_chunk_once(small_chunks, monkeypatch):
    data = pages(600, seed=3)
    source = source_of(member(data))
    source._plain = checkpoints.Checkpoints(
        Inflater(BytesSource(member(data)), {}), states=2, chunks=2
    )
    assert source.size == len(data)
    taken = []
    take = Inflater.take
    monkeypatch.setattr(Inflater, "take", lambda self, size: taken.append(size) or take(self, size))
    for off in range(0, len(data), 4096):
        assert source.read_at(off, 4096) == data[off : off + 4096]
    assert len(taken) <= len(data) // 4096


def test_a_bomb_costs_no_memory():
    source = source_of(member(bytes(128 * MIB)))
    tracemalloc.start()
    try:
        with pytest.raises(TruncatedError):
            source.read_at(0, 1 << 50)
        assert source.size == 128 * MIB
        assert source.read_at(100 * MIB, 16) == bytes(16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB


@pytest.mark.parametrize(("off", "size"), [(-1, 4), (0, -1), (len(DATA), 1), (1 << 70, 1)])
def test_reads_outside_are_refused(off, size):
    with pytest.raises(TruncatedError):
        source_of(member(DATA)).read_at(off, size)


def test_find_crosses_chunks(small_chunks):
    data = bytes(4090) + b"a needle in a stack" + bytes(9000)
    source = source_of(member(data))
    assert source.find(b"needle in", 0, len(data)) == data.find(b"needle in")
    assert source.find(b"needle in", 4093, len(data)) == -1
    assert source.find(b"needle in", 0, 4096) == -1


def test_an_interrupted_read_leaves_the_stream_intact(small_chunks):
    class Interrupted(BytesSource):
        left = 20

        def read_at(self, off, size):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().read_at(off, size)

    source = GzipSource(Interrupted(member(DATA)))
    with pytest.raises(KeyboardInterrupt):
        source.size  # noqa: B018
    assert_same(source, DATA)


def test_threads_read_the_same(small_chunks):
    source = source_of(member(DATA))
    wrong = []

    def reader(seed):
        rng = random.Random(seed)
        for _ in range(100):
            off = rng.randrange(len(DATA) - 5000)
            if source.read_at(off, 5000) != DATA[off : off + 5000]:
                wrong.append(off)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_closed_source_reads_no_more(tmp_path):
    source = open_source(on_disk(tmp_path, member(DATA)))
    assert source.size == len(DATA)
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read_at(0, 1)


def test_rapidgzip_reads_the_same_and_needs_no_second_pass(tmp_path, indexed, monkeypatch):
    path = on_disk(tmp_path, member(DATA))
    for _ in range(2):
        source = open_source(path)
        assert_same(source, DATA)
        assert source._plain.run(0) == 0
        source.close()
        # From here on: an index that had to be built would fail, and zlib as well.
        monkeypatch.setattr("kvmtool.gzip_index._compare_isize", None)
        monkeypatch.setattr(Inflater, "take", None)


def test_a_slice_of_a_file_is_indexed_too(tmp_path, indexed):
    stream = member(DATA)
    path = on_disk(tmp_path, b"before" + stream + b"after")
    for _ in range(2):
        file = FileSource(path)
        source = GzipSource(SliceSource(file, 6, len(stream)), backing=file)
        assert_same(source, DATA)
        assert source._plain.run(0) == 0
        source.close()
        file.close()


def test_a_damaged_index_is_made_anew(tmp_path, indexed, cache_folder):
    path = on_disk(tmp_path, member(DATA))
    source = open_source(path)
    assert_same(source, DATA)
    source.close()
    entries = sorted(cache_folder.iterdir())
    assert [entry.name[:10] for entry in entries] == ["gzip-index", "gzip-size-"]
    for entry in entries:
        content = bytearray(entry.read_bytes())
        content[-1] ^= 0xFF
        entry.write_bytes(content)
    source = open_source(path)
    assert_same(source, DATA)
    source.close()


def test_a_file_that_changed_is_not_read_by_its_old_index(tmp_path, indexed):
    stream = member(DATA)
    path = on_disk(tmp_path, stream)
    source = open_source(path)
    assert source.size == len(DATA)
    source.close()
    middle = len(stream) // 2
    on_disk(tmp_path, stream[:middle] + bytes(8) + stream[middle + 8 :])
    os.utime(path, (1, 1))
    source = open_source(path)
    with pytest.warns(KvmWarning) as told:
        size = source.size
    assert len(source.read_at(0, size)) == size
    assert any("read slowly" in str(warning.message) for warning in told)
    assert source.problems
    source.close()


def test_without_rapidgzip_it_is_slow_and_says_so(tmp_path, indexed, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidgzip", None)
    path = on_disk(tmp_path, member(DATA))
    source = open_source(path)
    with pytest.warns(KvmWarning, match=rf"{path}: .*slowly.*pip install 'kvmtool\[gzip\]'"):
        assert source.read_at(100, 100) == DATA[100:200]
    assert_same(source, DATA)
    source.close()


def test_rapidgzip_is_not_believed_about_streams_that_are_cut(tmp_path, indexed):
    """It takes some of them for complete (its issue 71), so every cut must be noticed here."""
    whole = member(DATA)
    rng = random.Random(2)
    for _ in range(25):
        stream = whole[: rng.randrange(1000, len(whole) - 1)]
        source = open_source(on_disk(tmp_path, stream))
        with pytest.warns(KvmWarning) as told:
            assert source.truncated
        assert "rapidgzip cannot read it" in str(told[0].message)
        assert "cut off" in str(told[1].message)
        assert source.read_at(0, source.size) == zlib.decompressobj(31).decompress(stream)
        source.close()


@pytest.mark.parametrize(
    ("stream", "data"),
    [(member(DATA) + bytes(4096), DATA), (member(DATA) + member(b"tail"), DATA + b"tail")],
    ids=["padding", "members"],
)
def test_what_rapidgzip_cannot_vouch_for_is_read_by_zlib(tmp_path, indexed, stream, data):
    source = open_source(on_disk(tmp_path, stream))
    with pytest.warns(KvmWarning, match="rapidgzip cannot read it"):
        assert source.size == len(data)
    assert_same(source, data)
    assert source.problems == ()
    source.close()


def test_rapidgzip_failing_later_is_told_and_made_good(tmp_path, indexed, monkeypatch):
    source = open_source(on_disk(tmp_path, member(DATA)))
    assert source.size == len(DATA)

    class Failing:
        def seek(self, off):
            raise RuntimeError("no more")

    monkeypatch.setattr(source._indexed, "_file", Failing())
    with pytest.warns(KvmWarning, match="rapidgzip cannot read it"):
        assert source.read_at(5, 5) == DATA[5:10]
    assert_same(source, DATA)
    source.close()


def test_an_unclosed_source_does_not_abort_the_interpreter(tmp_path, indexed):
    path = on_disk(tmp_path, member(DATA))
    script = (
        "import sys; from kvmtool import gzip_source; from kvmtool.source import open_source\n"
        "gzip_source._INDEX_FROM = 0; keep = open_source(sys.argv[1]); print(keep.size)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{len(DATA)}\n", "")


def test_the_decoded_size_of_sound_streams_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gzip_source, "_CACHE_FROM", 0)
    path = on_disk(tmp_path, member(DATA))
    for decoded in (len(DATA), 0):
        source = open_source(path)
        assert source.size == len(DATA)
        assert source._plain.run(0) == decoded
        source.close()


def test_a_cached_size_that_is_wrong_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gzip_source, "_CACHE_FROM", 0)
    source = open_source(on_disk(tmp_path, member(DATA)))
    cache.store("gzip-size", source._fingerprint(), (10 * len(DATA)).to_bytes(8, "little"))
    assert source.size == 10 * len(DATA)
    with pytest.raises(TruncatedError):
        source.read_at(len(DATA), 1)
    assert source.size == len(DATA)
    source.close()
