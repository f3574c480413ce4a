"""Baked schedules against the model they were made from: equal to the last bit, smaller, and undone."""

import copy
import functools
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch

import pydit
from pydit.errors import UserError
from pydit.inference import schedule
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
    make = lambda: pydit.prune(tiny.transformer(5), PruningPlan.from_intervals(5, [(1, 2)]))  # noqa: E731
    batch = {**tiny.batch(images=4), "timestep": torch.tensor([0.1, 1.0, 0.75, 0.1])}
    model = pydit.bake_schedule(make(), torch.tensor(TIMES))
    tiny.assert_as_stock(run(model, batch), make, batch)


def test_blocks_that_run_may_change_afterwards():
    teacher = tiny.transformer(5)
    model = pydit.prune(teacher, PruningPlan.from_intervals(5, [(1, 2)]))
    before, count = tiny.fingerprint(teacher), sum(p.numel() for p in model.parameters())
    batch = next(single())
    expected = run(teacher, batch), run(model, batch)
    pydit.bake_schedule(model, TIMES)
    for _ in range(2):
        model.set_active([])
        assert torch.equal(run(model, batch), expected[0])
        model.set_active([(1, 2)])
        assert torch.equal(run(model, batch), expected[1])
    with pytest.raises(UserError, match="expected intervals of the plan"):
        model.set_active([(3, 4)])
    assert torch.equal(run(model, batch), expected[1]) and torch.equal(run(teacher, batch), expected[0])
    model.set_active([])
    pydit.restore(model)
    assert sum(p.numel() for p in model.parameters()) == count and tiny.same(before, tiny.fingerprint(teacher))
    assert torch.equal(run(model, batch), expected[0]) and torch.equal(run(teacher, batch), expected[0])
    model.set_active([(1, 2)])
    assert torch.equal(run(model, batch), expected[1])


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


def test_lookup_on_a_device_that_does_not_wait(monkeypatch):
    """The row of a miss is the one of NaN; nothing is read back."""
    model = pydit.bake_schedule(tiny.transformer(2), TIMES)
    monkeypatch.setattr(schedule, "_handle", lambda *_: None)
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
    """Nor is a config written beside another model's weights, as diffusers does first."""
    model = tiny.transformer(2)
    state = model.state_dict()
    tiny.transformer(3).save_pretrained(tmp_path / "x")
    before = {path: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    pydit.bake_schedule(model, TIMES)
    block, control = model.transformer_blocks[0], {"attention_head_dim": 32, "num_attention_heads": 2}
    for act in (model.state_dict, lambda: model.load_state_dict(state), lambda: model.save_pretrained(tmp_path / "x"),
                block.state_dict, lambda: block.load_state_dict({}, strict=False),
                lambda: diffusers.QwenImageControlNetModel.from_transformer(model, 1, **control)):
        with pytest.raises(UserError, match=r"pydit.restore it before saving or loading"):
            act()
    assert {path: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    student = pydit.bake_schedule(pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)])), TIMES)
    with pytest.raises(UserError, match="to_stock: expected a model with its modulation weights, got a baked schedule"):
        student.to_stock()  # which save_pipeline writes
    pydit.restore(model).load_state_dict(state)
    model.save_pretrained(tmp_path / "x")


def test_a_key_that_a_narrow_dtype_cannot_tell_from_another_is_no_answer():
    """Of two that round to one, neither is taken: both are compared in the wider dtype."""
    model = pydit.bake_schedule(tiny.sd3(), [998.0, 1000.0], pooled_projections=tiny.sd3_batch()["pooled_projections"])
    batch = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in tiny.sd3_batch().items()}
    for dtype in (torch.float32, torch.bfloat16):
        given = {**batch, "timestep": torch.tensor([1000.0], dtype=dtype)}
        assert torch.equal(run(model, given), run(tiny.sd3(), given))


