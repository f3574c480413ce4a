"""Intervals trained apart and put together are, to the last bit, those trained in one run."""

import dataclasses

import pytest
import torch

import pydit
from pydit import PruningPlan, UserError
from pydit.distill import DistillConfig, distill, merge
from pydit.distill.pair import trained_apart
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


def test_parts_that_began_as_others_are_refused():
    """Blocks would be counted as trained that only began elsewhere, and a LoRA of the teacher put in the wrong place."""
    teacher, student = tiny.make_pair()
    part = pydit.prune(teacher, student.plan, init="last")
    with pytest.raises(UserError, match="parts: expected students whose blocks began as 'first', got 'last' for"):
        merge(student, {PAIRS[0]: part})
    with pytest.raises(UserError, match="merge: expected students whose blocks began as 'first', got 'last'"):
        trained_apart(student, tiny.weights(student), part)


def test_a_run_of_a_student_that_began_as_others_is_not_continued(tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path)
    teacher, student = tiny.make_pair()
    distill(teacher, student, tiny.stream, config, progress=False)
    other = pydit.prune(teacher, student.plan, init="last")
    with pytest.raises(UserError, match="checkpoint_dir: .*init"):
        distill(teacher, other, tiny.stream, dataclasses.replace(config, resume=True), progress=False)


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("what", ["schedule", "cache"])
def test_models_that_do_not_compute_what_they_stand_for_are_refused(which, what):
    from diffusers import FirstBlockCacheConfig

    teacher, student = tiny.make_pair()
    model = teacher if which == "teacher" else student
    if what == "cache":
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    else:
        pydit.bake_schedule(model, [0.5])
    with pytest.raises(UserError, match=f"{which}: expected .* (got a baked schedule|got one with a block cache)"):
        distill(teacher, student, tiny.stream, CONFIG, progress=False)


@pytest.mark.parametrize("init", ["first", "middle", "last", "average"])
def test_text_maps_are_trained_towards_what_they_were_fitted_to(init):
    """The block's own modulation of the text, not that of the interval's first layer, which would be 1 off."""
    teacher = tiny.make_teacher(8)
    batches = [tiny.make_batch(k, size=8) for k in range(12)]
    plan = PruningPlan("qwen-image", 8, [(3, 5)], text_linear=[(1, 6)])
    student = pydit.prune(teacher, plan, init=init, batches=[batch for batch, _ in batches])
    config = DistillConfig(layers_steps=12, layers_lr=1e-9, linear_weight=1.0, intervals=((3, 5),), log_every=12)
    result = distill(teacher, student, batches, config, progress=False)
    parts = result.history[0]["intervals"]["3-5"]
    assert parts["linear"] < 0.1
