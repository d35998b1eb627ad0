"""Random C structures, laid out and filled by clang: what a reader of types must agree with.

A `Program` is written as C; its members' places come from the compiler's own record layouts, and
the bytes of its initialised variables from the object file it makes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import NamedTuple

from kvmtool.types.ctype import Array, Base, Compound, Enum, Field, Function, Pointer, Void
from kvmtool.types.declare import declare

CLANG = shutil.which("clang-14") or shutil.which("clang")
OBJCOPY = shutil.which("llvm-objcopy") or shutil.which("llvm-objcopy-14")

# name -> (clang's name, byte order, bytes of a pointer)
TARGETS = {
    "x86_64": ("x86_64-linux-gnu", "<", 8),
    "i386": ("i386-linux-gnu", "<", 4),
    "ppc": ("powerpc-linux-gnu", ">", 4),
    "ppc64": ("powerpc64-linux-gnu", ">", 8),
    "arm64": ("aarch64-linux-gnu", "<", 8),
}
_LAYOUT = re.compile(r"Type: \w+ (\w+)\n.*?Size:(\d+).*?FieldOffsets: \[(.*?)\]", re.DOTALL)
_VALUES = (("KVM_NONE", 0), ("KVM_ONE", 1), ("KVM_MANY", 1000))


class Member(NamedTuple):
    """A member as declared; `of` is a type or the tag of an earlier structure; None has no name."""

    name: str | None
    of: object
    bits: int | None = None


class Record(NamedTuple):
    """A struct or union as declared."""

    kind: str
    tag: str
    members: list[Member]
    packed: bool = False


class Program:
    """Random structures for one of `TARGETS`, and values for a variable of each."""

    def __init__(self, rng, target, count):
        self.rng, self.target = rng, target
        self.triple, self.byteorder, self.pointer = TARGETS[target]
        self.records, self.free, self.names = {}, [], 0
        for number in range(count):
            self._record(f"T{number}")

    # declaring

    def leaves(self):
        wide = [Base("__int128", 16)] if self.pointer == 8 else []
        signed = [("signed char", 1, "char"), ("short", 2), ("int", 4), ("long long", 8)]
        unsigned = [("unsigned char", 1, "char"), ("unsigned int", 4), ("unsigned long long", 8)]
        return [
            *(Base(*kind) for kind in signed),
            *(Base(kind[0], kind[1], *kind[2:] or ("int",), signed=False) for kind in unsigned),
            Base("long", self.pointer),
            Base("_Bool", 1, "bool", signed=False),
            Base("float", 4, "float"),
            Base("double", 8, "float"),
            Pointer(Void(), self.pointer),
            Pointer(Function(Void(), [Base("int", 4)]), self.pointer),
            Enum("kvm_kind", 4, _VALUES, signed=False),
            *wide,
        ]

    def _name(self):
        self.names += 1
        return f"m{self.names}"

    def _record(self, tag):
        rng = self.rng
        kind = rng.choice(["struct", "struct", "struct", "union"])
        members = []
        for _ in range(rng.randint(1, 7)):
            choice = rng.random()
            if choice < 0.3:
                base = rng.choice([b for b in self.leaves() if self._has_bits(b)])
                members.append(Member(self._name(), base, rng.randint(1, 8 * base.size)))
            elif choice < 0.4 and self.free:
                members.append(Member(None, self.free.pop()))
            elif choice < 0.5 and self.records:
                members.append(Member(self._name(), rng.choice(list(self.records))))
            else:
                members.append(Member(self._name(), self._with_arrays(rng.choice(self.leaves()))))
        self.records[tag] = Record(kind, tag, members, rng.random() < 0.15)
        if rng.random() < 0.4:  # to be a member without a name, once
            self.free.append(tag)

    def _has_bits(self, ctype):
        return isinstance(ctype, Base) and ctype.form == "int" and ctype.size <= 8

    def _with_arrays(self, ctype):
        for _ in range(self.rng.choice([0, 0, 0, 1, 2])):
            ctype = Array(ctype, self.rng.randint(1, 4))
        return ctype

    def source(self):
        """The program, with a filled variable for each structure, in a section of its own."""
        lines = [f"enum kvm_kind {{ {', '.join(f'{n} = {v}' for n, v in _VALUES)} }};"]
        for record in self.records.values():
            packed = " __attribute__((packed))" if record.packed else ""
            lines.append(f"{record.kind}{packed} {record.tag} {{")
            for name, of, bits in record.members:
                width = "" if bits is None else f":{bits}"
                lines.append(f"  {self._declared(of, name)}{width};")
            lines.append("};")
        self.expected = {}
        for tag, record in self.records.items():
            text, self.expected[tag] = self._value(tag)
            lines.append(f'_Static_assert(sizeof({record.kind} {tag}) + 1, "");')  # lays it out
            where = f'__attribute__((used, section("{tag}")))'
            lines.append(f"{where} {record.kind} {tag} v_{tag} = {text};")
        return "\n".join([*lines, ""])

    def _declared(self, of, name):
        if isinstance(of, str):
            return f"{self.records[of].kind} {of} {name or ''}"
        return declare(of, name)

    # values

    def _value(self, of, bits=None):
        """The initialiser, and what Python should read."""
        rng = self.rng
        if isinstance(of, str):
            texts, values = self._members(self.records[of])
            return f"{{ {', '.join(texts)} }}", values
        if isinstance(of, Array):
            pairs = [self._value(of.target) for _ in range(of.count)]
            values = [value for _, value in pairs]
            if isinstance(of.target, Base) and of.target.form == "char":
                values = bytes(value & 0xFF for value in values)
            return f"{{ {', '.join(text for text, _ in pairs)} }}", values
        if isinstance(of, Enum):
            name, _ = rng.choice(of.values)
            return name, name
        if isinstance(of, Pointer):
            value = rng.getrandbits(8 * of.size)
            return f"(void *){value:#x}ull", value
        if of.form == "float":
            value = rng.randint(-1000, 1000) / 8
            return repr(value), value
        size = 1 if of.form == "bool" else 8 * of.size if bits is None else bits
        value = rng.getrandbits(size)
        if of.signed:
            value -= 1 << (size - 1)
        low = f"(__int128){value >> 64}ll << 64 | {value & (1 << 64) - 1:#x}ull"
        return (low if of.size == 16 else f"({of.name}){value & (1 << 64) - 1:#x}ull"), value

    def _members(self, record):
        chosen = [self.rng.choice(record.members)] if record.kind == "union" else record.members
        texts, values = [], {}
        for name, of, bits in chosen:
            if name is None:
                inner, below = self._members(self.records[of])
                texts += inner
                values.update(below)
            else:
                text, values[name] = self._value(of, bits)
                texts.append(f".{name} = {text}")
        return texts, values

    # what the compiler says

    def compile(self, folder):
        """(the structures as types by tag, their variables' bytes, the values in these)."""
        path = os.path.join(folder, "program.c")
        with open(path, "w") as out:
            out.write(self.source())
        command = [CLANG, "-target", self.triple, "-fms-extensions", "-w", path]
        printed = _run([*command, "-fsyntax-only", "-Xclang", "-fdump-record-layouts-simple"])
        layouts = {}
        for tag, size, offsets in _LAYOUT.findall(printed):
            layouts[tag] = (int(size) // 8, [int(word) for word in offsets.split(",") if word])
        _run([*command, "-c", "-o", path + ".o"])
        dumps = [f"--dump-section={tag}={folder}/{tag}" for tag in self.records]
        _run([OBJCOPY, *dumps, path + ".o", path + ".copy"])
        data = {}
        for tag in self.records:
            with open(f"{folder}/{tag}", "rb") as section:
                data[tag] = section.read()
        return self._types(layouts), data, self.expected

    def _types(self, layouts):
        types = {}
        for tag, record in self.records.items():
            size, offsets = layouts[tag]
            fields = []
            for (name, of, bits), start in zip(record.members, offsets, strict=True):
                ctype = types[of] if isinstance(of, str) else of
                if bits is None:
                    assert start % 8 == 0
                    fields.append(Field(name, ctype, start // 8))
                else:  # counted from the unit's byte or from the first, as readers do either
                    unit = start // 8 // ctype.size * ctype.size
                    fields.append(Field(name, ctype, unit, start - 8 * unit, bits))
            types[tag] = Compound(record.kind, tag, size, fields)
        return types


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout
