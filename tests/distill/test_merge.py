"""Intervals trained apart and put together are, to the last bit, those trained in one run."""

import dataclasses

import pytest
import torch

import pydit
from pydit import PruningPlan, UserError
from pydit.distill import DistillConfig, distill, merge
from tests.distill import tiny

CONFIG = DistillConfig(layers_steps=5, layers_lr=1e-3, log_every=1)
PAIRS = ((1, 2), (4, 5))


def trained(**options):
    teacher, student = tiny.make_pair()
    result = distill(teacher, student, tiny.stream, dataclasses.replace(CONFIG, **options), progress=False)
    return student, result


def test_parts_make_the_whole():
    whole, result = trained()
    parts = {pair: trained(intervals=(pair,)) for pair in PAIRS}
    for pair, (part, history) in parts.items():
        label = f"{pair[0]}-{pair[1]}"
        assert [row["intervals"] for row in history.history] == [
            {label: row["intervals"][label]} for row in result.history]
        untouched = next(other for other in PAIRS if other != pair)
        assert not torch.equal(part.transformer_blocks[1 if pair == PAIRS[0] else 3].img_mlp.net[2].weight,
                               tiny.make_pair()[1].transformer_blocks[1 if pair == PAIRS[0] else 3].img_mlp.net[2].weight)
        assert torch.equal(part.transformer_blocks[1 if untouched == PAIRS[0] else 3].img_mlp.net[2].weight,
                           tiny.make_pair()[1].transformer_blocks[1 if untouched == PAIRS[0] else 3].img_mlp.net[2].weight)
    _, student = tiny.make_pair()
    student.set_active([PAIRS[0]])
    assert merge(student, {pair: part for pair, (part, _) in parts.items()}) is student and student.active == [PAIRS[0]]
    expected = tiny.weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tiny.weights(student).items())


def test_resume_keeps_to_the_intervals(tmp_path):
    config = dataclasses.replace(CONFIG, intervals=(PAIRS[0],), checkpoint_dir=tmp_path, save_every=2)
    assert DistillConfig.from_dict(config.to_dict()) == dataclasses.replace(config, checkpoint_dir=str(tmp_path))
    distill(*tiny.make_pair(), tiny.stream, config, progress=False)
    other = dataclasses.replace(config, intervals=(PAIRS[1],), resume=True)
    with pytest.raises(UserError, match="expected a checkpoint with config.intervals"):
        distill(*tiny.make_pair(), tiny.stream, other, progress=False)


def test_wrong_intervals():
    with pytest.raises(UserError, match=r"intervals: expected some of \[\(1, 2\), \(4, 5\)\], got \[\(1, 3\)\]"):
        trained(intervals=((1, 3),))
    with pytest.raises(UserError, match="intervals: expected None, because output_steps is not 0"):
        trained(intervals=(PAIRS[0],), output_steps=1)
    for wrong in ((), ((1,),), "1-2", ((1.0, 2),)):
        with pytest.raises(UserError, match="intervals: expected pairs of whole numbers, or None"):
            trained(intervals=wrong)
    _, student = tiny.make_pair()
    other = pydit.prune(tiny.make_teacher(), PruningPlan.from_intervals(6, [(1, 2)]))
    with pytest.raises(UserError, match="student: expected a model made by pydit.prune, got QwenImage"):
        merge(tiny.make_teacher(), {})
    with pytest.raises(UserError, match="parts: expected a dict of .* got list"):
        merge(student, [student])
    with pytest.raises(UserError, match=r"parts: expected some of \[\(1, 2\), \(4, 5\)\], got \(0, 1\)"):
        merge(student, {(0, 1): student})
    with pytest.raises(UserError, match=r"parts: expected students of the same plan, got another for \(1, 2\)"):
        merge(student, {(1, 2): other})
