"""A dSYM as large as a kernel's: one unit of a thousand structures, linked many times over."""

from __future__ import annotations

import os
import random

from tests.builders import dwarf

STRUCTURES = 1000
_PROC = """struct proc {
  struct { struct proc *le_next, **le_prev; } p_list; pid_t p_pid; struct task *task;
  char p_comm[17]; struct structure_0 *first;
};"""


def source() -> str:
    """A C file whose structures have some members of each sort that a kernel's have."""
    chance = random.Random(1)
    out = ["typedef int pid_t; typedef unsigned int u_int; typedef unsigned long u_long;"]
    for index in range(STRUCTURES):
        members = []
        for number in range(chance.randrange(3, 24)):
            name, other = f"s{index}_member{number}", f"structure_{chance.randrange(index + 1)}"
            bits, count = chance.randrange(1, 32), chance.randrange(1, 99)
            sorts = [
                f"struct {other} *{name};",
                f"u_int {name}:{bits};",
                f"int (*{name})(struct {other} *, int, u_long);",
                f"char {name}[{count}];",
                f"pid_t {name};",
                f"int {name};",
            ]
            members.append(chance.choice(sorts))
        out.append(f"struct structure_{index} {{ {' '.join(members)} }};")
    out.append(_PROC + " struct proc *allproc;")
    out += [f"struct structure_{index} *keep_{index};" for index in range(STRUCTURES)]
    for index in range(STRUCTURES // 4):
        out.append(
            f"int func_{index}(struct structure_{index} *p, int a) {{ int local = a; "
            f"struct structure_{index * 3} *q = keep_{index}; return local + (q != (void *)p); }}"
        )
    return "\n".join(out)


def write_dsym(folder: str, size: int) -> str:
    """Path of a dSYM of about `size` bytes, DWARF 4, x86_64."""
    flags = ("-target", "x86_64-apple-macos10.13", "-gdwarf-4")
    path = dwarf.compiled(folder, source(), *flags)
    one = os.path.getsize(dwarf.dsym(folder, [path]))
    two = os.path.getsize(dwarf.dsym(folder, [path, path]))
    return dwarf.dsym(folder, [path] * (1 + (size - one) // (two - one)))
