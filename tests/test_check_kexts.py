"""The code of kexts against their files: as it was loaded, written over, relocated, prelinked."""

from __future__ import annotations

import shutil
import struct
from types import SimpleNamespace

import pytest

import kvmtool
from kvmtool import kexts
from kvmtool.arch import arch_for
from kvmtool.checks.finding import Outcome
from kvmtool.checks.kext_code import kextcode
from kvmtool.kernel_file import open_kernel
from kvmtool.kernelcache import KernelCache
from tests.builders import kernelcache
from tests.builders.dwarf import compiled
from tests.builders.typed import memory_of
from tests.checking import Core, checked
from tests.inputs import plain_core, real

NAME = "com.osxbook.kext.KernelMemoryAccess"


def beside(tmp_path, dump):
    """The kernel with the article's kext beside it, and a core to write into."""
    folder = tmp_path / "kernel"
    folder.mkdir()
    for name in ("mach_kernel", "KernelMemoryAccess"):
        shutil.copyfile(real(f"dumps/{dump}/{name}"), folder / name)
    return str(folder / "mach_kernel"), Core(tmp_path, plain_core(dump))


def kext_of(kernel, core):
    with kvmtool.open(kernel, core.path) as kvm:
        kext = next(kext for kext in kvm.kexts if kext.identifier == NAME)
        return kext.address, {symbol.name: symbol.address for symbol in kext.symbols}


@pytest.mark.parametrize("dump", ["x86_64-10.8.5", "x86_64-10.13.6"])
def test_the_articles_kext(dump, tmp_path):
    kernel, core = beside(tmp_path, dump)
    clean = checked(kernel, core.path, "--only", "kextcode")
    assert (clean.code, clean.rows) == (0, [])
    assert "looked at 1 pages of kexts' code" in clean.said
    assert "not there: files of 9 kexts to compare with: com.apple." in clean.said
    address, symbols = kext_of(kernel, core)
    at = symbols["_my_mmread"]
    core.write(at, b"\xe9" + struct.pack("<i", symbols["_my_mmopen"] - at - 5))
    core.write(symbols["_my_mmioctl"], b"\xcc")
    core.write(address + 0x1100, b"not code")
    found = checked(kernel, core.path, "--only", "kextcode")
    assert found.code == 3
    assert [(row["severity"], row["where"], row["address"]) for row in found.rows] == [
        ("high", f"_my_mmread [{NAME}]", hex(at)),
        ("medium", f"_my_mmioctl [{NAME}]", hex(symbols["_my_mmioctl"])),
    ]
    assert found.rows[0]["evidence"].startswith(f"code goes to {NAME}:_my_mmopen: ")


def test_a_kext_that_differs_from_its_file(tmp_path):
    """The i386 dump's maker left out the nop behind each function."""
    dump = "i386-10.5.8"
    kernel, core = beside(tmp_path, dump)
    with open(real(f"dumps/{dump}/KernelMemoryAccess"), "rb") as file:
        content = file.read()
    text, size = 0xB00, 0x400  # llvm-objdump --section-headers
    address, _ = kext_of(kernel, core)
    nops = [at for at in range(text, text + size) if content[at] == 0x90]
    found = checked(kernel, core.path, "--only", "kextcode")
    assert [row["address"] for row in found.rows] == [hex(address + at) for at in nops]
    assert len(nops) == 7


def test_without_files_there_is_nothing_to_compare():
    dump = "x86_64-10.8.5"
    found = checked(real(f"dumps/{dump}/mach_kernel"), plain_core(dump), "--only", "kextcode")
    assert found.code == 1
    assert "kextcode: not there: files of 10 kexts to compare with" in found.said


SOURCE = """
int _printf_(const char *, ...) __asm("_printf");
int nobody(void);
int entry(void) { return _printf_("x") + nobody(); }
"""


