"""A type as C declares it, with the place of every member in front: what `type` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtool.types.ctype import DEPTH_LIMIT, Compound, CType, Enum, Typedef
from kvmtool.types.declare import declare
from kvmtool.types.outline import outline, summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtool.types.outline import Line

_INDENT = "    "


def declaration(ctype: CType, expand: bool = False) -> Iterator[str]:
    """The lines of `ctype`'s declaration; of a typedef's, then those of what it leads to.

    It is C but for "unknown", a member whose type is not known, and places are comments. Raises
    `KvmError` for damaged types.
    """
    found, name = ctype, ""
    for _ in range(DEPTH_LIMIT):
        if not isinstance(found, Typedef):
            break
        name, found = found.name, found.target
        if not _is_nameless(found):
            yield f"typedef {declare(found, name)};"
            name = ""
    if isinstance(found, Compound) and found.complete:
        yield from _structure(found, expand, name)
    elif isinstance(found, Enum) and found.size is not None:
        yield from _enum(found, name)
    elif isinstance(found, (Compound, Enum)):
        yield f"{declare(found)};  /* only declared in these types, not defined */"
    elif found is ctype:
        yield f"{declare(found)}  /* {_bytes(found.size)} */"
    else:
        yield f"/* {_bytes(found.size)} */"


def _is_nameless(ctype: CType) -> bool:
    """Whether a typedef gives this its only name: then both are declared at once."""
    return isinstance(ctype, (Compound, Enum)) and not ctype.tag


def _head(ctype: Compound | Enum, typedef: str) -> str:
    return f"{'typedef ' if typedef else ''}{ctype.kind} {f'{ctype.tag} ' if ctype.tag else ''}{{"


def _structure(compound: Compound, expand: bool, typedef: str) -> Iterator[str]:
    lines = outline(compound, expand)
    bits = 2 if any(line.bit_offset is not None for line in lines) else 0
    digits = max(2, len(f"{compound.size:x}"))
    width = max([1, *(len(_length(line)) for line in lines)])
    blank = " " * len(f"/* 0x{0:0{digits}x}{'':{bits}} {'':{width}} */")
    yield f"{blank} {_head(compound, typedef)}"
    for line in lines:
        place = blank
        if line.what not in ("close", "value"):
            bit = f":{line.bit_offset}" if line.bit_offset is not None else ""
            place = f"/* 0x{line.offset:0{digits}x}{bit:{bits}} {_length(line):>{width}} */"
        yield f"{place} {_INDENT * line.depth}{_text(line)}"
    yield f"{blank} }}{' ' if typedef else ''}{typedef};"
    unknown = any(line.unknown for line in lines)
    yield f"/* {_totals(compound, unknown)} */"
    if unknown:
        yield "/* unknown: places only; a size with <= is the room up to the next member */"


def _length(line: Line) -> str:
    if line.what in ("close", "value"):
        return ""
    if line.bit_size is not None:
        return f"{line.bit_size}b"
    return f"<={line.size}" if line.unknown else str(line.size or 0)


def _text(line: Line) -> str:
    if line.what in ("hole", "padding"):
        return f"/* {line.what} */"
    if line.what == "member":
        return f"unknown {line.text};" if line.unknown else f"{line.text};"
    return f"{line.text};" if line.what == "close" else line.text


def _totals(compound: Compound, unknown: bool) -> str:
    whole = summary(compound)
    words = [f"size: {whole.size:#x} ({whole.size})", f"members: {whole.members}"]
    if unknown:
        words.append("holes: not known")
    else:
        words.append(f"holes: {whole.holes}{_lost(' (', whole.hole_bits, ')')}")
        words.append(f"padding: {_lost('', whole.padding_bits, '') or 0}")
    return ", ".join(words)


def _lost(before: str, bits: int, after: str) -> str:
    """That many bits in words; nothing for none."""
    words = [_bytes(bits // 8)] if bits // 8 else []
    words += [f"{bits % 8} bits"] if bits % 8 else []
    return f"{before}{' '.join(words)}{after}" if words else ""


def _bytes(count: int | None) -> str:
    if count is None:
        return "no size"
    return f"{count} byte{'' if count == 1 else 's'}"


def _enum(enum: Enum, typedef: str) -> Iterator[str]:
    yield _head(enum, typedef)
    yield from (f"{_INDENT}{name} = {number}," for name, number in enum.values)
    yield f"}}{' ' if typedef else ''}{typedef};"
    yield f"/* size: {enum.size}, values: {len(enum.values)} */"
