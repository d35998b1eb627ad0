"""Exact types: recognised by their bytes, found where they may lie, refused where they are not."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings

import pytest

import kvmtool
from kvmtool.errors import (
    FormatError,
    KvmWarning,
    MismatchError,
    NotFoundError,
)
from kvmtool.kernel_file import open_kernel
from kvmtool.macho import LC_SYMTAB, LC_UUID, MH_DSYM, arch_name
from kvmtool.type_files import KernelIdentity, find_types, open_types
from kvmtool.types import layouts
from kvmtool.types.chained import chain
from kvmtool.types.ctype import Compound, Field
from kvmtool.types.model import TypeTable
from tests.inputs import real

KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"
OBJECT = "objects/x86_64-xnu-2422.115.4-kern_proc.o"
PPC = "objects/ppc-xnu-792.25.20-kern_proc.o"
ZFS = "kexts/fat-ppc-i386-zfs-102A"


def identity(path, arch=None):
    image = open_kernel(path, arch).image
    word = 8 if image.is64 else 4
    arch = arch_name(image.cputype, image.cpusubtype)
    return image, KernelIdentity(arch, image.byteorder, word, image.uuid, None)


def bundle(folder, name, content):
    """A dSYM bundle at folder/name.dSYM with the file `content` in it."""
    inside = os.path.join(folder, f"{name}.dSYM", "Contents", "Resources", "DWARF")
    os.makedirs(inside)
    shutil.copy(content, os.path.join(inside, name))
    return os.path.join(folder, f"{name}.dSYM")


# ------------------------------------------------------------------------------ by their bytes


@pytest.mark.parametrize(
    ("name", "tag", "size"),
    [
        (OBJECT, "proc", 0x4A8),
        (PPC, "proc", 0x1F4),
        (f"{OBJECT}.ctf", "proc", 0x4A8),
        ("types/x86_64-xnu-2422.115.4.ctfdata", "proc", 1192),
        ("types/x86_64-10.8.5.types.json.gz", "proc", 0x460),
        ("profiles/Mavericks_10.9.4_13e28.zip", "proc", 0x4A8),
        (KERNEL, "task", 960),
    ],
)
def test_known_by_bytes_whatever_the_name(tmp_path, name, tag, size):
    path = str(tmp_path / "types")
    shutil.copy(real(name), path)
    found = open_types(path)
    assert TypeTable(found.source).size(tag) == size
    assert found.how.endswith("named by the user")
    for source in found.held:
        source.close()


@pytest.mark.parametrize(("arch", "word"), [("i386", "<"), ("ppc", ">")])
def test_the_slice_of_the_kernel(arch, word):
    _, kernel = identity(real(ZFS), arch)
    found = open_types(real(f"{ZFS}.dSYM"), kernel)
    assert (found.source.byteorder, found.source.pointer_size) == (word, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a Mach-O, CTF, ISF or a Volatility 2 profile, got nothing"),
        (b"# readme\n", "expected a Mach-O, CTF, ISF or a Volatility 2 profile, got 23207265"),
        (b"\x7fELF" + b"\0" * 60, "got 7f454c46"),
        (b'{"a": 1}', "expected a Mach-O"),
        (b"PK\x03\x04" + b"\0" * 40, "expected a zip"),
        (b"\xf1\xcf\x02\x01" + b"\xff" * 40, "offset"),
        (b"\x1f\x8b\x08\0" + b"\xff" * 40, "offset"),
        (b"\xfd7zXZ\0" + b"\xff" * 40, "offset"),
        (b"\xcf\xfa\xed\xfe" + b"\xff" * 60, "offset"),
        (b"\xca\xfe\xba\xbe" + b"\0" * 40, "offset"),
    ],
)
def test_what_is_none_is_one_error(tmp_path, content, message):
    path = tmp_path / "types"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open_types(str(path))
    assert str(path) in str(caught.value)


def test_a_macho_without_types():
    with pytest.raises(NotFoundError, match="neither DWARF nor CTF"):
        open_types(real("kexts/i386-KernelMemoryAccess"))


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(FormatError, match="is a directory without Contents"):
        open_types(str(tmp_path))
    os.makedirs(tmp_path / "Contents" / "Resources" / "DWARF")
    with pytest.raises(NotFoundError, match="the bundle is empty"):
        open_types(str(tmp_path))


# ------------------------------------------------------------------------------ whose they are


def test_another_uuid_is_refused():
    _, zfs = identity(real(ZFS), "i386")
    other = zfs._replace(uuid=bytes(16))
    with pytest.raises(MismatchError, match=r"has the types of .* the kernel is 00000000-"):
        open_types(real(f"{ZFS}.dSYM"), other)
    assert open_types(real(f"{ZFS}.dSYM"), other, force=True).source.pointer_size == 4
    assert open_types(real(f"{ZFS}.dSYM"), zfs._replace(uuid=None)).source.pointer_size == 4


@pytest.mark.parametrize("name", [PPC, "types/i386-10.5.8.types.json.gz"])
def test_another_machine_is_refused(name):
    kernel = KernelIdentity("x86_64", "<", 8)
    with pytest.raises(MismatchError, match=r"has the types of a 32-bit .*kernel is a 64-bit"):
        open_types(real(name), kernel)


def test_another_banner_is_refused(tmp_path):
    path = tmp_path / "isf.json"
    content = {
        "metadata": {"format": "6.2.0"},
        "base_types": {
            "int": {"size": 4, "signed": True, "kind": "int", "endian": "little"},
            "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
        },
        "user_types": {"proc": {"kind": "struct", "size": 8, "fields": {}}},
        "enums": {},
        "symbols": {"version": {"address": 1, "constant_data": "RGFyd2luIEtlcm5lbAA="}},
    }
    path.write_text(json.dumps(content))
    kernel = KernelIdentity("x86_64", banner="Darwin Kernel")
    assert open_types(str(path), kernel).source.find("tag", "proc").size == 8
    with pytest.raises(MismatchError, match="'Darwin Kernel', the kernel is 'Darwin 2'"):
        open_types(str(path), kernel._replace(banner="Darwin 2"))


# ------------------------------------------------------------------------------ where they lie


def test_beside_the_kernel(tmp_path):
    kext = shutil.copy(real(ZFS), tmp_path / "zfs")
    image, kernel = identity(str(kext), "i386")
    assert find_types(image, str(kext), kernel) is None
    bundle(str(tmp_path), "zfs", real(f"{ZFS}.dSYM"))
    found = find_types(image, str(kext), kernel)
    assert found.how.startswith("DWARF 2 of ")
    assert found.how.endswith("zfs.dSYM/Contents/Resources/DWARF/zfs (fat), beside the kernel")


def test_in_a_bundle_of_many_by_uuid(tmp_path):
    path = bundle(str(tmp_path), "a", real(OBJECT))
    shutil.copy(real(f"{ZFS}.dSYM"), os.path.join(path, "Contents/Resources/DWARF/zfs"))
    _, kernel = identity(real(ZFS), "ppc")
    assert open_types(path, kernel).source.byteorder == ">"


def test_in_the_kernel_path(tmp_path):
    folder = tmp_path / "kits" / "deeper"
    folder.mkdir(parents=True)
    bundle(str(folder), "other", real(f"{ZFS}.dSYM"))
    kext = str(shutil.copy(real(ZFS), tmp_path / "zfs"))
    image, kernel = identity(kext, "i386")
    found = find_types(image, kext, kernel, [str(tmp_path)])
    assert found.how.endswith("found by the kernel's UUID")
    assert find_types(image, kext, kernel._replace(uuid=bytes(16)), [str(tmp_path)]) is None
    shutil.copy(real(f"{ZFS}.dSYM"), tmp_path / "zfs.dSYM")
    assert find_types(image, kext, kernel).how.endswith("zfs.dSYM (fat), beside the kernel")


def test_ctf_in_the_kernel_and_beside_it(tmp_path):
    image, kernel = identity(real(KERNEL))
    assert find_types(image, None, kernel).how.endswith("in the kernel itself")
    alone = str(tmp_path / "mach_kernel")
    shutil.copy(real("types/x86_64-xnu-2422.115.4.ctfdata"), f"{alone}.ctfdata")
    assert find_types(None, alone, kernel).how.endswith("mach_kernel.ctfdata, beside the kernel")


def as_dsym(path, uuid, out):
    """An object file turned into a dSYM of that UUID, which takes the place of its LC_SYMTAB."""
    with open(path, "rb") as source:
        content = bytearray(source.read())
    struct.pack_into("<I", content, 12, MH_DSYM)
    image = open_kernel(path).image
    command = next(image.commands(LC_SYMTAB))
    struct.pack_into("<II16s", content, command.offset, LC_UUID, 24, uuid)
    with open(out, "wb") as made:
        made.write(content)


def test_a_dsym_in_the_kernel_path_wins_over_ctf_inside(tmp_path):
    """DWARF knows what CTF leaves out. The second time the folder's index is enough."""
    image, kernel = identity(real(KERNEL))
    as_dsym(real(OBJECT), image.uuid, tmp_path / "some file")
    for _ in range(2):
        found = find_types(image, real(KERNEL), kernel, [str(tmp_path)])
        assert found.how == f"DWARF 2 of {tmp_path}/some file, found by the kernel's UUID"
        assert TypeTable(found.source).size("proc") == 0x4A8
        found.held[0].close()
    other = kernel._replace(uuid=bytes(16))
    assert "CTF" in find_types(image, real(KERNEL), other, [str(tmp_path)]).how


