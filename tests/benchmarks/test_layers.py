"""`pydit bench layers` and `pydit bench model` at a size that says nothing about speed."""

import json
from functools import partial

import pytest

import pydit
from benchmarks import layers, model
from benchmarks.runner import run_case


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Options of a plan with blocks of several kinds; no peers, which would be compiled, and no cold inputs."""
    monkeypatch.setitem(layers.timing.ROTATED_BYTES, "cpu", 1)
    monkeypatch.setattr(layers.timing, "measure_limits", lambda *_: {"copy_gb_s": 10.0, "gemm_tflop_s": 0.1})
    monkeypatch.setattr(layers, "run_case", partial(run_case, peers=set()))
    plan = pydit.PruningPlan("qwen-image", 6, [(0, 1)], text_linear=[(2, 4)], linear_ffn=[5])
    plan.save(tmp_path / "plan.json")
    return ["--config", "tiny", "--plan", str(tmp_path / "plan.json"), "--size", "32", "--text", "6", "--rounds", "3",
            "--json", str(tmp_path / "out.json")]


def test_layers_are_counted_by_kind_and_timed(command, tmp_path, capsys):
    assert layers.main(command) == 0
    rows = {row["kind"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert sum(row["count"] for row in rows.values()) == 5 and rows["dense"]["count"] >= 1 and len(rows) >= 3
    out = capsys.readouterr().out
    for kind, row in rows.items():
        assert row["providers"]["pydit"]["us"] > 0 and row["floor_us"] > 0 and kind in out
    assert "% ideal" in out and "wrong" not in out


def test_models_side_by_side(command, tmp_path, capsys):
    assert model.main([*command, "--variants", "eager,accelerate,accelerate + table"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == [
        (shape, variant) for shape in ("dense", "pruned") for variant in ("eager", "accelerate", "accelerate + table")]
    assert not any("failed" in row for row in rows) and all(row["ms"] > 0 for row in rows), rows
    sizes = {(row["model"], row["variant"]): row["parameters"] for row in rows}
    assert sizes["pruned", "eager"] < sizes["dense", "eager"] and "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words"), [
    (["--size", "33"], "size: expected a multiple of 16, got 33"), (["--plan", "no-such"], "no-such")])
@pytest.mark.parametrize("main", [layers.main, model.main])
def test_bad_options(main, change, words, command, capsys):
    assert main([*command, *change]) == 2
    assert words in capsys.readouterr().err


def test_narrow_models_of_every_family_are_timed_in_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "NARROW", ((64, 4),))
    assert model.main(["--narrow", "--rounds", "3", "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 5 and all(row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in rows), rows
    assert "sd3.5" in capsys.readouterr().out
    assert model.main(["--narrow", "--rounds", "2"]) == model.main([]) == 2


def test_unknown_variants(command, capsys):
    assert model.main([*command, "--variants", "eager,fast"]) == 2
    assert "variants: expected names out of" in capsys.readouterr().err
