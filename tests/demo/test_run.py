"""The demo end to end on an untrained teacher in quick mode, and its continuation after a kill."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from pydit import PruningPlan
from pydit.analysis import velocity_error
from pydit.demo import choose, evaluate, run
from pydit.errors import FormatError, UserError
from pydit.inference.pipeline import content_hash, load_pipeline
from tests.demo.pipelines import untrained


class _Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run.run(out, quick=True, teacher=untrained())


def test_everything_is_written(finished):
    out, metrics = finished
    names = {p.name for p in out.iterdir()}
    assert names == {"report.html", "metrics.json", "distilled", "work", "cka.png", "intervals.png", "loss.png",
                     "categories.png", "images.png"}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    for model in ("teacher", "pruned", "distilled"):
        assert set(metrics[model]) >= {"overall", "per_category"} and len(metrics[model]["per_category"]) == 7
    assert set(metrics["parameters"]) == {"teacher", "student"}
    assert metrics["parameters"]["student"] < metrics["parameters"]["teacher"]
    assert metrics["blocks"]["student"] <= 0.6 * metrics["blocks"]["teacher"]
    assert metrics["prompts"] == 14 and len(metrics["relative_loss_interval"]) == 2 and metrics["seconds"] > 0


def test_the_plan_with_the_least_measured_error_is_taken(finished):
    """Every candidate is there with the error that its pruned model has, measured here once more."""
    _, metrics = finished
    rows = metrics["candidates"]
    assert {(row["method"], row["init"]) for row in rows} >= {
        (method, init) for method in ("ppcl, least loss", "greedy search") for init in ("first", "probe")}
    pipe = load_pipeline(untrained(), dtype=torch.float32)
    settings = run.Settings.make(seed=0, budget_minutes=1, prompts=None, quick=True)
    uses = {"batches": settings.calibration_batches // 8, "batch_size": settings.batch_size, "seed": 4}
    judges = choose.take(pipe, uses["batches"], uses["batch_size"], 6)
    for row in rows:
        student = choose.start(pipe, PruningPlan.from_intervals(6, row["intervals"]), row["init"], **uses)
        assert velocity_error(pipe.transformer, student, judges) == pytest.approx(row["velocity_error"], rel=1e-3)
    assert rows[0]["velocity_error"] == min(row["velocity_error"] for row in rows)
    assert (metrics["intervals"], metrics["init"]) == (rows[0]["intervals"], rows[0]["init"])


def test_the_distilled_pipeline_is_the_evaluated_one(finished):
    """Stock diffusers loads it, pydit restores it, and it has been trained."""
    out, metrics = finished
    stock = DiffusionPipeline.from_pretrained(out / "distilled", local_files_only=True)
    ours = load_pipeline(out / "distilled", dtype=torch.float32).transformer
    assert sum(p.numel() for p in stock.transformer.parameters()) == metrics["parameters"]["student"]
    assert [list(pair) for pair in ours.plan.intervals] == metrics["intervals"]
    teacher = load_pipeline(untrained(), dtype=torch.float32).transformer
    start = ours.replaced[0][1]
    moved = ours.transformer_blocks[ours.replaced[0][0]].img_mlp.net[2].weight - \
        teacher.transformer_blocks[start].img_mlp.net[2].weight
    assert moved.abs().max() > 0


def test_a_finished_run_is_only_reported_again(finished, monkeypatch):
    out, metrics = finished
    weights = content_hash(out / "distilled")
    monkeypatch.setattr(run, "collect", None)
    monkeypatch.setattr(run, "evaluate", None)
    again = run.run(out, quick=True, teacher=untrained())
    assert content_hash(out / "distilled") == weights
    for model in ("teacher", "pruned", "distilled"):
        assert again[model] == metrics[model]
    assert again["distill_seconds"] == metrics["distill_seconds"] and again["seconds"] > 0.5 * metrics["seconds"]


@pytest.mark.parametrize("where", ["during distillation", "before the last evaluation"])
def test_a_killed_run_continues(where, finished, tmp_path, monkeypatch):
    """Killed and continued, it ends with the weights and verdicts of a run that was not disturbed."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if where == "during distillation":
            original, calls = run.data.make_batches, []

            def interrupted(pipe, *args, **kwargs):
                calls.append(kwargs["seed"])
                for number, item in enumerate(original(pipe, *args, **kwargs)):
                    if kwargs["seed"] == 3 and number == 5:
                        raise _Killed
                    yield item

            patch.setattr(run.data, "make_batches", interrupted)
        else:
            def no_more(self, name, *args):
                raise _Killed if name == "distilled" else None

            verdicts = run._Demo._verdicts
            patch.setattr(run._Demo, "_verdicts",
                          lambda self, name, *args: no_more(self, name) if name == "distilled" else verdicts(self, name, *args))
        with pytest.raises(_Killed):
            run.run(out, quick=True, teacher=untrained())
    assert not (out / "report.html").exists() and not (out / "metrics.json").exists()
    monkeypatch.setattr(run, "collect", None)  # what was finished is not done again
    metrics = run.run(out, quick=True, teacher=untrained())
    assert content_hash(out / "distilled") == content_hash(finished[0] / "distilled")
    assert metrics["distilled"] == finished[1]["distilled"]


