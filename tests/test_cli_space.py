"""Physical memory, page tables, processes' own memory, and the mounted devices, as a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from inputs import DUMPS, oracle, plain_core, real, truth

from tests.test_cli import run
from tests.test_way_in import FAR, far

FORMS = ("mem.lime", "mem.elf")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory):
    """mem.raw of a dump, made of its LiME file as data/README.md says: holes as zeros."""
    made: dict[str, str] = {}

    def of(dump: str) -> str:
        if dump not in made:
            path = str(tmp_path_factory.mktemp("raw") / "mem.raw")
            with open(real(f"dumps/{dump}/mem.lime"), "rb") as lime, open(path, "wb") as out:
                while head := lime.read(32):
                    start, end = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
                    out.seek(start)
                    out.write(lime.read(end - start + 1))
                out.truncate(truth(dump)["formats"]["mem.raw"]["file_size"])
            made[dump] = path
        return made[dump]

    return of


def memory(dump: str, form: str, raw) -> list[str]:
    path = raw(dump) if form == "mem.raw" else real(f"dumps/{dump}/{form}")
    return ["-N", real(f"dumps/{dump}/mach_kernel"), "-M", path]


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("form", [*FORMS, "mem.raw"])
def test_physical_forms_answer_as_the_core(dump: str, form: str, raw) -> None:
    """The same procs, nlist and read, with no option but -N; slide and root as true."""
    where = memory(dump, form, raw)
    core = ["-N", where[1], "-M", plain_core(dump)]
    known = truth(dump)
    facts = json.loads(run("info", *where, "--format", "json").stdout)
    assert facts["slide"]["slide"] == hex(known["slide"])
    assert facts["slide"]["root"] == hex(known["memory"]["kernel_page_table_root"])
    names = [f"_{name}" if not name.startswith("_") else name for name in known["symbols"]]
    for asked in (
        ["procs", "--format", "json"],
        ["nlist", *names],
        ["read", "_version", "100"],
        ["read", "_cdevsw", "0x800", "--raw"],
    ):
        assert run(*asked, *where).stdout_bytes == run(*asked, *core).stdout_bytes


@pytest.mark.parametrize("dump", DUMPS)
def test_a_process_own_memory(dump: str, raw) -> None:
    where = memory(dump, "mem.lime", raw)
    for proc in truth(dump)["processes"]:
        heap = proc.get("user_heap")
        if heap and proc["pid"] in (1, 13, 110):
            asked = ["read", hex(heap["va"]), str(len(heap["string"])), "--raw"]
            assert run(*asked, "--pid", str(proc["pid"]), *where).stdout == heap["string"]
    zombie = truth(dump)["zombproc"][0]
    assert (
        "is a zombie" in run("read", "0x1000", "4", "--pid", str(zombie), *where, status=1).stderr
    )
    assert (
        "process 4242 not found" in run("read", "0", "4", "--pid", "4242", *where, status=1).stderr
    )


def test_a_kernel_core_has_no_process_memory() -> None:
    where = ["-N", real("dumps/x86_64-10.8.5/mach_kernel"), "-M", plain_core("x86_64-10.8.5")]
    result = run("read", "0x1000", "4", "--pid", "1", *where, status=1)
    assert "dump of the kernel's memory alone" in result.stderr


@pytest.mark.parametrize(("name", "slide"), [("live.elfcore", "0x0"), ("kaslr.raw", "0xa00000")])
@pytest.mark.parametrize("with_kernel", [True, False], ids=["-N", "no -N"])
def test_the_real_machine(name: str, slide: str, with_kernel: bool) -> None:
    """Live and slid, with the kernel's file and with what memory holds of it."""
    known = oracle(name.split(".")[0])
    where = ["-M", real(f"machine/{name}")]
    if with_kernel:
        where += ["-N", real("machine/x86_64-xnu-2422.115.4.mach_kernel")]
    facts = json.loads(run("info", *where, "--format", "json").stdout)
    assert facts["slide"]["slide"] == slide
    assert facts["slide"]["root"] == known["cr3"]
    symbols = known["symbols"]
    rows = json.loads(run("nlist", *symbols, *where, "--format", "json").stdout)
    assert {row["name"]: row["address"] for row in rows} == {
        n: s["addr"] for n, s in symbols.items()
    }
    procs = json.loads(run("procs", *where, "--format", "json").stdout)
    assert [(p["pid"], p["address"], p["comm"]) for p in procs] == [
        (p["p_pid"], p["addr"], p["p_comm"]) for p in known["procs"]
    ]
    for name_, symbol in list(symbols.items())[:12]:
        answer = json.loads(run("vtop", name_, *where, "--format", "json").stdout)
        assert answer["physical"] == symbol["pa"]
        if symbol["size"] in (4, 8):
            unit = f"x{symbol['size']}"
            read = run("read", name_, str(symbol["size"]), "-t", unit, *where).stdout
            assert int(read.split()[1], 16) == int(symbol["value"], 16)
            size = ["read", symbol["pa"], str(symbol["size"]), "-t", unit, "--physical"]
            assert run(*size, *where).stdout.split()[1] == read.split()[1]