FAMILIES = {"qwen-image": (lambda: tiny.transformer(2), lambda: tiny.batch(images=1, masked=False)),
            "flux.1": (tiny.flux, tiny.flux_batch), "sd3.5": (tiny.sd3, tiny.sd3_batch)}


def family(name):
    """(make, batch of one image, what bake_schedule needs beside the timesteps)."""
    make, batch = FAMILIES[name][0], FAMILIES[name][1]()
    batch = {key: x[:1] if isinstance(x, torch.Tensor) and not key.endswith("_ids") else x for key, x in batch.items()}
    return make, batch, {} if name == "qwen-image" else {"pooled_projections": batch["pooled_projections"]}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("accelerated", [False, True])
def test_under_autocast(name, accelerated):
    """A forward rounds its timestep to the dtype that autocast gives its latents; the table is made anew for that."""
    make, batch, others = family(name)
    batch["timestep"] = batch["timestep"] * 0 + 0.6667
    model, stock = make(), make()
    if accelerated:
        pydit.accelerate(model), pydit.accelerate(stock)
    pydit.bake_schedule(model, [0.6667, 0.6666], **others)
    for dtype in (torch.bfloat16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            assert torch.equal(run(model, batch), run(stock, batch))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="expected one of the . of the baked"):
        run(model, {**batch, "timestep": batch["timestep"] * 0.5})


