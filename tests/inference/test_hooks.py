"""Block caches, offloading and casting before and after accelerate; traps of diffusers, refused or handled."""

import itertools
import warnings

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_faster_cache, apply_layer_skip, apply_layerwise_casting

import pydit
from pydit.errors import UserError
from pydit.inference import traps
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny

FAMILIES = {"qwen-image": (lambda: tiny.transformer(3), lambda seed: tiny.batch(seed=seed)),
            "flux": (tiny.flux, lambda seed: tiny.flux_batch(seed=seed))}
CACHES = {"first block": FirstBlockCacheConfig(threshold=0.4),
          "taylorseer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
          "pyramid attention": PyramidAttentionBroadcastConfig(
              spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
              spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: 500)}


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def steps(model, batch):
    """Outputs of four steps whose inputs drift, and how many output projections ran in all."""
    ran = []
    handles = [module.register_forward_hook(lambda *_: ran.append(1)) for name, module in model.named_modules()
               if name.endswith(("attn.to_out.0", "mlp.net.2", "ff.net.2"))]
    outputs = []
    with model.cache_context("cond"):
        for scale in (1.0, 1.01, 1.02, 1.6):
            outputs.append(run(model, {**batch, "hidden_states": batch["hidden_states"] * scale}))
    for handle in handles:
        handle.remove()
    return torch.stack(outputs), len(ran)


@pytest.mark.parametrize(("family", "cache"), [("qwen-image", "first block"), ("flux", "first block"),
                                               ("qwen-image", "taylorseer"), ("qwen-image", "pyramid attention")])
def test_a_block_cache_before_or_after(family, cache):
    make, batches = FAMILIES[family]
    batch, config = batches(0), CACHES[cache]
    plain = steps(make(), batch)[1]
    stock = make()  # diffusers 0.39 gives no context to caches that are enabled after a first one
    stock.enable_cache(config)
    expected, count = steps(stock, batch)
    assert count < plain  # the cache leaves something out
    for order in ((lambda m: pydit.accelerate(m), lambda m: m.enable_cache(config)),
                  (lambda m: m.enable_cache(config), lambda m: pydit.accelerate(m))):
        model = make()
        for act in order:
            act(model)
        found, ran = steps(model, batch)
        assert ran == count
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert not torch.equal(found, expected)  # our blocks ran inside
        assert {row["path"] for row in pydit.report(model)["model"]["blocks"]} == {"pydit"}
        model.disable_cache()
        fast = run(model, batch)
        torch.testing.assert_close(fast, run(make(), batch), rtol=1e-4, atol=1e-4)
        assert not torch.equal(fast, run(make(), batch))  # still ours without the cache
        model.enable_cache(config)
        pydit.restore(model)  # the cache stays, around the stock blocks
        found, ran = steps(model, batch)
        assert torch.equal(found, expected) and ran == count
        model.disable_cache()
        assert torch.equal(run(model, batch), run(make(), batch))


def offloaded(model, kind):
    cpu = torch.device("cpu")
    if kind == "leaf groups":
        model.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
    elif kind == "block groups":
        model.enable_group_offload(onload_device=cpu, offload_type="block_level", num_blocks_per_group=1)
    elif kind == "sequential":  # as enable_sequential_cpu_offload does
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=cpu)
    elif kind == "model":  # as enable_model_cpu_offload does
        from accelerate import cpu_offload_with_hook

        cpu_offload_with_hook(model, execution_device=cpu)
    else:
        apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32,
                                skip_modules_pattern=model._skip_layerwise_casting_patterns)
    return model


@pytest.mark.parametrize("kind", ["leaf groups", "block groups", "sequential", "model", "casting"])
@pytest.mark.parametrize("first", [True, False])
def test_offloading_and_casting_before_or_after(kind, first):
    for make, batch in ((lambda: tiny.transformer(2), tiny.batch()), (tiny.flux, tiny.flux_batch())):
        expected = run(offloaded(make(), kind), batch)
        model = make()
        if first:
            pydit.accelerate(offloaded(model, kind))
        else:
            offloaded(pydit.accelerate(model), kind)
        found = run(model, batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, expected)
        assert {row["path"] for row in pydit.report(model)["model"]["blocks"]} == {"pydit"}

@pytest.mark.parametrize("kind", ["leaf groups", "sequential", "casting", *CACHES])
def test_prune_refuses_a_teacher_with_hooks(kind):
    """Copies of its blocks would call the forward that the hook found on the teacher's."""
    teacher, plan = tiny.transformer(3), PruningPlan.from_intervals(3, [(0, 1)])
    if kind in CACHES:
        teacher.enable_cache(CACHES[kind])
    else:
        offloaded(teacher, kind)
    with pytest.raises(UserError, match="transformer: expected a model without hooks, .* prune before offloading"):
        pydit.prune(teacher, plan)
    whole = offloaded(tiny.transformer(3), "model")
    batch = tiny.batch()
    assert torch.equal(run(pydit.prune(whole, plan), batch), run(pydit.prune(tiny.transformer(3), plan), batch))


