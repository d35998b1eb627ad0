"""No file is longer than 400 lines and no function longer than 60, but for what is defended.

A test module follows what it tests: with its builders it may have 1,000. What is defended here has
its reason in docs/decisions.md, under "Sizes"; what no longer needs it fails the test.
"""

from __future__ import annotations

import ast
import os

import pytest
from inputs import ROOT

LINES, TEST_LINES, FUNCTION_LINES = 400, 1000, 60
OURS = ("kvmtool", "tools", "bench", "tests")
DEFENDED = {
    "kvmtool/macho_records.py:records",
}


def sources():
    """Every file of ours by its path from the root."""
    for top in OURS:
        for folder, _, files in os.walk(os.path.join(ROOT, top)):
            for name in files:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    with open(path, encoding="utf-8") as file:
                        yield os.path.relpath(path, ROOT), file.read()


def limit_of(path):
    """The lines that a file may have."""
    return TEST_LINES if path.startswith("tests") else LINES


def long_functions(text):
    """(name, lines) of the functions that are too long."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield node.name, lines


def too_long():
    """What is longer than it may be, with its lines."""
    found = {}
    for path, text in sources():
        lines = text.count("\n")
        if lines > limit_of(path):
            found[path] = lines
        found |= {f"{path}:{name}": length for name, length in long_functions(text)}
    return found


def test_nothing_is_too_long():
    assert {what: lines for what, lines in too_long().items() if what not in DEFENDED} == {}


def test_what_is_defended_needs_it_and_says_why():
    assert too_long().keys() >= DEFENDED
    with open(os.path.join(ROOT, "docs", "decisions.md"), encoding="utf-8") as file:
        _, _, section = file.read().partition("## Sizes")
    for what in DEFENDED:
        assert os.path.basename(what.partition(":")[0]) in section, what


def test_long_functions_are_seen():
    body = "\n".join(["    pass"] * FUNCTION_LINES)
    assert list(long_functions(f"def short():\n{body[:-9]}\n")) == []
    assert list(long_functions(f"class C:\n  def long(self):\n{body}\n")) == [("long", 61)]


@pytest.mark.parametrize(
    ("path", "limit"), [("tests/test_x.py", 1000), ("bench/x.py", 400), ("kvmtool/x.py", 400)]
)
def test_limits(path, limit):
    assert limit_of(path) == limit
