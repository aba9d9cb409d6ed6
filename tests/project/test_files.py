"""Files are whole or absent, and nobody else's are touched."""

import errno

import pytest
from safetensors import SafetensorError

from minillm.files import atomic_folder, atomic_write, read_json, sha256_file


def fill(folder, **contents) -> None:
    with atomic_folder(folder) as new:
        for name, text in contents.items():
            (new / name).write_text(text)


def test_a_folder_is_replaced_whole(tmp_path):
    fill(tmp_path / "model", a="1", b="2")
    fill(tmp_path / "model", a="3", b="4", c="5")
    assert {file.name: file.read_text() for file in (tmp_path / "model").iterdir()} == {"a": "3", "b": "4", "c": "5"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_somebody_elses_files_are_not_lost(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that would be lost: sub.thesis.txt. Choose another folder"):
        fill(tmp_path / "data", a="1")
    assert (tmp_path / "data" / "sub" / "thesis.txt").read_text() == "years of work"
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_a_failure_leaves_the_old_folder(tmp_path, monkeypatch):
    fill(tmp_path / "model", a="old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as new:
        (new / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "model" / "a").read_text() == "old"

    import os

    replace, calls = os.replace, []

    def fail_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no rename")
        replace(source, target)

    monkeypatch.setattr("minillm.files.os.replace", fail_the_second)
    with pytest.raises(OSError, match="no rename"):
        fill(tmp_path / "model", a="new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_file_is_replaced_whole(tmp_path):
    atomic_write(tmp_path / "x" / "file", "čšž")
    atomic_write(tmp_path / "x" / "file", b"abc")
    assert (tmp_path / "x" / "file").read_bytes() == b"abc"
    # of "abc", from FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "x" / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [entry.name for entry in (tmp_path / "x").iterdir()] == ["file"]


def test_broken_json_is_named_with_its_place(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(ValueError, match=r"a.json is not JSON: line 2, column 6"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match=r"b.json is not UTF-8 text: byte 1 cannot be read"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match=r"c.json does not exist; its folder holds: \['a.json', 'b.json'\]"):
        read_json(tmp_path / "c.json")


def test_what_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^.*file.a.json cannot be written: (Not a directory|File exists)$"):
        atomic_write(tmp_path / "file" / "a.json", "{}")
    with pytest.raises(OSError, match=r"^.*file.data cannot be written: (Not a directory|File exists)$"):
        fill(tmp_path / "file" / "data", a="1")

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("minillm.files.os.fsync", full)
        with pytest.raises(OSError, match=r"^[^ ]*a.json cannot be written: No space left on device$"):
            atomic_write(tmp_path / "a.json", "{}")
        named = pytest.raises(OSError, match=r"^[^ ]*/data cannot be written: No space left on device$")
        with named, atomic_folder(tmp_path / "data") as outer, atomic_folder(outer / "train"):
            pass
    named = pytest.raises(OSError, match=r"^[^ ]*/model cannot be written: I/O error: No space left")
    with named, atomic_folder(tmp_path / "model"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # as save_file says it
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
