"""pydit.files: what is written is whole or absent, what is read is checked, pickles are refused."""

import contextlib
import errno
import os
import pickle
import signal
import time

import pytest
import torch

from pydit import files, weights
from pydit.errors import FormatError, UserError


def test_json_round_trip_and_errors(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": [1, 2.5, "é"]})
    assert files.read_json(tmp_path / "a.json", what="plan") == {"x": [1, 2.5, "é"]}
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FormatError, match="plan: expected JSON in .*bad.json"):
        files.read_json(tmp_path / "bad.json", what="plan")
    with pytest.raises(FormatError, match="plan: expected a JSON file, got a path that does not exist"):
        files.read_json(tmp_path / "none.json", what="plan")
    with pytest.raises(FormatError, match="got a directory"):
        files.read_json(tmp_path, what="plan")
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "nan.json", float("nan"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "bad.json"]


def test_safetensors_round_trip_and_errors(tmp_path):
    path = tmp_path / "a.safetensors"
    files.save_safetensors(path, {"x": torch.arange(6.0).view(2, 3).T}, {"k": "v"})
    tensors, metadata = files.load_safetensors(path, what="stats")
    assert torch.equal(tensors["x"], torch.arange(6.0).view(2, 3).T) and metadata == {"k": "v"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FormatError, match="stats: expected a complete safetensors file"):
        files.load_safetensors(path, what="stats")


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "disguised.safetensors"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(FormatError, match="weights: expected a safetensors or JSON file, got a pickle"):
        files.load_safetensors(tmp_path / name, what="weights")


def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"new": 2})
    with pytest.raises(OSError, match="No space left"), files.replace_directory(tmp_path / "model") as new:
        (new / "config.json").write_text("{}")
    monkeypatch.undo()
    assert files.read_json(path, what="x") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def replace_text(path, text, *, whole=True):
    """``text`` in a file, or in a directory if ``path`` says so; if not ``whole``, wait half through for the end."""
    replace = files.replace_directory if path.name == "model" else files.replace_file
    with replace(path) as new:
        (new / "config.json" if path.name == "model" else new).write_text(text)
        if not whole:
            (path.parent / "half").touch()
            time.sleep(60)


@contextlib.contextmanager
def half_written(path):
    """A process of its own that is half through a write, then killed."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            replace_text(path, "half", whole=False)
        os._exit(1)
    try:
        while not (path.parent / "half").exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        (path.parent / "half").unlink()
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.parametrize("name", ["file", "model", "with [glob] characters*"])
def test_what_a_killed_write_left_goes_with_the_next(tmp_path, name):
    """And never what another process is writing."""
    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    path = tmp_path / name
    with half_written(path), half_written(path):
        for text in "12":
            replace_text(path, text)
        assert [entry for entry in names() if not entry.endswith(".part")] == [name] and len(names()) == 3
    assert len(names()) == 3
    replace_text(path, "3")
    assert names() == [name]
    assert (path / "config.json" if path.is_dir() else path).read_text() == "3"


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with half_written(tmp_path / "file"):
        pass
    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    files.write_text(tmp_path / "file", "1")
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    files.write_text(tmp_path / "file", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_names_its_target(tmp_path):
    def fails(path, action, **options):
        with pytest.raises(OSError) as caught, files.replace_file(path) as new:
            action(new, **options)
        assert str(caught.value.filename) == str(path) and not path.exists()
        return caught.value.errno

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def copied(new):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a source", None, str(new))

    assert fails(tmp_path / "a", full) == fails(tmp_path / "a", copied) == errno.ENOSPC
    assert fails(tmp_path / "a", lambda new: (new / "x").mkdir()) == errno.ENOENT  # something in the temporary directory
    assert fails(tmp_path / ("a" * 250), full) == errno.ENAMETOOLONG
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as caught, files.replace_file(tmp_path / "a"):
        (tmp_path / "none").read_text()
    assert caught.value.filename == str(tmp_path / "none")


def test_a_directory_that_holds_leftovers_only_is_unused(tmp_path):
    assert files.is_unused(tmp_path) and files.is_unused(tmp_path / "none")
    with half_written(tmp_path / "file"):
        assert files.is_unused(tmp_path)
    (tmp_path / "x.part").touch()
    assert not files.is_unused(tmp_path) and not files.is_unused(tmp_path / "x.part")


def test_replace_directory(tmp_path):
    target = tmp_path / "model"
    for content in ("1", "2"):
        with files.replace_directory(target) as new:
            (new / "config.json").write_text(content)
    assert (target / "config.json").read_text() == "2"
    with pytest.raises(RuntimeError), files.replace_directory(target) as new:
        (new / "config.json").write_text("3")
        raise RuntimeError
    assert (target / "config.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_directory_goes_in_one_step(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "run"
    for patch in ((files.shutil, "rmtree", lambda *_, **__: None), None, (files.tempfile, "mkdtemp", full)):
        (path / "stage-1").mkdir(parents=True)
        (path / "stage-1" / "file").touch()
        if patch:
            monkeypatch.setattr(*patch)
        files.remove_directory(path)
        monkeypatch.undo()
        left = [entry.name for entry in tmp_path.iterdir()]
        # The first is as if it had been killed when it began to remove files; the next removes what that left.
        assert not path.exists() and (left == [] if patch is None or patch[1] == "mkdtemp" else len(left) == 1)


def test_replace_directory_never_deletes_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(UserError, match="out: expected a new path, an empty directory or a model directory"), \
            files.replace_directory(tmp_path / "photos"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="out: expected a directory or a new path, got the file"), \
            files.replace_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_rows_of_a_file(tmp_path):
    tensors = {"a": torch.arange(12, dtype=torch.bfloat16).view(4, 3), "b": torch.ones(5)}
    files.save_safetensors(tmp_path / "w.safetensors", tensors)
    reader = weights.SafetensorsReader(tmp_path, "w", what="test")
    for start, stop in ((0, 4), (1, 3), (3, 4), (2, 2)):
        assert torch.equal(reader.rows("a", start, stop), tensors["a"][start:stop])
    assert torch.equal(reader.rows("b", 1, 3), tensors["b"][1:3]) and torch.equal(reader["b"], tensors["b"])


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path, length):
    """80 02 are the first bytes of a pickle, and of a safetensors file with a header of 640 bytes."""
    path = tmp_path / "a.safetensors"
    files.save_safetensors(path, {"x": torch.ones(2)}, {"k": ""})
    missing = length - int.from_bytes(path.read_bytes()[:8], "little")
    files.save_safetensors(path, {"x": torch.ones(2)}, {"k": "v" * missing})
    assert path.read_bytes()[:2] == length.to_bytes(2, "little")
    assert torch.equal(files.load_safetensors(path, what="x")[0]["x"], torch.ones(2))
