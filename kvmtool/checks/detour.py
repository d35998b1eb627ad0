"""What was written over code: a way to somewhere else, a breakpoint, a probe of dtrace's.

Source: Intel SDM vol. 2; Arm ARM C6.2; bsd/dev/i386/fbt_x86.c, bsd/dev/arm64/fbt_arm.c and sdt.c
for what dtrace writes over which instructions, xnu-1228..11417.
"""

from __future__ import annotations

_INT3 = 0xCC
_LOCK = 0xF0  # FBT_PATCHVAL and SDT_PATCHVAL on x86: a prefix that makes the instruction invalid
_ARM_PROBE = 0xE7EEEE7E  # FBT_PATCHVAL and SDT_PATCHVAL on arm64
_ARM_BRK, _ARM_BRK_MASK = 0xD4200000, 0xFFE0001F
_ARM_B, _ARM_BL, _ARM_B_MASK = 0x14000000, 0x94000000, 0xFC000000
_ARM_LITERAL, _ARM_LITERAL_MASK = 0x58000000, 0xFF000000  # ldr Xt, label
_ARM_BR, _ARM_BR_MASK = 0xD61F0000, 0xFFFFFC1F
_MASK = (1 << 64) - 1
# what stood where a probe was made: push's mov %rsp,%rbp (or %esp,%ebp), pop %rbp, leave, nop
_PROBED = (b"\x48\x89\xe5", b"\x89\xe5", b"\x8b\xec", b"\x5d", b"\xc9", b"\x90", b"\x55")


def is_probe(arch: str, was: bytes, now: bytes, size: int) -> bool:
    """Whether what dtrace writes for probes is all that differs in the first `size` bytes.

    Both go on behind those; of arm64 they begin with a whole instruction.
    """
    if arch in ("i386", "x86_64"):
        changed = [at for at in range(size) if was[at] != now[at]]
        return all(now[at] == _LOCK and was[at:].startswith(_PROBED) for at in changed)
    if not arch.startswith("arm64"):
        return False
    words = [(_word(was, at), _word(now, at)) for at in range(0, size, 4)]
    return all(old == new or (new == _ARM_PROBE and _arm_probed(old)) for old, new in words)


def is_lock_probe(was: bytes, now: bytes) -> bool:
    """Whether a return was made to do nothing, as lockstat does (bsd/dev/dtrace/lockstat.c)."""
    return was[:1] == b"\xc3" and now[:1] == b"\x90" and was[1:] == now[1:]


def _arm_probed(word: int) -> bool:
    """add fp, sp, #…; ret; b; nop."""
    return (
        word & 0xFFC003FF == 0x910003FD
        or word in (0xD65F03C0, 0xD503201F)
        or word & _ARM_B_MASK == _ARM_B
    )


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def is_breakpoint(arch: str, now: bytes) -> bool:
    """Whether a debugger's breakpoint begins `now`."""
    if arch in ("i386", "x86_64"):
        return now[:1] == bytes([_INT3])
    return arch.startswith("arm64") and _word(now, 0) & _ARM_BRK_MASK == _ARM_BRK


def target_of(arch: str, code: bytes, address: int) -> int | None:
    """Where the instructions `code` at `address` go, if they only go elsewhere; None if not."""
    if arch == "x86_64":
        return _x86_64(code, address)
    if arch == "i386":
        return _relative(code, address, 0xFFFFFFFF)
    return _arm64(code, address) if arch.startswith("arm64") else None


def _relative(code: bytes, address: int, mask: int) -> int | None:
    """jmp or call with a distance; push of an address and ret."""
    if code[:1] in (b"\xe9", b"\xe8") and len(code) >= 5:
        return (address + 5 + int.from_bytes(code[1:5], "little", signed=True)) & mask
    if code[:1] == b"\x68" and code[5:6] == b"\xc3":
        return int.from_bytes(code[1:5], "little", signed=True) & mask
    return None


def _x86_64(code: bytes, address: int) -> int | None:
    # movabs $…,%rax; jmp *%rax (or push %rax; ret), the same with r8 to r15
    if code[:1] in (b"\x48", b"\x49") and len(code) >= 12 and 0xB8 <= code[1] <= 0xBF:
        value, register = int.from_bytes(code[2:10], "little"), code[1] - 0xB8
        jump = bytes([0xFF, 0xE0 + register])
        push = bytes([0x50 + register, 0xC3])
        rest = code[10:]
        if code[0] == 0x49 and rest[:1] == b"\x41":
            rest = rest[1:]
        return value if rest.startswith((jump, push)) else None
    if code[:6] == b"\xff\x25\x00\x00\x00\x00" and len(code) >= 14:  # jmp *0(%rip); the address
        return int.from_bytes(code[6:14], "little")
    return _relative(code, address, _MASK)


def _arm64(code: bytes, address: int) -> int | None:
    if len(code) < 4:
        return None
    word = int.from_bytes(code[:4], "little")
    if word & _ARM_B_MASK in (_ARM_B, _ARM_BL):
        distance = (word & 0x03FFFFFF) << 2
        return (address + (distance - (1 << 28) if distance >> 27 else distance)) & _MASK
    if word & _ARM_LITERAL_MASK == _ARM_LITERAL and len(code) >= 8:  # ldr Xt, label; br Xt
        at = ((word >> 5) & 0x7FFFF) << 2
        jump = int.from_bytes(code[4:8], "little")
        same = jump & _ARM_BR_MASK == _ARM_BR and (jump >> 5) & 31 == word & 31
        if same and len(code) >= at + 8:
            return int.from_bytes(code[at : at + 8], "little")
    return None
