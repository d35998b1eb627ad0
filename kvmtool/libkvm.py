"""libkvm in C's shape: the names, arguments, return values and error texts of kvm(3).

::

    from kvmtool.libkvm import *

    kd = kvm_open("mach_kernel", "core", None, O_RDONLY, "prog")
    nl = [nlist("_allproc"), nlist(None)]
    if kvm_nlist(kd, nl) == 0:
        first = kvm_read(kd, nl[0].n_value, 8)

What C returns stands for itself, but for three things: a buffer to be filled is returned instead,
None is what C calls NULL or, in place of a buffer, -1; a count beside a pointer makes a pair. A
kernel of any machine is read on any host, so nothing is cut to the host's word.

Errors are C's: "hard" ones go to stderr as ``errstr: message`` when `kvm_open` was given an errstr,
else, and "soft" ones always, into the handle for `kvm_geterr`, where the last one stays. All state
is the handle's. Only dead kernels so far. Source: kvm(3) and lib/libkvm of 4.4BSD and FreeBSD.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from kvmtool import kvm as handle
from kvmtool.errors import FaultError, KvmError, UnsupportedError
from kvmtool.libkvm_types import (
    N_DATA,
    O_RDONLY,
    O_RDWR,
    O_WRONLY,
    Errbuf,
    kvm_page,
    kvm_t,
    message_of,
    nlist,
    opened,
)
from kvmtool.memory import RunMemory
from kvmtool.nlist import N_EXT
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.args import limited
from kvmtool.xnu.getprocs import (
    KERN_PROC_ALL,
    KERN_PROC_PGRP,
    KERN_PROC_PID,
    KERN_PROC_RUID,
    KERN_PROC_SESSION,
    KERN_PROC_TTY,
    KERN_PROC_UID,
)
from kvmtool.xnu.queues import Report
from kvmtool.xnu.space import find_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmtool.memory import Memory
    from kvmtool.symbols import Symbol
    from kvmtool.xnu.kinfo import KinfoProc

__all__ = [
    "KERN_PROC_ALL",
    "KERN_PROC_PGRP",
    "KERN_PROC_PID",
    "KERN_PROC_RUID",
    "KERN_PROC_SESSION",
    "KERN_PROC_TTY",
    "KERN_PROC_UID",
    "N_DATA",
    "N_EXT",
    "O_RDONLY",
    "O_RDWR",
    "O_WRONLY",
    "Errbuf",
    "kvm_close",
    "kvm_getargv",
    "kvm_getenvv",
    "kvm_geterr",
    "kvm_getloadavg",
    "kvm_getprocs",
    "kvm_kerndisp",
    "kvm_native",
    "kvm_nlist",
    "kvm_nlist2",
    "kvm_open",
    "kvm_open2",
    "kvm_openfiles",
    "kvm_page",
    "kvm_read",
    "kvm_read2",
    "kvm_t",
    "kvm_walk_pages",
    "kvm_write",
    "nlist",
]

MAXPATHLEN = 1024  # bsd/sys/param.h
PAGE_SIZE = 4096
_NAME_LIMIT = 4096
_NO_CORE = "/dev/null"


# opening and closing


def kvm_open(
    execfile: str | None,
    corefile: str | None,
    swapfile: str | None,
    flags: int,
    errstr: str | None,
) -> kvm_t | None:
    """Open a dead kernel; None on failure.

    `execfile` None is the kernel inside the core, `corefile` "/dev/null" the kernel's file alone;
    `swapfile` is not used. `errstr` is the program's name for messages on stderr, None for silence.
    """
    return _open(kvm_t(errstr, None), execfile, corefile, flags, None)


def kvm_openfiles(
    execfile: str | None,
    corefile: str | None,
    swapfile: str | None,
    flags: int,
    errbuf: Errbuf | None,
) -> kvm_t | None:
    """As `kvm_open`, but a failure's message goes into `errbuf`, untouched otherwise."""
    return _open(kvm_t(None, None), execfile, corefile, flags, errbuf)


def kvm_open2(
    execfile: str | None,
    corefile: str | None,
    flags: int,
    errbuf: Errbuf | None,
    resolver: Callable[[str], int | None] | None,
) -> kvm_t | None:
    """As `kvm_openfiles`. `resolver` gives the address of a name as it runs, None if unknown."""
    return _open(kvm_t(None, resolver), execfile, corefile, flags, errbuf)


