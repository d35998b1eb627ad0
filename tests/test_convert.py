"""Memory from form to form: the same answers, the same bytes, and whole files or none."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import struct
import subprocess
from array import array
from itertools import accumulate
from operator import add
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from inputs import plain_core, real, truth

import kvmtool
from kvmtool import convert as forms
from kvmtool import macho, sample
from kvmtool.arch import arch_for
from kvmtool.errors import FaultError, KvmWarning, UnsupportedError
from kvmtool.formats import Facts
from kvmtool.formats.elf_core import ElfCore
from kvmtool.memory import RunMemory
from kvmtool.source import BytesSource, open_source
from tests.test_cli import run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.handle import Kvm
    from kvmtool.memory import Memory

DUMPS = ("i386-10.5.8", "x86_64-10.8.5")
PAIRS = [
    ("core.macho", "macho-core", False),
    ("core.macho", "elf", False),
    ("mem.lime", "macho-core", False),
    ("mem.lime", "lime", False),
    ("mem.lime", "elf", True),
    ("mem.lime", "raw", False),
]
NAMES = ("_allproc", "_cdevsw", "_version", "_nonesuch")

pytestmark = pytest.mark.filterwarnings("ignore::kvmtool.errors.KvmWarning")


def path_of(dump: str, form: str) -> str:
    return plain_core(dump) if form == "core.macho" else real(f"dumps/{dump}/{form}")


def opened(dump: str, core: str) -> Kvm:
    return kvmtool.open(real(f"dumps/{dump}/mach_kernel"), core)


@pytest.fixture
def out(tmp_path: Any) -> Iterator[str]:
    """A name in a folder of its own, which is emptied at once: these files are large."""
    yield str(tmp_path / "out")
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """-N and -M of the embedded sample."""
    folder = str(tmp_path_factory.mktemp("sample"))
    sample.write(folder)
    return ["-N", os.path.join(folder, "mach_kernel"), "-M", os.path.join(folder, "core")]


def pieces(memory: Memory) -> Iterator[tuple[int, bytes]]:
    for region in memory.regions():
        for at in range(0, region.size, forms.CHUNK):
            size = min(forms.CHUNK, region.size - at)
            yield region.start + at, memory.read(region.start + at, size)


# the same before and after


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize(("form", "target", "physical"), PAIRS)
def test_round_trip(dump: str, form: str, target: str, physical: bool, out: str) -> None:
    with opened(dump, path_of(dump, form)) as before:
        made = forms.convert(before, out, target, physical=physical)
        assert made.target == target
        with opened(dump, out) as after:
            assert {p.pid for p in after.procs()} == {p["pid"] for p in truth(dump)["processes"]}
            assert list(after.procs()) == list(before.procs())
            assert after.nlist(NAMES) == before.nlist(NAMES)
            assert after.version == before.version
            assert after.kerndisp == before.kerndisp == truth(dump)["slide"]
            compare(before, after, target)


def compare(before: Kvm, after: Kvm, target: str) -> None:
    """Every byte of every region, and nothing else but the zeros of a raw file's holes."""
    old, new = before.memory, after.memory
    if after.physical is not None:
        assert before.physical is not None
        old, new = before.physical, after.physical
    assert all(new.read(address, len(data)) == data for address, data in pieces(old))
    regions = list(old.regions())
    if target != "raw":
        assert list(new.regions()) == regions
        return
    (whole,) = new.regions()
    assert whole == (0, regions[-1].start + regions[-1].size)
    ends = [0, *(region.start + region.size for region in regions)]
    for end, region in zip(ends, regions, strict=False):
        assert not any(new.read(end, region.start - end))


