"""Declarations, held against the one judge of C: a compiler.

Every type is written twice: by `declare`, and as a chain of typedefs with one step each, which
leaves nothing to get wrong. The compiler says whether the two are the same type.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time

import pytest

from kvmtool.errors import KvmError
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)
from kvmtool.types.declare import declare

INT = Base("int", 4)
CHAR = Base("char", 1, "char")
PROC = Compound("struct", "proc", 8)
CLANG = shutil.which("clang-14") or shutil.which("clang")

HEAD = """
struct proc { int p_pid; int p_flag; };
union sigval { int sival_int; void *sival_ptr; };
enum vtype { VNON, VREG };
typedef int dev_t;
typedef struct proc *proc_t;
typedef int row_t[4];
typedef int handler_t(int);
"""
LEAVES = (
    INT,
    CHAR,
    Base("unsigned long", 8, signed=False),
    PROC,
    Compound("union", "sigval", 8),
    Enum("vtype", 4),
    Typedef("dev_t", INT),
    Typedef("proc_t", Pointer(PROC, 8)),
)


class Chain:
    """The typedefs, a step each, that make a type."""

    def __init__(self):
        self.lines, self.count = [], 0

    def name(self, text):
        """A new name for what `text` declares with {} in the place of the name."""
        self.count += 1
        self.lines.append(f"typedef {text.format(f'T{self.count}')};")
        return f"T{self.count}"

    def of(self, ctype):
        """The name of `ctype`."""
        if isinstance(ctype, (Pointer, Array, Qualified)):
            target = self.of(ctype.target)
            if isinstance(ctype, Pointer):
                return self.name(f"{target} *{{}}")
            if isinstance(ctype, Array):
                return self.name(f"{target} {{}}[{ctype.count}]")
            return self.name(f"{ctype.qualifier} {target} {{}}")
        if isinstance(ctype, Function):
            words = None if ctype.parameters is None else [self.of(p) for p in ctype.parameters]
            if words is not None:
                words = ", ".join([*words, *["..."] * ctype.variadic]) or "void"
            return self.name(f"{self.of(ctype.result)} {{}}({words or ''})")
        tag = ctype.kind + " " if isinstance(ctype, (Compound, Enum)) else ""
        return f"{tag}{ctype.name or ctype.kind}"


def random_type(rng, depth, *, element=False, result=False, parameter=False):
    """A type that C has: no array of functions, no function that returns an array."""
    if depth == 0:
        return rng.choice(LEAVES)
    kinds = ["pointer", "pointer", "qualified"]
    if not result and not parameter:
        kinds.append("array")
    if not element and not result and not parameter:
        kinds.append("function")
    kind = rng.choice(kinds)
    if kind == "pointer":
        if depth == 1 and rng.random() < 0.2:
            return Pointer(Void(), 8)
        return Pointer(random_type(rng, depth - 1), 8)
    if kind == "array":
        return Array(random_type(rng, depth - 1, element=True), rng.randint(1, 9))
    if kind == "function":
        count = rng.choice([None, 0, 1, 2, 3])
        taken = None
        if count is not None:
            taken = [random_type(rng, rng.randint(0, 3), parameter=True) for _ in range(count)]
        variadic = bool(taken) and rng.random() < 0.3
        return Function(random_type(rng, depth - 1, result=True), taken, variadic)
    inner = random_type(rng, depth - 1, element=True, result=result, parameter=parameter)
    return Qualified(rng.choice(["const", "volatile"]), inner)


def compile_all(pairs):
    """Let clang judge: each pair is a type and its declarations, of a name and of none."""
    chain, checks = Chain(), []
    for number, (ctype, named, bare) in enumerate(pairs):
        truth = chain.of(ctype)
        checks.append(f"extern {named};")
        for text in (f"__typeof__(v{number})", f"__typeof__({bare})"):
            same = f"_Generic(({truth} *)0, {text} *: 1, default: 0)"
            checks.append(f'_Static_assert({same}, "{bare}");')
    source = "\n".join([HEAD, *chain.lines, *checks, ""])
    done = subprocess.run(
        [CLANG, "-target", "x86_64-apple-macosx10.9", "-fsyntax-only", "-w", "-x", "c", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:4000]


def checked(types):
    """Judge `types`; the bare declarations, in order."""
    pairs = [(t, declare(t, f"v{n}"), declare(t)) for n, t in enumerate(types)]
    compile_all(pairs)
    return [bare for _, _, bare in pairs]


@pytest.mark.skipif(CLANG is None, reason="no clang")
@pytest.mark.parametrize("seed", range(4))
def test_random_types_are_what_the_compiler_reads(seed):
    rng = random.Random(seed)
    types = [random_type(rng, rng.randint(1, 7)) for _ in range(500)]
    bare = checked(types)
    for mark in ("(*", ")[", ")(", "*const", "...", "const struct proc"):
        assert any(mark in text for text in bare), mark


@pytest.mark.skipif(CLANG is None, reason="no clang")
def test_what_kernels_declare():
    uio = Pointer(Compound("struct", "uio", 100), 8)
    read = Function(INT, [Typedef("dev_t", INT), uio, INT])
    handler = Pointer(Function(Void(), [INT]), 8)
    known = {
        "int (*)(dev_t, struct uio *, int)": Pointer(read, 8),
        "int (*[11])(dev_t, struct uio *, int)": Array(Pointer(read, 8), 11),
        "int (*)[4]": Pointer(Array(INT, 4), 8),
        "int *[4]": Array(Pointer(INT, 8), 4),
        "int (*(*)[3])(dev_t, struct uio *, int)": Pointer(Array(Pointer(read, 8), 3), 8),
        "void (*(*)(int, void (*)(int)))(int)": Pointer(Function(handler, [INT, handler]), 8),
        "char *const *": Pointer(Qualified("const", Pointer(CHAR, 8)), 8),
        "const char *": Pointer(Qualified("const", CHAR), 8),
        "const volatile int": Qualified("const", Qualified("volatile", INT)),
        "int *const volatile": Qualified("const", Qualified("volatile", Pointer(INT, 8))),
        "const int[2][3]": Qualified("const", Array(Array(INT, 3), 2)),
        "const int (*)[2]": Pointer(Qualified("const", Array(INT, 2)), 8),
        "int ()": Function(INT),
        "int (void)": Function(INT, []),
        "int (int, ...)": Function(INT, [INT], variadic=True),
        "int (*(int))[2]": Function(Pointer(Array(INT, 2), 8), [INT]),
    }
    assert checked(known.values()) == list(known)


def test_of_a_name():
    read = Function(INT, [INT])
    assert declare(Array(Pointer(read, 8), 3), "d_read") == "int (*d_read[3])(int)"
    assert declare(Array(CHAR, 17), "p_comm") == "char p_comm[17]"
    assert declare(Array(INT, None), "tail") == "int tail[]"
    assert declare(Qualified("const", Pointer(INT, 8)), "p") == "int *const p"
    assert declare(PROC, "p") == "struct proc p"
    assert declare(Compound("struct", None, 4), "p") == "struct {...} p"


def test_bytes_of_no_known_type_are_an_array():
    assert declare(Opaque(16), "x") == "unsigned char x[16]"
    assert declare(Pointer(Opaque(16), 8), "x") == "unsigned char (*x)[16]"
    assert declare(Array(Opaque(16), 2), "x") == "unsigned char x[2][16]"


def test_a_type_that_leads_to_itself():
    def again():
        return loop

    loop = Pointer(again, 8)
    with pytest.raises(KvmError, match="leads on through more than 64"):
        declare(loop, "x")
    for kind in (lambda: Array(again, 2), lambda: Qualified("const", again)):
        loop = kind()
        with pytest.raises(KvmError, match="leads on"):
            declare(loop, "x")
    loop = Typedef("x_t", again)
    assert declare(loop, "x") == "x_t x"


def test_functions_of_functions_are_cut_off_early():
    wide = Function(INT, [INT] * 100)
    for _ in range(20):
        wide = Function(INT, [wide] * 100)
    began = time.monotonic()
    text = declare(wide, "f")
    assert text.endswith("...)")
    assert len(text) < 10_000
    assert time.monotonic() - began < 1

    def again():
        return loop

    loop = Function(INT, lambda: [Pointer(again, 8)])
    assert "..." in declare(loop, "f")