def _open(
    kd: kvm_t, execfile: str | None, corefile: str | None, flags: int, errbuf: Errbuf | None
) -> kvm_t | None:
    try:
        kd.kvm = _open_files(execfile, corefile, flags)
    except (KvmError, OSError) as error:
        kd.hard(error)
        if errbuf is not None:
            errbuf.text = kd.error
        return None
    return kd


def _open_files(execfile: str | None, corefile: str | None, flags: int) -> handle.Kvm:
    """In C's order: the arguments, the core, the kernel."""
    if execfile is not None and len(os.fsencode(execfile)) >= MAXPATHLEN:
        raise KvmError("exec file name too long")
    if flags & ~O_RDWR:
        raise KvmError("bad flags arg")
    if corefile is None:
        raise KvmError("/dev/mem: live kernels are not supported, name a core")
    if corefile == _NO_CORE:
        return handle.open(execfile)
    status = os.stat(corefile)
    if stat.S_ISCHR(status.st_mode):
        raise KvmError(f"{corefile}: not physical memory device")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise KvmError(f"{corefile}: empty file: Invalid argument")
    return handle.open(execfile, corefile)


def kvm_close(kd: kvm_t | None) -> int:
    """0; -1 for None (C's errno is then EINVAL) and for a handle that is closed."""
    if kd is None or kd.kvm is None:
        return -1
    kd.kvm.close()
    kd.kvm = None
    return 0


def kvm_geterr(kd: kvm_t | None) -> str:
    """The last error kept, which no success clears; "" for none and for None."""
    return "" if kd is None else kd.error


# symbols


def kvm_nlist(kd: kvm_t, nl: Sequence[nlist]) -> int:
    """Fill in the entries up to one whose name is None or empty, or the end.

    Returns how many were not found, theirs being zero throughout (a found one may be 0 too: look at
    n_type); -1 when the symbol table cannot be read or a name is longer than 4096 bytes. `_name`
    finds `name` and the other way round, if there is none of the exact name.
    """
    entries = []
    for entry in nl:
        if not entry.n_name:
            break
        entry.n_type = entry.n_sect = entry.n_desc = entry.n_value = 0
        entries.append((entry, entry.n_name))
    try:
        found = [_look_up(kd, name) for _, name in entries]
        stripped = not len(opened(kd).symbols)
    except (KvmError, OSError) as error:
        kd.hard(error)
        return -1
    for (entry, _), symbol in zip(entries, found, strict=True):
        if symbol is not None:
            entry.n_type, entry.n_value = symbol.n_type, symbol.address
            entry.n_sect, entry.n_desc = symbol.n_sect, symbol.n_desc
    misses = found.count(None)
    if misses and stripped and kd.resolver is None:
        kd.soft(opened(kd).symbols.hint or "the kernel has no symbol table (is it stripped?)")
    return misses


def _look_up(kd: kvm_t, name: str) -> Symbol | None:
    if len(name.encode("utf-8", "surrogateescape")) > _NAME_LIMIT:
        raise KvmError("symbol too large")
    if kd.resolver is None:
        return opened(kd).symbols.get(name)
    from kvmtool.symbols import Symbol

    value = kd.resolver(name)
    return None if value is None else Symbol(name, value, N_DATA | N_EXT, 0, 0, value)


def kvm_nlist2(kd: kvm_t, nl: Sequence[nlist]) -> int:
    """The same as `kvm_nlist`: no address is ever too wide."""
    return kvm_nlist(kd, nl)


# memory


def kvm_read(kd: kvm_t, kva: int, nbytes: int) -> bytes | None:
    """Up to `nbytes` at `kva`: what there is up to the first address that cannot be read.

    None when there is nothing at `kva` itself, b"" when the core should hold it but is cut off; why
    is left for `kvm_geterr`, for a short read too. No bytes can be read anywhere.
    """
    if nbytes < 0:
        kd.soft(f"invalid length ({nbytes})")
        return None
    try:
        kvm = opened(kd)
        if kva < 0:
            kva += 1 << 8 * kvm.arch.pointer_size  # an address C takes for a signed number
        try:
            return kvm.read(kva, nbytes)
        except FaultError as fault:
            prefix = kvm.read(kva, fault.address - kva)
            short = "short read: " if prefix or fault.reason == "absent" else ""
            kd.soft(f"{short}invalid address ({fault.address:#x}): {fault.reason}")
            return prefix if short else None
    except (KvmError, OSError) as error:
        kd.soft(message_of(error))
        return None


def kvm_read2(kd: kvm_t, kva: int, nbytes: int) -> bytes | None:
    """The same as `kvm_read`: no address is ever too wide."""
    return kvm_read(kd, kva, nbytes)


