"""What the built-in layouts say of their members' types, and of the kernel's variables."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import pytest

from kvmtool.errors import FormatError
from kvmtool.macho import MachO
from kvmtool.source import FileSource
from kvmtool.type_readers import ctf_in
from kvmtool.types import layout_texts, layouts, variables
from kvmtool.types.ctype import (
    Array,
    Base,
    Compound,
    Enum,
    Function,
    Opaque,
    Pointer,
    Void,
    unqualified,
)
from kvmtool.types.declare import declare
from kvmtool.types.flatten import flatten
from tests.inputs import ROOT, real
from tools import build_layout_types, build_layouts

NEWER = ("11.0.1", "11.5", "12.0.1", "12.5", "13.0", "13.5", "14.0", "14.6", "15.0", "15.5")
MAIN = [
    *("10.4.11 i386", "10.5.0 i386", "10.5.8 i386", "10.6.8 i386", "10.7.5 i386"),
    *("10.6.8 x86_64", "10.7.5 x86_64", "10.8.5 x86_64", "10.9.5 x86_64", "10.10.5 x86_64"),
    *("10.11.6 x86_64", "10.12.6 x86_64", "10.13.6 x86_64", "10.14.6 x86_64", "10.15.6 x86_64"),
    *(f"{version} {arch}" for version in NEWER for arch in ("x86_64", "arm64")),
]


def member(types, tag, path):
    """The type of a member by its dotted name."""
    found = types.type(f"struct {tag}")
    for name in path.split("."):
        fields = {field.name: field.type for field in unqualified(found).fields}
        found = fields[name]
    return found


# ------------------------------------------------------------------------------ every layout


@pytest.mark.parametrize("name", MAIN)
def test_typed_members_are_where_the_layout_has_them(name):
    """Same offsets and bits; nothing reaches beyond its structure or has no size."""
    types = layouts.table(name)
    typed = total = 0
    for tag in types.source._tags:
        compound, flat = types.type(f"struct {tag}"), types.struct(tag)
        assert compound.size == flat.size
        again = flatten(compound)
        for path, known in flat.members.items():
            assert again.members[path][1:] == known[1:], (tag, path)
        for field in compound.fields:
            size = field.type.size
            assert size is not None
            assert field.bit_size is not None or field.offset + size <= flat.size, (tag, field)
            total += 1
            typed += not isinstance(field.type, Opaque)
    assert typed > 0.75 * total


@pytest.mark.parametrize("name", MAIN)
def test_what_a_process_walk_needs_is_typed(name):
    types = layouts.table(name)
    word = types.source.pointer_size
    proc = types.type("proc")
    assert isinstance(proc, Compound)
    assert proc.tag == "proc"
    assert declare(member(types, "proc", "p_pid")) == "int"
    assert declare(member(types, "proc", "p_comm")) == "char[17]"
    parent = member(types, "proc", "p_pptr")
    assert isinstance(parent, Pointer)
    assert parent.size == word
    assert parent.target is proc
    following = member(types, "proc", "p_list.le_next")
    assert isinstance(following, Pointer)
    assert following.target is proc
    read = member(types, "cdevsw", "d_read")
    assert isinstance(read, Pointer)
    assert read.size == word
    assert declare(member(types, "kmod_info", "name")) == "char[64]"
    assert member(types, "vnode", "v_mount").target is types.type("struct mount")
    assert declare(member(types, "ipc_port", "ip_srights")) == "unsigned int"


# Structures that are only in the debug kits' tables, and that other kernels cannot name.
KITS_ONLY = {"PE_state", "lowGlo", "filehead"}


@pytest.mark.parametrize("name", MAIN)
def test_variables(name):
    types = layouts.table(name)
    for variable in variables.entries():
        found = types.variable(variable)
        if found is None:
            lacking = {"default_pset", "pset0"} if not types.has("processor_set") else set()
            assert variable in KITS_ONLY | lacking, variable
            continue
        assert types.variable(f"_{variable}") is not None
        assert found.size is not None
        assert declare(found, variable)
    assert types.variable("kernproc").target is types.type("proc")
    assert member_of(types.variable("allproc"), "lh_first").target is types.type("proc")
    cdevsw = types.variable("cdevsw")
    assert isinstance(cdevsw, Array)
    assert cdevsw.target is types.type("struct cdevsw")
    assert types.variable("_no_such_variable") is None


def member_of(ctype, name):
    return next(field.type for field in unqualified(ctype).fields if field.name == name)


def test_variables_follow_the_release():
    def text(name, variable):
        return declare(layouts.table(name).variable(variable), variable)

    assert text("10.8.5 x86_64", "domains") == "struct domain *domains"
    assert text("10.9.5 x86_64", "domains") == "struct domains_head domains"
    assert text("10.13.6 x86_64", "num_zones") == "unsigned int num_zones"
    assert text("12.5 arm64", "num_zones") == "unsigned short num_zones"
    assert text("10.5.8 i386", "averunnable") == "struct loadavg averunnable"
    assert layouts.table("10.5.8 i386").variable("averunnable").size == 16
    assert layouts.table("10.9.5 x86_64").variable("averunnable").size == 24


@pytest.mark.parametrize(
    ("name", "tag", "path", "text"),
    [
        ("12.5 arm64", "proc", "p_proc_ro", "struct proc_ro *"),
        ("15.5 arm64", "proc", "p_pgrp.__smr_ptr", "struct pgrp *"),
        ("12.5 x86_64", "proc", "p_pgrp.__hazard_ptr", "struct pgrp *"),
        ("15.5 x86_64", "proc", "p_fd.fd_ofiles", "struct fileproc **"),
        ("15.5 x86_64", "proc", "p_start", "struct timeval"),
        ("15.5 arm64", "proc_ro", "p_ucred.__smr_ptr", "struct ucred *"),
        ("13.0 arm64", "proc_ro", "proc_data.p_ucred", "struct ucred *"),
        ("13.5 arm64", "zone", "z_name", "char *"),
        ("13.5 arm64", "thread", "t_tro", "struct thread_ro *"),
        ("10.4.11 i386", "proc", "p_ucred", "struct ucred *"),
        ("10.4.11 i386", "task", "map", "struct _vm_map *"),
        ("10.11.6 x86_64", "proc", "p_uuid", "unsigned char[16]"),
        ("10.13.6 x86_64", "proc", "p_mlock.opaque", "unsigned long[2]"),
        ("10.13.6 x86_64", "task", "exc_actions", "struct exception_action [14]"),
    ],
)
def test_members_of_note(name, tag, path, text):
    found = member(layouts.table(name), tag, path)
    if "exception_action" in text:  # no layout of its own: its bytes are all that is known
        assert isinstance(found, Opaque)
    else:
        assert declare(found) == text


def test_everyday_typedefs():
    types = layouts.table("10.9.5 x86_64")
    assert types.type("pid_t").size == 4
    assert types.type("user_addr_t").size == 8
    assert types.type("vm_offset_t").size == 8
    assert layouts.table("10.5.8 i386").type("vm_offset_t").size == 4
    assert unqualified(types.type("proc_t")).target is types.type("proc")
    assert "pid_t" in types.source.names("typedef")


def test_unions():
    """Members that all begin where the first does."""
    un = member(layouts.table("10.9.5 x86_64"), "vnode", "v_un")
    assert un.kind == "union"
    assert {field.offset for field in un.fields} == {0}
    fork = member(layouts.table("15.5 arm64"), "proc", "p_forkcopy")
    assert fork.size >= max(field.offset + field.type.size for field in fork.fields)


# ------------------------------------------------------------------------------ against others


def isf_text(kind):
    """An ISF type as ours declare it; None where it says too little."""
    if kind["kind"] == "base":
        return None if kind["name"] == "void" else kind["name"]
    if kind["kind"] == "pointer":
        inner = kind["subtype"]
        if inner["kind"] == "base":
            return f"{inner['name']} *"
        named = inner["kind"] in ("struct", "union") and not inner["name"].startswith("__unnamed")
        return f"struct {inner['name']} *" if named else None
    if kind["kind"] == "array" and kind["count"] and kind["subtype"]["kind"] == "base":
        return f"{kind['subtype']['name']}[{kind['count']}]"
    return None


@pytest.mark.parametrize(
    ("dump", "name"),
    [
        ("i386-10.5.8", "10.5.8 i386"),
        ("x86_64-10.8.5", "10.8.5-12f45 x86_64"),
        ("x86_64-10.13.6", "10.13.6 x86_64"),
    ],
)
def test_agrees_with_whole_type_descriptions(dump, name):
    """The type of every base, pointer and array member that the ISF of the same kernel has."""
    with gzip.open(real(f"types/{dump}.types.json.gz")) as packed:
        known = json.load(packed)["user_types"]
    types = layouts.table(name)
    compared, differing = 0, []
    for tag in types.source._tags & set(known):
        for field in types.type(f"struct {tag}").fields:
            about = known[tag]["fields"].get(field.name)
            wanted = (
                None if about is None or field.bit_size is not None else isf_text(about["type"])
            )
            if wanted is None or isinstance(field.type, Opaque):
                continue
            compared += 1
            if declare(field.type) != wanted:
                differing.append((tag, field.name, declare(field.type), wanted))
    assert not differing
    assert compared > 1000


def plain(ctype):
    """A type without the names of typedefs and of what functions take."""
    found = unqualified(ctype)
    if isinstance(found, Pointer):
        return f"{plain(found.target)}*"
    if isinstance(found, Array):
        return f"{plain(found.target)}[{found.count}]"
    if isinstance(found, (Base, Enum)):
        form = "float" if isinstance(found, Base) and found.form == "float" else "int"
        return f"{'' if found.signed else 'u'}{form}{found.size}"
    return "void" if isinstance(found, (Function, Void)) else found.name


@pytest.fixture(scope="module")
def ctf():
    """What a kernel of 10.9.5, built by others, says of itself."""
    source = ctf_in(MachO(FileSource(real("machine/x86_64-xnu-2422.115.4.mach_kernel"))))
    assert source is not None
    return source


def test_members_agree_with_a_kernels_own_ctf(ctf):
    types = layouts.table("10.9.5 x86_64")
    compared = 0
    for tag in types.source._tags:
        found = ctf.find("tag", tag)
        if not isinstance(found, Compound) or not found.complete:
            continue
        theirs = {field.name: field.type for field in found.fields if field.bit_size is None}
        for field in types.type(f"struct {tag}").fields:
            if field.name in theirs and not isinstance(field.type, Opaque):
                compared += 1
                assert plain(field.type) == plain(theirs[field.name]), (tag, field.name)
    assert compared > 2000


def test_variables_agree_with_a_kernels_own_ctf(ctf):
    types = layouts.table("10.9.5 x86_64")
    compared = 0
    for name in variables.entries():
        theirs = ctf.variable(name)
        if theirs is None or name == "cpu_data_ptr":  # cpu_data_t: a typedef of an unnamed one
            continue
        ours, theirs = types.variable(name), unqualified(theirs)
        if isinstance(ours, Array) and ours.count is None:
            ours, theirs = ours.target, theirs.target
        assert plain(ours) == plain(theirs), name
        compared += 1
    assert compared > 75


def test_the_resource_is_what_the_script_makes():
    folder = os.path.dirname(real("layouts/kdk_kernels.csv"))
    streams = build_layout_types.build(build_layouts.gather(folder), folder)
    for number, stream in enumerate(streams):
        found = layout_texts._resource().stream(number)
        assert found == stream, f"run `make layouts`: stream {number} is stale"
    assert os.path.getsize(layout_texts.PATH) < 100_000


# ------------------------------------------------------------------------------ cost, damage

IMPORTS = """
import sys
from kvmtool.types import layouts
types = layouts.choose("4570.71.2", "x86_64").table
assert types.offset("proc", "p_pid") == 0x10
assert "kvmtool.types.layout_texts" not in sys.modules
assert "kvmtool.types.variables" not in sys.modules
assert types.type("proc").fields
assert "kvmtool.types.layout_texts" in sys.modules
"""


def test_offsets_load_no_texts():
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, check=True)


def test_damaged_resource(tmp_path, monkeypatch):
    with open(layout_texts.PATH, "rb") as resource:
        good = resource.read()
    path = str(tmp_path / "layout_types.bin")
    monkeypatch.setattr(layout_texts, "PATH", path)
    for content in (b"", good[:30], good[:-5000], good[:2000] + b"\0" * (len(good) - 2000)):
        with open(path, "wb") as out:
            out.write(content)
        layout_texts._resource.cache_clear()
        table = layouts._Database(layouts.PATH).table(0)
        with pytest.raises(FormatError, match="reinstall kvmtool"):
            for tag in table.source._tags:
                assert table.type(f"struct {tag}").fields
    layout_texts._resource.cache_clear()


def test_text_shapes():
    assert layout_texts.shape("proc*") == ("proc", 1, ())
    assert layout_texts.shape("unsigned long[2][3]") == ("unsigned long", 0, (2, 3))
    assert layout_texts.shape("vnode**[4]") == ("vnode", 2, (4,))
    for text in ("", "*", "a[", "a[<=2]", "1x"):
        with pytest.raises(ValueError, match="no type's text"):
            layout_texts.shape(text)


def test_base_types_are_c():
    types = layouts.table("10.5.8 i386")
    for name, form in layout_texts.BASES.items():
        if name != "void":
            found = types.type(name)
            assert isinstance(found, Base)
            assert (found.size, found.form, found.signed) == (
                form.size or 4,
                form.form,
                form.signed,
            )
