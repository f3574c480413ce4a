"""What users do to an accelerated or baked model afterwards: pickle, cast, compile, prune, route, adapt."""

import copy
import io
import pickle
import threading
import types
import warnings

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers import transformer_flux
from safetensors.torch import save_model
from torch.nn.modules.module import register_module_full_backward_hook

import pydit
from pydit import backend, files
from pydit.errors import UserError
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.inference.test_schedule import lora_of
from tests.models import tiny

FAMILIES = {"qwen-image": (lambda: tiny.transformer(3), tiny.batch), "flux": (tiny.flux, tiny.flux_batch),
            "sd3.5": (tiny.sd3, tiny.sd3_batch)}


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def rows(model, kind):
    return {(row["path"], row["reason"]): row["count"] for row in pydit.report(model)["model"][kind]}


def one(batch, **others):
    """The first sample."""
    return {name: value[:1] if isinstance(value, torch.Tensor) and "ids" not in name else value
            for name, value in batch.items()} | others


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pickled(family, exact):
    """As torch.save of a whole model, or sending one to another process, does it."""
    make, batch = FAMILIES[family]
    model, inputs = pydit.accelerate(make(), exact=exact), batch()
    expected, file = run(model, inputs), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(other, inputs), expected)
        assert pydit.report(other)["model"] == pydit.report(model)["model"]
        assert torch.equal(run(pydit.restore(other), inputs), run(make(), inputs))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickled_table_still_follows_adapters():
    model, other = pydit.bake_schedule(tiny.transformer(2), [0.5]), tiny.transformer(2)
    model, lora = pickle.loads(pickle.dumps(model)), lora_of(tiny.transformer(2), ("img_mod.1", "to_q"))
    for each in (model, other):
        each.load_lora_adapter(dict(lora))
    batch = {**tiny.batch(images=1), "timestep": torch.tensor([0.5])}
    assert torch.equal(run(model, batch), run(other, batch))


def test_a_pickled_model_with_graphs_says_that_it_has_none():
    model = pydit.accelerate(tiny.transformer(1), cuda_graphs=True)
    other = pickle.loads(pickle.dumps(model))
    assert rows(other, "graphs") == {("stock", "a pickled copy records nothing; accelerate it again"): 1}
    assert torch.equal(run(pydit.restore(other), tiny.batch()), run(tiny.transformer(1), tiny.batch()))


def test_a_model_under_torch_compile():
    """`pipe.transformer = torch.compile(pipe.transformer)` before accelerate, bake_schedule and restore."""
    batch = {**tiny.batch(images=1, masked=False), "timestep": torch.tensor([0.5])}
    torch._dynamo.reset()
    compiled = torch.compile(tiny.transformer(2), backend="aot_eager", fullgraph=True)
    pipe, stock = types.SimpleNamespace(transformer=compiled), run(compiled, batch)
    assert pydit.accelerate(pipe) is pipe and pipe.transformer is compiled
    assert set(rows(compiled, "blocks")) == {("pydit", "")}
    fast = run(compiled, batch)
    tiny.assert_as_stock(fast, lambda: tiny.transformer(2), batch)
    assert not torch.equal(fast, stock)
    pydit.bake_schedule(pipe, [0.5])
    tiny.assert_as_stock(run(compiled, batch), lambda: tiny.transformer(2), batch)
    pydit.restore(compiled)
    assert torch.equal(run(compiled, batch), stock) and set(rows(compiled, "modulation")) != {("table", "")}


def test_a_table_follows_the_dtype_of_the_model():
    batch = {**tiny.batch(images=1), "timestep": torch.tensor([0.5])}
    low = tiny.cast(batch, torch.bfloat16)
    expected = run(tiny.transformer(2).bfloat16(), low)
    model = pydit.bake_schedule(tiny.transformer(2), [0.5]).to(torch.bfloat16)
    assert torch.equal(run(model, low), expected)
    assert torch.equal(run(pydit.restore(model), low), expected)
    model = pydit.restore(pydit.bake_schedule(tiny.transformer(2), [0.5]).to(torch.bfloat16))  # without a forward
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and torch.equal(run(model, low), expected)
    model = pydit.bake_schedule(tiny.transformer(2), [0.5])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    run(compiled, batch)
    model.to(torch.bfloat16)
    with pytest.raises(Exception, match="expected torch.float32, in which its schedule was baked"):
        run(compiled, low)


