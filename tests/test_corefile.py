"""On-disk corefiles: a real one, built ones of every version, hostile ones; and Apple's LZ4."""

from __future__ import annotations

import gzip
import io
import random
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool import checkpoints, lz4_source
from kvmtool.errors import FormatError, KvmWarning, TruncatedError, UnsupportedError
from kvmtool.formats.corefile import Corefile, CorefileMember
from kvmtool.lz4_source import Lz4Source, decode_block
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders.corefile import (
    AEA,
    LZ4,
    PAGE,
    ZLIB,
    Member,
    boss_mac,
    gzip_member,
    lz4_frame,
    rad_mac,
    sad_mac,
)

LOG = b'panic(cpu 0 caller 0xffffff800048d3f0): "a test"\n\0\0\0'
TEXT = LOG.rstrip(b"\0")


def memory(pages: int, seed: int = 5) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(8) for _ in range(60)]
    return b"".join(
        rng.randbytes(4096) if rng.random() < 0.2 else b"".join(rng.choices(words, k=512))
        for _ in range(pages)
    )


CORE = memory(120)


def corefile(content: bytes) -> Corefile:
    return Corefile(BytesSource(content, "corefile"))


@pytest.fixture
def real():
    source = FileSource(inputs.real("machine/armc.corefile"))
    yield source
    source.close()


def test_the_real_one_lists_what_its_header_says(real):
    assert Corefile.probe(real.read_at(0, 65536))
    core = Corefile(real)
    assert core.version == 1
    assert (core.log_offset, core.log_length) == (0x1000, 0x897)
    assert core.members == (CorefileMember("kernel", 0x6000, real.size - 0x6000, "gzip"),)
    assert core.kernel_member() is core.members[0]


def test_the_real_panic_log_is_read(real):
    log = Corefile(real).log()
    assert log.startswith(b'panic(cpu 0 caller 0xfffffff0079493d0): "IOFindBSDRoot: specified root')
    banner = inputs.oracle("armc")["symbols"]["_version"]["value"]
    assert banner.encode() in log
    assert b"Writing local cores..." in log
    assert not log.endswith(b"\0")


def test_the_real_core_is_what_gzip_decodes(real):
    with open(real.name, "rb") as file:
        file.seek(0x6000)
        with gzip.open(io.BytesIO(file.read())) as member:
            data = member.read()
    core = Corefile(real)
    source = core.open_member(core.kernel_member())
    assert source.read_at(0, 4096) == data[:4096]
    assert source.size == len(data)
    rng = random.Random(1)
    for off in (rng.randrange(len(data) - 5000) for _ in range(40)):
        assert source.read_at(off, 5000) == data[off : off + 5000]
    magic, cputype, _, filetype = struct.unpack("<4I", source.read_at(0, 16))
    assert (magic, cputype, filetype) == (0xFEEDFACF, 0x0100000C, 4)  # 64-bit, arm64, MH_CORE
    source.close()


def test_the_real_core_holds_what_the_oracle_read_from_memory(real):
    """A value the oracle found in RAM lies in the core where its own load commands put it."""
    core = Corefile(real)
    source = core.open_member(core.kernel_member())
    ncmds, sizeofcmds = struct.unpack("<2I", source.read_at(16, 8))
    commands = source.read_at(32, sizeofcmds)
    version = inputs.oracle("armc")["symbols"]["_version"]
    address, at = int(version["addr"], 16), 0
    for _ in range(ncmds):
        cmd, cmdsize = struct.unpack_from("<2I", commands, at)
        if cmd == 0x19:  # LC_SEGMENT_64
            vmaddr, vmsize, fileoff = struct.unpack_from("<3Q", commands, at + 24)
            if vmaddr <= address < vmaddr + vmsize:
                value = version["value"].encode()
                assert source.read_at(fileoff + address - vmaddr, len(value)) == value
                break
        at += cmdsize
    else:
        pytest.fail("no segment holds _version")
    source.close()


def check(core: Corefile, version: int, stage: str) -> None:
    assert core.version == version
    assert core.log() == TEXT
    member = core.kernel_member()
    assert (member.name, member.stage) == ("kernel", stage)
    source = core.open_member(member)
    assert source.size == len(CORE)
    assert source.read_at(0, len(CORE)) == CORE
    assert source.name == "corefile(kernel)"


