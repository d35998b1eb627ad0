"""The devices back again: an opened kernel as the files of a directory. No FUSE in here.

``kmem``     kernel memory; the offset is the address with its top bit cleared, as a 64-bit kernel
             booted with kmem=3 has it: offsets are signed, kernel addresses are not. Of a 32-bit
             kernel the offset is the address, and ``kmem32`` is the same under a plainer name.
``mem``      physical memory; the offset is the address.
``symbols``  the kernel's symbols as ``nm -n`` prints them.
``info.json``  what kernel this is, and how offsets are made.

A read of a device is answered as the article's kext answers it, and XNU's own driver: every page of
the request is looked up before a byte is copied, the first that is not there makes it EFAULT, and
there is no short answer and no end of file. `mem` without physical memory is ENODEV, as in 10.10
and later (the article's /dev/mem is EFAULT everywhere). A write is ENOTSUP.

Source: bsd/dev/mem.c, xnu-4570; Amit Singh, "Accessing Kernel Memory on the x86 Version of Mac OS
X", 2006.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from kvmtool.errors import FaultError, KvmError
from kvmtool.nlist import Nlist, type_letter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvmtool.kvm import Kvm
    from kvmtool.memory import Memory
    from kvmtool.symbols import Symbol

TOP_BIT = 1 << 63
DEVICE_SIZE = TOP_BIT - 1  # the largest a file can be
XATTR_LIMIT = 1 << 16  # bytes; of Linux, XATTR_SIZE_MAX
FILE_MODE = stat.S_IFREG | 0o440
DIRECTORY_MODE = stat.S_IFDIR | 0o555
_XATTR = re.compile(r"user\.kvm\.(?:0x)?([0-9a-fA-F]{1,16})\.([0-9]{1,6})")


class Exposed(Protocol):
    """What is made into devices; `exposed` makes one of a `Kvm`."""

    @property
    def memory(self) -> Memory:
        """The kernel's address space."""
        ...

    @property
    def physical(self) -> Memory | None:
        """The machine's memory, where there is any."""
        ...

    @property
    def symbols(self) -> Iterable[Symbol]:
        """The kernel's defined symbols."""
        ...

    @property
    def sections(self) -> tuple[tuple[str, str], ...]:
        """(segname, sectname) of the kernel's file, for the letters of `symbols`."""
        ...

    @property
    def pointer_size(self) -> int:
        """4 or 8 bytes."""
        ...

    @property
    def byteorder(self) -> str:
        """A `struct` prefix."""
        ...

    @property
    def facts(self) -> Mapping[str, object]:
        """What else info.json is to say."""
        ...


class KernelView(NamedTuple):
    """An `Exposed` as plain data."""

    memory: Memory
    physical: Memory | None
    symbols: Iterable[Symbol]
    pointer_size: int
    byteorder: str
    sections: tuple[tuple[str, str], ...] = ()
    facts: Mapping[str, object] = {}


def exposed(kvm: Kvm, physical: Memory | None = None) -> KernelView:
    """`kvm` as devices need it. Raises what finding the kernel in its dump raises."""
    from kvmtool.macho import uuid_text

    kernel, boot, dump = kvm.kernel, kvm.boot, kvm.dump
    uuid = (boot.uuid if boot else None) or (kernel.uuid if kernel else None)
    facts = {
        "arch": kvm.arch.name,
        "version": kvm.version,
        "uuid": None if uuid is None else uuid_text(uuid),
        "kernel_address": None if boot is None else f"{boot.kernel_address:#x}",
        "slide": None if kvm.kerndisp is None else f"{kvm.kerndisp:#x}",
        "kernel_file": None if kernel is None else kernel.source.name,
        "core": None if dump is None else dump.source.name,
        "format": None if dump is None else dump.name,
        "live": dump is not None and dump.live,
    }
    sections = () if kernel is None else tuple((s.segname, s.sectname) for s in kernel.sections)
    arch = kvm.arch
    return KernelView(
        kvm.memory, physical, kvm.symbols, arch.pointer_size, arch.byteorder, sections, facts
    )


def kmem_offset(address: int, pointer_size: int) -> int:
    """The offset of a kernel address in `kmem`. Raises `KvmError` if it has none there."""
    if pointer_size == 4:
        return address
    if not address & TOP_BIT:
        raise KvmError(f"address {address:#x} is not in kmem: its top bit is not set")
    return address - TOP_BIT


def dd_line(directory: str, address: int, count: int, pointer_size: int) -> str:
    """The article's command line that shows `count` bytes at `address`. dd takes decimals only.

    Raises `KvmError` for an address that is not in kmem.
    """
    from shlex import quote

    path = quote(os.path.join(directory, "kmem"))
    return f"dd if={path} bs=1 iseek={kmem_offset(address, pointer_size)} count={count} | od -X"


