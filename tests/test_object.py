"""Objects: typed, lazy references into memory."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvmtool
from kvmtool.arch.arm64 import ARM64E
from kvmtool.arch.ppc import PPC
from kvmtool.arch.x86 import I386, X86_64
from kvmtool.errors import FaultError, KvmError, NotFoundError
from kvmtool.object import Object, Untyped
from kvmtool.types.ctype import (
    Array,
    Compound,
    Enum,
    Field,
    Function,
    Opaque,
    Pointer,
    Qualified,
    Typedef,
    Void,
)
from tests import inputs
from tests.builders.typed import (
    BOOL,
    CHAR,
    DOUBLE,
    FLOAT,
    INT,
    LONG,
    SHORT,
    UCHAR,
    UINT,
    ULONG,
    HandTypes,
    target_of,
)

BASE = 0xFFFFFF8000300000
NEXT = BASE + 0x100
STATES = Enum("states", 4, [("SIDL", 1), ("SRUN", 2)], signed=False)


def proc_type():
    """A struct proc with an unnamed union, one with an unnamed struct in it, and bit-fields."""
    proc = Compound("struct", "proc", 48, lambda: fields)
    words = Compound("struct", None, 4, [Field("lo", SHORT, 0), Field("hi", SHORT, 2)])
    either = Compound("union", None, 8, [Field("flag", LONG, 0), Field(None, words, 0)])
    fields = [
        Field("next", Pointer(proc, 8), 0),
        Field("pid", Typedef("pid_t", INT), 8),
        Field("comm", Array(CHAR, 8), 12),
        Field(None, either, 24),
        Field("state", STATES, 32),
        Field("size", INT, 36),
        Field("low", UINT, 40, 0, 3),
        Field("high", INT, 40, 3, 6),
    ]
    return proc


def proc_bytes(follower, pid, comm, state=2):
    bits = 5 | 0x3F << 3  # low 5, high -1
    plain = struct.pack("<Qi8s4xqIiI", follower, pid, comm, -2, state, 77, bits)
    return plain.ljust(48, b"\0")


@pytest.fixture
def target():
    types = HandTypes(X86_64, {"proc": proc_type(), "states": STATES}, {"pid_t": INT})
    runs = {
        BASE: proc_bytes(NEXT, 1, b"launchd\0") + struct.pack("<2Q", BASE, 0),
        NEXT: proc_bytes(0, 2, b"longname", state=9),
    }
    return target_of(X86_64, runs, types)


@pytest.fixture
def proc(target):
    return Object(target, target.types.type("struct proc"), BASE)


def test_members_lead_to_members(proc):
    assert proc.next.next.pid.address == 8  # nothing is read of what lies at address 0
    assert proc.next.pid.value() == 2
    assert proc.next.comm.string() == "longname"
    assert proc.comm.string() == "launchd"
    assert proc.comm.value() == b"launchd\0"
    assert proc.pid.address == BASE + 8
    assert proc.pid.offset == 8
    assert proc.pid.size == 4
    assert proc.size == 48
    assert proc.next.deref().address == NEXT


def test_nothing_is_read_before_it_is_looked_at(target, proc):
    member = proc.pid
    assert (member.address, member.size, member.type.name) == (BASE + 8, 4, "pid_t")
    elements = proc.comm[3], proc.comm.address_of(), proc.next.address_of()
    assert elements[0].address == BASE + 15
    assert target.memory.reads == 0
    assert proc.next.pid == 2
    assert target.memory.reads == 2


def test_members_of_what_is_unnamed(proc):
    assert proc.flag.value() == -2
    assert (proc.lo.value(), proc.hi.value(), proc.hi.offset) == (-2, -1, 26)


def test_a_member_with_the_name_of_a_method(proc):
    assert proc.size == 48
    assert proc.member("size").value() == 77


def test_bit_fields(proc):
    assert (proc.low.value(), proc.high.value()) == (5, -1)
    assert repr(proc.low) == "(unsigned int)5"
    with pytest.raises(KvmError, match="high is a bit-field, it has no address"):
        proc.high.address_of()
    with pytest.raises(KvmError, match="bit-field"):
        proc.high.size  # noqa: B018


def test_bit_fields_of_a_big_endian_machine():
    """From the highest bit on: 0b101_11111 1_0000000 is 5, then six ones, then zeros."""
    fields = [
        Field("low", UINT, 0, 0, 3),
        Field("high", INT, 0, 3, 6),
        Field("last", UINT, 0, 9, 23),
    ]
    flags = Compound("struct", "flags", 4, fields)
    found = Object(target_of(PPC, {0x1000: b"\xbf\x80\0\x07"}), flags, 0x1000)
    assert found.value() == {"low": 5, "high": -1, "last": 7}
    assert (found.low.value(), found.high.value(), found.last.value()) == (5, -1, 7)


@given(st.data())
def test_bit_fields_tile_a_word_in_either_order(data):
    widths, left = [], 64
    while left:
        widths.append(data.draw(st.integers(1, left)))
        left -= widths[-1]
    word = data.draw(st.integers(0, (1 << 64) - 1))
    at, fields = 0, []
    for number, width in enumerate(widths):
        fields.append(Field(f"f{number}", ULONG, 0, at, width))
        at += width
    bits = f"{word:064b}"
    for arch, order in ((X86_64, "little"), (PPC, "big")):
        flags = Compound("struct", "flags", 8, fields)
        found = Object(target_of(arch, {0x1000: word.to_bytes(8, order)}), flags, 0x1000)
        for field in fields:
            start, end = field.bit_offset, field.bit_offset + field.bit_size
            digits = bits[start:end] if order == "big" else bits[64 - end : 64 - start]
            assert found.member(field.name).value() == int(digits, 2)
            assert found.value()[field.name] == int(digits, 2)


def test_values_of_every_kind(target, proc):
    value = proc.value()
    assert value["next"] == NEXT
    assert value["comm"] == b"launchd\0"
    assert (value["flag"], value["lo"], value["hi"]) == (-2, -2, -1)
    assert (value["low"], value["high"], value["state"]) == (5, -1, 2)
    blob = struct.pack("<fd?3s2h", 1.5, -0.25, True, b"abc", -1, 7)
    there = target_of(X86_64, {BASE: blob})

    def at(ctype, offset):
        return Object(there, ctype, BASE + offset).value()

    assert at(FLOAT, 0) == 1.5
    assert at(DOUBLE, 4) == -0.25
    assert at(BOOL, 12) is True
    assert at(Array(UCHAR, 3), 13) == b"abc"
    assert at(Array(SHORT, 2), 16) == [-1, 7]
    assert at(Array(Array(CHAR, 2), 2), 13) == [b"ab", b"c\xff"]
    assert at(Opaque(3), 13) == b"abc"
    assert at(Array(INT, None), 16) == []
    assert at(Array(Pointer(Void(), 8), 1), 0) == [int.from_bytes(blob[:8], "little")]
    assert at(Array(Typedef("two_t", Array(SHORT, 1)), 2), 16) == [[-1], [7]]


def test_enumerations_have_names(target, proc):
    assert proc.state.value() == 2
    assert proc.state.enumerator() == "SRUN"
    assert proc.next.state.enumerator() is None
    assert repr(proc.state) == "(enum states)SRUN"
    assert repr(proc.next.state) == "(enum states)9"
    with pytest.raises(KvmError, match="is no enumeration"):
        proc.pid.enumerator()


def test_signed_pointers_are_stripped():
    kernel = 0xFFFFFE0012345678
    signed = kernel ^ 0x00FF_8000_0000_0000 ^ 0x0080_0000_0000_0000  # bit 55 stays
    runs = {BASE: struct.pack("<Q", signed), kernel: struct.pack("<i", 42)}
    pointer = Object(target_of(ARM64E, runs), Pointer(INT, 8), BASE)
    assert pointer.value() == kernel
    assert pointer.deref().value() == 42
    given = Object(target_of(ARM64E, runs), Pointer(INT, 8), value=signed)
    assert given[0].value() == 42


def test_big_endian_and_narrow_machines():
    node = Compound("struct", "node", 8, lambda: fields)
    fields = [Field("next", Pointer(node, 4), 0), Field("key", INT, 4)]
    blob = struct.pack(">IiIi", 0x1008, -5, 0, 6)
    found = Object(target_of(PPC, {0x1000: blob}), node, 0x1000)
    assert (found.key.value(), found.next.key.value()) == (-5, 6)
    assert found.value() == {"next": 0x1008, "key": -5}
    assert Object(target_of(I386, {}), Pointer(INT, 4), value=-4)[0].address == 0xFFFFFFFC


def test_elements_forwards_and_backwards():
    numbers = struct.pack("<4i", 10, 11, 12, 13)
    target = target_of(X86_64, {BASE: numbers + struct.pack("<Q", BASE + 8)})
    array, pointer = Object(target, Array(INT, 4), BASE), Object(target, Pointer(INT, 8), BASE + 16)
    assert [element.value() for element in array] == [10, 11, 12, 13]
    assert len(array) == 4
    assert array[pointer[-1] - 9] == 12
    assert (pointer[1].value(), pointer[-2].value()) == (13, 10)
    assert (pointer + 1).deref() == 13
    assert (pointer - array).value() == 2
    assert array.deref() == 10
    assert array[-1].address == BASE - 4
    with pytest.raises(KvmError, match=r"int \* has no length"):
        len(pointer)
    with pytest.raises(KvmError, match="expected an integer"):
        array[Object(target, DOUBLE, value=1.0)]


def test_casts_and_containers(target, proc):
    link = proc.pid.address_of()
    assert repr(link) == f"(pid_t *){BASE + 8:#x}"
    back = link.container_of("struct proc", "pid")
    assert repr(back) == f"(struct proc *){BASE:#x}"
    assert back.comm.string() == "launchd"
    assert proc.hi.container_of("struct proc", "hi").value() == BASE
    assert proc.comm[2].address_of().container_of("proc", "comm[2]").value() == BASE
    assert proc.pid.cast("char").value() == 1
    assert proc.flag.cast("unsigned char").value() == 0xFE
    assert proc.flag.cast("struct proc *").value() == (1 << 64) - 2
    assert proc.next.cast("long").value() == NEXT - (1 << 64)
    assert proc.state.cast("_Bool").value() is True
    assert proc.comm.cast("char *").string() == "launchd"
    for wanted in ("struct proc", "char[4]", "void"):
        with pytest.raises(KvmError, match="cannot be cast"):
            proc.pid.cast(wanted)


def test_what_has_no_known_type(target):
    pointer = Object(target, Untyped("_last"), BASE + 48)
    for use in (
        pointer.value,
        pointer.string,
        pointer.deref,
        lambda: pointer.pid,
        lambda: pointer[0],
        lambda: len(pointer),
        lambda: pointer.size,
        lambda: pointer.container_of("struct proc", "pid"),
    ):
        with pytest.raises(KvmError, match=r"type of _last is not known: cast it, e\.g\. \(struct"):
            use()
    assert repr(pointer) == f"<_last at {BASE + 48:#x}, type not known>"
    assert pointer.cast("struct proc *").pid == 1
    assert pointer.address_of().value() == BASE + 48
    assert (pointer + 8).value() == BASE + 56
    opaque = Object(target, Opaque(8), BASE + 48)
    assert opaque.cast("struct proc *").pid == 1
    with pytest.raises(KvmError, match="has 0x8 bytes before what comes next, struct proc 0x30"):
        opaque.cast("struct proc")
    with pytest.raises(KvmError, match=r"is not known: cast it, e\.g\. \(int\)"):
        opaque + 1


def test_it_computes_as_c_does(target, proc):
    def number(ctype, value):
        return Object(target, ctype, value=value)

    assert (number(INT, 7) / -2).value() == -3
    assert (number(INT, -7) % 3).value() == -1
    assert (number(ULONG, 1) - 2).value() == (1 << 64) - 1
    assert (number(LONG, (1 << 63) - 1) + 1).value() == -(1 << 63)
    assert (1 << number(INT, 63)).value() == -(1 << 63)
    assert (number(INT, -1) >> 1).value() == -1
    assert (number(ULONG, -1) >> 63).value() == 1
    assert (~number(UINT, 0)).value() == -1
    assert (-number(INT, 5)).value() == -5
    assert number(INT, -1) > number(ULONG, 1)
    assert number(INT, -1) < number(UINT, 1)
    assert (number(INT, 3) * 0.5).value() == 1.5
    assert number(INT, 0x1_0000_0002).value() == 2
    assert (10 - proc.pid, 6 & number(INT, 3), 6 ^ number(INT, 3)) == (9, 2, 5)
    assert (proc.next - 1).value() == NEXT - 48
    assert proc.next == NEXT
    assert proc.next
    assert not proc.next.next
    assert int(proc.pid) == float(proc.pid) == 1
    assert hex(proc.pid) == "0x1"
    assert proc.pid != "1"
    assert (proc.pid == None) is False  # noqa: E711


@pytest.mark.parametrize(
    ("compute", "complaint"),
    [
        (lambda proc: proc.pid / 0, "division by zero"),
        (lambda proc: proc.pid % 0, "division by zero"),
        (lambda proc: proc.pid << 64, "a shift by 64, expected 0 to 63"),
        (lambda proc: proc.pid << -1, "a shift by -1"),
        (lambda proc: proc.next & 7, "cast to unsigned long first"),
        (lambda proc: proc.next + proc.next, "no such arithmetic on pointers"),
        (lambda proc: proc.next - proc.comm, "not of one size"),
        (lambda proc: proc + 1, "struct proc is no number"),
        (lambda proc: proc == 1, "struct proc is no number"),
        (lambda proc: proc.pid + (1 << 64), "has more than 64 bits"),
        (lambda proc: proc[0], "struct proc has no elements"),
        (lambda proc: proc.deref(), "struct proc is no pointer"),
        (lambda proc: proc.next.cast("void *").deref(), "points at nothing known"),
        (lambda proc: proc.pid.string(), "pid_t is no text|int is no text"),
        (lambda proc: (proc.pid + 1).address_of(), "is a value, it has no address"),
        (lambda proc: proc.container_of("struct proc", "pid + 1"), "expected members"),
        (lambda proc: proc.container_of("struct proc", "pid[1]"), "is no array"),
        (lambda proc: Object(proc.pid._target, INT), "an address or a value"),
    ],
)
def test_what_c_refuses(proc, compute, complaint):
    with pytest.raises(KvmError, match=complaint):
        compute(proc)


def test_a_missing_member_names_its_neighbours(proc):
    with pytest.raises(NotFoundError) as error:
        proc.next.com  # noqa: B018
    assert (error.value.kind, error.value.name) == ("member", "struct proc.com")
    assert error.value.near == ("comm",)
    with pytest.raises(NotFoundError, match="pid_t has no members"):
        proc.pid.x  # noqa: B018
    assert not hasattr(proc, "p_pid")
    assert getattr(proc, "p_pid", None) is None
    assert {"pid", "lo", "value"} <= set(dir(proc)) & set(dir(proc.next))


def test_unreadable_memory_has_the_right_address(target):
    missing = BASE + 0x2000
    proc = Object(target, Pointer(target.types.type("proc"), 8), value=missing)
    for look, address in (
        (lambda: proc.comm.value(), missing + 12),
        (lambda: proc.high == 1, missing + 40),
    ):
        with pytest.raises(FaultError) as fault:
            look()
        assert fault.value.address == address
    straddling = Object(target, target.types.type("proc"), BASE + 0x20)
    with pytest.raises(FaultError) as fault:
        straddling.value()
    assert fault.value.address == BASE + 64
    assert (
        repr(proc.pid)
        == f"<pid_t: kernel address {missing + 8:#x} is unmapped (reading 0x4 bytes)>"
    )


def test_a_declaration_is_completed_from_the_table(target):
    forward = Pointer(Compound("struct", "proc", None), 8)
    assert Object(target, forward, value=BASE).comm.string() == "launchd"
    assert Object(target, forward, value=BASE)[0].size == 48
    for use in (lambda x: x.pid, lambda x: x[1], lambda x: x.deref().value()):
        with pytest.raises(
            KvmError, match=r"struct nothing is declared, but its members are not in"
        ):
            use(Object(target, Pointer(Compound("struct", "nothing", None), 8), value=BASE))


def test_hostile_counts_cost_nothing(target):
    huge = Object(target, Array(INT, 1 << 31), BASE)
    assert next(iter(huge)).value() == NEXT & 0xFFFFFFFF
    with pytest.raises(KvmError, match="has 0x200000000 bytes, expected at most 0x1000000"):
        huge.value()
    empty = Compound("struct", "empty", 0)
    with pytest.raises(KvmError, match="more than 0x100000 parts"):
        Object(target, Array(empty, 1 << 40), BASE).value()
    with pytest.raises(KvmError, match="has no length"):
        len(Object(target, Array(empty, 1 << 64), BASE))


def test_hostile_nests_end(target):
    nest = Compound("struct", "leaf", 0)
    for _ in range(40):
        nest = Compound("struct", None, 0, [Field(None, nest, 0), Field(None, nest, 0)])
    found = Object(target, nest, BASE)
    for look in (lambda: found.x, found.value, lambda: list(found.members())):
        with pytest.raises(KvmError, match=r"nested without end|more than 0x100000 parts"):
            look()
    outside = Compound("struct", "s", 8, [Field("x", INT, 0x7000_0000_0000_0000)])
    with pytest.raises(KvmError, match="has 0x8 bytes, but a member at 0x7"):
        Object(target, outside, BASE).value()
    wide = Compound("struct", "s", 8, [Field("x", INT, 0, 0, 1 << 40)])
    with pytest.raises(KvmError, match="bits at bit 0 are no number's"):
        Object(target, wide, BASE).x.value()


def test_text_is_read_no_further_than_its_end():
    runs = {BASE: b"abc\0".ljust(64), BASE + 0x100: struct.pack("<Q", BASE)}
    target = target_of(X86_64, runs)
    assert Object(target, Array(CHAR, 64), BASE).string() == "abc"
    assert Object(target, Array(CHAR, None), BASE).string() == "abc"
    assert Object(target, Pointer(Qualified("const", CHAR), 8), BASE + 0x100).string() == "abc"
    assert repr(Object(target, Array(CHAR, 4), BASE)) == '(char[4])"abc"'
    runs = {BASE: b'"\\\n\xff\xc2\x85\0'.ljust(64)}
    assert (
        repr(Object(target_of(X86_64, runs), Array(CHAR, 9), BASE)) == r'(char[9])"\"\\\n\xff\x85"'
    )


def test_functions_and_arrays_stand_for_their_address(target):
    function = Object(target, Function(INT, [INT]), BASE)
    assert (function.address_of().value(), int(function)) == (BASE, BASE)
    assert function.deref().address == BASE
    assert repr(function) == f"*(int (*)(int)){BASE:#x}"
    assert int(Object(target, Array(INT, 2), BASE)) == BASE
    with pytest.raises(KvmError, match="has no value"):
        function.value()


def test_the_shape_of_c(target, proc):
    assert repr(proc) == f"*(struct proc *){BASE:#x}"
    assert repr(proc.next) == f"(struct proc *){NEXT:#x}"
    assert repr(proc.pid) == "(pid_t)1"
    assert repr(Object(target, Array(INT, 2), BASE)) == f"*(int (*)[2]){BASE:#x}"
    assert bytes(proc.pid) == b"\x01\0\0\0"


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_the_kernels_own_variables(dump):
    truth = inputs.truth(dump)
    with kvmtool.open(inputs.real(f"dumps/{dump}/mach_kernel"), inputs.plain_core(dump)) as kvm:
        assert kvm["_allproc"].address == truth["symbols"]["allproc"]
        first = kvm["allproc"].lh_first
        newest = next(p for p in truth["processes"] if p["pid"] == truth["allproc"][0])
        assert first.value() == newest["address"]
        assert first.p_comm.string() == newest["comm"]
        with pytest.raises(NotFoundError, match="nonesuch"):
            kvm["nonesuch"]
        assert "allproc" in kvm
        assert "nonesuch" not in kvm
        assert kvm.evaluate("sizeof(kernproc->p_comm)") == 17


def test_a_kernels_file_alone():
    with kvmtool.open(inputs.real("dumps/x86_64-10.8.5/mach_kernel")) as kvm:
        assert kvm["version"].string().startswith("Darwin Kernel Version 12.5.0")
