"""doctor: what it finds here, and what it says of what is not here."""

from __future__ import annotations

import json
import os
import tomllib

import pytest
from click.testing import CliRunner
from inputs import ROOT

from kvmtool import cache
from kvmtool.cli import cli, doctor

with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
    PROJECT = tomllib.load(file)["project"]


def rows():
    result = CliRunner().invoke(cli, ["doctor", "--format", "json"])
    assert result.exit_code == 0, result.output
    return {(row["kind"], row["name"]): row for row in json.loads(result.stdout)}


def names(requirements):
    return {text.partition(">")[0].partition(";")[0].strip() for text in requirements}


def test_the_extras_are_those_of_the_package():
    extras = PROJECT["optional-dependencies"]
    told = {extra: {p.name for p in packages} for extra, packages in doctor.EXTRAS.items()}
    users = {extra: names(extras[extra]) for extra in extras if extra not in ("all", "dev", "docs")}
    assert told == users
    assert set(doctor.BASE) == names(PROJECT["dependencies"])
    (everything,) = extras["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == set(users)


def test_what_is_here_is_told_with_its_version():
    found = rows()
    for name in doctor.BASE:
        assert found["kvmtool", name]["state"] == "ok"
        assert found["kvmtool", name]["version"]


def test_what_is_missing_says_what_it_would_add(monkeypatch):
    real = doctor.importlib.import_module

    def without(name):
        if name == "rapidgzip":
            raise ModuleNotFoundError(name)
        if name == "mfusepy":
            raise OSError("Unable to find libfuse")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", without)
    found = {(row["kind"], row["name"]): row for row in doctor.examine()}
    gzip, mount = found["extra gzip", "rapidgzip"], found["extra mount", "mfusepy"]
    assert gzip["state"] == "missing"
    assert "big gzip'ed cores: pip install 'kvmtool[gzip]'" in gzip["note"]
    assert mount["state"] == "broken: Unable to find libfuse"


def test_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path))
    cache.store("test", "one", bytes(3 << 20))
    row = rows()["cache", str(tmp_path)]
    assert row["state"] == "ok"
    assert row["note"].startswith("1 entries, 3 MiB")
    monkeypatch.setenv("KVMTOOL_CACHE", "")
    assert rows()["cache", "none"]["state"] == "off"


def test_a_cache_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name, state in (
        ("new/er", "not made yet"),
        ("file", "not writable"),
        ("file/x", "not writable"),
    ):
        monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / name))
        assert rows()["cache", str(tmp_path / name)]["state"] == state


@pytest.mark.parametrize(
    ("name", "value", "state"),
    [
        ("KVMTOOL_KERNEL", "/no/such/kernel", "no such file"),
        ("KVMTOOL_KERNEL", __file__, "ok"),
        ("KVMTOOL_CORE", "gdb://localhost:1234", "ok"),
        ("KVMTOOL_KERNL", "x", "not known"),
    ],
)
def test_the_environment(name, value, state, monkeypatch):
    monkeypatch.setenv(name, value)
    row = rows()["environment", name]
    assert row["state"] == state
    assert value in row["note"]


def test_every_variable_that_is_read_is_known():
    import re

    read = set()
    for folder, _, files in os.walk(os.path.join(ROOT, "kvmtool")):
        for name in files:
            if name.endswith(".py"):
                with open(os.path.join(folder, name), encoding="utf-8") as text:
                    read |= set(re.findall(r'["\'](KVMTOOL_[A-Z_]+)["\']', text.read()))
    assert read <= set(doctor.VARIABLES)
