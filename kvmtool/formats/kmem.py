"""The real devices of a Mac: /dev/kmem (kernel addresses) and /dev/mem (physical ones).

A request is answered whole or not at all: the kernel looks every page up before it copies a byte,
and answers EFAULT otherwise. The devices are there only when the kernel was booted with kmem=1.
An address above 2^63 does not fit the signed offset. Most kernels take it as the negative number
it then is; one booted with kmem=3 (10.10 and later) wants it with its top bit cleared and sets the
bit itself. Which of the two it is, the first successful read shows.

Source: bsd/dev/mem.c, bsd/dev/i386/mem.c and bsd/miscfs/devfs/devfs_vfsops.c, xnu-792 to 11417;
/dev/mem is no way to physical memory on Intel: until 10.9 its reads copy a page fresh from the
kernel's heap, whatever is in it, and since 10.10 they answer ENODEV.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from kvmtool import macho
from kvmtool.errors import KvmError, UnsupportedError
from kvmtool.formats import UNSAID, Facts, Note, Run
from kvmtool.formats.live import LiveMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOP_BIT = 1 << 63
_LARGEST_READ = 1 << 24
_UNREADABLE = (errno.EFAULT, errno.EINVAL)  # EINVAL: a host that takes no negative offsets
_HINT = (
    "the kernel has it only when booted with kmem=1 (sudo nvram boot-args=kmem=1, 'kmem=3' with "
    "the top bit of addresses masked), and on current systems only with System Integrity "
    "Protection off"
)

# uname -m of XNU
_MACHINES = {
    "i386": macho.CPU_TYPE_I386,
    "x86_64": macho.CPU_TYPE_X86_64,
    "Power Macintosh": macho.CPU_TYPE_POWERPC,
    "arm64": macho.CPU_TYPE_ARM64,
}


class Device(Protocol):
    """An open character device."""

    def pread(self, size: int, offset: int) -> bytes:
        """`size` bytes at the signed `offset`. Raises OSError."""
        ...

    def close(self) -> None:
        """Give the device back."""
        ...


class _CharacterDevice:
    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISCHR(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise OSError(errno.ENODEV, "is not a character device", path)

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        os.close(self._fd)


class KmemSource:
    """A device in the place of a file. It holds memory, not bytes at file offsets."""

    size = 0

    def __init__(self, path: str, opener: Callable[[str], Device] = _CharacterDevice) -> None:
        """Open the device at `path`. Raises `KvmError` with what can be done about it."""
        self.name = path
        try:
            self._device = opener(path)
        except OSError as error:
            self.fail(error)

    def pread(self, size: int, offset: int) -> bytes | None:
        """`size` bytes, or None for a bad address. Raises `KvmError`."""
        try:
            data = self._device.pread(size, offset)
        except OSError as error:
            if error.errno in _UNREADABLE:
                return None
            self.fail(error)
        if len(data) != size:
            raise KvmError(
                f"{self.name}: expected {size:#x} bytes at {offset:#x}, got {len(data):#x}: "
                "this is no device of XNU, which never answers in part"
            )
        return data

    def fail(self, error: OSError) -> NoReturn:
        """Raises the `KvmError` that says what `error` means here."""
        text = f"{self.name}: {error.strerror or error}"
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise UnsupportedError(f"{text}; {_HINT}") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise KvmError(f"{text}: it is root's (or of group kmem); {_HINT}") from error
        raise KvmError(text) from error

    def read_at(self, off: int, size: int) -> bytes:
        """A device has no file offsets: raises `UnsupportedError`."""
        raise UnsupportedError(f"{self.name}: a device holds memory, not a file")

    def find(self, needle: bytes, start: int, end: int) -> int:
        """There are no file offsets to find anything at: always -1."""
        return -1

    def close(self) -> None:
        """Give the device back."""
        self._device.close()


class DeviceMemory(LiveMemory):
    """Memory behind a device, read at every call. What there is, only reading shows."""

    def __init__(self, source: KmemSource, space: str) -> None:
        super().__init__(space)
        self._source = source
        self.masked: bool | None = None  # whether the top bit is to be cleared; None: not yet known

    def _fetch(self, address: int, size: int) -> bytes:
        data = self._read(address, min(size, _LARGEST_READ))
        return b"" if data is None else data

    def _read(self, address: int, size: int) -> bytes | None:
        if address < _TOP_BIT:
            return self._source.pread(min(size, _TOP_BIT - address), address)
        if not self.masked:
            data = self._source.pread(size, address - 2 * _TOP_BIT)
            if data is not None:
                self.masked = False
            if self.masked is False:
                return data
        # the last byte of all has no offset: off_t ends one before it
        data = self._source.pread(size, address - _TOP_BIT)
        if data is not None:
            self.masked = True
        return data


class Kmem:
    """/dev/kmem or /dev/mem, told apart by name as the kernel's own table has them."""

    name = "kmem"
    live = True

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """Never: a device is named by its path, its first bytes are not for reading."""
        return False

    def __init__(self, source: KmemSource, uname: tuple[str, str] = ("", "")) -> None:
        """`uname` is machine and version as the running kernel says; empty on another system.

        Raises `UnsupportedError` for the /dev/mem of an Intel Mac.
        """
        self.source = source
        self.container: Any = None
        self.notes: tuple[Note, ...] = ()
        self.warnings: list[str] = []
        self.is_physical = os.path.basename(source.name) == "mem"
        machine, version = uname
        if self.is_physical and machine in ("i386", "x86_64"):
            raise UnsupportedError(
                f"{source.name}: this kernel answers with its own heap, not with physical memory: "
                "name /dev/kmem"
            )
        if self.is_physical and machine:
            self.warnings.append("real only when booted with the flag enaDiagDM, else stale heap")
        cputype = _MACHINES.get(machine, UNSAID)
        said = {"cputype": "uname"} if cputype != UNSAID else {}
        if version:
            said["version"] = "uname"
        self.facts = Facts(cputype, 0, version=version or None, said=said)

    def runs(self) -> Iterator[Run]:
        """None: nothing lies at a file offset."""
        return iter(())

    def virtual(self) -> DeviceMemory | None:
        """Kernel memory, of /dev/kmem; None of /dev/mem."""
        return None if self.is_physical else DeviceMemory(self.source, "kernel")

    def physical(self) -> DeviceMemory | None:
        """Physical memory, of /dev/mem; None of /dev/kmem."""
        return DeviceMemory(self.source, "physical") if self.is_physical else None


def open_kmem(path: str = "/dev/kmem") -> Kmem:
    """Open a memory device of the running Mac. The caller closes its source.

    Raises `KvmError`, `UnsupportedError` where the kernel has no such device.
    """
    system = os.uname()
    here = (system.machine, system.version) if system.sysname == "Darwin" else ("", "")
    source = KmemSource(path)
    try:
        return Kmem(source, here)
    except KvmError:
        source.close()
        raise
