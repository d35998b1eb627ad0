"""Every limit in the code: docs/limits.md comes from here and from the constants themselves.

`constants` finds them by their names. `BEYOND` says what happens past each; a test holds that none
is missing there.
"""

from __future__ import annotations

import ast
import os
import re
from importlib import import_module
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NAME = re.compile(
    r"^_?([A-Z0-9]+_)*(LIMITS?|MAX|MOST|LARGEST|DEEPEST|DEPTH|BUDGET|TIMEOUT)(_[A-Z]+)*$"
)
# the names C or a protocol gave them, and bounds of arithmetic: nothing is counted against them
_NO_LIMITS = frozenset(
    (
        *("types.ctf_format.MAX_VLEN", "kext_file._KMOD_MAX_NAME", "libkvm_types._POSIX2_LINE_MAX"),
        *("computing._SIGNED_LIMIT", "computing._UNSIGNED_LIMIT", "memory.ADDRESS_LIMIT"),
        *("xnu.kext.KMOD_MAX_NAME", "xnu.pcb._MAX_KCTL_NAME", "xnu.zone._NO_LIMIT"),
    )
)

REFUSED = "refused by one line (`FormatError`), exit status 1"
ERROR = "an error of one line (`KvmError`), exit status 1"
PARSE = "an error that shows the place (`ExpressionError`), exit status 2"
WARNED = "left out, with a warning"
CUT = "left out"
STOPS = "the walk stops and says so, exit status 3"
UNREADABLE = "the cell says that it cannot be read, exit status 3"
DROPPED = "not kept: it is made anew the next time"
SHOWN = "shown as `…`, or as more"
UNKNOWN = "taken for something else: no file has it"

