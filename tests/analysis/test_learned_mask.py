"""The learned mask on models where the right choice is known, and that it leaves the teacher as it was."""

import itertools

import pytest
import torch

from pydit import UserError
from pydit.analysis import learn_mask
from pydit.analysis.learned_mask import make_groups
from pydit.models import get_adapter
from tests.models import tiny


def batches(start):
    while True:
        yield tiny.batch(seed=start)
        start += 1


def planted(redundant, layers=8):
    """A teacher in which these blocks, and no others, hardly change their streams."""
    model = tiny.transformer(layers)
    with torch.no_grad():
        for layer in redundant:
            block = model.transformer_blocks[layer]
            for linear in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
                linear.weight *= 1e-3
                linear.bias *= 1e-3
    return model


@pytest.mark.parametrize("redundant", [(1, 2, 4, 6), (2, 3, 5, 7)])
def test_finds_the_planted_layers_and_leaves_the_teacher_alone(redundant):
    model = planted(redundant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(**tiny.batch(seed=0)).sample
    plan = learn_mask(model, batches, target=0.5, steps=25, rank=2)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert sorted(plan.provenance["removed"]) == sorted(redundant)
    assert plan.num_student_layers == 4 and plan.family == "qwen-image"
    assert all(row["probability"] > 0.5 for row in plan.provenance["groups"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.transformer_blocks.parameters())
    assert torch.equal(model(**tiny.batch(seed=0)).sample, output)
    assert get_adapter(model).num_layers(model) == 8


@pytest.mark.parametrize(("build", "batch"), [(tiny.flux, tiny.flux_batch), (tiny.sd3, tiny.sd3_batch)])
def test_other_families(build, batch):
    model = build()
    plan = learn_mask(model, lambda start: itertools.repeat((batch(), None)), target=2, steps=2, rank=1, group=3)
    removed, adapter = plan.provenance["removed"], get_adapter(model)
    assert len(removed) == 2 and not set(removed) & set(adapter.starts(model))
    plan.require_match(model)


def test_the_same_seed_gives_the_same_plan():
    model = tiny.transformer(4)
    first, second = (learn_mask(model, batches, target=2, steps=3, rank=1, group=2, seed=5) for _ in range(2))
    assert first.to_dict() == second.to_dict()


@pytest.mark.parametrize(("layers", "count", "group", "fixed"), [
    (16, 5, 4, (0,)), (16, 12, 4, (0,)), (16, 15, 4, (0,)), (7, 3, 4, (0,)), (57, 30, 4, (0, 19)), (5, 4, 2, (0,)),
    (4, 1, 8, (0,))])
def test_groups_cover_the_layers_and_give_up_as_many_as_asked(layers, count, group, fixed):
    groups = make_groups(layers, count, group, fixed)
    assert [layer for run, _ in groups for layer in run] == list(range(layers))
    assert sum(share for _, share in groups) == count
    for run, share in groups:
        assert 0 <= share <= len(run) - sum(layer in run for layer in fixed)
    full = [share for run, share in groups if len(run) == group and not set(fixed) & set(run)]
    if full and count < layers // 2:
        assert max(full) - min(full) <= 1


@pytest.mark.parametrize(("options", "message"), [
    ({"target": 4}, "target: expected 1 to 3 removed layers, got 4"),
    ({"target": None}, "target: expected a number or share of layers, got none"),
    ({"target": 1, "steps": 0}, "steps: expected a whole number of at least 1, got 0"),
    ({"target": 1, "group": 1}, "group: expected a whole number of at least 2, got 1"),
    ({"target": 1, "lr": 0}, "lr: expected a number above 0, got 0"),
    ({"target": 1, "temperature": (1, -1)}, "temperature: expected a number above 0, got -1")])
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        learn_mask(tiny.transformer(4), batches, **options)


def test_too_few_batches_are_said_and_nothing_is_left_behind():
    model = tiny.transformer(4)
    with pytest.raises(UserError, match="make_batches: expected at least 3 batches, one a step, got 2"):
        learn_mask(model, lambda start: iter([tiny.batch(seed=0), tiny.batch(seed=1)]), target=1, steps=3, rank=1)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
