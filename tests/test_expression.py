"""C expressions over a kernel's variables."""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.arch.x86 import I386, X86_64
from kvmtool.errors import ExpressionError, FaultError, KvmError, NotFoundError
from kvmtool.evaluate import address_of, evaluate
from kvmtool.expression import parse
from kvmtool.object import Object, Untyped
from kvmtool.types.ctype import Array, Compound, Field, Function, Pointer, Typedef
from tests.builders.typed import (
    CHAR,
    DOUBLE,
    INT,
    LONG,
    UINT,
    HandTypes,
    target_of,
)

BASE = 0xFFFFFF8000300000
TABLE, NODE, LAST, READER = BASE + 0x100, BASE + 0x200, BASE + 0x300, 0xFFFFFF8000201000


class HandScope:
    """The names of a kernel that is not there."""

    def __init__(self, target, variables):
        self.target, self.variables = target, variables

    def variable(self, name):
        if name not in self.variables:
            raise NotFoundError("symbol", name)
        ctype, address = self.variables[name]
        return Object(self.target, ctype or Untyped(name), address)

    def is_type(self, name):
        source = self.target.types.source
        return source.find("typedef", name) is not None or (
            source.find("tag", name) is not None and name not in self.variables
        )


@pytest.fixture
def scope():
    node = Compound("struct", "node", 40, lambda: fields)
    function = Pointer(Function(INT, [INT]), 8)
    row = Compound(
        "struct", "row", 16, [Field("d_open", function, 0), Field("d_read", function, 8)]
    )
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
        LAST: struct.pack("<Qi8sId", 0, 7, b"last\0", 5, 0).ljust(40, b"\0"),
    }
    types = HandTypes(X86_64, {"node": node, "row": row}, {"key_t": INT, "node_t": node})
    variables = {
        "head": (Pointer(node, 8), BASE),
        "table": (Array(row, 2), TABLE),
        "node": (node, NODE),
        "main": (Function(INT, []), READER),
        "far": (Pointer(node, 8), BASE + 0x1000),
        "plain": (None, BASE),
        "com.example.driver:_start": (None, READER),
        "-[Thing init:]": (None, READER + 4),
    }
    return HandScope(target_of(X86_64, runs, types), variables)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("head->key", -3),
        ("head.key", -3),
        ("(*head).next->key", 7),
        ("head->next->next", 0),
        ("head[0].key + node.key", -6),
        ("*&head->key", -3),
        ("table[1].d_read", READER + 0x40),
        ("(table + 1)->d_read", READER + 0x40),
        ("table[head->key + 4].d_read == main + 0x40", 1),
        ("&table[1] - table", 1),
        ("(char *)&table[1] - (char *)table", 16),
        ("head->flags", 10),
        ("head->rate * 2", 5.0),
        ("head->key < 0 ? head->next->key : 1 / 0", 7),
        ("head && !head->next->next", 1),
        ("head->next->next && *head->next->next->name", 0),
        ("1 || far->key", 1),
        ("sizeof(struct node)", 40),
        ("sizeof(node_t)", 40),
        ("sizeof(struct row [3])", 48),
        ("sizeof head->name", 8),
        ("sizeof(head->name) + 1", 9),
        ("sizeof(far->next->name[1])", 1),
        ("sizeof *far", 40),
        ("sizeof (head)->name", 8),
        ("sizeof(char *) * 2", 16),
        ("sizeof -1", 8),
        ("offsetof(struct node, name)", 12),
        ("offsetof(node_t, name[3])", 15),
        ("offsetof(struct node, cells[2].d_read)", 72),
        ("(unsigned char)head->key", 253),
        ("(key_t)0x100000005", 5),
        ("(key_t)-1", -1),
        ("(node_t *)0 + 1", 40),
        ("(node *)0 + 1", 40),
        ("(long)(node_t *)8", 8),
        ("(node).key", -3),
        ("((struct node *)0xffffff8000300300)->key", 7),
        ("((struct node *)plain)->key", -3),
        ("(*(node_t **)&plain)->next->key", 7),
        ("plain + 8", BASE + 8),
        ("com.example.driver:_start + 1", READER + 1),
        ('"com.example.driver:_start"', READER),
        ('0 ? 1 : "com.example.driver:_start" - 0', READER),
        ('"-[Thing init:]" + 0', READER + 4),
        ("'A' + '\\n' - '\\x0a'", 65),
        ("'proc'", 0x70726F63),
        ("0xFFul & ~0x0FLL", 0xF0),
        ("- -3 - -(2)", 5),
        ("!0 << 3 | 1", 9),
        ("0xffffffffffffffff + 2", 1),
        ("0x7fffffffffffffff + 1", -(1 << 63)),
        ("-7 / 2 * 10 + -7 % 2", -31),
        ("1 ? 0 ? 2 : 3 : 4", 3),
        ("0", 0),
        (" \t1 +\n2 ", 3),
    ],
)
def test_values(scope, text, value):
    found = evaluate(text, scope)
    assert int(found) == value if not isinstance(value, float) else found.value() == value