def test_timesteps_that_a_narrower_dtype_cannot_tell_apart():
    """SD3 embeds them in float32 whatever the model's dtype is, so casting a model must not round the table's keys."""
    low = one(tiny.cast({**tiny.sd3_batch()}, torch.bfloat16))
    model = pydit.bake_schedule(tiny.sd3(), [1000.0, 999.0], pooled_projections=low["pooled_projections"].float())
    model.to(torch.bfloat16)
    for time in (1000.0, 999.0):
        batch = {**low, "timestep": torch.tensor([time])}
        assert torch.equal(run(model, batch), run(tiny.sd3().bfloat16(), batch))
    with pytest.raises(UserError, match="expected one of the 2 of the baked schedule"):
        run(model, {**low, "timestep": torch.tensor([998.0])})


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("init", ["first", "average"])
@pytest.mark.parametrize("family", ["qwen-image", "flux"])
def test_a_student_of_an_accelerated_teacher_is_plain(family, init, exact):
    make, batch = FAMILIES[family]
    depth, name = {"qwen-image": (3, "qwen-image"), "flux": (4, "flux.1")}[family]
    plan = PruningPlan.from_intervals(depth, [(0, 1)], family=name)
    expected = run(pydit.prune(make(), plan, init=init), batch())
    teacher = pydit.accelerate(make(), exact=exact)
    fast = run(teacher, batch())
    student = pydit.prune(teacher, plan, init=init)
    assert torch.equal(run(student, batch()), expected)
    assert not [type(m) for m in student.transformer_blocks.modules() if type(m).__module__.startswith("pydit.models.fused")]
    assert set(rows(pydit.accelerate(student), "blocks")) == {("pydit", "")}
    assert torch.equal(run(pydit.restore(student), batch()), expected) and torch.equal(run(teacher, batch()), fast)


def test_models_that_cannot_be_pruned():
    plan = PruningPlan.from_intervals(3, [(1, 2)])
    with pytest.raises(UserError, match="transformer: expected one with its modulation weights, got a baked schedule"):
        pydit.prune(pydit.bake_schedule(tiny.transformer(3), [0.5]), plan)
    model = tiny.transformer(3)
    model.is_quantized = True
    with pytest.raises(UserError, match="transformer: expected plain weights, got a quantized model"):
        pydit.prune(model, plan)


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_blocks_that_a_new_route_brings_in(exact, config):
    """Layers of the teacher, or blocks that were idle: swapped when they come, and the report counts what runs."""
    batch = {**tiny.batch(images=2), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 2}
    plan = PruningPlan.from_intervals(5, [(1, 2)])

    def routed(route, dtype=torch.float32):
        student = pydit.prune(tiny.transformer(5, **config).to(dtype), plan)
        student.set_active(route)
        return run(student, tiny.cast(batch, dtype))

    for start, then in (([(1, 2)], []), ([], [(1, 2)])):
        teacher = tiny.transformer(5, **config)
        model, expected = pydit.prune(teacher, plan), {len(route): routed(route) for route in (start, then)}
        model.set_active(start)
        pydit.accelerate(model, exact=exact)
        for route in (start, then, start):
            model.set_active(route)
            ours = [type(block).__module__.startswith("pydit.models") for block in model.transformer_blocks]
            assert all(ours) and sum(rows(model, "blocks").values()) == len(ours) == 5 - len(route)
            assert sum(rows(model, "attention").values()) == len(ours)
            if exact:
                assert torch.equal(run(model, batch), expected[len(route)])
            else:
                assert_accurate(run(model, batch), routed(route, torch.float64), expected[len(route)])
        pydit.restore(model)
        for route in (start, then):
            model.set_active(route)
            assert torch.equal(run(model, batch), expected[len(route)])
        assert torch.equal(run(teacher, batch), run(tiny.transformer(5, **config), batch))


