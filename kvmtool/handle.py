"""`Kvm`, the handle: what an opened kernel answers. `kvm.open` makes one.

All state is the handle's; handles share nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmtool.errors import (
    FaultError,
    NotFoundError,
    UnsupportedError,
)
from kvmtool.handle_memory import Parts
from kvmtool.handle_types import TypedHandle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.kext_search import KextFile
    from kvmtool.kexts import Kext
    from kvmtool.memory import Memory
    from kvmtool.xnu.args import Arguments
    from kvmtool.xnu.call_tables import Places
    from kvmtool.xnu.kext import KextInfo
    from kvmtool.xnu.kinfo import KinfoProc
    from kvmtool.xnu.proc import Proc
    from kvmtool.xnu.queues import Report
    from kvmtool.xnu.syscalls import Call


__all__ = ["Kvm", "Parts"]


class Kvm(TypedHandle):
    """A kernel, live or dead: its symbols, its memory, its types, its processes.

    Made by `open`; a context manager. `MemoryHandle` has memory and symbols, `TypedHandle` types
    and objects; here is what stands in the kernel's memory.

    One handle may be asked from several threads at once: memory, symbols, types, expressions and
    all that is walked, of a dump or of a halted machine. An iterator belongs to the thread that
    made it, `close` comes after the last answer, and what warns of something warns the thread that
    met it first.
    """

    def _kexts_in_memory(self) -> Iterator[Kext]:
        """Those the kernel had loaded, with symbols from memory or from files beside the kernel."""
        from kvmtool.kext_search import with_files

        file = self._parts.file
        found = self._headers_in_memory()
        if file is None:
            yield from found
            return
        directory = os.path.dirname(os.path.abspath(file.path))
        for kext in with_files(found, directory, self.arch.name, self._kernel_address):
            if kext.path is not None and kext.image is not None:
                self._sources = (*self._sources, kext.image.source)
            yield kext

    def _headers_in_memory(self) -> Iterator[Kext]:
        from kvmtool.kexts import from_memory

        for kext in self.loaded_kexts():
            name, version = kext.name, kext.version
            if isinstance(name, str) and isinstance(kext.address, int) and kext.address:
                size = kext.size if isinstance(kext.size, int) else 0
                told = version if isinstance(version, str) else None
                found = from_memory(self.memory, name, told, kext.address, size)
                said = kext.uuid if isinstance(kext.uuid, bytes) else None
                yield found._replace(uuid=found.uuid or said)

    def kexts_beside(self) -> Iterator[KextFile]:
        """The kexts' files in the directory of the kernel's; whoever takes one closes its source.

        None of a kernel that has no file.
        """
        from kvmtool.kext_search import files_in

        file = self._parts.file
        if file is not None:
            yield from files_in(os.path.dirname(os.path.abspath(file.path)), self.arch.name)

    def loaded_kexts(self, report: Report | None = None) -> list[KextInfo]:
        """What kextstat lists of a dump; none of a kernel file, or without types for its machine.

        See `xnu.kext.kexts`.
        """
        from kvmtool.xnu.kext import kexts

        if self.dump is None or not len(self.symbols):
            return []
        try:
            target = self.nearest_target()
        except NotFoundError:  # there are no layouts for this kind of machine at all
            return []
        return kexts(target, report)

    def procs(self, report: Report | None = None) -> Iterator[Proc]:
        """Every process; what stopped or disagreed goes into `report`. See `xnu.proc.procs`."""
        from kvmtool.xnu.proc import procs

        return procs(self.verified_target(), report)

    def process(self, pid: int) -> Memory:
        """The address space of the process `pid`, from a dump of physical memory.

        Raises as `space_of`; `NotFoundError` when there is no such process.
        """
        from kvmtool.xnu.queues import Report
        from kvmtool.xnu.space import find_process

        report = Report()
        return self.space_of(find_process(self.procs(report), pid, report))

    def space_of(self, proc: Proc) -> Memory:
        """The address space of a process, from a dump of physical memory.

        Raises `UnsupportedError` when the dump holds the kernel's memory alone, or the process has
        no address space.
        """
        from kvmtool.way_in import process_memory
        from kvmtool.xnu import space

        if self.physical is None or self.way is None:
            raise UnsupportedError("a process's memory is in no dump of the kernel's memory alone")
        target = self.verified_target()
        root, known = space.table_root(target, proc), space.user_stack(target, proc)
        budget = getattr(self.memory, "budget", None)
        name = f"process {proc.pid}"
        return process_memory(self.physical, self.way, root, known, name, budget)

    def arguments(self, proc: Proc) -> Arguments:
        """What a process was started with, from its own memory. Never raises `FaultError`."""
        from kvmtool.unreadable import Unreadable
        from kvmtool.xnu.args import NOTHING, BlockReader, arguments

        if proc.zombie is True:
            return NOTHING
        block = BlockReader(self.verified_target()).read(proc.address)
        memory: Memory | Unreadable
        try:
            memory = self.space_of(proc)
        except (UnsupportedError, FaultError, NotFoundError) as error:
            memory = Unreadable(str(error))
        return arguments(block, memory)

    def getprocs(self, op: int = 0, arg: int = 0, report: Report | None = None) -> list[KinfoProc]:
        """The processes `op` (KERN_PROC_*) and `arg` select, as a live kernel answers sysctl."""
        from kvmtool.xnu.getprocs import getprocs

        return getprocs(self.verified_target(), op, arg, report)

    def syscalls(self) -> Iterator[Call]:
        """Every entry of sysent, of a kernel's file as well. See `xnu.syscalls.syscalls`."""
        from kvmtool.xnu.syscalls import syscalls

        return syscalls(self.built_target(), self.places())

    def traps(self) -> Iterator[Call]:
        """Every entry of mach_trap_table, of a kernel's file as well. See `xnu.syscalls.traps`."""
        from kvmtool.xnu.syscalls import traps

        return traps(self.built_target(), self.places())

    def places(self) -> Places:
        """Where the data of the kernel's image lies, and what tells code."""
        from kvmtool.xnu.call_tables import Places

        return Places(tuple(self.data_ranges()), lambda address: self.code_at(address).inside)

    def loadavg(self) -> tuple[float, float, float]:
        """The load averages over 1, 5 and 15 minutes. Raises `FaultError` or `NotFoundError`."""
        from kvmtool.xnu.load import loadavg

        return loadavg(self.arch, self.memory, self.symbols)