def test_what_was_relocated(tmp_path):
    """A call of the kernel's function is where it leads; one of nobody knows what is left open."""
    dump = "x86_64-10.8.5"
    kernel, core = real(f"dumps/{dump}/mach_kernel"), Core(tmp_path, plain_core(dump))
    flags = ("-target", "x86_64-apple-darwin", "-O1", "-mcmodel=kernel", "-fno-pic", "-mkernel")
    folder = tmp_path / "kext"
    folder.mkdir()
    path = compiled(str(folder), SOURCE, *flags)
    address, _ = kext_of(kernel, core)
    with kvmtool.open(kernel, core.path) as kvm:
        printf = kvm.address("_printf")
    image = open_kernel(path, "x86_64").image
    (section,) = (s for s in image.sections if s.sectname == "__text")
    code = bytearray(image.source.read_at(section.offset, section.size))
    image.source.close()
    start = address + 0x1000 + section.addr  # behind a page for the header
    calls = [at for at in range(len(code) - 4) if code[at : at + 5] == b"\xe8\0\0\0\0"]
    assert len(calls) == 2
    code[calls[0] + 1 : calls[0] + 5] = struct.pack("<i", printf - (start + calls[0] + 5))
    code[calls[1] + 1 : calls[1] + 5] = b"\x11\x22\x33\x44"
    core.write(start, bytes(code))
    only = ("--only", "kextcode", "--kext", f"{path}@{address:#x}")
    clean = checked(kernel, core.path, *only)
    assert [row["evidence"] for row in clean.rows] == []
    assert "looked at 1 pages of kexts' code" in clean.said
    core.write(start + calls[0] + 1, struct.pack("<i", printf - (start + calls[0] + 5) + 16))
    (row,) = checked(kernel, core.path, *only).rows
    assert "code goes to _printf+0x10: " in row["evidence"]


BASE, KEXT = 0xFFFFFF8000200000, 0xFFFFFF7F80700000


def prelinked(tmp_path, slide, change=b""):
    """A kernel with a kext inside that runs, and one that was given back; the check's outcome."""
    first = kernelcache.small_kext("x86_64", KEXT, ["_f"], b"1" * 16)
    flags = first.index(b"__text\0") + 64  # of a section_64: instructions
    first = first[:flags] + struct.pack("<I", 0x80000400) + first[flags + 4 :]
    second = kernelcache.small_kext("x86_64", KEXT + 0x8000, ["_g"], b"2" * 16)
    kernel = kernelcache.prelinked_kernel(
        kernelcache.small_kernel("x86_64", BASE, ()),
        [kernelcache.Kext("a.first", "1", first), kernelcache.Kext("a.second", "1", second)],
    )
    path = tmp_path / "kernel"
    path.write_bytes(kernel)
    image = open_kernel(str(path), "x86_64").image
    found = [kexts.from_image(kext, slide) for kext in KernelCache(image).kexts]
    memory = bytearray(first)
    memory[0x810 : 0x810 + len(change)] = change
    kvm = SimpleNamespace(
        kexts=found,
        memory=memory_of({KEXT + slide: bytes(memory)}),
        arch=arch_for(image.cputype),
        symbols=[],
        symbol_at=lambda address: None,
        code_at=hex,
        loaded_kexts=lambda: [SimpleNamespace(address=KEXT + slide)],
        kexts_beside=lambda: iter(()),
    )
    outcome = Outcome("kextcode")
    kextcode(SimpleNamespace(kvm=kvm, target=None), outcome)
    image.source.close()
    return outcome


@pytest.mark.parametrize("slide", [0, 0xA00000])
def test_kexts_linked_with_the_kernel(tmp_path, slide):
    clean = prelinked(tmp_path, slide)
    assert (clean.findings, clean.incomplete, clean.absent) == ([], [], [])
    assert clean.looked == {"pages of kexts' code": 1}
    (finding,) = prelinked(tmp_path, slide, b"\x0f\x0b").findings
    assert (finding.where, finding.address) == ("a.first __TEXT,__text", KEXT + slide + 0x810)
    assert "2 bytes" in finding.evidence
    (whole,) = prelinked(tmp_path, slide, b"\x01" + bytes(12)).findings
    assert whole.kind == "differs"


def test_a_kext_that_is_another_build(tmp_path):
    (finding,) = prelinked(tmp_path, 0, (b"\x0f" + bytes(12)) * 70).findings
    assert finding.evidence == f"70 changes, the first at {KEXT + 0x810:#x}"
    assert finding.expected == f"as in {tmp_path}/kernel a.first"
