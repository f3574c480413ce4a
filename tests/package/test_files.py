"""pydit.files: what is written is whole or absent, what is read is checked, pickles are refused."""

import errno
import os
import pickle

import pytest
import torch

from pydit import files
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
    reader = files.SafetensorsReader(tmp_path, "w", what="test")
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