def test_vtop_shows_every_step(raw) -> None:
    where = memory("x86_64-10.8.5", "mem.lime", raw)
    answer = json.loads(run("vtop", "_cdevsw", *where, "--format", "json").stdout)
    known = truth("x86_64-10.8.5")["memory"]
    assert [step["level"] for step in answer["steps"]] == ["PML4", "PDPT", "PD", "PT"]
    assert answer["steps"][0]["table"] == hex(known["pml4"])
    assert answer["steps"][1]["table"] == hex(known["pdpt"])
    assert "no: unmapped" in run("vtop", "0xffffff7000000000", *where, status=1).stdout


def test_regions_name_what_is_absent(raw) -> None:
    where = memory("x86_64-10.8.5", "mem.lime", raw)
    physical = json.loads(run("regions", "--physical", "--format", "json", *where).stdout)
    ranges = truth("x86_64-10.8.5")["formats"]["mem.lime"]["ranges"]
    shown = [[int(row["start"], 16), int(row["end"], 16) - 1] for row in physical]
    assert shown == [entry[:2] for entry in ranges]
    virtual = json.loads(run("regions", "--format", "json", *where).stdout)
    assert {row["reason"] for row in virtual} == {None, "absent"}
    assert all(set(row["permissions"]) <= set("rwxu-") for row in virtual)


def test_search_finds_strings_bytes_and_pointers() -> None:
    where = ["-N", real("dumps/x86_64-10.8.5/mach_kernel"), "-M", plain_core("x86_64-10.8.5")]
    rows = json.loads(run("search", "Darwin Kernel Version", "--format", "json", *where).stdout)
    assert "_version" in {row["symbol"] for row in rows}
    kernproc = run("nlist", "_kernproc", *where).stdout.split()[0]
    target = "0x" + run("read", kernproc, "8", "-t", "x8", *where).stdout.split()[1]
    found = json.loads(run("search", "--pointer", target, "--format", "json", *where).stdout)
    assert kernproc in {row["address"] for row in found}
    magic = run("search", "--hex", "cffaedfe", "--align", "4096", *where).stdout.splitlines()
    assert any("__mh_execute_header" in line for line in magic)
    assert run("search", "no such text anywhere", *where, status=1).stdout.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