def test_version_0_has_one_core():
    check(corefile(sad_mac(LOG, gzip_member(CORE))), 0, "gzip")
    check(corefile(sad_mac(LOG, CORE)), 0, "stored")  # the kernel was told not to compress


def test_version_1_has_several():
    others = [Member(b"panic_stackshot.", gzip_member(b"kcdata")), Member(b"SEP-cp", b"secret")]
    core = corefile(rad_mac(LOG, [*others, Member(b"kernel", gzip_member(CORE))]))
    check(core, 1, "gzip")
    assert [member.name for member in core.members] == ["panic_stackshot.", "SEP-cp", "kernel"]
    assert core.open_member(core.members[0]).read_at(0, 6) == b"kcdata"
    assert core.open_member(core.members[1]).read_at(0, 6) == b"secret"


@pytest.mark.parametrize(
    ("flags", "stage", "pack"),
    [(0, "stored", bytes), (ZLIB, "gzip", gzip_member), (LZ4, "lz4", lz4_frame)],
)
def test_version_2_says_how_each_member_is_stored(flags, stage, pack):
    if stage == "lz4":
        pytest.importorskip("lz4.block", reason="extra kvmtool[lz4] is not installed")
    region = Member(b"panic_region", b"region")
    core = corefile(boss_mac(LOG, [region, Member(b"kernel", pack(CORE), flags)], key=(4096, 65)))
    check(core, 2, stage)
    assert core.kernel_member().flags == flags


def test_what_is_encrypted_is_refused_with_a_clear_line():
    sealed = Member(b"kernel", b"AEA1" + bytes(90), AEA | LZ4)
    core = corefile(boss_mac(LOG, [sealed, Member(b"SEP-cp", b"open")], flags=1))
    assert core.kernel_member().stage == "aea"
    with pytest.raises(UnsupportedError, match=r"^corefile: member 'kernel' is encrypted .*key"):
        core.open_member(core.kernel_member())
    with pytest.raises(UnsupportedError, match=r"^corefile: the panic log is encrypted"):
        core.log()
    assert core.open_member(core.members[1]).read_at(0, 4) == b"open"


def test_flags_of_the_future_are_not_guessed_at():
    core = corefile(boss_mac(LOG, [Member(b"kernel", CORE, 1 << 10)]))
    with pytest.raises(UnsupportedError, match="unknown flags 0x400"):
        core.open_member(core.kernel_member())


def test_a_file_with_nothing_but_a_log_is_a_corefile():
    empty = struct.pack("<8sQQQQ", b"Sad Mac\0", PAGE, len(LOG), 0, 0).ljust(PAGE, b"\0") + LOG
    for content in (empty, rad_mac(LOG, []), boss_mac(LOG, [])):
        core = corefile(content)
        assert core.members == ()
        assert core.log() == TEXT
        with pytest.raises(FormatError, match="expected a member 'kernel', got no member at all"):
            core.kernel_member()


def test_without_a_kernel_the_message_lists_what_is_there():
    core = corefile(rad_mac(b"", [Member(b"SEP-cp", b"x"), Member(b"\x1b[2J\xff", b"y")]))
    assert core.log() == b""
    with pytest.raises(FormatError) as caught:
        core.kernel_member()
    assert "'SEP-cp', '\\\\x1b[2J\\\\xff'" in str(caught.value)


def sealed_in(version: int, **lies: int) -> bytes:
    member = Member(b"kernel", b"stored", **lies)
    return rad_mac(LOG, [member]) if version == 1 else boss_mac(LOG, [member])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("lies", "message"),
    [
        ({"offset": 1 << 63}, "ends at 0x8000000000000006, the file at 0x"),
        ({"length": 1 << 40}, "ends at 0x100000"),
        ({"length": 7}, "the file at"),
        ({"length": 0}, "has no bytes"),
        ({"offset": 16}, "lies over the header"),
        ({"offset": 3 * PAGE + 4, "length": 1}, "lies over"),
    ],
)
def test_places_that_cannot_be_are_refused(version, lies, message):
    content = sealed_in(version, **lies)
    if version == 1 and lies.get("offset") == 3 * PAGE + 4:
        content = sealed_in(version, offset=PAGE + 4, length=1)
    with pytest.raises(FormatError, match=message) as caught:
        corefile(content)
    assert caught.value.offset == (32 if version == 1 else 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rad_mac(LOG, [], count=17), "at most 16 members, got 17"),
        (rad_mac(LOG, [], count=1 << 60), "at most 16"),
        (boss_mac(LOG, [], count=65), "at most 64 members, got 65"),
        (boss_mac(LOG, [], version=3), "version: expected 0x2, got 0x3"),
        (boss_mac(LOG, [], key=(1 << 50, 65)), "public key ends at"),
        (boss_mac(LOG, [Member(b"kernel", b"x", ZLIB | LZ4)]), "both zlib and LZ4"),
        (sad_mac(LOG, b"x")[:24] + struct.pack("<QQ", 0, 5), "lies over the header"),
        (sad_mac(LOG, b"x")[:24] + struct.pack("<QQ", PAGE, 0), "has no bytes"),
        (rad_mac(LOG, [])[:PAGE], "panic log ends at"),
        (rad_mac(LOG, [])[:16], "cut off"),
        (b"Rad Mac\0" + struct.pack("<QQQ", 32, 65 << 20, 0), "panic log: expected 0x4000000"),
        (b"Mad Mac\0" + bytes(600), "Sad, Rad or Boss Mac"),
        (b"", "signature"),
    ],
)
def test_headers_that_cannot_be_are_refused(content, message):
    with pytest.raises(FormatError, match=message):
        corefile(content)


def test_two_members_in_one_place_are_refused():
    twice = [Member(b"kernel", b"x" * 10), Member(b"SEP-cp", b"y" * 10, offset=2 * PAGE + 3)]
    with pytest.raises(FormatError, match="'SEP-cp' at 0x2003 lies over the member 'kernel'"):
        corefile(rad_mac(LOG, twice))


@given(st.binary(max_size=700), st.sampled_from([b"Sad Mac\0", b"Rad Mac\0", b"Boss Mac"]))
def test_rubbish_is_an_error_or_a_corefile_that_can_be_read(rubbish, signature):
    try:
        core = corefile(signature + rubbish)
    except FormatError:
        return
    if not core.flags & 1:
        assert len(core.log()) <= core.log_length
    for member in core.members:
        assert member.offset + member.length <= 8 + len(rubbish)


def test_probe_looks_at_the_signature():
    assert Corefile.probe(b"Boss Mac")
    assert not Corefile.probe(b"Boss Ma")
    assert not Corefile.probe(b"\xcf\xfa\xed\xfe" + bytes(60))


# Apple's LZ4


@pytest.fixture(params=["lz4", "python"])
def decoder(request, monkeypatch):
    """Both decoders pass the same tests."""
    pytest.importorskip("lz4.block", reason="extra kvmtool[lz4] is not installed")
    if request.param == "python":
        monkeypatch.setattr(lz4_source, "_decoder", lambda _: decode_block)


def lz4_of(frame: bytes) -> Lz4Source:
    return Lz4Source(BytesSource(frame, "corefile(kernel)"))


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("block", [4096, 65536, 100_000, 1 << 20])
def test_lz4_reads_anywhere(decoder, monkeypatch, block, linked):
    monkeypatch.setattr(checkpoints, "CHUNK", 10_000)
    source = lz4_of(lz4_frame(CORE, block, linked) + b"padding")
    assert source.size == len(CORE)
    assert not source.truncated
    rng = random.Random(1)
    for off in (rng.randrange(len(CORE) - 5000) for _ in range(40)):
        assert source.read_at(off, 5000) == CORE[off : off + 5000]
    assert source.read_at(0, len(CORE)) == CORE
    assert source.find(CORE[70_000:70_100], 0, len(CORE)) == CORE.find(CORE[70_000:70_100])
    with pytest.raises(TruncatedError):
        source.read_at(len(CORE), 1)
    with pytest.raises(TruncatedError):
        source.read_at(-1, 1)


def test_a_linked_block_is_not_readable_alone(decoder):
    """That is: the frames of these tests do put the window to use."""
    frame = lz4_frame(CORE[:4096] * 2, 4096)
    second = frame.index(b"bv41", 4)
    source = lz4_of(frame[second:])
    with pytest.raises(FormatError, match="LZ4 block is corrupt"):
        source.read_at(0, 4096)


@pytest.mark.parametrize("end", [b"", b"bv", b"bv41\0\0", b"bv4-\0\1\0\0"])
def test_a_frame_that_is_cut_off_reads_up_to_the_cut(decoder, end):
    frame = lz4_frame(CORE, end=end)
    source = lz4_of(frame)
    with pytest.warns(KvmWarning, match=r"corefile\(kernel\): at offset .*cut off"):
        assert source.size == len(CORE)
    assert source.truncated
    assert source.read_at(0, len(CORE)) == CORE
    with pytest.raises(TruncatedError):
        source.read_at(len(CORE) - 1, 2)


