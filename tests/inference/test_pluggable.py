"""Subsets of a pruned model from the smallest up: what each costs and errs, and which one a budget takes."""

import itertools
import json

import pytest
import torch

import pydit
from pydit.errors import FormatError, UserError
from pydit.inference.pluggable import Subset, choose, fallback_order, load_order, resources, save_order
from pydit.models import get_adapter
from pydit.plan import PruningPlan
from tests.models import tiny
from tests.models.test_families import FAMILIES
from tests.models.test_thinned import PLANS, plan, student_of

BATCHES = [tiny.batch(seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def student():
    return pydit.prune(tiny.transformer(10), PruningPlan.from_intervals(10, [(1, 2), (4, 6), (8, 9)]))


@pytest.fixture(scope="module")
def chain(student):
    return fallback_order(student, BATCHES, image_tokens=16, text_tokens=7)


def error_of(student, active):
    student.set_active([])
    with torch.no_grad():
        targets = [student(**batch).sample.double() for batch in BATCHES]
        student.set_active(active)
        found = [student(**batch).sample.double() for batch in BATCHES]
    student.set_active(student.plan.units)
    return float(sum((f - t).square().sum() for f, t in zip(found, targets, strict=True))
                 / sum(t.square().sum() for t in targets))


def test_the_chain_goes_from_all_to_none(student, chain):
    assert chain[0].active == student.plan.units and chain[-1].active == () and chain[-1].error == 0
    for small, large in itertools.pairwise(chain):
        assert set(large.active) < set(small.active) and len(large.active) == len(small.active) - 1
        assert large.flops > small.flops and large.parameters > small.parameters
    assert all(subset.error == pytest.approx(error_of(student, subset.active), rel=1e-9) for subset in chain)
    assert student.active == list(student.plan.units)


def test_every_step_is_the_best_of_its_options(student, chain):
    """Brute force: no other unit would have lowered the error more for the FLOPs it adds."""
    config = dict(student.config) | {"num_layers": 10}
    for small, large in itertools.pairwise(chain):
        gains = {}
        for unit in small.active:
            active = tuple(other for other in small.active if other != unit)
            flops = resources(student.plan, config, active, image_tokens=16, text_tokens=7)[1]
            gains[active] = (error_of(student, active) - small.error) / (flops - small.flops)
        assert min(gains, key=gains.get) == large.active


@pytest.mark.parametrize("family", ["qwen-image", *FAMILIES])
def test_resources_are_those_of_the_modules_that_run(family):
    if family == "qwen-image":
        teacher, batch, chosen = tiny.transformer(8), tiny.batch(), plan("all")
        made = student_of(teacher, chosen)
    else:
        make, batches, _cls, depth, intervals = FAMILIES[family]
        teacher, batch = make(), batches()
        chosen = PruningPlan.from_intervals(depth, intervals, family=family)
        made = pydit.prune(teacher, chosen)
    outside = sum(p.numel() for name, child in made.named_children() if name not in get_adapter(made).block_lists
                  for p in child.parameters())
    for subset in fallback_order(made, [batch]):
        made.set_active(subset.active)
        running = [block for name in get_adapter(made).block_lists for block in getattr(made, name)]
        assert subset.parameters == outside + sum(p.numel() for block in running for p in block.parameters())
    assert subset.parameters == sum(p.numel() for p in teacher.parameters())


def test_choose():
    chain = [Subset(((1, 2), (4, 6)), 10, 100, 0.3), Subset(((1, 2),), 12, 120, 0.1), Subset((), 20, 200, 0.0)]
    assert choose(chain) is chain[2] and choose(chain, max_parameters=15) is chain[1]
    assert choose(chain, max_flops=100) is chain[0] and choose(chain, max_error=0.2) is chain[1]
    assert choose(chain, max_error=0.5, max_flops=150) is chain[0]
    with pytest.raises(UserError, match="the smallest has 10 parameters and 1e-10 TFLOP at an error of 0.3"):
        choose(chain, max_flops=50)
    with pytest.raises(UserError, match="subsets: expected those of fallback_order, got none"):
        choose([])


def test_files(tmp_path, chain):
    save_order(chain, tmp_path / "order.json")
    assert load_order(tmp_path / "order.json") == chain
    data = json.loads((tmp_path / "order.json").read_text())
    for change in ({"version": 2}, {"subsets": [{}]}, {"subsets": 3}):
        (tmp_path / "bad.json").write_text(json.dumps(data | change))
        with pytest.raises(FormatError, match="order: expected"):
            load_order(tmp_path / "bad.json")


def test_what_it_needs(student):
    with pytest.raises(UserError, match="student: expected a model made by pydit.prune, got QwenImageTransformer2DModel"):
        fallback_order(tiny.transformer(2), BATCHES)
    with pytest.raises(UserError, match="batches: expected at least one batch, got none"):
        fallback_order(student, [])


def test_all_kinds_of_units_have_a_chain():
    for name in PLANS:
        made = student_of(tiny.transformer(8), plan(name, lean=True))
        chain = fallback_order(made, BATCHES[:1])
        assert len(chain) == len(made.plan.units) + 1 and chain[-1].error < 1e-10
