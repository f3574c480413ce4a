"""Evaluation: means over categories, paired bootstrap against a direct count, logs that survive a kill."""

import json

import numpy as np
import pytest

from pydit.demo import data, evaluate, verifier, world
from pydit.demo.evaluate import Result, relative_loss, wilson
from pydit.errors import FormatError, UserError


class _Verdict:
    def __init__(self, ok):
        self.ok = ok


@pytest.fixture
def drawing(monkeypatch):
    """Replace drawing and judging: an image holds its seed, and odd seeds pass. Yields the seeds drawn so far."""
    drawn = []

    def generate(pipe, prompts, *, seeds, **settings):
        drawn.extend(seeds)
        return [np.full((2, 2, 3), seed % 256, np.uint8) for seed in seeds]

    monkeypatch.setattr(data, "generate", generate)
    monkeypatch.setattr(verifier, "verify", lambda image, prompt: _Verdict(bool(image[0, 0, 0] % 2)))
    return drawn


def _result(passed_by_category, repeats=1):
    prompts, categories, passed = [], [], []
    for category, verdicts in passed_by_category.items():
        for i, verdict in enumerate(verdicts):
            prompts.append(f"{category} {i // repeats}")
            categories.append(category)
            passed.append(bool(verdict))
    return Result(prompts, categories, list(range(len(prompts))), passed)


def test_overall_is_the_mean_over_categories():
    result = _result({"a": [1, 1, 1, 1, 1, 1, 1, 0], "b": [0, 1]})
    assert result.per_category == {"a": 7 / 8, "b": 1 / 2} and result.counts == {"a": 8, "b": 2}
    assert result.overall == pytest.approx((7 / 8 + 1 / 2) / 2)


def test_wilson_against_its_definition():
    # The bounds are where the score test just rejects: |share - p| = z sqrt(p (1 - p) / n).
    for successes, count in ((0, 10), (3, 10), (10, 10), (70, 200)):
        low, high = wilson(successes, count)
        for bound in (low, high):
            spread = 1.959964 * np.sqrt(bound * (1 - bound) / count)
            assert abs(successes / count - bound) == pytest.approx(spread, abs=1e-6)
        assert low <= successes / count <= high
    assert wilson(0, 0) == (0.0, 1.0)


def test_relative_loss_of_equal_and_of_half():
    teacher = _result({"a": [1] * 20, "b": [1] * 20})
    same = relative_loss(teacher, teacher)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    half = _result({"a": [1] * 20, "b": [0] * 20})
    loss = relative_loss(teacher, half)
    assert (loss.value, loss.low, loss.high) == (0.5, 0.5, 0.5)  # within a category nothing varies


def test_interval_agrees_with_a_direct_bootstrap():
    rng = np.random.default_rng(5)
    teacher = _result({"a": rng.random(60) < 0.9, "b": rng.random(40) < 0.7}, repeats=2)
    student = _result({"a": rng.random(60) < 0.8, "b": rng.random(40) < 0.6}, repeats=2)
    losses = []
    for _ in range(4000):
        means = []
        for category in ("a", "b"):
            rows = [i for i, c in enumerate(teacher.categories) if c == category]
            names = sorted({teacher.prompts[i] for i in rows})
            chosen = [i for name in rng.choice(names, len(names)) for i in rows if teacher.prompts[i] == name]
            means.append([np.mean([r.passed[i] for i in chosen]) for r in (teacher, student)])
        t, s = np.mean(means, axis=0)
        losses.append((t - s) / t)
    loss = relative_loss(teacher, student)
    low, high = np.quantile(losses, [0.025, 0.975])
    assert loss.value == pytest.approx(1 - student.overall / teacher.overall)
    assert (loss.low, loss.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert loss.low < loss.value < loss.high


def test_pairing_narrows_the_interval():
    """Two models that fail on the same prompts differ by a certain amount, however uncertain each of them is."""
    verdicts = np.arange(50) % 2
    teacher = _result({"a": verdicts})
    assert relative_loss(teacher, _result({"a": verdicts})).high == 0.0
    shuffled = relative_loss(teacher, _result({"a": 1 - verdicts}))
    assert shuffled.high - shuffled.low > 0.3


def test_a_teacher_without_success_has_no_relative_loss():
    loss = relative_loss(_result({"a": [0, 0]}), _result({"a": [1, 0]}))
    assert (loss.value, loss.low, loss.high) == (None, None, None) and "undefined" in str(loss)


def test_other_prompts_are_refused():
    with pytest.raises(UserError, match="compare: expected two results on the same prompts and seeds"):
        relative_loss(_result({"a": [1, 0]}), _result({"b": [1, 0]}))


def test_evaluate_counts_and_keeps_images(drawing):
    prompts = world.sample_prompts(21, split="held_out", seed=0)
    result = evaluate.evaluate(None, prompts, list(range(21)), steps=2, guidance=1.0, batch_size=4, keep=3, progress=False)
    assert result.passed == [bool(i % 2) for i in range(21)] and drawing == list(range(21))
    assert [int(image[0, 0, 0]) for image in result.images] == [0, 1, 2]
    assert result.counts == dict.fromkeys(world.CATEGORIES, 3)


def test_a_result_round_trips(drawing):
    prompts = world.sample_prompts(7, split="held_out", seed=0)
    result = evaluate.evaluate(None, prompts, list(range(7)), steps=2, guidance=1.0, progress=False)
    stored = json.loads(json.dumps(result.to_json()))
    assert Result.from_json(stored, what="x") == result
    assert stored["overall"] == result.overall and stored["images_per_category"] == result.counts
    with pytest.raises(FormatError, match="x: expected a file written by `pydit eval`"):
        Result.from_json({"format": "other"}, what="x")
    with pytest.raises(FormatError, match="x: expected samples"):
        Result.from_json({**stored, "samples": [{}]}, what="x")


def test_resume_draws_only_what_is_missing(drawing, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    prompts, seeds, log = world.sample_prompts(14, split="held_out", seed=0), list(range(14)), tmp_path / "log.jsonl"
    arguments = {"steps": 2, "guidance": 1.0, "batch_size": 4, "log": log, "identity": "w", "progress": False}
    whole = evaluate.evaluate(None, prompts, seeds, **arguments)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:5])  # killed while writing the third chunk
    with pytest.raises(UserError, match="log: expected no verdicts of an earlier evaluation, got some in .*log.jsonl; pass"):
        evaluate.evaluate(None, prompts, seeds, **arguments)
    drawing.clear()
    again = evaluate.evaluate(None, prompts, seeds, resume=True, keep=2, **arguments)
    assert again.passed == whole.passed and drawing == [0, 1, *range(8, 14)]  # the two pictures, then what was missing
    assert log.read_bytes() == b"".join(lines)
    with pytest.raises(UserError, match="resume: expected a log of this evaluation"):
        evaluate.evaluate(None, prompts, seeds, resume=True, **{**arguments, "identity": "other weights"})
    log.write_text("not a log\n")
    with pytest.raises(FormatError, match="log: expected the log of an evaluation"):
        evaluate.evaluate(None, prompts, seeds, resume=True, **arguments)


def test_prompts_and_seeds_pair_up():
    with pytest.raises(UserError, match="seeds: expected one per prompt and at least one, got 0 for 0 prompts"):
        evaluate.evaluate(None, [], [], steps=1, guidance=1.0)
