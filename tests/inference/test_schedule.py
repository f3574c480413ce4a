"""Baked schedules against the model they were made from: equal to the last bit, smaller, and undone."""

import pytest
import torch

import pydit
from pydit.errors import UserError
from pydit.plan import PruningPlan
from tests.models import tiny

TIMES = [1.0, 0.75, 0.5000123, 0.1]


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def single(dtype=torch.float32, seed=0):
    """Batches of one image, one per timestep."""
    for index, time in enumerate(TIMES):
        batch = tiny.cast(tiny.batch(images=1, seed=seed + index), dtype)
        yield {**batch, "timestep": torch.tensor([time])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_batch_of_one_is_bit_equal(dtype, zero_cond_t):
    model = tiny.transformer(3, zero_cond_t=zero_cond_t).to(dtype)
    batches = list(single(dtype))
    if zero_cond_t:
        batches = [{**b, "img_shapes": [[(1, 2, 4), (1, 2, 4)]]} for b in batches]
    expected = [run(model, batch) for batch in batches]
    assert pydit.bake_schedule(model, TIMES) is model
    for batch, right in zip(batches, expected, strict=True):
        assert torch.equal(run(model, batch), right)


def test_mixed_timesteps_and_a_pruned_model():
    teacher = tiny.transformer(5)
    model = pydit.prune(teacher, PruningPlan.from_intervals(5, [(1, 2)]))
    batch = {**tiny.batch(images=4), "timestep": torch.tensor([0.1, 1.0, 0.75, 0.1])}
    expected = run(model, batch)
    pydit.bake_schedule(model, torch.tensor(TIMES))
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_weights_leave_and_come_back():
    model = tiny.transformer(3)
    before, count = tiny.fingerprint(model), sum(p.numel() for p in model.parameters())
    modulation = sum(p.numel() for name, p in model.named_parameters() if "_mod." in name or "time_text" in name)
    batch = next(single())
    expected = run(model, batch)
    pydit.bake_schedule(model, TIMES)
    assert sum(p.numel() for p in model.parameters()) == count - modulation and modulation > 3 * 2 * 64 * 6 * 64
    assert not [name for name, _ in model.named_modules() if "linear_1" in name]
    assert pydit.restore(model) is model and tiny.same(before, tiny.fingerprint(model))
    assert torch.equal(run(model, batch), expected)
    assert pydit.restore(model) is model  # nothing to undo


def test_unknown_timestep_is_never_rounded_to_a_known_one():
    model = pydit.bake_schedule(tiny.transformer(2), TIMES)
    batch = {**next(single()), "timestep": torch.tensor([0.75 + 1e-6])}
    with pytest.raises(UserError, match="timestep: expected one of the 4 of the baked schedule"):
        run(model, batch)
    rows = model.transformer_blocks[0].img_mod(torch.tensor([[len(TIMES)]]))
    assert rows.isnan().all()  # what a device that does not wait computes with


def test_lookup_on_a_device_that_does_not_wait():
    """The row of a miss is the one of NaN; nothing is read back."""
    model = pydit.bake_schedule(tiny.transformer(2), TIMES)
    model.time_text_embed._send = lambda missed: None
    batch = {**tiny.batch(images=2), "timestep": torch.tensor([0.75, 0.3])}
    out = run(model, batch)
    assert out[0].isfinite().all() and out[1].isnan().all()


def test_baking_again_replaces_the_table():
    model = tiny.transformer(2)
    batches = list(single())
    expected = run(model, batches[3])
    pydit.bake_schedule(pydit.bake_schedule(model, TIMES[:2]), TIMES[2:])
    assert torch.equal(run(model, batches[3]), expected)
    with pytest.raises(UserError, match="baked schedule"):
        run(model, batches[0])


def test_weights_are_neither_saved_nor_loaded(tmp_path):
    model = tiny.transformer(2)
    state = model.state_dict()
    pydit.bake_schedule(model, TIMES)
    for act in (model.state_dict, lambda: model.load_state_dict(state), lambda: model.save_pretrained(tmp_path / "x")):
        with pytest.raises(UserError, match=r"pydit.restore it before saving or loading"):
            act()
    pydit.restore(model).load_state_dict(state)


def test_compiles_whole():
    model = tiny.transformer(2)
    batch = next(single())
    expected = run(model, batch)
    pydit.bake_schedule(model, TIMES)
    torch._dynamo.reset()
    out = run(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_pipeline_with_the_schedule_it_uses(monkeypatch):
    """All timesteps of a run, taken from the scheduler, give the pictures of the unbaked pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, scheduler = tiny.transformer(2), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    times = scheduler.timesteps / 1000

    def steps():
        latents = tiny.batch(images=1)["hidden_states"]
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            batch = {**tiny.batch(images=1), "hidden_states": latents, "timestep": t.expand(1) / 1000}
            latents = scheduler.step(run(model, batch), t, latents, return_dict=False)[0]
        return latents

    expected = steps()
    pydit.bake_schedule(model, times)
    assert torch.equal(steps(), expected)


@pytest.mark.parametrize(("timesteps", "words"), [
    ([], "timesteps: expected one or more finite numbers"), ([float("nan")], "timesteps: expected one or more finite"),
    (["a"], "timesteps: expected numbers"), (torch.zeros(2, 2), "timesteps: expected one or more finite numbers"),
    (7, "timesteps: expected numbers, got 7")])
def test_bad_timesteps(timesteps, words):
    model = tiny.transformer(1)
    before = tiny.fingerprint(model)
    with pytest.raises(UserError, match=words):
        pydit.bake_schedule(model, timesteps)
    assert tiny.same(before, tiny.fingerprint(model))


def test_other_models_are_refused():
    with pytest.raises(UserError, match="transformer: expected"):
        pydit.bake_schedule(torch.nn.Linear(2, 2), TIMES)
    with pytest.raises(UserError, match="transformer: expected a diffusers transformer or a pipeline, got int"):
        pydit.bake_schedule(7, TIMES)
    with pytest.raises(UserError, match="modulation by the timestep alone"):
        pydit.bake_schedule(tiny.transformer(1, use_additional_t_cond=True), TIMES)
