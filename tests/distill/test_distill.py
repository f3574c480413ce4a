"""What distillation changes and what it leaves alone, what it minimises, and how it fails."""

import copy
import dataclasses
import itertools
import json
import warnings

import pytest
import torch

import pydit
from pydit import PruningPlan, UserError
from pydit.distill import DistillConfig, NonFiniteLossError, distill, pair, trainer
from pydit.distill.stream import BatchStream
from pydit.models import get_adapter
from tests.distill import tiny
from tests.models import tiny as models

FAST = DistillConfig(layers_steps=3, layers_lr=1e-3, log_every=1)


def run(teacher, student, config=FAST, batches=tiny.stream):
    return distill(teacher, student, batches, config, progress=False)


def names_of_blocks(student, indices):
    prefixes = tuple(f"transformer_blocks.{index}." for index in indices)
    return {name for name, _ in student.named_parameters() if name.startswith(prefixes)}


def test_only_replacement_blocks_change_in_the_layer_phase():
    teacher, student = tiny.make_pair()
    student.train(False)
    student.set_active([(1, 2)])
    next(student.parameters()).requires_grad_(False)
    teacher_before, before = tiny.weights(teacher), tiny.weights(student)
    flags = [p.requires_grad for model in (teacher, student) for p in model.parameters()]
    run(teacher, student)
    assert not tiny.changed(teacher_before, teacher)
    moved = tiny.changed(before, student)
    replaced = names_of_blocks(student, [1, 3])
    assert moved <= replaced
    # The last layer's text output is dead, so what only feeds it gets no gradient.
    dead = {name for name in names_of_blocks(student, [3]) if "txt_mlp" in name or "to_add_out" in name}
    assert dead.isdisjoint(moved)
    assert names_of_blocks(student, [1]) <= moved and len(moved) > len(replaced) // 2
    assert [p.requires_grad for model in (teacher, student) for p in model.parameters()] == flags
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())
    assert not student.training and not teacher.training and student.active == [(1, 2)]


@pytest.mark.parametrize("trainable", ["replaced", "all"])
def test_the_output_phase_trains_what_it_says(trainable):
    teacher, student = tiny.make_pair()
    teacher_before, before = tiny.weights(teacher), tiny.weights(student)
    config = dataclasses.replace(FAST, layers_steps=0, output_steps=2, output_trainable=trainable)
    result = run(teacher, student, config)
    assert not tiny.changed(teacher_before, teacher)
    moved = tiny.changed(before, student)
    if trainable == "replaced":
        assert moved and moved <= names_of_blocks(student, [1, 3])
    else:
        assert {"proj_out.weight", "img_in.weight", "transformer_blocks.0.attn.to_q.weight"} <= moved
    assert result.steps == {"layers": 0, "output": 2}


def test_both_losses_fall_and_the_model_comes_closer():
    teacher, student = tiny.make_pair()
    batches = [tiny.make_batch(k, size=4) for k in range(4)]

    def distance():
        with torch.no_grad():
            return sum((teacher(**b, return_dict=False)[0] - student(**b, return_dict=False)[0]).square().mean().item()
                       for b, _ in batches)

    start = distance()
    config = DistillConfig(layers_steps=40, layers_lr=3e-3, output_steps=20, output_lr=1e-3, magnitude=0.5,
                           log_every=5)
    result = run(teacher, student, config, batches)
    layers = [row for row in result.history if row["phase"] == "layers"]
    output = [row for row in result.history if row["phase"] == "output"]
    assert len(layers) == 8 and len(output) == 4
    for name, streams in layers[0]["intervals"].items():
        for stream, value in streams.items():
            assert layers[-1]["intervals"][name][stream] < 0.7 * value, (name, stream)
    assert output[-1]["loss"] < 0.9 * output[0]["loss"]
    assert distance() < 0.5 * start


