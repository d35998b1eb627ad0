"""The kernel as files, the file that is read and not mapped, and the real devices."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmtool
from kvmtool.devices import (
    DEVICE_SIZE,
    XATTR_LIMIT,
    Devices,
    KernelView,
    dd_line,
    exposed,
    kmem_offset,
)
from kvmtool.errors import FaultError, FormatError, KvmError, TruncatedError, UnsupportedError
from kvmtool.formats.kmem import Kmem, KmemSource, open_kmem
from kvmtool.memory import RunMemory
from kvmtool.pread_source import PreadSource
from kvmtool.source import BytesSource
from kvmtool.symbols import Symbol
from tests.builders.llvm import run
from tests.inputs import plain_core, real

KERNEL = 0xFFFFFF8000200000
DATA = random.Random(3).randbytes(0x5000)
SYMBOLS = [
    Symbol("_cdevsw", KERNEL + 0x10, 0xF, 2, 0, KERNEL - 0x1000),
    Symbol("_start", KERNEL, 0xF, 1, 0, KERNEL - 0x1010),
    Symbol("bad\nname", KERNEL + 0x20, 0xE, 1, 0, 0),
    Symbol("_absolute", 5, 2, 0, 0, 5),
]
SECTIONS = (("__TEXT", "__text"), ("__DATA", "__data"))


def memory(base: int, space: str = "kernel") -> RunMemory:
    """Three pages, a hole of two, and a last run that ends in the middle of a page."""
    starts, ends = [base, base + 0x5000], [base + 0x3000, base + 0x6800]
    offsets = [0, 0x3000]
    source = BytesSource(DATA)
    return RunMemory(source, array("Q", starts), array("Q", ends), array("Q", offsets), space=space)


def view(**changes) -> KernelView:
    """A 64-bit kernel with physical memory."""
    plain = KernelView(memory(KERNEL), memory(0, "physical"), SYMBOLS, 8, "<", SECTIONS)
    return plain._replace(**changes)


def refused(number: int):
    """An OSError with that errno."""
    return pytest.raises(OSError, match=os.strerror(number))


# devices


def test_kmem_of_a_64_bit_kernel_has_the_top_bit_cleared():
    # xnu-4570 bsd/dev/mem.c: 0x7FFFFF80AABBCCDD stands for 0xFFFFFF80AABBCCDD
    assert kmem_offset(0xFFFFFF80AABBCCDD, 8) == 0x7FFFFF80AABBCCDD
    devices = Devices(view())
    assert devices.names == ("kmem", "mem", "symbols", "info.json")
    assert devices.read("kmem", 4, 0x7FFFFF8000200010) == DATA[0x10:0x14]
    assert devices.size("kmem") == DEVICE_SIZE == (1 << 63) - 1
    with refused(errno.EFAULT):
        devices.read("kmem", 4, KERNEL + 0x10)  # the top bit set already
    with refused(errno.EFAULT):
        devices.read("kmem", 4, KERNEL - (1 << 64))
    with pytest.raises(KvmError, match="top bit"):
        kmem_offset(0x200000, 8)


def test_kmem_of_a_32_bit_kernel_is_plain():
    devices = Devices(view(memory=memory(0x441000), pointer_size=4))
    assert devices.names == ("kmem", "kmem32", "mem", "symbols", "info.json")
    assert devices.size("kmem32") == 1 << 32
    for name in ("kmem", "kmem32"):
        assert devices.read(name, 4, 0x441010) == DATA[0x10:0x14]
        with refused(errno.EFAULT):
            devices.read(name, 4, 1 << 32)
    assert kmem_offset(0x441010, 4) == 0x441010
    with refused(errno.ENOENT):
        Devices(view()).read("kmem32", 4, 0)
    with refused(errno.ENOENT):
        Devices(view()).size("kmem32")


@given(st.integers(0, 0x7000), st.integers(0, 0x3000))
def test_a_read_is_whole_or_efault(offset, size):
    held = [DATA[at : at + 1] for at in range(0x3000)] + [b""] * 0x2000
    held += [DATA[at : at + 1] for at in range(0x3000, 0x4800)]
    held += [b""] * (offset + size)
    wanted = held[offset : offset + size]
    devices = Devices(view())
    for name, base in (("kmem", KERNEL & DEVICE_SIZE), ("mem", 0)):
        if all(wanted):
            assert devices.read(name, size, base + offset) == b"".join(wanted)
        else:
            with refused(errno.EFAULT):
                devices.read(name, size, base + offset)


def test_mem_is_as_long_as_memory_reaches():
    assert Devices(view()).size("mem") == 0x6800
    unsaid = view(physical=Kmem(KmemSource("mem", FakeDevice)).physical())
    assert Devices(unsaid).size("mem") == DEVICE_SIZE


def test_no_physical_memory_is_enodev():
    devices = Devices(view(physical=None))
    assert devices.size("mem") == 0
    with refused(errno.ENODEV):
        devices.read("mem", 1, 0)
    with refused(errno.ENODEV):
        devices.xattr("mem", "user.kvm.0.1")


@pytest.mark.parametrize("name", ["kmem", "mem", "symbols"])
def test_writing_is_not_supported(name):
    with refused(errno.ENOTSUP):
        Devices(view()).write(name, b"x", 0)


def test_unknown_names():
    devices = Devices(view())
    with refused(errno.ENOENT):
        devices.size("kmem48")
    with refused(errno.ENOENT):
        devices.read("kmem48", 1, 0)


def test_symbols_are_those_of_nm():
    devices = Devices(view())
    expected = (
        b"0000000000000005 a _absolute\n"
        b"ffffff8000200000 T _start\n"
        b"ffffff8000200010 D _cdevsw\n"
        b"ffffff8000200020 t bad\\nname\n"
    )
    assert devices.read("symbols", 4096, 0) == expected
    assert devices.size("symbols") == len(expected)
    assert devices.read("symbols", 9, 17) == expected[17:26]
    assert devices.read("symbols", 9, 4096) == b""


def test_info_says_how_offsets_are_made():
    info = json.loads(Devices(view(facts={"arch": "x86_64"})).read("info.json", 9999, 0))
    assert info == {
        "arch": "x86_64",
        "pointer_size": 8,
        "byteorder": "little",
        "kmem_offset": "address & 0x7fffffffffffffff",
        "mem_offset": "address",
        "mem_size": 0x6800,
    }


def test_xattr_takes_the_full_address():
    devices = Devices(view())
    name = f"user.kvm.{KERNEL + 0x10:x}"
    assert devices.xattr("kmem", f"{name}.16") == DATA[0x10:0x20]
    assert devices.xattr("kmem", f"user.kvm.0x{KERNEL:X}.3", room=3) == DATA[:3]
    assert devices.xattr("mem", "user.kvm.5000.4") == DATA[0x3000:0x3004]
    with refused(errno.ERANGE):
        devices.xattr("kmem", f"{name}.16", room=15)
    with refused(errno.E2BIG):
        devices.xattr("kmem", f"{name}.{XATTR_LIMIT + 1}")
    with refused(errno.EFAULT):
        devices.xattr("kmem", f"{name}.{XATTR_LIMIT}")
    for other in ("user.kvm", "user.kvm.xyz.1", "user.kvm.1.1.1", "security.capability"):
        with refused(errno.ENODATA):
            devices.xattr("kmem", other)
    with refused(errno.ENODATA):
        devices.xattr("symbols", f"{name}.16")


def test_what_lies_behind_an_eio_is_said_once(tmp_path):
    path = tmp_path / "dump"
    path.write_bytes(DATA)
    source = PreadSource(str(path))
    kernel = RunMemory(source, array("Q", [KERNEL]), array("Q", [KERNEL + 0x5000]), array("Q", [0]))
    said: list[str] = []
    devices = Devices(view(memory=kernel), said.append)
    os.truncate(path, 0x1000)
    for at in (0x2000, 0x3000):
        with refused(errno.EIO):
            devices.read("kmem", 4, (KERNEL & DEVICE_SIZE) + at)
    assert devices.read("kmem", 4, KERNEL & DEVICE_SIZE) == DATA[:4]
    assert len(said) == 1
    assert "0x2000" in said[0]
    source.close()


def test_the_line_of_the_article():
    # cdevsw[11].d_read of the article's machine lies at 0x441990; dd knows no hexadecimal
    assert dd_line("/dev", 0x441990, 4, 4) == "dd if=/dev/kmem bs=1 iseek=4462992 count=4 | od -X"
    assert dd_line("a b", KERNEL, 8, 8) == (
        f"dd if='a b/kmem' bs=1 iseek={KERNEL - (1 << 63)} count=8 | od -X"
    )


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.13.6"])
def test_a_real_kernel(dump):
    path = real(f"dumps/{dump}/mach_kernel")
    with kvmtool.open(path, plain_core(dump)) as kvm:
        devices = Devices(exposed(kvm))
        text = devices.read("symbols", 1 << 30, 0).decode().splitlines()
        address = kvm.address("_cdevsw")
        slide = kvm.kerndisp or 0
        digits = kvm.arch.pointer_size * 2
        expected = set()
        for line in run("llvm-nm", "-n", "--defined-only", path).splitlines():
            value, letter, name = line.split(" ", 2)
            moved = int(value, 16) + (0 if letter in "aA" else slide)
            expected.add(f"{moved:0{digits}x} {letter} {name}")
        assert set(text) == expected
        assert [line[:digits] for line in text] == sorted(line[:digits] for line in text)
        offset = kmem_offset(address, kvm.arch.pointer_size)
        assert devices.read("kmem", 64, offset) == kvm.read(address, 64)
        info = json.loads(devices.read("info.json", 1 << 20, 0))
        assert (info["slide"], info["live"]) == (f"{slide:#x}", False)
        assert info["version"].startswith("Darwin Kernel Version")


# a file that is read, not mapped


def test_pread_source_reads_as_any(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = PreadSource(str(path))
    assert (source.size, source.name) == (len(DATA), str(path))
    assert source.read_at(0x123, 0x2000) == DATA[0x123:0x2123]
    assert source.read_at(len(DATA), 0) == b""
    assert source.find(DATA[0x2000:0x2008], 0, source.size) == 0x2000
    assert source.find(DATA[0x2000:0x2008], 0x2001, source.size) == -1
    for off, size in ((len(DATA), 1), (-1, 1), (0, len(DATA) + 1)):
        with pytest.raises(TruncatedError):
            source.read_at(off, size)
    source.close()
    source.close()


def test_a_file_cut_while_open_is_an_error_not_a_signal(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    source = PreadSource(str(path))
    os.truncate(path, 0x1800)
    assert source.read_at(0x1000, 0x800) == DATA[0x1000:0x1800]
    with pytest.raises(TruncatedError) as cut:
        source.read_at(0x1000, 0x1000)
    assert (cut.value.offset, cut.value.wanted, cut.value.got) == (0x1000, 0x1000, 0x800)
    source.close()


def test_pread_source_takes_files_only(tmp_path):
    with pytest.raises(FormatError, match="a directory"):
        PreadSource(str(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="not a regular file"):
        PreadSource(str(tmp_path / "fifo"))


# the real devices


class FakeDevice:
    """/dev/kmem as bsd/dev/mem.c has it: `masked` as after kmem=3, `wide` for x86_64."""

    masked = False
    wide = True
    short = False
    closed = False

    def __init__(self, path: str) -> None:
        self.path = path
        self.reads: list[tuple[int, int]] = []
        self.base = KERNEL if self.wide else 0x441000

    def pread(self, size: int, offset: int) -> bytes:
        """All pages or EFAULT."""
        self.reads.append((size, offset))
        address = offset & (1 << 64) - 1
        if self.masked:
            if offset < 0:
                raise OSError(errno.EFAULT, "Bad address")
            address |= 1 << 63
        at = address - self.base
        if not 0 <= at <= at + size <= len(DATA) or at < 0x3000 < at + size:
            raise OSError(errno.EFAULT, "Bad address")
        return DATA[at : at + size - self.short]

    def close(self) -> None:
        """Remember it."""
        self.closed = True


class MaskedDevice(FakeDevice):
    """kmem=3."""

    masked = True


class NarrowDevice(FakeDevice):
    """i386 or ppc."""

    wide = False


def kernel_memory(device: type[FakeDevice]):
    """The memory of a fake device."""
    found = Kmem(KmemSource("/dev/kmem", device)).virtual()
    assert found is not None
    return found


@pytest.mark.parametrize("device", [FakeDevice, MaskedDevice, NarrowDevice])
def test_kmem_reads(device):
    memory, base = kernel_memory(device), device("").base
    assert memory.space == "kernel"
    assert memory.masked is None
    assert memory.read(base + 0x10, 8) == DATA[0x10:0x18]
    assert memory.masked == (device.masked if device.wide else None)
    assert memory.read(base + 0x3000, 0x2000) == DATA[0x3000:]
    with pytest.raises(FaultError) as fault:
        memory.read(base + 0x2FFC, 8)
    assert (fault.value.address, fault.value.reason) == (base + 0x3000, "unmapped")
    with pytest.raises(FaultError) as fault:
        memory.read(base + 0x4000, 0x9000)
    assert fault.value.address == base + 0x5000
    pieces = list(memory.read_pieces(base - 0x1000, 0x3000))
    assert (pieces[0].address, pieces[0].data) == (base - 0x1000, None)
    assert b"".join(p.data for p in pieces if p.data) == DATA[:0x2000]


def test_the_way_to_give_addresses_is_learnt_once():
    source = KmemSource("/dev/kmem", MaskedDevice)
    memory = Kmem(source).virtual()
    assert memory is not None
    memory.read(KERNEL, 4)
    memory.read(KERNEL + 4, 4)
    device = source._device
    assert isinstance(device, FakeDevice)
    assert device.reads == [
        (4, KERNEL - (1 << 64)),
        (4, KERNEL - (1 << 63)),
        (4, KERNEL + 4 - (1 << 63)),
    ]


def test_an_answer_in_part_is_no_xnu():
    class Short(FakeDevice):
        short = True

    with pytest.raises(KvmError, match="never answers in part"):
        kernel_memory(Short).read(KERNEL, 8)


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.ENOENT, UnsupportedError, "kmem=1"),
        (errno.ENODEV, UnsupportedError, "kmem=1"),
        (errno.ENXIO, UnsupportedError, "kmem=1"),
        (errno.EPERM, KvmError, "root"),
        (errno.EACCES, KvmError, "root"),
        (errno.EIO, KvmError, "error"),
    ],
)
def test_what_the_kernel_refuses_has_a_hint(number, kind, hint):
    class Refusing(FakeDevice):
        def pread(self, size: int, offset: int) -> bytes:
            raise OSError(number, os.strerror(number))

    def opener(path: str) -> FakeDevice:
        raise OSError(number, os.strerror(number), path)

    with pytest.raises(kind, match=hint) as opening:
        KmemSource("/dev/kmem", opener)
    with pytest.raises(kind, match=hint) as reading:
        kernel_memory(Refusing).read(KERNEL, 8)
    assert str(opening.value).startswith(f"/dev/kmem: {os.strerror(number)}")
    assert str(reading.value) == str(opening.value)


def test_what_is_no_device():
    with pytest.raises(KvmError, match="not a character device"):
        open_kmem(__file__)
    with pytest.raises(UnsupportedError, match="kmem=1"):
        open_kmem("/nonesuch/kmem")


def test_facts_come_from_the_running_kernel():
    version = "Darwin Kernel Version 17.7.0: root:xnu-4570.71.2~1/RELEASE_X86_64"
    kmem = Kmem(KmemSource("/dev/kmem", FakeDevice), ("x86_64", version))
    assert (kmem.facts.cputype, kmem.facts.version) == (0x01000007, version)
    assert (kmem.live, list(kmem.runs()), kmem.physical()) == (True, [], None)
    assert Kmem(KmemSource("/dev/kmem", FakeDevice)).facts.version is None
    with pytest.raises(UnsupportedError):
        kmem.source.read_at(0, 4)
    kmem.source.close()
    assert kmem.source._device.closed  # type: ignore[attr-defined]


def test_dev_mem_of_an_intel_mac_is_not_believed():
    source = KmemSource("/dev/mem", NarrowDevice)
    for machine in ("i386", "x86_64"):
        with pytest.raises(UnsupportedError, match="its own heap"):
            Kmem(source, (machine, "Darwin"))
    kmem = Kmem(source, ("Power Macintosh", "Darwin"))
    assert kmem.virtual() is None
    assert "stale heap" in kmem.warnings[0]
    physical = kmem.physical()
    assert physical is not None
    assert physical.read(0x441000, 4) == DATA[:4]


def test_a_device_really_is_opened():
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    memory = open_kmem("/dev/zero").virtual()
    assert memory is not None
    assert memory.read(0x1000, 16) == bytes(16)
    memory._source.close()