def test_a_layer_of_two_accelerated_models():
    teacher = tiny.transformer(4)
    model = pydit.prune(teacher, PruningPlan.from_intervals(4, [(1, 2)]))
    model.set_active([])
    pydit.accelerate(teacher)
    pydit.accelerate(model)
    assert rows(model, "blocks") == {("pydit", ""): 2, ("pydit", "shared with another accelerated model"): 2}
    assert rows(model, "attention") == {("pydit", ""): 4}
    pydit.restore(teacher)
    assert rows(model, "blocks") == {("pydit", ""): 2, ("stock", "a model that shares the block was restored"): 2}
    assert ("pydit", "") in rows(model, "attention") and sum(rows(model, "attention").values()) == 4
    assert torch.equal(run(pydit.restore(model), tiny.batch()), run(tiny.transformer(4), tiny.batch()))


def test_the_teacher_is_stock_again_when_its_layers_run_no_more():
    """Of an accelerated student that ran them: its own forward, and exact=True, which blocks in use elsewhere refuse."""
    teacher, batch = tiny.transformer(4), tiny.batch()
    student, expected = pydit.prune(teacher, PruningPlan.from_intervals(4, [(1, 2)])), run(teacher, batch)
    pydit.accelerate(student)
    fast = run(student, batch)
    assert torch.equal(run(teacher, batch), expected)
    student.set_active([])
    assert not torch.equal(run(teacher, batch), expected)
    with pytest.raises(UserError, match="exact: expected blocks that no other accelerated model runs, got 2 that one does"):
        pydit.accelerate(teacher, exact=True)
    student.set_active([(1, 2)])
    assert torch.equal(run(teacher, batch), expected) and torch.equal(run(student, batch), fast)
    assert torch.equal(run(pydit.accelerate(teacher, exact=True), batch), expected)
    for exact in (False, True):  # of the model's own blocks
        pydit.accelerate(pydit.accelerate(student), exact=exact)
    pydit.restore(teacher), pydit.restore(student)
    assert torch.equal(run(teacher, batch), expected)


def test_packed_projections_are_weights_of_their_own(tmp_path):
    """To whoever saves them: safetensors and accelerate take what shares a storage for one weight."""
    model = pydit.accelerate(tiny.transformer(2))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert rows(model, "attention") == {("pydit", ""): 2} and run(model, tiny.batch()).isfinite().all()
    for _ in range(2):
        save_model(model, tmp_path / "model.safetensors")
        saved = files.load_safetensors(tmp_path / "model.safetensors", what="x")[0]
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
        torch.save(model.transformer_blocks[0].attn.to_q.weight, tmp_path / "q.pt")
        assert (tmp_path / "q.pt").stat().st_size < 2 * 64 * 64 * 4
        pydit.restore(model)


def test_weights_in_somebody_elses_memory_stay_there():
    """As an optimizer's flat buffer, which is written to and then read through the weights."""
    model, stock = tiny.transformer(2), tiny.transformer(2)
    for each in (model, stock):
        flat = torch.cat([p.detach().flatten() for p in each.parameters()])
        start = 0
        for p in each.parameters():
            p.data, start = flat[start:start + p.numel()].view_as(p), start + p.numel()
        if each is model:
            pydit.accelerate(each)
            run(each, tiny.batch())
        flat.mul_(1.25)
    tiny.assert_as_stock(run(model, tiny.batch()), lambda: copy.deepcopy(stock), tiny.batch())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_models_in_one_memory_stay_equal(family):
    """As an evaluation model that is loaded with assign=True: what trains one is read through the other."""
    make, batches = FAMILIES[family]
    train, model = make(), make()
    model.load_state_dict(train.state_dict(), assign=True)
    pydit.accelerate(model)
    with torch.no_grad():
        for p in train.parameters():
            p.mul_(1.3)
    tiny.assert_as_stock(run(model, batches()), lambda: copy.deepcopy(train), batches())