def test_the_layer_loss_is_the_paper_formula_on_teacher_activations():
    """First row of the history against a float64 model run by hand, layer by layer."""
    teacher, student = tiny.make_pair()
    batch, _ = tiny.make_batch(0)
    wide, wide_student = copy.deepcopy(teacher).double(), copy.deepcopy(student).double()
    inputs, outputs = {}, {}
    for k, block in enumerate(wide.transformer_blocks):
        block.register_forward_pre_hook(lambda m, a, kw, k=k: inputs.update({k: kw}), with_kwargs=True)
        block.register_forward_hook(lambda m, a, out, k=k: outputs.update({k: out}))
    with torch.no_grad():
        wide(**{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()})
        row = run(teacher, student, dataclasses.replace(FAST, layers_steps=1)).history[0]
        total = 0.0
        for index, start, end in ((1, 1, 2), (3, 4, 5)):
            text, image = wide_student.transformer_blocks[index](**inputs[start])
            keep = batch["encoder_hidden_states_mask"]
            for stream, ours, target in (("image", image, outputs[end][1]),
                                         ("text", text[keep], outputs[end][0][keep])):
                expected = (2 - 2 * torch.cosine_similarity(ours, target, dim=-1)).mean().item()
                if (end, stream) == (5, "text"):
                    assert stream not in row["intervals"]["4-5"]
                    continue
                assert row["intervals"][f"{start}-{end}"][stream] == pytest.approx(expected, rel=1e-4)
                total += expected
    assert row["loss"] == pytest.approx(total, rel=1e-4)


def test_magnitude_holds_the_scale_of_the_streams():
    """The direction alone leaves it free, as in the authors' loss: it drifts, and here it comes back."""
    def off_scale(magnitude):
        teacher, student = tiny.make_pair(intervals=((1, 2),))
        block = student.transformer_blocks[1]
        with torch.no_grad():  # an image stream that the block makes larger
            block.img_mod[1].bias[5 * 32:] *= 3
            block.img_mlp.net[2].bias += 2.0
        run(teacher, student, dataclasses.replace(FAST, layers_steps=40, layers_lr=1e-2, magnitude=magnitude))
        adapter = get_adapter(teacher)
        capture = adapter.capture(teacher, tiny.make_batch(99)[0], [1, 3])
        with torch.no_grad():
            image, _ = adapter.call_block(block, *capture.states[1], capture.kwargs)
        return (image.norm(dim=-1) / capture.states[3][0].norm(dim=-1)).log().abs().mean().item()

    free, held = off_scale(0.0), off_scale(1.0)
    assert held < 0.5 * free


def test_the_output_loss_sums_velocity_flow_and_boundaries():
    teacher, student = tiny.make_pair()
    batch, target = tiny.make_batch(0)
    config = dataclasses.replace(FAST, layers_steps=0, output_steps=1, flow_weight=0.5, boundary_weight=0.25)
    with torch.no_grad():
        wanted, ours = teacher(**batch, return_dict=False)[0], student(**batch, return_dict=False)[0]
    row = run(teacher, student, config).history[0]
    assert row["output"]["velocity"] == pytest.approx((ours - wanted).square().mean().item(), rel=1e-5)
    assert row["output"]["flow"] == pytest.approx((ours - target).square().mean().item(), rel=1e-5)
    assert set(row["intervals"]) == {"1-2", "4-5"} and set(row["intervals"]["4-5"]) == {"image"}
    boundaries = sum(value for streams in row["intervals"].values() for value in streams.values())
    assert row["loss"] == pytest.approx(row["output"]["velocity"] + 0.5 * row["output"]["flow"] + 0.25 * boundaries)


