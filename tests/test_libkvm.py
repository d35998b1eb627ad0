"""The C-shaped API against what libkvm(3) and its implementations promise.

The fifteen behaviours, and the tests that show them:

1.  Hard errors go to stderr as ``errstr: message`` and are not kept; soft ones are always kept
    and never printed: `test_hard_errors_are_printed_with_errstr_and_not_kept`,
    `test_soft_errors_are_kept_and_never_printed`, `test_errstr_none_is_silent`
2.  openfiles and open2 put a failure into errbuf, print nothing, leave errbuf alone on success,
    and take NULL for it: `test_errbuf_*`, `test_open2_*`
3.  The order of checks and the messages of open: `test_open_checks_in_cs_order`,
    `test_o_wronly_is_refused`, `test_long_exec_names_are_refused`, `test_empty_core`,
    `test_other_character_devices_are_refused`
4.  Nothing falls back to something else in silence; kernel and core must belong together:
    `test_no_core_is_no_fallback`,
    `test_a_kernel_that_is_not_the_cores_is_refused_and_both_are_named`
5.  close gives 0, close of NULL -1: `test_close`
6.  geterr is sticky, "" for NULL: `test_a_success_leaves_the_error_as_it_was`,
    `test_geterr_of_null`
7.  nlist ends at NULL or "", counts misses, clears them, keeps order and duplicates; -1 when it
    cannot: `test_nlist_*`
8.  Found by either spelling; undefined symbols and stabs never match, 0 is a value like any other:
    `test_either_spelling_finds_a_symbol`, `test_nlist_knows_what_is_a_definition`
9.  open2's resolver, nlist2, read2, native: no address is cut: `test_resolver_*`,
    `test_nlist2_and_read2_*`, `test_native`
10. read: -1 and `invalid address` for the first page, with its reason:
    `test_a_fault_on_the_first_page`
11. read: a short count for a later page or a core cut off, nothing read is lost:
    `test_a_fault_on_a_later_page_keeps_what_was_read`, `test_a_core_that_is_cut_off_reads_short`
12. No bytes can be read anywhere; lengths and addresses may wrap: `test_no_bytes_*`, `test_wrap_*`
13. write is refused on a dead kernel even for no bytes: `test_write_is_refused`
14. getprocs: every filter, SESSION too, `invalid filter`, an own list for every call; argv of a
    dead kernel is NULL with a reason: `test_getprocs_*`,
    `test_argv_and_environment_of_a_dead_kernel`
15. loadavg clamps, kerndisp is signed and 0 when unknown, walk_pages stops when told:
    `test_loadavg_*`, `test_kerndisp_*`, `test_walk_*`

All state is the handle's: `test_two_handles_share_nothing`.

Bugs of the peers, and the tests that ours has not got them: stale n_type of misses (Apple, OpenBSD)
`test_nlist_counts_misses_and_clears_them`; the parent's pid compared, threads overwriting each
other (OpenBSD) `test_getprocs_by_pid_compares_the_process_not_its_parent`; zombies lost, no
terminals (FreeBSD) `test_getprocs_lists_allproc_then_zombproc`, `test_getprocs_by_terminal`; bytes
and reason lost in a fault (all BSDs) `test_a_fault_on_*`; state shared by handles (FreeBSD)
`test_two_handles_share_nothing`; failing without a message, or on NULL (Apple)
`test_errstr_prints_one_line`, `test_open2_leaves_a_message_in_errbuf`; the leftover walk of pages
(FreeBSD) `test_walk_visits_every_page_once`. Open files, swap and cpu statistics, which have bugs
elsewhere, are not there yet.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise

import pytest

from kvmtool.errors import KvmWarning
from kvmtool.libkvm import (
    KERN_PROC_ALL,
    KERN_PROC_PGRP,
    KERN_PROC_PID,
    KERN_PROC_RUID,
    KERN_PROC_SESSION,
    KERN_PROC_TTY,
    KERN_PROC_UID,
    N_DATA,
    N_EXT,
    O_RDONLY,
    O_RDWR,
    O_WRONLY,
    Errbuf,
    kvm_close,
    kvm_getargv,
    kvm_getenvv,
    kvm_geterr,
    kvm_getloadavg,
    kvm_getprocs,
    kvm_kerndisp,
    kvm_native,
    kvm_nlist,
    kvm_nlist2,
    kvm_open,
    kvm_open2,
    kvm_openfiles,
    kvm_read,
    kvm_read2,
    kvm_walk_pages,
    kvm_write,
    nlist,
)
from kvmtool.types import layouts
from tests.builders import macho
from tests.builders.macho import Sym
from tests.inputs import oracle, plain_core, real, truth

I386, X64, KPTI = "i386-10.5.8", "x86_64-10.8.5", "x86_64-10.13.6"
DUMPS = (I386, X64, KPTI)
CRASH_KERNEL = "machine/x86_64-xnu-2422.115.4.mach_kernel"


def paths(dump: str) -> tuple[str, str]:
    return real(f"dumps/{dump}/mach_kernel"), plain_core(dump)


@pytest.fixture
def kd():
    """The i386 dump."""
    handle = kvm_open2(*paths(I386), O_RDONLY, None, None)
    assert handle is not None
    yield handle
    kvm_close(handle)


@pytest.fixture
def crashed():
    """The core that the kernel wrote itself."""
    handle = kvm_open2(real(CRASH_KERNEL), real("machine/crash.kdp-core"), O_RDONLY, None, None)
    assert handle is not None
    yield handle
    kvm_close(handle)


def opened(dump: str):
    handle = kvm_open2(*paths(dump), O_RDONLY, None, None)
    assert handle is not None
    return handle


def tiny(path, symbols=(), **facts) -> str:
    """A kernel's file that has nothing but symbols."""
    image = macho.MachO("x86_64", macho.MH_EXECUTE)
    image.segment("__TEXT", 0xFFFFFF8000200000, bytes(range(256)) * 16)
    if symbols is not None:
        image.symtab(list(symbols), dysymtab=False, **facts)
    path.write_bytes(image.build())
    return str(path)


