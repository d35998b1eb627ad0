"""PowerPC. Source: osfmk/mach/ppc/_types.h, xnu-792."""

from __future__ import annotations

from kvmtool.arch import Arch, Flavor, whole


def _state(size: int) -> tuple[tuple[str, int], ...]:
    names = ("srr0", "srr1", *(f"r{n}" for n in range(32)))
    return (
        *((name, size) for name in names),
        ("cr", 4),
        *((name, size) for name in ("xer", "lr", "ctr", "mq" if size == 4 else "")),
        ("vrsave", 4),
    )


PPC_THREAD_STATE = Flavor("PPC_THREAD_STATE", _state(4))
PPC_THREAD_STATE64 = Flavor(
    "PPC_THREAD_STATE64", tuple((name, size) for name, size in _state(8) if name)
)

PPC = Arch(
    name="ppc",
    layouts="ppc",
    pointer_size=4,
    byteorder=">",
    page_size=4096,
    flavors={1: PPC_THREAD_STATE, 5: PPC_THREAD_STATE64},
    pc="srr0",
    sp="r1",
    fp="r1",
    strip=whole,
)
PPC64 = PPC._replace(name="ppc64", pointer_size=8)