def test_the_guided_error_is_that_of_what_a_sampler_makes_of_a_pair():
    teacher, student = tiny.make_pair()
    batch, _ = tiny.make_batch(0, size=4)
    g = 2.5
    with torch.no_grad():
        wanted, ours = teacher(**batch, return_dict=False)[0], student(**batch, return_dict=False)[0]
    guided = [v[1::2].double() + g * (v[0::2].double() - v[1::2].double()) for v in (ours, wanted)]
    plain = (ours.double() - wanted.double()).square().mean()
    expected = plain + (guided[0] - guided[1]).square().mean() / (g**2 + (g - 1) ** 2)
    config = dataclasses.replace(FAST, layers_steps=0, output_steps=1, guidance=g)
    row = run(teacher, student, config, [batch]).history[0]
    assert row["output"]["velocity"] == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 1.2 * plain
    for rows, processes in ((6, 2), (8, 3), (2, 3)):  # a pair stays with one process, and every row has one
        numbers = torch.arange(rows)
        batch = {"hidden_states": numbers[:, None], "encoder_hidden_states": numbers[:, None]}
        found = [BatchStream([(batch, numbers)], 0, get_adapter("qwen-image"), torch.device("cpu"), (rank, processes), 2).next()
                 for rank in range(processes)]
        assert all(len(part.target) % 2 == 0 and part.target[0] % 2 == 0 for part in found)
        assert sum(part.weights["image"] for part in found) == processes
        assert torch.cat([part.target for part in found if part.weights["image"]]).tolist() == numbers.tolist()
        with pytest.raises(UserError, match="batches: expected an even number of rows, .* because guidance is set, got 5"):
            BatchStream([{name: value[:1].repeat(5, 1) for name, value in batch.items()}], 0, get_adapter("qwen-image"),
                        torch.device("cpu"), (0, 2), 2).next()
    with pytest.raises(UserError, match="batches: expected an even number of rows, .* because guidance is set, got 3"):
        run(teacher, student, config, [tiny.make_batch(0, size=3)])
    huge = run(*tiny.make_pair(), dataclasses.replace(config, guidance=1e200), [tiny.make_batch(0, size=4)[0]]).history[0]
    error = ours.double() - wanted.double()
    assert huge["output"]["velocity"] == pytest.approx(
        (plain + (error[0::2] - error[1::2]).square().mean() / 2).item(), rel=1e-5)


def test_a_recorded_velocity_needs_no_teacher():
    """What the teacher said, given with the batches, trains the same student as asking it, and it is not asked."""
    teacher, student = tiny.make_pair()
    other = copy.deepcopy(student)
    batches = [tiny.make_batch(number, size=4)[0] for number in range(3)]
    config = dataclasses.replace(FAST, layers_steps=0, output_steps=3, output_lr=1e-3, guidance=2.0)
    run(teacher, student, config, batches)
    with torch.no_grad():
        recorded = [(batch, teacher(**batch, return_dict=False)[0]) for batch in batches]

    def refuse(*_):
        raise AssertionError("the teacher ran")

    teacher.register_forward_pre_hook(refuse)
    config = dataclasses.replace(config, velocity_weight=0.0, flow_weight=1.0)
    row = run(teacher, other, config, recorded).history[-1]
    assert set(row["output"]) == {"flow"}
    for name, p in student.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_intervals_do_not_influence_each_other():
    """Training them together equals training one alone, clipping included."""
    teacher, student = tiny.make_pair()
    config = dataclasses.replace(FAST, layers_lr=1e-2, clip=0.01)
    run(teacher, student, config)
    alone = pydit.prune(teacher, PruningPlan.from_intervals(6, [[1, 2]]), init="first")
    run(teacher, alone, config)
    for name, p in alone.transformer_blocks[1].named_parameters():
        assert torch.equal(p, student.transformer_blocks[1].get_parameter(name)), name