def test_what_is_damaged_is_passed_over(tmp_path):
    """A dSYM with another UUID, damaged CTF; then what is good."""
    kernel_path = str(tmp_path / "mach_kernel")
    image, kernel = identity(real(KERNEL))
    bundle(str(tmp_path), "mach_kernel", real(KERNEL))
    found = find_types(None, kernel_path, kernel)
    assert found.source.find("tag", "proc").size == 0x4A8
    with pytest.warns(KvmWarning, match="types passed over: .* has the types of 4C4C4432"):
        assert find_types(None, kernel_path, kernel._replace(uuid=bytes(16))) is None
    (tmp_path / "mach_kernel.ctf").write_bytes(b"\xf1\xcf\x02\x01" + b"\xff" * 60)
    shutil.copy(real("types/x86_64-10.8.5.types.json.gz"), f"{kernel_path}.json.gz")
    shutil.rmtree(f"{kernel_path}.dSYM")
    with pytest.warns(KvmWarning, match="types passed over: .*mach_kernel.ctf"):
        assert find_types(None, kernel_path, kernel).source.find("tag", "proc").size == 0x460
    del image


# ------------------------------------------------------------------------------ in a handle


def test_a_kernel_has_its_own_types():
    with kvmtool.open(real(KERNEL)) as kvm:
        assert kvm.type_choice.exact
        assert "in the kernel itself" in kvm.type_choice.how
        assert kvm.types.size("ifnet") == 1688
        assert kvm.types.variable("_kernproc") is not None