def kvm_write(kd: kvm_t, kva: int, data: bytes) -> int:
    """-1, even for no bytes: a dead kernel is not written to."""
    try:
        opened(kd).write(kva, data)
    except (KvmError, OSError) as error:
        kd.hard(error)
        return -1
    return len(data)


def kvm_kerndisp(kd: kvm_t) -> int:
    """Where the kernel runs minus where it was linked; 0 also if that is unknown (see `slide`)."""
    try:
        return kd.slide or 0
    except (KvmError, OSError) as error:
        kd.hard(error)
        return 0


def kvm_native(kd: kvm_t) -> int:
    """1 if the kernel is one for this host's machine, else 0."""
    machine = {"aarch64": "arm64", "i686": "i386", "amd64": "x86_64"}
    host = os.uname().machine.lower()
    return int(kd.kvm is not None and kd.kvm.arch.layouts == machine.get(host, host))


def kvm_walk_pages(kd: kvm_t, callback: Callable[[kvm_page, Any], Any], closure: Any = None) -> int:
    """Call `callback(page, closure)` for every 4 KiB page of the core, by address.

    Returns 1 when all were seen, 0 when there is no core or the callback returned 0 (False, None).
    """
    kvm = kd.kvm
    if kvm is None or kvm.dump is None:
        kd.hard(KvmError("there is no core to walk"))
        return 0
    return int(all(callback(page, closure) for page in _pages(kvm)))


def _pages(kvm: handle.Kvm) -> Iterator[kvm_page]:
    for start, size, offset in _spans(kvm.memory):
        at, end = start, start + size
        while at < end:
            stop = min(at - at % PAGE_SIZE + PAGE_SIZE, end)
            where = -1 if offset is None else offset + at - start
            yield kvm_page(2, None, at, 0, None, where, stop - at)
            at = stop


def _spans(memory: Memory) -> Iterator[tuple[int, int, int | None]]:
    """All readable memory as (address, size, file offset); None where no one file holds it."""
    for region in memory.regions():
        if isinstance(memory, RunMemory):
            yield from memory.spans(region.start, region.size)
        else:
            yield region.start, region.size, None


# processes


def kvm_getprocs(kd: kvm_t, op: int, arg: int) -> tuple[list[KinfoProc] | None, int]:
    """The processes that `op` (KERN_PROC_*) and `arg` select, and their number; (None, 0) on error.

    One whose memory is damaged has `Unreadable` fields. When a list is torn, whatever can be found
    by other ways is there all the same, and `kvm_geterr` says where the list stopped.
    """
    report = Report()
    try:
        records = opened(kd).getprocs(op, arg, report)
    except (KvmError, OSError) as error:
        kd.hard(error)
        return None, 0
    if report.stops:
        kd.soft("; ".join(report.stops))
    return records, len(records)


def kvm_getargv(kd: kvm_t, p: KinfoProc, nchr: int) -> list[bytes] | None:
    """The arguments of the process; `nchr` bytes of them at most, NULs included (0: all).

    None where its memory does not hold them, as in a kernel's core; `kvm_geterr` says why. As many
    as could be read come back if not all could, as from a `kvm_getargv` that is cut short.
    """
    return _strings(kd, p, nchr, "argv")


def kvm_getenvv(kd: kvm_t, p: KinfoProc, nchr: int) -> list[bytes] | None:
    """The environment of the process; as `kvm_getargv`."""
    return _strings(kd, p, nchr, "env")


def _strings(kd: kvm_t, p: KinfoProc, nchr: int, which: str) -> list[bytes] | None:
    if nchr < 0:
        kd.hard(KvmError(f"invalid number of characters ({nchr})"))
        return None
    pid = p.kp_proc.p_pid
    try:
        kvm = opened(kd)
        if kvm.physical is None:
            raise UnsupportedError("cannot read user space from dead kernel")
        proc = find_process(kvm.procs(), pid)
        found = getattr(kvm.arguments(proc), which)
    except (KvmError, OSError) as error:
        kd.hard(error)
        return None
    if isinstance(found, Unreadable):
        kd.hard(KvmError(f"cannot read user space of process {pid}: {found.reason}"))
        return None
    strings = limited(found, nchr)
    return strings or None


def kvm_getloadavg(kd: kvm_t, nelem: int) -> list[float] | None:
    """The first `nelem` load averages, at most three; None on error."""
    if nelem < 0:
        kd.hard(KvmError(f"invalid number of load averages ({nelem})"))
        return None
    try:
        return list(opened(kd).loadavg()[:nelem])
    except (KvmError, OSError) as error:
        kd.hard(error)
        return None
