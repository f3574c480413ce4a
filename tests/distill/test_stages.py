"""A student that changes on the way keeps what a stage leaves alone, and goes on wherever it was stopped."""

import dataclasses

import pytest
import torch

from pydit import PruningPlan, UserError, prune
from pydit.distill import DistillConfig, Stage, distill, progressive, stages
from tests.distill import tiny
from tests.distill.test_resume import Stop, stopping_stream

FINAL = PruningPlan("qwen-image", 6, [(1, 2)], single_stream=3)
START, STAGES = progressive(FINAL, 2, layers_steps=2, output_steps=1)
CONFIG = DistillConfig(layers_steps=2, layers_lr=1e-3, output_steps=1, output_lr=1e-3, output_trainable="all", log_every=1,
                       schedule=STAGES, weight_decay=0.1)


def pair(plan=START):
    teacher = tiny.make_teacher()
    return teacher, prune(teacher, plan)


def test_the_deepest_become_single_first():
    assert PruningPlan("qwen-image", 6, [(1, 2)]) == START and [stage.plan.single_stream for stage in STAGES] == [5, 3]
    preset = PruningPlan.preset("amber-qwen-image-6b")
    assert [stage.plan.single_stream for stage in progressive(preset, 4, layers_steps=1)[1]] == [50, 40, 30, 20]
    with pytest.raises(UserError, match="stages: expected 1 to 3, the single-stream blocks of the plan, got 4"):
        progressive(FINAL, 4, layers_steps=1)
    with pytest.raises(UserError, match="plan: expected one with single-stream blocks"):
        progressive(START, 1, layers_steps=1)


def test_stages_of_dual_blocks_between_two_ends():
    """FLUX.1, whose dual blocks end before its single ones begin: every stage keeps the end of the plan."""
    plan = PruningPlan("flux.1", 57, [(12, 13)], single_stream=(12, 18))
    start, made = progressive(plan, 3, layers_steps=1)
    assert start.single_stream is None
    assert [stage.plan.single_stream for stage in made] == [(17, 18), (15, 18), (12, 18)]
    with pytest.raises(UserError, match="stages: expected 1 to 6, the single-stream blocks of the plan, got 7"):
        progressive(plan, 7, layers_steps=1)


@pytest.mark.parametrize("lean", [False, True])
def test_nothing_but_single_blocks_in_stages(lean):
    """The teacher itself has nothing to train: the student begins as that of the first stage."""
    plan = PruningPlan("qwen-image", 6, single_stream=2, dead_tensors=not lean)
    start, made = progressive(plan, 2, layers_steps=1)
    assert start.single_stream == 4 and [stage.plan for stage in made] == [plan]
    assert progressive(plan, 1, layers_steps=1) == (plan, ())
    teacher, student = pair(start)
    result = distill(teacher, student, tiny.stream, DistillConfig(layers_steps=1, schedule=made), progress=False)
    assert student.plan == plan and [row["stage"] for row in result.history] == [0, 1]


def test_a_switch_keeps_every_weight_that_stays():
    """Depth and width one after the other: what a plan does not touch is the same tensor."""
    teacher, student = pair()
    torch.nn.init.normal_(student.transformer_blocks[4].attn.to_q.weight)
    before, modules = tiny.weights(student), list(student.own_blocks)
    stages.change_plan(student, STAGES[0].plan, teacher)
    assert student.own_blocks[:4] == modules[:4] and student.plan == STAGES[0].plan
    assert student.config["pydit"]["plan"] == STAGES[0].plan.to_dict() and student.config["num_layers"] == 5
    after = tiny.weights(student)
    assert set(after) < set(before) and all(torch.equal(after[name], before[name]) for name in after)
    gone = {name for name in before if name not in after}
    assert gone and all(name.startswith("transformer_blocks.4.") and ("txt_" in name or "add" in name) for name in gone)
    with pytest.raises(UserError, match="to stay 'kept, single stream'"):
        stages.change_plan(student, START, teacher)
    teacher, student = pair()
    before = tiny.weights(student)
    stages.change_plan(student, dataclasses.replace(FINAL, intervals=[(1, 2), (3, 4)], single_stream=None), teacher)
    assert student.source == [[0], [1, 2], [3, 4], [5]] and student.config["num_layers"] == 4
    assert all(torch.equal(p, before[name.replace("blocks.3.", "blocks.4.")]) for name, p in tiny.weights(student).items())
    student.set_active([])
    velocity = student(**tiny.make_batch(0)[0], return_dict=False)[0]
    assert torch.equal(velocity, teacher(**tiny.make_batch(0)[0], return_dict=False)[0])  # still attached


@pytest.mark.parametrize("init", ["first", "last", "average"])
def test_a_switch_does_not_forget_how_blocks_began(tmp_path, init):
    """A LoRA of the teacher is put in its place by it, also after the student was saved and loaded."""
    teacher = tiny.make_teacher()
    student = prune(teacher, START, init=init)
    stages.change_plan(student, STAGES[0].plan, teacher)
    student.save_pretrained(tmp_path)
    assert student.init == type(student).from_pretrained(tmp_path).init == init


@pytest.mark.parametrize("after, message", [
    (PruningPlan("qwen-image", 8), "expected plans for qwen-image with 6 layers, got one for qwen-image with 8"),
    (PruningPlan("qwen-image", 6, [(2, 3)]), "expected intervals that join blocks of the plan before"),
    (PruningPlan("qwen-image", 6, [(1, 2)], single_stream=5), "block of layer 3 to stay 'kept, single stream'"),
])
def test_what_is_gone_does_not_come_back(after, message):
    with pytest.raises(UserError, match=f"schedule: .*{message}"):
        DistillConfig(schedule=(Stage(FINAL, 1), Stage(after, 1))).validate()
    with pytest.raises(UserError, match=f"schedule: .*{message}"):
        distill(*pair(FINAL), tiny.stream, DistillConfig(schedule=(Stage(after, 1),)), progress=False)


