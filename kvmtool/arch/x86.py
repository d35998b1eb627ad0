"""i386 and x86_64. Source: osfmk/mach/i386/thread_status.h and _structs.h, xnu-2422."""

from __future__ import annotations

from kvmtool.arch import Arch, Flavor, whole


def _of(size: int, names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name in names.split())


X86_THREAD_STATE32 = Flavor(
    "x86_THREAD_STATE32",
    _of(4, "eax ebx ecx edx edi esi ebp esp ss eflags eip cs ds es fs gs"),
)
X86_THREAD_STATE64 = Flavor(
    "x86_THREAD_STATE64",
    _of(8, "rax rbx rcx rdx rdi rsi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags cs fs gs"),
)

I386 = Arch(
    name="i386",
    layouts="i386",
    pointer_size=4,
    byteorder="<",
    page_size=4096,
    flavors={1: X86_THREAD_STATE32},
    pc="eip",
    sp="esp",
    fp="ebp",
    strip=whole,
)
X86_64 = Arch(
    name="x86_64",
    layouts="x86_64",
    pointer_size=8,
    byteorder="<",
    page_size=4096,
    flavors={4: X86_THREAD_STATE64},
    pc="rip",
    sp="rsp",
    fp="rbp",
    strip=whole,
)
