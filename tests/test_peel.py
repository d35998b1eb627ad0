"""Peeling: every form and nesting of real kernels, fat files, IM4P, the cache, hostile bytes."""

from __future__ import annotations

import functools
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from kvmtool import cache
from kvmtool.errors import (
    FormatError,
    KvmError,
    KvmWarning,
    NotFoundError,
    TruncatedError,
    UnsupportedError,
)
from kvmtool.macho import MachO
from kvmtool.peel import Layer, decoded, peel, slices
from kvmtool.source import BytesSource, FileSource
from tests import inputs
from tests.builders import peel as build
from tests.test_nlist import our_lines

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.source import Source

NM = shutil.which("llvm-nm")

I386, X86_64, PPC, ARM64 = 7, 0x01000007, 18, 0x0100000C
OTHER = (PPC, 0, b"\xfe\xed\xfa\xce" + bytes(5000))  # a slice that nobody wants here

KERNEL = "dumps/i386-10.5.8/mach_kernel"
KEXT = "dumps/i386-10.5.8/KernelMemoryAccess"  # 8 KB, for what is done many times


def real(name: str) -> bytes:
    with open(inputs.real(name), "rb") as file:
        return file.read()


def whole(source: Source) -> bytes:
    return source.read_at(0, source.size)


def peeled_bytes(data: bytes, arch: str | None = None) -> tuple[bytes, list[str]]:
    peeled = peel(BytesSource(data, "kc"), arch)
    content = whole(peeled.source)
    peeled.source.close()
    return content, [layer.name for layer in peeled.layers]


lzss = functools.cache(build.lzss)  # it takes its time


def im4p_lzfse(data: bytes) -> bytes:
    return build.im4p(build.lzfse(data), build.compression(1, len(data)), build.PROPERTIES)


def im4p_lzss(data: bytes) -> bytes:
    image = build.comp("lzss", lzss(data), data)
    return build.im4p(image, build.compression(0, len(data)))


# Each form: how it is made, and the layers it has
FORMS: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
    "fat": (lambda data: build.fat([OTHER, (I386, 3, data)]), ["fat"]),
    "fat64": (lambda data: build.fat([(I386, 3, data), OTHER], wide=True), ["fat"]),
    "im4p": (build.im4p, ["IM4P"]),
    "img4": (lambda data: build.img4(build.im4p(data)), ["IMG4", "IM4P"]),
    "im4p-lzfse": (im4p_lzfse, ["IM4P", "LZFSE"]),
    "im4p-lzss": (im4p_lzss, ["IM4P", "comp/lzss"]),
    "lzss": (lambda data: build.comp("lzss", lzss(data), data), ["comp/lzss"]),
    "lzvn": (lambda data: build.comp("lzvn", build.lzvn(data), data), ["comp/lzvn"]),
    "bvx2": (build.lzfse, ["LZFSE"]),
    "bvx1": (build.lzfse_plain_tables, ["LZFSE"]),
    "bvx-": (build.lzfse_stored, ["LZFSE"]),
    "gzip": (build.gzip, ["gzip"]),
    "xz": (build.xz, ["xz"]),
    "zstd": (build.zstd, ["zstd"]),
}


@functools.cache
def wrapped(form: str, name: str) -> bytes:
    return FORMS[form][0](real(name))


# real kernels


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_real_kernel_gives_its_bytes(form):
    content, layers = peeled_bytes(wrapped(form, KERNEL), "i386")
    assert content == real(KERNEL)
    assert layers == FORMS[form][1]


@pytest.mark.parametrize(
    "name",
    [
        "kernels/arm64e-xnu-6153.11.26-release.macho",
        "machine/x86_64-xnu-2422.115.4.mach_kernel",
        "objects/ppc-xnu-792.25.20-bsd.o",
    ],
)
def test_other_kernels_give_their_symbols(name, tmp_path):
    data = real(name)
    path = tmp_path / "kernelcache"
    path.write_bytes(build.img4(im4p_lzfse(build.fat([(I386, 3, b"other"), (1, 2, data)]))))
    peeled = peel(FileSource(str(path)), "cputype-0x1")
    plain = MachO(BytesSource(data))
    assert len(our_lines(plain)) > 1000
    assert our_lines(MachO(peeled.source)) == our_lines(plain)
    assert whole(peeled.source) == data
    peeled.source.close()


