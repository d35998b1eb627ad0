"""What is published: wheel and sdist, their contents, and that they work with nothing extra.

The last test makes a virtualenv from a Python and the wheel; KVMTOOL_PYTHONS=all (as `make package`
has it) asks for one of every Python that is here, from 3.11 on.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes

import pytest
from inputs import ROOT

from kvmtool.cli import COMMANDS

BASE = {"click", "macholib", "rich", "construct"}
THEIRS = {"altgraph", "pygments", "markdown-it-py", "mdurl", "typing-extensions", "pip", "kvmtool"}
OFFLINE = ("Temporary failure in name resolution", "Name or service not known", "No route to host")
MINORS = range(11, 15)

with open(os.path.join(ROOT, "pyproject.toml"), "rb") as project:
    PROJECT = tomllib.load(project)["project"]


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """A folder with the sdist, and the wheel that was made of it."""
    for name in ("build", "setuptools", "twine"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    folder = str(tmp_path_factory.mktemp("dist"))
    command = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(dist):
    (path,) = glob.glob(os.path.join(dist, "*.whl"))
    return path


def test_the_index_would_take_them(dist):
    files = glob.glob(os.path.join(dist, "*"))
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def ours():
    """Every file of the package as it lies in the repository."""
    found = set()
    for folder, _, files in os.walk(os.path.join(ROOT, "kvmtool")):
        for name in files:
            if name.endswith((".py", ".bin", ".zip", ".typed")):
                found.add(os.path.relpath(os.path.join(folder, name), ROOT))
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    package = {name for name in names if name.startswith("kvmtool/")}
    assert package == ours()
    assert {"kvmtool/py.typed", "kvmtool/data/layouts.bin", "kvmtool/data/sample.zip"} <= package
    rest = {name.split("/")[0] for name in names} - {"kvmtool"}
    assert {re.sub(r"^kvmtool-[\d.]+\.", "", name) for name in rest} == {"data", "dist-info"}


def test_the_wheel_has_a_manual_page_for_every_command(wheel):
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    pages = {os.path.basename(name) for name in names if "/share/man/man1/" in name}
    assert {f"kvmtool-{name}.1" for name in COMMANDS} | {"kvmtool.1"} <= pages


def test_the_sdist_makes_a_wheel_and_holds_no_tests(dist):
    (path,) = glob.glob(os.path.join(dist, "*.tar.gz"))
    with tarfile.open(path) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert ours() <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tools/man.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "build", "docs", "."))]


def test_the_metadata_is_that_of_the_project(wheel):
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))
        said = message_from_bytes(packed.read(name))
        (name,) = (n for n in packed.namelist() if n.endswith("entry_points.txt"))
        points = packed.read(name).decode()
    assert said["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    assert set(said.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    needed = [text for text in said.get_all("Requires-Dist") if "extra ==" not in text]
    assert {re.split(r"[><=;]", text)[0] for text in needed} == BASE
    assert "kvmtool = kvmtool." in points
    assert said["License-Expression"] == "BSD-2-Clause"


def pythons():
    """The interpreters to try: this one, or all that are here."""
    if os.environ.get("KVMTOOL_PYTHONS") != "all":
        return [sys.executable]
    found = {}
    for minor in MINORS:
        named = shutil.which(f"python3.{minor}")
        kept = glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        for path in [*kept, *([named] if named else [])]:
            ask = [path, "-c", "import sys, venv; print(*sys.version_info[:2], sep='.')"]
            done = subprocess.run(ask, capture_output=True, text=True)
            if done.stdout.strip() == f"3.{minor}":
                found[minor] = path
    return [found[minor] for minor in sorted(found)]


@pytest.fixture(scope="session", params=pythons(), ids=os.path.basename)
def bare(request, wheel, tmp_path_factory):
    """A virtualenv with the wheel and what it needs, no extra."""
    folder = str(tmp_path_factory.mktemp("venv"))
    subprocess.run([request.param, "-m", "venv", folder], check=True)
    python = os.path.join(folder, "bin", "python")
    pip = [python, "-I", "-m", "pip", "--disable-pip-version-check"]  # whatever PYTHONPATH holds
    done = subprocess.run([*pip, "install", "-q", wheel], capture_output=True, text=True)
    if any(text in done.stderr for text in OFFLINE):
        pytest.skip("there is no package index to be reached")
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([*pip, "list", "--format", "json"], capture_output=True, check=True)
    return folder, {row["name"].lower() for row in json.loads(listed.stdout)}


def test_it_works_with_no_extra(bare, tmp_path):
    folder, packages = bare
    assert BASE | {"kvmtool"} <= packages <= BASE | THEIRS | {"setuptools"}

    def run(*words, status=0):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONWARNINGS": "error"}
        command = [os.path.join(folder, "bin", "kvmtool"), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (status, ""), done.stdout + done.stderr
        return done.stdout

    assert run("demo", "article").count("wrote") >= 2
    run("demo", "--machine", "machine")
    article = ["-N", "article/mach_kernel", "-M", "article/core"]
    machine = ["-N", "machine/mach_kernel", "-M", "machine/memory.lime"]
    assert run("nlist", "_cdevsw", *article) == "0x441720 D _cdevsw\n"
    assert run("read", "_cdevsw+0x270", "4", "-t", "x4", *article).split()[1] == "3bd0214f"
    for files in (article, machine):
        rows = json.loads(run("procs", "--format", "json", *files))
        assert rows[-1]["comm"] == "kernel_task" or rows[0]["comm"]
        assert "kernel_address" in run("info", *files)
        assert "struct proc {" in run("type", "proc", *files)
    rows = {(r["kind"], r["name"]): r for r in json.loads(run("doctor", "--format", "json"))}
    assert rows["extra gzip", "rapidgzip"]["state"] == "missing"
    assert rows["extra mount", "mfusepy"]["note"].endswith("pip install 'kvmtool[mount]'")
    assert {rows["kvmtool", name]["state"] for name in BASE} == {"ok"}
    assert os.path.exists(os.path.join(folder, "share", "man", "man1", "kvmtool-procs.1"))
