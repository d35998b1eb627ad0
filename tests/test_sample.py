"""The embedded sample: what it must hold, found in its files by struct alone.

Offsets are those of xnu-792's structures on i386 (10.4); addresses are the article's.
"""

from __future__ import annotations

import glob
import os
import re
import struct
import zipfile

import pytest

from kvmtool import sample
from kvmtool.errors import FormatError
from tests.builders.llvm import run
from tests.builders.reader import Reader
from tools import build_sample

NAMES = ["mach_kernel", "core", "KernelMemoryAccess", "README.txt"]
P_PID, P_COMM, P_STAT, P_UCRED, P_STATS, P_PGRP = 0x24, 0xC3, 0x20, 0x8, 0x10, 0xF8
CR_UID, CR_RUID = 0xC, 0x10


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files as `write` unpacks them."""
    folder = tmp_path_factory.mktemp("sample")
    contents = {}
    for path in sample.write(str(folder)):
        with open(path, "rb") as file:
            contents[os.path.basename(path)] = file.read()
    return contents


@pytest.fixture(scope="module")
def symbols(files) -> dict[str, int]:
    """Names and values of mach_kernel's nlist entries."""
    return nlist(files["mach_kernel"])


@pytest.fixture(scope="module")
def core(files, symbols) -> Reader:
    return Reader(files["core"], symbols, 0)


def nlist(file: bytes) -> dict[str, int]:
    """The symbols of a 32-bit little-endian Mach-O file."""
    ncmds, at = struct.unpack_from("<I", file, 16)[0], 28
    for _ in range(ncmds):
        cmd, size = struct.unpack_from("<2I", file, at)
        if cmd == 2:
            symoff, nsyms, stroff, _ = struct.unpack_from("<4I", file, at + 8)
        at += size
    found = {}
    for n in range(nsyms):
        strx, _, _, _, value = struct.unpack_from("<IBBHI", file, symoff + 12 * n)
        start = stroff + strx
        found[file[start : file.index(b"\0", start)].decode()] = value
    return found


def test_it_is_small():
    """At most 200 KB in the package."""
    parts = glob.glob(os.path.join(os.path.dirname(sample.RESOURCE), "sample.*"))
    assert parts == [sample.RESOURCE]
    assert os.path.getsize(sample.RESOURCE) <= 200 * 1024


def test_rebuilding_gives_the_same():
    """The resource is what tools/build_sample.py makes, and that is the same every time."""
    built = build_sample.files()
    assert list(built) == NAMES
    assert build_sample.unpacked() == built
    assert build_sample.pack(built) == build_sample.pack(build_sample.files())


def test_cdevsw_11_reads_through_the_kext(files, symbols, core):
    """The article: nlist says 0x441720; 4 bytes at 0x441990 are 0x3bd0214f, in the kext."""
    assert symbols["_cdevsw"] == 0x441720
    assert symbols["_cdevsw"] + 11 * 0x38 + 8 == 0x441990
    assert core.read(0x441990, 4) == bytes.fromhex("4f21d03b")
    in_file = nlist(files["KernelMemoryAccess"])
    assert 0x3BD01000 + 0x1000 + in_file["_my_mmread"] == 0x3BD0214F
    opened = core.number(0x441990 - 8)
    assert opened == 0x3BD02000 + in_file["_my_mmopen"]
    names = {value: name for name, value in symbols.items()}
    assert names[core.number(symbols["_cdevsw"] + 3 * 0x38 + 8)] == "_mmread"
    assert names[core.number(symbols["_cdevsw"])] == "_cnopen"
    assert names[core.number(symbols["_cdevsw"] + 13 * 0x38)] == "_enodev"
    assert core.number(symbols["_nchrdev"]) > 11


def test_kernel_file_is_not_yet_patched(files, symbols):
    """In the file cdevsw[11] is still enodev, and the linked table is there."""
    at = symbols["_cdevsw"] - 0x111000  # __TEXT and __DATA lie in the file as in memory
    assert struct.unpack_from("<I", files["mach_kernel"], at)[0] == symbols["_cnopen"]
    row = struct.unpack_from("<14I", files["mach_kernel"], at + 11 * 0x38)
    assert set(row) == {symbols["_enodev"], symbols["_enodev_strat"], 0}


def test_kmod_list(symbols, core):
    """The article's kext is the last loaded; kmod_info has its address and size."""
    info = core.number(symbols["_kmod"])
    name = core.read(info + 0xC, 64).rstrip(b"\0")
    assert name == b"com.osxbook.kext.KernelMemoryAccess"
    assert struct.unpack("<3I", core.read(info + 0x94, 12)) == (0x3BD01000, 0x3000, 0x1000)
    assert 0x3BD01000 <= info < 0x3BD04000
    assert core.read(0x3BD01000, 4) == bytes.fromhex("cefaedfe")
    assert core.read(0x3BD0214F, 3) == bytes.fromhex("5589e5")  # push ebp; mov ebp, esp
    assert len(core.chain(symbols["_kmod"], 0)) >= 2