def test_stages_go_on_in_a_generator_where_the_one_before_ended():
    """Which cannot be entered anywhere: what it has given is not stepped over again."""
    drawn = []

    def once(batches):
        for number, batch in enumerate(batches):
            drawn.append(number)
            yield batch

    found = []
    for batches in (tiny.stream, once(tiny.stream(0))):
        teacher, student = pair()
        result = distill(teacher, student, batches, CONFIG, progress=False)
        found.append(([row["loss"] for row in result.history], result.batches, tiny.weights(student)))
    assert found[0][:2] == found[1][:2] and drawn == list(range(found[0][1]))
    assert all(torch.equal(found[0][2][name], weight) for name, weight in found[1][2].items())


def test_a_schedule_is_checked_and_survives_json():
    assert DistillConfig.from_dict(CONFIG.to_dict()) == CONFIG
    for wrong in ([(FINAL, 0)], [(FINAL, -1)], [("plan", 1)], 3):
        with pytest.raises(UserError, match="schedule: expected stages of a plan and steps"):
            dataclasses.replace(CONFIG, schedule=wrong).validate()
    with pytest.raises(UserError, match="shard: expected 'none', because there is a schedule, got 'all'"):
        dataclasses.replace(CONFIG, shard="all").validate()


@pytest.fixture(scope="module")
def unbroken():
    _, student = made = pair()
    return distill(*made, tiny.stream, CONFIG, progress=False), student


def test_a_schedule_ends_in_its_last_plan(unbroken):
    result, student = unbroken
    assert student.plan == FINAL and [spec.form for spec in student.plan.blocks] == ["stock"] * 2 + ["single"] * 3
    assert result.steps == {"layers": 6, "output": 3} and result.batches == 9
    assert [(row["stage"], row["phase"]) for row in result.history] == [
        (stage, phase) for stage in range(3) for phase in ("layers", "layers", "output")]
    assert [list(row["intervals"]) for row in result.history if row["phase"] == "layers"][::2] == [
        ["1-2"], ["1-2", "5-5"], ["1-2", "3-3", "4-4", "5-5"]]


@pytest.mark.parametrize("at", [2, 3, 4, 7])  # in a stage's output phase, between two stages, in later stages
def test_a_schedule_that_was_stopped_goes_on_bit_for_bit(tmp_path, unbroken, at):
    config = dataclasses.replace(CONFIG, checkpoint_dir=tmp_path, save_every=1, resume="auto")
    with pytest.raises(Stop):
        distill(*pair(), stopping_stream(at), config, progress=False)
    _, student = made = pair()
    result = distill(*made, tiny.stream, config, progress=False)
    assert result.resumed_from is not None and student.plan == FINAL
    assert [row["loss"] for row in result.history] == [row["loss"] for row in unbroken[0].history]
    expected = tiny.weights(unbroken[1])
    assert all(torch.equal(p, expected[name]) for name, p in tiny.weights(student).items())


@pytest.mark.parametrize("start", [[], [(1, 2), (3, 4)]])
@pytest.mark.parametrize("init, layer", [("first", 1), ("last", 4)])
def test_a_joined_block_goes_on_from_the_layer_that_a_lora_is_put_in_for(start, init, layer):
    teacher = tiny.make_teacher()
    student = prune(teacher, PruningPlan("qwen-image", 6, start), init=init)
    stages.change_plan(student, PruningPlan("qwen-image", 6, [(1, 4)]), teacher)
    assert torch.equal(student.own_blocks[1].attn.to_q.weight, teacher.transformer_blocks[layer].attn.to_q.weight)
    name = "transformer_blocks.{}.attn.to_q.lora_A.weight"
    found, _ = student.follow_source({name.format(k): torch.full((1, 32), float(k)) for k in range(6)})
    assert torch.equal(found[name.format(1)], torch.full((1, 32), float(layer)))


def test_a_lean_plan_in_stages():
    """Its last block has no text output already, and can become single-stream all the same."""
    plan = dataclasses.replace(FINAL, dead_tensors=False)
    start, made = progressive(plan, 2, layers_steps=1)
    teacher, student = pair(start)
    config = dataclasses.replace(CONFIG, layers_steps=1, output_steps=0, schedule=made)
    distill(teacher, student, tiny.stream, config, progress=False)
    assert student.plan == plan and sum(p.numel() for p in student.parameters()) == plan.num_parameters(teacher.config)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_lean_plan_with_a_text_region_in_stages(number):
    """The last block of the plan to prune by is without a text output, and becomes single-stream with what it has."""
    plan = PruningPlan("qwen-image", 6, text_linear=[(0, 2)], single_stream=3, dead_tensors=False)
    start, made = progressive(plan, number, layers_steps=1)
    assert start.blocks[-1].text == "keys" and not start.dead_tensors and len(made) == number
    teacher, student = pair(start)
    config = dataclasses.replace(CONFIG, layers_steps=1, output_steps=0, schedule=made)
    distill(teacher, student, tiny.stream, config, progress=False)
    fresh = prune(teacher, plan)
    fresh.load_state_dict(student.state_dict())
    assert student.plan == plan and sum(p.numel() for p in student.parameters()) == plan.num_parameters(teacher.config)
    batch = tiny.make_batch(0)[0]
    assert torch.equal(fresh.eval()(**batch).sample, student.eval()(**batch).sample)
    with pytest.raises(UserError, match="block of layer 5 to stay 'kept, text keys and values'"):
        stages.require_successor(start, dataclasses.replace(start, affine=[5]))