def test_a_cut_inside_a_block_loses_that_block(decoder):
    frame = lz4_frame(CORE)
    source = lz4_of(frame[:-9])
    with pytest.warns(KvmWarning, match="cut off"):
        assert source.size == len(CORE) - len(CORE) % 65536
    assert source.read_at(source.size - 9, 9) == CORE[source.size - 9 : source.size]


def test_a_corrupt_block_ends_what_can_be_read(decoder, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHUNK", 4096)
    sound = lz4_frame(CORE[: 2 * 4096], 4096, end=b"")
    literals = b"\xf0\x05" + bytes(20)  # a block of 20 literal bytes, which claims to be 4096
    corrupt = b"bv41" + struct.pack("<II", 4096, len(literals)) + literals
    source = lz4_of(sound + corrupt + lz4_frame(CORE, 4096))
    assert source.size == 3 * 4096 + len(CORE)
    assert source.read_at(0, 2 * 4096) == CORE[: 2 * 4096]
    for off in (2 * 4096 - 1, 2 * 4096, source.size - 2):
        with pytest.raises(FormatError, match=r"corefile\(kernel\): at .* is corrupt") as caught:
            source.read_at(off, 2)
        assert caught.value.offset == len(sound)
    assert source.read_at(4096, 4096) == CORE[4096 : 2 * 4096]


def test_rubbish_between_blocks_ends_what_can_be_read(decoder):
    sound = lz4_frame(CORE, end=b"")
    source = lz4_of(sound + b"no block at all")
    with pytest.warns(KvmWarning, match=r"corefile\(kernel\): at offset .*expected magic"):
        assert source.size == len(CORE)
    assert source.read_at(0, len(CORE)) == CORE
    assert not source.truncated
    with pytest.raises(FormatError, match="expected magic") as caught:
        source.read_at(len(CORE) - 1, 2)
    assert caught.value.offset == len(sound)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"bv4-\0\0\0\0bv4$", "0x0 bytes cannot decode to 0x0"),
        (b"bv41" + struct.pack("<II", 0, 4) + b"abcdbv4$", "0x4 bytes cannot decode to 0x0"),
        (b"bv41" + struct.pack("<II", 1 << 20, 4) + b"abcdbv4$", "cannot decode to 0x100000"),
        (b"bv4-" + struct.pack("<I", 65 << 20) + bytes(99), "cannot decode to 0x4100000"),
        (b"bv42" + bytes(90), r"expected magic bv4\., got 62763432"),
        (b"bvx2" + bytes(90), "expected magic"),
        (b"bv41" + struct.pack("<II", 400, 4000) + bytes(90), "expected 0xfa0 bytes, got 0x5a"),
        (b"bv", "LZ4 block header"),
        (b"", "LZ4 block header"),
    ],
)
def test_no_frame_is_refused_at_once(frame, message):
    with pytest.raises(FormatError, match=message):
        lz4_of(frame)


def test_an_empty_frame_is_empty(decoder):
    assert lz4_of(b"bv4$").size == 0


def test_without_the_package_it_is_slow_and_says_so(monkeypatch):
    frame = lz4_frame(CORE)
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    source = lz4_of(frame)
    assert source.size == len(CORE)
    with pytest.warns(
        KvmWarning, match=r"corefile\(kernel\): .*slowly.*pip install 'kvmtool\[lz4\]"
    ):
        assert source.read_at(0, len(CORE)) == CORE


@given(st.data())
def test_the_python_decoder_agrees_with_the_library(data):
    block = pytest.importorskip("lz4.block")
    window = data.draw(st.binary(max_size=50))
    alphabet = st.sampled_from([0, 1, 255])
    plain = bytes(data.draw(st.lists(alphabet, max_size=400))) * data.draw(st.integers(1, 40))
    packed = bytearray(block.compress(plain, store_size=False, dict=window))
    assert decode_block(bytes(packed), len(plain), window) == plain
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        expected = block.decompress(bytes(packed), uncompressed_size=len(plain), dict=window)
        got = decode_block(bytes(packed), len(plain), window)
    except (block.LZ4BlockError, ValueError):
        return  # the library minds how a block ends, we that it has exactly the size it claims
    assert got == expected
