"""Many threads at one handle, and many handles: all get the answers that one alone gets."""

from __future__ import annotations

import gzip
import os
import random
import sys
import threading
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kvmtool
from kvmtool.arch import x86_pages
from kvmtool.formats.kdump import Kdump
from kvmtool.memory import read_partial
from kvmtool.paging import PagedMemory
from kvmtool.source import BytesSource
from tests.builders import gdbserver, macho
from tests.builders import kdump as kdumps
from tests.builders.gdbserver import Stub
from tests.builders.pagetable import KERNEL, Tables
from tests.inputs import real
from tests.test_builders_xnu import crash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

THREADS, ROUNDS = 8, 40
BANNER = "Darwin Kernel Version 13.4.0: x; root:xnu-2422.115.4~1/RELEASE_X86_64"


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[random.Random], None], rounds: int = ROUNDS) -> None:
    """`work` in many threads at once, each `rounds` times; the first error of any is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        chance = random.Random(number)
        start.wait()
        try:
            for _ in range(rounds):
                work(chance)
        except BaseException as error:  # noqa: BLE001  it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


class Files(NamedTuple):
    kernel: str
    core: str


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("crash")
    built = crash("10.9.5 x86_64", banner=BANNER)
    (folder / "kernel").write_bytes(built.kernel)
    (folder / "core").write_bytes(built.core)
    (folder / "core.gz").write_bytes(gzip.compress(built.core))
    return Files(str(folder / "kernel"), str(folder / "core"))


def answers(kvm: kvmtool.Kvm) -> list[object]:
    """What a user may ask of a handle, in any order."""
    names = ["_version", "_allproc", "_kernproc", "_nonesuch"]
    return [
        [symbol and symbol.address for symbol in kvm.nlist(names)],
        [repr(proc) for proc in kvm.procs()],
        [repr(kext) for kext in kvm.loaded_kexts()],
        repr(kvm.symbol_at(kvm.address("_panic") + 3)),
        repr(kvm.code_at(kvm.address("_panic"))),
        kvm.read(kvm.address("_version"), 64),
        [repr(region) for region in kvm.memory.regions()],
        repr(kvm.evaluate("allproc.lh_first->p_pid")),
        [proc.kp_proc.p_pid for proc in kvm.getprocs()],
        kvm.types.find_struct("proc").size,
        kvm.loadavg(),
    ]


@pytest.mark.parametrize("core", ["core", "core.gz"])
def test_one_handle_in_many_threads(files, core) -> None:
    """From the first question on, so that all that is made at first use is made by many."""
    path = os.path.join(os.path.dirname(files.core), core)
    with kvmtool.open(files.kernel, path) as kvm:
        expected = answers(kvm)
    for _ in range(5):
        with kvmtool.open(files.kernel, path) as kvm:
            found: list[list[object]] = []
            together(lambda _chance, kvm=kvm, found=found: found.append(answers(kvm)), rounds=1)
        assert len(found) == THREADS
        assert all(one == expected for one in found)


def test_handles_share_nothing(files) -> None:
    """Each thread opens and closes its own, while others read theirs."""
    with kvmtool.open(files.kernel, files.core) as kvm:
        expected = answers(kvm)

    def work(_chance: random.Random) -> None:
        with kvmtool.open(files.kernel, files.core) as kvm:
            assert answers(kvm) == expected

    together(work, rounds=2)


def reading(read: Callable[[int, int], bytes], data: bytes, base: int = 0) -> None:
    """Reads of all sizes at all places, against the bytes that are there."""

    def work(chance: random.Random) -> None:
        size = chance.choice((1, 8, 100, 4096, 20000))
        at = chance.randrange(len(data) - size)
        assert read(base + at, size) == data[at : at + size]

    together(work)


def test_gzip(tmp_path) -> None:
    """A stream of several MiB: decoders are kept and moved on."""
    data = random.Random(1).randbytes(1 << 16) * 64
    file = macho.MachO("x86_64", macho.MH_CORE)
    file.segment("", 1 << 32, data)
    path = tmp_path / "core.gz"
    path.write_bytes(gzip.compress(file.build(), 1))
    with kvmtool.open(core=str(path)) as kvm:
        reading(kvm.memory.read, data, 1 << 32)


def test_kdump() -> None:
    """More pages than are kept decoded."""
    pages = {n: random.Random(n).randbytes(256) * 16 for n in range(300)}
    memory = Kdump(BytesSource(kdumps.kdump(pages), "dump")).physical()
    assert memory is not None
    reading(memory.read, b"".join(pages.values()))


@pytest.mark.parametrize("budget", [64 << 20, 4000, 0], ids=["all kept", "few kept", "none kept"])
def test_page_tables(budget) -> None:
    """Windows come and go; `forget` in between."""
    tables = Tables("4-level", 4 << 20)
    data = random.Random(2).randbytes(256 * 4096)
    tables.memory[: len(data)] = data
    base, order = KERNEL["4-level"], list(range(256))
    random.Random(3).shuffle(order)
    for place, page in enumerate(order):
        tables.map(base + (place << 21) + 4096, page * 4096)
    physical = tables.physical()
    memory = PagedMemory(physical, x86_pages.LongMode(physical, tables.root), budget=budget)

    def work(chance: random.Random) -> None:
        place, at = chance.randrange(256), chance.randrange(4000)
        start = order[place] * 4096 + at
        assert memory.read(base + (place << 21) + 4096 + at, 96) == data[start : start + 96]
        if chance.random() < 0.1:
            memory.forget()
        assert read_partial(memory, base + (place << 21) + 8192, 1000) == b""

    together(work, 300)
    if budget:
        assert 0 <= memory._left <= budget
        memory.forget()
        assert memory._left == budget


def test_a_stub() -> None:
    """One line: questions and answers must not be mixed up, nor the two address spaces."""
    kernel, physical = random.Random(4).randbytes(0x20000), random.Random(5).randbytes(0x20000)
    base = 0xFFFFFF8000200000
    options = {"memory": ((base, kernel),), "physical": ((0, physical),)}
    from kvmtool.formats.gdb import open_gdb

    with Stub(**options, registers=gdbserver.registers(rip=base)) as stub:
        target = open_gdb(stub.url)
        virtual, raw = target.virtual(), target.physical()
        assert raw is not None

        def work(chance: random.Random) -> None:
            size = chance.choice((1, 8, 4096, 20000))
            at = chance.randrange(len(kernel) - size)
            if chance.random() < 0.5:
                assert virtual.read(base + at, size) == kernel[at : at + size]
            else:
                assert raw.read(at, size) == physical[at : at + size]

        together(work, 20)
        target.close()


def test_a_real_dump_through_page_tables() -> None:
    """Physical memory of a machine that ran: nothing was asked before the threads begin."""
    kernel = real("machine/x86_64-xnu-2422.115.4.mach_kernel")
    core = real("machine/live.elfcore")
    with kvmtool.open(kernel, core) as kvm:
        expected = answers(kvm)
    with kvmtool.open(kernel, core) as kvm:
        found: list[list[object]] = []
        together(lambda _chance: found.append(answers(kvm)), rounds=1)
    assert all(one == expected for one in found)
