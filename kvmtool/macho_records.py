"""Mach-O and kernel-core records met once a file, declared with construct.

Source: EXTERNAL_HEADERS/mach-o/loader.h (xnu-11417.121.6); note payloads osfmk/kern/kern_cdata.h
and osfmk/kdp/processor_core.c (xnu-8796), and lldb's ObjectFileMachO.cpp for the later versions.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import construct as c

from kvmtool.errors import FormatError, TruncatedError

if TYPE_CHECKING:
    from kvmtool.source import Source


def _integers(byteorder: str) -> tuple[Any, Any, Any, Any]:
    if byteorder == "<":
        return c.Int16ul, c.Int32ul, c.Int64ul, c.Int32sl
    return c.Int16ub, c.Int32ub, c.Int64ub, c.Int32sb


@cache
def records(byteorder: str) -> dict[str, Any]:
    """Every record, by its C name, in one byte order ("<" or ">")."""
    u16, u32, u64, _ = _integers(byteorder)
    head = ("cmd" / u32, "cmdsize" / u32)
    return {
        "mach_header": c.Struct(
            "magic" / u32,
            "cputype" / u32,
            "cpusubtype" / u32,
            "filetype" / u32,
            "ncmds" / u32,
            "sizeofcmds" / u32,
            "flags" / u32,
        ),
        "mach_header_64": c.Struct(
            "magic" / u32,
            "cputype" / u32,
            "cpusubtype" / u32,
            "filetype" / u32,
            "ncmds" / u32,
            "sizeofcmds" / u32,
            "flags" / u32,
            "reserved" / u32,
        ),
        "segment_command": c.Struct(
            *head,
            "segname" / c.Bytes(16),
            "vmaddr" / u32,
            "vmsize" / u32,
            "fileoff" / u32,
            "filesize" / u32,
            "maxprot" / u32,
            "initprot" / u32,
            "nsects" / u32,
            "flags" / u32,
        ),
        "segment_command_64": c.Struct(
            *head,
            "segname" / c.Bytes(16),
            "vmaddr" / u64,
            "vmsize" / u64,
            "fileoff" / u64,
            "filesize" / u64,
            "maxprot" / u32,
            "initprot" / u32,
            "nsects" / u32,
            "flags" / u32,
        ),
        "section": c.Struct(
            "sectname" / c.Bytes(16),
            "segname" / c.Bytes(16),
            "addr" / u32,
            "size" / u32,
            "offset" / u32,
            "align" / u32,
            "reloff" / u32,
            "nreloc" / u32,
            "flags" / u32,
            "reserved1" / u32,
            "reserved2" / u32,
        ),
        "section_64": c.Struct(
            "sectname" / c.Bytes(16),
            "segname" / c.Bytes(16),
            "addr" / u64,
            "size" / u64,
            "offset" / u32,
            "align" / u32,
            "reloff" / u32,
            "nreloc" / u32,
            "flags" / u32,
            "reserved1" / u32,
            "reserved2" / u32,
            "reserved3" / u32,
        ),
        "symtab_command": c.Struct(
            *head, "symoff" / u32, "nsyms" / u32, "stroff" / u32, "strsize" / u32
        ),
        "dysymtab_command": c.Struct(
            *head,
            *(
                name / u32
                for name in (
                    "ilocalsym",
                    "nlocalsym",
                    "iextdefsym",
                    "nextdefsym",
                    "iundefsym",
                    "nundefsym",
                    "tocoff",
                    "ntoc",
                    "modtaboff",
                    "nmodtab",
                    "extrefsymoff",
                    "nextrefsyms",
                    "indirectsymoff",
                    "nindirectsyms",
                    "extreloff",
                    "nextrel",
                    "locreloff",
                    "nlocrel",
                )
            ),
        ),
        "uuid_command": c.Struct(*head, "uuid" / c.Bytes(16)),
        "note_command": c.Struct(*head, "data_owner" / c.Bytes(16), "offset" / u64, "size" / u64),
        "source_version_command": c.Struct(*head, "version" / u64),
        "build_version_command": c.Struct(
            *head, "platform" / u32, "minos" / u32, "sdk" / u32, "ntools" / u32
        ),
        "nlist": c.Struct(
            "n_strx" / u32,
            "n_type" / c.Int8ub,
            "n_sect" / c.Int8ub,
            "n_desc" / u16,
            "n_value" / u32,
        ),
        "nlist_64": c.Struct(
            "n_strx" / u32,
            "n_type" / c.Int8ub,
            "n_sect" / c.Int8ub,
            "n_desc" / u16,
            "n_value" / u64,
        ),
        # payloads of LC_NOTE
        "main bin spec 1": c.Struct(
            "version" / u32,
            "type" / u32,
            "address" / u64,
            "uuid" / c.Bytes(16),
            "log2_pagesize" / u32,
            "unused" / u32,
        ),
        "main bin spec 2": c.Struct(
            "version" / u32,
            "type" / u32,
            "address" / u64,
            "slide" / u64,
            "uuid" / c.Bytes(16),
            "log2_pagesize" / u32,
            "platform" / u32,
        ),
        "load binary": c.Struct(
            "version" / u32,
            "uuid" / c.Bytes(16),
            "address" / u64,
            "slide" / u64,
            "name" / c.GreedyBytes,
        ),
        "addrable bits 3": c.Struct("version" / u32, "bits" / u32, "unused" / u64),
        "addrable bits 4": c.Struct(
            "version" / u32, "low_bits" / u32, "high_bits" / u32, "unused" / u32
        ),
    }


def parse(name: str, byteorder: str, data: bytes, source: Source, offset: int) -> Any:
    """`data` as the record `name`; the only way into construct, and its errors become ours.

    Raises `TruncatedError` when `data` (at file offset `offset`) is too short, else `FormatError`.
    """
    record = records(byteorder)[name]
    try:
        return record.parse(data)
    except c.StreamError as error:
        wanted = record.sizeof() if name != "load binary" else 36
        raise TruncatedError(source.name, offset, wanted, len(data), name) from error
    except c.ConstructError as error:
        raise FormatError(source.name, offset, f"{name}: {error}") from error
