"""Symbols by name and by address: the slide, the spelling, and which of several entries counts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.errors import NotFoundError
from kvmtool.macho import MachO
from kvmtool.nlist import NlistTable
from kvmtool.source import BytesSource, FileSource
from kvmtool.symbols import SymbolTable
from tests import inputs
from tests.builders import macho as build
from tests.builders.macho import Sym

N_SECT, N_EXT, N_PEXT, N_UNDF, N_ABS, N_PBUD = 0xE, 0x1, 0x10, 0x0, 0x2, 0xC
N_GSYM = 0x20
SLIDE = 0xA00000


class Counting(BytesSource):
    """Bytes that know how often they were asked for."""

    asked = 0

    def read_at(self, off, size):
        self.asked += 1
        return super().read_at(off, size)

    def find(self, needle, start, end):
        self.asked += 1
        return super().find(needle, start, end)


def table_of(symbols, slide=0, arch="x86_64"):
    file = build.MachO(arch, build.MH_EXECUTE)
    file.symtab(symbols, dysymtab=False)
    return SymbolTable(MachO(Counting(file.build(), "kernel")).symtab, slide)


def external(name, value, n_type=N_SECT | N_EXT):
    return Sym(name, value, n_type, 1)


# the slide


def test_addresses_are_slid_and_values_are_not():
    table = table_of([external("_cdevsw", 0xFFFFFF8000844D50)], SLIDE)
    symbol = table.lookup("_cdevsw")
    assert (symbol.address, symbol.n_value) == (0xFFFFFF8001244D50, 0xFFFFFF8000844D50)
    assert table.address("_cdevsw") == symbol.address
    assert list(table) == [symbol]
    assert table.at(symbol.address) == (symbol, 0)


def test_absolute_numbers_do_not_move():
    table = table_of([Sym("_number", 7, N_ABS | N_EXT, 0), external("_place", 0x1000)], SLIDE)
    assert table.address("_number") == 7
    assert table.address("_place") == 0x1000 + SLIDE
    assert table.at(7) is None  # a number is no place


def test_a_slide_downwards_wraps_round():
    table = table_of([external("_a", 0xFFFFFF8000200000)], -0x100000 % (1 << 64))
    assert table.address("_a") == 0xFFFFFF8000100000


# the spelling


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("_cdevsw", "_cdevsw"), ("_cdevsw", "cdevsw"), ("start", "start"), ("start", "_start")],
)
def test_one_leading_underscore_more_or_less(stored, asked):
    symbol = table_of([external(stored, 1)]).get(asked)
    assert symbol is not None
    assert symbol.name == stored


@pytest.mark.parametrize(
    ("stored", "asked"),
    [("__x", "x"), ("x", "__x"), ("_X", "_x"), *(("_x", s) for s in ("", "_", "_x\0", "_x "))],
)
def test_no_other_spelling(stored, asked):
    assert table_of([external(stored, 1)]).get(asked) is None


def test_the_exact_spelling_comes_first_then_the_longer_one():
    symbols = [external("x", 1), external("_x", 2), external("__x", 3)]
    assert [table_of(symbols).address(name) for name in ("x", "_x", "__x")] == [1, 2, 3]
    assert table_of(symbols[1:]).address("x") == 2
    assert table_of([symbols[0], symbols[2]]).address("_x") == 3


# which entry counts


def test_stabs_and_the_undefined_never_match():
    # 10.4 to 10.6: the stab of a global, with value 0, stands before the real one
    real = external("_cdevsw", 0x441720)
    for other in (
        Sym("_cdevsw", 0, N_GSYM, 0),
        Sym("_cdevsw", 0, N_UNDF | N_EXT, 0),
        Sym("_cdevsw", 64, N_UNDF | N_EXT, 0),  # common: the value is a size
        Sym("_cdevsw", 0, N_PBUD | N_EXT, 0),
    ):
        assert table_of([other, real]).address("_cdevsw") == 0x441720
        alone = table_of([other])
        assert alone.get("_cdevsw") is None
        assert list(alone) == []
        assert alone.at(0x441720) is None


def test_a_static_does_not_hide_what_the_world_sees():
    statics = [Sym("_lock", 1, N_SECT, 1), Sym("_lock", 2, N_SECT | N_PEXT, 1)]
    assert table_of([*statics, external("_lock", 3)]).address("_lock") == 3
    assert table_of(statics).address("_lock") == 1  # among statics the first


def test_a_local_symbol_will_do():
    # _allproc and _lowGlo are local in arm64 kernels
    assert table_of([Sym("_allproc", 5, N_SECT, 1)]).address("_allproc") == 5


# misses


def test_a_miss_is_an_error_with_near_misses():
    table = table_of([external(n, 1) for n in ("_allproc", "_zombproc", "_IOLog", "_cdevsw")])
    with pytest.raises(NotFoundError, match="symbol _alproc not found") as e:
        table.lookup("_alproc")
    assert (e.value.kind, e.value.name, e.value.near) == ("symbol", "_alproc", ("_allproc",))
    assert table.near("_IOlog") == ["_IOLog"]
    assert table.near("_Cdevsw") == ["_cdevsw"]
    assert table.near("_nothing_like_it") == []
    for strange in ("", "_", "\0", "\udcff"):
        assert table.near(strange) == []
        with pytest.raises(NotFoundError):
            table.address(strange)


def test_a_kernel_without_symbols_says_so():
    file = build.MachO("x86_64", build.MH_EXECUTE)
    table = SymbolTable(MachO(BytesSource(file.build(), "kernel")).symtab, 0)
    assert len(table) == 0
    assert list(table) == []
    assert table.at(0x1000) is None
    with pytest.raises(NotFoundError, match="the kernel has no symbol table") as caught:
        table.lookup("_version")
    assert caught.value.near == ()


# what is asked twice is read once


def test_a_second_lookup_reads_nothing():
    table = table_of([external(f"_s{n}", n) for n in range(100)])
    source = table._table._source
    for name in ("_s7", "s7", "_nosuch"):
        first = table.get(name)
        asked = source.asked
        assert asked > 0
        assert table.get(name) == first
        assert source.asked == asked


# by address


def test_the_last_symbol_at_or_below():
    table = table_of([external("_b", 0x2000), external("_a", 0x1000), external("_c", 0x3000)], 0x10)
    names = {}
    for address in (0x100F, 0x1010, 0x1011, 0x200F, 0x2010, 0x3010, 0x9999):
        found = table.at(address)
        names[address] = found and (found[0].name, found[1])
    assert names == {
        0x100F: None,
        0x1010: ("_a", 0),
        0x1011: ("_a", 1),
        0x200F: ("_a", 0xFFF),
        0x2010: ("_b", 0),
        0x3010: ("_c", 0),
        0x9999: ("_c", 0x6989),
    }


def test_of_several_names_for_a_place_the_worlds_wins():
    symbols = [
        external("_public", 0x1000),
        Sym("_static", 0x1000, N_SECT, 1),
        Sym("_s2", 0x1000, N_SECT, 1),
    ]
    symbol, distance = table_of(symbols).at(0x1004)
    assert (symbol.name, distance) == ("_public", 4)


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(0, 60), st.sampled_from([0, 10]))
def test_at_is_a_search_through_all(values, address, slide):
    table = table_of([external(f"_{n}", value) for n, value in enumerate(values)], slide)
    below = [value + slide for value in values if value + slide <= address]
    found = table.at(address)
    if not below:
        assert found is None
    else:
        assert (found[0].address, found[1]) == (max(below), address - max(below))


# the real ones


@pytest.mark.parametrize("dump", inputs.DUMPS)
def test_the_true_addresses_of_a_dumps_kernel(dump):
    truth = inputs.truth(dump)
    source = FileSource(inputs.real(f"dumps/{dump}/mach_kernel"))
    table = SymbolTable(MachO(source).symtab, truth["slide"])
    assert len(table) == truth["nlist_count"]
    assert {name: table.address(f"_{name}") for name in truth["symbols"]} == truth["symbols"]
    assert table.address("cdevsw") == truth["cdevsw"]["address"]
    cpu = truth["cpu"]
    for address, function in zip(cpu["backtrace"], cpu["functions"], strict=True):
        symbol, distance = table.at(address)
        assert symbol.address == table.address(function)  # two names may share the place
        assert 0 <= distance < 0x2000
    source.close()


def test_the_true_addresses_of_the_real_machine():
    oracle = inputs.oracle("crash")["symbols"]
    source = FileSource(inputs.real("machine/x86_64-xnu-2422.115.4.mach_kernel"))
    table = SymbolTable(MachO(source).symtab, 0)
    assert {name: f"{table.address(name):#x}" for name in oracle} == {
        name: entry["addr"] for name, entry in oracle.items()
    }
    source.close()


def test_the_true_addresses_of_a_slid_machine():
    oracle = inputs.oracle("kaslr")
    source = FileSource(inputs.real("machine/x86_64-xnu-2422.115.4.mach_kernel"))
    table = SymbolTable(MachO(source).symtab, int(oracle["slide"], 16))
    assert table.slide
    for name, entry in oracle["symbols"].items():
        symbol = table.lookup(name)
        assert f"{symbol.n_value:#x}" == entry["addr_static"]
        assert f"{symbol.address:#x}" == entry["addr"]
    source.close()


@pytest.mark.parametrize(
    "name",
    [
        "objects/ppc-xnu-792.25.20-kern_proc.o",
        "kexts/i386-KernelMemoryAccess",
        "dumps/i386-10.5.8/mach_kernel",
        "dumps/x86_64-10.13.6/mach_kernel",
    ],
)
def test_many_names_are_found_as_one_is(name):
    """All names put in order give what a search for each gives, duplicates and tails included."""
    table = MachO(FileSource(inputs.real(name))).symtab
    every = sorted({symbol.name for symbol in SymbolTable(table, 0) if symbol.name})
    few = [*every[:: max(1, len(every) // 300)], "_no_such_symbol", "", "�"]
    many = SymbolTable(table, 0x1000)
    many.expect(10_000)
    for wanted in few:
        one = SymbolTable(table, 0x1000)
        assert many.get(wanted) == one.get(wanted), wanted


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["_read", "_mmread", "_a", ""]),
            st.sampled_from([0x01, 0x0E, 0x0F, 0x02, 0x24, 0x64]),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_of_one_name_the_same_entry_is_best(entries, tails):
    strings, places = b" \0", {}
    for name in ("_mmread", "_read", "_a", ""):
        encoded = name.encode() + b"\0"
        at = strings.find(encoded) if tails else -1
        if at < 0:
            at, strings = len(strings), strings + encoded
        places[name] = at
    data = b"".join(
        struct.pack("<IBBhQ", places[name], kind, 1, 0, 0x100 + index)
        for index, (name, kind) in enumerate(entries)
    )
    source = BytesSource(data + strings)
    table = NlistTable(source, 0, len(entries), len(data), len(strings), "<", True)
    many = SymbolTable(table, 0)
    many.expect(100)
    for name in ("_read", "_mmread", "_a", "read"):
        assert many.get(name) == SymbolTable(table, 0).get(name)