def test_raw_has_holes_and_says_that_they_read_as_zeros(out: str) -> None:
    dump = DUMPS[0]
    absent = pytest.warns(KvmWarning, match="0x462000 bytes of 0x8000000 are absent")
    with opened(dump, real(f"dumps/{dump}/mem.lime")) as kvm, absent:
        made = forms.convert(kvm, out, "raw")
    assert os.path.getsize(out) == made.size == 0x8000000
    assert os.stat(out).st_blocks * 512 < made.size


# other programs


def segments(path: str) -> list[list[int]]:
    """The PT_LOADs as readelf has them: offset, p_vaddr, p_paddr, p_filesz, p_memsz."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    found = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    assert "Elf file type is CORE" in found.stdout
    return [
        [int(word, 16) for word in words[:5]]
        for words in re.findall(r"^ +LOAD +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)", found.stdout, re.M)
    ]


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("physical", [False, True])
def test_readelf_accepts_the_elf(dump: str, physical: bool, out: str) -> None:
    form = "mem.lime" if physical else "core.macho"
    with opened(dump, path_of(dump, form)) as kvm:
        forms.convert(kvm, out, "elf", physical=physical)
        memory = kvm.physical if physical else kvm.memory
        assert memory is not None
        found = segments(out)
        regions = list(memory.regions())
        assert [(load[2 if physical else 1], load[3]) for load in found] == regions
        unknown = (1 << kvm.arch.pointer_size * 8) - 1
        assert {load[1 if physical else 2] for load in found} == {0 if physical else unknown}
        with open(out, "rb") as file:
            for (offset, *_, size, memsz), region in zip(found, regions, strict=True):
                assert size == memsz
                file.seek(offset)
                length = min(size, forms.CHUNK)
                assert file.read(length) == memory.read(region.start, length)


@pytest.mark.parametrize("dump", DUMPS)
@pytest.mark.parametrize("form", ["core.macho", "mem.lime"])
def test_lldb_reads_the_same_from_the_core(dump: str, form: str, out: str) -> None:
    if shutil.which("lldb") is None:
        pytest.skip("lldb is not installed")
    with opened(dump, path_of(dump, form)) as kvm:
        forms.convert(kvm, out, "macho-core")
        assert kvm.boot is not None
        places = [kvm.boot.kernel_address, kvm.address("_version"), kvm.address("_allproc")]
        wanted = [list(kvm.read(place, 16)) for place in places]
        facts = kvm.facts
    commands = [f"memory read --force -s 1 -f x -c 16 {place:#x}" for place in places]
    command = ["lldb", "--no-lldbinit", "--batch", "-o", f"target create --core {out}"]
    command += [word for line in (*commands, "register read") for word in ("-o", line)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    lines = re.findall(r"^0x[0-9a-f]+:((?: 0x[0-9a-f]{2})+)", said, re.M)
    read = [int(word, 16) for line in lines for word in line.split()]
    assert [read[at : at + 16] for at in range(0, len(read), 16)] == wanted
    assert f"Load Address: {places[0]:#x}" in said
    assert facts is not None
    if facts.threads:
        registers = truth(dump)["cpu"]["registers"]
        name = "rip" if "rip" in registers else "eip"
        at = re.search(rf"{name} = (0x[0-9a-f]+)", said)
        assert at is not None
        assert int(at[1], 16) == registers[name]


# what a core says of its kernel


def test_what_an_arm64_core_says(out: str) -> None:
    with kvmtool.open(None, real("machine/armc.corefile")) as before:
        forms.convert(before, out, "macho-core")
        with kvmtool.open(None, out) as after:
            old, new = before.facts, after.facts
            assert old is not None
            assert new is not None
            assert new.said["kernel_address"] == 'LC_NOTE "main bin spec"'
            assert new._replace(said={}, kernel_address=None) == old._replace(said={})
            assert list(after.memory.regions()) == list(before.memory.regions())


def fake(memory: Memory, *, physical: bool, cputype: int = macho.CPU_TYPE_X86_64) -> Any:
    """A handle of bare memory, no kernel in it."""
    return SimpleNamespace(
        dump=SimpleNamespace(source=SimpleNamespace(name="fake")),
        memory=memory,
        physical=memory if physical else None,
        arch=arch_for(cputype),
        facts=Facts(cputype, 3),
        way=None,
        kernel=None,
        boot=None,
        version=None,
    )


def runs(*places: tuple[int, int], space: str = "kernel") -> RunMemory:
    """Memory of the (address, size) in `places`, no byte of which is 0."""
    starts, sizes = zip(*places, strict=True)
    total = sum(sizes)
    source = BytesSource(bytes(range(1, 251)) * (total // 250 + 1), "fake")
    offsets = array("Q", [0, *accumulate(sizes)][:-1])
    ends = array("Q", map(add, starts, sizes))
    return RunMemory(source, array("Q", starts), ends, offsets, space=space)


def test_a_slide_alone_is_kept(out: str) -> None:
    handle = fake(runs((0xFFFFFF8000200000, 0x1000)), physical=False)
    handle.facts = handle.facts._replace(slide=0x3200000, uuid=b"\7" * 16, va_bits=48)
    handle.version = "Darwin Kernel Version 12.5.0"
    forms.convert(handle, out, "macho-core")
    core = kvmtool.formats.macho_core.MachOCore(open_source(out))
    facts = core.facts
    assert (facts.slide, facts.uuid, facts.va_bits) == (0x3200000, b"\7" * 16, 48)
    assert (facts.version, facts.kernel_address) == (handle.version, None)


@pytest.mark.parametrize(
    ("count", "cputype"),
    [
        (0xFFFE, macho.CPU_TYPE_X86_64),
        (0xFFFF, macho.CPU_TYPE_I386),
        (0x10001, macho.CPU_TYPE_X86_64),
    ],
)
def test_more_segments_than_e_phnum_holds(count: int, cputype: int, out: str) -> None:
    memory = runs(*((at * 2, 1) for at in range(count)), space="physical")
    forms.convert(fake(memory, physical=True, cputype=cputype), out, "elf", physical=True)
    with open(out, "rb") as file:
        head = file.read(64)
    e_phnum = struct.unpack_from("<H", head, 56 if head[4] == 2 else 44)[0]
    assert e_phnum == min(count, 0xFFFF)
    assert len(segments(out)) == count
    back = ElfCore(open_source(out)).physical()
    assert list(back.regions()) == list(memory.regions())
    assert back.read((count - 1) * 2, 1) == memory.read((count - 1) * 2, 1)


def test_a_32_bit_machine_with_more_than_4_gib_is_an_elf64(out: str) -> None:
    memory = runs((0, 0x1000), (0x120000000, 0x1000), space="physical")
    handle = fake(memory, physical=True, cputype=macho.CPU_TYPE_I386)
    forms.convert(handle, out, "elf", physical=True)
    assert [load[2] for load in segments(out)] == [0, 0x120000000]


def test_a_32_bit_core_leaves_out_what_it_has_no_numbers_for(out: str) -> None:
    handle = fake(
        runs((0x1000, 0x1000), (0xFFFFFF8000000000, 0x1000)),
        physical=False,
        cputype=macho.CPU_TYPE_I386,
    )
    with pytest.warns(KvmWarning, match="0x1000 bytes past 4 GiB are left out"):
        made = forms.convert(handle, out, "macho-core")
    assert (made.regions, made.held) == (1, 0x1000)


# what cannot be


@pytest.mark.parametrize(
    ("target", "physical"), [("lime", False), ("raw", False), ("elf", True), ("macho-core", True)]
)
def test_memory_that_is_not_there(
    machine: list[str], target: str, physical: bool, out: str
) -> None:
    refused = pytest.raises(UnsupportedError, match="not physical memory")
    with kvmtool.open(machine[1], machine[3]) as kvm, refused:
        forms.convert(kvm, out, target, physical=physical)
    assert os.listdir(os.path.dirname(out)) == []


def test_a_kernel_file_has_no_memory(machine: list[str], out: str) -> None:
    with kvmtool.open(machine[1]) as kvm, pytest.raises(UnsupportedError, match="kernel file"):
        forms.convert(kvm, out, "macho-core")


class Failing:
    """Memory that fails half-way."""

    def __init__(self, memory: RunMemory, error: BaseException) -> None:
        self._memory, self._error = memory, error
        self.space = memory.space
        self.regions = memory.regions

    def read(self, address: int, size: int) -> bytes:
        if address >= 0x5000:
            raise self._error
        return self._memory.read(address, size)


@pytest.mark.parametrize("target", forms.TARGETS)
@pytest.mark.parametrize("error", [FaultError("physical", 0x5000, 1), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_nothing(
    target: str, error: BaseException, existing: bool, out: str
) -> None:
    memory: Any = Failing(runs((0x1000, 0x1000), (0x5000, 0x1000)), error)
    if existing:
        with open(out, "wb") as file:
            file.write(b"before")
    with pytest.raises(type(error)):
        forms.convert(
            fake(memory, physical=True), out, target, physical=target == "elf", overwrite=existing
        )
    assert os.listdir(os.path.dirname(out)) == (["out"] if existing else [])
    if existing:
        with open(out, "rb") as file:
            assert file.read() == b"before"


@pytest.mark.parametrize("size", [0x1000, 0x200000])
def test_a_full_disk_names_the_file_the_user_knows(size: int, out: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handle = fake(runs((0, size)), physical=True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0x800, limits[1]))
        with pytest.raises(OSError, match="File too large") as failure:
            forms.convert(handle, out, "raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG
    assert failure.value.filename == out
    assert os.listdir(os.path.dirname(out)) == []


def test_a_file_that_appears_meanwhile_is_kept(out: str) -> None:
    def appear(done: int, total: int) -> None:
        with open(out, "wb") as file:
            file.write(b"theirs")

    with pytest.raises(FileExistsError):
        forms.convert(fake(runs((0, 16)), physical=True), out, "raw", progress=appear)
    with open(out, "rb") as file:
        assert file.read() == b"theirs"
    assert os.listdir(os.path.dirname(out)) == ["out"]


# the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmtool.cli import COMMANDS

    monkeypatch.setitem(COMMANDS, "convert", ("convert", "Write memory in another form."))


@pytest.mark.usefixtures("command")
def test_the_command(machine: list[str], tmp_path: Any) -> None:
    out = str(tmp_path / "new.core")
    done = run("convert", out, *machine)
    assert f"{out}: macho-core, by its ending" in done.stderr
    assert done.stdout.startswith(f"wrote {out}: macho-core, 0x")
    where = ["-N", machine[1], "-M"]
    for question in (["procs"], ["nlist", "_cdevsw"]):
        assert run(*question, *where, out).stdout == run(*question, *machine).stdout
    assert "--overwrite replaces it" in run("convert", out, *machine, status=1).stderr
    again = run("convert", out, "--to", "elf", "--overwrite", *machine)
    assert "by its ending" not in again.stderr
    with open(out, "rb") as file:
        assert file.read(4) == b"\x7fELF"
    same = run("convert", machine[3], "--to", "elf", "--overwrite", *machine, status=1)
    assert "is the file that is read" in same.stderr
    assert os.listdir(tmp_path) == ["new.core"]


@pytest.mark.usefixtures("command")
def test_usage_errors(machine: list[str], tmp_path: Any) -> None:
    out = str(tmp_path / "new.img")
    assert "no ending that says" in run("convert", out, *machine, status=2).stderr
    assert "name one with -M" in run("convert", out, "--to", "raw", status=2).stderr
    assert "physical memory" in run("convert", out, "--to", "raw", *machine, status=1).stderr
    assert os.listdir(tmp_path) == []