def test_three_deep_in_any_order():
    data = real("kexts/i386-KernelMemoryAccess")
    names = ["fat", "im4p", "lzss", "lzvn", "bvx2", "bvx1", "gzip", "zstd", "im4p-lzfse"]
    rng = random.Random(5)
    for _ in range(40):
        chosen = [rng.choice(names) for _ in range(3)]
        image, layers = data, []
        for name in chosen:
            make, own = FORMS[name]
            image, layers = make(image), own + layers
        assert peeled_bytes(image, "i386") == (data, layers)


def test_what_was_taken_off_is_told():
    data = real(KEXT)
    image = build.fat([OTHER, (I386, 3, im4p_lzfse(data))])
    peeled = peel(BytesSource(image, "kernelcache"), "i386")
    size = len(build.lzfse(data))
    assert peeled.layers == (
        Layer("fat", "slice i386 of ppc, i386"),
        Layer("IM4P", f"type krnl, description 'KernelCache', LZFSE, {len(data):#x} bytes decoded"),
        Layer("LZFSE", f"blocks bvx2, {len(data):#x} bytes decoded"),
    )
    assert size < len(data)
    assert peeled.source.name == "kernelcache (fat, IM4P, LZFSE)"
    peeled.source.close()


def test_a_thin_file_is_returned_as_it_is():
    source = FileSource(inputs.real(KERNEL))
    peeled = peel(source, "x86_64")
    assert peeled.source is source
    assert peeled.layers == ()
    source.close()


