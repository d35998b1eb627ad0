"""A new file is there when it is whole: with and without files that have no name."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from kvmtool import new_file as module
from kvmtool.new_file import new_file


@pytest.fixture(params=["as it is", "no O_TMPFILE", "a file system without", "no /proc"])
def out(request, tmp_path, monkeypatch):
    """The name of a new file, on systems of every kind."""
    if request.param == "no O_TMPFILE":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif request.param == "no /proc":
        monkeypatch.setattr(module, "_DESCRIPTORS", str(tmp_path / "nothing"))
    elif request.param == "a file system without":
        real, flag = os.open, os.O_TMPFILE

        def refuses(path, flags, mode=0o777):
            if flags & flag == flag:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", refuses)
    folder = tmp_path / "folder"
    folder.mkdir()
    return str(folder / "out")


def names(out):
    return os.listdir(os.path.dirname(out))


def held(out):
    with open(out, "rb") as file:
        return file.read()


def test_it_is_there_at_the_end(out):
    with new_file(out) as file:
        file.write(b"whole")
        file.flush()
        assert not os.path.exists(out)
    assert (names(out), held(out)) == (["out"], b"whole")


def test_its_mode_is_that_of_any_new_file(out):
    mask = os.umask(0o027)
    try:
        with new_file(out):
            pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error", "core")])
def test_no_part_survives(out, error):
    with pytest.raises(type(error)) as raised, new_file(out) as file:
        file.write(b"half")
        raise error
    assert names(out) == []
    assert getattr(raised.value, "filename", "core") == "core"


def test_what_is_there_is_kept_unless_asked(out):
    with new_file(out) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError) as raised, new_file(out):
        pytest.fail("it was begun")
    assert raised.value.filename == out
    with new_file(out, overwrite=True) as file:
        file.write(b"second")
        file.flush()
        assert held(out) == b"first"
    assert (names(out), held(out)) == (["out"], b"second")


def test_what_appears_meanwhile_is_kept(out):
    with pytest.raises(FileExistsError), new_file(out):
        os.symlink("elsewhere", out)
    assert names(out) == ["out"]
    assert os.readlink(out) == "elsewhere"


def test_what_is_no_file_is_never_replaced(out):
    os.mkdir(out)
    with pytest.raises(FileExistsError), new_file(out, overwrite=True):
        pytest.fail("it was begun")


def test_a_folder_that_is_not_there(out):
    missing = os.path.join(os.path.dirname(out), "missing", "out")
    with pytest.raises(FileNotFoundError) as raised, new_file(missing):
        pytest.fail("it was begun")
    assert raised.value.filename == missing


def test_a_name_without_a_folder(out, monkeypatch):
    monkeypatch.chdir(os.path.dirname(out))
    with new_file("out") as file:
        file.write(b"here")
    assert (names(out), held(out)) == (["out"], b"here")


def test_until_then_it_has_no_name(tmp_path):
    """Where the system has such files."""
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        pytest.skip("no O_TMPFILE here")
    with new_file(str(tmp_path / "out")) as file:
        file.write(b"half")
        file.flush()
        assert os.listdir(tmp_path) == []
