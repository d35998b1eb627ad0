"""The article's own command line, on the devices that `kvmtool mount` gives back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from kvmtool.types import layouts
from tests.machine import checks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.machine.build import Images
    from tests.machine.vm import Vm

_SECONDS = 15
_OFFSET = (1 << 63) - 1  # kmem: the address with its top bit cleared


class MountError(RuntimeError):
    """kvmtool did not mount; the message is its own."""


def failures(vm: Vm, images: Images, core: str, folder: str) -> Iterator[str]:
    """What does not hold, a line each; nothing if all does."""
    try:
        with _mounted(images.kernel, core, os.path.join(folder, "mounted")) as place:
            yield from _article(vm, images, os.path.join(place, "kmem"))
            yield from _hole(vm, os.path.join(place, "kmem"))
    except MountError as error:
        yield f"mount: {error}"


@contextlib.contextmanager
def _mounted(kernel: str, core: str, place: str) -> Iterator[str]:
    os.makedirs(place, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "kvmtool",
        "-N",
        kernel,
        "-M",
        core,
        "mount",
        "--foreground",
        place,
    ]
    log = f"{place}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        _wait_for(place, process, log)
        yield place
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
        process.kill()
        process.wait()
        if os.path.ismount(place):
            subprocess.run(["fusermount3", "-u", "-z", place], check=False)
            raise MountError(f"{place} is still mounted after SIGTERM")


def _wait_for(place: str, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not os.path.ismount(place):
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            with open(log, encoding="utf-8", errors="replace") as file:
                said = file.read().strip().splitlines()
            raise MountError(said[-1] if said else f"nothing mounted within {_SECONDS} s")
        time.sleep(0.05)


def _article(vm: Vm, images: Images, kmem: str) -> Iterator[str]:
    """dd if=kmem bs=1 iseek=N count=4 | od -X: the low half of the function's address."""
    types = layouts.table(vm.said("machine")[0]["layout"])
    table = next(s["address"] for s in vm.said("symbol") if s["name"] == "_cdevsw")
    at = int(table, 16) + checks.MMREAD_MAJOR * types.size("cdevsw")
    at = (at + types.offset("cdevsw", "d_read")) & _OFFSET
    line = f"dd if={kmem} bs=1 iseek={at} count=4 status=none | od -X"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=_SECONDS)
    expected = f"{checks.my_mmread(vm, images) & 0xFFFFFFFF:08x}"
    words = done.stdout.split()
    if len(words) < 2 or words[1] != expected:
        yield f"{line}: expected {expected}, got {done.stdout!r} {done.stderr.strip()}"


def _hole(vm: Vm, kmem: str) -> Iterator[str]:
    """A read that runs into what is not mapped gives EFAULT and not a byte."""
    at = (int(vm.said("hole")[0]["address"], 16) - 8) & _OFFSET
    line = f"dd if={kmem} bs=16 iseek={at} iflag=skip_bytes count=1 status=none"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=_SECONDS)
    if done.stdout or b"Bad address" not in done.stderr:
        yield f"{line}: expected EFAULT, got {done.stdout!r} {done.stderr.decode().strip()}"