def test_a_thin_file_costs_nothing():
    script = """
import sys, kvmtool.macho, kvmtool.source
before = set(sys.modules)
from kvmtool.peel import peel
reads = []
class Counted(kvmtool.source.FileSource):
    def read_at(self, off, size):
        reads.append((off, size))
        return super().read_at(off, size)
peel(Counted(sys.argv[1]))
print(sorted(set(sys.modules) - before), reads)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, inputs.real(KERNEL)],
        capture_output=True,
        text=True,
        check=True,
        cwd=inputs.ROOT,
    )
    assert done.stdout == "['kvmtool.peel', 'kvmtool.peel.layer'] [(0, 4)]\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xca\xfe",
        b"\xca\xfe\xba\xbe",
        b"\xca\xfe\xba\xbe\0\0\0\0",
        b"\xca\xfe\xba\xbe\0\0\0\x34" + bytes(100),  # a Java class, version 52
        b"\xca\xfe\xba\xbe\0\0\0\x1e" + bytes(1000),  # 30 slices: the version before any Java
        b"complzma" + bytes(1000),
        b"bvx$",
        b"0\x03\x02\x01\x05",  # DER, but no IM4P
        b"#!/bin/sh\n",
    ],
)
def test_what_nobody_recognises_is_returned_as_it_is(data):
    source = BytesSource(data, "kc")
    peeled = peel(source)
    assert (peeled.source, peeled.layers) == (source, ())
    with pytest.raises(FormatError, match="expected a Mach-O magic"):
        MachO(peeled.source)


def test_layers_are_limited():
    data = real(KEXT)
    for _ in range(8):
        data = build.im4p(data)
    assert peeled_bytes(data) == (real(KEXT), ["IM4P"] * 8)
    with pytest.raises(FormatError, match=r"kc \(IM4P, .*\): .* expected at most 8 layers"):
        peel(BytesSource(build.im4p(data), "kc"))


def test_offsets_in_errors_count_in_what_the_name_says():
    inner = bytearray(build.comp("lzss", build.lzss(b"kernel" * 99), b"kernel" * 99))
    inner[8] ^= 0xFF
    image = build.fat([OTHER, (I386, 3, build.im4p(bytes(inner)))])
    with pytest.raises(FormatError, match=r"^kc \(fat, IM4P\): at offset 0x8: Adler-32") as caught:
        peel(BytesSource(image, "kc"), "i386")
    assert (caught.value.source, caught.value.offset) == ("kc (fat, IM4P)", 8)


# fat files


@pytest.mark.skipif(NM is None, reason="llvm-nm is not installed")
@pytest.mark.parametrize("name", ["fat-ppc-i386-zfs-102A", "fat-ppc-i386-zfs-102A.dSYM"])
@pytest.mark.parametrize("arch", ["ppc", "i386"])
def test_each_slice_has_the_symbols_llvm_nm_finds(name, arch):
    path = inputs.real(f"kexts/{name}")
    peeled = peel(FileSource(path), arch)
    assert peeled.layers == (Layer("fat", f"slice {arch} of ppc, i386"),)
    done = subprocess.run(
        [str(NM), f"--arch={arch}", path], capture_output=True, text=True, check=False
    )
    theirs = [line for line in done.stdout.splitlines() if line and not line.endswith(":")]
    ours = our_lines(MachO(peeled.source))
    assert ours == sorted(theirs)
    assert ("dSYM" in name) != (len(ours) > 2000)
    peeled.source.close()


def test_slices_of_a_real_fat_file():
    source = FileSource(inputs.real("kexts/fat-ppc-i386-zfs-102A"))
    found = slices(source)
    assert [(piece.name, piece.cputype, piece.align) for piece in found] == [
        ("ppc", PPC, 12),
        ("i386", I386, 12),
    ]
    for piece in found:
        image = MachO(peel(source, piece.name).source)
        assert image.cputype == piece.cputype
        assert image.source.size == piece.size
        assert source.read_at(piece.offset, 28) == image.source.read_at(0, 28)
    source.close()


def test_slices_of_something_else_are_an_error():
    with pytest.raises(FormatError, match=r"expected cafebabe or cafebabf .* got cffaedfe"):
        slices(BytesSource(b"\xcf\xfa\xed\xfe" + bytes(40), "kc"))


E64, PLAIN64, HASWELL, X64 = (ARM64, 0x80000002), (ARM64, 0), (X86_64, 8), (X86_64, 3)


@pytest.mark.parametrize(
    ("kinds", "arch", "taken"),
    [
        ([PLAIN64, E64], "arm64", 0),
        ([PLAIN64, E64], "arm64e", 1),
        ([X64, E64], "arm64", 1),  # compatible
        ([X64, PLAIN64], "arm64e", 1),
        ([HASWELL, X64], "x86_64", 1),  # exact before compatible
        ([X64, HASWELL], "x86_64h", 1),
        ([HASWELL, PLAIN64], "x86_64", 0),
        ([PLAIN64, X64], "x86_64h", 1),
        ([PLAIN64], None, 0),  # a single slice needs no choice
        ([PLAIN64], "i386", 0),  # the caller compares machines, and says so better
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_the_slice_is_chosen(kinds, arch, taken, wide):
    parts = [(*kind, b"slice %d" % number) for number, kind in enumerate(kinds)]
    content, _ = peeled_bytes(build.fat(parts, wide=wide), arch)
    assert content == b"slice %d" % taken


def test_a_slice_must_be_chosen():
    image = build.fat([(PPC, 0, b"1"), (I386, 3, b"2"), (*X64, b"3")])
    with pytest.raises(KvmError, match=r"kc: .* slices ppc, i386, x86_64: choose one with --arch"):
        peel(BytesSource(image, "kc"))
    with pytest.raises(NotFoundError, match="arm64 not found; kc has slices ppc, i386, x86_64"):
        peel(BytesSource(image, "kc"), "arm64")


def fat_error(image: bytes, kind: type[FormatError] = FormatError) -> FormatError:
    with pytest.raises(kind) as caught:
        peel(BytesSource(image, "kc"), "i386")
    assert caught.value.source == "kc"
    return caught.value


def patched(image: bytes, at: int, value: int, size: int = 4) -> bytes:
    return image[:at] + value.to_bytes(size, "big") + image[at + size :]


def test_slices_must_lie_in_the_file_and_apart():
    image = build.fat([(PPC, 0, b"p" * 100), (I386, 3, b"i" * 100)])
    second = 8 + 20
    error = fat_error(image[:-1], TruncatedError)
    assert (error.offset, error.wanted, error.got) == (0x2000, 100, 99)
    assert "fat_arch 1 at offset 0x1c (slice i386)" in str(error)
    assert fat_error(patched(image, second + 8, 0xFFFFFFF0), TruncatedError).offset == 0xFFFFFFF0
    assert fat_error(patched(image, second + 12, 0xFFFFFFF0), TruncatedError).wanted == 0xFFFFFFF0
    error = fat_error(patched(image, second + 8, 0x1001))  # inside the first slice
    assert error.offset == second
    assert "slice i386 begins at 0x1001, expected 0x1064 or more" in str(error)
    error = fat_error(patched(image, second + 8, 0x20))  # inside the table
    assert "slice i386 begins at 0x20, expected 0x30 or more (where the fat_arch" in str(error)
    assert "slice i386 is empty" in str(fat_error(patched(image, second + 12, 0)))
    assert "slice ppc is there twice" in str(fat_error(patched(image, second, PPC)))
    assert "fat_arch table" in str(fat_error(image[:40], TruncatedError))


def test_slices_of_a_fat64_must_lie_in_the_file():
    image = build.fat([(I386, 3, b"i" * 100)], wide=True)
    error = fat_error(patched(image, 8 + 8, (1 << 64) - 16, 8), TruncatedError)
    assert error.offset == (1 << 64) - 16
    assert fat_error(patched(image, 8 + 16, (1 << 64) - 1, 8), TruncatedError).got == 100


# IM4P and IMG4

RAW = b"\xce\xfa\xed\xfe" + bytes(2000)
MEMBERS = (build.compression(1, len(RAW)), build.PROPERTIES, build.der(0x04), build.der(0xA1))


@pytest.mark.parametrize("seed", range(8))
def test_optional_members_in_any_order(seed):
    rng = random.Random(seed)
    members = rng.sample(MEMBERS, rng.randrange(len(MEMBERS) + 1))
    payload = build.lzfse(RAW)
    content, layers = peeled_bytes(build.im4p(payload, *members, kind="rkrn", text=""))
    assert (content, layers) == (RAW, ["IM4P", "LZFSE"])
    assert peeled_bytes(build.img4(build.im4p(RAW, *members), signed=bool(seed % 2)))[0] == RAW


@pytest.mark.parametrize("first", [(), (build.compression(1, 100),), (build.PROPERTIES,)])
def test_an_encrypted_payload_is_refused(first):
    image = build.im4p(random.Random(1).randbytes(160), *first, build.KEYBAG)
    with pytest.raises(UnsupportedError, match=r"^kc: at offset 0x.* keybag.* with its keys"):
        peel(BytesSource(image, "kc"))
    with pytest.raises(UnsupportedError, match=r"^kc \(IMG4\): at offset 0x.* with its keys"):
        peel(BytesSource(build.img4(image), "kc"))


def test_the_size_an_im4p_gives_must_be_right():
    for payload in (build.lzfse(RAW), build.comp("lzss", build.lzss(RAW), RAW)):
        image = build.im4p(payload, build.compression(1, len(RAW) + 1))
        with pytest.raises(FormatError, match=r"kc \(IM4P\): .* 0x7d5"):
            peel(BytesSource(image, "kc"))
        image = build.im4p(payload, build.compression(1, 1 << 40))
        with pytest.raises(FormatError, match=r"kc \(IM4P\): .* 0x10000000000"):
            peel(BytesSource(image, "kc"))


@pytest.mark.parametrize(
    ("image", "offset", "message"),
    [
        (build.der(0x30, build.der_text("IM4P")), 8, "IM4P type: expected DER tag 0x16, got none"),
        (
            build.der(0x30, build.der_text("IM4P"), build.der_text("krnl"), build.der(4)),
            14,
            "IM4P description: expected DER tag 0x16, got 0x4",
        ),
        (build.im4p(RAW)[:-1], 4, "DER element 0x30: expected"),
        (b"\x30\x80" + build.der_text("IM4P"), 1, "DER length 80"),  # indefinite: not DER
        (b"\x30\x81\x06" + build.der_text("IM4P"), 1, "DER length 8106"),  # not the shortest
        (b"\x30\x88" + bytes(8) + build.der_text("IM4P"), 1, "DER length 8800"),
        (build.im4p(RAW, b"\x1f\x01\x00"), 2037, "DER tag 0x1f"),
        (build.im4p(RAW, b"\x02"), 2037, "DER element: expected 0x2 bytes, got 0x1"),
        (build.im4p(RAW, b"\x02\x82\x01"), 2039, "DER length: expected 0x2 bytes, got 0x1"),
        (build.im4p(RAW, build.der(0x30)), 2037, "expected two integers"),
        (
            build.im4p(RAW, build.der(0x30, build.der_int(1), build.der(2, b"\xff"))),
            2042,
            "DER integer ff",
        ),
        (build.im4p(RAW, *[build.der(0xA1)] * 20), 2061, "more than 16 members"),
        (build.im4p(RAW, text="x" * 5000), 0, "DER string of 0x1388 bytes, expected"),
        (build.der(0x30, build.der_text("IMG4")), 8, "IMG4 payload: expected DER tag 0x30"),
    ],
)
def test_der_is_read_strictly(image, offset, message):
    with pytest.raises(FormatError) as caught:
        peel(BytesSource(image, "kc"))
    assert message in str(caught.value)
    if offset:
        assert caught.value.offset == offset


# the cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of its own, and how often something was decoded."""
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []
    limited = decoded._limited

    def counted(view, packed, limit):
        calls.append(packed.layer.name)
        return limited(view, packed, limit)

    monkeypatch.setattr(decoded, "_limited", counted)
    return calls


