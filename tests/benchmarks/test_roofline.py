"""The roofline pictures: where the model puts a case, what is measured, and a committed picture that is up to date."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import registry, roofline, tables
from tests.benchmarks.test_tables import entry, run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernels.md"


def test_the_ceilings_are_those_of_the_table():
    """A case's floor in docs/kernels.md is its FLOPs over its height in the picture."""
    assert roofline.H200.at(1.0) == 4.8 and roofline.H200.at(1e6) == 989.0
    for case in registry.cases("full"):
        floor = max(case.work.bytes / tables.H200_BYTES, case.work.flops / tables.H200_FLOPS)
        assert case.work.flops / floor / 1e12 == pytest.approx(roofline.H200.at(case.work.flops / case.work.bytes))


def test_every_case_is_a_point_and_those_measured_have_their_rate():
    points = roofline.modelled()
    assert [point.op for point in points] == [case.op for case in registry.cases("full")]
    assert all(point.rate is None and point.peer is None for point in points)
    case = registry.cases("full")[3]
    row = {"case": case.name, "op": case.op, "bytes": case.work.bytes, "flops": case.work.flops,
           "providers": {"pydit": entry(100.0), "slow": entry(400.0), "fast": entry(200.0),
                         "own form": {**entry(50.0), "rival": False}}}
    wrong = {"case": registry.cases("full")[0].name, "wrong": "worst error"}
    found = roofline.modelled([run() | {"rows": [row, wrong]}])
    assert found[3] == roofline.Point(case.op, points[3].intensity, case.work.flops / 100.0 / 1e6, case.work.flops / 200.0 / 1e6)
    assert [*found[:3], *found[4:]] == [*points[:3], *points[4:]]


def test_the_command_that_the_page_names_draws_the_committed_picture(tmp_path):
    command = "python -m benchmarks.roofline --out docs/roofline.png"
    assert f"`{command}`" in PAGE.read_text() and "(roofline.png)" in PAGE.read_text()
    (tmp_path / "docs").mkdir()
    assert roofline.main(command.replace("docs/", f"{tmp_path}/docs/").split()[3:]) == 0
    with Image.open(tmp_path / "docs" / "roofline.png") as new, Image.open(ROOT / "docs" / "roofline.png") as committed:
        assert new.size == committed.size
        assert new.text["Description"] == committed.text["Description"] == roofline.digest(roofline.modelled()), (
            f"docs/roofline.png differs from the registry; run {command}")


def test_no_words_of_the_picture_overlap():
    """With measured cases and their peers, and without."""
    points = roofline.modelled()
    for point in points[::2]:
        point.rate = roofline.H200.at(point.intensity) * 0.7
        point.peer = point.rate / 3
    for shown in (roofline.modelled(), points):
        figure = roofline._figure(shown, roofline.H200, "title")
        figure.canvas.draw()
        roof, names = figure.axes
        words = [*roof.texts, *roof.get_legend().get_texts(), *names.get_yticklabels(), roof._left_title]
        boxes = [word.get_window_extent() for word in words if word.get_text()]
        assert len(boxes) > len(names.get_yticklabels()) + 4
        for i, box in enumerate(boxes):
            assert not [other for other in boxes[:i] if box.overlaps(other)], words[i]
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        marks = [roof.transData.transform(line.get_xydata()[0]) for line in roof.lines if len(line.get_xydata()) == 1]
        assert len(marks) >= len(shown)
        assert not [word for word in roof.texts if word.get_window_extent().count_contains(marks)]


def test_wrong_results_are_an_error(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"format": "other"}))
    arguments = ["--out", str(tmp_path / "x.png"), "--results", str(tmp_path / "r.json")]
    assert roofline.main(arguments) == 2 and not (tmp_path / "x.png").exists()
    assert "roofline: error: results: expected a file written by `pydit bench --json`" in capsys.readouterr().err


def test_points_of_another_machine_have_no_place_under_an_h200s_roof(tmp_path, capsys):
    data = {"format": "pydit-bench", "version": 1, "limits": {}, "not_run": [], "rows": [],
            "machine": {"device": "NVIDIA H100 80GB HBM3", "commit": "abc", "dirty": False, "date": "2026-11-21"}}
    (tmp_path / "r.json").write_text(json.dumps(data))
    arguments = ["--out", str(tmp_path / "x.png"), "--results", str(tmp_path / "r.json")]
    assert roofline.main(arguments) == 2 and not (tmp_path / "x.png").exists()
    assert "results: expected what was measured on an H200, got" in capsys.readouterr().err
