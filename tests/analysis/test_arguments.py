"""Anything in place of any argument of what reads, prunes and accelerates models: a sentence that names it, or a result."""

import copy
import functools

import pytest
from torch import nn

import pydit
from pydit import analysis
from tests import junk
from tests.models import tiny


@functools.cache
def model():
    return tiny.transformer(6)


@functools.cache
def statistics():
    return analysis.collect(model(), batches(), progress=False)


def batches():
    return [tiny.batch(), tiny.batch()]


def on_a_copy(call, name):
    """A call that changes the model it is given."""
    def run(**arguments):
        given = arguments[name]
        return call(**{**arguments, name: copy.deepcopy(given) if isinstance(given, nn.Module) else given})

    return run


PLAN = pydit.PruningPlan("qwen-image", 6, ((1, 3),))
CALLS = {
    "collect": (analysis.collect, {"transformer": model(), "batches": batches()}),
    "detect": (lambda stats: analysis.detect(stats() if callable(stats) else stats), {"stats": statistics}),
    "ablate": (analysis.ablate, {"transformer": model(), "batches": batches()}),
    "greedy_search": (analysis.greedy_search, {"transformer": model(), "batches": batches(), "target": 2}),
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
                                        "linear_ffn": [4], "affine": [], "single_stream": None}),
    "from_dict": (pydit.PruningPlan.from_dict, {"data": PLAN.to_dict()}),
    "load_pipeline": (lambda path: pydit.load_pipeline(path), {"path": "nowhere"}),
    "save_pipeline": (pydit.save_pipeline, {"pipe": model(), "path": "nowhere"}),
}


@pytest.mark.parametrize("value", junk.JUNK)
@pytest.mark.parametrize(("name", "argument"), junk.arguments(CALLS))
def test_junk_is_named(name, argument, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    junk.check(*CALLS[name], argument, value, others=("transformer", "family", "pipe", "pipeline", "model", "batch", "plan", "CKA"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in CALLS if "pipeline" not in name])
def test_the_valid_arguments_pass(name):
    call, valid = CALLS[name]
    assert call(**valid) is not None
