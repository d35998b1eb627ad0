"""Fail on code that nothing uses: vulture over the package, the tools and the benchmarks.

Tests are not asked: what only they use is dead, too. What vulture cannot see the use of stands in
tools/dead_code.txt, a name a line with the reason; a name there that is not needed fails as well.
Fields of records and rows of a specification's numbers are data, not code; commands are called by
the command line.
"""

from __future__ import annotations

import ast
import os
import sys
from typing import TYPE_CHECKING

from vulture import Vulture

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOOKED_AT = ("kvmtool", "tools", "bench", "setup.py")
ALLOWED = os.path.join(ROOT, "tools", "dead_code.txt")


def allowed() -> dict[str, str]:
    """Names that are used where vulture does not look, and the reasons."""
    with open(ALLOWED, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    return {name: reason for name, _, reason in (line.partition(": ") for line in lines)}


def sources() -> Iterator[str]:
    """Every file that is looked at."""
    for place in LOOKED_AT:
        path = os.path.join(ROOT, place)
        if path.endswith(".py"):
            yield path
        for folder, _, files in os.walk(path):
            yield from (os.path.join(folder, name) for name in files if name.endswith(".py"))


def data_of(path: str) -> set[int]:
    """The lines that name data: fields of records, and a specification's numbers in a row."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    named = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    rows = [line for line in tree.body if isinstance(line, ast.Assign)]
    rows = [line for line in rows if isinstance(line.targets[0], ast.Tuple)]
    spans = [(line.lineno, line.end_lineno or line.lineno) for line in (*named, *rows)]
    return {number for first, last in spans for number in range(first, last + 1)}


def main() -> int:
    """Exit status 1 when there is something to say."""
    found = Vulture(ignore_decorators=["@*.command", "@click.*", "@cached_property"])
    paths = sorted(sources())
    found.scavenge(paths)
    data = {path: data_of(path) for path in paths}
    known, needed, dead = allowed(), set(), 0
    for item in found.get_unused_code(min_confidence=60):
        path = str(item.filename)
        if item.first_lineno in data.get(path, ()):
            continue
        short = os.path.relpath(path, ROOT)
        if item.name in known:
            needed.add(item.name)
            continue
        print(f"{short}:{item.first_lineno}: nothing uses {item.typ} {item.name}", file=sys.stderr)
        dead += 1
    for name in sorted(known.keys() - needed):
        print(f"{os.path.relpath(ALLOWED, ROOT)}: {name} is used: take it out", file=sys.stderr)
        dead += 1
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