def test_a_block_cache_keeps_the_blocks_that_it_sits_on():
    teacher, batch = tiny.transformer(5), tiny.batch()
    expected = run(teacher, batch)
    model = pydit.prune(teacher, PruningPlan.from_intervals(5, [(2, 3)]))
    model.enable_cache(CACHES["first block"])
    with pytest.raises(UserError, match="set_active: expected a model without a block cache"):
        model.set_active([])
    model.disable_cache()
    model.set_active([])
    with pytest.raises(UserError, match="enable_cache: expected the model's own blocks to run, got layers of the teacher"):
        model.enable_cache(CACHES["first block"])
    assert torch.equal(run(model, batch), expected) and torch.equal(run(teacher, batch), expected)


def test_layer_skip_is_refused():
    model, batch = pydit.accelerate(tiny.transformer(3)), tiny.batch()
    expected = run(model, batch)
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=True, skip_ff=True))
    with pytest.raises(UserError, match=r"apply_layer_skip: .* got transformer_blocks.1, which returns the text first"):
        run(model, batch)
    model.transformer_blocks[1]._diffusers_hook.remove_hook("layer_skip_hook")
    assert torch.equal(run(model, batch), expected)


@pytest.mark.parametrize("how", ["stock", "fused", "exact", "pruned"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_perturbed_attention_guidance(how, skip_first):
    """diffusers' PerturbedAttentionGuidance skips the scores of layers, by watching torch's attention."""
    def make():
        model = tiny.transformer(4)
        return pydit.prune(model, PruningPlan("qwen-image", 4, [(1, 2)], linear_ffn=[0])) if how == "pruned" else model

    def skip(model):
        apply_layer_skip(model, LayerSkipConfig(indices=[0, 1], fqn="transformer_blocks", skip_attention=False,
                                                skip_attention_scores=True, skip_ff=False))
        return model

    def change(model):
        return model if how == "stock" else pydit.accelerate(model, exact=how == "exact")

    batch = tiny.batch(masked=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        plain, expected = run(make(), batch), run(skip(make()), batch)
        model = change(skip(make())) if skip_first else skip(change(make()))
    assert not torch.allclose(expected, plain, rtol=1e-2)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-4)
    for block in list(model.transformer_blocks)[:2]:
        block.attn._diffusers_hook.remove_hook("layer_skip_hook")
    torch.testing.assert_close(run(model, batch), plain, rtol=1e-4, atol=1e-4)


def test_layer_skip_on_a_pruned_model_is_refused_without_accelerate():
    """With as many text tokens as image tokens it would swap the streams without a word."""
    model = pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)]))
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=True, skip_ff=True))
    with pytest.raises(UserError, match=r"apply_layer_skip: .* got transformer_blocks.1, which returns the text first"):
        run(model, tiny.batch(text=16, masked=False))


def test_qkv_fusion_that_does_nothing_says_so():
    model, batch = pydit.accelerate(tiny.transformer(2)), tiny.batch()
    expected = run(model, batch)
    with pytest.warns(UserWarning, match="has no fused projections for QwenImageTransformer2DModel"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model, batch), expected)
    flux, batch = pydit.accelerate(tiny.flux()), tiny.flux_batch()
    expected = run(flux, batch)
    flux.fuse_qkv_projections()
    assert flux.transformer_blocks[0].attn.fused_projections
    torch.testing.assert_close(run(flux, batch), expected, rtol=1e-5, atol=1e-5)


def test_qkv_fusion_that_leaves_norms_out_is_refused():
    model, batch = pydit.accelerate(tiny.sd3()), tiny.sd3_batch()
    expected, other = run(model, batch), tiny.sd3(dual_attention_layers=())
    with pytest.raises(UserError, match="fuse_qkv_projections: expected a model without QK norm, .* got qk_norm 'rms_norm'"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model, batch), expected)
    before = run(other, batch)
    other.fuse_qkv_projections()
    assert not torch.allclose(run(other, batch), before, rtol=1e-3, atol=1e-3)  # else there is nothing left to refuse


def test_more_shapes_than_the_compiler_keeps_graphs_for():
    model = tiny.transformer(9)
    for index, block in enumerate(model.transformer_blocks):
        block.img_mlp.net[0].proj = torch.nn.Linear(64, 32 + 8 * index)
        block.img_mlp.net[2] = torch.nn.Linear(32 + 8 * index, 64)
    pydit.accelerate(model)
    with pytest.raises(UserError, match="compile_repeated_blocks: expected at most 8 different shapes of "
                                        "QwenImageTransformerBlock, .* got 9: give blocks the same widths in groups "
                                        r"\(of img_mlp.net.0.proj.weight, for example, 32, 40, 48, 56, 64, 72, 80, 96\)"):
        model.compile_repeated_blocks(backend="eager")
    widths = [40, 33, 64, 90, 33, 95, 100]
    for count in range(1, 8):
        found = traps.bucketed(widths, count)
        assert len(set(found)) <= count and all(a >= b for a, b in zip(found, widths, strict=True))
        best = min(sum(min(end for end in ends if end >= width) for width in widths)
                   for ends in itertools.combinations(sorted(set(widths)), min(count, 6)) if max(ends) == 100)
        assert sum(found) == best