def test_the_teacher_stops_after_the_last_boundary():
    teacher, student = tiny.make_pair(intervals=((1, 2),))
    ran = []
    for k, block in enumerate(teacher.transformer_blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    run(teacher, student, dataclasses.replace(FAST, layers_steps=2))
    assert ran == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("filler", [float("nan"), 1e4])
def test_padded_text_takes_no_part_whatever_it_holds(filler):
    def poisoned(start=0):
        for batch, target in tiny.stream(start):
            batch["encoder_hidden_states"][~batch["encoder_hidden_states_mask"]] = filler
            yield batch, target

    config = dataclasses.replace(FAST, output_steps=2, boundary_weight=1.0, magnitude=0.1)
    results = []
    for batches in (tiny.stream, poisoned):
        teacher, student = tiny.make_pair()
        results.append((run(teacher, student, config, batches).history, tiny.weights(student)))
    (clean, clean_weights), (dirty, dirty_weights) = results
    assert [row["loss"] for row in clean] == [row["loss"] for row in dirty]
    assert all(torch.equal(clean_weights[name], dirty_weights[name]) for name in clean_weights)


def test_gradient_checkpointing_changes_nothing_but_memory():
    results = []
    for checkpointing in (False, True):
        teacher, student = tiny.make_pair()
        config = dataclasses.replace(FAST, output_steps=2, boundary_weight=1.0, gradient_checkpointing=checkpointing)
        run(teacher, student, config)
        assert not student.is_gradient_checkpointing
        results.append(tiny.weights(student))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], msg=name)


def test_bf16_models_train():
    teacher, student = tiny.make_pair(dtype=torch.bfloat16)
    before = tiny.weights(student)
    config = dataclasses.replace(FAST, layers_steps=8, output_steps=1, log_every=8)
    result = distill(teacher, student, lambda start: tiny.stream(start, dtype=torch.bfloat16), config, progress=False)
    assert tiny.changed(before, student) and all(p.dtype == torch.bfloat16 for p in student.parameters())
    json.dumps(result.to_dict(), allow_nan=False)


class Clock:
    """A clock that advances by ``tick`` whenever a batch is drawn and otherwise stands still."""

    def __init__(self, tick):
        self.now, self.tick = 1000.0, tick

    def __call__(self):
        return self.now

    def stream(self, start=0):
        for item in tiny.stream(start):
            self.now += self.tick
            yield item


@pytest.mark.parametrize("tick, expected", [(2.0, (21, 9)), (7.0, (6, 3))])
def test_a_time_budget_ends_annealed_on_any_machine(monkeypatch, tick, expected):
    clock = Clock(tick)
    monkeypatch.setattr(trainer, "monotonic", clock)
    config = DistillConfig(layers_steps=None, output_steps=None, max_minutes=1.0, output_share=0.3, layers_lr=1e-3,
                           output_lr=1e-4, warmup=0.1, log_every=1)
    teacher, student = tiny.make_pair()
    result = run(teacher, student, config, clock.stream)
    assert (result.steps["layers"], result.steps["output"]) == expected
    assert result.seconds <= 60 + tick
    for phase, peak in (("layers", 1e-3), ("output", 1e-4)):
        lrs = [row["lr"] for row in result.history if row["phase"] == phase]
        assert max(lrs) <= peak and max(lrs) > 0.4 * peak  # the slowest machine has three steps
        assert lrs[-1] == min(lrs[2:]) and lrs[-1] < (0.02 if tick == 2.0 else 0.1) * peak
    assert [row["ms_per_step"] for row in result.history] == [1000 * tick] * sum(expected)


def test_unused_minutes_of_the_layer_phase_go_to_the_output_phase(monkeypatch):
    clock = Clock(1.0)
    monkeypatch.setattr(trainer, "monotonic", clock)
    config = DistillConfig(layers_steps=5, output_steps=None, max_minutes=0.25, output_share=0.3, log_every=100)
    teacher, student = tiny.make_pair()
    assert run(teacher, student, config, clock.stream).steps == {"layers": 5, "output": 10}


