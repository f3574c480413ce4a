"""Whatever a plan combines, some things hold: its counts, what is saved, which blocks run, and what runs fused."""

import copy
import random
import warnings

import pytest
import torch

import pydit
from pydit.errors import UserError
from pydit.plan import PruningPlan
from pydit.pruning import INITS
from pydit.testing import assert_accurate
from tests.models import tiny

FAMILIES = {"qwen-image": (lambda: tiny.transformer(8), tiny.batch, 8),
            "flux.1": (lambda: tiny.flux(num_layers=4, num_single_layers=4), tiny.flux_batch, 8),
            "sd3.5": (lambda: tiny.sd3(num_layers=7, dual_attention_layers=(0, 1, 2)), tiny.sd3_batch, 7)}


def drawn(family, layers, rng):
    """A plan, perhaps one that is refused."""
    intervals, layer = [], 0
    while layer < layers - 1:
        end = min(layers - 1, layer + rng.choice([1, 1, 2, 3])) if rng.random() < 0.3 else layer
        intervals += [(layer, end)] if end > layer else []
        layer = end + 1
    fields = {"dead_tensors": rng.random() < 0.5}
    if rng.random() < 0.5:
        fields["linear_ffn"] = rng.sample(range(layers), rng.choice([1, 2]))
    if rng.random() < 0.3:
        fields["linear_text_ffn"] = rng.sample(range(layers), rng.choice([1, 2]))
    if rng.random() < 0.4:
        fields["affine"] = rng.sample(range(layers), rng.choice([1, 2]))
    if rng.random() < 0.5:
        anchor = rng.randrange(layers - 1)
        fields["text_linear"] = [(anchor, rng.randrange(anchor + 1, layers))]
    if rng.random() < 0.3:
        fields["single_stream"] = rng.choice([rng.randrange(1, layers), tuple(sorted(rng.sample(range(layers), 2)))])
    return PruningPlan(family, layers, intervals, **fields)


def student_of(family, rng):
    """(teacher, student) of the first plan drawn that fits."""
    make, batch, layers = FAMILIES[family]
    while True:
        try:
            teacher, plan = make(), drawn(family, layers, rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return teacher, pydit.prune(teacher, plan, init=rng.choice(INITS),
                                            batches=[batch(seed=seed) for seed in range(3)])
        except UserError:
            continue


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def gradients(model, batch):
    model.zero_grad()
    model(**batch, return_dict=False)[0].square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_plan(family, seed, tmp_path):
    rng = random.Random(seed)
    teacher, student = student_of(family, rng)
    plan, batch = student.plan, FAMILIES[family][1](seed=9)
    assert sum(p.numel() for p in student.parameters()) == plan.num_parameters(teacher.config)
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    expected = run(student, batch)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(run(again, batch), expected) and (again.plan, again.init) == (plan, student.init)

    some = rng.sample(plan.units, len(plan.units) // 2)
    accelerated = pydit.accelerate(copy.deepcopy(student))
    for active in ([], some, plan.units):
        for model in (student, accelerated):
            model.set_active(active)
        right = teacher if not active else student
        right_wide = copy.deepcopy(right).double() if right is teacher else wide(student, active, teacher)
        for model in (student, accelerated):
            assert_accurate(run(model, batch), run(right_wide, tiny.cast(batch, torch.float64)), run(right, batch))
    assert torch.equal(run(student, batch), expected)

    stock, found = gradients(student, batch), gradients(accelerated, batch)
    exact = gradients(wide(student, plan.units, teacher), tiny.cast(batch, torch.float64))
    for name, gradient in found.items():
        if gradient is None or stock[name] is None:  # of a query that only text without an output has: None or zeros
            assert not any(g.any() for g in (gradient, stock[name]) if g is not None), name
    names = [name for name, gradient in found.items() if gradient is not None and stock[name] is not None]
    found, exact, stock = (torch.cat([of[name].flatten() for name in names]).double() for of in (found, exact, stock))
    assert (found - exact).norm() <= 2 * (stock - exact).norm()


def wide(student, active, teacher):
    """A copy in float64, with layers of the teacher in float64 where these run."""
    copied = copy.deepcopy(student).double()
    copied.attach_teacher(copy.deepcopy(teacher).double())
    copied.set_active(active)
    return copied
