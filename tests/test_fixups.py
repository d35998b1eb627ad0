"""Pointers on disk: words by hand, whole kernels against themselves, and damage of every kind."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

import pytest

from kvmtool import fixups as fixups_module
from kvmtool.chains import LC_DYLD_CHAINED_FIXUPS
from kvmtool.errors import FaultError, FormatError, KvmError, TruncatedError, UnsupportedError
from kvmtool.fixups import FixedMemory, Fixup, Fixups, has_fixups
from kvmtool.image import image_memory
from kvmtool.kernelcache import open_collection
from kvmtool.macho import MachO
from kvmtool.memory import RunMemory
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import chains as build
from tests.builders import kernelcache, llvm
from tests.builders.chains import START_NONE, Starts

ARM64E = "kernels/arm64e-xnu-6153.11.26-release.macho"
ARM64 = "kernels/arm64-xnu-4903.221.2-release.macho"
ARM_BASE, X86_BASE = 0xFFFFFFF007004000, 0xFFFFFF8000200000
MASK = (1 << 64) - 1


def read(path):
    with open(path, "rb") as file:
        return file.read()


def macho(data):
    return MachO(BytesSource(bytes(data), "file"))


def memory_of(data, **more):
    """The memory of a thin image, its pointers decoded."""
    return open_collection(macho(data)).memory(**more)


def words_image(machine, words, pointer_format, *, offset=0, starts=None, page_size=0x1000, **more):
    """A kernel whose __DATA begins with `words` (a number, or its place and the number) as chains.

    Without `starts` the first page has one chain that begins at `offset`.
    """
    base = X86_BASE if machine == "x86_64" else ARM_BASE
    pages = more.pop("pages", 1)
    data = bytearray(kernelcache.small_kernel(machine, base, [], room=0x4000 * pages))
    seg = build.segment(data, "__DATA")
    for at, word in words.items():
        struct.pack_into("<Q", data, seg.fileoff + at, word)
    found = Starts(seg.vmaddr - base, tuple(starts) if starts is not None else (offset,))
    payload = build.chained_payload([None, found], page_size, pointer_format, **more)
    at = build.append_linkedit(data, payload)
    command = struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, at, len(payload))
    build.add_command(data, command)
    return data, seg.vmaddr


# one word: the layouts of mach-o/fixup-chains.h, worked out by hand


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (0x0000000000000000, ARM_BASE),  # target 0
        (0x0000000000001234, ARM_BASE + 0x1234),
        (0x000000003FFFFFFF, ARM_BASE + 0x3FFFFFFF),  # all 30 bits of target
        (0x8000BEEF00001234, ARM_BASE + 0x1234),  # isAuth, diversity 0xbeef
        (0x8001000000001234, ARM_BASE + 0x1234),  # isAuth, addrDiv
        (0x8006000000001234, ARM_BASE + 0x1234),  # isAuth, key 3
        (0x0007BEEF00001234, ARM_BASE + 0x1234),  # the same bits without isAuth mean nothing
    ],
)
def test_format_8(word, value):
    data, at = words_image("arm64", {0: word}, 8)
    memory = memory_of(data)
    assert list(memory.fixups) == [Fixup(at, word, value)]
    assert memory.read(at, 8) == struct.pack("<Q", value)
    assert memory.raw.read(at, 8) == struct.pack("<Q", word)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (0x0000000000001234, ARM_BASE + 0x1234),  # target is an offset
        (0x000007FFFFFFFFFF, (ARM_BASE + 0x7FFFFFFFFFF) & MASK),  # all 43 bits of target
        (0x0007F80000000010, (ARM_BASE + 0xFF00000000000010) & MASK),  # high8 0xff
        (0x0000080000000010, (ARM_BASE + 0x0100000000000010) & MASK),  # high8 1
        (0x8000000000001234, ARM_BASE + 0x1234),  # auth: target 32 bits
        (0x80000000FFFFFFFF, ARM_BASE + 0xFFFFFFFF),
        (0x8007BEEF00001234, ARM_BASE + 0x1234),  # auth, key 3, addrDiv, diversity 0xbeef
    ],
)
def test_format_7(word, value):
    data, at = words_image("arm64e", {0: word}, 7)
    memory = memory_of(data)
    assert list(memory.fixups) == [Fixup(at, word, value)]
    assert memory.read(at, 8) == struct.pack("<Q", value)


@pytest.mark.parametrize("target", [0, 0x1234, 0x3FFFFFFF])
def test_format_11(target):
    """x86_64 counts from the lowest segment; __PAGEZERO is the kernel's, no collection has one."""
    data, at = words_image("x86_64", {0: target}, 11)
    assert list(memory_of(data).fixups) == [Fixup(at, target, X86_BASE + target)]


