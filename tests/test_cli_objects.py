"""print, walk, and C in every ADDRESS."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from kvmtool import sample
from kvmtool.cli import cli


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    """The embedded sample: (kernel, core)."""
    folder = tmp_path_factory.mktemp("article")
    sample.write(str(folder), "article")
    return str(folder / "mach_kernel"), str(folder / "core")


def run(files, *arguments):
    kernel, core = files
    return CliRunner().invoke(cli, ["-N", kernel, "-M", core, *arguments])


def output(files, *arguments):
    result = run(files, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_an_address_may_be_c(article):
    """The article's numbers: cdevsw at 0x441720, rows of 14 words, d_read the third word."""
    plain = output(article, "read", "0x441990", "4")
    for text in (
        "_cdevsw+0x270",
        "_cdevsw + (11 * 56 + 8)",
        "(char *)&cdevsw + 11 * 56 + 8",
        "&((unsigned *)&cdevsw)[11 * 14 + 2]",
    ):
        assert output(article, "read", text, "4") == plain
    kext = ("--kext", article[0].replace("mach_kernel", "KernelMemoryAccess@0x3bd01000"))
    found = output(article, "symbol", "*(void **)0x441990", *kext)
    assert found == "0x3bd0214f _my_mmread [com.osxbook.kext.KernelMemoryAccess]\n"


def test_an_address_that_is_not_c_shows_where(article):
    result = run(article, "read", "cdevsw[11", "4")
    assert result.exit_code == 2
    assert result.stderr == "kvmtool: expected ']', got the end\n  cdevsw[11\n           ^\n"
    result = run(article, "read", "1 + nonesuch->x", "4")
    assert result.exit_code == 1
    assert result.stderr == "kvmtool: symbol nonesuch not found\n  1 + nonesuch->x\n      ^\n"
