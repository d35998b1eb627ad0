"""Reads of a live machine by gdb's protocol: QEMU's stub, or our own where that is not here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import statistics
import time
from typing import TYPE_CHECKING, Any

import kvmtool
from bench.images import MIB, STATIC, Image, write_image
from bench.peers import ROOT
from bench.reads import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.sheet import Sheet
    from kvmtool.handle import Kvm

LIVE_READS = 4000
LIVE_WINDOW = 1 << 16  # bytes from the kernel's header on that live reads go to
MACHINE = os.path.join(ROOT, "build", "machine", "x86_64")


def serve(image: Image, address: int, wire: Any) -> None:
    """A stub of our own over an image, until the other side hangs up."""
    from builders import gdbserver, tiny_kernel

    with open(image.path, "rb") as file:
        memory = file.read()
    kernel = memory[image.at : image.at + tiny_kernel.END]
    control = gdbserver.registers(cr0=1 << 31 | 1, cr3=image.root, cr4=1 << 5, efer=0x500)
    parts = {"memory": ((address, kernel),), "physical": ((0, memory),), "registers": control}
    with gdbserver.Stub(no_ack_offered=True, **parts) as stub:
        wire.send(stub.url)
        with contextlib.suppress(EOFError):
            wire.recv()


@contextlib.contextmanager
def own_stub(folder: str) -> Iterator[tuple[str, str]]:
    """(kernel's file, address) of a stub in another process."""
    image = write_image(os.path.join(folder, "live"), 16 * MIB, 0, skew=0)
    ours, theirs = multiprocessing.Pipe()
    arguments = (image, image.at + STATIC, theirs)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)
    server.start()
    theirs.close()
    try:
        yield image.kernel, ours.recv()
    finally:
        ours.close()
        server.join()


@contextlib.contextmanager
def qemu(folder: str) -> Iterator[tuple[str, str]]:
    """(kernel's file, address) of QEMU's stub, with the kernel that `make machine` built."""
    from tests.machine.build import Images
    from tests.machine.vm import Vm

    kernel, kext = (os.path.join(MACHINE, n) for n in ("mach_kernel", "org.kvmtool.machine.mmread"))
    with Vm("x86_64", Images(kernel, kext), folder) as vm:
        vm.boot()
        yield kernel, f"gdb://127.0.0.1:{vm.port}"


def reads_a_second(read: Callable[[int, int], bytes], start: int) -> float:
    """Wall: reads of 8 to 64 bytes anywhere in the kernel, one after the other."""
    rand = random.Random(8)
    places = [(start + rand.randrange(LIVE_WINDOW), rand.randint(8, 64)) for _ in range(LIVE_READS)]
    rates = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for address, size in places:
            read(address, size)
        rates.append(LIVE_READS / (time.perf_counter() - begin))
    return statistics.median(rates)


def run(sheet: Sheet, folder: str) -> None:
    """Virtual reads by the stub, and reads translated here: those ask for every table as well."""
    built = os.path.exists(os.path.join(MACHINE, "org.kvmtool.machine.mmread"))
    real = built and shutil.which("qemu-system-x86_64") is not None
    whose = "QEMU" if real else "own stub (no QEMU or no `make machine`)"
    with (qemu if real else own_stub)(folder) as (kernel, url):
        kvm: Kvm = kvmtool.open(kernel, url)
        with kvm:
            assert kvm.boot is not None
            assert kvm.dump is not None
            start = kvm.boot.kernel_address
            virtual = kvm.dump.virtual()
            assert virtual is not None
            if virtual.read(start, 4096) != kvm.memory.read(start, 4096):
                raise SystemExit("the stub and the page tables lead to different bytes")
            direct = reads_a_second(virtual.read, start)
            walked = reads_a_second(kvm.memory.read, start)
    what = "live reads of 8 to 64 bytes by gdb's protocol"
    figure, target = f"{direct:,.0f} a second", "at least 5,000 a second"
    sheet.add(what, figure, against=whose, target=target, used=5000 / direct)
    sheet.add(f"{what}, page tables walked here", f"{walked:,.0f} a second", against=whose)
