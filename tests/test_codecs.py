"""Each codec by itself: golden streams, a second implementation, damage, bombs."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtool.errors import FormatError, KvmWarning, TruncatedError, UnsupportedError
from kvmtool.peel import codecs, comp, layer, lzfse_stream, lzss, peel
from kvmtool.source import BytesSource
from tests import inputs
from tests.builders import peel as build

MIB = 1 << 20


def kernel(size: int = MIB) -> bytes:
    """Bytes out of the middle of a real kernel: tables, strings, runs of zeros."""
    with open(inputs.real("machine/x86_64-xnu-2422.115.4.mach_kernel"), "rb") as file:
        file.seek(8 * MIB)
        return file.read(size)


def noise(size: int) -> bytes:
    return random.Random(11).randbytes(size)


def unlzss(packed: bytes, size: int) -> bytes:
    return b"".join(lzss.decode(BytesSource(packed), 0, len(packed), size))


def unlzfse(stream: bytes) -> bytes:
    return b"".join(lzfse_stream.decode(BytesSource(stream, "kc")))


def general(stream: bytes) -> bytes:
    source = BytesSource(stream, "kc")
    return b"".join(codecs.open_layer(source).decode())


# LZSS


def test_lzss_by_hand():
    literals = b"\xffabcdefgh"
    assert unlzss(literals, 8) == b"abcdefgh"
    assert unlzss(literals, 3) == b"abc"  # no byte more than asked for
    # the ring begins as spaces, and writing at place 0xfee
    assert unlzss(b"\x00\x00\x0f", 18) == b" " * 18
    # a match that overlaps what it writes: one a, then eight from the place of that a
    assert unlzss(b"\x01a\xee\xf5", 9) == b"a" * 9
    # ... and two letters over and over
    assert unlzss(b"\x03ab\xee\xf4", 9) == b"ababababa"
    # a match that reads the place it has just written
    assert unlzss(b"\x00\xed\xf0", 3) == b"   "
    # the 18 places from the first on are unset: zeros, as if the ring were static
    assert unlzss(b"\x00\xef\xf0", 3) == bytes(3)


@pytest.mark.parametrize("cut", range(1, 6))
def test_lzss_ends_with_the_last_whole_item(cut):
    stream = b"\x05a\x00\x0fb"  # flags: literal, match, literal; then the end
    whole = b"a" + b" " * 18 + b"b"
    items = {1: 0, 2: 1, 3: 1, 4: 19, 5: 20}
    assert unlzss(stream[:cut], 100) == whole[: items[cut]]


@pytest.mark.parametrize("size", [0, 1, 17, 4096, 4097, MIB + 5])
def test_lzss_gives_back_what_was_packed(size):
    data = (noise(300_000) + bytes(300_000) + kernel(MIB))[:size]
    assert unlzss(build.lzss(data), len(data)) == data


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"bc", b" " * 20, b"xyz" * 9, bytes(40)]), max_size=60))
def test_lzss_gives_back_any_bytes(pieces):
    data = b"".join(pieces)
    assert unlzss(build.lzss(data), len(data)) == data


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000))
def test_lzss_of_anything_is_bounded(packed, size):
    decoded = unlzss(packed, size)
    assert len(decoded) <= min(size, len(packed) * lzss.RATIO)
    assert unlzss(packed + b"\xff", size)[: len(decoded)] == decoded


def test_lzss_agrees_with_a_second_implementation():
    library = pytest.importorskip("lzss", reason="pylzss is not installed")
    data = kernel(256 << 10) + noise(5000)
    packed = library.compress(data)
    assert unlzss(packed, len(data)) == data
    assert library.decompress(build.lzss(data))[: len(data)] == data
    rng = random.Random(3)
    for _ in range(50):  # and on nonsense
        packed = rng.randbytes(rng.randrange(1, 5000))
        theirs = library.decompress(packed)
        assert unlzss(packed, len(theirs) + 1000) == theirs


# LZFSE and LZVN

GOLDEN = {
    "lzfse-512000.bin": (512000, "5a19ff4810ff3314"),
    "lzfse-102400.bin": (102400, "9350241f24d44e43"),
    "lzvn-1165.bin": (1165, "43474726723791cf"),
    "lzvn-1071.bin": (1071, "6bebc945a7a5f6b6"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_streams(name):
    build.package()
    with open(inputs.real(f"codecs/{name}"), "rb") as file:
        stream = file.read()
    size, digest = GOLDEN[name]
    decoded = unlzfse(stream)
    assert len(decoded) == size
    assert hashlib.sha256(decoded).hexdigest().startswith(digest)
    peeled = peel(BytesSource(stream, name))
    assert peeled.source.read_at(0, peeled.source.size) == decoded
    assert [found.name for found in peeled.layers] == ["LZFSE"]
    peeled.source.close()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_streams_by_the_reference_tool(name):
    tool = shutil.which("lzfse")
    if tool is None:
        pytest.skip("the tool lzfse is not installed")
    build.package()
    path = inputs.real(f"codecs/{name}")
    done = subprocess.run([tool, "-decode", "-i", path], capture_output=True, check=True)
    with open(path, "rb") as file:
        assert unlzfse(file.read()) == done.stdout


MAKERS = {
    "bvx2": build.lzfse,
    "bvx1": build.lzfse_plain_tables,
    "bvx-": build.lzfse_stored,
}


@pytest.mark.parametrize("magic", MAKERS)
def test_every_kind_of_block(magic):
    data = kernel(MIB) + bytes(300_000) + kernel(MIB)[:100_000]
    stream = MAKERS[magic](data)
    assert stream.startswith(magic.encode())
    found = [block.name for block in lzfse_stream.blocks(BytesSource(stream))]
    assert len(found) > 3
    assert set(found) == {f"LZFSE block {magic}"}
    assert unlzfse(stream) == data


def test_blocks_refer_back_into_others_of_any_kind():
    tail = kernel(3000)
    alone = build.lzfse(tail)
    assert alone.startswith(b"bvxn")
    head = build.lzfse_stored(tail + noise(100))[:-4] + build.lzfse_plain_tables(kernel(MIB))[:-4]
    assert unlzfse(head + alone) == tail + noise(100) + kernel(MIB) + tail


def test_the_furthest_match_is_in_the_window():
    # 262139 is the largest distance of LZFSE: bytes that far back, found again
    data = noise(262_139) + noise(262_139)
    stream = build.lzfse(data)
    assert len(stream) < len(data) * 3 // 4  # the second half was found in the first
    assert unlzfse(stream) == data


def test_lzvn_without_a_header():
    data = kernel(100_000) + noise(5000)
    packed = build.lzvn(data)
    source = BytesSource(packed)
    pieces = lzfse_stream.decode_lzvn(source, 0, len(packed), len(data))
    assert b"".join(pieces) == data


def lzfse_error(stream: bytes, kind: type[FormatError] = FormatError) -> FormatError:
    build.package()
    with pytest.raises(kind) as caught:
        unlzfse(stream)
    assert caught.value.source == "kc"
    return caught.value


def test_lzfse_that_is_cut_off_names_the_block():
    stream = build.lzfse(kernel(MIB))
    cuts = [block.off for block in lzfse_stream.blocks(BytesSource(stream))]
    error = lzfse_error(stream[: cuts[2] + 500], TruncatedError)
    assert error.offset == cuts[2]
    assert lzfse_error(stream[:-4], TruncatedError).offset == len(stream) - 4
    assert lzfse_error(stream[:-2], TruncatedError).offset == len(stream) - 4
    assert lzfse_error(stream[:-4] + b"bvxz").offset == len(stream) - 4


def test_lzfse_claims_are_checked_before_they_are_believed():
    data = kernel(MIB)
    stream = bytearray(build.lzfse(data))
    stream[4:8] = struct.pack("<I", 0x7FFFFFFF)
    error = lzfse_error(bytes(stream))
    assert (error.offset, "n_raw_bytes 0x7fffffff, expected 0x1 to" in str(error)) == (4, True)
    stream[4:8] = struct.pack("<I", 1000)  # it makes more of itself than it says
    assert "bvx2: expected 0x3e8 bytes, got 0x" in str(lzfse_error(bytes(stream)))
    empty = struct.pack("<4sI", b"bvx-", 0) + bytes(stream)
    assert "n_raw_bytes 0x0" in str(lzfse_error(empty))
    backwards = struct.pack("<4sI3Q", b"bvx2", 5, 0, 0, 0) + bytes(100)
    assert "size 0x0, expected 0x20" in str(lzfse_error(backwards))


@pytest.mark.parametrize("lead", [b"", b"\x0e\x16", build.lzvn_literals(b"x" * 600)])
def test_lzvn_must_not_begin_with_the_distance_before(lead):
    # the package would give out 271 bytes of memory that nobody has written
    packed = lead + b"\xf0\xff" + build.LZVN_END
    size = 271 + 600 * (len(lead) > 2)
    stream = struct.pack("<4s2I", b"bvxn", size, len(packed)) + packed + b"bvx$"
    assert len(build.package().decompress(stream)) == size
    error = lzfse_error(stream)
    assert "bvxn: is corrupt (a match without a distance)" in str(error)
    error = comp_error(build.comp("lzvn", packed, bytes(size)))
    assert (error.offset, "a match without a distance" in str(error)) == (0x180, True)


def test_the_sum_of_all_blocks_is_limited(monkeypatch):
    monkeypatch.setattr(lzfse_stream, "LIMIT", 2 * MIB)
    stream = build.lzfse(bytes(2 * MIB + 1))
    assert "claims 0x200001 decoded bytes, expected at most 0x200000" in str(lzfse_error(stream))


def test_the_number_of_blocks_is_limited(monkeypatch):
    monkeypatch.setattr(lzfse_stream, "_MAX_BLOCKS", 10)
    assert unlzfse(build.lzfse_stored(noise(900), 100)) == noise(900)
    assert "more than 0xa blocks" in str(lzfse_error(build.lzfse_stored(noise(1100), 100)))


def test_what_follows_the_end_mark_is_left_alone():
    data = kernel(5000)
    assert unlzfse(build.lzfse(data) + noise(100)) == data


def test_codecs_that_are_not_installed_are_named(monkeypatch):
    stream, raw = build.lzfse(kernel(100_000)), kernel(5000)
    lzvn, zstd = build.comp("lzvn", build.lzvn(raw), raw), build.zstd(raw)
    for module in ("lzfse", "backports", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    hint = r"kc: is packed with {} .*pip install 'kvmtool\[kernelcache\]'"
    for data, name in ((stream, "LZFSE or LZVN"), (lzvn, "LZFSE or LZVN"), (zstd, "zstd")):
        with pytest.raises(UnsupportedError, match=hint.format(name)):
            peel(BytesSource(data, "kc"))


# comp


def comp_error(image: bytes, kind: type[FormatError] = FormatError) -> FormatError:
    with pytest.raises(kind) as caught:
        peel(BytesSource(image, "kc"))
    return caught.value


def test_comp_sizes_and_sum_are_checked():
    raw = kernel(10_000)
    packed = build.lzss(raw)
    error = comp_error(build.comp("lzss", packed, raw, adler=1))
    assert (error.offset, f"expected 0x1, got {zlib.adler32(raw):#x}" in str(error)) == (8, True)
    error = comp_error(build.comp("lzss", packed, raw, size=len(packed) * 9 + 1))
    assert (error.offset, "are said to decode to" in str(error)) == (0xC, True)
    error = comp_error(build.comp("lzss", packed, raw, size=len(raw) + 1))
    assert "expected 0x2711 decoded bytes, got 0x2710" in str(error)
    error = comp_error(build.comp("lzss", packed, raw)[:-1], TruncatedError)
    assert (error.offset, error.wanted) == (0x180, len(packed))
    assert comp_error(b"complzss" + bytes(100), TruncatedError).offset == 0


def test_comp_is_limited(monkeypatch):
    monkeypatch.setattr(comp, "_MAX_DECODED", 9999)
    raw = kernel(10_000)
    for kind in ("lzss", "lzvn"):
        error = comp_error(build.comp(kind, bytes(10_000), raw))
        assert "are said to decode to 0x2710, expected at most 0x270f" in str(error)


def test_comp_lzvn_that_says_less_than_it_holds_is_refused():
    build.package()
    raw = kernel(10_000)
    packed = build.lzvn(raw)
    for size in (len(raw) - 1, len(raw) + 1):
        error = comp_error(build.comp("lzvn", packed, raw, size=size))
        assert (error.offset, "LZVN data: is corrupt" in str(error)) == (0x180, True)


def test_comp_of_nothing_is_nothing():
    peeled = peel(BytesSource(build.comp("lzss", b"", b""), "kc"))
    assert peeled.source.size == 0
    peeled.source.close()


# gzip, xz, zstd

PACKERS = {"gzip": build.gzip, "xz": build.xz, "zstd": build.zstd}


@pytest.mark.parametrize("name", PACKERS)
def test_general_packers(name):
    data = kernel(3 * MIB) + bytes(5 * MIB) + noise(1000)
    assert general(PACKERS[name](data)) == data
    assert general(PACKERS[name](b"")) == b""


@pytest.mark.parametrize("name", PACKERS)
def test_streams_in_a_row_with_padding(name):
    stream = PACKERS[name](b"one") + bytes(4) + PACKERS[name](b"two") + bytes(100_000)
    assert general(stream) == b"onetwo"


@pytest.mark.parametrize("name", PACKERS)
def test_other_bytes_behind_a_stream_are_told(name):
    stream = PACKERS[name](b"one")
    with pytest.warns(KvmWarning, match=f"kc: at offset {len(stream):#x}: what follows the {name}"):
        assert general(stream + b"rest") == b"one"


@pytest.mark.parametrize("name", PACKERS)
def test_streams_cut_off_or_damaged(name):
    stream = PACKERS[name](kernel(MIB))
    with pytest.raises(TruncatedError, match=f"kc: .*{name} stream") as caught:
        general(stream[:-100])
    assert caught.value.offset == len(stream) - 100
    damaged = stream[:100_000] + b"\xa5" * 100 + stream[100_100:]
    with pytest.raises(FormatError, match=f"kc: at offset .*{name} stream is corrupt"):
        general(damaged)


@pytest.mark.parametrize("name", PACKERS)
def test_the_number_of_streams_is_limited(name, monkeypatch):
    monkeypatch.setattr(codecs, "_MAX_MEMBERS", 5)
    assert general(PACKERS[name](b"one") * 5) == b"one" * 5
    with pytest.raises(FormatError, match=f"more than 0x5 {name} streams"):
        general(PACKERS[name](b"one") * 6)


@pytest.mark.parametrize("name", PACKERS)
def test_bombs_are_refused(name, monkeypatch):
    monkeypatch.setattr("kvmtool.peel.unwrap.LIMIT", 8 * MIB)
    stream = PACKERS[name](bytes(8 * MIB))
    peeled = peel(BytesSource(stream, "kc"))
    assert peeled.source.size == 8 * MIB
    peeled.source.close()
    bomb = PACKERS[name](bytes(8 * MIB + 1))
    with pytest.raises(FormatError, match=f"kc: at offset 0x0: {name}: decodes to more than"):
        peel(BytesSource(bomb, "kc"))
    nested = PACKERS[name](PACKERS[name](bytes(4 * MIB)) + bytes(4 * MIB))
    with pytest.raises(FormatError, match=rf"kc \({name}\): .* decodes to more than"):
        peel(BytesSource(nested, "kc"))


def test_decoders_may_not_ask_for_much_memory():
    stream = bytearray(build.xz(b"one"))
    assert stream[14:16] == b"\x21\x01"  # LZMA2, and one byte that is the size of its dictionary
    stream[16] = 38  # 2 GiB
    end = 12 + 4 * stream[12]
    stream[end : end + 4] = struct.pack("<I", zlib.crc32(stream[12:end]))
    with pytest.raises(FormatError, match=r"xz stream is corrupt \(Memory usage limit exceeded\)"):
        general(bytes(stream))


def test_limits_fit_together():
    assert comp._MAX_DECODED <= layer.LIMIT
    assert lzfse_stream._MAX_LZVN <= layer.LIMIT
    assert lzfse_stream._MAX_BLOCKS * 40_000 >= layer.LIMIT
