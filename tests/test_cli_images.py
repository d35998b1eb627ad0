"""kexts, symbol, kernels, and every kind of kernel file, as a user types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from inputs import plain_core, real, truth

from kvmtool import sample
from tests.builders import peel as wrap
from tests.test_cli import run

ARTICLE = "com.osxbook.kext.KernelMemoryAccess"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The embedded sample's files by name."""
    folder = str(tmp_path_factory.mktemp("sample"))
    return {os.path.basename(path): path for path in sample.write(folder)}


# the article's Figures 7 to 10: who owns cdevsw[11].d_read?


def test_the_articles_exercise_on_the_sample(machine: dict[str, str]) -> None:
    where = ["-N", machine["mach_kernel"], "-M", machine["core"]]
    table = int(run("nlist", "_cdevsw", *where).stdout.split()[0], 16)
    d_read = table + 11 * 0x38 + 8
    pointer = "0x" + run("read", hex(d_read), "4", "-t", "x4", *where).stdout.split()[1]
    assert pointer == "0x3bd0214f"
    kext = ["--kext", f"{machine['KernelMemoryAccess']}@0x3bd01000"]
    found = run("symbol", pointer, *kext, *where).stdout
    assert found == f"0x3bd0214f _my_mmread [{ARTICLE}]\n"


def test_the_articles_exercise_with_its_own_kext() -> None:
    """data/kexts/i386-KernelMemoryAccess: another build, where _my_mmread is 0xb6 into the text."""
    path = real("kexts/i386-KernelMemoryAccess")
    assert "000000b6 t _my_mmread" in run("symbols", "-N", path).stdout.splitlines()
    where = ["-N", real("dumps/i386-10.5.8/mach_kernel"), "--kext", f"{path}@0x3bd01000"]
    name = f"{ARTICLE}:_my_mmread"
    assert run("nlist", name, *where).stdout == "0x3bd020b6 t _my_mmread\n"
    assert run("symbol", "0x3bd020b6", *where).stdout.split()[1:] == ["_my_mmread", f"[{ARTICLE}]"]
    table = run("read", "KernelMemoryAccess:_my_mm_cdevsw", "0x38", "-t", "x4", *where).stdout
    nulldev, enodev = (
        line.split()[0][2:].zfill(8)
        for line in run("nlist", "_nulldev", "_enodev", *where).stdout.splitlines()
    )
    words = [word for line in table.splitlines() for word in line.split()[1:]]
    # the article's table: nulldev to open and close, its own read, enodev to stop; the kext's
    # relocation entries (llvm-objdump -r) name the same symbols
    assert words[:3] == [nulldev, nulldev, "3bd020b6"]
    assert words[9] == enodev


@pytest.mark.parametrize("dump", ["i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"])
def test_the_exercise_on_every_dump(dump: str) -> None:
    known = truth(dump)
    (kext,) = [k for k in known["kexts"] if k["name"] == ARTICLE]
    where = ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", plain_core(dump)]
    where += ["--kext", f"{real(f'dumps/{dump}/KernelMemoryAccess')}@{kext['address']:#x}"]
    for name, address in known["cdevsw"]["kext_symbols"].items():
        found = run("nlist", f"KernelMemoryAccess:{name}", *where, "--format", "json").stdout
        assert json.loads(found)[0]["address"] == hex(address)
        assert f"{address:#x} {name} [" in run("symbol", hex(address), *where).stdout
    pc = known["cpu"]["backtrace"][0]
    at = run("symbol", hex(pc), *where, "--format", "json").stdout
    assert json.loads(at)[0]["symbol"] == "_" + known["cpu"]["functions"][0]


def test_a_symbol_that_only_a_kext_has_is_pointed_at() -> None:
    path = real("kexts/i386-KernelMemoryAccess")
    where = ["-N", real("dumps/i386-10.5.8/mach_kernel"), "--kext", f"{path}@0x3bd01000"]
    stderr = run("nlist", "my_mmread", *where, status=1).stderr
    assert f"did you mean {ARTICLE}:_my_mmread" in stderr


def test_kexts_lists_the_files_named() -> None:
    path = real("kexts/i386-KernelMemoryAccess")
    where = ["-N", real("dumps/i386-10.5.8/mach_kernel"), "--kext", f"{path}@0x3bd01000"]
    (row,) = json.loads(run("kexts", *where, "--format", "json").stdout)
    assert (row["identifier"], row["version"], row["address"]) == (ARTICLE, "1.0.0", "0x3bd01000")
    assert row["origin"] == "own symbol table"


