"""The manual pages: one for each command, and roff that formats as it should."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from kvmtool.cli import COMMANDS, GROUPS
from tools import man


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("man")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1164240000")
        return {os.path.basename(path): path for path in man.write(str(folder))}


def text_of(path):
    with open(path, encoding="utf-8") as page:
        return page.read()


def test_there_is_a_page_for_every_command(pages):
    assert {f"kvmtool-{name}.1" for name in COMMANDS} | {"kvmtool.1"} <= set(pages)
    assert "kvmtool-extract-kext.1" in pages


def test_the_date_is_that_of_the_source(pages):
    for path in pages.values():
        assert '1 "2006-11-23"' in text_of(path).splitlines()[0]


def test_a_page_says_what_the_help_says(pages):
    text = text_of(pages["kvmtool-procs.1"])
    for part in (
        *(".SH NAME\nkvmtool\\-procs \\- ", ".SH OPTIONS", ".B \\-\\-tree", ".SH WHICH KERNEL"),
        *(".SH EXIT STATUS", ".B KVMTOOL_CORE", ".SH EXAMPLES\n.nf\nkvmtool procs \\-N"),
    ):
        assert part in text, part
    top = text_of(pages["kvmtool.1"])
    for heading in GROUPS:
        assert f".SS {heading}\n" in top
    assert ".BR kvmtool\\-walk (1)" in top


def test_what_roff_would_take_for_a_request_is_text():
    assert man.escaped(".not a request\n'nor this\n-x \\d") == (
        "\\&.not a request\n\\&'nor this\n\\-x \\ed"
    )


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_mandoc_has_nothing_to_say(pages):
    command = ["mandoc", "-T", "lint", "-W", "warning", *pages.values()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_formats_them(pages):
    command = ["groff", "-man", "-Tascii", "-ww", pages["kvmtool-procs.1"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "KVMTOOL-PROCS(1)" in done.stdout
    assert "pid,tty,command" in done.stdout
