"""Per-CPU memory of the zone allocator: one copy of a value for each processor, a page apart.

Source: osfmk/kern/zalloc.h (__zpercpu, zpercpu_get_cpu), osfmk/kern/percpu.h, xnu-7195..11417. On
DEVELOPMENT and DEBUG kernels such pointers are mangled, so that nobody follows one by mistake: bit
63 is cleared up to xnu-8020, the bits 0xc0c0000000000000 from xnu-8792 to 10063. Kernel addresses
have all of them set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtool.unreadable import Unreadable, guarded
from kvmtool.xnu import named
from kvmtool.xnu.host import page_size

if TYPE_CHECKING:
    from kvmtool.target import Target

_MANGLED = 0xC0C0000000000000
_CPUS = 256  # MAX_CPUS is 64 or less in every release


def cpu_count(target: Target) -> Any:
    """How many copies there are: zpercpu_early_count, else the most CPUs that may come up."""
    for name in ("_zpercpu_early_count", "_processor_count", "_real_ncpus"):
        found = named.number(target, name)
        if found is not None:
            if isinstance(found, int) and not 0 < found <= _CPUS:
                return Unreadable(f"{name[1:]} is {found}, expected at most {_CPUS}")
            return found
    return None


def copies(target: Target, pointer: int) -> list[int] | Unreadable | None:
    """Addresses of every CPU's copy of what the per-CPU `pointer` stands for.

    None where the number of CPUs is not known, `Unreadable` where it cannot be read.
    """
    count, page = cpu_count(target), page_size(target)
    for value in (count, page):
        if value is None or isinstance(value, Unreadable):
            return value
    start = target.strip(pointer | _MANGLED)
    return [start + cpu * page for cpu in range(count)]


def counter(target: Target, name: str) -> Any:
    """A scalable counter (osfmk/kern/counter.h): the sum of every CPU's 64-bit number."""
    pointer = named.word(target, name)
    if not isinstance(pointer, int) or not pointer:
        return pointer
    places = copies(target, pointer)
    if not isinstance(places, list):
        return places
    return guarded(lambda: sum(target.unsigned(at, "Q") for at in places) & (1 << 64) - 1)