def tiny_kd(path, symbols=(), **facts):
    handle = kvm_open2(tiny(path, symbols, **facts), "/dev/null", O_RDONLY, None, None)
    assert handle is not None
    return handle


def segments(dump: str) -> list[tuple[int, int, int]]:
    """(address, size, file offset) of the core's segments, as the generator planted them."""
    table = truth(dump)["formats"]["core.macho"]["table"]
    return sorted((row["vmaddr"], row["size"], row["fileoff"]) for row in table)


def stored(dump: str, address: int, size: int) -> bytes:
    """What the core's file holds for an address, found without kvmtool."""
    start, _, offset = next(row for row in segments(dump) if row[0] <= address < row[0] + row[1])
    with open(plain_core(dump), "rb") as core:
        core.seek(offset + address - start)
        return core.read(size)


def hole_after(dump: str) -> tuple[int, int]:
    """The end of a segment that a hole of at least two pages follows, and its start."""
    rows = segments(dump)
    for (start, size, _), (following, _, _) in pairwise(rows):
        if size >= 0x2000 and following - start - size >= 0x2000:
            return start + size, start
    raise AssertionError("no such hole")


# opening: FreeBSD lib/libkvm/tests, one by one


def test_close():
    """kvm_close_negative_test_NULL; and a handle that is closed already."""
    assert kvm_close(None) == -1
    handle = opened(I386)
    assert kvm_close(handle) == 0
    assert kvm_close(handle) == -1


def test_geterr_of_null():
    """kvm_geterr_negative_test_NULL."""
    assert kvm_geterr(None) == ""


def test_write_is_refused():
    """kvm_geterr_positive_test_error: even no bytes, even O_RDWR; the message is kept."""
    for flags in (O_RDONLY, O_RDWR):
        errbuf = Errbuf()
        handle = kvm_open2(*paths(I386), flags, errbuf, None)
        assert handle is not None
        assert errbuf.text == ""
        for data in (b"", b"x"):
            handle.error = ""
            assert kvm_write(handle, 0, data) == -1
            assert kvm_geterr(handle) == "kvm_write not implemented for dead kernels"
        assert kvm_close(handle) == 0


def test_a_success_leaves_the_error_as_it_was(kd):
    """kvm_geterr_positive_test_no_error."""
    kd.error = "planted"
    start, size, _ = segments(I386)[0]
    assert kvm_read(kd, start, size) == stored(I386, start, size)
    assert kvm_nlist(kd, [nlist("_allproc")]) == 0
    assert kvm_getprocs(kd, KERN_PROC_PID, 1)[1] == 1
    assert kvm_getloadavg(kd, 3) is not None
    assert kvm_geterr(kd) == "planted"


BAD = "no-core no-kernel device text one-byte elf fat cut not-a-core empty directory text-kernel sh"
CORES = {
    "text": b"I am not a core.\n",
    "one-byte": b"\xce",
    "elf": b"\x7fELF\x02\x01\x01" + bytes(57),
    "fat": struct.pack(">7I", 0xCAFEBABE, 1, 7, 3, 4096, 28, 12),
    "cut": struct.pack("<7I", 0xFEEDFACE, 7, 3, 4, 1, 56, 0),
    "empty": b"",
}
WHY = {
    "no-core": "nonexistent: No such file or directory",
    "no-kernel": "nonexistent: No such file or directory",
    "device": "/dev/zero: not physical memory device",
    "text": "no known format begins with 49 20 61 6d",
    "one-byte": "no known format begins with ce",
    "elf": "no known format begins with 7f 45 4c 46",
    "fat": "this is a packed or fat file, expected memory: name it with -N",
    "cut": "load commands: expected 0x38 bytes, got 0x0",
    "not-a-core": "this is a kernel's file, expected memory: name it with -N",
    "empty": "empty file: Invalid argument",
    "directory": "is a directory",
    "text-kernel": "text: at offset 0x0: expected a Mach-O magic",
    "sh": "text: at offset 0x0: expected a Mach-O magic",
}


@pytest.fixture
def bad(tmp_path, request) -> tuple[str, str]:
    """(kernel, core) of which one is bad."""

    kernel, core = paths(I386)
    gone = str(tmp_path / "nonexistent")
    text = tmp_path / "text"
    text.write_bytes(CORES.get(request.param, b"I am not a kernel.\n"))
    if request.param in CORES:
        return kernel, str(text)
    return {
        "no-core": (kernel, gone),
        "no-kernel": (gone, core),
        "device": (gone, "/dev/zero"),
        "not-a-core": (kernel, kernel),
        "directory": (kernel, str(tmp_path)),
        "text-kernel": (str(text), core),
        "sh": (str(text), "/bin/sh"),
    }[request.param]


@pytest.mark.parametrize("bad", BAD.split(), indirect=True)
def test_errstr_none_is_silent(bad, capsys):
    """kvm_open_negative_test_*: NULL without a program name."""
    assert kvm_open(*bad, None, O_RDONLY, None) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bad", BAD.split(), indirect=True)