def test_other_settings_start_over(finished, tmp_path, monkeypatch):
    work = run._Work(tmp_path / "work", {"a": 1}, "t", fresh=False, started=0.0)
    assert work.stage("x", lambda: 5) == 5 and work.stage("x", lambda: 6) == 5
    (tmp_path / "work" / "left.txt").touch()
    assert run._Work(tmp_path / "work", {"a": 1}, "t", fresh=False, started=0.0).stages["x"]["data"] == 5
    with pytest.raises(UserError, match=r"out: expected the options of the run that .* holds .a 1., or --fresh"):
        run._Work(tmp_path / "work", {"a": 2}, "t", fresh=False, started=0.0)
    assert (tmp_path / "work" / "left.txt").exists()
    assert not run._Work(tmp_path / "work", {"a": 2}, "t", fresh=True, started=0.0).stages
    assert not (tmp_path / "work" / "left.txt").exists()
    assert run._Work(tmp_path / "work", {"a": 2}, "t", fresh=False, started=0.0).stage("x", lambda: 7) == 7
    assert not run._Work(tmp_path / "work", {"a": 2}, "another", fresh=False, started=0.0).stages


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    """Named at once, and not when the pipeline is saved at the end."""
    mine = tmp_path / "mine"
    (mine / "distilled").mkdir(parents=True)
    (mine / "images.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="out: expected a new path, an empty directory or the one of an earlier run, got"):
        run.run(mine, quick=True, teacher=untrained())
    run.write_json(mine / "work" / "state.json", {})
    (mine / "distilled" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: expected a new path, an empty directory or a model directory to replace"):
        run.run(mine, quick=True, teacher=untrained())
    assert (mine / "images.png").read_bytes() == b"mine" and (mine / "distilled" / "notes.txt").exists()


@pytest.mark.parametrize("options, command", [
    ({}, "pydit demo --budget-minutes 12"), ({"budget_minutes": 3.5, "seed": 2}, "pydit demo --budget-minutes 3.5 --seed 2"),
    ({"quick": True}, "pydit demo --quick"), ({"quick": True, "prompts": 21}, "pydit demo --quick --prompts 21")])
def test_the_report_says_what_to_type(options, command):
    demo = run._Demo.__new__(run._Demo)
    demo.settings = run.Settings.make(**{"seed": 0, "budget_minutes": 12.0, "prompts": None, "quick": False} | options)
    assert demo._command() == command


def test_bad_input(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out: expected a directory or a new path"):
        run.run(tmp_path / "file", quick=True, teacher=untrained())
    with pytest.raises(FormatError, match="pipeline: expected a pipeline directory"):
        run.run(tmp_path / "out", quick=True, teacher=tmp_path / "none")
    monkeypatch.setattr("pydit.demo.teacher.ASSETS", tmp_path / "none")
    with pytest.raises(UserError, match="teacher: expected the demo's trained pipeline"):
        run.run(tmp_path / "out", quick=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_budget_is_split_by_measuring(finished):
    """Prompts fill the evaluation's share of the budget, in multiples of the categories and within bounds."""
    demo = object.__new__(run._Demo)
    demo.settings = run.Settings(seed=0, budget_minutes=12, prompts=None, quick=False)
    demo.teacher, student = torch.nn.Linear(10, 10), torch.nn.Linear(5, 10)
    for per_image, expected in ((0.5, None), (0.001, 700), (60.0, 70)):
        demo.work = type("W", (), {"stage": lambda self, name, compute, value=per_image: value})()
        prompts, seeds = demo._choose_prompts(student)
        assert len(prompts) == len(seeds) and len(prompts) % 7 == 0
        if expected is None:
            cost = per_image * (1 + 2 * 60 / 110)  # of one prompt, for all three models
            seconds = 720 * demo.settings.evaluation_share
            assert len(prompts) * cost <= seconds < (len(prompts) + 7) * cost
        else:
            assert len(prompts) == expected


def test_evaluations_differ_by_model(finished):
    """The log of one model is never taken for that of another."""
    assert evaluate._fingerprint([], [], {}, "a teacher") != evaluate._fingerprint([], [], {}, "a pruned")