def test_an_address_outside_everything() -> None:
    where = ["-N", real("dumps/i386-10.5.8/mach_kernel")]
    result = run("symbol", "0x10", "_panic", *where, status=3)
    assert result.stdout.endswith(" _panic\n")
    assert "0x10 is in no segment of the kernel" in result.stderr


# every kind of file


_PPC = b"\xfe\xed\xfa\xce" + bytes(64)


def wrappings() -> dict[str, object]:
    return {
        "fat": lambda data: wrap.fat([(7, 3, data)]),
        "fat of two": lambda data: wrap.fat(
            [(18, 0, b"\xfe\xed\xfa\xce" + bytes(64)), (7, 3, data)]
        ),
        "im4p lzfse": lambda data: wrap.im4p(wrap.lzfse(data), wrap.compression(1, len(data))),
        "img4 plain": lambda data: wrap.img4(wrap.im4p(data)),
        "comp lzss": lambda data: wrap.comp("lzss", wrap.lzss(data), data),
        "comp lzvn": lambda data: wrap.comp("lzvn", wrap.lzvn(data), data),
        "lzfse": wrap.lzfse,
        "gzip": wrap.gzip,
        "xz": wrap.xz,
        "zstd": wrap.zstd,
        "fat in gzip in im4p": lambda data: wrap.im4p(wrap.gzip(wrap.fat([(7, 3, data)]))),
    }


@pytest.mark.parametrize("kind", wrappings())
def test_a_wrapped_kernel_answers_as_the_plain_one(
    kind: str, machine: dict[str, str], tmp_path
) -> None:
    with open(machine["mach_kernel"], "rb") as file:
        plain = file.read()
    path = str(tmp_path / "kernel")
    with open(path, "wb") as file:
        file.write(wrappings()[kind](plain))  # type: ignore[operator]
    arch = ["--arch", "i386"] if kind == "fat of two" else []
    for asked in (["symbols"], ["read", "_version", "64"], ["kexts"]):
        ours = run(*asked, "-N", path, *arch).stdout
        assert ours == run(*asked, "-N", machine["mach_kernel"]).stdout
    assert run("nlist", "_cdevsw", "-N", path, *arch).stdout == "0x441720 D _cdevsw\n"
    # with a dump, the dump's architecture is the default
    assert (
        run("procs", "-N", path, "-M", machine["core"]).stdout
        == run("procs", "-N", machine["mach_kernel"], "-M", machine["core"]).stdout
    )
    assert json.loads(run("info", "-N", path, *arch, "--format", "json").stdout)["kernel"]["layers"]


@pytest.mark.skipif(shutil.which("llvm-nm") is None, reason="llvm-nm is not installed")
@pytest.mark.parametrize("name", ["fat-ppc-i386-zfs-102A", "fat-ppc-i386-zfs-102A.dSYM"])
@pytest.mark.parametrize("arch", ["ppc", "i386"])
def test_every_slice_equals_llvm_nm(name: str, arch: str) -> None:
    path = real(f"kexts/{name}")
    nm = subprocess.run(["llvm-nm", f"--arch={arch}", path], capture_output=True, check=True)
    ours = run("symbols", "-N", path, "--arch", arch).stdout_bytes
    assert sorted(ours.splitlines()) == sorted(nm.stdout.splitlines())


def test_a_fat_file_needs_a_choice() -> None:
    result = run("symbols", "-N", real("kexts/fat-ppc-i386-zfs-102A"), status=1)
    assert "slices ppc, i386: choose one with --arch" in result.stderr


# kernels by UUID


def test_the_cores_kernel_is_found_by_its_uuid(tmp_path) -> None:
    for name in ("dumps/x86_64-10.8.5/mach_kernel", "dumps/x86_64-10.13.6/mach_kernel"):
        with open(real(name), "rb") as file, open(tmp_path / name.split("/")[1], "wb") as out:
            out.write(wrap.gzip(file.read()))
    folder = str(tmp_path)
    listed = json.loads(run("kernels", "--kernel-path", folder, "--format", "json").stdout)
    known = truth("x86_64-10.8.5")
    assert known["uuid"] in {row["uuid"] for row in listed}
    assert {row["kind"] for row in listed} == {"kernel"}
    core = plain_core("x86_64-10.8.5")
    result = run("procs", core, "--kernel-path", folder, "--format", "json")
    assert f"its UUID is {known['uuid']}" in result.stderr
    named = run("procs", core, "-N", real("dumps/x86_64-10.8.5/mach_kernel"), "--format", "json")
    assert result.stdout == named.stdout


def test_no_directories_is_said() -> None:
    assert "KVMTOOL_KERNEL_PATH" in run("kernels", "--format", "json").stderr