def test_errstr_prints_one_line(bad, capsys):
    """kvm_open_negative_test_*: NULL with a program name; Apple's printed no message at all."""
    assert kvm_open(*bad, None, O_RDONLY, "prog") is None
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("prog: ")
    assert err.count("\n") == 1
    assert len(err) > len("prog: \n")


@pytest.mark.parametrize("bad", BAD.split(), indirect=True)
def test_open2_leaves_a_message_in_errbuf(bad, capsys, request):
    """kvm_open2_negative_test_*: errbuf non-empty; without one no harm."""
    errbuf = Errbuf()
    assert kvm_open2(*bad, O_RDONLY, errbuf, None) is None
    assert WHY[request.node.callspec.id] in errbuf.text
    assert str(errbuf) == errbuf.text
    assert kvm_open2(*bad, O_RDONLY, None, None) is None
    same = Errbuf()
    assert kvm_openfiles(*bad, None, O_RDONLY, same) is None
    assert same.text == errbuf.text
    assert capsys.readouterr() == ("", "")


def test_errbuf_is_untouched_on_success():
    errbuf = Errbuf()
    errbuf.text = "mine"
    handle = kvm_openfiles(*paths(I386), None, O_RDONLY, errbuf)
    assert errbuf.text == "mine"
    assert kvm_geterr(handle) == ""
    assert kvm_close(handle) == 0


def test_errbuf_holds_no_more_than_posix2_line_max(tmp_path):
    errbuf = Errbuf()
    assert kvm_open2(None, str(tmp_path / ("x" * 5000)), O_RDONLY, errbuf, None) is None
    assert len(errbuf.text) == 2047


def test_a_message_of_strerror_names_the_path(tmp_path):
    errbuf = Errbuf()
    missing = str(tmp_path / "nonexistent")
    assert kvm_open2(None, missing, O_RDONLY, errbuf, None) is None
    assert errbuf.text == f"{missing}: No such file or directory"


def test_open_checks_in_cs_order(tmp_path):
    """The name's length, the flags, the core, the kernel."""
    long, gone, core = "k" * 1024, str(tmp_path / "gone"), str(tmp_path / "nocore")
    for args, message in (
        ((long, core, O_WRONLY), "exec file name too long"),
        ((gone, core, O_WRONLY), "bad flags arg"),
        ((gone, core, O_RDONLY), f"{core}: No such file or directory"),
        ((gone, plain_core(I386), O_RDONLY), f"{gone}: No such file or directory"),
    ):
        errbuf = Errbuf()
        assert kvm_open2(*args, errbuf, None) is None
        assert errbuf.text == message


def test_o_wronly_is_refused():
    """Though the manual permits it; O_RDWR is taken, and any other bit refused."""
    for flags in (O_WRONLY, O_WRONLY | O_RDWR, 4, 0x80000000, -1):
        errbuf = Errbuf()
        assert kvm_open2(*paths(I386), flags, errbuf, None) is None
        assert errbuf.text == "bad flags arg"


def test_long_exec_names_are_refused(tmp_path):
    """MAXPATHLEN counts bytes, and the NUL."""
    for name, refused in (("k" * 1023, False), ("k" * 1024, True), ("é" * 512, True)):
        errbuf = Errbuf()
        assert kvm_open2(name, plain_core(I386), O_RDONLY, errbuf, None) is None
        assert (errbuf.text == "exec file name too long") == refused


def test_empty_core():
    errbuf = Errbuf()
    core = real(f"dumps/{I386}/damaged/core.empty")
    assert kvm_open2(paths(I386)[0], core, O_RDONLY, errbuf, None) is None
    assert errbuf.text.endswith("empty file: Invalid argument")


def test_other_character_devices_are_refused():
    errbuf = Errbuf()
    assert kvm_open2(None, "/dev/zero", O_RDONLY, errbuf, None) is None
    assert errbuf.text == "/dev/zero: not physical memory device"


def test_no_core_is_no_fallback():
    """Without a core C would open the running kernel; here that is said, and nothing is opened."""
    errbuf = Errbuf()
    assert kvm_open2(paths(I386)[0], None, O_RDONLY, errbuf, None) is None
    assert errbuf.text.startswith("/dev/mem: ")
    assert kvm_open2(None, "/dev/null", O_RDONLY, errbuf, None) is None
    assert errbuf.text.startswith("no kernel")


def test_dev_null_is_the_kernels_file_alone(tmp_path):
    """As FreeBSD's handle without devices: names can be looked up, there are no processes."""
    handle = kvm_open2(paths(I386)[0], "/dev/null", O_RDONLY, None, None)
    nl = [nlist("_allproc")]
    assert kvm_nlist(handle, nl) == 0
    assert nl[0].n_value == truth(I386)["symbols"]["allproc"]
    assert kvm_getprocs(handle, KERN_PROC_ALL, 0) == (None, 0)
    assert "kernel file" in kvm_geterr(handle)
    assert kvm_walk_pages(handle, lambda page, closure: 1) == 0
    assert kvm_kerndisp(handle) == 0
    kvm_close(handle)


@pytest.mark.parametrize(("kernel", "core"), [(X64, KPTI), (KPTI, X64), (I386, X64)])
def test_a_kernel_that_is_not_the_cores_is_refused_and_both_are_named(kernel, core):
    errbuf = Errbuf()
    pair = (paths(kernel)[0], paths(core)[1])
    assert kvm_open2(*pair, O_RDONLY, errbuf, None) is None
    assert all(path in errbuf.text for path in pair)


