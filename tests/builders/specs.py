"""What a test asks for: processes, kexts, the shape of a core. All have sensible defaults."""

from __future__ import annotations

from typing import NamedTuple

SIDL, SRUN, SSLEEP, SSTOP, SZOMB = 1, 2, 3, 4, 5  # <sys/proc.h> p_stat
P_CONTROLT, P_LP64, P_SYSTEM, P_EXEC = 0x2, 0x4, 0x200, 0x4000
TH_WAIT, TH_SUSP, TH_RUN, TH_UNINT = 1, 2, 4, 8  # osfmk/kern/thread.h
TF_64B = 0x3  # osfmk/kern/task.h: TF_64B_ADDR | TF_64B_DATA
TF_HASPROC = 0x00800000
MAXCOMLEN, MAXLOGNAME = 16, 255


class ProcSpec(NamedTuple):
    """One process. None means: as XNU would have it by default (see `complete`)."""

    pid: int
    comm: str
    ppid: int = 1
    pgid: int | None = None
    sid: int | None = None
    uid: int = 0
    gid: int = 0
    ruid: int | None = None
    svuid: int | None = None
    rgid: int | None = None
    svgid: int | None = None
    groups: tuple[int, ...] | None = None
    name: str | None = None
    login: str = "root"  # of the session: its leader's, or its first member's, counts
    tty: tuple[int, int] | None = None  # (major, minor) of the session's terminal, likewise
    stat: int = SRUN
    flag: int | None = None
    lflag: int = 0
    nice: int = 0
    start: tuple[int, int] = (1_146_500_000, 0)  # seconds since 1970, microseconds
    xstat: int = 0
    zombie: bool = False
    threads: tuple[int, ...] = (TH_WAIT,)  # the state of each
    suspend_count: int = 0

    def complete(self, wide: bool) -> ProcSpec:
        """The same with every None replaced: own group and session, real ids the effective ones."""
        pgid = self.pid if self.pgid is None else self.pgid
        flag = P_SYSTEM if self.pid == 0 else P_EXEC | (P_CONTROLT if self.tty else 0)
        return self._replace(
            pgid=pgid,
            sid=pgid if self.sid is None else self.sid,
            ruid=self.uid if self.ruid is None else self.ruid,
            svuid=self.uid if self.svuid is None else self.svuid,
            rgid=self.gid if self.rgid is None else self.rgid,
            svgid=self.gid if self.svgid is None else self.svgid,
            groups=(self.gid,) if self.groups is None else self.groups,
            name=self.comm if self.name is None else self.name,
            flag=flag | (P_LP64 if wide else 0) if self.flag is None else self.flag,
            stat=SZOMB if self.zombie else self.stat,
            threads=() if self.zombie else self.threads,
        )


KERNEL_TASK = ProcSpec(0, "kernel_task", ppid=0, threads=(TH_RUN, TH_WAIT | TH_UNINT, TH_WAIT))


def cut(text: str, limit: int) -> str:
    """What is left of `text` in char[limit + 1]."""
    return text.encode()[:limit].decode(errors="surrogateescape")


class KextSpec(NamedTuple):
    """One loaded kext, `size` bytes from `address` (in memory, slid) on; kmod_info lies inside."""

    name: str
    address: int
    size: int
    version: str = "1.0.0"
    uuid: bytes | None = None
    hdr_size: int = 0x1000
    references: tuple[str, ...] = ()
    image: bytes = b""  # its memory after hdr_size; a Mach-O header is made for the start


class CoreShape(NamedTuple):
    """What a core file looks like besides its memory; the defaults are an honest writer's.

    `notes`: any of "main bin spec", "main bin spec v2", "kern ver str", "addrable bits".
    `pages`: pages per heap segment at most. The rest are the traps of real writers: VA order not
    ascending (arm64), later segments that overlap the kernel's (10.4 to 10.6), a last segment that
    lies past the end of the file, more commands claimed than written.
    """

    notes: tuple[str, ...] = ()
    ident: bool = False
    pages: int = 16
    thread_first: bool = False
    cpus: int = 1
    unsorted: bool = False
    overlap: bool = False
    past_end: bool = False
    extra_ncmds: int = 0
    header: bool = True  # the kernel's own Mach-O header is in the dumped memory
