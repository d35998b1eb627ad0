"""Thousands of damaged kernel files through the whole pipeline: one-line errors, bounded costs.

`KVMTOOL_MUTATIONS=2000` runs as many as that; a plain run does every tenth. The seed of a case is
its number, so that one that fails can be had again.
"""

from __future__ import annotations

import os
import random
import resource
import time
import warnings
from typing import TYPE_CHECKING

import pytest

import kvmtool
from kvmtool import sample
from kvmtool.types import layouts
from tests.builders import kernelcache, xnu
from tests.builders import peel as wrap
from tests.builders.specs import ProcSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = int(os.environ.get("KVMTOOL_MUTATIONS", "200"))
SECONDS, BYTES = 2.0, 500 << 20


def _kernel() -> bytes:
    layout = layouts.table("10.9.5 x86_64")
    specs = [ProcSpec(pid=0, ppid=0, comm="kernel_task")]
    return xnu.build(layout, "x86_64", specs, banner="Darwin Kernel Version 13.4.0: x").kernel


def _images(folder: str) -> Iterator[bytes]:
    """One image of every kind, small enough that thousands of them take a minute."""
    sample.write(folder)
    with open(os.path.join(folder, "KernelMemoryAccess"), "rb") as file:
        kext_file = file.read()
    base = 0xFFFFFF8000200000
    kernel = kernelcache.small_kernel("x86_64", base, [base + 8, base + 16])
    kexts = [
        kernelcache.Kext(
            f"com.example.kext{n}",
            "1.0",
            kernelcache.small_kext("x86_64", base + (n + 1) * 0x100000, ["_a", "_b"], b"x" * 16),
        )
        for n in range(2)
    ]
    prelinked = kernelcache.prelinked_kernel(kernel, kexts)
    yield kernel
    yield kext_file
    yield prelinked
    yield wrap.fat([(0x01000007, 3, kernel), (7, 3, kext_file)])
    yield wrap.im4p(wrap.lzfse(prelinked), wrap.compression(1, len(prelinked)))
    yield wrap.img4(wrap.im4p(kernel))
    yield wrap.comp("lzss", wrap.lzss(kernel), kernel)
    yield wrap.comp("lzvn", wrap.lzvn(kernel), kernel)
    yield wrap.gzip(prelinked)
    yield wrap.xz(kernel)
    yield wrap.zstd(kernel)
    fileset = kernelcache.collection(
        "x86_64",
        base - 0x100000,
        [kernelcache.Kext("com.apple.kernel", "1", kernel), *kexts],
        {"com.apple.kernel": [base + 0x1000], "com.example.kext0": [], "com.example.kext1": []},
        pointer_format=11,
        page_size=0x1000,
    )
    yield fileset.data


def mutated(data: bytes, case: int) -> bytes:
    """`data` with some bytes changed, most of them near the start, or cut off."""
    chance = random.Random(case)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 32))):
        reach = chance.choice((64, 1024, 8192, len(out)))
        at = chance.randrange(min(reach, len(out)))
        if chance.random() < 0.5:
            out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        else:
            size = chance.choice((2, 4, 8))
            out[at : at + size] = chance.choice((b"\xff", b"\0", b"\x7f")) * size
    if chance.random() < 0.1:
        del out[chance.randrange(len(out)) :]
    return bytes(out)


def look_at(path: str) -> None:
    """Everything a user may ask of a kernel's file."""
    with kvmtool.open(path, arch="x86_64") as kvm:
        kvm.nlist(["_version", "_one", "_nothing"])
        addresses = [symbol.address for symbol in kvm.symbols]
        for kext in kvm.kexts:
            addresses += [symbol.address for symbol in kext.symbols]
        for address in [*addresses[:16], 0, (1 << 64) - 8]:
            kvm.symbol_at(address)
            for _ in kvm.memory.read_pieces(address, 64):
                pass
        for region in list(kvm.memory.regions())[:64]:
            kvm.memory.read(region.start, min(region.size, 4096))


def _refusal(path: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kvmtool.KvmWarning)
        try:
            look_at(path)
        except kvmtool.KvmError as error:
            return str(error)
    return None


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return list(_images(str(tmp_path_factory.mktemp("images"))))


def test_every_image_opens_before_it_is_damaged(images: list[bytes], tmp_path) -> None:
    for number, data in enumerate(images):
        path = str(tmp_path / f"{number}.image")
        with open(path, "wb") as file:
            file.write(data)
        look_at(path)


def test_only_one_line_errors(images: list[bytes], tmp_path) -> None:
    path = str(tmp_path / "image")
    refused = 0
    for case in range(CASES):
        with open(path, "wb") as file:
            file.write(mutated(images[case % len(images)], case))
        began = time.process_time()
        message = _refusal(path)
        refused += message is not None
        assert "\n" not in (message or ""), f"case {case}"
        took = time.process_time() - began
        assert took < SECONDS, f"case {case} took {took:.1f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert refused > CASES / 10
    assert peak < BYTES or CASES < 2000, f"peak memory {peak >> 20} MiB"