def test_the_same_version_check_holds_for_the_banner():
    """Where it is not another machine, UUIDs and banners of both sides are told apart."""
    errbuf = Errbuf()
    assert kvm_open2(paths(X64)[0], paths(KPTI)[1], O_RDONLY, errbuf, None) is None
    for dump in (X64, KPTI):
        assert truth(dump)["uuid"] in errbuf.text
        assert truth(dump)["banner"] in errbuf.text


# hard and soft


def test_hard_errors_are_printed_with_errstr_and_not_kept(capsys):
    handle = kvm_open(*paths(I386), None, O_RDONLY, "prog")
    assert kvm_getprocs(handle, 99, 0) == (None, 0)
    assert capsys.readouterr() == ("", "prog: invalid filter\n")
    assert kvm_geterr(handle) == ""
    kvm_close(handle)


def test_soft_errors_are_kept_and_never_printed(capsys):
    handle = kvm_open(*paths(I386), None, O_RDONLY, "prog")
    assert kvm_read(handle, 0, 4) is None
    assert kvm_geterr(handle).startswith("invalid address (0x0)")
    assert capsys.readouterr() == ("", "")
    kvm_close(handle)


def test_without_errstr_hard_errors_are_kept(kd, capsys):
    assert kvm_getprocs(kd, 99, 0) == (None, 0)
    assert kvm_geterr(kd) == "invalid filter"
    assert capsys.readouterr() == ("", "")


def test_what_a_file_says_cannot_steer_the_terminal(tmp_path, capsys):
    name = str(tmp_path / "core\x1b]0;owned\x07\udcff")
    assert kvm_open(None, name, None, O_RDONLY, "prog") is None
    err = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07\\udcff" in err
    assert "\x1b" not in err


# symbols


@pytest.mark.parametrize("dump", DUMPS)
def test_nlist_finds_what_the_kernel_has(dump):
    """n_value is the address as it runs: with the slide."""
    handle = opened(dump)
    planted = truth(dump)["symbols"]
    nl = [nlist(f"_{name}".replace("__mh", "_mh")) for name in planted]
    assert kvm_nlist(handle, nl) == 0
    assert {entry.n_name: entry.n_value for entry in nl} == {
        f"_{name}".replace("__mh", "_mh"): value for name, value in planted.items()
    }
    assert all(entry.n_type for entry in nl)
    kvm_close(handle)


def test_nlist_ends_at_null(kd):
    nl = [nlist("_allproc"), nlist(None), nlist("_version", 1, 2, 3, 4)]
    assert kvm_nlist(kd, nl) == 0
    assert nl[2] == nlist("_version", 1, 2, 3, 4)


def test_nlist_ends_at_the_empty_name(kd):
    nl = [nlist("_allproc"), nlist(""), nlist("_version", 1, 2, 3, 4)]
    assert kvm_nlist(kd, nl) == 0
    assert nl[2] == nlist("_version", 1, 2, 3, 4)


def test_nlist_of_nothing(kd):
    assert kvm_nlist(kd, []) == 0
    assert kvm_nlist(kd, [nlist(None)]) == 0


def test_nlist_counts_misses_and_clears_them(kd):
    """Apple's and OpenBSD's leave stale values behind."""
    nl = [nlist("_no_such", 15, 1, 1, 99), nlist("_allproc"), nlist("_nor_this", 1, 1, 1, 1)]
    assert kvm_nlist(kd, nl) == 2
    assert nl[0] == nlist("_no_such")
    assert nl[2] == nlist("_nor_this")
    assert nl[1].n_value == truth(I386)["symbols"]["allproc"]


def test_nlist_keeps_order_and_duplicates(kd):
    nl = [nlist("_version"), nlist("_allproc"), nlist("_version")]
    assert kvm_nlist(kd, nl) == 0
    assert nl[0] == nl[2]
    assert [entry.n_name for entry in nl] == ["_version", "_allproc", "_version"]


def test_nlist_does_not_skip_entries_that_are_set_already(kd):
    """FreeBSD's live nlist2 counts those as missing."""
    assert kvm_nlist2(kd, [nlist("_allproc", n_type=15)]) == 0


def test_either_spelling_finds_a_symbol(tmp_path):
    """The exact name first, then with, then without one underscore."""
    symbols = [Sym("_both", 1), Sym("both", 2), Sym("_c", 3), Sym("asm", 4)]
    handle = tiny_kd(tmp_path / "kernel", symbols)
    nl = [nlist(name) for name in ("_both", "both", "c", "_asm", "__c")]
    assert kvm_nlist(handle, nl) == 0
    assert [entry.n_value for entry in nl] == [1, 2, 3, 4, 3]
    kvm_close(handle)


def test_nlist_knows_what_is_a_definition(tmp_path):
    symbols = [
        Sym("_undefined", 0, macho.N_UNDF | N_EXT, 0),
        Sym("_common", 64, macho.N_UNDF | N_EXT, 0),
        Sym("_stab", 0x1234, 0x24, 1),
        Sym("_zero", 0, macho.N_ABS | N_EXT, 0, 7),
        Sym("_static", 0x10, macho.N_SECT, 2, 3),
    ]
    handle = tiny_kd(tmp_path / "kernel", symbols)
    nl = [nlist(symbol.name) for symbol in symbols]
    assert kvm_nlist(handle, nl) == 3
    assert [entry.n_type for entry in nl] == [0, 0, 0, macho.N_ABS | N_EXT, macho.N_SECT]
    assert nl[3] == nlist("_zero", macho.N_ABS | N_EXT, 0, 7, 0)
    assert nl[4] == nlist("_static", macho.N_SECT, 2, 3, 0x10)
    kvm_close(handle)


