"""Compile the members' types of the layout database: python tools/build_layout_types.py [FOLDER]

The kits' table (kdk_layouts_10.5-10.13.json.gz) says of each member what it is ("proc*",
"unsigned long[2]"). Kernels without a kit take a member's type over from the nearest kit, or from
tools/newer_members.txt, as far as its size fits the distance to the next member. The result is
kvmtool/data/layout_types.bin, whose form kvmtool/types/layout_texts.py describes.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from typing import TYPE_CHECKING

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kvmtool.types.layout_texts import BASES, MAGIC, PATH, shape  # noqa: E402
from kvmtool.types.layouts import ALIASES  # noqa: E402
from tools.build_layouts import INPUTS, LEFT_OUT, gather, merged_names, pack  # noqa: E402

if TYPE_CHECKING:
    from tools.build_layouts import Database, Kernel

NEWER = os.path.join(ROOT, "tools", "newer_members.txt")

# Structures in structures whose members are what the outer structure had before, or has elsewhere.
WRAPPERS = {"p_forkcopy", "proc_data", "task_data"}
# One word each, whose value is the pointer: bsd/sys/proc_internal.h, osfmk/kern/smr_types.h
SAFE_POINTERS = {"__smr_ptr", "__hazard_ptr"}

Texts = dict[str, dict[str, str]]  # C tag: {member: text}


def read_texts(folder: str) -> dict[tuple[str, str], Texts]:
    """By (kit, arch). Forms that say nothing ("struct", bit-fields) are left out."""
    with gzip.open(os.path.join(folder, "kdk_layouts_10.5-10.13.json.gz")) as packed:
        content = json.load(packed)
    kits: dict[tuple[str, str], Texts] = {}
    for name, arches in content.items():
        for arch, layouts in arches.items() if name not in LEFT_OUT else ():
            for layout in layouts:
                texts = {path: plain(kind) for path, _, kind in layout["members"]}
                for kernel in layout["kernels"]:
                    kits.setdefault((kernel, arch), {})[ALIASES.get(name, name)] = texts
    return kits


def plain(kind: str) -> str:
    """A member's type in the form of layout_texts; "" where it says nothing."""
    if kind.startswith(("bits", "anon")) or kind in ("struct", "union"):
        return ""
    return "int" if kind == "enum:int" else kind.replace("[?]*", "*")