def test_a_graph_compiled_for_another_autocast_is_refused():
    model, batch = pydit.bake_schedule(tiny.transformer(2), TIMES), next(single())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UserError, match="torch.autocast: expected none, under which the schedule was baked"):
            run(compiled, batch)
        run(model, batch)
        assert torch.equal(run(compiled, batch), run(tiny.transformer(2), batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_comes_to_the_gpu_in_its_forward(name):
    """As under enable_model_cpu_offload: what is looked up lies there when the tables do not yet."""
    make, batch, others = family(name)
    model = pydit.bake_schedule(make(), batch["timestep"], **others)
    there = [batch["timestep"].to("meta"), *(x.to("meta") for x in others.values())]
    assert model.time_text_embed(*there).device.type == "meta"


def test_compiles_whole():
    model = tiny.transformer(2)
    batch = next(single())
    pydit.bake_schedule(model, TIMES)
    torch._dynamo.reset()
    out = run(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    tiny.assert_as_stock(out, lambda: tiny.transformer(2), batch)


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
    with pytest.raises(UserError, match="with guidance_embeds"):
        pydit.bake_schedule(tiny.transformer(1, guidance_embeds=True), TIMES)


def lora_of(model, targets, seed=0):
    """A LoRA's state dict as diffusers loads it, rank 2, for modules whose names end with ``targets``."""
    torch.manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(targets):
            found[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features) * 0.3
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2) * 0.3
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_modulation_lora_after_baking_is_in_the_table():
    """Loaded, scaled, switched off and removed: always what the model without a table computes."""
    model, other, batch = tiny.transformer(2), tiny.transformer(2), next(single())
    lora = lora_of(model, ("img_mod.1", "to_q"))
    plain = run(model, batch)
    pydit.bake_schedule(pydit.accelerate(model), TIMES)
    pydit.accelerate(other)
    steps = [("load_lora_adapter", dict(lora), {"adapter_name": "a"}), ("set_adapters", ["a"], {"weights": [0.5]}),
             ("disable_lora", None, {}), ("enable_lora", None, {}), ("unload_lora", None, {})]
    outputs = []
    for name, argument, options in steps:
        for one in (model, other):
            given = (dict(argument) if isinstance(argument, dict) else argument,) if argument is not None else ()
            getattr(one, name)(*given, **options)
        outputs.append(run(other, batch))
        assert torch.equal(run(model, batch), outputs[-1]), name
        if name == "load_lora_adapter":
            with pytest.raises(UserError, match="attention_kwargs: expected a scale of 1"):
                run(model, {**batch, "attention_kwargs": {"scale": 0.5}})
    assert pydit.report(model)["model"]["modulation"][0]["made_anew"] == 5
    assert not torch.allclose(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[3])
    assert torch.equal(run(pydit.restore(model), batch), plain)


PIPELINES = {"qwen-image": ("QwenImagePipeline", lambda: tiny.transformer(4), tiny.batch, ("img_mod.1", "txt_mod.1", "to_q")),
             "flux.1": ("FluxPipeline", tiny.flux, tiny.flux_batch, ("norm1.linear", "norm.linear", "to_q")),
             "sd3.5": ("StableDiffusion3Pipeline", tiny.sd3, tiny.sd3_batch, ("norm1.linear", "to_q"))}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("intervals", [None, [(0, 1)]])
@pytest.mark.parametrize("family", PIPELINES)
def test_lora_through_a_pipeline(family, intervals):
    """Pipelines unmerge a LoRA in the transformer's modules themselves, and FLUX.1's read weights, which a baked one
    refuses to show, before they hand it over."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    name, transformer, batches, targets = PIPELINES[family]
    kind, depth = getattr(diffusers, name), 3 if family == "sd3.5" else 4

    def make():
        model = transformer()
        model = model if intervals is None else pydit.prune(model, PruningPlan.from_intervals(depth, intervals,
                                                                                              family=family))
        parts = [part for part in inspect.signature(kind.__init__).parameters if part not in ("self", "transformer")]
        return kind(**dict.fromkeys(parts), transformer=model)

    lora = lora_of(transformer(), targets)
    pipe, other, batch = make(), make(), batches()
    batch = {name: x[:1] if isinstance(x, torch.Tensor) and "ids" not in name else x for name, x in batch.items()}
    if "img_shapes" in batch:
        batch["img_shapes"] = batch["img_shapes"][:1]
    plain = run(other.transformer, batch)
    pydit.bake_schedule(pipe, batch["timestep"], **{} if family == "qwen-image" else
                        {"pooled_projections": batch["pooled_projections"]})
    outputs = []
    for name, argument in [("load_lora_weights", lora), ("fuse_lora", None), ("unfuse_lora", None),
                           ("unload_lora_weights", None)]:
        for one in (pipe, other):
            getattr(one, name)(*([dict(argument)] if argument else []))
        outputs.append(run(other.transformer, batch))
        assert torch.equal(run(pipe.transformer, batch), outputs[-1]), name
        assert schedule.is_baked(pipe.transformer) and pipe.num_fused_loras == other.num_fused_loras
    assert not torch.allclose(outputs[0], plain, rtol=1e-2)
    if family == "flux.1":
        with pytest.raises(Exception, match="lora"):
            pipe.load_lora_weights({"transformer.unknown.weight": torch.zeros(2, 2)})
    assert torch.equal(run(pipe.transformer, batch), outputs[-1])  # not `plain`: unfusing rounds
    assert torch.equal(run(pydit.restore(pipe).transformer, batch), outputs[-1])


def test_copies_of_a_baked_model_with_layers_of_the_teacher():
    """These are shared by copies, and have one table."""
    model, batch = pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)])), next(single())
    pydit.bake_schedule(model, TIMES)
    expected = run(model, batch)
    assert torch.equal(run(copy.deepcopy(model), batch), expected)
    model.set_active([])
    with pytest.raises(UserError, match="copy.deepcopy: expected a baked model that runs its own blocks"):
        copy.deepcopy(model)
    teacher = run(model, batch)
    assert torch.equal(run(copy.deepcopy(pydit.restore(model)), batch), teacher)


@pytest.mark.parametrize("family", ["qwen-image", "flux.1", "sd3.5"])
def test_layers_that_two_models_run_have_one_table(family, tmp_path):
    """Its rows are not those of the other model, which says so, runs its own layers and is not saved without weights."""
    make, batch, depth = {"qwen-image": (lambda: tiny.transformer(4), tiny.batch(images=1), 4),
                          "flux.1": (tiny.flux, tiny.flux_batch(), 4), "sd3.5": (tiny.sd3, tiny.sd3_batch(), 3)}[family]
    options = {} if family == "qwen-image" else {"pooled_projections": batch["pooled_projections"]}
    teacher = make()
    model = pydit.prune(teacher, PruningPlan.from_intervals(depth, [(0, 1)], family=family))
    own, whole = run(model, batch), run(teacher, batch)
    pydit.bake_schedule(teacher, batch["timestep"], **options)
    assert torch.equal(run(model, batch), own)
    with pytest.raises(UserError, match="got a baked schedule; pydit.restore it before saving"):
        model.save_pretrained(tmp_path / "student", with_teacher=True)
    assert not (tmp_path / "student").exists()
    shared = "got blocks that it shares with another model, .* pydit.restore that one first"
    for bake_first in (True, False):
        if bake_first:
            pydit.bake_schedule(model, batch["timestep"], **options)
            with pytest.raises(UserError, match=shared):
                model.set_active([])
        else:
            model.set_active([])
            with pytest.raises(UserError, match=shared):
                pydit.bake_schedule(model, batch["timestep"], **options)
        for one in (model, pydit.accelerate(model)):
            with pytest.raises(UserError, match=shared):
                run(one, batch)
        pydit.restore(model).set_active([(0, 1)])
        assert torch.equal(run(model, batch), own)
    model.set_active([])
    assert torch.equal(run(pydit.restore(teacher), batch), whole) and torch.equal(run(model, batch), whole)


def test_changed_weights_make_the_table_anew():
    model, batch = tiny.transformer(2), next(single())
    linear = model.transformer_blocks[0].img_mod[1]
    before = run(pydit.bake_schedule(model, TIMES), batch)
    with torch.no_grad():
        linear.weight.mul_(2)
    changed = run(model, batch)
    assert not torch.allclose(changed, before) and torch.equal(run(pydit.restore(model), batch), changed)


def test_layered_condition():
    model = tiny.transformer(2, use_additional_t_cond=True, use_layer3d_rope=True)
    batches = [{**batch, "img_shapes": [[(1, 2, 4), (1, 2, 4)]], "additional_t_cond": torch.tensor([index % 2])}
               for index, batch in enumerate(single())]
    expected = [run(model, batch) for batch in batches]
    pydit.accelerate(pydit.bake_schedule(model, TIMES), exact=True)
    for batch, right in zip(batches, expected, strict=True):
        assert torch.equal(run(model, batch), right)
    with pytest.raises(UserError, match="conditions that its schedule was baked for"):
        run(model, {**batches[0], "additional_t_cond": None})


def test_tables_of_thinned_out_blocks():
    """FLUX.1: their forward knows the width without a modulation to ask."""
    def make():
        with pytest.warns(UserWarning, match="start as the identity"):
            return pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[1, 3], linear_text_ffn=[0]))

    model = make()
    batch = {name: value[:1] if isinstance(value, torch.Tensor) and "ids" not in name else value
             for name, value in tiny.flux_batch().items()}
    for change in (lambda: None, lambda: pydit.accelerate(model)):
        pydit.bake_schedule(model, batch["timestep"], pooled_projections=batch["pooled_projections"])
        change()
        tiny.assert_as_stock(run(model, batch), make, batch)
        pydit.restore(model)


@pytest.mark.parametrize("family", ["flux", "flux with guidance", "sd3.5"])
def test_tables_per_prompt(family):
    """Two prompts, two steps, bit-equal in batches of one; another prompt is refused or added, never taken for one."""
    flux = family != "sd3.5"
    make = functools.partial(tiny.flux, guidance_embeds="guidance" in family) if flux else tiny.sd3
    model = make()
    whole = tiny.flux_batch() if flux else tiny.sd3_batch()
    batches = []
    for index, time in enumerate([0.3, 0.7, 0.3] if flux else [300.0, 700.0, 300.0]):
        one = {name: value[index % 2:][:1] if isinstance(value, torch.Tensor) and "ids" not in name else value
               for name, value in whole.items()}
        batches.append({**one, "timestep": torch.tensor([time])} | (
            {"guidance": torch.tensor([3.5])} if "guidance" in family else {}))
    expected = [run(model, batch) for batch in batches]
    count = sum(p.numel() for p in model.parameters())
    options = {"guidance": [3.5]} if "guidance" in family else {}
    times = [0.3, 0.7] if flux else [300.0, 700.0]
    pydit.bake_schedule(model, times, pooled_projections=whole["pooled_projections"], **options)
    assert sum(p.numel() for p in model.parameters()) < 0.85 * count
    for batch, right in zip(batches, expected, strict=True):
        assert torch.equal(run(model, batch), right)
    pydit.accelerate(model)
    tiny.assert_as_stock(run(model, batches[0]), make, batches[0])
    other = {**batches[0], "pooled_projections": torch.ones(1, 16)}
    with pytest.raises(UserError, match="timestep, prompt and guidance: expected one of the 4"):
        run(model, other)
    assert pydit.report(model)["model"]["modulation"][0]["rows"] == 4
    right = run(pydit.restore(model), other)
    pydit.bake_schedule(model, times, pooled_projections=whole["pooled_projections"], on_miss="extend", **options)
    assert torch.equal(run(model, other), right)
    assert pydit.report(model)["model"]["modulation"][0]["rows"] == 6
    with pytest.raises(UserError, match="pooled_projections: expected a tensor"):
        pydit.bake_schedule(model, times)


def test_the_answer_of_a_gpu_is_there_when_that_gpu_says_so(monkeypatch):
    """Which need not be the current one: the event is of the stream that copies the answer."""
    class Missed(torch.Tensor):
        is_cuda, device = True, "cuda:1"

    model = pydit.bake_schedule(tiny.transformer(2), TIMES)
    empty, copying = torch.empty, SimpleNamespace(record_event=lambda: SimpleNamespace(query=lambda: False))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", {"cuda:1": copying}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(schedule, "_missed", lambda *_: torch.tensor([False]).as_subclass(Missed))
    run(model, next(single()))
    assert len(model.__dict__[schedule._KEY].pending) == 1


def test_a_miss_on_a_gpu_is_settled_at_the_next_step():
    """The device's answers, as they come back later, raise there or add the row: none is lost to one behind it."""
    ready = SimpleNamespace(query=lambda: True)
    for on_miss in ("raise", "extend"):
        model = pydit.bake_schedule(tiny.transformer(2), TIMES, on_miss=on_miss)
        missed = {"timestep": torch.tensor([0.33])}
        answers = {"late": False}
        late = SimpleNamespace(query=lambda answers=answers: answers["late"])
        pending = model.__dict__[schedule._KEY].pending
        pending += [(torch.tensor([False]), ready, missed), (torch.tensor([True]), late, missed),
                    (torch.tensor([False]), ready, {})]
        run(model, next(single()))  # a step while the device is behind
        answers["late"] = True
        batch = next(single())
        if on_miss == "raise":
            with pytest.raises(UserError, match="timestep: expected one of the 4"):
                run(model, batch)
        else:
            with pytest.warns(UserWarning, match="its output is NaN"):
                run(model, batch)
            assert run(model, {**batch, **missed}).isfinite().all()
        assert not pending
        run(model, batch)  # said once


@pytest.mark.parametrize("name", ["qwen-image", "flux.1"])
def test_float64_keys_are_not_rounded(name):
    """A float64 model embeds float64 timesteps, which a table of float32 ones neither has nor, extended, gets."""
    make, batch, others = family(name)
    batch = {**tiny.cast(batch, torch.float64), "timestep": torch.tensor([0.3], dtype=torch.float64)}
    expected = run(make().double(), batch)
    others = tiny.cast(others, torch.float64)
    assert torch.equal(run(pydit.bake_schedule(make().double(), batch["timestep"], **others), batch), expected)
    model = pydit.bake_schedule(make().double(), [0.7], on_miss="extend", **others)
    assert torch.equal(run(model, batch), expected)
