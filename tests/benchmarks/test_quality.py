"""The quality table at a size that says nothing about quality: every kind of cell, stop and go on, what it prints."""

import json

import pytest

from benchmarks import quality, quality_table
from pydit.plan import PruningPlan


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(quality, "METHODS", ("learned mask", "random"))
    monkeypatch.setattr(quality, "LADDER", ("ppcl, sequential", "+ fine-tuning"))
    monkeypatch.setattr(quality, "SHARES", (0.5,))


@pytest.mark.slow
def test_cells_are_made_once_and_tabled(tmp_path, small, capsys):
    command = ["--out", str(tmp_path), "--quick", "--seeds", "0"]
    assert quality.main([*command, "--only", "ladder", "--shard", "1/2"]) == 0
    assert [p.name for p in (tmp_path / "cells").iterdir()] == ["ladder---fine-tuning-0.5-0.json"]
    assert quality.main(command) == 0
    out = capsys.readouterr().out
    assert "9 cells of 3 steps and 7 prompts, 8 to do; about" in out
    assert "| ppcl, sequential | 8 of 16 | 2,743,456 |" in out and "| random | 8 of 16 | 2,743,456 |" in out
    assert f"| {quality.HYBRID_HALF} | 7 of 16 | 2,576,064 |" in out and f"| {quality.HYBRID} | 7 of 16 |" in out
    assert "Pluggable subsets, seed 0" in out and not list(tmp_path.glob("work-*")) and (tmp_path / "curves.png").stat().st_size > 10_000
    rows = {p.name: json.loads(p.read_text()) for p in (tmp_path / "cells").iterdir()}
    tuned = PruningPlan.from_dict(rows["ladder---fine-tuning-0.5-0.json"]["plan"])
    most = rows["goals-hybrid-stream--70---0.25-0.json"]
    half = rows["goals-half-the-parameters-0.43-0.json"]
    assert 0.65 < most["parameters"] / 5_421_728 < 0.7 and most["plan"]["single_stream"] is not None
    assert half["parameters"] < 5_421_728 / 2 and len(half["plan"]["linear_text_ffn"]) == 3
    least = rows["goals-hybrid-stream--30---0.43-0.json"]
    assert least["parameters"] < 0.3 * 5_421_728 and least["plan"]["single_stream"] > least["plan"]["text_linear"][0][1]
    assert tuned.text_linear and len(tuned.linear_ffn) == 2 and tuned.removed == 8
    subsets = rows["subsets-ppcl-0.5-0.json"]["subsets"]
    assert [len(s["active"]) for s in subsets] == list(range(len(subsets) - 1, -1, -1)) and subsets[-1]["error"] < 1e-6
    assert quality.main([*command, "--summary", str(tmp_path / "sum.json")]) == 0
    tables = capsys.readouterr().out
    again = ["--out", str(tmp_path / "again"), "--quick", "--seeds", "0", "--start", str(tmp_path / "sum.json")]
    assert quality.main(again) == 0  # a summary can be gone on from: all cells are there, the teacher is drawn once more
    out = capsys.readouterr().out
    assert "9 cells" in out and "0 to do" in out and out.endswith(tables)
    for more, error in (["--out", str(tmp_path)], "out: expected cells made with"), (
            ["--out", str(tmp_path / "other"), "--start", str(tmp_path / "sum.json")], "start: expected cells made with"):
        with pytest.raises(SystemExit) as caught:
            quality.main([*more, "--seeds", "0"])
        assert caught.value.code == 2 and error in capsys.readouterr().err


def test_all_cells_of_a_seed_come_before_the_next():
    listed = list(quality.cells(None, [0, 1]))
    assert len(listed) == 2 * (8 * 3 + 8 + 1) + 4 and len({cell.file for cell in listed}) == len(listed)
    assert [cell.seed for cell in listed] == [0] * 37 + [1] * 33
    assert {cell.table for cell in quality.cells("ladder", [0])} == {"ladder"}


def test_intervals_over_seeds_and_over_prompts():
    def loss(value):
        return {"value": value, "low": value - 0.01, "high": value + 0.02}

    assert quality_table.interval([loss(0.1)]) == "10.0 % [9.0, 12.0]"
    assert quality_table.interval([loss(0.1), loss(0.2)]) == "15.0 % (10.0 and 20.0)"
    assert quality_table.interval([loss(0.1), loss(0.2), loss(0.3)]) == "20.0 % [-4.8, 44.8]"  # 4.303 x 10 / sqrt(3)
    assert quality_table.interval([{"value": None, "low": None, "high": None}]) == "undefined"


def test_a_summary_without_verdicts_gives_the_same_tables(tmp_path, capsys):
    def cell(table, name, share, seed, met, **more):
        result = {"overall": met, "per_category": {"counting": met}, "images_per_category": {"counting": 2},
                  "samples": [{"prompt": "two red circles"}] * 2}
        row = {"cell": {"table": table, "name": name, "share": share, "seed": seed}, "parameters": 1000,
               "plan": PruningPlan.from_intervals(16, [[2, 9]], provenance={"method": name}).to_dict(),
               "velocity_error_pruned": 0.5, "velocity_error": 0.25, "train_seconds": 1.0, "seconds": 2.0,
               "machine": "2 cores", "versions": {}}
        loss = {"value": 1 - met, "low": None if met is None else 0.0, "high": 1.0}
        row |= {"subsets": [{"active": [[2, 9]], "parameters": 1000, "error": 0.1, "loss": loss, "result": result}]} \
            if table == "subsets" else {"result": result, "loss": loss}
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / f"{table}{name}{seed}.json").write_text(json.dumps(row))

    for seed, met in enumerate((0.5, 0.7)):
        cell("methods", "ppcl", 0.5, seed, met)
    cell("ladder", "bi, sequential", 0.5, 0, 0.25)
    cell("goals", quality.HYBRID, 0.5, 0, 0.75)
    cell("subsets", "ppcl", 0.5, 0, 0.5)
    (tmp_path / "settings.json").write_text('{"settings": {"steps": 1}, "teacher": "teacher"}')
    (tmp_path / "teacher.json").write_text('{"overall": 1.0, "per_category": {}, "images_per_category": {}}')
    assert quality.main(["--out", str(tmp_path), "--summary", str(tmp_path / "sum.json")]) == 0
    out = capsys.readouterr().out
    assert "| ppcl | 7 of 16 | 1,000 | 60.0 % | 40.0 % (50.0 and 30.0) | 0.2500 | 2 |" in out
    assert "| bi, sequential | 7 of 16 | 1,000 | 25.0 % | 75.0 % [0.0, 100.0] | 0.2500 | 1 |" in out
    assert f"| {quality.HYBRID} | 7 of 16 |" in out and "| 1 | 1,000 | 50.0 % | 50.0 % [0.0, 100.0] | 0.1000 |" in out
    assert "samples" not in (tmp_path / "sum.json").read_text()
    picture = tmp_path / "curves.png"
    first = picture.read_bytes()
    assert quality_table.main(["--from", str(tmp_path / "sum.json"), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out == out and picture.read_bytes() == first


@pytest.mark.parametrize(("text", "error"), [("{}", "quality: expected"), ("[]", "quality: expected")])
def test_another_file_than_a_summary(tmp_path, capsys, text, error):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit) as caught:
        quality_table.main(["--from", str(tmp_path / "x.json")])
    assert caught.value.code == 2 and error in capsys.readouterr().err
