"""A few variables of a kernel that is not there, for expressions."""

from __future__ import annotations

import functools
import struct

from kvmtool.arch.x86 import X86_64
from kvmtool.types.ctype import Array, Compound, Field, Function, Pointer, Typedef
from tests.builders.typed import CHAR, DOUBLE, INT, UINT, HandTypes, target_of
from tests.test_expression import BASE, LAST, NODE, READER, TABLE, HandScope


@functools.cache
def scope() -> HandScope:
    """A list of two nodes, a table, a function."""
    node = Compound("struct", "node", 40, lambda: fields)
    function = Pointer(Function(INT, [INT]), 8)
    row = Compound("struct", "row", 16, [Field("d_open", function, 0)])
    fields = [
        Field("next", Pointer(node, 8), 0),
        Field("key", Typedef("key_t", INT), 8),
        Field("name", Array(CHAR, 8), 12),
        Field("flags", UINT, 20, 0, 4),
        Field("rate", DOUBLE, 24),
        Field("cells", Array(row, 0), 32),
    ]
    runs = {
        BASE: struct.pack("<Q", NODE).ljust(64, b"\0"),
        TABLE: struct.pack("<4Q", 0, READER, 0, READER + 0x40),
        NODE: struct.pack("<Qi8sId", LAST, -3, b"first\0", 0xFA, 2.5).ljust(40, b"\0"),
        LAST: struct.pack("<Qi8sId", 0, 7, b"last\0", 5, float("inf")).ljust(40, b"\0"),
    }
    types = HandTypes(X86_64, {"node": node, "row": row}, {"key_t": INT, "node_t": node})
    variables = {
        "head": (Pointer(node, 8), BASE),
        "table": (Array(row, 2), TABLE),
        "node": (node, NODE),
        "main": (Function(INT, []), READER),
        "far": (Pointer(node, 8), BASE + 0x1000),
        "plain": (None, BASE),
    }
    return HandScope(target_of(X86_64, runs, types), variables)