@pytest.mark.parametrize("family", ["qwen-image", "flux.1", "sd3.5"])
def test_removed_modules_do_not_swallow_weights(family):
    """A child set to None would let a strict load pass over its weights."""
    teacher, depth = {"qwen-image": (tiny.transformer(4), 4), "flux.1": (tiny.flux(), 4), "sd3.5": (tiny.sd3(), 3)}[family]
    chosen = PruningPlan.from_intervals(depth, [(1, 2)] if family == "sd3.5" else [(0, 1)], family=family)
    model = pydit.prune(teacher, chosen)
    assert not [name for name, module in model.named_modules() for child in module._modules.values() if child is None]
    extra = {**model.state_dict(), "transformer_blocks.1.ff_context.net.2.weight2": torch.zeros(1)}
    if family == "sd3.5":
        extra["transformer_blocks.1.ff_context.net.2.weight"] = torch.zeros(64, 256)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        model.load_state_dict(extra, strict=True)


def test_a_backend_chosen_after_accelerate_wins_and_is_reported():
    for make, batch in ((lambda: tiny.transformer(2), tiny.batch()), (tiny.flux, tiny.flux_batch())):
        model = pydit.accelerate(make())
        fast = run(model, batch)
        model.set_attention_backend("_native_math")
        rows = pydit.report(model)["model"]["attention"]
        assert any("set_attention_backend chose _native_math after" in row["reason"] for row in rows)
        found = run(model, batch)
        torch.testing.assert_close(found, fast, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, fast)
        model.reset_attention_backend()
        assert torch.equal(run(model, batch), fast)
        make().set_attention_backend("native")  # the choice above is global in diffusers


def lora_of_two_blocks():
    return {f"transformer.transformer_blocks.{n}.{name}.lora_{side}.weight":
            torch.randn(*shape, generator=torch.Generator().manual_seed(n)) * 0.3
            for n in range(2) for name, width in (("attn.to_k", 64), ("attn.add_v_proj", 64), ("img_mlp.net.0.proj", 256))
            for side, shape in (("A", (2, 64)), ("B", (width, 2)))}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_on_projections_before_or_after():
    """Packed projections come apart where an adapter sits, and together again when it has gone."""
    lora = lora_of_two_blocks()
    batch, stock = tiny.batch(), tiny.transformer(2)
    plain = run(stock, batch)
    stock.load_lora_adapter(dict(lora), adapter_name="a")
    expected = run(stock, batch)
    assert not torch.allclose(expected, plain)
    for before in (True, False):
        model = tiny.transformer(2)
        acts = [lambda m=model: m.load_lora_adapter(dict(lora), adapter_name="a"), lambda m=model: pydit.accelerate(m)]
        for act in acts if before else reversed(acts):
            act()
        torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-4)
        model.fuse_lora()
        torch.testing.assert_close(run(model, batch), expected, rtol=1e-4, atol=1e-4)
        model.unfuse_lora()
        model.unload_lora()
        torch.testing.assert_close(run(model, batch), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", ["sim"], indirect=True)
def test_weights_that_lora_changes_under_the_grouped_linears(device):
    """The kernel reads weights where they are: an adapter beside, in, and out of them."""
    batch = tiny.cast(tiny.batch(images=1), torch.bfloat16)
    model = pydit.accelerate(tiny.transformer(2).bfloat16().requires_grad_(False))

    def check(change):
        wide, stock = tiny.transformer(2).double(), tiny.transformer(2).bfloat16()
        for other in (wide, stock):
            if change != "unload_lora":
                other.load_lora_adapter(lora_of_two_blocks(), adapter_name="a")
        assert_accurate(run(model, batch), run(wide, tiny.cast(batch, torch.float64)), run(stock, batch), name=change)

    model.load_lora_adapter(lora_of_two_blocks(), adapter_name="a")
    check("load_lora_adapter")
    model.fuse_lora()
    check("fuse_lora")
    model.unfuse_lora()
    model.unload_lora()
    check("unload_lora")


@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_of_both_outputs_of_the_last_attention_of_sd3(cache_first):
    """It copies the text's too, which the fused processor leaves out because the block does not read it."""
    def cached(model):
        apply_faster_cache(model, FasterCacheConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 500), tensor_format="BCHW",
            current_timestep_callback=lambda: model.step, attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True, spatial_attention_block_identifiers=("transformer_blocks",)))
        return model

    def outputs(model, batch):
        found = []
        for model.step, scale in ((500, 1.0), (400, 1.1), (300, 1.2), (200, 1.3)):
            found.append(run(model, {**batch, "hidden_states": batch["hidden_states"] * scale}))
        return torch.stack(found)

    plain = tiny.sd3()
    model = pydit.accelerate(cached(tiny.sd3())) if cache_first else cached(pydit.accelerate(tiny.sd3()))
    found = outputs(model, tiny.sd3_batch())
    tiny.assert_as_stock(found, lambda: cached(tiny.sd3()), tiny.sd3_batch(), run=outputs)
    assert not torch.allclose(found, outputs(plain, tiny.sd3_batch()))