def test_nlist_of_a_stripped_kernel_misses_everything_and_says_so(tmp_path):
    for symbols in (None, ()):
        handle = tiny_kd(tmp_path / "kernel", symbols)
        assert kvm_nlist(handle, [nlist("_allproc"), nlist("_version")]) == 2
        assert "no symbol table" in kvm_geterr(handle)
        kvm_close(handle)


def test_nlist_of_a_core_alone_says_which_kernel_is_wanted():
    handle = kvm_open2(None, plain_core(X64), O_RDONLY, None, None)
    assert kvm_nlist(handle, [nlist("_allproc")]) == 1
    assert truth(X64)["uuid"] in kvm_geterr(handle)
    assert kvm_getprocs(handle, KERN_PROC_ALL, 0) == (None, 0)
    kvm_close(handle)


def test_nlist_fails_when_a_name_is_too_long(kd):
    """The whole call: what could have been found is not half given."""
    nl = [nlist("_allproc"), nlist("_" + "a" * 4096)]
    assert kvm_nlist(kd, nl) == -1
    assert kvm_geterr(kd) == "symbol too large"
    assert nl[0] == nlist("_allproc")
    assert kvm_nlist(kd, [nlist("_" + "a" * 4095)]) == 1


def test_nlist_fails_when_the_table_cannot_be_read(tmp_path):
    """A table outside the file is refused when it is opened; a handle that is closed has none."""
    errbuf = Errbuf()
    kernel = tiny(tmp_path / "kernel", [Sym("_a", 1)], strsize=1 << 20)
    assert kvm_open2(kernel, "/dev/null", O_RDONLY, errbuf, None) is None
    assert "string table" in errbuf.text
    handle = opened(I386)
    kvm_close(handle)
    assert kvm_nlist(handle, [nlist("_allproc")]) == -1
    assert kvm_geterr(handle) == "the handle is closed"


def test_resolver_decides_alone():
    """n_type is FreeBSD's N_DATA|N_EXT whatever the symbol is; 0 is an address."""
    known = {"_there": 0xFFFFFF8012345678, "_null": 0}
    handle = kvm_open2(*paths(X64), O_RDONLY, None, known.get)
    nl = [nlist("_there"), nlist("_allproc", 1, 1, 1, 1), nlist("_null")]
    assert kvm_nlist2(handle, nl) == 1
    assert nl[0] == nlist("_there", N_DATA | N_EXT, 0, 0, 0xFFFFFF8012345678)
    assert nl[1] == nlist("_allproc")
    assert nl[2] == nlist("_null", N_DATA | N_EXT, 0, 0, 0)
    kvm_close(handle)


def test_nlist2_and_read2_give_the_same_on_every_host():
    """A kernel of 64 bits needs neither of them, nor a resolver, to keep its addresses whole."""
    handle = opened(X64)
    one, two = [nlist("_version")], [nlist("_version")]
    assert kvm_nlist(handle, one) == kvm_nlist2(handle, two) == 0
    assert one == two
    assert one[0].n_value == truth(X64)["symbols"]["version"] > 1 << 32
    banner = truth(X64)["banner"].encode()
    assert kvm_read2(handle, one[0].n_value, len(banner)) == banner
    kvm_close(handle)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("x86_64", (0, 1)), ("i386", (1, 0)), ("i686", (1, 0)), ("amd64", (0, 1)), ("arm64", (0, 0))],
)
def test_native(monkeypatch, machine, expected):
    monkeypatch.setattr(os, "uname", lambda: type("host", (), {"machine": machine}))
    handles = opened(I386), opened(X64)
    assert tuple(map(kvm_native, handles)) == expected
    for handle in handles:
        kvm_close(handle)


# memory


def test_read_gives_what_the_running_kernel_said(crashed):
    """kvm_read_positive_test_no_error: nlist, read, and the value sysctl told."""
    sysctl = oracle("crash")["userland"]["sysctl"]
    for symbol, name in (("_maxproc", "kern.maxproc"), ("_version", "kern.version")):
        nl = [nlist(symbol)]
        assert kvm_nlist(crashed, nl) == 0
        value = bytes.fromhex(sysctl[name])
        assert kvm_read(crashed, nl[0].n_value, len(value)) == value
    assert kvm_geterr(crashed) == ""


@pytest.mark.parametrize("dump", DUMPS)
def test_read_up_to_the_last_byte_of_a_segment(dump):
    handle = opened(dump)
    end, start = hole_after(dump)
    for size in (1, 16, 0x1001, end - start):
        assert kvm_read(handle, end - size, size) == stored(dump, end - size, size)
    assert kvm_geterr(handle) == ""
    kvm_close(handle)


@pytest.mark.parametrize("dump", DUMPS)
def test_a_fault_on_the_first_page(dump):
    """None, C's -1, and the reason stays with the address; bytes behind the hole are not given."""
    handle = opened(dump)
    end, _ = hole_after(dump)
    following = min(row[0] for row in segments(dump) if row[0] > end)
    for address, size in ((end, 1), (end, 0x1000), (following - 1, 2)):
        assert kvm_read(handle, address, size) is None
        assert kvm_geterr(handle) == f"invalid address ({address:#x}): unmapped"
    kvm_close(handle)