def test_processes(symbols, core):
    """A dozen or more, kernel_task last, the article's users, one stopped, one zombie."""
    procs = core.chain(symbols["_allproc"], 0)
    zombies = core.chain(symbols["_zombproc"], 0)
    assert len(procs) >= 12
    names = {core.number(p + P_PID): core.text(p + P_COMM) for p in procs}
    assert names[0] == "kernel_task"
    assert names[1] == "launchd"
    assert procs[-1] == core.number(symbols["_kernproc"])
    assert {"WindowServer", "loginwindow", "Finder", "Terminal", "kextd", "bash"} <= set(
        names.values()
    )
    users = {core.number(core.number(p + P_UCRED) + CR_UID) for p in procs}
    assert users == {0, 88, 501}
    assert [core.number(p + P_STAT, 1) for p in procs].count(4) == 1
    assert [core.number(p + P_STAT, 1) for p in zombies] == [5]
    assert core.number(symbols["_nprocs"]) == len(procs) + len(zombies)
    # proc_exit of xnu-792 frees pstats, and with it the start time
    assert core.number(zombies[0] + P_STATS) == 0
    tasks = symbols["_default_pset"] + 0x464
    assert len(core.chain(tasks, 0x18, tasks)) == len(procs)


def test_terminals(symbols, core):
    """Two logins on ttyp1 and ttyp2 (major 4), each with its session."""
    devices = set()
    for proc in core.chain(symbols["_allproc"], 0):
        session = core.number(core.number(proc + P_PGRP) + 0xC)
        tty = core.number(session + 0xC)
        if tty:
            devices.add(core.number(tty + 0x64))
            assert core.text(session + 0x14) == "amit"
    assert devices == {4 << 24 | 1, 4 << 24 | 2}


def test_banner_and_version(symbols, core):
    """In 10.4's form, of an xnu-792 for i386."""
    banner = core.read(symbols["_version"], 128).split(b"\0")[0].decode()
    assert re.fullmatch(
        r"Darwin Kernel Version 8\.\d+\.\d+: .*; root:xnu-792\..*/RELEASE_I386", banner
    )
    assert core.number(symbols["_version_major"]) == 8


def test_core_alone_is_enough(files, symbols, core):
    """The kernel's header and symbol table are in memory, as kern_dump of 10.4 wrote them."""
    header = core.read(0x111000, 28)
    assert struct.unpack_from("<4I", header)[::3] == (0xFEEDFACE, 2)
    assert header == files["mach_kernel"][:28]
    linkedit = max(a for a, *_ in core.segments if a < 0x1000000)
    tables = core.read(linkedit, 0x800)
    assert tables in files["mach_kernel"]


def test_llvm_reads_it(files, symbols, tmp_path):
    """llvm-nm prints our symbols, and the kext's."""
    for name, expected in (("mach_kernel", symbols), ("KernelMemoryAccess", None)):
        path = tmp_path / name
        path.write_bytes(files[name])
        lines = [line.split() for line in run("llvm-nm", str(path)).splitlines()]
        found = {words[-1]: int(words[0], 16) for words in lines if len(words) == 3}
        wanted = expected or {k: v for k, v in nlist(files[name]).items() if k in found}
        assert found == wanted
        assert found


def test_readme_names_what_is_there(files):
    """Its files and the two addresses; every command starts with kvmtool."""
    readme = files["README.txt"].decode()
    for name in NAMES[:3]:
        assert name in readme
    for fact in ("nlist _cdevsw", "read 0x441990 4", "0x3bd0214f", "invented"):
        assert fact in readme


def test_write_makes_folders_and_repeats(tmp_path):
    """The paths come back in order; a second run finds everything there."""
    folder = str(tmp_path / "new" / "folder")
    paths = sample.write(folder)
    assert paths == [os.path.join(folder, name) for name in NAMES]
    before = [os.stat(path).st_mtime_ns for path in paths]
    assert sample.write(folder) == paths
    assert [os.stat(path).st_mtime_ns for path in paths] == before
    assert sorted(os.listdir(folder)) == sorted(NAMES)


@pytest.mark.parametrize("change", [b"mine", b""])
def test_write_refuses_to_overwrite(tmp_path, change):
    """A file of the same name with other bytes stays, and nothing is written beside it."""
    (tmp_path / "core").write_bytes(change)
    with pytest.raises(FileExistsError) as caught:
        sample.write(str(tmp_path))
    assert caught.value.filename == str(tmp_path / "core")
    assert "differs" in str(caught.value)
    assert os.listdir(tmp_path) == ["core"]
    assert (tmp_path / "core").read_bytes() == change


def test_a_longer_file_differs(tmp_path, files):
    """The sample's bytes and more are not the sample."""
    (tmp_path / "README.txt").write_bytes(files["README.txt"] + b"!")
    with pytest.raises(FileExistsError):
        sample.write(str(tmp_path))


def test_damaged_resource_is_one_clear_error(tmp_path, monkeypatch):
    """Neither a cut-off nor a changed resource gives a wrong sample."""
    with open(sample.RESOURCE, "rb") as file:
        whole = file.read()
    with zipfile.ZipFile(sample.RESOURCE) as archive:
        at = archive.getinfo("core").header_offset + 200
    changed = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    resource = tmp_path / "sample.zip"
    monkeypatch.setitem(sample.RESOURCES, "article", str(resource))
    for damaged in (whole[: len(whole) // 2], changed):
        resource.write_bytes(damaged)
        with pytest.raises(FormatError, match="is damaged"):
            sample.write(str(tmp_path / "out"))
        assert not os.path.exists(tmp_path / "out")