@pytest.mark.parametrize("family", FAMILIES)
def test_many_models_as_one(family):
    """torch.vmap over stacked weights, which have no memory to be packed in."""
    make, batches = FAMILIES[family]
    stacked, _ = torch.func.stack_module_state([make(), make()])
    model, batch = pydit.accelerate(make()), {**batches(), "return_dict": False}
    with torch.no_grad():
        found = torch.vmap(lambda weights: torch.func.functional_call(model, weights, (), batch)[0])(stacked)
    for each in found:
        tiny.assert_as_stock(each, make, batches())


@pytest.mark.parametrize("first", [True, False])
def test_a_parametrization_is_computed_once_a_forward(first):
    """spectral_norm moves on with every one in training."""
    outputs = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = tiny.transformer(2)
        if accelerated and first:
            pydit.accelerate(model)
        torch.nn.utils.parametrizations.spectral_norm(model.transformer_blocks[0].attn.to_q)
        if accelerated and not first:
            pydit.accelerate(model)
        model.train()
        outputs.append([run(model, tiny.batch()) for _ in range(3)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_alone_are_trained(family):
    make, batches = FAMILIES[family]
    grads = []
    for model in (make(), pydit.accelerate(make())):
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        model(**batches(), return_dict=False)[0].square().sum().backward()
        grads.append({name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()
                      if ".attn.to_" in name or "add_" in name})
    assert grads[0] == grads[1] and any(grads[0].values())


def test_classes_of_ones_own_are_called():
    """A processor of the stock one's name, a feed-forward and an AdaLayerNorm derived from diffusers'."""
    class FluxAttnProcessor(transformer_flux.FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            return tuple(2 * part for part in super().__call__(*args, **kwargs))

    class Doubled(FeedForward):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(AdaLayerNormZero):
        def forward(self, *args, **kwargs):
            normed, *rest = super().forward(*args, **kwargs)
            return (normed + 0.5, *rest)

    def own_processor(model):
        model.transformer_blocks[0].attn.set_processor(FluxAttnProcessor())

    def own_classes(model):
        model.transformer_blocks[1].ff.__class__, model.transformer_blocks[0].norm1.__class__ = Doubled, Shifted

    for change in (own_processor, own_classes):
        def make(change=change):
            model = tiny.flux()
            change(model)
            return model

        assert not torch.allclose(run(make(), tiny.flux_batch()), run(tiny.flux(), tiny.flux_batch()), atol=1e-3)
        for before in (True, False):
            model = pydit.accelerate(make()) if before else pydit.accelerate(tiny.flux())
            if not before:
                change(model)
            tiny.assert_as_stock(run(model, tiny.flux_batch()), make, tiny.flux_batch())


@pytest.mark.parametrize("everywhere", [False, True])
def test_who_listens_to_gradients_is_told(everywhere):
    calls = {}
    for kind, model in (("stock", tiny.transformer(2)), ("ours", pydit.accelerate(tiny.transformer(2)))):
        names, seen = {module: name for name, module in model.named_modules()}, calls.setdefault(kind, [])
        keep = lambda module, *_, seen=seen, names=names: seen.append(names[module])  # noqa: E731
        handles = [register_module_full_backward_hook(keep)] if everywhere else [
            module.register_full_backward_hook(keep) for name, module in model.named_modules() if "transformer_blocks.1." in name]
        model(**tiny.batch(), return_dict=False)[0].square().sum().backward()
        for handle in handles:
            handle.remove()
    assert sorted(set(calls["ours"])) == sorted(set(calls["stock"])) and calls["ours"]


def test_forward_mode_derivatives_are_refused():
    """An op would drop them, and they would be 0."""
    model, batch = pydit.accelerate(tiny.transformer(1).requires_grad_(False)), tiny.batch()
    forward = lambda x: model(**{**batch, "hidden_states": x}, return_dict=False)[0]  # noqa: E731
    x = batch["hidden_states"]
    with pytest.raises(NotImplementedError, match="expected no forward-mode derivatives"):
        torch.func.jvp(forward, (x,), (torch.ones_like(x),))
    pydit.restore(model)
    model.set_attention_backend("_native_math")
    assert torch.func.jvp(forward, (x,), (torch.ones_like(x),))[1].any()
    model.reset_attention_backend()
    tiny.flux().set_attention_backend("native")  # the choice above is global in diffusers


@pytest.mark.parametrize("who", ["teacher", "student", "again"])
def test_target_images_are_of_the_forward_at_hand(who):
    """Of batches whose target images differ in size: in a model that shares the blocks, and for a gradient's recomputation."""
    batch = tiny.batch(images=1, masked=False)
    one, other = ({**batch, "img_shapes": [[(1, n, 4), (1, 4 - n, 4)]]} for n in (1, 3))
    make = lambda: tiny.transformer(4, zero_cond_t=True)  # noqa: E731
    if who == "again":
        grads = []
        for model in (make().double(), make(), pydit.accelerate(make())):
            model.enable_gradient_checkpointing()
            model.train()
            inputs = [tiny.cast(b, next(model.parameters()).dtype) for b in (one, other)]
            sum(model(**b, return_dict=False)[0].square().sum() for b in inputs).backward()
            grads.append(model.transformer_blocks[0].attn.to_q.weight.grad)
        assert_accurate(grads[2], grads[0], grads[1])
        return
    teacher = make()
    student = pydit.prune(teacher, PruningPlan.from_intervals(4, [(1, 2)]))
    student.set_active([])
    first, second = (student, teacher) if who == "teacher" else (teacher, student)
    pydit.accelerate(first)
    run(first, one)
    tiny.assert_as_stock(run(second, other), make, other)
    tiny.assert_as_stock(run(first, other), make, other)


CACHES = {"first block": lambda: FirstBlockCacheConfig(threshold=0.4),
          "mag": lambda: MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4, threshold=0.5, max_skip_steps=2)}
THINNED = {"linear FFN": (lambda: tiny.transformer(5), PruningPlan("qwen-image", 5, linear_ffn=[0, 3]), tiny.batch),
           "linear text FFN": (lambda: tiny.transformer(5), PruningPlan("qwen-image", 5, linear_text_ffn=[0, 3]), tiny.batch),
           "affine": (lambda: tiny.transformer(5), PruningPlan("qwen-image", 5, affine=[2]), tiny.batch),
           "linear text": (lambda: tiny.transformer(5), PruningPlan("qwen-image", 5, text_linear=[(1, 3)]), tiny.batch),
           "flux": (tiny.flux, PruningPlan("flux.1", 4, linear_ffn=[0, 3]), tiny.flux_batch)}


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", THINNED)
def test_block_caches_on_thinned_out_models(kind, cache):
    make, plan, batch = THINNED[kind]

    def steps(model, inputs=batch()):  # noqa: B008
        with model.cache_context("cond"):
            return torch.stack([run(model, {**inputs, "hidden_states": inputs["hidden_states"] * scale})
                                for scale in (1.0, 1.01, 1.02, 1.6)])

    def cached():
        student = pydit.prune(make(), plan)
        student.enable_cache(CACHES[cache]())
        return student

    assert not torch.allclose(steps(cached()), steps(pydit.prune(make(), plan)))
    for first in (True, False):
        model = pydit.prune(make(), plan)
        for act in (lambda m=model: m.enable_cache(CACHES[cache]()), lambda m=model: pydit.accelerate(m))[::1 if first else -1]:
            act()
        tiny.assert_as_stock(steps(model), cached, batch(), run=steps)
        assert set(rows(model, "blocks")) == {("pydit", "")}


@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_a_cache_of_text_that_attention_does_not_give():
    model = pydit.prune(tiny.transformer(5), PruningPlan("qwen-image", 5, text_linear=[(1, 3)]))
    with pytest.raises(UserError, match=r"enable_cache: .* because attention of the blocks \[2, 3\] gives no text, got Taylor"):
        model.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(UserError, match=r"blocks \[2, 3\] gives no text, got FasterCacheConfig; Pyramid.* works"):
        model.enable_cache(FasterCacheConfig())
    model.enable_cache(TaylorSeerCacheConfig(use_lite_mode=True))


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize(("region", "lean", "words"), [
    ((0, 1), False, "begins at the first block"), ((0, 3), False, "begins at the first block"),
    ((1, 3), True, "without an output at the last block"), ((0, 3), True, ""), ((1, 3), False, "")])
@pytest.mark.parametrize("make", [lambda: tiny.transformer(4), tiny.flux], ids=["qwen-image", "flux.1"])
def test_the_first_block_cache_where_text_is_two_tensors(make, region, lean, words):
    """It subtracts the first block's output from the last one's."""
    teacher = make()
    family, batch = (("flux.1", tiny.flux_batch()) if hasattr(teacher, "single_transformer_blocks") else
                     ("qwen-image", tiny.batch()))
    plan = PruningPlan(family, 4, text_linear=[region])
    model = pydit.prune(teacher, plan.lean() if lean else plan)
    expected = run(model, batch)
    if words:
        with pytest.raises(UserError, match=f"enable_cache: expected a first and a last .*{words}; MagCacheConfig works"):
            model.enable_cache(CACHES["first block"]())
        model.enable_cache(CACHES["mag"]())
    else:
        model.enable_cache(CACHES["first block"]())
    with model.cache_context("cond"):
        assert torch.equal(run(model, batch), expected) and run(model, batch).isfinite().all()


@pytest.mark.parametrize("config", [FirstBlockCacheConfig, TaylorSeerCacheConfig])
def test_a_family_without_caches_says_so(config):
    model = pydit.prune(tiny.sd3(), PruningPlan("sd3.5", 3, [(0, 1)]))
    with pytest.raises(UserError, match="enable_cache: expected a model that diffusers has caches for, got PrunedSD3"):
        model.enable_cache(config())


def test_a_mask_of_flux_runs_the_stock_processor(monkeypatch):
    """joint_attention_kwargs may carry one, which diffusers hands to its attention."""
    monkeypatch.setattr(backend, "_taken", {})
    mask = torch.ones(2, 1, 1, 27, dtype=torch.bool)
    mask[1, ..., 4:7] = False
    batch = {**tiny.flux_batch(), "joint_attention_kwargs": {"attention_mask": mask}}
    expected = run(tiny.flux(), batch)
    assert not torch.allclose(expected, run(tiny.flux(), tiny.flux_batch()))
    tiny.assert_as_stock(run(pydit.accelerate(tiny.flux()), batch), tiny.flux, batch)
    row = pydit.report()["joint_attention"]
    assert row["path"] == "torch" and "stock processor runs where an attention_mask comes" in row["reason"]
    assert torch.equal(run(pydit.accelerate(tiny.flux(), exact=True), batch), expected)


@pytest.mark.parametrize("layer", [0, 2])
def test_projections_fused_on_thinned_flux(layer):
    """A thinned single block takes the text through the image's projections: fused ones are these."""
    def make():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[layer]))

    expected = run(make(), tiny.flux_batch())
    for order in ((pydit.accelerate, lambda m: m.fuse_qkv_projections()),
                  (lambda m: m.fuse_qkv_projections(), pydit.accelerate)):
        model = make()
        for act in order:
            act(model)
        torch.testing.assert_close(run(model, tiny.flux_batch()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["exact", "cuda_graphs"])
def test_options_that_are_no_answer(name):
    with pytest.raises(UserError, match=f"{name}: expected True or False, got 'no'"):
        pydit.accelerate(tiny.transformer(1), **{name: "no"})


def test_projections_fused_and_unfused_on_sd3():
    """Diffusers puts back the processors it found, ours, and leaves what says that projections are fused."""
    batch = tiny.sd3_batch()
    make = lambda: tiny.sd3(dual_attention_layers=(), qk_norm=None)  # noqa: E731
    stock = run(make(), batch)
    for again in (True, False):
        model = pydit.accelerate(make())
        model.fuse_qkv_projections()
        tiny.assert_as_stock(run(model, batch), make, batch)
        if not again:
            pydit.restore(model)
        model.unfuse_qkv_projections()
        tiny.assert_as_stock(run(model, batch), make, batch)
        assert set(rows(model, "attention")) == {("pydit", "") if again else ("stock", "pydit.accelerate was not called")}
    assert torch.equal(run(model, batch), stock)
    assert not [p for p in model.attn_processors.values() if type(p).__module__.startswith("pydit")]


def test_threads_with_target_images_of_their_own():
    """Two modulation rows: where the second begins is a forward's own matter, whoever else runs the model meanwhile."""
    model = pydit.accelerate(tiny.transformer(3, zero_cond_t=True))
    batch = tiny.batch(images=1, masked=False)
    batches = [{**batch, "img_shapes": [[(1, rows, 4), (1, 4 - rows, 4)]]} for rows in (1, 2, 3)]
    expected, wrong = [run(model, one) for one in batches], []
    assert not torch.equal(expected[0], expected[1])

    def work(index):
        for _ in range(20):
            if not torch.equal(run(model, batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_under_inference_mode_models_stay_fit_to_be_trained(family):
    make, batches = FAMILIES[family]
    model, batch = make(), one(batches())
    batch = {**batch, "timestep": torch.tensor([0.5])}
    options = {name: batch[name] for name in ("pooled_projections",) if name in batch}
    with torch.inference_mode():
        pydit.bake_schedule(pydit.accelerate(model), [0.5], **options)
        tiny.assert_as_stock(model(**batch, return_dict=False)[0], make, batch)
    for _ in range(2):
        found = model(**batch, return_dict=False)[0]
        tiny.assert_as_stock(found, make, batch)
        found.square().mean().backward()
        assert model.proj_out.weight.grad is not None
        pydit.restore(model)
    assert not [name for name, parameter in model.named_parameters() if parameter.is_inference()]


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_were_moved_are_one_product_again(family, monkeypatch):
    make, batches = FAMILIES[family]
    model, batch = pydit.accelerate(make().requires_grad_(False)), batches()
    low = tiny.cast(batch, torch.bfloat16)
    moves = (lambda m: m, lambda m: m.to(torch.bfloat16), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
             lambda m: (m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True), m)[1])
    for move in moves:
        model = move(model)
        monkeypatch.setattr(backend, "_taken", {})
        run(model, batch if model.dtype == torch.float32 else low)
        assert pydit.report()["projections"]["reason"] == "torch's matrix product, one per stream"
        place = model.transformer_blocks[0].attn.to_q.weight.data_ptr()
        run(model, batch if model.dtype == torch.float32 else low)
        assert model.transformer_blocks[0].attn.to_q.weight.data_ptr() == place  # not laid out anew for every forward


SINGLE = {"one prompt": ("encoder_hidden_states",), "one time": ("timestep", "pooled_projections"),
          "one image": ("hidden_states",)}
ONE_OF = {**FAMILIES, "two rows": (lambda: tiny.transformer(3, zero_cond_t=True), tiny.batch),
          "thinned": (lambda: pydit.prune(tiny.transformer(4), PruningPlan(
              "qwen-image", 4, affine=[0], linear_ffn=[1], text_linear=[(2, 3)])), tiny.batch),
          "flux thinned": (lambda: pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[0, 3])), tiny.flux_batch)}


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize(("family", "which", "device"), [
    *((family, which, "reference") for family in ONE_OF for which in SINGLE),
    *((family, which, "sim") for family in ("two rows", "thinned", "flux") for which in ("one prompt", "one time"))],
    indirect=["device"])
def test_a_batch_of_one_beside_larger_ones(family, which, device):
    """Eager broadcasts it, as in a pipeline called with two prompts and one negative prompt."""
    make, batches = ONE_OF[family]
    batch = tiny.cast(batches(images=2, masked=False) if batches is tiny.batch else batches(), torch.bfloat16)
    if family == "two rows":
        batch["img_shapes"] = [[(1, 2, 4), (1, 2, 4)]] * 2
    batch |= {name: batch[name][:1] for name in SINGLE[which] if name in batch}
    low = lambda: make().bfloat16()  # noqa: E731
    tiny.assert_as_stock(run(pydit.accelerate(low()), batch), low, batch)
    assert torch.equal(run(pydit.accelerate(low(), exact=True), batch), run(low(), batch))
