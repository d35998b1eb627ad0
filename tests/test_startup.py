"""What a command imports: start-up is part of the answer, and the two quick ones stay lean."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmtool.types import layouts
from tests import inputs
from tests.builders import xnu

# never, on the way to one symbol or to a few bytes
HEAVY = ("rich", "construct", "macholib", "numpy", "importlib.metadata")
# nor these, which cost less and are needed by nothing that is asked here
DEAR = ("json", "logging", "dataclasses", "pathlib", "argparse", "kvmtool.types", "kvmtool.xnu")


# As `python -m MODULE ARGUMENTS`, and at the end the modules that are there: -X importtime does not
# see those that importlib.import_module brings in.
RUN = """
import atexit, sys
atexit.register(lambda: print("at the end:", *sys.modules, file=sys.stderr))
if len(sys.argv) > 1:
    import runpy
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def imported(*arguments, run=RUN, **environment):
    """(modules imported, standard output) of `python -m` with these arguments."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", run, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=inputs.ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error", **environment},
    )
    assert done.returncode == 0, done.stderr
    *lines, end = done.stderr.splitlines()
    assert all(line.startswith("import time:") for line in lines), done.stderr
    assert end.startswith("at the end: ")
    return {line.rpartition("|")[2].strip() for line in lines} | {*end.split()[3:]}, done.stdout


@pytest.fixture(scope="module")
def baseline():
    """What python and what is installed next to us import before a line of ours has run."""
    return imported()[0]


@pytest.fixture(scope="module")
def crash(tmp_path_factory):
    """A built kernel and its core, slid."""
    name = "10.9.5 x86_64"
    banner = "Darwin Kernel Version 13.4.0: today; root:xnu-2422.115.4~1/RELEASE_X86_64"
    built = xnu.build(
        layouts.table(name), "x86_64", [], banner=banner, slide=0xA00000, uuid=bytes(range(16))
    )
    folder = tmp_path_factory.mktemp("crash")
    (folder / "kernel").write_bytes(built.kernel)
    (folder / "core").write_bytes(built.core)
    return built, str(folder / "kernel"), str(folder / "core")


def assert_lean(modules, baseline, unwanted):
    found = sorted(
        module
        for module in modules - baseline
        if any(module == name or module.startswith(name + ".") for name in unwanted)
    )
    assert found == []


def test_the_name_of_the_package_costs_nothing(baseline):
    modules, _ = imported(run=RUN + "import kvmtool")
    assert_lean(modules, baseline, (*HEAVY, *DEAR, "click"))
    assert {name for name in modules if name.startswith("kvmtool.")} == set()


def test_nlist_of_a_kernel(baseline, crash):
    built, kernel, _ = crash
    modules, output = imported("kvmtool", "nlist", "_cdevsw", "-N", kernel)
    assert f"{built.symbols['_cdevsw']:x}" in output
    assert "kvmtool.nlist" in modules
    assert_lean(modules, baseline, (*HEAVY, *DEAR, "kvmtool.formats", "kvmtool.boot"))


def test_nlist_of_a_core(baseline, crash):
    built, kernel, core = crash
    modules, output = imported("kvmtool", "nlist", "_cdevsw", "-N", kernel, "-M", core)
    assert f"{built.address('_cdevsw'):x}" in output
    assert "kvmtool.formats.macho_core" in modules
    assert_lean(modules, baseline, (*HEAVY, *DEAR))


def test_read_of_a_core(baseline, crash):
    built, kernel, core = crash
    command = ("kvmtool", "read", "_version", "21", "-N", kernel, "-M", core)
    modules, output = imported(*command)
    assert "Darwin Kernel" in output
    assert f"{built.address('_version'):x}" in output
    assert_lean(modules, baseline, (*HEAVY, *DEAR))


def test_nlist_of_a_real_kernel(baseline):
    kernel = inputs.real("dumps/x86_64-10.8.5/mach_kernel")
    modules, output = imported("kvmtool", "nlist", "_cdevsw", "-N", kernel)
    truth = inputs.truth("x86_64-10.8.5")
    assert f"{truth['cdevsw']['address'] - truth['slide']:x}" in output
    assert_lean(modules, baseline, (*HEAVY, *DEAR))


def test_the_environment_names_the_files_as_well(baseline, crash):
    built, kernel, core = crash
    modules, output = imported(
        "kvmtool", "nlist", "_cdevsw", KVMTOOL_KERNEL=kernel, KVMTOOL_CORE=core
    )
    assert f"{built.address('_cdevsw'):x}" in output
    assert_lean(modules, baseline, HEAVY)