BEYOND: dict[str, str] = {
    "boot._BANNER_LIMIT": CUT,
    "boot._PC_LIMIT": "no further thread is tried",
    "cache.LIMIT": "the oldest entries are removed; a larger one is not kept",
    "chains._NAME_LIMIT": CUT,
    "checks.changes.MOST": "told as a whole, not one by one",
    "checks.code._MOST_STARTS": CUT,
    "checks.imports._LIMIT": CUT,
    "checks.imports._MOST": "the check says that it failed",
    "cli.natural._TEXT_LIMIT": SHOWN,
    "cli.tree.NODE_LIMIT": "left out, and how many, exit status 3",
    "cli.words._LIMIT": DROPPED,
    "cli.words._MOST": "the shell is told how they go on, not each",
    "devices.XATTR_LIMIT": "E2BIG",
    "expression.DEPTH_LIMIT": PARSE,
    "expression.LENGTH_LIMIT": PARSE,
    "expression.TOKEN_LIMIT": PARSE,
    "fileset.ENTRY_LIMIT": REFUSED,
    "formats.aff4._SAID_LIMIT": REFUSED,
    "formats.aff4_map._ENTRIES_LIMIT": REFUSED,
    "formats.aff4_map._SYMBOLIC_LIMIT": REFUSED,
    "formats.aff4_map._TARGETS_LIMIT": REFUSED,
    "formats.aff4_stream._MAX_CHUNK": REFUSED,
    "formats.aff4_stream._MAX_PER_BEVY": REFUSED,
    "formats.aff4_stream._MAX_SIZE": REFUSED,
    "formats.aff4_volume._DIRECTORY_LIMIT": REFUSED,
    "formats.aff4_volume._TURTLE_LIMIT": REFUSED,
    "formats.aff4_volume._URN_LIMIT": REFUSED,
    "formats.corefile._MAX_LOG": REFUSED,
    "formats.elf_core._NOTES_LIMIT": WARNED,
    "formats.elf_core._SEGMENTS_LIMIT": REFUSED,
    "formats.flattened._RECORDS_LIMIT": REFUSED,
    "formats.flattened._SIZE_LIMIT": REFUSED,
    "formats.gdb._LARGEST_READ": "asked for in several packets",
    "formats.gdb_packets.PACKET_LIMIT": "the connection is ended by an error",
    "formats.gdb_session.DEFAULT_TIMEOUT": "the connection is ended by an error",
    "formats.gdb_target.DOCUMENT_LIMIT": CUT,
    "formats.kdump._BITMAP_LIMIT": REFUSED,
    "formats.kdump._MAX_BLOCK": UNKNOWN,
    "formats.kdump._NOTES_LIMIT": WARNED,
    "formats.kdump._SUB_LIMIT": UNKNOWN,
    "formats.kmem._LARGEST_READ": "read in several steps",
    "formats.lime._RANGES_LIMIT": REFUSED,
    "formats.macho_core._NOTE_LIMIT": CUT,
    "formats.sleepimage._BANKS_LIMIT": REFUSED,
    "formats.sleepimage._BLOCK_LIMIT": "the block size is not believed",
    "formats.sleepimage._EXTENTS_LIMIT": REFUSED,
    "formats.sleepimage._PREVIEW_LIMIT": WARNED,
    "formats.sleepimage._RUNS_LIMIT": REFUSED,
    "formats.sleepimage._SIZE_LIMIT": UNKNOWN,
    "formats.vmware._CPUS_LIMIT": CUT,
    "formats.vmware._GROUPS_LIMIT": REFUSED,
    "formats.vmware._REGIONS_LIMIT": REFUSED,
    "formats.vmware._TAGS_LIMIT": REFUSED,
    "formats.vmware._VALUE_LIMIT": "no number: passed over",
    "image._COMMANDS_LIMIT": REFUSED,
    "inflate._MAX_HEADER": REFUSED,
    "kernel_index._DEPTH": "not looked into, with a warning",
    "kernel_index._VERSION_LIMIT": CUT,
    "kext_file._PLIST_LIMIT": REFUSED,
    "libkvm._NAME_LIMIT": "the call fails: symbol too large",
    "lz4_source._MAX_BLOCK": REFUSED,
    "lz4_source._MAX_RATIO": REFUSED,
    "nlist_writer.MOST_SYMBOLS": REFUSED,
    "object.STRING_LIMIT": CUT,
    "paging.BUDGET": "translations are made anew",
    "peel.codecs._MAX_MEMBERS": REFUSED,
    "peel.comp._MAX_DECODED": REFUSED,
    "peel.der._MAX_MEMBERS": REFUSED,
    "peel.der._MAX_TEXT": REFUSED,
    "peel.fat._MAX_SLICES": UNKNOWN,
    "peel.layer.LIMIT": REFUSED,
    "peel.layer.MAX_LAYERS": REFUSED,
    "peel.lzfse_stream._MAX_BLOCK": REFUSED,
    "peel.lzfse_stream._MAX_BLOCKS": REFUSED,
    "peel.lzfse_stream._MAX_LZVN": REFUSED,
    "prelink_info.DEPTH_LIMIT": REFUSED,
    "prelink_info.OBJECT_LIMIT": REFUSED,
    "prelink_info.SIZE_LIMIT": REFUSED,
    "relocations._LIMIT": REFUSED,
    "types.as_construct._TYPES_LIMIT": ERROR,
    "types.compare._DEPTH": "taken for alike",
    "types.ctf_format.BODY_LIMIT": REFUSED,
    "types.ctf_format._NAME_LIMIT": REFUSED,
    "types.ctf_format._TYPES_LIMIT": REFUSED,
    "types.ctf_types._BASE_LIMIT": REFUSED,
    "types.ctf_types._SIZE_LIMIT": REFUSED,
    "types.ctype.DEPTH_LIMIT": ERROR,
    "types.declare._NEST_LIMIT": SHOWN,
    "types.declare._TYPES_LIMIT": SHOWN,
    "types.dwarf_dies.NEST_LIMIT": REFUSED,
    "types.dwarf_fields.SIZE_LIMIT": REFUSED,
    "types.dwarf_names._ENTRY_LIMIT": REFUSED,
    "types.dwarf_names._INDEX_LIMIT": REFUSED,
    "types.dwarf_pub._SET_LIMIT": REFUSED,
    "types.dwarf_sections._LIMIT": REFUSED,
    "types.dwarf_types._BASE_LIMIT": REFUSED,
    "types.dwarf_types._CHAIN_LIMIT": REFUSED,
    "types.dwarf_units._UNIT_LIMIT": REFUSED,
    "types.flatten.MEMBER_LIMIT": ERROR,
    "types.isf._DEPTH_LIMIT": REFUSED,
    "types.isf._LIMITS": REFUSED,
    "types.isf._SIZE_LIMIT": REFUSED,
    "types.literal._DEPTH_LIMIT": REFUSED,
    "types.literal._TOKENS_LIMIT": REFUSED,
    "types.outline.LINE_LIMIT": ERROR,
    "types.packer._DEPTH": DROPPED,
    "types.profile_zip._DIRECTORY_LIMIT": REFUSED,
    "types.profile_zip._FILE_LIMIT": REFUSED,
    "types.profile_zip._TEXT_LIMIT": REFUSED,
    "types.remembered._LARGEST": DROPPED,
    "types.remembered._MOST": DROPPED,
    "types.type_names._POINTERS_LIMIT": ERROR,
    "types.vtypes._DEPTH_LIMIT": REFUSED,
    "types.vtypes._SIZE_LIMIT": REFUSED,
    "types.vtypes._STRUCTS_LIMIT": REFUSED,
    "values.COUNT_LIMIT": ERROR,
    "values.SIZE_LIMIT": ERROR,
    "way_in._LIMIT": "not kept; what was found counts all the same",
    "way_judge._BANNER_LIMIT": CUT,
    "way_judge._TEXT_LIMIT": "not searched for the banner",
    "way_places._COMMANDS_LIMIT": "no kernel's header",
    "xnu.args.ARG_MAX": UNREADABLE,
    "xnu.backtrace.LIMIT": STOPS,
    "xnu.cpu.LIMIT": STOPS,
    "xnu.devsw._LIMIT": REFUSED,
    "xnu.call_tables.LIMIT": REFUSED,
    "xnu.call_tables._MOST": "searched no further for a table whose symbol is stripped",
    "xnu.filedesc._MOST": "the table is not believed, exit status 3",
    "xnu.kext._LIMIT": STOPS,
    "xnu.msgbuf.SIZE_LIMIT": REFUSED,
    "xnu.net._LIMIT": STOPS,
    "xnu.network_places._LIMIT": "no further one is looked at",
    "xnu.panic.BUFFER_LIMIT": "no panic log is taken from there",
    "xnu.panic._STRING_LIMIT": CUT,
    "xnu.policies._LIMIT": REFUSED,
    "xnu.proc_lists._HASH_LIMIT": STOPS,
    "xnu.proc_lists._PID_LIMIT": "no process",
    "xnu.protocols._LIMIT": STOPS,
    "xnu.queues.LIMIT": STOPS,
    "xnu.saved_registers._STACK_LIMIT": "the size XNU has always had is taken",
    "xnu.sysctl._DEPTH": STOPS,
    "xnu.user_stack.LIMIT": "the stack ends there, and says so",
    "xnu.vm_map.LIMIT": STOPS,
    "xnu.vm_object.DEPTH": UNREADABLE,
    "xnu.vmmap._DEPTH": STOPS,
    "xnu.vnode._NAME_LIMIT": CUT,
    "xnu.vnode._PATH_LIMIT": UNREADABLE,
    "xnu.zone.LIMIT": STOPS,
    "xnu.zone_caches._MAGAZINE_LIMIT": UNREADABLE,
}