def test_what_it_leads_to_may_be_a_place(scope):
    assert evaluate("head->next->name", scope).string() == "last"
    assert evaluate("*head", scope).address == NODE
    assert evaluate("head", scope).address == BASE
    assert evaluate("1 ? *head : node", scope).address == NODE
    assert evaluate("plain", scope).address == BASE
    assert repr(evaluate("&node.next", scope)) == f"(struct node **){NODE:#x}"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("table[1].d_read", READER + 0x40),
        ("table[1]", TABLE + 16),
        ("table[1].d_read + 4", READER + 0x44),
        ("head->name", NODE + 12),
        ("&head->key", NODE + 8),
        ("head->next", LAST),
        ("head + 0", NODE),
        ("*head", NODE),
        ("main", READER),
        ("plain", BASE),
        ("0x1000 * 3", 0x3000),
        ("node.key", (1 << 64) - 3),
        ("head->flags", 10),
    ],
)
def test_addresses(scope, text, address):
    assert address_of(text, scope) == address


def test_a_float_is_no_address(scope):
    with pytest.raises(ExpressionError, match="a double is no address"):
        address_of("head->rate", scope)


@pytest.mark.parametrize(
    ("text", "complaint", "column"),
    [
        ("", "expected a value, got the end", None),
        ("head->", "expected the name of a member, got the end", 6),
        ("head->5", "expected the name of a member, got '5'", 6),
        ("head key", "expected an operator, got 'key'", 5),
        ("(head", "expected '[)]', got the end", 5),
        ("head)", "expected an operator, got '[)]'", 4),
        ("table[1", "expected ']', got the end", 7),
        ("head = 1", "memory is never written, to compare write ==", 5),
        ("1 ? 2", "expected ':', got the end", 5),
        ("1 @ 2", "'@' means nothing here", 2),
        ("größe", "'ö' means nothing here", 2),
        ("010", "010 is ambiguous, write 0x10 or 10", 0),
        ("1.5", "1.5 is not an integer", 0),
        ("0x", "0x is not an integer", 0),
        ("1 + 0x10000000000000000", "has more than 64 bits", 4),
        ("9" * 50, "has more than 64 bits", 0),
        ("'abcde'", "expected 1 to 4 characters", 0),
        ("''", "expected 1 to 4 characters", 0),
        ("'€'", "is not ASCII", 0),
        ("offsetof(struct node)", "expected the name of a type", 9),
        ("offsetof(struct node, 3)", "expected the name of a member, got '3'", 22),
        ("sizeof", "expected a value", 6),
        ("(" * 100 + "1", "nested deeper than", 48),
        ("-" * 100 + "1", "nested deeper than", 48),
        ("1" + "+1" * 200, "more than 256 words", None),
    ],
)
def test_what_is_no_expression(scope, text, complaint, column):
    with pytest.raises(ExpressionError, match=complaint) as error:
        evaluate(text, scope)
    if column is not None:
        assert error.value.column == column
        assert error.value.__notes__ == [f"{text}\n{' ' * column}^"]


def test_the_length_is_bounded():
    with pytest.raises(ExpressionError, match="an expression of 5000 characters"):
        parse("x" * 5000, lambda name: False)