def test_a_cache_spares_the_teacher_and_repeats_the_same_batches():
    teacher, student = tiny.make_pair()
    ran = []
    teacher.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    config = dataclasses.replace(FAST, layers_steps=6, layers_lr=1e-12, output_steps=5, output_lr=1e-12, ema=0)
    cached = run(teacher, student, dataclasses.replace(config, cache_batches=3)).history
    assert len(ran) == 6  # three batches in each phase
    first = [row["loss"] for row in cached if row["phase"] == "layers"]
    assert len(set(first[:3])) == 3 and sorted(first[3:]) == pytest.approx(sorted(first[:3]), rel=1e-6)
    fresh = run(*tiny.make_pair(), dataclasses.replace(config, layers_steps=3)).history
    for ours, theirs in zip([row for row in cached if row["step"] <= 3], fresh[:6], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)  # both phases continue one stream


def test_history_rows_are_means_over_their_steps():
    rows = {}
    for every in (1, 2):
        teacher, student = tiny.make_pair()
        rows[every] = run(teacher, student, dataclasses.replace(FAST, layers_steps=5, log_every=every)).history
    assert [row["step"] for row in rows[2]] == [2, 4, 5]
    for row, (first, last) in zip(rows[2], ((0, 2), (2, 4), (4, 5)), strict=True):
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in rows[1][first:last]) / (last - first))
    json.dumps(rows[1], allow_nan=False)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    def breaking(start=0):
        for number, (batch, target) in enumerate(tiny.stream(start), start):
            if number == 3:
                batch["hidden_states"][0, 0, 0] = float("inf")
            yield batch, target

    teacher, student = tiny.make_pair()
    config = dataclasses.replace(FAST, layers_steps=10, checkpoint_dir=tmp_path, save_every=2)
    with pytest.raises(NonFiniteLossError, match="got nan in step 4 of phase layers, image of interval 1-2; "
                                                 "the student holds the weights of step 3, the last checkpoint is in"):
        run(teacher, student, config, breaking)
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert json.loads((tmp_path / "checkpoint.json").read_text())["progress"]["step"] == 2


def test_wrong_models_and_batches_are_named():
    teacher, student = tiny.make_pair()
    with pytest.raises(UserError, match="config: expected a DistillConfig, got dict"):
        distill(teacher, student, tiny.stream, {"layers_steps": 1})
    with pytest.raises(UserError, match="student: expected a model made by pydit.prune, got QwenImageT"):
        run(teacher, teacher)
    with pytest.raises(UserError, match="student: expected a plan that replaces at least one block"):
        run(teacher, pydit.prune(teacher, PruningPlan.from_intervals(6, [])))
    with pytest.raises(UserError, match="plan: expected a plan for the model's 5 layers, got one for 6"):
        run(tiny.make_teacher(5), student)
    with pytest.raises(UserError, match=r"student: expected the teacher's device and dtype \(cpu, torch.float64\)"):
        run(copy.deepcopy(teacher).double(), student)
    with pytest.raises(UserError, match="batches: expected an iterable .* got int"):
        run(teacher, student, batches=3)
    with pytest.raises(UserError, match="batches: expected more than 2 batches, got 2"):
        run(teacher, student, batches=itertools.islice(tiny.stream(), 2))
    with pytest.raises(UserError, match="batches: expected more than 0 batches, got 0"):
        run(teacher, student, batches=[])
    with pytest.raises(UserError, match="batches: expected dicts .* got an item of type str as batch 0"):
        run(teacher, student, batches=["x"])
    config = dataclasses.replace(FAST, layers_steps=0, output_steps=1, flow_weight=1.0)
    with pytest.raises(UserError, match="batches: expected \\(batch, target\\) pairs"):
        run(teacher, student, config, [tiny.make_batch(0)[0]])


def test_a_student_that_shares_weights_with_the_teacher_is_not_trained_whole():
    teacher, student = tiny.make_pair()
    student.proj_out = teacher.proj_out
    config = dataclasses.replace(FAST, output_steps=1, output_trainable="all")
    with pytest.raises(UserError, match="got proj_out.weight shared with the teacher"):
        run(teacher, student, config)