def test_the_articles_line_on_a_mounted_kmem(tmp_path, raw) -> None:
    pytest.importorskip("mfusepy", reason="mfusepy is not installed")
    where = memory("i386-10.5.8", "mem.lime", raw)
    folder = str(tmp_path)
    mounted = subprocess.run(
        [sys.executable, "-m", "kvmtool", "mount", folder, *where],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "FUSE" in mounted.stderr:
        pytest.skip(mounted.stderr)
    assert mounted.returncode == 0, mounted.stderr
    try:
        entry = truth("i386-10.5.8")["cdevsw"]
        d_read = entry["address"] + entry["kext_major"] * 0x38 + 8
        line = run("dd", hex(d_read), "4", "--directory", folder, *where).stdout
        assert f"iseek={d_read}" in line
        shown = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert int(shown.stdout.split()[1], 16) == entry["kext_symbols"]["_my_mmread"]
        hole = subprocess.run(
            ["dd", f"if={folder}/kmem", "bs=1", "count=4"], capture_output=True, text=True
        )
        assert "Bad address" in hole.stderr
    finally:
        subprocess.run(["fusermount3", "-u", folder], check=True)
    assert os.listdir(folder) == []


def test_the_arm64_corefile_against_its_oracle() -> None:
    """4 K granule, T1SZ 26: read, vtop and regions of the container XNU wrote itself."""
    where = ["-N", real("machine/arm64-xnu-4903.221.2-bcm2837.mach_kernel")]
    where += ["-M", real("machine/armc.corefile")]
    known = oracle("armc")
    compared = 0
    for name, symbol in known["symbols"].items():
        value = symbol["value"]
        answer = json.loads(run("vtop", name, *where, "--format", "json").stdout)
        assert answer["physical"] == symbol["pa"]
        if value.startswith("0xfffffff0"):
            compared += 1
            assert run("read", name, "8", "-t", "x8", *where).stdout.split()[1] == value[2:]
        elif not value.startswith("0x"):
            size = str(len(value) + 1)
            out = run("read", name, size, "--raw", *where).stdout_bytes
            assert out == value.encode() + b"\0"
    assert compared > 10
    text = known["msgbuf"]["text"].encode()[:256]
    buffer = known["msgbuf"]["bufc"]
    # dmesg's text, as the oracle has it, leaves NULs out
    shown = run("read", buffer, "0x1000", "--raw", *where).stdout_bytes.replace(b"\0", b"")
    assert shown.startswith(text)
    rows = json.loads(run("regions", *where, "--format", "json").stdout)
    addresses = [int(symbol["addr"], 16) for symbol in known["symbols"].values()]
    spans = [(int(row["start"], 16), int(row["end"], 16)) for row in rows]
    assert all(any(start <= at < end for start, end in spans) for at in addresses)


@pytest.mark.parametrize("said", [True, False], ids=["gPhysBase", "tables"])
def test_raw_memory_of_arm64_begins_where_it_did(said: bool, tmp_path) -> None:
    """No option is needed; --core-format raw@ADDRESS says it where nothing else does."""
    here = far(said=said)
    kernel, raw = str(tmp_path / "mach_kernel"), str(tmp_path / "memory")
    for path, data in ((kernel, here.kernel.file), (raw, bytes(here.tables.memory.data))):
        with open(path, "wb") as out:
            out.write(data)
    where, banner = ["-N", kernel, "-M", raw], "Darwin Kernel Version"
    for more in ([], ["--core-format", "raw"], ["--core-format", f"raw@{FAR:#x}"]):
        walk = json.loads(run("vtop", "_version", *where, *more, "--format", "json").stdout)
        assert walk["physical"] == f"{here.at + 0x4040:#x}"
        assert run("read", "_version", "21", "--raw", *where, *more).stdout == banner
        by_hand = run("read", walk["physical"], "21", "--physical", "--raw", *where, *more)
        assert by_hand.stdout == banner
    for address in ("0", f"{FAR + 0x4000:#x}"):
        wrong = run("vtop", "_version", *where, "--core-format", f"raw@{address}", status=1)
        assert "not found" in wrong.stderr
        assert "raw@ADDRESS" not in wrong.stderr
    for text in ("", "x", "-1"):
        wrong = run("vtop", "_version", *where, "--core-format", f"raw@{text}", status=1)
        assert f"{text!r} is no address: expected raw@0x800000000" in wrong.stderr
    wrong = run("vtop", "_version", *where, "--core-format", f"raw@{1 << 60:#x}", status=1)
    assert "leaves the address space" in wrong.stderr
