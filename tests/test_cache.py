"""The cache of findings: lost without harm, never wrong, never larger than allowed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmtool import cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    where = tmp_path / "cache"
    monkeypatch.setenv("KVMTOOL_CACHE", str(where))
    return where


def test_a_stored_entry_comes_back_and_replaces_the_former_one(folder):
    assert cache.store("kind", "key", b"one")
    assert cache.store("kind", "key", b"two")
    assert cache.load("kind", "key") == b"two"
    assert cache.load("kind", "other") is None
    assert [path.name for path in folder.iterdir()] == ["kind-key.kvmcache"]
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "version"])
def test_a_damaged_entry_is_as_good_as_none(folder, damage):
    cache.store("kind", "key", b"payload")
    [path] = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-1],
            "flip": whole[:-1] + bytes([whole[-1] ^ 1]),
            "empty": b"",
            "longer": whole + b"x",
            "version": b"KVMCACH0" + whole[8:],
        }[damage]
    )
    assert cache.load("kind", "key") is None


def test_an_empty_variable_means_no_cache(monkeypatch):
    monkeypatch.setenv("KVMTOOL_CACHE", "")
    assert cache.path_for("kind", "key") is None
    assert not cache.store("kind", "key", b"x")
    assert cache.load("kind", "key") is None


def test_the_directory_follows_the_platform(monkeypatch):
    monkeypatch.delenv("KVMTOOL_CACHE")
    monkeypatch.setenv("HOME", "/home/kim")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/kim")
    assert cache.directory() == "/var/kim/kvmtool"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.directory() == "/home/kim/.cache/kvmtool"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.directory() == "/home/kim/Library/Caches/kvmtool"


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KVMTOOL_CACHE", str(tmp_path / "file" / "cache"))
    assert not cache.store("kind", "key", b"x")
    assert cache.load("kind", "key") is None


def test_the_oldest_make_room_and_strangers_are_left_alone(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 3 * 120)
    folder.mkdir()
    (folder / "thesis.txt").write_bytes(bytes(10_000))
    for age, key in enumerate(("old", "middle", "young")):
        cache.store("kind", key, bytes(100))
        os.utime(folder / f"kind-{key}.kvmcache", (1000 + age, 1000 + age))
    cache.store("kind", "new", bytes(100))
    assert cache.load("kind", "old") is None
    for key in ("middle", "young", "new"):
        assert cache.load("kind", key) == bytes(100)
    assert (folder / "thesis.txt").exists()


def test_what_is_larger_than_the_cache_is_not_stored(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 100)
    assert not cache.store("kind", "key", bytes(100))
    assert cache.load("kind", "key") is None


@pytest.mark.parametrize("word", ["", "../up", "a/b", "a b", "nul\0"])
def test_words_that_would_leave_the_directory_are_refused(word):
    with pytest.raises(ValueError, match="file name"):
        cache.path_for("kind", word)


def test_importing_touches_nothing(folder):
    subprocess.run([sys.executable, "-c", "import kvmtool.cache"], check=True)
    assert not folder.exists()
