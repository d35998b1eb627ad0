"""What C's <kvm.h>, <nlist.h> and <fcntl.h> declare for `libkvm`: structures, the handle, numbers.

`kvmtool.libkvm` has all of it under the same names; take it from there. Source: kvm(3) and
lib/libkvm of 4.4BSD and FreeBSD.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvmtool.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtool.handle import Kvm

O_RDONLY, O_WRONLY, O_RDWR = 0, 1, 2  # bsd/sys/fcntl.h
N_DATA = 0x6  # bsd/sys/nlist.h, what FreeBSD calls every symbol a resolver knows
_POSIX2_LINE_MAX = 2048


class Errbuf:
    """`char errbuf[_POSIX2_LINE_MAX]`: a failed open leaves its message in `text`."""

    def __init__(self) -> None:
        self.text = ""

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class nlist:
    """`struct nlist`, and FreeBSD's `struct kvm_nlist`: `n_value` is the address as it runs."""

    n_name: str | None
    n_type: int = 0
    n_sect: int = 0
    n_desc: int = 0
    n_value: int = 0


class kvm_page(NamedTuple):
    """`struct kvm_page`. A core of virtual memory tells neither `kp_paddr` nor `kp_prot`: None."""

    kp_version: int
    kp_paddr: int | None
    kp_kmap_vaddr: int
    kp_dmap_vaddr: int
    kp_prot: int | None
    kp_offset: int
    kp_len: int


class kvm_t:
    """An open kernel: `kvm` is the `Kvm` behind it, None once it is closed."""

    def __init__(self, program: str | None, resolver: Callable[[str], int | None] | None) -> None:
        """Use `kvm_open`, `kvm_openfiles` or `kvm_open2`."""
        self.kvm: Kvm | None = None
        self._program, self.resolver = program, resolver
        self.error = ""

    @property
    def slide(self) -> int | None:
        """As `kvm_kerndisp`, but None where it is unknown."""
        slide = opened(self).kerndisp
        return slide if slide is None or slide < 1 << 63 else slide - (1 << 64)

    def soft(self, message: str) -> None:
        """An error a debugger makes all day: kept, never printed."""
        self.error = message[: _POSIX2_LINE_MAX - 1]

    def hard(self, error: KvmError | OSError) -> None:
        """Any other error: printed instead when the program gave its name."""
        message = message_of(error)
        if self._program is None:
            self.soft(message)
            return
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        print(f"{self._program}: {shown}", file=sys.stderr)


def message_of(error: KvmError | OSError) -> str:
    """The text of an error, as perror(3) begins it: with the file."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def opened(kd: kvm_t) -> Kvm:
    """The kernel behind a handle. Raises `KvmError` if it is closed."""
    if kd.kvm is None:
        raise KvmError("the handle is closed")
    return kd.kvm