def test_a_list_starts_over_and_plain_dicts_are_accepted():
    teacher, student = tiny.make_pair()
    batches = [tiny.make_batch(k)[0] for k in range(2)]
    assert run(teacher, student, batches=batches).steps["layers"] == 3


def test_float16_says_what_it_loses():
    teacher, student = tiny.make_pair(dtype=torch.float16)
    with pytest.warns(UserWarning, match="student: gradients in float16 below 6e-8 are 0, as the loss is not scaled"):
        pair.require_pair(teacher, student, FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.require_pair(*tiny.make_pair(dtype=torch.bfloat16), FAST)


def changed_batch(**changes):
    batch, target = tiny.make_batch(0)
    for name, change in changes.items():
        batch[name] = change(batch[name]) if callable(change) else change
    return {name: value for name, value in batch.items() if value is not ...}, target


@pytest.mark.parametrize("changes, message", [
    ({"hidden_states": torch.Tensor.bfloat16}, "hidden_states in the dtype of the models, torch.float32, got torch.bfloat16 in "),
    ({"prompt": "a circle"}, "forward arguments of QwenImageTransformer2DModel, got 'prompt' in batch 0"),
    ({"timestep": ...}, "hidden_states, .*, got no timestep in batch 0"),
    ({"img_shapes": None}, "got no img_shapes in batch 0"),
    ({"timestep": 0.5}, "a row for each sample as timestep, got float in batch 0"),
    ({"timestep": torch.tensor(0.5)}, "a row for each sample as timestep, got a number in batch 0"),
    ({"hidden_states": torch.Tensor.numpy}, "as hidden_states, got ndarray in batch 0"),
    ({"encoder_hidden_states": lambda text: text[:1]}, "got 2 of hidden_states, 1 of encoder_hidden_states, 2 of timestep in "),
    ({"hidden_states": lambda image: image[0]}, "same number of rows, at least one, got 9 of hidden_states"),
])
@pytest.mark.parametrize("steps", [(1, 0), (0, 1)])
def test_batches_that_no_forward_takes_are_named(changes, message, steps):
    config = DistillConfig(layers_steps=steps[0], output_steps=steps[1])
    with pytest.raises(UserError, match=f"^batches: expected .*{message}"):
        distill(*tiny.make_pair(), [changed_batch(**changes)], config, progress=False)


@pytest.mark.parametrize("embedded", [True, False])
def test_guidance_of_a_flux_batch(embedded):
    teacher, batch = models.flux(guidance_embeds=embedded), models.flux_batch()
    student = pydit.prune(teacher, PruningPlan("flux.1", 4, [(2, 3)]))
    right, wrong = batch | {"guidance": torch.full((len(batch["timestep"]),), 3.5)}, batch
    if not embedded:
        right, wrong = wrong, right
    config = DistillConfig(layers_steps=1, output_steps=1)
    distill(teacher, student, [(right, right["hidden_states"])] * 2, config, progress=False)
    with pytest.raises((AttributeError, TypeError)):
        teacher(**wrong)
    with pytest.raises(UserError, match=f"^batches: expected {'a' if embedded else 'no'} guidance, because .* is {embedded}"):
        distill(teacher, student, [(wrong, wrong["hidden_states"])], config, progress=False)


@pytest.mark.parametrize("save_every", [1, None])
def test_weights_that_a_step_has_led_beyond_all_numbers_are_not_kept(tmp_path, save_every):
    """The gradients of the only step were finite, and no loss comes after it."""
    config = DistillConfig(layers_steps=1 if save_every is None else 2, layers_lr=3e38, warmup=0.0, checkpoint_dir=tmp_path,
                           save_every=save_every)
    with pytest.raises(NonFiniteLossError, match="expected finite weights after step 1 of phase layers, .* no checkpoint"):
        distill(*tiny.make_pair(), tiny.stream, config, progress=False)
    assert not list(tmp_path.iterdir())
