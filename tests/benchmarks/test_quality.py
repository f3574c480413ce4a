"""The quality table at a size that says nothing about quality: every kind of cell, stop and go on, what it prints."""

import json

import pytest

from benchmarks import quality
from pydit.plan import PruningPlan


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quality, "METHODS", ("bi", "learned mask", "random"))
    monkeypatch.setattr(quality, "LADDER", ("ppcl, sequential", "+ fine-tuning"))
    monkeypatch.setattr(quality, "SHARES", (0.5,))


@pytest.mark.slow
def test_cells_are_made_once_and_tabled(tmp_path, small, capsys):
    command = ["--out", str(tmp_path), "--quick", "--seeds", "0"]
    assert quality.main([*command, "--only", "ladder", "--shard", "1/2"]) == 0
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["ladder---fine-tuning-0.5-0.json"]
    assert quality.main(command) == 0
    out = capsys.readouterr().out
    assert "6 cells of 6 steps and 14 prompts, 5 to do; about" in out
    assert "| ppcl, sequential | 50 % | 2,743,456 |" in out and "| random | 50 % | 2,743,456 |" in out
    assert "pluggable subsets, ppcl" in out and (tmp_path / "curves.png").stat().st_size > 10_000
    rows = {p.name: json.loads(p.read_text()) for p in (tmp_path / "cells").iterdir()}
    tuned = PruningPlan.from_dict(rows["ladder---fine-tuning-0.5-0.json"]["plan"])
    assert tuned.text_linear and len(tuned.linear_ffn) == 2 and tuned.removed == 8
    subsets = rows["subsets-ppcl-0.5-0.json"]["subsets"]
    assert [len(s["active"]) for s in subsets] == list(range(len(subsets) - 1, -1, -1)) and subsets[-1]["error"] < 1e-6
    assert quality.main(command) == 0 and "0 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        quality.main(["--out", str(tmp_path), "--seeds", "0"])
    assert caught.value.code == 2 and "out: expected cells made with" in capsys.readouterr().err


def test_all_cells_of_a_seed_come_before_the_next():
    listed = list(quality.cells(None, [0, 1]))
    assert len(listed) == 2 * (8 * 3 + 8 + 1) and len({cell.file for cell in listed}) == len(listed)
    assert [cell.seed for cell in listed] == [0] * 33 + [1] * 33
    assert {cell.table for cell in quality.cells("ladder", [0])} == {"ladder"}


def test_intervals_over_seeds_and_over_prompts():
    def row(value):
        return {"loss": {"value": value, "low": value - 0.01, "high": value + 0.02}}

    assert quality._loss([row(0.1)]) == "10.0 % [9.0, 12.0]"
    assert quality._loss([row(0.1), row(0.2)]) == "15.0 % [5.2, 24.8]"  # 1.96 x 7.07 / sqrt(2)
    assert quality._loss([{"loss": {"value": None, "low": None, "high": None}}]) == "undefined"
