"""Greedy search against a search written out by hand over models that were really pruned."""

import dataclasses

import pytest
import torch

import pydit
from pydit import PruningPlan, UserError
from pydit.analysis import choose_linear_ffns, greedy_search, velocity_error
from tests.models import tiny


@pytest.fixture(scope="module")
def teacher():
    return tiny.transformer(6)


@pytest.fixture(scope="module")
def batches():
    return [tiny.batch(seed=0), tiny.batch(seed=1, text=5, masked=False)]


def plan_of(removed, layers=6):
    """The plan in which every removed layer joins the kept one before it."""
    intervals, start = [], 0
    for k in range(1, layers + 1):
        if k == layers or k not in removed:
            if k - start > 1:
                intervals.append((start, k - 1))
            start = k
    return PruningPlan.from_intervals(layers, intervals)


def exact_error(teacher, student, batches):
    difference = total = 0.0
    for batch in batches:
        with torch.no_grad():
            v, t = (m(**batch).sample.double() for m in (student, teacher))
        difference, total = difference + ((v - t) ** 2).sum(), total + (t**2).sum()
    return float(difference / total)


def test_error_of_a_student_is_relative_and_zero_for_the_teacher_itself(teacher, batches):
    student = pydit.prune(teacher, PruningPlan.from_intervals(6, [(1, 3)]))
    error = velocity_error(teacher, student, batches)
    assert error > 1e-4 and error == pytest.approx(exact_error(teacher, student, batches), rel=1e-9)
    assert velocity_error(teacher, teacher, iter(batches)) == 0


def test_every_step_removes_the_layer_that_costs_least(teacher, batches):
    before = tiny.fingerprint(teacher)
    plan = greedy_search(teacher, iter(batches), target=3)
    assert tiny.same(before, tiny.fingerprint(teacher)) and len(teacher.transformer_blocks) == 6
    removed, order, errors = set(), plan.provenance["order"], plan.provenance["errors"]
    for layer, error in zip(order, errors, strict=True):
        costs = {k: exact_error(teacher, pydit.prune(teacher, plan_of(removed | {k})), batches)
                 for k in range(1, 6) if k not in removed}
        assert layer == min(costs, key=costs.get) and error == pytest.approx(costs[layer], rel=1e-6)
        removed.add(layer)
    assert plan == plan_of(removed) and plan.removed == 3
    assert PruningPlan.from_dict(plan.to_dict()).provenance["method"] == "greedy"


def test_a_layer_that_does_nothing_goes_first(batches):
    teacher = tiny.transformer(5, seed=3)
    with torch.no_grad():
        for modulation in (teacher.transformer_blocks[2].img_mod, teacher.transformer_blocks[2].txt_mod):
            modulation[1].weight.zero_()
            modulation[1].bias.zero_()
    plan = greedy_search(teacher, batches, target=0.2)
    assert plan.intervals == ((1, 2),) and plan.provenance["errors"] == [0.0]


@pytest.mark.parametrize("target, expected", [(0, "target: expected 1 to 5 removed layers, got 0"), (1.5, "target:"),
                                              (6, "target: expected 1 to 5"), (None, "target: expected a number")])
def test_bad_targets(teacher, batches, target, expected):
    with pytest.raises(UserError, match=expected):
        greedy_search(teacher, batches, target=target)


def test_bad_models_and_no_batches(teacher, batches):
    with pytest.raises(UserError, match="transformer: expected an unpruned model"):
        greedy_search(pydit.prune(teacher, plan_of({1})), batches, target=1)
    for function in (lambda: greedy_search(teacher, [], target=1), lambda: velocity_error(teacher, teacher, [])):
        with pytest.raises(UserError, match="batches: expected at least one batch"):
            function()


def test_more_layers_than_may_go():
    """Of FLUX.1 the first block of each class stays."""
    model, given = tiny.flux(), [tiny.flux_batch()]
    assert greedy_search(model, given, target=2).intervals == ((0, 1), (2, 3))
    with pytest.raises(UserError, match="target: expected at most 2 layers, which is all but the first of each run .*, got 3"):
        greedy_search(model, given, target=3)


@pytest.mark.filterwarnings("ignore:.*more unknowns")
@pytest.mark.parametrize("family, streams, fields", [
    ("qwen-image", "both", {"intervals": [(1, 2)], "linear_ffn": [3]}), ("qwen-image", "text", {"text_linear": [(3, 4)]}),
    ("flux.1", "text", {}), ("flux.1", "both", {"single_stream": (0, 1)}), ("sd3.5", "text", {"affine": [1]})])
def test_every_step_makes_the_ffn_linear_that_the_velocity_hears_least(family, streams, fields):
    """Against students that were really pruned, one for each candidate."""
    make, batch, layers = {"qwen-image": (lambda: tiny.transformer(6), tiny.batch, 6), "flux.1": (tiny.flux, tiny.flux_batch, 4),
                           "sd3.5": (lambda: tiny.sd3(num_layers=5), tiny.sd3_batch, 5)}[family]
    teacher, plan, field = make(), PruningPlan(family, layers, **fields), {"both": "linear_ffn", "text": "linear_text_ffn"}[streams]
    batches, before = [batch(seed=seed) for seed in range(3)], tiny.fingerprint(teacher)
    found = choose_linear_ffns(teacher, plan, iter(batches), count=2, streams=streams, init="middle")
    assert tiny.same(before, tiny.fingerprint(teacher))

    def with_linear(layers):
        return dataclasses.replace(plan, **{field: [*getattr(plan, field), *layers]})

    def pruned(layers):
        return pydit.prune(teacher, with_linear(layers), batches=batches, init="middle")

    chosen, (first, *errors) = [], found.provenance[field]["errors"]
    assert first == pytest.approx(exact_error(teacher, pruned([]), batches), rel=1e-6, abs=1e-12)
    for layer, error in zip(found.provenance[field]["order"], errors, strict=True):
        costs = {}
        for spec in plan.blocks:
            try:
                costs[spec.source[0]] = exact_error(teacher, pruned([*chosen, spec.source[0]]), batches)
            except UserError:  # FLUX.1's single blocks have one FFN for both streams, others are linear, or affine
                continue
        assert error == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-12)
        assert costs[layer] == pytest.approx(min(costs.values()), rel=1e-6, abs=1e-12)
        chosen.append(layer)
    assert found == with_linear(chosen)


def test_linear_ffns_that_cannot_be_chosen(teacher, batches):
    plan = PruningPlan("qwen-image", 6, affine=[1, 2, 3, 4, 5])
    with pytest.raises(UserError, match="count: expected at most 1, the blocks with such an FFN that the plan leaves whole, got 2"):
        choose_linear_ffns(teacher, plan, batches, count=2)
    with pytest.raises(UserError, match="streams: expected both or text, got 'image'"):
        choose_linear_ffns(teacher, plan, batches, count=1, streams="image")
    with pytest.raises(UserError, match="plan: expected a plan for the model's 6 layers, got one for 5"):
        choose_linear_ffns(teacher, PruningPlan("qwen-image", 5), batches, count=1)
