"""QEMU: the machine, its monitor (QMP), and the dumps it makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from tests.machine.build import Images

MEMORY = 80  # MiB; PHYSICAL_SIZE in src/machine.h
_BOOT_SECONDS = 30
# What the firmware says is memory (E820): conventional memory, and from 1 MiB to the end.
RAM = ((0, 0x9FC00), (0x100000, MEMORY << 20))


class MachineError(RuntimeError):
    """The machine did not do what it should; the message says what it said last."""


def free_port() -> int:
    """A TCP port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Qemu:
    """A running QEMU of 80 MiB with no devices but those in `options`; a context manager."""

    def __init__(self, arch: str, folder: str, options: Iterable[str]) -> None:
        """Starts it; `folder` gets its monitor and what it says."""
        self.arch = arch
        self._monitor = os.path.join(folder, "monitor")
        self._errors = os.path.join(folder, "qemu.log")
        if os.path.lexists(self._monitor):
            os.unlink(self._monitor)
        with open(self._errors, "wb") as errors:
            self._qemu = subprocess.Popen(
                [
                    *(f"qemu-system-{arch}", "-machine", "pc,accel=tcg", "-m", str(MEMORY)),
                    *("-display", "none", "-nic", "none", "-no-reboot", "-nodefaults"),
                    *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._qemu.kill()
        self._qemu.wait()

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Whether `ready` came true, then the processor is stopped, before QEMU or time ended."""
        deadline = time.monotonic() + _BOOT_SECONDS
        while not ready():
            if self._qemu.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        self.monitor("stop")
        return True

    def complaints(self) -> str:
        """What QEMU wrote on its standard output and error."""
        with open(self._errors, encoding="utf-8", errors="replace") as errors:
            return errors.read().strip()

    def monitor(self, command: str, **arguments: Any) -> Any:
        """The answer to one QMP command. Raises `MachineError` with QEMU's own words."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(60)
            wire.connect(self._monitor)
            with wire.makefile("rwb") as lines:
                lines.readline()  # the greeting
                answer: Any = None
                for each, given in (("qmp_capabilities", {}), (command, arguments)):
                    request = {"execute": each, "arguments": given}
                    lines.write(json.dumps(request).encode() + b"\n")
                    lines.flush()
                    answer = self._answer(lines, command)
                return answer

    def _answer(self, lines: Any, command: str) -> Any:
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise MachineError(f"QMP {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
        raise MachineError(f"QMP {command}: QEMU hung up")


class Vm(Qemu):
    """One running machine. `oracle` are the objects it said on its serial port.

    `port` is that of its gdb stub. From `boot` on the processor is stopped for good.
    """

    def __init__(self, arch: str, images: Images, folder: str, slide: int | None = None) -> None:
        """Starts QEMU; `slide` instead of a random one (x86_64)."""
        self._serial = os.path.join(folder, "serial.jsonl")
        self.port = free_port()
        self.oracle: list[dict[str, Any]] = []
        if os.path.lexists(self._serial):
            os.unlink(self._serial)
        options = [] if slide is None else ["-append", f"slide={slide:x}"]
        super().__init__(
            arch,
            folder,
            (
                *("-serial", f"file:{self._serial}", "-gdb", f"tcp:127.0.0.1:{self.port}"),
                *("-kernel", images.kernel, "-initrd", images.kext, *options),
            ),
        )

    def boot(self) -> None:
        """Waits until the kernel has said everything, then stops the processor."""
        if not self.wait(self._read_serial):
            raise MachineError(self._last_words())

    def _read_serial(self) -> bool:
        if not os.path.exists(self._serial):
            return False
        with open(self._serial, encoding="ascii") as serial:
            text = serial.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        self.oracle = [json.loads(line) for line in lines]
        return bool(self.oracle) and self.oracle[-1]["kind"] == "ready"

    def _last_words(self) -> str:
        last = self.oracle[-1] if self.oracle else "nothing"
        return (
            f"{self.arch}: the machine did not get ready; it said last: {last}; "
            f"QEMU: {self.complaints()}"
        )

    def said(self, kind: str) -> list[dict[str, Any]]:
        """The oracle's objects of one kind."""
        return [each for each in self.oracle if each["kind"] == kind]