def test_named_types_win_and_the_layout_fills_in():
    core = real("machine/crash.kdp-core")
    with kvmtool.open(real(KERNEL), core, types=real(OBJECT)) as kvm:
        target = kvm.verified_target()
        assert kvm.tried[-1][2].fits
        assert target.types.name.endswith("kern_proc.o")
        assert "what these lack: layout of 10.9.5 x86_64" in kvm.type_choice.how
        assert target.types.size("proc") == 0x4A8
        assert target.types.size("zone") == layouts.table("10.9.5 x86_64").size("zone")
        assert len(list(kvm.procs())) == 7


def test_named_types_that_do_not_fit_are_an_error():
    wrong = real("types/x86_64-10.8.5.types.json.gz")
    with (
        kvmtool.open(real(KERNEL), real("machine/crash.kdp-core"), types=wrong) as kvm,
        pytest.raises(MismatchError, match=r"ISF .*named by the user.*kernproc at"),
    ):
        kvm.verified_target()


def test_found_types_that_do_not_fit_give_way(tmp_path):
    """Beside the kernel lie those of another: the layout is used, and the user is told."""
    kernel = shutil.copy(real("dumps/x86_64-10.8.5/mach_kernel"), tmp_path / "mach_kernel")
    shutil.copy(real("profiles/Mavericks_10.9.4_13e28.zip"), tmp_path / "mach_kernel.json")
    core = real("dumps/x86_64-10.8.5/core.macho.gz")
    with kvmtool.open(str(kernel), core) as kvm:
        with pytest.warns(KvmWarning, match=r"Volatility 2 profile .* do not fit: kernproc"):
            kvm.verified_target()
        assert kvm.type_choice.how.startswith("layout of 10.8.5")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kvm.types.size("proc") == 0x460


def test_a_big_endian_object_needs_no_layout():
    with kvmtool.open(real(PPC)) as kvm:
        assert kvm.types.size("proc") == 0x1F4
        assert kvm.type_choice.how.endswith("in the kernel itself")
    with (
        kvmtool.open(real("kexts/i386-KernelMemoryAccess")) as kvm,
        pytest.raises(NotFoundError, match="layout"),
    ):
        assert kvm.types


# ------------------------------------------------------------------------------ one behind another


class Some:
    """A source of given structures."""

    byteorder, pointer_size, origin = "<", 8, "test"

    def __init__(self, name, **sizes):
        self.name = name
        self.sizes = sizes

    def find(self, kind, name):
        if kind != "tag" or name not in self.sizes:
            return None
        size = self.sizes[name]
        fields = (
            () if size is None else [Field(f"{self.name}_{name}", Compound("struct", "x", 8), 0)]
        )
        return Compound("struct", name, size, fields)

    def names(self, kind):
        return list(self.sizes) if kind == "tag" else []

    def variable(self, name):
        return self.find("tag", name.removeprefix("v_")) if name.startswith("v_") else None


def test_chained():
    first, then = Some("first", a=8, b=None, d=None), Some("then", a=16, b=24, c=32)
    table = chain(first, TypeTable(then))
    assert [table.type(tag).size for tag in "abc"] == [8, 24, 32]
    assert [table.size(tag) for tag in "abc"] == [8, 24, 32]
    assert table.type("struct d").size is None
    assert table.offset("a", "first_a") == 0
    assert table.has("b", "then_b")
    assert not table.has("a", "then_a")
    assert table.structs() == ["a", "b", "c", "d"]
    assert table.variable("v_c").size == 32
    assert table.name == "first"
    with pytest.raises(NotFoundError, match="structure e not found"):
        table.struct("e")


def test_magic_alone_is_no_ctf(tmp_path):
    """Two bytes are little: a file that only begins with them is an error, not an empty table."""
    path = tmp_path / "types"
    path.write_bytes(struct.pack("<HBB", 0xCFF1, 9, 0) + bytes(60))
    with pytest.raises(FormatError):
        open_types(str(path))