@pytest.mark.parametrize("dump", DUMPS)
def test_a_fault_on_a_later_page_keeps_what_was_read(dump):
    """All BSDs throw it away."""
    handle = opened(dump)
    end, start = hole_after(dump)
    data = kvm_read(handle, start, end - start + 0x1000)
    assert data == stored(dump, start, end - start)
    assert kvm_geterr(handle) == f"short read: invalid address ({end:#x}): unmapped"
    assert kvm_read(handle, end - 1, 2) == stored(dump, end - 1, 1)
    kvm_close(handle)


def test_a_fault_on_a_middle_page_ends_the_answer(kd):
    """What lies behind the hole is not glued to what lies before it."""
    end, _ = hole_after(I386)
    following = min(row[0] for row in segments(I386) if row[0] > end)
    data = kvm_read(kd, end - 16, following - end + 32)
    assert data == stored(I386, end - 16, 16)


def test_a_core_that_is_cut_off_reads_short():
    """Peers read 0 bytes and say nothing; here the reason tells a hole from what the file lost."""
    lost, lost_end = truth(I386)["formats"]["damaged"]["core.truncated.macho"]["lost"][0]
    core = real(f"dumps/{I386}/damaged/core.truncated.macho")
    with pytest.warns(KvmWarning, match="past the end of the file"):
        handle = kvm_open2(paths(I386)[0], core, O_RDONLY, None, None)
    assert kvm_read(handle, lost, 16) == b""
    assert kvm_geterr(handle) == f"short read: invalid address ({lost:#x}): absent"
    assert kvm_read(handle, lost_end - 1, 1) == b""
    held = next(row[0] for row in segments(I386) if row[0] <= lost < row[0] + row[1])
    assert lost > held
    assert kvm_read(handle, held, lost - held + 16) == stored(I386, held, lost - held)
    assert "short read" in kvm_geterr(handle)
    kvm_close(handle)


def test_no_bytes_can_be_read_anywhere(kd):
    kd.error = "planted"
    for address in (0, hole_after(I386)[0], 0xFFFFFFFF, 1 << 64, -1):
        assert kvm_read(kd, address, 0) == b""
    assert kvm_geterr(kd) == "planted"


def test_wrap_around_is_a_fault_not_a_wrap():
    """Neither 2^32 nor 2^64 leads back to 0, which both kernels here have mapped low memory at."""
    for dump, top in ((I386, 1 << 32), (X64, 1 << 64)):
        handle = opened(dump)
        for address, size in ((top - 1, 2), (top - 0x1000, 0x2000), (top, 1), (top + 0x1000, 1)):
            assert kvm_read(handle, address, size) is None
        assert "invalid address" in kvm_geterr(handle)
        kvm_close(handle)


def test_wrap_of_the_length_costs_nothing(kd):
    """A length no memory has: what there is is given, at once."""
    end, start = hole_after(I386)
    for size in (1 << 32, 1 << 63, 1 << 80):
        assert kvm_read(kd, start, size) == stored(I386, start, end - start)
        assert kvm_read(kd, end, size) is None
    assert kvm_read(kd, start, -1) is None
    assert kvm_geterr(kd) == "invalid length (-1)"


def test_wrap_of_a_negative_address_is_cs():
    """lseek takes 0xffffff80… as a negative number, and so does many a port."""
    handle = opened(X64)
    address = truth(X64)["symbols"]["version"]
    assert kvm_read(handle, address - (1 << 64), 6) == b"Darwin"
    kvm_close(handle)


def test_reading_a_closed_handle():
    handle = opened(I386)
    kvm_close(handle)
    assert kvm_read(handle, 0x100000, 4) is None
    assert kvm_write(handle, 0x100000, b"") == -1
    assert kvm_getprocs(handle, KERN_PROC_ALL, 0) == (None, 0)
    assert kvm_getloadavg(handle, 3) is None
    assert kvm_kerndisp(handle) == kvm_native(handle) == 0
    assert kvm_walk_pages(handle, lambda page, closure: 1) == 0
    assert kvm_geterr(handle) == "there is no core to walk"


# slide and pages


@pytest.mark.parametrize("dump", DUMPS)
def test_kerndisp_is_the_slide(dump):
    handle = opened(dump)
    assert kvm_kerndisp(handle) == handle.slide == truth(dump)["slide"]
    kvm_close(handle)


def test_kerndisp_of_an_unknown_slide_is_0_and_slide_tells_it_apart():
    handle = kvm_open2(None, plain_core(X64), O_RDONLY, None, None)
    assert kvm_kerndisp(handle) == 0
    assert handle.slide is None
    kvm_close(handle)


@pytest.mark.parametrize("found", [-0x100000, (1 << 64) - 0x100000])
def test_kerndisp_may_be_negative(kd, monkeypatch, found):
    """Also when it was found as the difference of two addresses of 64 bits."""
    monkeypatch.setattr(type(kd.kvm), "kerndisp", property(lambda _: found))
    assert kvm_kerndisp(kd) == kd.slide == -0x100000


