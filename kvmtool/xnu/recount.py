"""Processor time from macOS 13 on: counted by CPU in tasks, by kind of CPU in threads.

Source: osfmk/kern/recount.h and recount.c, xnu-8792..11417: struct recount_track, recount_usage,
recount_snap; recount_topo_count, recount_task_times, recount_thread_times. A usage was {user,
system, ...} up to xnu-10002; since then it is one struct recount_metrics {time, instructions,
cycles} for each level: kernel, user, and secure where the kernel has an SPTM, which counts as
system.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmtool.errors import FaultError
from kvmtool.target import offset_of
from kvmtool.unreadable import Unreadable
from kvmtool.xnu.percpu import cpu_count

if TYPE_CHECKING:
    from kvmtool.target import Target
    from kvmtool.types.model import TypeTable

_HEAD = 8  # bytes before a track's usage: rt_sync, and a word of padding that is never written
_METRICS = 24  # sizeof(struct recount_metrics) of every kernel whose metrics are by level
_USER = 1  # recount_level_t: RCT_LVL_USER
_AMP = ("_pcore_node", "_pset_node1")  # osfmk/kern/processor.c: only where there are two kinds


class Track(NamedTuple):
    """Where a struct recount_track keeps its times: byte offsets of unsigned 64-bit numbers."""

    size: int
    user: int
    system: tuple[int, ...]


class Recount:
    """Reads the times of one kernel's tasks and threads."""

    def __init__(self, target: Target) -> None:
        """Finds out what a track looks like, and how many of them a task and a thread have."""
        self._target = target
        self.track = _known(target.types) or _deduced(target)
        self._numbers = Struct(f"{target.arch.byteorder}Q")
        self._words = Struct(f"{target.arch.byteorder}2I")
        self._kinds = 2 if any(target.symbols.get(name) is not None for name in _AMP) else 1
        self._cpus: Any = cpu_count(target) if self.track is not None else None

    def thread(self, tracks: Any) -> tuple[Any, Any]:
        """(user, system) time in ticks, of the tracks that thread.th_recount.rth_lifetime leads to.

        Each is `Unreadable` where memory is missing or holds no tracks, None where there are none
        or it is not known what they look like. Never raises `FaultError`.
        """
        return self._sum(tracks, self._kinds)

    def task(self, tracks: Any) -> tuple[Any, Any]:
        """As `thread`, of task.tk_recount.rtk_lifetime: all threads, ended and living."""
        return self._sum(tracks, self._cpus)

    def _sum(self, tracks: Any, count: Any) -> tuple[Any, Any]:
        for value in (tracks, count):
            if isinstance(value, Unreadable):
                return value, value
        if self.track is None or count is None or not tracks:
            return None, None
        try:
            data = self._target.memory.read(tracks, count * self.track.size)
        except FaultError as fault:
            lost = Unreadable.of(fault)
            return lost, lost
        return self._times(data, tracks)

    def _times(self, data: bytes, tracks: int) -> tuple[Any, Any]:
        user = system = 0
        track = self.track
        assert track is not None
        for at in range(0, len(data), track.size):
            if all(self._words.unpack_from(data, at)):
                other = Unreadable(f"no recount_track at {tracks + at:#x}: its padding is not zero")
                return other, other
            user += self._numbers.unpack_from(data, at + track.user)[0]
            system += sum(self._numbers.unpack_from(data, at + each)[0] for each in track.system)
        return user, system


def _known(types: TypeTable) -> Track | None:
    """The track of the kernel's own types."""
    usage = offset_of(types, "recount_track", "rt_usage")
    if usage is None:
        return None
    size = types.size("recount_track")
    user = offset_of(types, "recount_usage", "ru_user_time_mach")
    system = offset_of(types, "recount_usage", "ru_system_time_mach")
    if user is not None and system is not None:
        return Track(size, usage + user, (usage + system,))
    first = offset_of(types, "recount_usage", "ru_metrics")
    time = offset_of(types, "recount_metrics", "rm_time_mach")
    if first is None or time is None:
        return None
    end = offset_of(types, "recount_usage", "ru_energy_nj")
    end = types.size("recount_usage") if end is None else end
    step = types.size("recount_metrics")
    return _by_level(size, usage + first + time, step, (end - first) // step)


def _deduced(target: Target) -> Track | None:
    """The track of a built-in layout, which has the one in struct processor.

    Its size tells the two shapes apart: the older are of 16 to 40 bytes and their head, the newer
    of twice 24, and 8 more where energy is counted. The layouts are of machines without an SPTM.
    """
    types = target.types
    start = offset_of(types, "processor", "pr_recount.rpr_active")
    if start is None:
        return None
    members = types.struct("processor").members.values()
    end = min((m.offset for m in members if m.offset > start), default=0)
    size = end - start
    levels, rest = divmod(size - _HEAD, _METRICS)
    if levels > 1 and rest in (0, 8):
        if target.symbols.get("_SPTMArgs") is not None:
            levels, size = levels + 1, size + _METRICS
        return _by_level(size, _HEAD, _METRICS, levels)
    if size - _HEAD in range(16, 41, 8):
        return Track(size, _HEAD, (_HEAD + 8,))
    return None


def _by_level(size: int, first: int, step: int, levels: int) -> Track | None:
    if levels <= _USER:
        return None
    places = [first + level * step for level in range(levels)]
    return Track(size, places.pop(_USER), tuple(places))
