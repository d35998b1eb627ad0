"""A live machine over the gdb remote serial protocol: QEMU, VMware, gdbserver, debugserver.

QEMU halts the machine as soon as somebody connects and keeps it halted when the connection is just
closed; `D` lets it go on. So `close` sends `D` to a machine that ran when we came, and only hangs
up on one that stood. Nothing here kills (`k`) or steps; `resume` alone continues.

Source: gdb manual, "Remote Protocol"; QEMU docs/system/gdb.rst and gdbstub.c, 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.formats import Facts, Note, Run, gdb_target
from kvmtool.formats import gdb_packets as packets
from kvmtool.formats.gdb_session import DEFAULT_TIMEOUT, GdbSession
from kvmtool.formats.live import LiveMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.formats.gdb_target import Description
    from kvmtool.memory import Region

_LARGEST_READ = 1 << 16
_WINDOW = 8  # requests under way at a time, where the stub is known to queue them
_CPUS = 64


def open_gdb(url: str, timeout: float = DEFAULT_TIMEOUT, detach: bool | None = None) -> Gdb:
    """Connect to the stub at ``gdb://host:port``. The caller closes what comes back.

    `detach` says whether the machine shall run on when we leave; without it, it is left as it was
    found. Raises `KvmError` when there is no stub or it does not answer within `timeout` seconds.
    """
    session = GdbSession(url, timeout)
    try:
        return Gdb(session, detach)
    except KvmError:
        session.close()
        raise


class GdbMemory(LiveMemory):
    """An address space of the target, read over the line at every call; nothing is cached.

    "kernel" is what the processor sees in its present mode, which in user mode may be no kernel at
    all (4G/4G until 10.6, KPTI since 10.13.2); "physical" needs the stub's physical mode.
    """

    def __init__(self, target: Gdb, space: str, extent: tuple[Region, ...] | None = None) -> None:
        super().__init__(space, extent)
        self._target = target

    def watch(self, memory: Any) -> None:
        """Have `memory.forget()` called when the target may have changed under it."""
        self._target.watchers.add(memory)

    def _fetch(self, address: int, size: int) -> bytes:
        target = self._target
        with target.source.lock:  # the mode must hold until the last answer is there
            target.set_physical(self.space == "physical")
            if size <= target.read_size:
                return target.read_once(address, size)
            return target.read_many(address, size)


class Gdb:
    """A live target: facts, registers, and its memory. Made by `open_gdb`."""

    name = "gdb"
    live = True

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """Never: a stub is named by its address, no file holds one."""
        return False

    def __init__(self, source: GdbSession, detach: bool | None = None) -> None:
        """Learn what the target is. See `open_gdb`."""
        self.source = source
        self.container: Any = None
        self.notes: tuple[Note, ...] = ()
        self.warnings: list[str] = []
        self._detach = detach
        self.watchers: WeakSet[Any] = WeakSet()
        self._learn()
        self.facts = self._facts()

    def _learn(self) -> None:
        """What the stub can do; asked again after a reconnect."""
        self.source.farewell = self._leave
        ask, features = self.source.ask, self.source.features
        # a power of two: where reads begin aligned, no request crosses a page without need
        self.read_size = min(1 << (self.source.packet_size // 2).bit_length() - 1, _LARGEST_READ)
        self._binary = "binary-upload+" in features
        mode = ask(b"qqemu.PhyMemMode", packets.text)
        self.has_physical = mode in (b"0", b"1")
        self._found_physical = self._physical = mode == b"1"
        # QEMU queues what it gets; of others that is not known, and the protocol does not ask it
        self._window = _WINDOW if self.has_physical else 1
        self._description: Description | None = None

    def reconnect(self) -> None:
        """Connect again after the line was lost. Raises `KvmError`."""
        self.source.reconnect()
        self._changes()
        self._learn()

    @property
    def halted(self) -> bool:
        """Whether the machine stands still, as it does from the connection on until `resume`."""
        return not self.source.running

    def _changes(self) -> None:
        for memory in self.watchers:
            memory.forget()

    # memory

    def runs(self) -> Iterator[Run]:
        """None: nothing lies at a file offset."""
        return iter(())

    def virtual(self) -> GdbMemory:
        """Kernel memory as the halted processor sees it; what there is, only reading shows."""
        return GdbMemory(self, "kernel")

    def physical(self) -> GdbMemory | None:
        """Physical memory, where the stub has that mode; None where it has not.

        QEMU answers zeros for physical memory that does not exist, and a read of a device's
        registers changes the device: so only RAM and ROM are read, as QEMU's monitor lists them.
        """
        if not self.has_physical:
            return None
        extent = gdb_target.ram(self.monitor("info mtree -f"))
        if extent is None:
            self.warnings.append(
                "the stub does not list its RAM: physical memory that is not there reads as zeros"
            )
        return GdbMemory(self, "physical", extent)

    def set_physical(self, physical: bool) -> None:
        """Whether further reads take physical addresses. Raises `KvmError`."""
        if self.source.running:
            raise KvmError(f"{self.source.name}: the target is running: interrupt it first")
        if physical != self._physical:
            if not self.source.ask(b"Qqemu.PhyMemMode:%d" % physical, packets.okay):
                raise UnsupportedError(f"{self.source.name}: the stub has no physical mode")
            self._physical = physical

    def read_once(self, address: int, size: int) -> bytes:
        """The readable prefix of at most `read_size` bytes: one request. Raises `KvmError`."""
        if self._binary:
            data = self.source.ask(b"x%x,%x" % (address, size), packets.binary)
        else:
            data = self.source.ask(b"m%x,%x" % (address, size), packets.memory)
        self._check_size(data, address, size)
        return data

    def read_many(self, address: int, size: int) -> bytes:
        """The readable prefix of any range; exact where a request does not cross a page."""
        spans = list(self._spans(address, size))
        letter, decode = (b"x", packets.binary) if self._binary else (b"m", packets.memory)
        requests = [b"%b%x,%x" % (letter, start, length) for start, length in spans]
        good: list[bytes] = []
        group = 4 * self._window  # what is asked for in vain behind a fault stays small
        for at in range(0, len(requests), group):
            replies = self.source.ask_all(requests[at : at + group], decode, self._window)
            whole = True
            for (start, length), data in zip(spans[at : at + group], replies, strict=True):
                self._check_size(data, start, length)
                if whole:
                    good.append(data)
                    whole = len(data) == length
            if not whole:
                break
        return b"".join(good)

    def _spans(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        end = address + size
        while address < end:
            length = min(self.read_size - address % self.read_size, end - address)
            yield address, length
            address += length

    def _check_size(self, data: bytes, address: int, size: int) -> None:
        if len(data) > size:
            self.source.fail(
                f"{len(data):#x} bytes came for address {address:#x}, expected {size:#x}: "
                "the line is out of step"
            )

    # what the target is

    @property
    def description(self) -> Description:
        """The target's description; empty where the stub has none."""
        if self._description is None:
            self._description = gdb_target.describe(self._document)
        return self._description

    def _document(self, name: str) -> str:
        text, more = b"", True
        if "qXfer:features:read+" not in self.source.features or not name.isprintable():
            return ""
        size = max(self.source.packet_size - 16, 64)
        while more and len(text) < gdb_target.DOCUMENT_LIMIT:
            request = f"qXfer:features:read:{name}:{len(text):x},{size:x}".encode()
            more, part = self.source.ask(request, packets.part)
            text += part
            more = more and bool(part)
        return text.decode("utf-8", "replace")

    def monitor(self, command: str) -> str:
        """What the stub's own monitor says to `command`; empty where it has none."""
        said: list[bytes] = []

        def collect(reply: bytes) -> bool | None:
            printed = packets.output(reply)
            if printed is None:
                return packets.okay(reply)
            if sum(map(len, said)) < packets.PACKET_LIMIT:
                said.append(printed)
            return None

        self.source.ask(b"qRcmd," + command.encode().hex().encode(), collect)
        return b"".join(said).decode("utf-8", "replace")

    def threads(self) -> list[str]:
        """The threads (in QEMU: processors) by the stub's names, at most 64; [] if it has none."""
        found: list[str] = []
        question = b"qfThreadInfo"
        while len(found) < _CPUS:
            more, part = self.source.ask(question, packets.part)
            found += [name for name in part.decode("latin-1").split(",") if name]
            question = b"qsThreadInfo"
            if not more or not part:
                break
        return found[:_CPUS]

    def select(self, thread: str) -> None:
        """Read registers and virtual memory as `thread` sees them. Raises `UnsupportedError`."""
        if not self.source.ask(f"Hg{thread}".encode(), packets.okay):
            raise UnsupportedError(f"{self.source.name}: no thread {thread!r}")

    def registers(self) -> dict[str, int]:
        """The registers of the selected thread, control registers where the stub shows them."""
        known, names = self.description.registers, gdb_target.wanted_registers(self.description)
        order = "big" if self.description.architecture.startswith("powerpc") else "little"
        values: dict[str, int] = {}
        whole: bytes | None = None
        for name in names:
            number, size, offset = known[name]
            data = self.source.ask(b"p%x" % number, packets.memory) if whole is None else b""
            if not data and whole is None and not values:  # no `p` here
                whole = self.source.ask(b"g", packets.memory)
            if whole is not None:
                data = whole[offset : offset + size]
            if len(data) == size:
                values[name] = int.from_bytes(data, order)  # type: ignore[arg-type]
        return values

    def _facts(self) -> Facts:
        cpus: list[dict[str, int]] = []
        names = self.threads()
        for name in names:
            self.select(name)
            cpus.append(self.registers())
        if names:
            self.select(names[0])
        else:
            cpus.append(self.registers())
        info = self.source.ask(b"qHostInfo", packets.text).decode("latin-1")
        cputype, cpusubtype, who = gdb_target.cputype_of(
            self.description.architecture, cpus[0], info
        )
        threads = [gdb_target.thread_of(cputype, cpu) for cpu in cpus]
        return Facts(
            cputype,
            cpusubtype,
            threads=tuple(thread for thread in threads if thread is not None),
            said={"cputype": who} if who else {},
            control=tuple(gdb_target.control_of(cpu) for cpu in cpus),
        )

    # coming and going

    def __enter__(self) -> Gdb:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self) -> None:
        """Let the target run on; memory cannot be read until `interrupt`. Raises `KvmError`."""
        self._changes()
        self.set_physical(self._found_physical)
        self.source.command(b"c")
        self.source.running = True

    def interrupt(self) -> None:
        """Halt the target after `resume`. Raises `KvmError`."""
        self.source.interrupt()
        self.source.running = False

    def close(self) -> None:
        """Leave the target as it was found, or as `detach` said: running (`D`) or halted.

        Closing `source` does the same. Raises `KvmError` when the target is gone unnoticed.
        """
        self.source.close()

    def _leave(self) -> None:
        if self.source.running:  # since `resume`: nothing to say
            return
        self.set_physical(self._found_physical)
        if self.source.found_running if self._detach is None else self._detach:
            self.source.ask(b"D", packets.okay)