@pytest.mark.parametrize("dump", DUMPS)
def test_walk_visits_every_page_once(dump):
    """By address, each with where the file holds it; FreeBSD's leftover walk tested wrong bits."""
    handle = opened(dump)
    pages = []
    assert kvm_walk_pages(handle, lambda page, closure: closure.append(page) or 1, pages) == 1
    expected = [
        (address + at, offset + at)
        for address, size, offset in segments(dump)
        for at in range(0, size, 4096)
    ]
    assert [(page.kp_kmap_vaddr, page.kp_offset) for page in pages] == expected
    assert {page.kp_len for page in pages} == {4096}
    assert {page.kp_version for page in pages} == {2}
    with open(plain_core(dump), "rb") as core:
        for page in pages[:: len(pages) // 50]:
            core.seek(page.kp_offset)
            assert kvm_read(handle, page.kp_kmap_vaddr, page.kp_len) == core.read(page.kp_len)
    kvm_close(handle)


@pytest.mark.parametrize("stop", [0, False, None])
def test_walk_stops_when_the_callback_says_so(kd, stop):
    seen = []

    def callback(page, closure):
        seen.append(page)
        return stop if len(seen) == 3 else 1

    assert kvm_walk_pages(kd, callback) == 0
    assert len(seen) == 3


def test_walk_of_segments_that_overlap_or_begin_inside_a_page(tmp_path):
    """Each address once; in cores of 10.4 to 10.6 the first segment in the file has the bytes."""
    core = macho.MachO("i386", macho.MH_CORE)
    core.segment("", 0x20000000, b"a" * 0x3000)
    core.segment("", 0x20001800, b"b" * 0x3000)
    core.segment("", 0x30000800, b"c" * 0x1000, vmsize=0x1000)
    core.thread(macho.thread_state("i386"))
    path = tmp_path / "core"
    path.write_bytes(core.build())
    handle = kvm_open2(None, str(path), O_RDONLY, None, None)
    pages = []
    assert kvm_walk_pages(handle, lambda page, closure: pages.append(page) or 1) == 1
    spans = [(page.kp_kmap_vaddr, page.kp_len) for page in pages]
    assert spans == [
        (0x20000000, 0x1000),
        (0x20001000, 0x1000),
        (0x20002000, 0x1000),
        (0x20003000, 0x1000),
        (0x20004000, 0x800),
        (0x30000800, 0x800),
        (0x30001000, 0x800),
    ]
    with open(path, "rb") as file:
        for page in pages:
            file.seek(page.kp_offset)
            assert file.read(page.kp_len) == kvm_read(handle, page.kp_kmap_vaddr, page.kp_len)
    kvm_close(handle)


# processes


def pids(answer) -> list[int]:
    records, count = answer
    assert len(records) == count
    return [record.kp_proc.p_pid for record in records]


@pytest.mark.parametrize("dump", DUMPS)
def test_getprocs_lists_allproc_then_zombproc(dump):
    """FreeBSD's dead walk loses zombies."""
    handle = opened(dump)
    facts = truth(dump)
    assert pids(kvm_getprocs(handle, KERN_PROC_ALL, 0)) == facts["allproc"] + facts["zombproc"]
    assert pids(kvm_getprocs(handle, KERN_PROC_ALL, 12345)) == facts["allproc"] + facts["zombproc"]
    kvm_close(handle)


OPS = {
    "pid": KERN_PROC_PID,
    "pgid": KERN_PROC_PGRP,
    "sid": KERN_PROC_SESSION,
    "uid": KERN_PROC_UID,
    "ruid": KERN_PROC_RUID,
}


@pytest.mark.parametrize("name", OPS)
def test_getprocs_filters(kd, name):
    """SESSION too: XNU gave every process, later none."""
    processes = truth(I386)["processes"]
    for value in sorted({process[name] for process in processes})[:8]:
        expected = {process["pid"] for process in processes if process[name] == value}
        assert set(pids(kvm_getprocs(kd, OPS[name], value))) == expected


def test_getprocs_by_terminal(kd):
    """FreeBSD's dead walk always has NODEV."""
    expected = {p["pid"] for p in truth(I386)["processes"] if p["tty"] == "/dev/ttys001"}
    assert set(pids(kvm_getprocs(kd, KERN_PROC_TTY, 16 << 24 | 1))) == expected
    assert kvm_getprocs(kd, KERN_PROC_TTY, -1) == ([], 0)


def test_getprocs_by_pid_compares_the_process_not_its_parent(kd):
    """OpenBSD's dead walk compares the parent's, and lets threads overwrite each other."""
    processes = {process["pid"]: process for process in truth(I386)["processes"]}
    parent = next(p["ppid"] for p in processes.values() if p["ppid"] > 1)
    (record,), count = kvm_getprocs(kd, KERN_PROC_PID, parent)
    assert count == 1
    assert record.kp_proc.p_pid == parent
    assert len(processes[0]["threads"]) > 1
    assert pids(kvm_getprocs(kd, KERN_PROC_PID, 0)) == [0]


def test_getprocs_of_nobody_is_an_empty_list(kd):
    assert kvm_getprocs(kd, KERN_PROC_PID, 31337) == ([], 0)
    assert kvm_geterr(kd) == ""


@pytest.mark.parametrize("op", [7, 8, -1, 0x10])
def test_getprocs_unknown_filter(kd, op):
    """10.4 gave every process."""
    assert kvm_getprocs(kd, op, 0) == (None, 0)
    assert kvm_geterr(kd) == "invalid filter"


def test_getprocs_can_be_asked_inside_its_own_loop(kd):
    """illumos' test.c: there a getproc inside the loop of nextproc rewinds that."""
    records, count = kvm_getprocs(kd, KERN_PROC_ALL, 0)
    seen = []
    for record in records:
        (same,), one = kvm_getprocs(kd, KERN_PROC_PID, record.kp_proc.p_pid)
        assert (same, one) == (record, 1)
        seen.append(record)
    assert len(seen) == count
    assert kvm_getprocs(kd, KERN_PROC_ALL, 0) == (seen, count)


def test_getprocs_gives_what_is_left_of_a_torn_list():
    """One damaged page costs the processes on it; why is said, and every other one is there."""
    hole = truth(I386)["formats"]["damaged"]["core.missing-page.macho"]
    core = real(f"dumps/{I386}/damaged/core.missing-page.macho")
    handle = kvm_open2(paths(I386)[0], core, O_RDONLY, None, None)
    found = pids(kvm_getprocs(handle, KERN_PROC_ALL, 0))
    everyone = {process["pid"] for process in truth(I386)["processes"]}
    assert everyone - {*found} <= {*hole["procs_touched"]}
    assert kvm_geterr(handle).startswith("allproc: stopped after ")
    kvm_close(handle)


def test_getprocs_ends_on_a_cyclic_list():
    core = real(f"dumps/{I386}/damaged/core.cyclic.macho")
    handle = kvm_open2(paths(I386)[0], core, O_RDONLY, None, None)
    found = pids(kvm_getprocs(handle, KERN_PROC_ALL, 0))
    assert len(found) == len(set(found)) == len(truth(I386)["processes"])
    assert "circle" in kvm_geterr(handle)
    kvm_close(handle)


def test_allproc_by_hand(crashed):
    """As illumos' test.c walks a ring: nlist, read the head, follow the links, back at the end."""
    oracle_pids = [p["p_pid"] for p in oracle("crash")["procs"] if p["list"] == "_allproc"]
    nl = [nlist(name) for name in ("_allproc", "_kernproc", "_nprocs", "_tasks", "_no", "_version")]
    assert kvm_nlist(crashed, nl) == 1
    types = layouts.table("10.9.5 x86_64")
    found, link = [], nl[0].n_value
    while True:
        (proc,) = struct.unpack("<Q", kvm_read(crashed, link, 8))
        if not proc:
            break
        assert len(kvm_read(crashed, proc, 16 * 8)) == 128
        data = kvm_read(crashed, proc + types.offset("proc", "p_pid"), 4)
        found.append(int.from_bytes(data, "little"))
        link = proc + types.offset("proc", "p_list")
        assert len(found) <= 100
    assert found == oracle_pids


def test_argv_and_environment_of_a_dead_kernel(kd):
    """No user memory in a kernel core: NULL and a reason, for kernel_task and zombies too."""
    for pid in (0, 1, truth(I386)["zombproc"][0]):
        (record,), _ = kvm_getprocs(kd, KERN_PROC_PID, pid)
        for function in (kvm_getargv, kvm_getenvv):
            for nchr in (0, 1, 1 << 40):
                kd.error = ""
                assert function(kd, record, nchr) is None
                assert kvm_geterr(kd) == "cannot read user space from dead kernel"


# load


@pytest.mark.parametrize("dump", DUMPS)
def test_loadavg_is_what_was_planted(dump):
    """XNU has no _fscale, on which 4.4BSD's code insists."""
    handle = opened(dump)
    planted = truth(dump)["statics"]["loadavg"]
    for nelem in (0, 1, 2, 3, 4, 1 << 40):
        assert kvm_getloadavg(handle, nelem) == planted[:nelem]
    kvm_close(handle)


def test_loadavg_of_less_than_none(kd):
    assert kvm_getloadavg(kd, -1) is None
    assert kvm_geterr(kd) == "invalid number of load averages (-1)"


def test_loadavg_of_a_kernel_without_the_symbol(tmp_path):
    handle = tiny_kd(tmp_path / "kernel", [Sym("_other", 1)])
    assert kvm_getloadavg(handle, 3) is None
    assert "_averunnable" in kvm_geterr(handle)
    kvm_close(handle)


# handles


def test_two_handles_share_nothing():
    """FreeBSD keeps argv, pcpu, cptime and swapinfo of all handles in one place."""
    first, second = opened(I386), opened(X64)
    assert kvm_read(first, 0, 1) is None
    assert kvm_geterr(second) == ""
    names = [nlist("_allproc")], [nlist("_allproc")]
    assert kvm_nlist(first, names[0]) == kvm_nlist(second, names[1]) == 0
    assert names[0][0].n_value == truth(I386)["symbols"]["allproc"]
    assert names[1][0].n_value == truth(X64)["symbols"]["allproc"]
    one = kvm_getprocs(first, KERN_PROC_PID, 1)[0]
    two = kvm_getprocs(second, KERN_PROC_PID, 1)[0]
    assert one[0].kp_eproc.e_paddr < 1 << 32 < two[0].kp_eproc.e_paddr
    assert kvm_close(first) == 0
    assert kvm_read(second, names[1][0].n_value, 8) is not None
    assert kvm_close(second) == 0


def test_star_import_gives_the_names_of_kvm_3():
    names: dict[str, object] = {}
    exec("from kvmtool.libkvm import *", names)
    wanted = "open openfiles open2 close nlist nlist2 read read2 write geterr getprocs getargv"
    wanted += " getenvv getloadavg kerndisp walk_pages native"
    assert {f"kvm_{name}" for name in wanted.split()} <= names.keys()
    assert {"nlist", "O_RDONLY", "KERN_PROC_ALL"} <= names.keys()
    assert "os" not in names
