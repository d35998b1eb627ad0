"""CTF: every kind and version, built by hand; a real kernel's and a real object's; damage."""

from __future__ import annotations

import struct
import time
import zlib

import pytest

from kvmtool.errors import FormatError, KvmWarning, MismatchError, TruncatedError, UnsupportedError
from kvmtool.macho import MachO
from kvmtool.source import BytesSource, FileSource
from kvmtool.types.ctf import ctf_of, is_ctf, open_ctf
from kvmtool.types.ctf_format import CtfBody
from kvmtool.types.ctf_index import NameIndex
from kvmtool.types.ctf_variables import External
from kvmtool.types.ctype import (
    Base,
    Compound,
    Enum,
    Field,
    Function,
    Pointer,
    Qualified,
    Typedef,
    Void,
    unqualified,
)
from kvmtool.types.declare import declare
from kvmtool.types.dwarf import open_dwarf
from kvmtool.types.model import TypeTable
from tests.builders import ctf as build
from tests.builders import macho as images
from tests.inputs import real

FORMS = [(2, "<"), (2, ">"), (3, "<"), (4, "<"), (4, ">")]
OBJECT = "objects/x86_64-xnu-2422.115.4-kern_proc.o"
KERNEL_CTF = "types/x86_64-xnu-2422.115.4.ctfdata"
KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"


def types_of(ctf: build.Ctf, compress: bool = False, **more):
    return open_ctf(BytesSource(ctf.build(compress), "made.ctf"), **more)


def some_of_each(version: int, order: str) -> build.Ctf:
    """One type of every kind, two structures, a large one."""
    ctf = build.Ctf(version, order)
    integer = ctf.integer("int", 4, build.SIGNED)
    char = ctf.integer("char", 1, build.SIGNED | build.CHAR)
    ctf.integer("unsigned long", 8)
    three = ctf.integer("unsigned int", 4, bits=3)
    flag = ctf.integer("_Bool", 1, build.BOOL)
    real = ctf.float("double", 8)
    color = ctf.enum("color", 4, [("RED", 0), ("GREEN", -1)])
    name = ctf.array(char, 17)
    forward = ctf.forward("task")
    pid_t = ctf.refer(build.TYPEDEF, integer, "pid_t")
    constant = ctf.refer(build.CONST, char)
    text = ctf.refer(build.POINTER, constant)
    callback = ctf.refer(build.POINTER, ctf.function(integer, [text, 0]))
    link = ctf.refer(build.POINTER, callback + 2)
    inner = ctf.compound(build.UNION, "", 8, [("u_link", link, 0), ("u_real", real, 0)])
    ctf.compound(
        build.STRUCT,
        "proc",
        80,
        [
            ("p_pid", pid_t, 0),
            ("p_low", three, 32),
            ("p_mid", three, 35),
            ("p_color", color, 38),
            ("p_flag", flag, 64),
            ("p_comm", name, 72),
            ("", inner, 256),
            ("p_call", callback, 320),
            ("task", ctf.refer(build.POINTER, forward), 384),
        ],
    )
    many = ctf.array(integer, 0x8000, 0x20000)
    ctf.compound(build.STRUCT, "large", 0x20010, [("head", link, 0), ("all", many, 64)])
    return ctf