class Typer:
    """Says of one kernel's members what they are."""

    def __init__(
        self, kernel: Kernel, own: Texts, older: Texts, newer: Texts, narrow: Texts
    ) -> None:
        """`own` are its kit's texts, `older` those of kits near it, `newer` our own table's.

        `narrow` are those of 32-bit kits, for what no kit of this word size has.
        """
        self._kernel, self._own, self._older, self._newer = kernel, own, older, newer
        self._narrow = narrow
        self._word = 4 if kernel.arch == "i386" else 8

    def texts(self, tag: str) -> dict[str, str]:
        """Every member of which something is known."""
        fields = self._kernel.structs[tag][1]
        found = {path: self._member(tag, path) for path in fields if not fields[path][1]}
        return {path: text for path, text in found.items() if text}

    def _member(self, tag: str, path: str) -> str:
        own = self._own.get(tag, {}).get(path, "")
        if "[<=" in own:
            return self._counted(tag, path, own)
        if own:
            return own
        text = self._likely(tag, path)
        return text if text and self._fits(tag, path, text) else ""

    def _counted(self, tag: str, path: str, bound: str) -> str:
        """The kits of 10.11 on lost the counts of arrays and know only how many would fit."""
        before = self._older.get(tag, {}).get(path, "")
        most = bound.replace("<=", "")
        alike = before.partition("[")[0] == bound.partition("[")[0]
        exact = alike and "<=" not in before and self._fits(tag, path, before)
        return before if exact else most

    def _likely(self, tag: str, path: str) -> str:
        """What it should be, by the first rule that has an answer; it may not fit."""
        for table in (self._newer, self._own, self._older, self._narrow):
            text = table.get(tag, {}).get(path, "")
            if text:
                return "" if "[<=" in text else text
        prefix, _, last = path.rpartition(".")
        if not prefix:
            return ""
        if last in SAFE_POINTERS:
            return self._likely(tag, prefix)
        first, _, rest = path.partition(".")
        if first in WRAPPERS:
            return self._likely(tag, rest)
        outer = self._likely(tag, first).rstrip("*")
        if outer and not self._likely(outer, rest):
            outer = ALIASES.get(outer, outer)
        return self._likely(outer, rest) if outer else self._newer.get("*", {}).get(last, "")

    def _fits(self, tag: str, path: str, text: str) -> bool:
        """Whether what is between this member and the next is its size and padding."""
        end, fields = self._kernel.structs[tag]
        at = fields[path][0]
        below = any(other.startswith(f"{path}.") for other in fields)
        if below and "*" in text:
            return False
        size = self._size(text)
        if size is None:
            return below
        behind = [other for name, (other, _) in fields.items() if not name.startswith(f"{path}.")]
        after = min((other for other in behind if other > at), default=end)
        return any(-(-(at + size) // align) * align == after for align in (1, 2, 4, 8))

    def _size(self, text: str) -> int | None:
        """sizeof, in bytes; None for a structure that the kernel's layouts do not have."""
        name, stars, counts = shape(text)
        if stars:
            size = self._word
        elif name in BASES:
            size = BASES[name].size or self._word
        else:
            known = self._kernel.structs.get(ALIASES.get(name, name))
            if known is None:
                return None
            size = known[0]
        for count in counts:
            size *= count
        return size


def read_newer(path: str = NEWER) -> Texts:
    """Our own table: lines "STRUCT MEMBER[, MEMBER…]: TYPE"; "*" is any structure."""
    table: Texts = {}
    with open(path) as lines:
        for line in lines:
            plain_line = line.partition("#")[0].strip()
            if not plain_line:
                continue
            head, _, text = plain_line.partition(": ")
            tag, members = re.split(r"\s+", head, maxsplit=1)
            for member in re.split(r",\s*", members):
                table.setdefault(tag, {})[member] = text.strip()
    return table


def typers(database: Database, folder: str) -> list[Typer]:
    """One for each kernel, in the database's order."""
    kits = read_texts(folder)
    newer = read_newer()
    order = [(kernel.kit, kernel.arch) for _, kernel in database.kernels]
    old = [key for key in order if key[0] and key[1] == "i386"]
    new = [key for key in reversed(order) if key[0] and key[1] == "x86_64"]
    near = {
        "i386": merged([kits[key] for key in old]),
        "x86_64": merged([kits[key] for key in new]),
    }
    return [
        Typer(
            kernel,
            kits.get((kernel.kit, kernel.arch), {}),
            near["i386" if kernel.arch == "i386" else "x86_64"],
            newer,
            near["i386"],
        )
        for _, kernel in database.kernels
    ]


def merged(tables: list[Texts]) -> Texts:
    """One table of all: of two texts for a member the first that has an exact count."""
    result: Texts = {}
    for exact in (True, False):
        for table in tables:
            for tag, texts in table.items():
                known = result.setdefault(tag, {})
                for path, text in texts.items():
                    if text and ("[<=" not in text) == exact:
                        known.setdefault(path, text)
    return result


def pack_texts(names: list[str], layouts: list[dict[str, str]]) -> bytes:
    """One structure's stream: its texts, a line each; NUL; a row of bytes per layout."""
    used = sorted({text for texts in layouts for text in texts.values()})
    if len(used) > 254:
        raise ValueError(f"{len(used)} texts in one structure do not fit the format")
    numbers = {text: number for number, text in enumerate(used, 1)}
    rows = bytes(numbers.get(texts.get(name, ""), 0) for texts in layouts for name in names)
    return "\n".join(used).encode() + b"\0" + rows


def build(database: Database, folder: str = INPUTS) -> list[bytes]:
    """The unpacked streams: the tags, then one per structure."""
    users = typers(database, folder)
    streams = ["\n".join(database.tags).encode()]
    for tag in database.tags:
        chosen: list[int | None] = [None] * len(database.layouts[tag])
        for at, ((_, kernel), numbers) in enumerate(
            zip(database.kernels, database.numbers, strict=True)
        ):
            number = numbers[tag] - 1
            if number >= 0 and (chosen[number] is None or kernel.kit):
                chosen[number] = at
        layouts = [{} if at is None else users[at].texts(tag) for at in chosen]
        streams.append(pack_texts(merged_names(database.layouts[tag]), layouts))
    return streams


def report(database: Database, folder: str) -> None:
    """Which members have no type yet, most frequent first."""
    missing: dict[tuple[str, str], int] = {}
    total = untyped = 0
    for (_, kernel), typer in zip(database.kernels, typers(database, folder), strict=True):
        if not kernel.main:
            continue
        for tag, (_, fields) in kernel.structs.items():
            texts = typer.texts(tag)
            for path, (_, bits) in fields.items():
                if bits or any(other.startswith(f"{path}.") for other in fields):
                    continue
                total += 1
                if path not in texts:
                    untyped += 1
                    missing[tag, path] = missing.get((tag, path), 0) + 1
    for (tag, path), count in sorted(missing.items(), key=lambda item: (-item[1], item[0])):
        print(count, tag, path)
    print(f"{untyped} of {total} without a type")


def main(folder: str = INPUTS, *options: str) -> None:
    database = gather(folder)
    if options:
        report(database, folder)
        return
    content = pack(build(database, folder), MAGIC)
    with open(PATH, "wb") as resource:
        resource.write(content)
    print(f"{os.path.relpath(PATH, ROOT)}: {len(content)} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
