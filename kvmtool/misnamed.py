"""A kernel's file and a memory that were taken for one another: what to say of them."""

from __future__ import annotations

from typing import Literal

from kvmtool import macho
from kvmtool.errors import FormatError, KvmError, UnknownFormatError

_FAT, _SLICES = b"\xca\xfe\xba\xbe", 32
_PACKED = (b"complzss", b"complzvn", b"bvx")
_IMAGE4 = (b"IM4P", b"IMG4")  # inside the first bytes of DER
_HEAD = 64

Kind = Literal["kernel", "memory", "debug file"]


def kind_of(path: str) -> tuple[Kind, str] | None:
    """What the file at `path` is by its first bytes, and in words; None for neither, or no file."""
    from kvmtool import formats
    from kvmtool.source import open_source

    try:
        source = open_source(path)
    except (OSError, KvmError):
        return None
    try:
        found: tuple[Kind, str] | None = "memory", f"{formats.identify(source).name} memory"
    except UnknownFormatError:
        head = source.read_at(0, min(_HEAD, source.size))
        found = ("kernel", "a packed or fat file") if _is_packed(head) else _mach_o(head)
    except KvmError:
        found = None
    finally:
        source.close()
    return found


def _is_packed(head: bytes) -> bool:
    """Whether a file begins as those that kernels are packed in."""
    if head.startswith(_FAT):  # Java's classes begin so, too: their version stands there
        return 0 < int.from_bytes(head[4:8], "big") <= _SLICES
    return head.startswith(_PACKED) or any(name in head for name in _IMAGE4)


def _mach_o(head: bytes) -> tuple[Kind, str] | None:
    """As `kind_of`, of a Mach-O file that is no core."""
    if len(head) < 16 or not macho.is_macho(head):
        return None
    order = "little" if macho.MAGICS[head[:4]][0] == "<" else "big"
    filetype = int.from_bytes(head[12:16], order)  # type: ignore[arg-type]
    if filetype == macho.MH_DSYM:
        return "debug file", "a dSYM's file"
    if filetype in (macho.MH_EXECUTE, macho.MH_FILESET):
        return "kernel", "a kernel's file"
    return None


def misnamed(kernel: str | None, core: str | None) -> FormatError | None:
    """The error that tells what was named with -N or -M and belongs elsewhere; None if nothing."""
    first = None if kernel is None else kind_of(kernel)
    second = None if core is None else kind_of(core)
    if first and second and (first[0], second[0]) == ("memory", "kernel"):
        both = f"-N and -M are swapped: this is {first[1]}, and {core} {second[1]}"
        return FormatError(kernel or "", None, both)
    if first and first[0] == "memory":
        message = f"this is {first[1]}, expected a kernel's file: name it with -M"
        return FormatError(kernel or "", None, message)
    if second and second[0] != "memory":
        option = "-N" if second[0] == "kernel" else "--types"
        message = f"this is {second[1]}, expected memory: name it with {option}"
        return FormatError(core or "", None, message)
    return None