@pytest.mark.parametrize(("version", "order"), FORMS)
@pytest.mark.parametrize("compress", [False, True])
def test_every_kind(version: int, order: str, compress: bool) -> None:
    source = types_of(some_of_each(version, order), compress)
    assert (source.byteorder, source.pointer_size) == (order, 8)
    table = TypeTable(source)
    assert source.origin == f"CTF {version} in made.ctf"
    proc = table.type("struct proc")
    assert isinstance(proc, Compound)
    assert (proc.kind, proc.size) == ("struct", 80)
    fields = {field.name: field for field in proc.fields}
    assert [field.offset for field in proc.fields] == [0, 4, 4, 4, 8, 9, 32, 40, 48]
    assert declare(fields["p_pid"].type, "p_pid") == "pid_t p_pid"
    assert fields["p_low"][3:] == (0, 3)
    assert fields["p_mid"][3:] == (3, 3)
    assert fields["p_flag"].bit_size is None
    assert declare(fields["p_comm"].type, "p_comm") == "char p_comm[17]"
    assert declare(fields["p_call"].type, "p_call") == "int (*p_call)(const char *, ...)"
    assert isinstance(fields[None].type, Compound)
    assert fields[None].type.kind == "union"
    assert table.offset("proc", "u_real") == 32
    task = unqualified(fields["task"].type).target
    assert (task.name, task.size) == ("task", None)
    large = table.struct("large")
    assert large.size == 0x20010
    assert large.members["all"].offset == 8
    assert table.type("struct large").fields[1].type.size == 0x20000
    double = table.type("double")
    assert isinstance(double, Base)
    assert (double.size, double.form) == (8, "float")


@pytest.mark.parametrize(("version", "order"), FORMS)
def test_enumerations_and_their_bit_fields(version: int, order: str) -> None:
    table = TypeTable(types_of(some_of_each(version, order)))
    color = table.type("enum color")
    assert isinstance(color, Enum)
    assert (color.size, list(color.values)) == (4, [("RED", 0), ("GREEN", -1)])
    # the next member begins at bit 64: 26 bits from 38 on, in the 32 that begin at byte 4
    (field,) = (f for f in table.type("struct proc").fields if f.name == "p_color")
    assert field == Field("p_color", color, 4, 6, 26)


def test_structures_that_point_at_each_other_are_made_as_they_are_asked_for() -> None:
    ctf = build.Ctf()
    ctf.refer(build.POINTER, 2)
    ctf.compound(build.STRUCT, "node", 8, [("next", 1, 0)])
    node = types_of(ctf).find("tag", "node")
    assert isinstance(node, Compound)
    assert node.fields[0].type.target is node


def test_a_declaration_leads_to_the_definition() -> None:
    ctf = build.Ctf()
    forward = ctf.forward("proc")
    ctf.refer(build.TYPEDEF, ctf.refer(build.POINTER, forward), "proc_t")
    ctf.compound(build.STRUCT, "proc", 16, [])
    ctf.forward("nowhere")
    source = types_of(ctf)
    assert source.find("typedef", "proc_t").target.target.size == 16
    assert source.find("tag", "nowhere").size is None


def test_of_two_structures_of_a_name_the_fuller_counts() -> None:
    ctf = build.Ctf()
    integer = ctf.integer("int", 4, build.SIGNED)
    ctf.compound(build.STRUCT, "wait_queue", 32, [("opaque", integer, 0)])
    ctf.compound(build.STRUCT, "wait_queue", 32, [("first", integer, 0), ("second", integer, 32)])
    ctf.compound(build.STRUCT, "wait_queue", 32, [("a", integer, 0), ("b", integer, 32)])
    assert set(TypeTable(types_of(ctf)).struct("wait_queue").members) == {"first", "second"}


def test_numbers_of_bit_fields_are_no_base_types() -> None:
    ctf = build.Ctf()
    ctf.integer("unsigned int", 4, bits=5)
    ctf.integer("unsigned int", 4)
    ctf.integer("void", 0, build.SIGNED)
    source = types_of(ctf)
    assert list(source.names("base")) == ["unsigned int", "void"]
    assert isinstance(source.find("base", "void"), Void)


def test_signed_pointers_say_how() -> None:
    ctf = build.Ctf(3)
    integer = ctf.integer("int", 4, build.SIGNED)
    pointer = ctf.refer(build.POINTER, integer)
    alias = ctf.refer(build.TYPEDEF, pointer, "handler_t")
    word = 1 << 24 | 2 << 16 | 0xBEEF
    ctf.refer(build.TYPEDEF, ctf.ptrauth(alias, word), "signed_t")
    ctf.refer(build.TYPEDEF, ctf.ptrauth(integer, word), "odd_t")
    source = types_of(ctf)
    signed = source.find("typedef", "signed_t").target
    assert isinstance(signed, Pointer)
    assert (signed.ptrauth, signed.target.name, signed.size) == (word, "int", 8)
    odd = source.find("typedef", "odd_t").target
    assert isinstance(odd, Qualified)
    assert odd.target.name == "int"


