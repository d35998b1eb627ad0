"""Ctrl-C, SIGTERM, a reader that has gone: a command ends at once, quietly, and leaves no part."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from kvmtool import sample
from kvmtool.cli import COMMANDS
from tests.builders import macho
from tests.builders.corefile import gzip_member
from tests.builders.gdbserver import Stub
from tests.builders.kernelcache import small_kernel
from tests.inputs import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KERNEL = 0xFFFFFF8000200000
SOON = 2.0  # seconds a command may go on for after the signal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
pytestmark = pytest.mark.usefixtures("signals_heard")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("demo"))
    sample.write(folder)
    return folder


@contextmanager
def running(*arguments: str, **more) -> Iterator[subprocess.Popen[bytes]]:
    """The command, as a terminal would start it: with the signals' own actions."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    command = [sys.executable, "-m", "kvmtool", *arguments]
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def until(done: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def ends_by(process: subprocess.Popen[bytes], number: int) -> None:
    """Send the signal; the process dies of it soon and has nothing to say."""
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < SOON
    assert (process.returncode, out, err) == (-number, b"", b"")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_waits_ends_at_once(number) -> None:
    with Stub(hang_after=3) as stub, running("-M", stub.url, "procs") as process:
        until(lambda: len(stub.requests) > 3, process)
        ends_by(process, number)


def test_a_command_that_works_ends_at_once(demo) -> None:
    """It reads without an end."""
    forever = "print(1, flush=True)\nwhile True: kvm.read(kvm.address('_version'), 64)"
    files = ("-N", os.path.join(demo, "mach_kernel"), "-M", os.path.join(demo, "core"))
    with running("python", *files, "-c", forever) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        ends_by(process, signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    with Stub(hang_after=3) as stub:
        command = f"trap '' HUP; exec {sys.executable} -m kvmtool -M {stub.url} procs"
        with subprocess.Popen(
            ["/bin/sh", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            until(lambda: len(stub.requests) > 3, process)
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert process.poll() is None
            ends_by(process, signal.SIGTERM)


def test_a_second_one_does_not_wait_for_the_first() -> None:
    with Stub(hang_after=3) as stub, running("-M", stub.url, "procs") as process:
        until(lambda: len(stub.requests) > 3, process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SOON)
        assert process.returncode == -signal.SIGINT


# a reader that has gone

ARGUMENTS: dict[str, tuple[str, ...]] = {  # of those that need some
    "dd": ("_version", "4"),
    "nlist": ("_version",),
    "print": ("nprocs",),
    "python": ("-c", "print(kvm)"),
    "read": ("_version", "64"),
    "search": ("Darwin",),
    "symbol": ("_version",),
    "type": ("proc",),
    "vmmap": ("kernel",),
    "vtop": ("_version",),
    "walk": ("allproc",),
}
# they write files, or serve, or are not about a dump
OTHERS = {"completion", "convert", "demo", "doctor", "extract", "kernels", "mount"}


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - OTHERS))
def test_nobody_reads(name, demo) -> None:
    """All that is printed goes into a pipe whose reader has gone."""
    ours, theirs = os.pipe()
    os.close(ours)
    files = ("-N", os.path.join(demo, "mach_kernel"), "-M", os.path.join(demo, "core"))
    try:
        with running(name, *ARGUMENTS.get(name, ()), *files, stdout=theirs) as process:
            _, err = process.communicate(timeout=60)
    finally:
        os.close(theirs)
    said = [line for line in err.decode().splitlines() if not line.startswith("kvmtool: ")]
    assert said == [], err.decode()
    if process.returncode == 1:  # an answer that this dump does not give
        assert b"kvmtool: " in err
    else:
        assert process.returncode == -signal.SIGPIPE


def test_the_first_line_of_many(demo) -> None:
    files = f"-N {demo}/mach_kernel -M {demo}/core"
    for command in ("symbols", "types", "symbols --format jsonl", "read _version 65536"):
        line = f"set -o pipefail; {sys.executable} -m kvmtool {files} {command} | head -1"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, check=False)
        assert (done.stdout.count(b"\n"), done.stderr) == (1, b""), command
        assert done.returncode in (0, 128 + signal.SIGPIPE)


# no part of a file


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """A core whose last segment has 2 GB, in a sparse file."""
    path = str(tmp_path_factory.mktemp("large") / "core")
    image = macho.MachO("x86_64", macho.MH_CORE)
    image.segment("", KERNEL, small_kernel("x86_64", KERNEL, [KERNEL + 8]))
    image.segment("", KERNEL + (1 << 30), bytes(0x1000))
    image.note("main bin spec", struct.pack("<2IQ16s2I", 1, 1, KERNEL, bytes(16), 0, 0))
    image.note("kern ver str", struct.pack("<I256s", 1, b"Darwin Kernel Version 13.4.0: x"))
    data, size = bytearray(image.build()), struct.pack("<Q", 2 << 30)
    at = data.index(struct.pack("<Q", KERNEL + (1 << 30)))  # vmaddr, vmsize, fileoff, filesize
    data[at + 8 : at + 16] = data[at + 24 : at + 32] = size
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(len(data) + (2 << 30))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> str:
    """65 members of 64 MB: 4 GB and one, so that the size at the end is right."""
    path = str(tmp_path_factory.mktemp("packed") / "core.gz")
    member = gzip_member(bytes(64 << 20))
    with open(path, "wb") as file:
        for _ in range(65):
            file.write(member)
    return path


def writes_in(folder: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether something of the new file is there, be it without a name."""
    descriptors = f"/proc/{process.pid}/fd"
    for fd in os.listdir(descriptors) if os.path.isdir(descriptors) else ():
        path = os.path.join(descriptors, fd)
        with suppress(FileNotFoundError):  # it has just been closed
            if os.readlink(path).startswith(f"{folder}/") and os.stat(path).st_size:
                return True
    return any(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_convert_leaves_no_part(large, tmp_path, number) -> None:
    arguments = ("convert", str(tmp_path / "out"), "--to", "macho-core", "-M", large)
    with running(*arguments, stderr=subprocess.DEVNULL) as process:
        until(lambda: writes_in(str(tmp_path), process), process)
        process.send_signal(number)
        process.communicate(timeout=SOON)
    assert process.returncode == -number
    if number != signal.SIGKILL or nameless(tmp_path):
        assert os.listdir(tmp_path) == []
    assert all(name.startswith(".kvmtool-") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_extract_leaves_no_part(packed, tmp_path, number) -> None:
    with running("extract", "core", str(tmp_path / "out"), "-M", packed) as process:
        until(lambda: writes_in(str(tmp_path), process), process, 60)
        ends_by(process, number)
    if number != signal.SIGKILL or nameless(tmp_path):
        assert os.listdir(tmp_path) == []
    assert all(name.startswith(".kvmtool-") for name in os.listdir(tmp_path))


def nameless(folder) -> bool:
    """Whether `folder` can have files without a name."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        return False
    return True