THREADED = [
    (0x7FFFFF007004000 & (1 << 43) - 1 | 0xFF << 43, 0xFFFFFFF007004000),  # 43 bits, negative
    (0x0000000000001234, 0x1234),  # 43 bits, positive: an address, no offset
    (0x0000040000000000, 0x00FFFC0000000000),  # bit 42 is the sign, the top byte is high8's
    (0x0007F80000000000, 0xFF00000000000000),
    (0x8000BEEF00001234, ARM_BASE + 0x1234),  # signed: 32 bits from the header
    (0x4000000000001234, 0x4000000000001234),  # bound: xnu leaves the word
]


@pytest.mark.parametrize(("word", "value"), THREADED)
@pytest.mark.parametrize("stride", [4, 8])
def test_threaded_word(word, value, stride):
    """One chain of two: the second word tells its place by the first one's 11 bits of delta."""
    data = bytearray(kernelcache.small_kernel("arm64e", ARM_BASE, [ARM_BASE, ARM_BASE]))
    at = build.segment(data, "__DATA").vmaddr
    data = bytearray(build.threaded_kernel(bytes(data), [at, at + 8], stride))
    offset = build.segment(data, "__DATA").fileoff
    struct.pack_into("<2Q", data, offset, word | (8 // stride) << 51, word)
    first = value if word >> 62 != 1 else value | (8 // stride) << 51
    memory = memory_of(data)
    assert [fixup.value for fixup in memory.fixups] == [first, value]
    assert memory.read(at, 16) == struct.pack("<2Q", first, value)


def test_next_counts_strides():
    """Format 8: 12 bits of 4 bytes; 7: 11 bits of 4; 11: 12 bits of 1."""
    cases = [
        ("arm64", 8, 0x4000, {0: 0xFFE << 51 | 1, 0x3FF8: 2}),
        ("arm64e", 7, 0x4000, {0: 0x7FE << 51 | 1, 0x1FF8: 2}),
        ("x86_64", 11, 0x1000, {3: 0xFF5 << 51 | 1, 0xFF8: 2}),
    ]
    for machine, pointer_format, page_size, words in cases:
        data, at = words_image(
            machine, words, pointer_format, offset=min(words), page_size=page_size
        )
        memory = memory_of(data)
        assert [fixup.address - at for fixup in memory.fixups] == list(words)


# pages and reads


def spread(pages, *, stride, seed):
    """Places of pointers, ascending, 8 bytes or more apart, some across the ends of pages."""
    chance = random.Random(seed)
    places, at = [], 0
    while True:
        at += chance.choice((8, 8, 8, 16, 200, 1500)) + chance.randrange(0, 40, stride)
        if at > 0x1000 * pages - 20:
            return places
        places.append(at)


def scattered(stride=1, pages=7):
    """(a built x86_64 or arm64 image, its raw bytes decoded by hand, the address of __DATA)."""
    machine, pointer_format = ("x86_64", 11) if stride == 1 else ("arm64", 8)
    base = X86_BASE if machine == "x86_64" else ARM_BASE
    content = bytearray(random.Random(5).randbytes(0x1000 * pages))
    places = spread(pages, stride=stride, seed=2)
    # a pointer across the end of a page, and a page without any
    places = {at for at in places if 8 <= at % 0x1000 <= 0xFF0 and at // 0x1000 != 3}
    places = sorted({*places, 0x0FFC, 0x1FF8, 0x2FFC, 0x5FFC if stride == 4 else 0x5FFD})
    for number, at in enumerate(places):
        struct.pack_into("<Q", content, at, base + 0x100 + number)
    data = bytearray(kernelcache.small_kernel(machine, base, [], room=len(content)))
    seg = build.segment(data, "__DATA")
    data[seg.fileoff : seg.fileoff + len(content)] = content
    found = build.places_of(data, [seg.vmaddr + at for at in places], base, base + (1 << 30))
    assert len(found) == len(places)
    spans = [(seg.vmaddr, seg.filesize)]
    word = build.kernel_cache_word(base, signed=False)
    starts = build.chain_pages(data, spans, found, base, word, 0x1000, stride)
    payload = build.chained_payload(starts, 0x1000, pointer_format)
    at = build.append_linkedit(data, payload)
    build.add_command(data, struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, at, len(payload)))
    return bytes(data), bytes(content), seg.vmaddr, places


@pytest.mark.parametrize("stride", [1, 4])
def test_any_range_reads_as_part_of_the_whole(stride):
    data, content, start, places = scattered(stride)
    memory = memory_of(data)
    assert [fixup.address - start for fixup in memory.fixups] == places
    assert memory.raw.read(start, len(content)) != content
    assert memory.read(start, len(content)) == content
    chance = random.Random(7)
    for _ in range(2000):
        at = chance.choice((chance.randrange(len(content)), chance.choice(places) - 4))
        at = max(0, at + chance.randrange(-4, 12))
        size = min(chance.choice((0, 1, 3, 8, 13, 64, 0x1800)), len(content) - at)
        assert memory.read(start + at, size) == content[at : at + size], hex(at)
        memory.check(start + at, size)
        pieces = list(memory.read_pieces(start + at, size))
        assert b"".join(piece.data for piece in pieces) == content[at : at + size]


def test_the_page_of_any_address_inside():
    data, _, start, places = scattered()
    fixups = memory_of(data).fixups
    for page in range(8):
        inside = [start + at for at in places if at // 0x1000 == page]
        for address in (start + page * 0x1000, start + page * 0x1000 + 0xABC):
            assert [fixup.address for fixup in fixups.page_fixups(address)] == inside
    assert list(fixups.page_fixups(start - 1)) == []
    assert list(fixups.page_fixups(0)) == []
    assert list(fixups.page_fixups(MASK)) == []
    assert [page - start for page, _ in fixups.pages(0, 1 << 64)] == [
        page * 0x1000 for page in (0, 1, 2, 4, 5, 6)
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("step", [1, 4])
def test_find_sees_decoded_pointers(size, step):
    data, content, start, places = scattered(1, 7)
    memory = memory_of(data)
    chance = random.Random(size)
    for at in [*chance.sample(places, 12), *chance.sample(range(len(content) - 12), 12)]:
        at += chance.randrange(-3, 4)
        needle = content[at : at + size]
        expected, found = [], content.find(needle)
        while found >= 0:
            if (start + found) % step == 0:
                expected.append(start + found)
            found = content.find(needle, found + 1)
        inside = [a for a in memory.find(needle, step) if start <= a < start + len(content) - size]
        assert inside == [a for a in expected if a < start + len(content) - size]


def test_find_sees_what_reaches_into_a_page_without_fixups():
    """The pointer at 0x2ffc ends in the page at 0x3000, which has none of its own."""
    data, content, start, _ = scattered()
    needle = content[0x3001:0x3009]
    assert list(memory_of(data).find(needle)) == [start + 0x3001]
    assert list(memory_of(data).raw.find(needle)) == []


def test_memory_is_a_run_memory_to_its_users():
    data, _, start, _ = scattered()
    memory = memory_of(data)
    assert isinstance(memory, FixedMemory)
    assert isinstance(memory.raw, RunMemory)
    assert (memory.space, memory.source) == (memory.raw.space, memory.raw.source)
    assert len(memory) == len(memory.raw)
    assert list(memory.regions()) == list(memory.raw.regions())
    with pytest.raises(FaultError) as caught:
        memory.read(start - 0x100000, 8)
    assert (caught.value.reason, caught.value.address) == ("unmapped", start - 0x100000)
    (piece,) = memory.read_pieces(start - 0x100000, 8)
    assert piece.data is None


def test_few_pages_are_kept(monkeypatch):
    data, content, start, _ = scattered()
    monkeypatch.setattr(fixups_module, "_CACHED_PAGES", 2)
    memory = memory_of(data)
    for at in (0, 0x2000, 0x4000, 0, 0x6000):
        assert memory.read(start + at, 0x1000) == content[at : at + 0x1000]
        assert len(memory._cache) <= 2


def test_nothing_is_read_before_it_is_asked_for():
    """Tables that do not hold together are an error of the first read."""
    data, at = words_image("arm64", {0: 1}, 8, page_size=0x2000)
    memory = memory_of(data)
    with pytest.raises(FormatError, match="page_size 0x2000"):
        memory.read(at, 8)


def test_an_image_without_fixups_is_left_as_it_is():
    data = kernelcache.small_kernel("arm64e", ARM_BASE, [1, 2])
    assert not has_fixups(macho(data))
    assert isinstance(memory_of(data), RunMemory)


def test_an_empty_payload_has_no_fixups():
    data = bytearray(kernelcache.small_kernel("arm64", ARM_BASE, [1]))
    build.add_command(data, struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, 0, 0))
    memory = memory_of(data)
    assert list(memory.fixups) == []
    assert memory.read(build.segment(data, "__DATA").vmaddr, 8) == struct.pack("<Q", 1)


# what the file alone does not tell


def bound(ordinal, addend=0, auth=0):
    return ordinal | (addend & 0x7FFFF) << 32 | 1 << 62 | auth << 63


def test_bound_pointers_need_the_symbol():
    words = {0: bound(1) | 2 << 51, 8: bound(0, -2) | 2 << 51, 16: bound(1, 5, auth=1)}
    data, at = words_image("arm64e", words, 7, imports=["_one", "_two"])
    reasons = [fixup.reason for fixup in memory_of(data).fixups]
    assert reasons == [f"a pointer to be bound to {name}" for name in ("_two", "_one", "_two")]
    memory = memory_of(data, symbol={"_one": 0x1000, "_two": 0x2000}.get)
    assert [fixup.value for fixup in memory.fixups] == [0x2000, 0xFFE, 0x2000]
    some = memory_of(data, symbol={"_two": 0x2000}.get)
    with pytest.raises(FaultError) as caught:
        some.read(at, 24)
    assert caught.value.address == at + 8
    assert str(caught.value) == (
        f"kernel address {at + 8:#x} is a pointer to be bound to _one (reading 0x18 bytes)"
    )
    with pytest.raises(FaultError):
        some.check(at + 15, 1)
    assert some.read(at, 8) + some.read(at + 16, 8) == struct.pack("<2Q", 0x2000, 0x2000)


@pytest.mark.parametrize(
    ("number", "entry"),
    [(2, struct.pack("<Ii", 1 << 9, -16)), (3, struct.pack("<QQ", 1 << 32, MASK - 15))],
)
def test_imports_may_have_addends(number, entry):
    data, _ = words_image("arm64e", {0: bound(0, 4)}, 7, imports=["_one"])
    _, off, _ = payload_at(data)
    imports, symbols = struct.unpack_from("<2I", data, off + 8)
    name = bytes(data[off + symbols :])
    del data[off + imports :]
    data += entry + name
    struct.pack_into("<4I", data, off + 8, imports, imports + len(entry), 1, number)
    command, _, _ = payload_at(data)
    struct.pack_into("<I", data, command + 12, imports + len(entry) + len(name))
    (fixup,) = memory_of(data, symbol={"_one": 0x1000}.get).fixups
    assert fixup.value == 0x1000 + 4 - 16


def test_pieces_around_unknown_pointers():
    words = {0: bound(0) | 4 << 51, 16: bound(0)}
    data, at = words_image("arm64e", words, 7, imports=["_one"])
    why = "a pointer to be bound to _one"
    assert list(memory_of(data).read_pieces(at + 4, 24)) == [
        (at + 4, 4, None, why),
        (at + 8, 8, bytes(8), ""),
        (at + 16, 8, None, why),
        (at + 24, 4, bytes(4), ""),
    ]
    assert list(memory_of(data).read_pieces(at + 17, 2)) == [(at + 17, 2, None, why)]


@pytest.mark.parametrize(
    ("level", "which"), [(1, "the system"), (3, "the auxiliary")], ids=["system", "auxiliary"]
)
def test_pointers_into_other_collections_need_their_base(level, which):
    data, at = words_image("arm64", {0: level << 30 | 0x10}, 8)
    (fixup,) = memory_of(data).fixups
    assert fixup.value is None
    assert fixup.reason == f"a pointer into {which} kernel collection, which is not given"
    with pytest.raises(FaultError, match=fixup.reason):
        memory_of(data).read(at, 8)
    (fixup,) = memory_of(data, bases={level: 0x5000}).fixups
    assert fixup.value == 0x5010


# whole kernels: chained, and read as they were


def same_bytes(plain, built, memory):
    """Every segment of the plain kernel, but the commands that were changed and __LINKEDIT."""
    expected = image_memory(macho(plain))
    commands = 32 + struct.unpack_from("<I", built, 20)[0]
    compared = 0
    for seg in build.segments(plain):
        if seg.name in ("__LINKEDIT", "__PAGEZERO") or not seg.filesize:
            continue
        skip = 0x2000 if seg.fileoff == 0 else 0
        assert commands < 0x2000
        for at in range(skip, seg.filesize, 1 << 20):
            size = min(1 << 20, seg.filesize - at)
            theirs = expected.read(seg.vmaddr + at, size)
            assert memory.read(seg.vmaddr + at, size) == theirs, f"{seg.name} at {at:#x}"
            compared += size
    return compared


@pytest.mark.parametrize(
    ("name", "make", "count"),
    [
        (ARM64E, build.arm64e_kernel, 23314),
        (ARM64E, lambda k, a: build.threaded_kernel(k, a, 8), 23314),
        (ARM64, lambda k, a: build.threaded_kernel(k, a, 4), 20211),
    ],
    ids=["format 7", "threaded by 8", "threaded by 4"],
)
def test_a_real_kernel_reads_as_it_was(name, make, count, tmp_path):
    """`count`: local relocations of the kernel (LC_DYSYMTAB) without 12 that are null."""
    path = inputs.real(name)
    plain = read(path)
    built = make(plain, build.local_relocations(plain))
    memory = memory_of(built)
    raw = memory.raw
    fixups = list(memory.fixups)
    assert len(fixups) == count
    changed = sum(raw.read(f.address, 8) != struct.pack("<Q", f.value) for f in fixups)
    assert changed == count
    assert same_bytes(plain, built, memory) > 6_000_000
    other = tmp_path / "kernel"
    other.write_bytes(built)
    assert "LC_UUID" in llvm.run("llvm-objdump", "--macho", "--all-headers", str(other))
    assert llvm.run("llvm-nm", str(other)) == llvm.run("llvm-nm", path)


def test_real_kernels_have_no_threads():
    """Their __thread_starts are empty: nothing is decoded, and nothing need be."""
    for name in (ARM64, ARM64E):
        assert isinstance(open_collection(MachO(FileSource(inputs.real(name)))).memory(), RunMemory)


# damage


def failing(data, match, error=FormatError):
    with pytest.raises(error, match=match) as caught:
        list(memory_of(data).fixups)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (1, "DYLD_CHAINED_PTR_ARM64E"),
        (2, "DYLD_CHAINED_PTR_64"),
        (6, "DYLD_CHAINED_PTR_64_OFFSET"),
        (9, "DYLD_CHAINED_PTR_ARM64E_USERLAND"),
        (10, "DYLD_CHAINED_PTR_ARM64E_FIRMWARE"),
        (12, "DYLD_CHAINED_PTR_ARM64E_USERLAND24"),
        (13, "DYLD_CHAINED_PTR_ARM64E_SHARED_CACHE"),
        (0, "unknown"),
        (99, "unknown"),
    ],
)
def test_other_formats_are_named(number, name):
    data, _ = words_image("arm64e", {0: 1}, number)
    failing(data, rf"pointer format {number} \({name}\)", UnsupportedError)


def test_a_signed_pointer_of_x86_is_an_error():
    data, at = words_image("x86_64", {0: 1 << 63}, 11)
    error = failing(data, f"pointer at {at:#x}: word 0x8000000000000000 is signed")
    assert error.offset == build.segment(data, "__DATA").fileoff


def test_cache_level_2_is_an_error():
    data, _ = words_image("arm64", {0: 2 << 30}, 8)
    failing(data, "has cacheLevel 2, which is none")


def test_a_chain_that_leaves_its_page_is_an_error():
    data, at = words_image("arm64", {0: 0x400 << 51}, 8, page_size=0x1000)
    failing(data, f"pointer at {at:#x}: the chain leaves its page, which ends at {at + 0x1000:#x}")


def test_a_chain_that_leaves_the_image_is_an_error():
    data, at = words_image("x86_64", {0: 0xFFF << 51}, 11)
    seg = build.segment(data, "__DATA")
    struct.pack_into("<Q", data, seg.at + 32, 0x800)  # vmsize
    struct.pack_into("<Q", data, seg.at + 48, 0x800)  # filesize
    failing(data, f"pointer at {at + 0xFFF:#x}: the chain leaves the image")


@pytest.mark.parametrize(("machine", "number", "step"), [("arm64", 8, 4), ("x86_64", 11, 7)])
def test_pointers_that_overlap_are_an_error(machine, number, step):
    data, at = words_image(machine, {0: (1 if number == 8 else step) << 51}, number)
    failing(data, f"pointer at {at:#x}: the next one is {step} bytes on, expected 8 or more")


@pytest.mark.parametrize(
    ("starts", "match"),
    [
        ([0x1000], "page_start 0x1000, expected less than 0x1000"),
        ([START_NONE, 0x8000], r"page_start 0x8000 \(several chains\)"),
    ],
)
def test_a_chain_begins_in_its_page(starts, match):
    data, _ = words_image("arm64", {0: 1}, 8, starts=starts)
    error = failing(data, match)
    assert data[error.offset : error.offset + 2] == struct.pack("<H", starts[-1])


def payload_at(data):
    at = next(at for at, cmd, _ in build.commands(data) if cmd == LC_DYLD_CHAINED_FIXUPS)
    return at, *struct.unpack_from("<2I", data, at + 8)


# (offset into the payload, format, value) for one segment of one page: the header is 32 bytes,
# seg_count and two offsets 12 (rounded up to 16), the segment's starts 24
DAMAGE = [
    (0, "I", 1, UnsupportedError, "chained fixups version 0x1, expected 0"),
    (4, "I", 0x1000, FormatError, "seg_count of 0x4 bytes, the payload ends after 0x0"),
    (32, "I", 0x3FFFFFFF, FormatError, "seg_info_offset of 0xfffffffc bytes"),
    (40, "I", 0x1000, FormatError, "starts of a segment of 0x16 bytes"),
    (48, "I", 23, FormatError, "size 0x17 is too small for page_count 0x1"),
    (52, "H", 0x2000, FormatError, "page_size 0x2000, expected 0x1000 or 0x4000"),
    (52, "H", 0, FormatError, "page_size 0x0"),
    (56, "Q", 0x7000000, FormatError, "the chain leaves the image"),
    (56, "Q", 0xFF8FFB800, FormatError, "segment_offset 0xff8ffb800 leaves the address space"),
    (68, "H", 9999, FormatError, "size 0x18 is too small for page_count 0x270f"),
]


@pytest.mark.parametrize(("at", "code", "value", "error", "match"), DAMAGE)
def test_tables_that_do_not_hold_together(at, code, value, error, match):
    data, _ = words_image("arm64", {0: 1}, 8)
    struct.pack_into("<" + code, data, payload_at(data)[1] + at, value)
    failing(data, match, error)


@pytest.mark.parametrize("size", [1, 27, 31, 35, 43, 47, 69, 71])
def test_a_payload_cut_short(size):
    data, _ = words_image("arm64", {0: 1}, 8)
    command, off, whole = payload_at(data)
    assert size < whole
    struct.pack_into("<I", data, command + 12, size)
    failing(data, "the payload ends after")
    failing(data[: off + size], "Mach-O|LC_DYLD_CHAINED_FIXUPS|segment|payload|string table")


def test_a_payload_outside_the_file():
    data, _ = words_image("arm64", {0: 1}, 8)
    command, _, size = payload_at(data)
    struct.pack_into("<I", data, command + 8, len(data) - 4)
    error = failing(data, "LC_DYLD_CHAINED_FIXUPS", TruncatedError)
    assert (error.offset, error.wanted, error.got) == (len(data) - 4, size, 4)
    struct.pack_into("<I", data, command + 8, 0xFFFFFFF0)
    failing(data, "LC_DYLD_CHAINED_FIXUPS", TruncatedError)


def test_segments_that_overlap():
    data, _ = words_image("arm64", {0: 1}, 8)
    _, off, _ = payload_at(data)
    (where,) = struct.unpack_from("<I", data, off + 40)
    struct.pack_into("<I", data, off + 36, where)  # both segments have the same pages
    failing(data, "overlap")


def test_many_segments_with_the_same_pages_are_refused_early():
    """4,000 offsets to one table of 65,535 pages would be half a gigabyte."""
    data, _ = words_image("arm64", {0: 1}, 8)
    starts = Starts(0x4000, (0,) + (0xFFFE,) * 65534)
    payload = bytearray(build.chained_payload([starts] + [None] * 4000, 0x1000, 8))
    (where,) = struct.unpack_from("<I", payload, 36)
    struct.pack_into("<4001I", payload, 36, *[where] * 4001)
    data = bytearray(kernelcache.small_kernel("arm64", ARM_BASE, [1]))
    at = build.append_linkedit(data, bytes(payload))
    build.add_command(data, struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, at, len(payload)))
    tracemalloc.start()
    failing(data, "segments overlap")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_imports_that_are_not_there():
    data, _ = words_image("arm64e", {0: bound(2)}, 7, imports=["_one", "_two"])
    failing(data, "import 0x2, expected less than 0x2")
    data, _ = words_image("arm64e", {0: bound(0)}, 7, imports=["_one"])
    _, off, _ = payload_at(data)
    struct.pack_into("<I", data, off + 20, 4)
    failing(data, "imports of format 4", UnsupportedError)
    struct.pack_into("<3I", data, off + 16, 1, 1, 1)
    failing(data, "symbols of 1", UnsupportedError)
    struct.pack_into("<2I", data, off + 20, 1, 0)
    struct.pack_into("<I", data, off + 12, 0x1000)
    failing(data, "symbol name of")


def test_a_command_of_another_size():
    data, _ = words_image("arm64", {0: 1}, 8)
    at, _, _ = payload_at(data)
    (size,) = struct.unpack_from("<I", data, 20)
    struct.pack_into("<I", data, 20, size + 8)
    struct.pack_into("<I", data, at + 4, 24)
    failing(data, "LC_DYLD_CHAINED_FIXUPS: cmdsize 0x18, expected 0x10")


def test_an_image_without_text():
    data, _ = words_image("arm64", {0: 1}, 8)
    at = build.segment(data, "__TEXT").at
    data[at + 8 : at + 14] = b"__TEXX"
    failing(data, "without __TEXT")


def test_big_endian_and_32_bit_images_have_none():
    from tests.builders.macho import MachO as Builder

    for machine in ("i386", "ppc64"):
        image = Builder(machine, 2)
        image.segment("__TEXT", 0x1000, bytes(0x1000), fileoff=0)
        image.command(LC_DYLD_CHAINED_FIXUPS, bytes(8))
        failing(image.build(), "32-bit or big-endian", UnsupportedError)


def threaded(words, starts):
    """A kernel with the words of __thread_starts given, and `words` at the start of __DATA."""
    data = bytearray(kernelcache.small_kernel("arm64e", ARM_BASE, words, room=0x8000))
    at = 32 + struct.unpack_from("<I", data, 20)[0] + 16
    struct.pack_into(f"<{len(starts)}I", data, at, *starts)
    section = build.segment(data, "__TEXT").at + 72 + 80
    struct.pack_into("<2QI", data, section + 32, ARM_BASE + at, 4 * len(starts), at)
    return data


def test_threads_end_where_they_say():
    data = threaded([1, 2, 3], [0, 0x4000, 0x4008, 0xFFFFFFFF, 0x4010])
    assert [fixup.value for fixup in memory_of(data).fixups] == [1, 2]
    data = threaded([1, 2, 3], [0, 0x4000, 0x4008])
    assert [fixup.value for fixup in memory_of(data).fixups] == [1, 2]
    assert isinstance(memory_of(threaded([1], [1])), RunMemory)


def test_a_thread_runs_through_pages():
    data = threaded([0x7FF << 51], [1, 0x4000])
    struct.pack_into("<Q", data, build.segment(data, "__DATA").fileoff + 0x7FF * 8, 5)
    assert [fixup.address for fixup in memory_of(data).fixups] == [
        ARM_BASE + 0x4000,
        ARM_BASE + 0x4000 + 0x7FF * 8,
    ]


@pytest.mark.parametrize(
    ("words", "starts", "match"),
    [
        ([1, 2], [0, 0x4000, 0x4000], "overlaps the pointer at 0xfffffff007008000"),
        ([1, 2], [0, 0x4000, 0x4004], "overlaps the pointer at 0xfffffff007008000"),
        ([2 << 51, 2], [0, 0x4000, 0x4008], "overlaps the pointer"),
        ([1 << 51], [0, 0x4000], "the next one is 4 bytes on"),
        ([1], [0, 0x40000000], "leaves the image"),
        ([1], [0, *[0x4000] * 40], "overlaps"),
    ],
)
def test_threads_that_do_not_hold_together(words, starts, match):
    failing(threaded(words, starts), match)


def test_threads_that_run_into_each_other_end():
    """600 starts of one chain of 4,000: a quarter of what would be 2.4 million words is enough."""
    words = [2 << 51 | 1] * 3999
    data = threaded(words, [0, *[0x4000 + 8 * n for n in range(300)]])
    start = time.process_time()
    failing(data, "chains run into each other")
    assert time.process_time() - start < 1


def test_thread_starts_outside_the_file():
    data = threaded([1], [0, 0x4000])
    section = build.segment(data, "__TEXT").at + 72 + 80
    struct.pack_into("<Q", data, section + 40, 0xFFFFFFFF)
    with pytest.raises(TruncatedError):
        memory_of(data)


def mutated(data, spots, chance):
    """A copy of `data` with a few bytes or words changed, mostly at `spots` (start, size)."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start, size = chance.choice(spots)
        at = start + chance.randrange(size)
        if chance.random() < 0.5:
            out[at] ^= 1 << chance.randrange(8)
        else:
            word = chance.choice((0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)))
            struct.pack_into("<I", out, min(at, len(out) - 4), word)
    return out[: chance.choice((len(out), len(out), len(out), chance.randrange(len(out))))]


HOSTILE = {
    "format 7": lambda: bytes(
        words_image("arm64e", {0: bound(0) | 2 << 51, 8: 3}, 7, imports=["_one"])[0]
    ),
    "format 8": lambda: scattered(4)[0],
    "format 11": lambda: scattered(1)[0],
    "threaded": lambda: bytes(threaded([2 << 51] * 50, [0, 0x4000, 0x4300])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_mutated_images(name):
    """Only a KvmError, in time and in bounds."""
    data = HOSTILE[name]()
    seg = build.segment(data, "__DATA")
    spots = [(0, 0x700), (seg.fileoff, 0x200)]
    linkedit = build.segment(data, "__LINKEDIT")
    spots.append((linkedit.fileoff, linkedit.filesize))
    chance = random.Random(name)
    errors = good = 0
    for _ in range(200):
        changed = mutated(data, spots, chance)
        start = time.process_time()
        try:
            memory = memory_of(changed, symbol={"_one": 0x1000}.get)
            if isinstance(memory, FixedMemory):
                list(memory.fixups)
                memory.read(seg.vmaddr, seg.filesize)
                list(memory.read_pieces(seg.vmaddr - 8, seg.filesize + 16))
            good += 1
        except KvmError:
            errors += 1
        assert time.process_time() - start < 1
    assert errors > 20
    assert good > 5


def test_mutated_images_stay_small():
    data, _, _, _ = scattered(1)
    linkedit = build.segment(data, "__LINKEDIT")
    chance = random.Random(3)
    tracemalloc.start()
    for _ in range(60):
        try:
            list(memory_of(mutated(data, [(linkedit.fileoff, linkedit.filesize)], chance)).fixups)
        except KvmError:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_a_kernel_is_decoded_in_time():
    """A page of 2,000 pointers takes a few milliseconds, and the next read of it none."""
    data = bytearray(kernelcache.small_kernel("arm64", ARM_BASE, [ARM_BASE] * 0x800, room=0x4000))
    seg = build.segment(data, "__DATA")
    places = build.places_of(
        data, range(seg.vmaddr, seg.vmaddr + 0x4000, 8), ARM_BASE, ARM_BASE + 1
    )
    word = build.kernel_cache_word(ARM_BASE)
    starts = build.chain_pages(data, [(seg.vmaddr, 0x4000)], places, ARM_BASE, word, 0x4000, 4)
    payload = build.chained_payload(starts, 0x4000, 8)
    at = build.append_linkedit(data, payload)
    build.add_command(data, struct.pack("<4I", LC_DYLD_CHAINED_FIXUPS, 16, at, len(payload)))
    memory = memory_of(data)
    start = time.process_time()
    assert memory.read(seg.vmaddr, 0x4000) == struct.pack("<Q", ARM_BASE) * 0x800
    first = time.process_time() - start
    start = time.process_time()
    for at in range(0, 0x4000, 8):
        assert memory.read(seg.vmaddr + at, 8) == struct.pack("<Q", ARM_BASE)
    assert first < 0.1
    assert time.process_time() - start < 0.2


def test_fixups_of_several_images():
    """A system collection has chains for every kext; they share one memory."""
    one, at = words_image("arm64", {0: 5}, 8)
    image = macho(one)
    raw = image_memory(image)
    assert [f.address for f in Fixups([image], raw, {0: 0})] == [at]
    assert list(Fixups([], raw, {0: 0})) == []
    with pytest.raises(FormatError, match="overlap"):
        list(Fixups([image, image], raw, {0: 0}))