WHAT: dict[str, str] = {  # where the code has no comment to say it
    "boot._BANNER_LIMIT": "bytes of banner",
    "chains._NAME_LIMIT": "bytes of a symbol's name",
    "cli.tree.NODE_LIMIT": "members shown",
    "expression.TOKEN_LIMIT": "words",
    "formats.aff4_stream._MAX_SIZE": "bytes of a stream",
    "formats.aff4_volume._URN_LIMIT": "bytes of the volume's name",
    "formats.elf_core._SEGMENTS_LIMIT": "program headers",
    "formats.flattened._SIZE_LIMIT": "bytes of the file inside",
    "formats.gdb._LARGEST_READ": "bytes of one request",
    "formats.gdb_session.DEFAULT_TIMEOUT": "seconds for connecting, and for each reply",
    "formats.kdump._MAX_BLOCK": "bytes of a block",
    "formats.kdump._NOTES_LIMIT": "bytes of notes",
    "formats.kmem._LARGEST_READ": "bytes of one system call",
    "formats.sleepimage._BLOCK_LIMIT": "bytes of a block",
    "formats.sleepimage._EXTENTS_LIMIT": "bytes of the file's extents",
    "formats.sleepimage._RUNS_LIMIT": "runs of pages",
    "formats.sleepimage._SIZE_LIMIT": "bytes of the image",
    "formats.vmware._CPUS_LIMIT": "processors",
    "formats.vmware._GROUPS_LIMIT": "groups",
    "formats.vmware._REGIONS_LIMIT": "regions",
    "formats.vmware._TAGS_LIMIT": "tags of one group",
    "libkvm._NAME_LIMIT": "bytes of a symbol's name",
    "peel.fat._MAX_SLICES": "slices of a fat file",
    "prelink_info.DEPTH_LIMIT": "elements in each other",
    "types.ctf_format._NAME_LIMIT": "bytes of a name",
    "types.ctf_format._TYPES_LIMIT": "types",
    "types.ctf_types._SIZE_LIMIT": "bytes of a type",
    "types.dwarf_names._INDEX_LIMIT": "name indexes",
    "types.dwarf_pub._SET_LIMIT": "units",
    "types.dwarf_types._BASE_LIMIT": "bytes of a number",
    "types.dwarf_units._UNIT_LIMIT": "units",
    "types.isf._LIMITS": "bytes, and signs of each kind, before JSON is parsed",
    "types.isf._SIZE_LIMIT": "bytes of a type, elements of an array",
    "types.literal._DEPTH_LIMIT": "lists in lists",
    "types.literal._TOKENS_LIMIT": "words of one structure",
    "types.profile_zip._DIRECTORY_LIMIT": "bytes of the zip's directory",
    "types.profile_zip._FILE_LIMIT": "bytes of the zip",
    "types.profile_zip._TEXT_LIMIT": "inflated bytes",
    "types.type_names._POINTERS_LIMIT": "stars",
    "types.vtypes._DEPTH_LIMIT": "types in types",
    "types.vtypes._SIZE_LIMIT": "bytes of a type",
    "types.vtypes._STRUCTS_LIMIT": "structures",
    "way_judge._BANNER_LIMIT": "bytes of banner",
    "way_places._COMMANDS_LIMIT": "bytes of load commands",
    "xnu.panic._STRING_LIMIT": "bytes of the panic string",
    "xnu.protocols._LIMIT": "domains; protocols of one",
    "xnu.saved_registers._STACK_LIMIT": "bytes of a kernel stack",
    "xnu.zone_caches._MAGAZINE_LIMIT": "elements of a magazine",
}

