"""The rule of the rooms: a module imports only from layers before its own.

Read from the source with `ast`, so that an import inside a function counts as much as one at the
top. Imports under `if TYPE_CHECKING:` are free: they are not there when the program runs.
"""

from __future__ import annotations

import ast
import os
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.inputs import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PACKAGE = "kvmtool"

# The layers from the bytes up to the user. A name stands for the module and all that is below it,
# the longest name that fits counts; a module without a place here fails the test. Modules of one
# layer may import each other as long as that makes no circle.
#
# design.md draws memory.py in room 3, above the formats of room 2, but a container answers with a
# memory (`Format.virtual` gives a RunMemory). memory.py itself needs nothing but a Source, so here
# it stands where its imports put it: before the formats. What joins the two (image.py: a Mach-O as
# memory, memory as a Mach-O; kernelcache.py, which does that with the kexts inside) is behind both.
LAYERS = (
    ("foundation", ("errors", "unreadable", "cache", "progress", "new_file")),
    (
        "bytes",
        (
            "source",
            "inflate",
            "checkpoints",
            "gzip_source",
            "gzip_index",
            "lz4_source",
            "pread_source",
        ),
    ),
    ("memory", ("memory",)),
    (
        "containers",
        (
            *("macho", "macho_records", "macho_names", "nlist", "segment_table", "formats"),
            *("peel", "chains", "threaded", "fixups", "fileset", "prelink_info"),
            *("relocation_types", "relocations"),
        ),
    ),
    (
        "machines",
        (
            "image",
            "joined",
            "paging",
            "kernelcache",
            "linkedit",
            "macho_writer",
            "nlist_writer",
            "arch",
        ),
    ),
    (
        "names",
        (
            *("symbols", "kext_file", "kexts", "kext_search", "boot", "kernel_file"),
            *("way_base", "way_in", "way_judge", "way_memo", "way_places", "way_roots", "way_scan"),
            *("kernel_index", "kernel_search", "physmap"),
        ),
    ),
    ("types", ("types",)),
    ("type files", ("type_files", "type_readers", "type_choice")),
    (
        "target",
        (
            *("target", "object", "arithmetic", "computing", "fields", "values", "as_c"),
            *("expression", "expression_tree"),
        ),
    ),
    ("kernel objects", ("xnu",)),
    (
        "handle",
        (
            "container",
            "misnamed",
            "handle_memory",
            "handle_types",
            "handle",
            "scope",
            "evaluate",
            "kvm",
            "libkvm_types",
            "libkvm",
            "sample",
            "convert",
            *("stacks", "user_stacks"),
            "check",
            "checks",
        ),
    ),
    ("public names", ("",)),
    ("front ends", ("devices", "fuse", "cli", "__main__")),
)

# Who may import what is not ours; everything else must be the standard library or kvmtool.
THIRD_PARTIES = {
    "macholib": ("macho", "macho_records", "macho_names"),
    "construct": ("macho_records", "formats", "types"),
    "rapidgzip": ("gzip_index",),
    "lz4": ("lz4_source",),
    "lzfse": ("peel",),
    "backports": ("peel", "formats"),  # zstd, in the standard library as `compression` from 3.14 on
    "compression": ("peel", "formats"),
    "mfusepy": ("fuse",),
    "cramjam": ("formats",),
    "deflate": ("formats",),
    "pyoxigraph": ("formats",),
    "lzallright": ("formats",),
    "click": ("cli",),
    "rich": ("cli",),
}

# A module that chooses among those which build on it loads the chosen one when it is wanted, from
# inside a function. These are the only circles there are, and none exists while modules load.
# (`formats` chooses in the same way, by the names in its table.)
CHOOSERS = {
    "kvmtool.arch": ("kvmtool.arch.arm64", "kvmtool.arch.ppc", "kvmtool.arch.x86"),
    "kvmtool.source": ("kvmtool.gzip_source",),
}


class Import(NamedTuple):
    """`module` imports `target` in line `line`; `deferred` is inside a function."""

    module: str
    target: str
    line: int
    deferred: bool = False


def _short(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".")


def _under(name: str, prefix: str) -> bool:
    return name == prefix or (prefix != "" and name.startswith(prefix + "."))


def layer_of(module: str) -> int | None:
    """The number of a module's layer; None if it has no place."""
    fits = [
        (len(prefix), number)
        for number, (_, prefixes) in enumerate(LAYERS)
        for prefix in prefixes
        if _under(_short(module), prefix)
    ]
    return max(fits)[1] if fits else None


def _type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _statements(
    nodes: Iterable[ast.AST], deferred: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that runs, and whether it stands in a function."""
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, deferred
            continue
        inner = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        free = isinstance(node, ast.If) and _type_checking(node.test)
        yield from _statements(node.orelse if free else ast.iter_child_nodes(node), inner)


def imports(source: str, module: str, modules: frozenset[str]) -> Iterator[Import]:
    """What `source`, the text of `module`, imports when it runs; ours by their full names."""
    for node, deferred in _statements(ast.parse(source).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, deferred)
            continue
        assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            target = inner if inner in modules else node.module or ""
            yield Import(module, target, node.lineno, deferred)


def _sources() -> dict[str, str]:
    """The text of every module of the package, by its dotted name."""
    found = {}
    for folder, _, files in os.walk(os.path.join(ROOT, PACKAGE)):
        for file in files:
            if file.endswith(".py"):
                path = os.path.join(folder, file)
                dotted = os.path.relpath(path, ROOT)[:-3].replace(os.sep, ".")
                with open(path, encoding="utf-8") as text:
                    found[dotted.removesuffix(".__init__")] = text.read()
    return found


SOURCES = _sources()
MODULES = frozenset(SOURCES)
IMPORTS = [found for name, text in SOURCES.items() for found in imports(text, name, MODULES)]


def _ours(target: str) -> bool:
    return _under(target, PACKAGE)


def test_every_module_has_a_layer():
    homeless = sorted(name for name in MODULES if layer_of(name) is None)
    assert homeless == [], "give each of these a place in LAYERS"


def test_no_module_imports_from_a_layer_above():
    wrong = [
        f"{found.module}:{found.line} imports {found.target}"
        for found in IMPORTS
        if _ours(found.target)
        and (above := layer_of(found.target)) is not None
        and (own := layer_of(found.module)) is not None
        and above > own
    ]
    assert wrong == []


def test_what_is_imported_exists():
    unknown = [f for f in IMPORTS if _ours(f.target) and f.target not in MODULES]
    assert unknown == []


def test_third_parties_stay_in_their_rooms():
    wrong = [
        f"{found.module}:{found.line} imports {found.target}"
        for found in IMPORTS
        if (party := found.target.partition(".")[0]) in THIRD_PARTIES
        and not any(_under(_short(found.module), room) for room in THIRD_PARTIES[party])
    ]
    assert wrong == []


def test_nothing_else_is_depended_upon():
    import sys

    known = {*sys.stdlib_module_names, *THIRD_PARTIES, PACKAGE}
    strangers = [f for f in IMPORTS if f.target.partition(".")[0] not in known]
    assert strangers == []


def _circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected modules (Tarjan), of more than one or that import themselves."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            circle = sorted(stack[at:])
            del stack[at:]
            if len(circle) > 1 or node in edges.get(node, ()):
                found.append(circle)

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def _edges(found: Iterable[Import]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for module, target, _, _ in found:
        edges.setdefault(module, set()).add(target)
    return edges


# kvmtool/__init__.py is left out: whoever imports kvmtool.x runs it first anyway.
INNER = [f for f in IMPORTS if _ours(f.target) and PACKAGE not in (f.module, f.target)]


def test_no_import_circles():
    chosen = {(chooser, module) for chooser, modules in CHOOSERS.items() for module in modules}
    kept = [f for f in INNER if not (f.deferred and (f.module, f.target) in chosen)]
    assert _circles(_edges(kept)) == []


def test_the_choosers_choose():
    deferred = _edges(f for f in INNER if f.deferred)
    for chooser, modules in CHOOSERS.items():
        assert deferred[chooser].issuperset(modules), f"{chooser} has changed: update CHOOSERS"


# The checks themselves are held against modules that break the rules.

_MODULES = frozenset({"kvmtool.errors", "kvmtool.kvm", "kvmtool.memory"})


def _targets(source: str) -> set[str]:
    return {found.target for found in imports(source, "kvmtool.memory", _MODULES)}


def test_imports_inside_functions_and_branches_count():
    source = "def f():\n try:\n  from kvmtool import kvm\n except E:\n  import rich.table as t\n"
    assert _targets(source) == {"kvmtool.kvm", "rich.table"}


def test_imports_inside_functions_are_deferred():
    source = "import os\ndef f():\n import kvmtool.kvm\nclass C:\n import rich\n"
    found = {f.target: f.deferred for f in imports(source, "kvmtool.memory", _MODULES)}
    assert found == {"os": False, "kvmtool.kvm": True, "rich": False}


def test_imports_for_the_type_checker_are_free():
    source = "import typing\nif typing.TYPE_CHECKING:\n import rich\nelse:\n import json\n"
    assert _targets(source) == {"typing", "json"}


def test_a_name_from_a_module_is_that_module():
    assert _targets("from kvmtool.errors import KvmError") == {"kvmtool.errors"}


def test_circles_are_seen():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "x": {"x"}}
    assert _circles(edges) == [["a", "b", "c"], ["x"]]
    assert _circles({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("kvmtool.errors", "foundation"),
        ("kvmtool.macho_records", "containers"),
        ("kvmtool.formats.macho_core", "containers"),
        ("kvmtool.cli.commands.nlist", "front ends"),
        ("kvmtool", "public names"),
    ],
)
def test_layers_are_found_by_name(module, layer):
    number = layer_of(module)
    assert number is not None
    assert LAYERS[number][0] == layer


def test_an_unknown_module_has_no_layer():
    assert layer_of("kvmtool.nonesuch") is None
    assert layer_of("kvmtool.memoryx") is None