def on_disk(folder, data: bytes, name: str = "kernelcache") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def open_and_compare(path: str, data: bytes) -> None:
    peeled = peel(FileSource(path), "i386")
    assert whole(peeled.source) == data
    peeled.source.close()


def entries(folder) -> list[str]:
    """The big files in the cache."""
    where = folder / "cache"
    names = os.listdir(where) if where.is_dir() else []
    return [str(where / name) for name in sorted(names) if not name.startswith(decoded.BY_PLACE)]


def test_the_second_time_nothing_is_decoded(tmp_path, cached, monkeypatch):
    data = real(KERNEL)
    path = on_disk(tmp_path, build.im4p(build.gzip(wrapped("bvx2", KERNEL))))
    open_and_compare(path, data)
    assert cached == ["gzip", "LZFSE"]
    monkeypatch.setattr(decoded, "_hash_content", None)  # nor is it read as a whole
    monkeypatch.setitem(sys.modules, "lzfse", None)
    open_and_compare(path, data)
    assert cached == ["gzip", "LZFSE"]


def test_content_decides_not_the_file(tmp_path, cached):
    data, image = real(KERNEL), wrapped("bvx2", KERNEL)
    open_and_compare(on_disk(tmp_path, image), data)
    open_and_compare(on_disk(tmp_path, image, "copy"), data)
    open_and_compare(on_disk(tmp_path, build.im4p(image), "im4p"), data)
    assert cached == ["LZFSE"]
    peeled = peel(BytesSource(image))  # no file at all
    assert peeled.source.size == len(data)
    peeled.source.close()
    assert cached == ["LZFSE"]