_HEAD = """
# Limits

Dumps are large, damaged, and come from strangers. No number in one is believed before it was held
against what is there, and where that is not enough there is a limit: far above what any real file
has, low enough that time and memory stay in bounds. What no limit below can be reached with is read
as it is needed: files are mapped, never read whole.

Every parser is fuzzed (`make fuzz`) against these rules: nothing but one line of error, 3 seconds
of CPU, 700 MiB of memory, whatever the input is.
"""


class Limit(NamedTuple):
    """A limit: `where` is module and name, `source` its value as written, `what` it counts."""

    where: str
    value: object
    source: str
    what: str


def constants() -> list[Limit]:
    """All of them, in the order of the modules."""
    found: list[Limit] = []
    package = os.path.join(ROOT, "kvmtool")
    for folder, _, names in os.walk(package):
        for name in names:
            if name.endswith(".py"):
                found += _in_file(os.path.join(folder, name))
    return sorted(found)


def _in_file(path: str) -> list[Limit]:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    lines, found = text.splitlines(), []
    module = os.path.relpath(path, os.path.join(ROOT, "kvmtool"))[:-3].replace(os.sep, ".")
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign):
            continue
        targets, values = _parts(node)
        for target, value in zip(targets, values, strict=True):
            where = f"{module}.{getattr(target, 'id', '')}"
            if isinstance(target, ast.Name) and _is_limit(target.id, value, where):
                comment = lines[node.lineno - 1].partition("#")[2].strip()
                made = getattr(import_module(f"kvmtool.{module}"), target.id)
                found.append(Limit(where, made, ast.unparse(value), comment.partition(";")[0]))

    return found


def _parts(node: ast.Assign) -> tuple[list[ast.expr], list[ast.expr]]:
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return [target], [node.value]
    values = node.value.elts if isinstance(node.value, ast.Tuple) else []
    return (target.elts, values) if len(values) == len(target.elts) else ([], [])


def _is_limit(name: str, value: ast.expr, where: str) -> bool:
    known = where not in _NO_LIMITS and _NAME.match(name) is not None
    return known and not isinstance(value, (ast.JoinedStr, ast.Tuple))


def page() -> str:
    """docs/limits.md."""
    rows = [
        f"| `{one.where}` | {_readable(one)} | {WHAT.get(one.where) or one.what} "
        f"| {BEYOND.get(one.where, '?')} |"
        for one in constants()
    ]
    table = ["| where | limit | of what | beyond it |", "|---|---|---|---|", *rows]
    return f"{_HEAD.lstrip()}\n" + "\n".join(table) + "\n"


def _readable(limit: Limit) -> str:
    value = limit.value
    if not isinstance(value, int) or isinstance(value, bool):
        return f"`{limit.source}`"
    for unit, size in (
        ("Pi", 1 << 50),
        ("Ti", 1 << 40),
        ("Gi", 1 << 30),
        ("Mi", 1 << 20),
        ("Ki", 1 << 10),
    ):
        if value >= size and value % size == 0:
            return f"{value // size:,} {unit}"
    return f"{value:,}"
