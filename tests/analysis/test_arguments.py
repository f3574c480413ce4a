"""Anything in place of any argument of what reads, prunes and accelerates models: a sentence that names it, or a result."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

import pydit
from pydit import analysis, stats
from pydit.analysis.criteria import get_criterion
from pydit.errors import UserError
from tests import junk
from tests.models import tiny


@functools.cache
def model():
    return tiny.transformer(6)


@functools.cache
def statistics():
    return analysis.collect(model(), batches(), progress=False)


@functools.cache
def scores():
    return analysis.score(statistics())


def batches():
    return [tiny.batch(), tiny.batch()]


def on_a_copy(call, name):
    """A call that changes the model it is given."""
    def run(**arguments):
        given = arguments[name]
        return call(**{**arguments, name: copy.deepcopy(given) if isinstance(given, nn.Module) else given})

    return run


PLAN = pydit.PruningPlan("qwen-image", 6, ((1, 3),))
OPTIONS = {f"criterion {name}": (functools.partial(get_criterion, name), dataclasses.asdict(get_criterion(name)))
           for name in ("ppcl", "amber", "rel_l1", "laptop", "random")}
CALLS = {
    "collect": (functools.partial(analysis.collect, progress=False),
                {"transformer": model(), "batches": batches(), "max_batches": 2, "tokens_per_batch": 8,
                 "sample_fraction": 0.5, "with_ablation": False, "project": None, "seed": 0, "resume": None,
                 "on_batch": None}),
    "select": (lambda scores, **k: analysis.select(scores() if callable(scores) else scores, **k),
               {"scores": scores, "target": 2}),
    "candidates": (lambda stats, **k: analysis.candidates(stats() if callable(stats) else stats, methods=["random"], **k),
                   {"stats": statistics, "target": 2}),
    "learn_mask": (lambda **k: analysis.learn_mask(model(), lambda start: iter(batches()), **k),
                   {"target": 2, "steps": 1, "group": 3, "rank": 1, "lr": 1e-3, "temperature": (4.0, 0.1), "seed": 0}),
    "detect": (lambda stats: analysis.detect(stats() if callable(stats) else stats), {"stats": statistics}),
    "ablate": (analysis.ablate, {"transformer": model(), "batches": batches()}),
    "greedy_search": (analysis.greedy_search, {"transformer": model(), "batches": batches(), "target": 2}),
    "choose_linear_ffns": (analysis.choose_linear_ffns, {"transformer": model(), "plan": PLAN, "batches": batches(), "count": 1,
                                                         "streams": "text", "init": "last"}),
    "joint_removal": (analysis.joint_removal, {"transformer": model(), "plan": PLAN, "batches": batches()}),
    "velocity_error": (analysis.velocity_error, {"teacher": model(), "student": model(), "batches": batches()}),
    "prune": (pydit.prune, {"transformer": model(), "plan": PLAN, "init": "average", "batches": batches(), "ridge": 1e-4,
                            "tokens_per_batch": 16, "seed": 0}),
    "accelerate": (on_a_copy(pydit.accelerate, "pipe_or_model"),
                   {"pipe_or_model": model(), "exact": False, "cuda_graphs": False}),
    "restore": (on_a_copy(pydit.restore, "pipe_or_model"), {"pipe_or_model": model()}),
    "report": (pydit.report, {"model": model()}),
    "bake_schedule": (on_a_copy(pydit.bake_schedule, "transformer"), {"transformer": model(), "timesteps": [1.0, 0.5]}),
    "PruningPlan": (pydit.PruningPlan, {"family": "qwen-image", "num_layers": 6, "intervals": [(1, 3)], "text_linear": [],
                                        "linear_ffn": [4], "linear_text_ffn": [5], "affine": [],
                                        "single_stream": None}),
    "from_dict": (pydit.PruningPlan.from_dict, {"data": PLAN.to_dict()}),
    "load_pipeline": (lambda path: pydit.load_pipeline(path), {"path": "nowhere"}),
    "save_pipeline": (pydit.save_pipeline, {"pipe": model(), "path": "nowhere"}),
    "criterion": (get_criterion, {"method": "ppcl"}),
    "preset": (pydit.PruningPlan.preset, {"name": "ppcl-qwen-image-12b"}),
    "num_flops": (lambda **k: PLAN.num_flops({"num_layers": 6}, **k), {"image_tokens": 20, "text_tokens": 7}),
    **OPTIONS,
}


@pytest.mark.parametrize(("name", "argument"), junk.arguments(CALLS))
def test_junk_is_named(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    junk.check(*CALLS[name], argument, others=("transformer", "family", "pipe", "pipeline", "model", "batch", "plan", "CKA",
                                               "preset", "make_batches"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in CALLS if "pipeline" not in name and name not in OPTIONS])
def test_the_valid_arguments_pass(name):
    call, valid = CALLS[name]
    assert call(**valid) is not None


def test_whole_numbers_of_any_kind_count():
    """numpy's and tensors without dimensions, in what is computed and in what is written; a bool is no number."""
    two, four = np.int64(2), torch.tensor(4)
    found = analysis.collect(model(), batches(), max_batches=two, tokens_per_batch=np.uint8(8), seed=four, progress=False)
    plain = analysis.collect(model(), batches(), max_batches=2, tokens_per_batch=8, seed=4, progress=False)
    assert torch.equal(found.samples["image"][0], plain.samples["image"][0]) and found.batches_seen == 2
    for method, options in (("ppcl", {"max_length": four, "selection": "optimal"}), ("bi", {"protect_first": two}),
                            ("random", {"seed": four})):
        plan = analysis.detect(found, method, target=two, **options)
        assert plan == analysis.detect(found, method, target=2, **{k: np.asarray(v).tolist() for k, v in options.items()})
        assert json.loads(json.dumps(plan.to_dict()))["provenance"]["target"] == 2
    assert get_criterion("laptop", sizes=[np.int32(2)] * 6).sizes == [2] * 6
    assert stats.Moments(two, four).m_xy.shape == (2, 4) and stats.CKA(four).num_layers == 4
    student = pydit.prune(model(), PLAN, tokens_per_batch=two, seed=four)
    student.set_active([(np.int64(1), torch.tensor(3))])
    for wrong in (True, np.True_, torch.tensor(True), torch.tensor([2])):
        for call, name in ((stats.Moments, "dim_x"), (functools.partial(pydit.prune, model(), PLAN), "seed"),
                           (functools.partial(analysis.detect, found), "target"),
                           (functools.partial(get_criterion, "bi"), "resamples")):
            with pytest.raises(UserError, match=f"^{name}: expected "):
                call(**{name: wrong})