def test_a_file_that_changes_is_decoded_again(tmp_path, cached):
    first, second = real(KERNEL), bytearray(real(KERNEL))
    second[len(second) // 2] ^= 1
    path = on_disk(tmp_path, build.lzfse_stored(first))
    open_and_compare(path, first)
    status = os.stat(path)
    with open(path, "wb") as file:  # in place, of the same size and with the old time
        file.write(build.lzfse_stored(bytes(second)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    open_and_compare(path, bytes(second))
    assert cached == ["LZFSE"] * 2


@pytest.mark.parametrize("damage", ["cut", "middle", "trailer", "empty", "directory"])
def test_damaged_entries_are_not_used(tmp_path, cached, damage):
    data = real(KERNEL)
    path = on_disk(tmp_path, wrapped("bvx2", KERNEL))
    open_and_compare(path, data)
    (entry,) = entries(tmp_path)
    content = bytearray(real_bytes(entry))
    assert content.startswith(data)
    if damage == "cut":
        del content[-100_000:]
    elif damage == "middle":
        content[2_000_000:3_000_000] = bytes(1_000_000)
    elif damage == "trailer":
        content[-1] ^= 1
    elif damage == "empty":
        content.clear()
    os.unlink(entry)
    if damage == "directory":
        os.mkdir(entry)
    else:
        on_disk(tmp_path / "cache", bytes(content), os.path.basename(entry))
    open_and_compare(path, data)
    assert cached == (["LZFSE"] * (3 if damage == "directory" else 2))


def real_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_a_wrong_size_is_refused_the_second_time_too(tmp_path, cached):
    payload = wrapped("bvx2", KERNEL)
    size = len(real(KERNEL))
    open_and_compare(
        on_disk(tmp_path, build.im4p(payload, build.compression(1, size))), real(KERNEL)
    )
    path = on_disk(tmp_path, build.im4p(payload, build.compression(1, size - 1)), "short")
    for _ in range(2):
        with pytest.raises(FormatError, match=f"expected {size - 1:#x} decoded bytes, got"):
            peel(FileSource(path))
    assert cached == ["LZFSE"]


def test_without_a_cache(tmp_path, cached, monkeypatch):
    data = real(KERNEL)
    path = on_disk(tmp_path, wrapped("bvx2", KERNEL))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("KVMTOOL_CACHE", "")
    open_and_compare(path, data)
    monkeypatch.setenv("KVMTOOL_CACHE", on_disk(tmp_path, b"", "no-folder"))
    open_and_compare(path, data)
    assert cached == ["LZFSE"] * 2
    assert os.listdir(scratch) == []


def test_nothing_is_left_of_what_fails(tmp_path, cached):
    image = bytearray(build.lzfse_stored(real(KERNEL)))
    path = on_disk(tmp_path, bytes(image[:-4]) + b"bvx!")
    with pytest.raises(FormatError, match="expected a magic"):
        peel(FileSource(path))
    image = build.comp("lzss", build.lzss(real(KERNEL)[:MANY]), b"other", size=MANY)
    with pytest.raises(FormatError, match="Adler-32"):
        peel(FileSource(on_disk(tmp_path, image)))
    assert cached == ["LZFSE", "comp/lzss"]
    assert os.listdir(tmp_path / "cache") == []


MANY = 800_000


def test_the_cache_keeps_to_its_limit(tmp_path, cached, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 15 << 20)  # two kernels and a bit
    data = bytearray(real(KERNEL))
    paths = []
    for number in range(4):
        data[5] = number
        paths.append(
            (on_disk(tmp_path, build.lzfse_stored(bytes(data)), f"k{number}"), bytes(data))
        )
        open_and_compare(*paths[-1])
    assert len(entries(tmp_path)) == 2
    open_and_compare(*paths[0])


def test_small_layers_are_not_kept(tmp_path, cached):
    open_and_compare(on_disk(tmp_path, build.lzfse(real(KEXT))), real(KEXT))
    assert entries(tmp_path) == []


def test_the_second_time_is_quick(tmp_path, cached):
    build.package()
    data = real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel") * 4
    path = on_disk(tmp_path, build.im4p(build.lzfse(data)))
    open_and_compare(path, data)
    script = (
        "import sys, time\nfrom kvmtool.source import FileSource\nfrom kvmtool.peel import peel\n"
        "start = time.process_time()\nsource = peel(FileSource(sys.argv[1])).source\n"
        "source.read_at(source.size - 4096, 4096)\nprint(time.process_time() - start)\n"
    )
    command = [sys.executable, "-c", script, path]
    runs = [
        float(subprocess.run(command, capture_output=True, check=True, cwd=inputs.ROOT).stdout)
        for _ in range(3)
    ]
    assert min(runs) < 0.040
    assert cached == ["LZFSE"]


# what closes what


class Watched(BytesSource):
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_closing_the_result_closes_everything():
    source = Watched(build.im4p(build.gzip(build.gzip(real(KEXT)))), "kc")
    peeled = peel(source)
    held = peeled.source._held
    assert len(held) == 3
    peeled.source.close()
    assert source.closed == 1
    for file in held[1:]:
        with pytest.raises(ValueError, match="closed"):
            file.read_at(0, 1)


def test_an_error_leaves_the_source_open():
    source = Watched(build.gzip(build.im4p(RAW)[:-1]), "kc")
    with pytest.raises(TruncatedError):
        peel(source)
    assert source.closed == 0


# hostile bytes


def mutated(data: bytes, rng: random.Random) -> bytes:
    image = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(6)
        # headers are worth more than the rest
        at = rng.randrange(min(len(image), rng.choice((16, 64, 800, len(image)))))
        if kind == 0:
            image[at] = rng.randrange(256)
        elif kind == 1:
            image[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            value = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(image)))
            image[at : at + 4] = value.to_bytes(4, rng.choice(("big", "little")))
        elif kind == 3:
            del image[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            image[at:at] = image[at : at + rng.randrange(1, 50)]
        else:
            del image[rng.randrange(len(image)) :]
        if not image:
            break
    return bytes(image)


@pytest.mark.parametrize("form", FORMS)
def test_mutations_are_errors_of_ours(form):
    data = wrapped(form, KEXT)
    rng = random.Random(f"peel {form}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    errors = []
    for number in range(200):
        image = mutated(data, rng)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KvmWarning)
            try:
                peel(BytesSource(image, "kc"), "i386").source.close()
            except KvmError as error:
                errors.append(str(error))
        assert time.process_time() - start < 2, number
    assert len(errors) > 50
    for text in errors:
        assert text.startswith("kc") or "; kc has slices" in text, text
        assert "\n" not in text
    # the highest ever, so it grows only if this was it; in KiB, on macOS in bytes
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 500 << (20 if sys.platform == "darwin" else 10)