@pytest.mark.parametrize(
    ("text", "kind", "complaint", "column"),
    [
        ("1 + nonesuch->x", NotFoundError, "symbol nonesuch not found", 4),
        ("head->kee", NotFoundError, r"struct node\.kee not found \(did you mean key", 6),
        ("1 + head->key.x", NotFoundError, "key_t has no members", 14),
        ("(struct nod *)0", NotFoundError, "struct nod not found", 0),
        ("offsetof(node_t, kee)", NotFoundError, "kee not found", 0),
        ("far->key", FaultError, "is unmapped", 5),
        ("2 * (3 / 0)", KvmError, "division by zero", 7),
        ("node + 1", KvmError, "struct node is no number", 5),
        ("node[1]", KvmError, "has no elements", 4),
        ("&head->flags", KvmError, "is a bit-field", 0),
        ("&1", KvmError, "is a value", 0),
        ("*5", KvmError, "int is no pointer", 0),
        ("sizeof(head->flags)", KvmError, "is a bit-field", 0),
        ("sizeof(main)", KvmError, "has no size", 0),
        ("head & 7", KvmError, "cast to unsigned long first", 5),
        ("(node_t)head", KvmError, "cannot be cast", 0),
        ("plain->key", KvmError, "type of plain is not known", 7),
        ("*plain", KvmError, "type of plain is not known", 0),
    ],
)
def test_errors_show_their_place(scope, text, kind, complaint, column):
    with pytest.raises(kind, match=complaint) as error:
        int(evaluate(text, scope))
    assert error.value.__notes__ == [f"{text}\n{' ' * column}^"]


def test_sizeof_reads_nothing(scope):
    assert evaluate("sizeof(far->next->next->name[far->key])", scope).value() == 1
    assert evaluate("sizeof(head->next->key / (head->key - head->key))", scope).value() == 8
    assert scope.target.memory.reads == 0


def test_pointers_are_as_wide_as_the_machine():
    target = target_of(I386, {0x1000: struct.pack("<2I", 0x1004, 0xFFFFFFFF)})
    scope = HandScope(target, {"p": (Pointer(INT, 4), 0x1000), "n": (INT, 0x1004)})
    assert evaluate("sizeof(int *)", scope).value() == 4
    assert evaluate("p - 0x500", scope).value() == 0x1004 - 0x1400 + (1 << 32)
    assert address_of("n", scope) == 0xFFFFFFFF
    assert evaluate("*p", scope).value() == -1


@given(st.text(st.sampled_from("head->key.x[]()*&-+!~<>=?:,'\" 0123xA$")))
def test_any_text_is_an_expression_or_one_error(text):
    with contextlib.suppress(ExpressionError):
        assert parse(text, lambda name: name == "key").column <= len(text)


_OPERATORS = ("*", "/", "%", "+", "-", "<<", ">>", "<", "<=", ">", ">=", "==", "!=")
_OPERATORS += ("&", "^", "|", "&&", "||")


def _random_expression(rng):
    """Operands and operators without parentheses: their precedence alone decides."""
    parts = []
    for _ in range(rng.randint(1, 8)):
        before = "".join(rng.choice(["", "", "", "-", "~"]) for _ in range(2)).replace("--", "-~")
        parts += [f"{before}{rng.randint(0, 9)}LL"]
        parts += [
            rng.choice(
                [
                    "*",
                    "/",
                    "%",
                    "+",
                    "-",
                    "<<",
                    ">>",
                    "<",
                    "<=",
                    ">",
                    ">=",
                    "==",
                    "!=",
                    "&",
                    "^",
                    "|",
                    "&&",
                    "||",
                ]
            )
        ]
    parts.pop()
    if rng.random() < 0.2:
        parts += ["?", "11LL", ":", "12LL"]
    return " ".join(parts)


def test_a_compiler_computes_the_same(tmp_path, scope):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    rng = random.Random(5)
    values = {}
    while len(values) < 400:
        text = _random_expression(rng)
        try:
            values[text] = int(evaluate(text, scope))
        except KvmError:  # what C leaves undefined
            continue
    source = tmp_path / "expressions.c"
    lines = "\n".join(f'printf("%lld\\n", (long long)({text}));' for text in values)
    source.write_text(f"#include <stdio.h>\nint main(void) {{\n{lines}\nreturn 0;\n}}\n")
    program = tmp_path / "expressions"
    command = [compiler, "-w", "-O0", "-fwrapv", "-o", str(program), str(source)]
    subprocess.run(command, check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    assert list(values.values()) == [int(line) for line in output.split()]


def test_long_is_a_name_of_a_type(scope):
    assert evaluate("(unsigned long)-1", scope).value() == (1 << 64) - 1
    assert evaluate("(long)-1", scope).type.name == LONG.name
