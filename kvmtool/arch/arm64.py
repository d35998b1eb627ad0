"""arm64, arm64e and 32-bit arm. Source: osfmk/mach/arm/_structs.h and thread_status.h, xnu-8796;
pointer authentication: Arm ARM, AddPAC and Strip; osfmk/arm64/proc_reg.h.
"""

from __future__ import annotations

from kvmtool.arch import Arch, Flavor, whole

_VA_SELECT = 1 << 55  # which half of the address space, also in a signed or tagged pointer
_ALL = (1 << 64) - 1

ARM_THREAD_STATE64 = Flavor(
    "ARM_THREAD_STATE64",
    (
        *((f"x{n}", 8) for n in range(29)),
        *((name, 8) for name in ("fp", "lr", "sp", "pc")),
        ("cpsr", 4),
        ("flags", 4),
    ),
)
ARM_THREAD_STATE = Flavor(
    "ARM_THREAD_STATE",
    (*((f"r{n}", 4) for n in range(13)), *((name, 4) for name in ("sp", "lr", "pc", "cpsr"))),
)


def strip_pac(pointer: int, bits: int) -> int:
    """The address in a signed or tagged pointer: the low `bits` bits, extended from bit 55."""
    low = (1 << bits) - 1
    return pointer | (_ALL ^ low) if pointer & _VA_SELECT else pointer & low


ARM64 = Arch(
    name="arm64",
    layouts="arm64",
    pointer_size=8,
    byteorder="<",
    page_size=16384,
    flavors={6: ARM_THREAD_STATE64},
    pc="pc",
    sp="sp",
    fp="fp",
    strip=strip_pac,
)
ARM64E = ARM64._replace(name="arm64e")
ARM = Arch(
    name="arm",
    layouts="arm",
    pointer_size=4,
    byteorder="<",
    page_size=4096,
    flavors={1: ARM_THREAD_STATE},
    pc="pc",
    sp="sp",
    fp="r7",
    strip=whole,
)