def test_a_pointer_is_as_wide_as_long() -> None:
    ctf = build.Ctf()
    ctf.integer("long", 4, build.SIGNED)
    assert types_of(ctf, pointer_size=8).pointer_size == 4
    assert types_of(build.Ctf(), pointer_size=4).pointer_size == 4
    assert types_of(build.Ctf()).pointer_size == 8


def test_a_kext_shares_its_kernels_types() -> None:
    kernel = build.Ctf()
    integer = kernel.integer("int", 4, build.SIGNED)
    kernel.refer(build.TYPEDEF, integer, "pid_t")
    kext = build.Ctf(parent="mach_kernel")
    own = kext.refer(build.TYPEDEF, integer, "my_t")
    assert own == 0x8001
    kext.compound(build.STRUCT, "softc", 8, [("sc_pid", 2, 0), ("sc_my", own, 32)])
    parent = types_of(kernel)
    source = types_of(kext, parent=parent)
    assert [declare(f.type) for f in source.find("tag", "softc").fields] == ["pid_t", "my_t"]
    assert source.find("typedef", "my_t").size == 4
    assert source.find("typedef", "pid_t") is parent.find("typedef", "pid_t")
    assert set(source.names("typedef")) == {"pid_t", "my_t"}
    alone = types_of(kext).find("tag", "softc").fields[0].type
    assert isinstance(alone, Void)


# variables


def _variables(symbols: list[External] | None, version: int = 2, objects: int = 3):
    ctf = build.Ctf(version)
    char = ctf.integer("char", 1, build.SIGNED | build.CHAR)
    integer = ctf.integer("int", 4, build.SIGNED)
    text = ctf.array(char, 100)
    ctf.objects = [integer, 0, text][:objects]
    ctf.functions = [(integer, [char, 0]), None, (0, [])]
    return types_of(ctf, symbols=None if symbols is None else lambda: symbols)


SORTED = [
    *(External("_bread", True), External("_calls", True), External("_close", True)),
    *(External("_nprocs", False), External("_other", False), External("_version", False)),
]


@pytest.mark.parametrize("version", [2, 3, 4])
def test_variables_in_the_order_of_the_symbols(version: int) -> None:
    source = _variables(SORTED, version)
    assert declare(source.variable("nprocs"), "nprocs") == "int nprocs"
    assert declare(source.variable("version"), "version") == "char version[100]"
    assert source.variable("other") is None
    assert declare(source.variable("bread"), "bread") == "int bread(char, ...)"
    assert source.variable("calls") is None
    assert declare(source.variable("close"), "close") == "void close()"
    assert source.variable("nosuch") is None
    assert declare(TypeTable(source).variable("_nprocs"), "nprocs") == "int nprocs"


def test_a_table_in_another_order_is_read_in_the_linkers() -> None:
    source = _variables(SORTED[::-1])
    assert declare(source.variable("nprocs"), "nprocs") == "int nprocs"
    assert declare(source.variable("bread"), "bread") == "int bread(char, ...)"


def test_no_order_is_believed_against_the_witnesses() -> None:
    # sorted they would make version an int, as they stand nprocs an array
    wrong = [*SORTED[:3], External("_version", False), External("_x", False)]
    assert _variables([*wrong, External("_nprocs", False)]).variable("bread") is not None
    assert _variables([*wrong, External("_kernproc", False)]).variable("x") is None
    shuffled = [External(f"_{name}", False) for name in "cab"]
    assert _variables([*SORTED[:3], *shuffled]).variable("a") is None  # nobody bears witness


