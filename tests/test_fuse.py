"""The devices as a mounted directory: by dd and od, and by a server that comes to its end."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmtool import fuse, sample
from kvmtool.devices import DEVICE_SIZE, KernelView, dd_line, exposed
from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.memory import RunMemory
from kvmtool.pread_source import PreadSource
from kvmtool.source import FileSource
from kvmtool.symbols import Symbol
from tests.builders.gdbserver import Stub
from tests.inputs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

KERNEL = 0xFFFFFF8000200000
PLACE = KERNEL & DEVICE_SIZE  # its offset in kmem
SIZE = 8 << 20
HOLE = SIZE // 2  # what lies behind is 16 KiB further up in memory
DATA = random.Random(9).randbytes(SIZE)

missing = [
    what
    for what, there in (
        ("mfusepy (pip install mfusepy)", importlib.util.find_spec("mfusepy")),
        ("/dev/fuse, or the right to open it", os.access("/dev/fuse", os.R_OK | os.W_OK)),
        ("fusermount3 (apt-get install fuse3)", shutil.which("fusermount3")),
    )
    if not there
]
needs_fuse = pytest.mark.skipif(bool(missing), reason=f"FUSE is not here: {', '.join(missing)}")


def serve(kind: str, path: str, directory: str, background: str) -> None:
    """The server's whole program: what the tests mount."""
    if kind == "sample":
        import kvmtool

        view = exposed(kvmtool.open(f"{path}/mach_kernel", f"{path}/core"))
    elif kind == "gdb":
        from kvmtool.formats.gdb import open_gdb

        view = KernelView(open_gdb(path, timeout=1).virtual(), None, [], 8, "<")
    else:
        source = PreadSource(path) if kind == "read" else FileSource(path)
        starts, ends = [KERNEL, KERNEL + HOLE + 0x4000], [KERNEL + HOLE, KERNEL + SIZE + 0x3456]
        memory = RunMemory(
            source, array("Q", starts), array("Q", ends), array("Q", [0, HOLE]), space="kernel"
        )
        runs = (array("Q", [n]) for n in (0, SIZE, 0))
        physical = RunMemory(source, *runs, space="physical")
        symbol = Symbol("_start", KERNEL, 0xF, 1, 0, KERNEL)
        view = KernelView(memory, physical, [symbol], 8, "<", (("__TEXT", "__text"),))
    fuse.mount(
        view,
        directory,
        foreground=not background,
        ready=lambda: print("ready", flush=True),
        on_error=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print("ended", flush=True)


class Mounted(NamedTuple):
    """A server and its directory."""

    server: subprocess.Popen[str]
    directory: str

    def path(self, name: str) -> str:
        """Of a file in it."""
        return os.path.join(self.directory, name)

    def end(self, timeout: float = 10) -> tuple[int, str, str]:
        """Wait for the server: its status, and what it said."""
        out, err = self.server.communicate(timeout=timeout)
        return self.server.returncode, out, err


@contextmanager
def mounted(kind: str, path: str, directory: str, background: str = "") -> Iterator[Mounted]:
    """Start a server; whatever the test did, nothing stays mounted."""
    code = "import sys; from tests.test_fuse import serve; serve(*sys.argv[1:])"
    server = subprocess.Popen(
        [sys.executable, "-c", code, kind, path, directory, background],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        if not background:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
        yield Mounted(server, directory)
    finally:
        server.kill()
        server.communicate()
        if is_mounted(directory):
            subprocess.run(["fusermount3", "-u", "-z", directory], check=False)


def is_mounted(directory: str) -> bool:
    """Whether the kernel lists it, dead or alive."""
    with open("/proc/mounts", encoding="utf-8") as mounts:
        return any(line.split(" ")[1] == directory for line in mounts)


def gone(directory: str, timeout: float = 5) -> bool:
    """Whether nothing is mounted there, at the latest after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while is_mounted(directory) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_mounted(directory)


@pytest.fixture
def directory(tmp_path) -> str:
    """An empty one to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return str(path)


@pytest.fixture
def dump(tmp_path) -> str:
    """A file of memory."""
    path = tmp_path / "dump"
    path.write_bytes(DATA)
    return str(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[Mounted]:
    """A mounted dump for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "mnt").mkdir()
    (folder / "dump").write_bytes(DATA)
    with mounted("read", str(folder / "dump"), str(folder / "mnt")) as found:
        yield found


@pytest.fixture
def live(dump, directory) -> Iterator[Mounted]:
    """A mounted dump."""
    with mounted("read", dump, directory) as found:
        yield found


def refused(number: int):
    """An OSError with that errno."""
    return pytest.raises(OSError, match=os.strerror(number))


@needs_fuse
def test_the_command_line_of_the_article(tmp_path, directory):
    sample.write(str(tmp_path))
    with mounted("sample", str(tmp_path), directory):
        line = dd_line(directory, 0x441990, 4, 4)
        assert line.endswith("kmem bs=1 iseek=4462992 count=4 | od -X")
        shown = subprocess.run(
            ["/bin/sh", "-c", line], capture_output=True, text=True, check=True
        ).stdout
        assert shown.split() == ["0000000", "3bd0214f", "0000004"]  # the article's _my_mmread
        assert sorted(os.listdir(directory)) == ["info.json", "kmem", "kmem32", "mem", "symbols"]
        with open(f"{directory}/info.json", encoding="utf-8") as info:
            assert json.load(info)["kmem_offset"] == "address"
        with open(f"{directory}/symbols", encoding="utf-8") as symbols:
            assert "00441720 D _cdevsw\n" in symbols.read()
        fd = os.open(f"{directory}/kmem32", os.O_RDONLY)
        assert os.pread(fd, 4, 0x441990) == bytes.fromhex("4f21d03b")
        os.close(fd)


@needs_fuse
def test_files_and_modes(shared):
    for name, size in (("kmem", DEVICE_SIZE), ("mem", SIZE), ("symbols", 26)):
        status = os.stat(shared.path(name))
        assert (oct(status.st_mode), status.st_size) == ("0o100440", size)
        assert status.st_uid == os.getuid()
    assert os.stat(shared.directory).st_mode & 0o777 == 0o555
    with refused(errno.ENOENT):
        os.stat(shared.path("kmem32"))
    with open("/proc/mounts", encoding="utf-8") as mounts:
        [options] = [line.split(" ")[3] for line in mounts if f" {shared.directory} " in line]
    assert "default_permissions" in options.split(",")
    assert "allow_other" not in options


@needs_fuse
def test_reads(shared):
    fd = os.open(shared.path("kmem"), os.O_RDONLY)
    for at, size in ((0, 1), (1, 5), (0xFFF, 2), (12345, 300_000), (HOLE - 1, 1)):
        assert os.pread(fd, size, PLACE + at) == DATA[at : at + size]
    assert os.pread(fd, 2, PLACE + SIZE + 0x3454) == DATA[-0xBAC:][:2]  # the last two there are
    assert os.lseek(fd, PLACE + 16, os.SEEK_SET) == PLACE + 16
    assert os.read(fd, 16) == DATA[16:32]
    for at, size in ((HOLE, 1), (HOLE - 1, 2), (-1, 2), (SIZE + 0x3455, 2), (HOLE + 0x3FFF, 2)):
        with refused(errno.EFAULT):
            os.pread(fd, size, PLACE + at)
    with refused(errno.EFAULT):
        os.pread(fd, 1, 0x1000)
    os.close(fd)
    with open(shared.path("mem"), "rb", buffering=0) as mem:
        assert mem.read(4) == DATA[:4]
        mem.seek(SIZE)
        with refused(errno.EFAULT):
            mem.read(1)


@needs_fuse
def test_a_long_read_ends_at_a_part_then_faults(shared):
    fd = os.open(shared.path("kmem"), os.O_RDONLY)
    start = HOLE - (3 << 20) - 5
    got = os.pread(fd, 4 << 20, PLACE + start)
    assert got == DATA[start : start + len(got)]
    assert (1 << 20) < len(got) <= (3 << 20) + 5
    with refused(errno.EFAULT):
        os.pread(fd, 4096, PLACE + HOLE - 100)
    os.close(fd)


@needs_fuse
def test_writing_is_not_supported(shared):
    if os.getuid():
        with refused(errno.EACCES):
            os.open(shared.path("kmem"), os.O_WRONLY)
        return
    fd = os.open(shared.path("kmem"), os.O_RDWR)
    with refused(errno.ENOTSUP):
        os.pwrite(fd, b"x", PLACE)
    os.close(fd)
    with refused(errno.ENOTSUP):
        os.truncate(shared.path("kmem"), 0)


@needs_fuse
def test_xattr(shared):
    path = shared.path("kmem")
    assert os.getxattr(path, f"user.kvm.{KERNEL + 3:x}.9") == DATA[3:12]
    assert os.getxattr(path, f"user.kvm.{KERNEL:x}.65536") == DATA[:65536]
    with refused(errno.E2BIG):
        os.getxattr(path, f"user.kvm.{KERNEL:x}.65537")
    with refused(errno.EFAULT):
        os.getxattr(path, f"user.kvm.{KERNEL + HOLE:x}.1")
    with refused(errno.ENODATA):
        os.getxattr(path, "user.other")


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.usefixtures("signals_heard")
def test_signals_unmount(live, number):
    live.server.send_signal(number)
    assert live.end() == (0, "ended\n", "")
    assert not is_mounted(live.directory)


@needs_fuse
@pytest.mark.parametrize("background", ["", "background"])
def test_a_killed_server_leaves_nothing(dump, directory, background):
    with mounted("read", dump, directory, background) as live:
        pid = live.server.pid
        if background:
            assert live.end()[0] == 0
            assert os.path.exists(live.path("kmem"))
            found = subprocess.run(
                ["pgrep", "-f", f"serve.*{directory} background"], capture_output=True, check=True
            )
            [pid] = map(int, found.stdout.split())
        os.kill(pid, signal.SIGKILL)
        assert gone(directory)
        assert os.listdir(directory) == []


@needs_fuse
def test_in_the_background_until_unmounted(dump, directory):
    with mounted("read", dump, directory, "background") as live:
        assert live.end()[0] == 0
        with open(live.path("mem"), "rb", buffering=0) as mem:
            assert mem.read(9) == DATA[:9]
        subprocess.run(["fusermount3", "-u", directory], check=True)
        assert gone(directory)


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_while_it_is_read(live, number):
    with subprocess.Popen(
        ["dd", f"if={live.path('mem')}", "of=/dev/null", "bs=64k"], stderr=subprocess.PIPE
    ) as reader:
        live.server.send_signal(number)
        reader.communicate(timeout=10)  # to its end or to an error: it does not hang
    live.end()
    assert gone(live.directory)


@needs_fuse
def test_unmounting_while_it_is_open(live):
    fd = os.open(live.path("kmem"), os.O_RDONLY)
    busy = subprocess.run(["fusermount3", "-u", live.directory], capture_output=True, check=False)
    assert busy.returncode
    assert os.pread(fd, 4, PLACE) == DATA[:4]
    subprocess.run(["fusermount3", "-u", "-z", live.directory], check=True)
    assert not is_mounted(live.directory)
    assert os.pread(fd, 4, PLACE + 4) == DATA[4:8]  # who has it open may go on
    os.close(fd)
    status, out, said = live.end()
    assert (status, out) == (0, "ended\n")
    # libfuse's own word, when the kernel ends the connection while it waits for the next question
    assert said in ("", "fuse: reading device: Software caused connection abort\n")


@needs_fuse
def test_a_dump_cut_while_mounted(live, dump):
    os.truncate(dump, 0x10000)
    fd = os.open(live.path("kmem"), os.O_RDONLY)
    for at in (0x20000, 0x30000, 0xFFFF):
        with refused(errno.EIO):
            os.pread(fd, 4, PLACE + at)
    assert os.pread(fd, 4, PLACE + 0x8000) == DATA[0x8000:0x8004]
    os.close(fd)
    subprocess.run(["fusermount3", "-u", live.directory], check=True)
    status, out, err = live.end()
    assert (status, out) == (0, "ended\n")
    assert err.splitlines() == [
        f"{dump}: at offset 0x20000: expected 0x4 bytes, got 0x0 (file is cut off)"
    ]


@needs_fuse
def test_a_mapped_dump_cut_while_mounted_leaves_no_dead_mount(dump, directory):
    with mounted("mapped", dump, directory) as live:
        os.truncate(dump, 0x10000)
        fd = os.open(live.path("kmem"), os.O_RDONLY)
        with pytest.raises(OSError, match=r"abort|not connected"):
            os.pread(fd, 4, PLACE + 0x20000)
        with suppress(OSError):  # the connection is gone, the descriptor too
            os.close(fd)
        assert live.end()[0] == -signal.SIGBUS  # why a server wants PreadSource
        assert gone(directory)


@needs_fuse
def test_a_live_target_killed_while_mounted(directory):
    with (
        Stub(memory=((KERNEL, DATA[:0x4000]),)) as stub,
        mounted("gdb", stub.url, directory) as live,
    ):
        fd = os.open(live.path("kmem"), os.O_RDONLY)
        assert os.pread(fd, 8, PLACE) == DATA[:8]
        with refused(errno.EFAULT):
            os.pread(fd, 8, PLACE + 0x4000)
        stub.kill()
        began = time.monotonic()
        for _ in range(2):
            with refused(errno.EIO):
                os.pread(fd, 8, PLACE)
        assert time.monotonic() - began < 2
        os.close(fd)
        live.server.terminate()
        status, _, err = live.end()
        assert status == 0
        assert "the connection is lost" in err
        assert len(err.splitlines()) == 1
        assert not is_mounted(directory)


@needs_fuse
def test_the_rate_of_large_blocks(shared, dump):
    def rate(path: str, *more: str) -> float:
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            subprocess.run(
                ["dd", f"if={path}", "of=/dev/null", "bs=1M", "count=8", *more],
                check=True,
                capture_output=True,
            )
            best = max(best, SIZE / (time.perf_counter() - began))
        return best

    assert rate(shared.path("mem")) > 0.1 * rate(dump)


@needs_fuse
def test_a_second_mount_is_refused(shared):
    with pytest.raises(KvmError, match="something is mounted there already"):
        fuse.mount(KernelView(RunMemory.__new__(RunMemory), None, [], 8, "<"), shared.directory)


@needs_fuse
def test_threads_do_not_follow_into_the_background(directory):
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(UnsupportedError, match="other threads"):
            fuse.mount(
                KernelView(RunMemory.__new__(RunMemory), None, [], 8, "<"),
                directory,
                foreground=False,
            )
    finally:
        stop.set()
        thread.join()


@needs_fuse
def test_what_libfuse_says_is_in_the_error(directory, monkeypatch):
    monkeypatch.setattr(fuse.os.path, "realpath", lambda path: f"{path}/nonesuch")
    with pytest.raises(KvmError, match=r"cannot mount: .*nonesuch"):
        fuse.mount(KernelView(RunMemory.__new__(RunMemory), None, [], 8, "<"), directory)


@pytest.mark.parametrize("name", ["nonesuch", "file"])
def test_where_no_directory_is(name, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KvmError, match="expected a directory"):
        fuse._check(str(tmp_path / name), 3)


def test_without_mfusepy(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "mfusepy", None)
    with pytest.raises(UnsupportedError, match=r"kvmtool\[mount\]"):
        fuse.mount(KernelView(RunMemory.__new__(RunMemory), None, [], 8, "<"), directory)


def test_without_the_helper(directory, monkeypatch):
    monkeypatch.setattr(fuse.os.path, "exists", lambda path: True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="apt-get install fuse3"):
        fuse._check(directory, 3)