class Devices:
    """The files by name. Errors are OSErrors with the `errno` the caller is to see."""

    def __init__(self, kernel: Exposed, on_error: Callable[[str], None] | None = None) -> None:
        """`on_error` is told, once for each kind, what lies behind an EIO: a cut dump, ..."""
        self._kernel = kernel
        self._on_error = on_error
        self._said: set[type[KvmError]] = set()
        self._texts: dict[str, bytes] = {}
        narrow = ("kmem32",) if kernel.pointer_size == 4 else ()
        self.names: tuple[str, ...] = ("kmem", *narrow, "mem", "symbols", "info.json")

    def size(self, name: str) -> int:
        """Bytes: of a device the largest a file can be, or as far as memory reaches.

        Raises OSError: ENOENT for no such file, EIO for symbols that cannot be read.
        """
        if name == "kmem":
            return DEVICE_SIZE
        if name == "kmem32" and name in self.names:
            return 1 << 32
        if name == "mem":
            return self._physical_size()
        return len(self._text(name))

    def read(self, name: str, size: int, offset: int) -> bytes:
        """`size` bytes of a device at `offset`, all or none; of a text what there is.

        Raises OSError: EFAULT for a page that is not there, ENODEV for `mem` without physical
        memory, ENOENT, EIO.
        """
        if name in ("symbols", "info.json"):
            return self._text(name)[offset : offset + size]
        memory, address = self._place(name, offset)
        return self._bytes(memory, address, size, name)

    def write(self, name: str, data: bytes, offset: int) -> int:
        """Always refused, as by the article's kext: raises OSError ENOTSUP."""
        raise _error(errno.ENOTSUP, name)

    def xattr(self, name: str, attribute: str, room: int = 0) -> bytes:
        """The value of ``user.kvm.HEXADDRESS.LENGTH``: memory at a full address, up to 64 KiB.

        `room` is what the caller has space for, in bytes; 0 asks for the length, and gets the
        value. Raises OSError: ENODATA for another attribute, E2BIG over 64 KiB, ERANGE when `room`
        is too small, and as `read`.
        """
        found = _XATTR.fullmatch(attribute)
        if found is None or name not in self.names or name in ("symbols", "info.json"):
            raise _error(errno.ENODATA, name)
        address, size = int(found[1], 16), int(found[2])
        if size > XATTR_LIMIT:
            raise _error(errno.E2BIG, name)
        if 0 < room < size:
            raise _error(errno.ERANGE, name)
        memory = self._kernel.physical if name == "mem" else self._kernel.memory
        if memory is None:
            raise _error(errno.ENODEV, name)
        return self._bytes(memory, address, size, name)

    def _place(self, name: str, offset: int) -> tuple[Memory, int]:
        if name == "mem":
            if self._kernel.physical is None:
                raise _error(errno.ENODEV, name)
            return self._kernel.physical, offset
        if name not in self.names:
            raise _error(errno.ENOENT, name)
        limit = TOP_BIT if self._kernel.pointer_size == 8 else 1 << 32
        if not 0 <= offset < limit:
            raise _error(errno.EFAULT, name)
        return self._kernel.memory, offset | TOP_BIT if limit == TOP_BIT else offset

    def _bytes(self, memory: Memory, address: int, size: int, name: str) -> bytes:
        if size == 0:
            return b""
        try:
            return memory.read(address, size)
        except FaultError as fault:
            raise _error(errno.EFAULT, name) from fault
        except KvmError as error:
            self._broken(error, name)

    def _broken(self, error: KvmError, name: str) -> NoReturn:
        if type(error) not in self._said and self._on_error is not None:
            self._said.add(type(error))
            self._on_error(str(error))
        raise _error(errno.EIO, name) from error

    def _physical_size(self) -> int:
        regions = () if self._kernel.physical is None else self._kernel.physical.regions()
        end = max((region.start + region.size for region in regions), default=0)
        # a live target that does not say what it has: no end is known
        return min(end, DEVICE_SIZE) if end or self._kernel.physical is None else DEVICE_SIZE

    def _text(self, name: str) -> bytes:
        if name not in self._texts:
            try:
                if name == "symbols":
                    self._texts[name] = self._symbols()
                elif name == "info.json":
                    self._texts[name] = self._info()
                else:
                    raise _error(errno.ENOENT, name)
            except KvmError as error:
                self._broken(error, name)
        return self._texts[name]

    def _symbols(self) -> bytes:
        kernel = self._kernel
        width = f"0{kernel.pointer_size * 2}x"
        lines = []
        for name, address, n_type, n_sect, n_desc, n_value in sorted(
            kernel.symbols, key=lambda symbol: (symbol.address, symbol.name)
        ):
            entry = Nlist("", n_type, n_sect, n_desc, n_value, 0)
            letter = type_letter(entry, kernel.sections)
            shown = name if name.isprintable() else name.encode("unicode_escape").decode("ascii")
            lines.append(f"{address:{width}} {letter} {shown}\n")
        return "".join(lines).encode()

    def _info(self) -> bytes:
        import json

        kernel = self._kernel
        physical = kernel.physical is not None
        wide = kernel.pointer_size == 8
        content = {
            **kernel.facts,
            "pointer_size": kernel.pointer_size,
            "byteorder": "little" if kernel.byteorder == "<" else "big",
            "kmem_offset": "address & 0x7fffffffffffffff" if wide else "address",
            "mem_offset": "address" if physical else None,
            "mem_size": self._physical_size() if physical else None,
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)