def test_symbols_that_are_not_these_types_own_say_nothing() -> None:
    assert _variables(None).variable("nprocs") is None
    assert _variables(SORTED[1:]).variable("close") is None
    assert _variables([*SORTED, External("_zero", False)]).variable("nprocs") is None


# real ones

README = {
    "proc": 1192,
    "task": 960,
    "thread": 1104,
    "vnode": 240,
    "cdevsw": 112,
    "inpcb": 488,
    "mount": 2560,
    "zone": 288,
    "ifnet": 1688,
    "ipc_port": 160,
}


def test_a_kernels_ctf_by_itself() -> None:
    source = FileSource(real(KERNEL_CTF))
    assert is_ctf(source.read_at(0, 16))
    types = open_ctf(source)
    table = TypeTable(types)
    assert len(types) == 14660
    assert {tag: table.size(tag) for tag in README} == README
    assert types.variable("allproc") is None  # there are no symbols in it


def test_one_name_and_all_names_find_the_same() -> None:
    source = FileSource(real(KERNEL_CTF))
    body = CtfBody(source, 0, source.size)
    records = body.records()
    every = NameIndex(body, *records)
    for number in range(100):  # after some it knows them all
        every.find("tag", f"n{number}")
    for kind in ("tag", "typedef", "base"):
        names = list(every.names(kind))
        assert len(names) > 10
        one = NameIndex(body, *records)
        for name in names[:: max(1, len(names) // 60)][:60]:
            alone = one.find(kind, name)
            assert alone is not None
            assert alone == every.find(kind, name)
        assert one.find(kind, "nosuch") is None


def test_a_kernels_variables() -> None:
    types = ctf_of(MachO(FileSource(real(KERNEL))))
    assert types is not None
    assert TypeTable(types).size("proc") == 1192
    wanted = {
        "allproc": "struct proclist allproc",
        "kernproc": "proc_t kernproc",
        "cdevsw": "struct cdevsw cdevsw[43]",
        "version": "const char version[106]",
        "mmread": "int mmread(dev_t, struct uio *)",
        "hostname": "char hostname[256]",
    }
    assert {name: declare(types.variable(name), name) for name in wanted} == wanted


def test_the_kernel_and_its_object_say_the_same_of_variables() -> None:
    """ctfconvert wrote the object's, ctfmerge the kernel's, in different orders of symbols."""
    kernel = ctf_of(MachO(FileSource(real(KERNEL))))
    own = ctf_of(MachO(FileSource(real(OBJECT + ".ctf"))))
    assert kernel is not None
    assert own is not None
    names = [symbol.name.removeprefix("_") for symbol in own.symbols()]
    both = [n for n in names if own.variable(n) is not None and kernel.variable(n) is not None]
    assert len(both) == 130
    said = {name: declare(own.variable(name), name) for name in both}
    assert {name: declare(kernel.variable(name), name) for name in both} == said


def test_an_objects_variables_are_those_of_its_dwarf() -> None:
    ctf = ctf_of(MachO(FileSource(real(OBJECT + ".ctf"))))
    dwarf = open_dwarf(MachO(FileSource(real(OBJECT))))
    assert ctf is not None
    assert dwarf is not None
    compared = 0
    for symbol in ctf.symbols():
        name = symbol.name.removeprefix("_")
        mine, theirs = ctf.variable(name), dwarf.variable(name)
        if not symbol.defined or mine is None:
            continue
        compared += 1
        if isinstance(mine, Function) and mine.parameters is None:
            assert isinstance(theirs.result, Void)  # what it takes is not told
        else:
            assert declare(mine, name) == declare(theirs, name)
    assert compared == 133


def test_an_object_whose_load_command_was_overwritten() -> None:
    """Its `__CTF` command lay over its text, which is wiped: the CTF is at the file's end."""
    image = MachO(FileSource(real(OBJECT + ".ctf")))
    assert "__CTF" not in {section.segname for section in image.sections}
    types = ctf_of(image)
    assert types is not None
    assert len(types) == 337
    assert TypeTable(types).size("proc") == 0x4A8
    assert ctf_of(MachO(FileSource(real(OBJECT)))) is None


def test_a_section_in_a_kernel() -> None:
    content = some_of_each(2, "<").build(compress=True)
    image = images.MachO("x86_64", 2, 1)
    at = 0xFFFFFF8000200000
    section = images.Section("__ctf", "__CTF", at, len(content))
    image.segment("__CTF", at, content, sections=[section])
    found = ctf_of(MachO(BytesSource(image.build(), "kernel")))
    assert found is not None
    assert TypeTable(found).size("proc") == 80
    bare = images.MachO("x86_64", 2, 1)
    bare.segment("__TEXT", at, b"x" * 64)
    assert ctf_of(MachO(BytesSource(bare.build(), "kernel"))) is None


def test_a_symbol_table_that_is_gone_says_nothing() -> None:
    ctf = build.Ctf()
    ctf.objects = [ctf.integer("int", 4)]
    content = ctf.build()
    image = images.MachO("x86_64", 2, 1)
    section = images.Section("__ctf", "__CTF", 0x1000, len(content))
    image.segment("__CTF", 0x1000, content, sections=[section])
    image.symtab([images.Sym("_nprocs", 0x1000)])
    whole = image.build()
    types = ctf_of(MachO(BytesSource(whole)))
    assert declare(types.variable("nprocs"), "nprocs") == "int nprocs"
    cut = ctf_of(MachO(BytesSource(whole[:-4])))
    assert cut.variable("nprocs") is None
    assert cut.find("base", "int").size == 4


# damage


def refused(content: bytes, *names: str) -> str:
    """What is said when everything in `content` is asked for."""
    with pytest.raises((FormatError, UnsupportedError)) as error:
        source = open_ctf(BytesSource(content, "bad.ctf"))
        for kind in ("tag", "typedef", "base"):
            for name in names or list(source.names(kind)):
                look_into(source.find(kind, name))
    message = str(error.value)
    assert message.startswith("bad.ctf: ")
    assert "\n" not in message
    return message


def look_into(found) -> None:
    if isinstance(found, Compound):
        for field in found.fields:
            unqualified(field.type)
    elif isinstance(found, (Typedef, Qualified, Pointer)):
        found.target  # noqa: B018 (asked for to be made)


def test_versions_and_magic() -> None:
    good = some_of_each(2, "<").build()
    assert "CTF version 1, expected 2, 3 or 4" in refused(good[:2] + b"\1" + good[3:])
    assert "CTF version 5" in refused(good[:2] + b"\5" + good[3:])
    assert "expected CTF magic 0xcff1, got 7f45" in refused(b"\x7fELF" + good[4:])
    with pytest.raises(TruncatedError, match="CTF header"):
        open_ctf(BytesSource(good[:20], "x"))
    with pytest.raises(MismatchError, match="other byte order"):
        open_ctf(BytesSource(good, "x"), byteorder=">")
    assert not is_ctf(b"\x7fELF")
    assert not is_ctf(b"\xf1\xcf")


def test_parts_out_of_order_or_beyond_the_end() -> None:
    ctf = some_of_each(2, "<")
    assert "in order" in refused(ctf.build(typeoff=0x7FFFFFF0))
    assert "in order" in refused(ctf.build(funcoff=0xFFFFFFFE))
    assert "expected at most 0x4000000 bytes" in refused(ctf.build(strlen=0xFFFFFFF0))
    assert "expected 0x" in refused(ctf.build(strlen=len(ctf.strings) + 1))
    assert "CTF body" in refused(ctf.build()[:-4])


def test_streams_cut_corrupt_and_longer_than_said() -> None:
    content = some_of_each(2, "<").build(compress=True)
    assert "inflated" in refused(content[:-30])
    assert "does not inflate" in refused(content[:36] + b"no zlib stream" + content[50:])
    bomb = zlib.compress(bytes(64 << 20), 9)
    began = time.process_time()
    source = open_ctf(BytesSource(content[:36] + content[36:] + bomb, "more.ctf"))
    assert TypeTable(source).size("proc") == 80
    head = struct.pack("<HBB8I", 0xCFF1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert len(open_ctf(BytesSource(head + bomb, "bomb.ctf"))) == 0
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("version", "order"), FORMS)
def test_types_that_lead_nowhere(version: int, order: str) -> None:
    ctf = build.Ctf(version, order)
    ctf.refer(build.TYPEDEF, 0x7FFF, "nowhere_t")
    assert "reference to type 0x7fff, expected 0x1 to 0x1" in refused(ctf.build())
    ctf = build.Ctf(version, order)
    ctf.compound(build.STRUCT, "s", 8, [("m", 9, 0)])
    assert "reference to type 0x9" in refused(ctf.build())


def test_typedefs_in_a_circle() -> None:
    ctf = build.Ctf()
    ctf.refer(build.TYPEDEF, 2, "a_t")
    ctf.refer(build.TYPEDEF, 1, "b_t")
    ctf.compound(build.STRUCT, "s", 8, [("m", 1, 0)])
    ctf.ptrauth(1, 0)
    ctf.refer(build.TYPEDEF, 4, "c_t")
    source = types_of(ctf)
    with pytest.raises(Exception, match="typedefs lead from one to the next"):
        unqualified(source.find("typedef", "a_t"))
    with pytest.raises(Exception, match="typedefs lead from one to the next"):
        TypeTable(source).size("s")
    assert isinstance(source.find("typedef", "c_t").target, Qualified)


def test_records_that_do_not_fit() -> None:
    ctf = build.Ctf()
    ctf.raw(15, "odd", 0, 0)
    assert "type of kind 15, expected 0 to 14" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.raw(build.STRUCT, "s", 1000, 8)
    assert "goes beyond the last type's end" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.types += b"\0\0\0\0"
    assert "head goes beyond" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.integer("huge", 0x1000)
    assert "0x1000 bytes of a number" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.compound(build.STRUCT, "s", 8, [("m", 0, 65)])
    assert "member m at bit 0x41 of 0x8 bytes" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.compound(build.STRUCT, "s", 8, [("m", 0, 3)])
    assert "member m at bit 0x3 is no bit-field" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.compound(build.STRUCT, "s", 1 << 40, [])
    assert "expected a 32-bit size" in refused(ctf.build())


def test_names_outside_the_table() -> None:
    ctf = build.Ctf()
    ctf.raw(build.TYPEDEF, 0x7FFFFFFF, 0, 0)
    assert "a name at 0x7fffffff" in refused(ctf.build())
    ctf = build.Ctf()
    ctf.refer(build.TYPEDEF, 0, "x" * 5000)
    assert "a name at 0x1" in refused(ctf.build())  # no identifier is as long
    ctf = build.Ctf()
    ctf.raw(build.TYPEDEF, 0x80000001, 0, 0)  # in the kernel's own string table
    assert list(types_of(ctf).names("typedef")) == []


def test_many_names_that_overlap_take_no_room() -> None:
    ctf = build.Ctf(4)
    ctf.strings += b"x" * 4000 + b"\0"
    for _ in range(30):
        for at in range(1, 4000, 2):
            ctf.raw(build.TYPEDEF, at, 0, 0)
    assert "names overlap each other without end" in refused(ctf.build())


def test_a_million_types() -> None:
    head = struct.pack("<HBB8I", 0xCFF1, 4, 0, 0, 0, 0, 0, 0, 0, 12 * 1_050_000, 1)
    began = time.process_time()
    assert "expected at most 0x100000 types" in refused(head + bytes(12 * 1_050_000 + 1))
    assert time.process_time() - began < 2


def test_records_at_the_limit_warn() -> None:
    ctf = build.Ctf()
    ctf.enum("many", 4, [("V", n) for n in range(1023)])
    source = types_of(ctf)
    with pytest.warns(KvmWarning, match="enum many may have more than the 1023 members"):
        found = source.find("tag", "many")
    assert len(found.values) == 1023
