"""Arguments and options that the commands share."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvmtool.cli import params
from kvmtool.cli.params import ADDRESS, OFFSET, SIZE, AddressExpr, Where, choose_columns
from kvmtool.cli.render import Column
from kvmtool.errors import NotFoundError

HIGHEST = 2**64 - 1


def address(text):
    return ADDRESS.convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "base", "offset"),
    [
        ("0x441990", None, 0x441990),
        ("0XFFFFFF8000B2EC80", None, 0xFFFFFF8000B2EC80),
        ("4462992", None, 4462992),
        ("0", None, 0),
        (str(HIGHEST), None, HIGHEST),
        ("0x1000+16", None, 0x1010),
        ("0x1000-0x10", None, 0xFF0),
        ("_cdevsw", "_cdevsw", 0),
        ("_cdevsw+0x270", "_cdevsw", 0x270),
        ("_cdevsw-4", "_cdevsw", -4),
        (" _cdevsw + 11 - 0x1 ", "_cdevsw", 10),
        ("deadbeef", "deadbeef", 0),
        ("add", "add", 0),
        ("add+10", "add", 10),
        ("-[IOThing init:]+8", "-[IOThing init:]", 8),
        ("__ZN9IOService5startEPS_", "__ZN9IOService5startEPS_", 0),
        ("_foo+bar", "_foo+bar", 0),
    ],
)
def test_addresses(text, base, offset):
    assert address(text)[1:] == (base, offset)
    assert address(text).text == text.strip()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected an address"),
        ("-5", "-5 is not a number"),
        ("+5", "not a number"),
        ("0xzz", "0xzz is not a number"),
        ("12ab", "12ab is not a number"),
        ("0x", "not a number"),
        ("00441720", "ambiguous, write 0x441720 or 441720"),
        ("_cdevsw+010", "ambiguous, write 0x10 or 10"),
        ("0x10-0x11", "is -0x1, expected 0 to 0xffffffffffffffff"),
        (str(2**64), "expected 0 to 0xffffffffffffffff"),
        ("0x10000000000000000", "expected 0 to 0xffffffffffffffff"),
        ("9" * 5000, "not a number"),
        ("0x" + "f" * 5000, "not a number"),
    ],
)
def test_what_is_no_address(text, complaint):
    with pytest.raises(click.BadParameter, match=complaint.replace("+", r"\+")):
        address(text)


def test_an_address_is_resolved_by_a_lookup():
    symbols = {"_cdevsw": 0x441720}
    assert address("_cdevsw+0x270").resolve(symbols.__getitem__) == 0x441990
    assert address("0x10").resolve(symbols.__getitem__) == 0x10
    assert ADDRESS.convert(AddressExpr("x", "x", 1), None, None) == ("x", "x", 1)
    for text in ("_cdevsw-0x441721", "_cdevsw+0xffffffffffffffff"):
        with pytest.raises(click.BadParameter, match="expected 0 to 0xffffffffffffffff"):
            address(text).resolve(symbols.__getitem__)


def test_a_missing_symbol_that_looks_like_a_number_says_so():
    def lookup(name):
        raise NotFoundError("symbol", name, ["_near"])

    with pytest.raises(NotFoundError, match=r"symbol deadbeef .*as a number it is 0xdeadbeef"):
        address("deadbeef").resolve(lookup)
    with pytest.raises(NotFoundError) as error:
        address("_far").resolve(lookup)
    assert "as a number" not in str(error.value)


@given(base=st.integers(0, HIGHEST), offset=st.integers(-HIGHEST, HIGHEST))
def test_address_arithmetic(base, offset):
    text = f"{base:#x}{offset:+d}"
    if 0 <= base + offset <= HIGHEST:
        assert address(text).offset == base + offset
        assert address(f"s{offset:+#x}").resolve(lambda name: base) == base + offset
    else:
        with pytest.raises(click.BadParameter):
            address(text)


@given(st.text())
def test_any_text_is_an_address_or_a_usage_error(text):
    try:
        found = address(text)
    except click.BadParameter:
        return
    assert found.base is not None or 0 <= found.offset <= HIGHEST


@pytest.mark.parametrize(
    ("text", "size"),
    [("4", 4), ("0x10", 16), ("4k", 4096), ("1M", 1 << 20), ("2g", 2 << 30), ("1t", 1 << 40)],
)
def test_sizes(text, size):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5k", "k", "4kb", "0x", "010", "17179869184g"])
def test_what_is_no_size(text):
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize(("text", "offset"), [("0x1a00000", 0x1A00000), ("-0x10", -16), ("7", 7)])
def test_offsets(text, offset):
    assert OFFSET.convert(text, None, None) == offset


@pytest.mark.parametrize("text", ["", "-", "--1", "x", "1k", "0x1ffffffffffffffff"])
def test_what_is_no_offset(text):
    with pytest.raises(click.BadParameter):
        OFFSET.convert(text, None, None)


COLUMNS = (Column("pid", "PID", "number"), Column("comm", "COMMAND"), Column("uid", "UID"))


@pytest.mark.parametrize(
    ("lists", "chosen"),
    [
        ((), "pid=PID comm=COMMAND"),
        (("comm,pid",), "comm=COMMAND pid=PID"),
        (("comm PID", "uid,"), "comm=COMMAND pid=PID uid=UID"),
        (("comm,pid=Process, id",), "comm=COMMAND pid=Process, id"),
        (("pid=", "comm="), "pid= comm="),
    ],
)
def test_columns_are_chosen_as_in_ps(lists, chosen):
    columns = choose_columns(COLUMNS, lists, ("pid", "comm"))
    assert " ".join(f"{column.name}={column.heading}" for column in columns) == chosen
    assert choose_columns(COLUMNS, ()) == list(COLUMNS)


@pytest.mark.parametrize("text", ["nope", "pid,nope", "", "=x"])
def test_an_unknown_column_is_a_usage_error(text):
    with pytest.raises(click.BadParameter, match=r"no column .*expected: pid, comm, uid"):
        choose_columns(COLUMNS, (text,))


@click.group()
@params.kernel_options
def group(where):
    pass


@group.command()
@params.kernel_options
@params.core_argument
@params.format_option
@params.columns_option
def show(where, format, columns):
    click.echo(repr((tuple(where), format, columns)))


@group.command()
@params.kernel_options
@click.argument("name")
def nlist(where, name):
    click.echo(repr((tuple(where), name)))


def invoke(*args, **env):
    clean = {"KVMTOOL_KERNEL": None, "KVMTOOL_CORE": None}
    return CliRunner().invoke(group, args, env=clean | env)


def where_of(*args, **env):
    result = invoke(*args, **env)
    assert result.exit_code == 0, result.output
    return Where(*eval(result.output)[0])


def test_nothing_given():
    assert where_of("show") == Where(None, None, None, None, None, False)
    assert eval(invoke("show").output)[1:] == ("table", ())


def test_options_before_and_after_the_command():
    assert where_of("-N", "k", "-M", "c", "show") == Where("k", "c")
    assert where_of("show", "-N", "k", "--core", "c") == Where("k", "c")
    assert where_of("-N", "k", "-M", "c", "show", "-M", "d") == Where("k", "d")
    every = ("--slide", "-0x10", "--arch", "arm64", "--core-format", "raw", "--force")
    full = Where(None, None, -16, "arm64", "raw", True)
    assert where_of(*every, "show") == where_of("show", *every) == full
    assert where_of(*every, "show", "--slide", "0") == full._replace(slide=0)


def test_the_environment_comes_last():
    env = {"KVMTOOL_KERNEL": "ek", "KVMTOOL_CORE": "ec"}
    assert where_of("show", **env) == Where("ek", "ec")
    assert where_of("-M", "c", "show", **env) == Where("ek", "c")
    assert where_of("-N", "k", "show", "-M", "d", **env) == Where("k", "d")
    assert where_of("show", KVMTOOL_KERNEL="", KVMTOOL_CORE="") == Where()


def test_a_command_of_its_own_needs_no_group():
    result = CliRunner().invoke(nlist, ["-N", "k", "_cdevsw"], env={"KVMTOOL_CORE": "ec"})
    assert eval(result.output) == (tuple(Where("k", "ec")), "_cdevsw")


def test_a_core_may_be_named_alone():
    assert where_of("show", "c") == Where(None, "c")
    assert where_of("-N", "k", "show", "c", KVMTOOL_CORE="ec") == Where("k", "c")
    for args in (("-M", "x", "show", "c"), ("show", "-M", "x", "c")):
        result = invoke(*args)
        assert result.exit_code == 2
        assert "two cores given: x (-M) and c" in result.output


def test_formats_and_columns():
    for name in params.FORMATS:
        assert eval(invoke("show", "--format", name).output)[1] == name
    assert invoke("show", "--format", "xml").exit_code == 2
    assert eval(invoke("show", "-o", "pid", "-o", "comm").output)[2] == ("pid", "comm")


def test_help_names_the_options_in_order():
    help_page = invoke("show", "--help").output
    options = ["-N,", "-M,", "--slide", "--arch", "--core-format", "--force", "--format", "-o,"]
    assert [help_page.index(option + " ") for option in options] == sorted(
        help_page.index(option + " ") for option in options
    )
    assert "KVMTOOL_KERNEL" in help_page
    assert "[CORE]" in help_page


def test_start_up_costs_click_and_nothing_else():
    """But for what ends a command quietly (signal) and soon (gc), and tells how far it is."""
    code = (
        "import sys, click\n"
        "click.Path()  # click asks gettext for the word, which imports locale\n"
        "before = set(sys.modules)\n"
        "import kvmtool.cli.params\n"
        "new = {name for name in set(sys.modules) - before if not name.startswith('kvmtool')}\n"
        "new -= {'gc', 'signal', 'contextvars', '_contextvars'}\n"
        "assert not new, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
