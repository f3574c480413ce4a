"""ControlNet residuals and LoRA weights made for the teacher land on the layers that a pruned model has of it."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import pydit
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.models.by_source import remap_lora
from pydit.plan import PruningPlan
from tests.models import tiny
from tests.models.test_families import FAMILIES
from tests.models.test_thinned import student_of

QWEN = PruningPlan.from_intervals(10, [(1, 3), (6, 7)])


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def samples_of(batch, count, tokens, width=64, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(batch["timestep"]), tokens, width, generator=generator) for _ in range(count)]


def with_hooks(stock, added, batch):
    """A stock model in which block i's image output gets ``added[i]`` on top, by hooks."""
    handles = [block.register_forward_hook(lambda module, args, out, extra=extra: (out[0], out[1] + extra))
               for block, extra in zip(get_adapter(stock).blocks(stock), added, strict=True)]
    try:
        return run(stock, batch)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_residuals_of_qwen_image(count):
    teacher, batch = tiny.transformer(10), tiny.batch()
    student = pydit.prune(teacher, QWEN)
    samples = samples_of(batch, count, 16)
    each = [samples[k // -(-10 // count)] for k in range(10)]  # of the teacher's layers
    assert torch.allclose(run(teacher, {**batch, "controlnet_block_samples": samples}), with_hooks(teacher, each, batch),
                          atol=1e-5)
    expected = with_hooks(student.to_stock(), [sum(each[k] for k in layers) for layers in student.source], batch)
    controlled = {**batch, "controlnet_block_samples": samples}
    assert torch.allclose(run(student, controlled), expected, rtol=1e-4, atol=1e-5)
    assert controlled["controlnet_block_samples"] is samples and len(samples) == count
    for active in ([], [(1, 3)]):
        student.set_active(active)
        if not active:
            assert torch.allclose(run(student, controlled), run(teacher, controlled), rtol=1e-5, atol=1e-6)
        assert torch.isfinite(run(student, controlled)).all()
    student.set_active(QWEN.intervals)
    assert torch.equal(run(student, {**batch, "controlnet_block_samples": None}), run(student, batch))


@pytest.mark.parametrize("repeat", [False, True])
def test_residuals_of_flux(repeat):
    make, batches, _cls, depth, intervals = FAMILIES["flux.1"]
    teacher, batch = make(), batches()
    student = pydit.prune(teacher, PruningPlan.from_intervals(depth, intervals, family="flux.1"))
    dual, single = samples_of(batch, 2, 20), samples_of(batch, 3, 20, seed=8)
    given = {**batch, "controlnet_block_samples": dual, "controlnet_single_block_samples": single,
             "controlnet_blocks_repeat": repeat}
    each = [dual[k % 2 if repeat else k // 2] for k in range(4)] + [single[k // 2] for k in range(5)]
    assert torch.allclose(run(teacher, given), with_hooks(teacher, each, batch), atol=1e-5)
    expected = with_hooks(student.to_stock(), [sum(each[k] for k in layers) for layers in student.source], batch)
    assert torch.allclose(run(student, given), expected, rtol=1e-4, atol=1e-5)
    student.set_active([])
    assert torch.allclose(run(student, given), run(teacher, given), rtol=1e-5, atol=1e-6)


def test_residuals_of_sd3():
    make, batches, _cls, depth, intervals = FAMILIES["sd3.5"]
    teacher, batch = make(), batches()
    student = pydit.prune(teacher, PruningPlan.from_intervals(depth, intervals, family="sd3.5"))
    samples = samples_of(batch, 3, 16)
    given = {**batch, "block_controlnet_hidden_states": samples}
    each = [samples[int(k / (7 / 3))] for k in range(6)] + [0.0]  # none after the last block
    assert torch.allclose(run(teacher, given), with_hooks(teacher, each, batch), atol=1e-5)
    expected = with_hooks(student.to_stock(), [sum(each[k] for k in layers) for layers in student.source], batch)
    assert torch.allclose(run(student, given), expected, rtol=1e-4, atol=1e-5)
    student.set_active([])
    assert torch.allclose(run(student, given), run(teacher, given), rtol=1e-5, atol=1e-6)
    student.set_active([intervals[0]])
    layers = [k for k in range(depth) if not intervals[0][0] < k <= intervals[0][1]]
    stock = make()
    stock.transformer_blocks = torch.nn.ModuleList([teacher.transformer_blocks[k] for k in layers])
    added = [each[k] + (each[k + 1] if k == intervals[0][0] else 0.0) for k in layers]
    assert torch.allclose(run(student, given), with_hooks(stock, added, batch), rtol=1e-4, atol=1e-5)


def lora(teacher, modules, rank=2, seed=0):
    """Peft's names and random weights for modules of every block."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in get_adapter(teacher).block_lists:
        for number, block in enumerate(getattr(teacher, name)):
            for module in modules:
                weight = block.get_submodule(module).weight
                state[f"transformer.{name}.{number}.{module}.lora_A.weight"] = torch.randn(
                    rank, weight.shape[1], generator=generator)
                state[f"transformer.{name}.{number}.{module}.lora_B.weight"] = torch.randn(
                    weight.shape[0], rank, generator=generator) * 0.1
    return state


def test_names_follow_the_source():
    student = pydit.prune(tiny.transformer(10), QWEN)
    state = {f"transformer.transformer_blocks.{k}.attn.to_q.lora_A.weight": k for k in range(10)}
    state |= {"transformer.proj_out.lora_B.weight": -1, "transformer_blocks.4.img_mod.1.alpha": -2}
    renamed, dropped = remap_lora({"transformer_blocks": student.transformer_blocks}, state)
    assert {key.split(".")[2]: value for key, value in renamed.items() if "to_q" in key} == {
        "0": 0, "1": 1, "2": 4, "3": 5, "4": 6, "5": 8, "6": 9}
    assert renamed["transformer.proj_out.lora_B.weight"] == -1 and renamed["transformer_blocks.2.img_mod.1.alpha"] == -2
    assert [key.split(".")[2] for key in dropped] == ["2", "3", "7"]


def test_removed_modules_drop_theirs():
    student = student_of(tiny.transformer(8), PruningPlan("qwen-image", 8, text_linear=[(3, 5)], linear_ffn=[1]).lean())
    lists = {"transformer_blocks": student.transformer_blocks}
    keys = [f"transformer_blocks.{k}.{m}.lora_A.weight" for k, m in (
        (1, "img_mlp.net.2"), (2, "img_mlp.net.2"), (4, "attn.add_q_proj"), (4, "attn.add_k_proj"), (4, "txt_mod.1"),
        (3, "attn.add_q_proj"))]
    renamed, dropped = remap_lora(lists, dict.fromkeys(keys, 0))
    assert dropped == [keys[0], keys[2], keys[4]] and list(renamed) == [keys[1], keys[3], keys[5]]


def test_a_path_is_refused():
    student = pydit.prune(tiny.transformer(10), QWEN)
    with pytest.raises(UserError, match="load_lora_adapter: expected a state dict"):
        student.load_lora_adapter("some/where")


@pytest.mark.parametrize("family", ["qwen-image", "flux.1"])
def test_a_teachers_lora_acts_on_its_own_layers(family):
    """Loaded through peft: the same as the LoRA merged by hand into the weights of the layers it was made for."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    if family == "qwen-image":
        make, batch, plan, modules = lambda: tiny.transformer(10), tiny.batch(), QWEN, ("attn.to_q", "img_mod.1")
    else:
        build, batches, _cls, depth, intervals = FAMILIES[family]
        make, batch, modules = build, batches(), ("attn.to_q",)
        plan = PruningPlan.from_intervals(depth, intervals, family=family)
    teacher = make()
    state = lora(teacher, modules)
    student = pydit.prune(teacher, plan)
    plain = run(student, batch)
    with pytest.warns(UserWarning, match="LoRA weights have no place in the pruned model"):
        student.load_lora_adapter(dict(state), prefix="transformer")
    with pytest.warns(UserWarning, match="set_active: the teacher's layers run without the adapters of this model"):
        student.set_active([])
    student.set_active(student.plan.units)
    merged = make()
    with torch.no_grad():
        for name in get_adapter(merged).block_lists:
            for number, block in enumerate(getattr(merged, name)):
                for module in modules:
                    key = f"transformer.{name}.{number}.{module}"
                    block.get_submodule(module).weight += state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
    expected = run(pydit.prune(merged, plan), batch)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    assert torch.allclose(run(student, batch), expected, rtol=1e-4, atol=1e-5)
    own = pydit.prune(teacher, plan)
    own.lora_layers = "student"
    small = {key: value for key, value in state.items() if ".0." in key[:32]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.load_lora_adapter(small, prefix="transformer")


@pytest.mark.parametrize("family, fields, init, modules", [
    ("qwen-image", {"intervals": [(1, 3)], "linear_ffn": [5]}, "middle", ("attn.to_q", "img_mod.1")),
    ("qwen-image", {"intervals": [(1, 3)], "linear_ffn": [5]}, "last", ("attn.to_q", "img_mod.1")),
    ("qwen-image", {"intervals": [(1, 3)]}, "position-average", ("attn.to_q",)),
    ("sd3.5", {"intervals": [(4, 6)], "linear_ffn": [1]}, "first", ("norm1.linear", "norm1_context.linear")),
])
def test_loading_commutes_with_pruning(family, fields, init, modules):
    """Merged into the teacher and pruned, or pruned and then loaded: the same, narrowed layers and averages included."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    make, batch, depth = (lambda: tiny.transformer(8), tiny.batch(), 8) if family == "qwen-image" else (
        FAMILIES[family][0], FAMILIES[family][1](), FAMILIES[family][3])
    plan = PruningPlan(family, depth, **fields)
    state = lora(make(), modules)
    merged = make()
    with torch.no_grad():
        for number, block in enumerate(merged.transformer_blocks):
            for module in modules:
                key = f"transformer.transformer_blocks.{number}.{module}"
                block.get_submodule(module).weight += 0.5 * (
                    state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"])
    alphas = {key.replace(".lora_A.weight", ".alpha"): 1.0 for key in state if "lora_A" in key}  # of rank 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        student, expected = pydit.prune(make(), plan, init=init), pydit.prune(merged, plan, init=init)
        plain = run(student, batch)
        student.load_lora_adapter(dict(state), prefix="transformer", network_alphas=alphas)
    assert not torch.allclose(plain, run(expected, batch), rtol=1e-2)
    assert torch.allclose(run(student, batch), run(expected, batch), rtol=1e-4, atol=1e-5)


def test_averages_beside_a_projection_of_the_model_itself():
    """diffusers finds an alpha by the end of a name: that of FLUX.1's own proj_out is not to be taken for a block's."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    make, batch, plan = tiny.flux, tiny.flux_batch(), PruningPlan("flux.1", 4, [(2, 3)])
    teacher, merged = make(), make()
    state = lora_of(teacher, "single_transformer_blocks", ("attn.to_q", "attn.to_k", "proj_mlp", "proj_out"))
    state |= {"transformer.proj_out.lora_A.weight": torch.randn(2, 64), "transformer.proj_out.lora_B.weight": torch.randn(4, 2)}
    with torch.no_grad():
        for key in (key for key in state if key.endswith("lora_A.weight")):
            module = merged.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            module.weight += 0.5 * (state[key.replace("lora_A", "lora_B")] @ state[key])
    alphas = {key.replace(".lora_A.weight", ".alpha"): 1.0 for key in state if "lora_A" in key}  # of rank 2
    student, expected = pydit.prune(teacher, plan, init="average"), pydit.prune(merged, plan, init="average")
    student.load_lora_adapter(dict(state), prefix="transformer", network_alphas=alphas)
    assert torch.allclose(run(student, batch), run(expected, batch), rtol=1e-4, atol=1e-5)


def test_flux_pipelines_loader(tmp_path):
    """It compares shapes by the teacher's numbers and would widen the student's narrow layers."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    from diffusers import FluxPipeline

    make, batches, _cls, depth, _ = FAMILIES["flux.1"]
    plan = PruningPlan("flux.1", depth, [(0, 1)], linear_ffn=[2, 5])
    modules = {"transformer_blocks": ("attn.to_q", "norm1.linear"), "single_transformer_blocks": ("attn.to_q", "proj_out")}
    teacher, merged, batch = make(), make(), batches()
    state = {key: value for name, which in modules.items() for key, value in lora_of(teacher, name, which).items()}
    with torch.no_grad():
        for key in (key for key in state if key.endswith("lora_A.weight")):
            module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            merged.get_submodule(module).weight += state[key.replace("lora_A", "lora_B")] @ state[key]
        norm = merged.transformer_blocks[3].attn.norm_k.weight.mul_(1.5)  # control LoRAs bring norms with them
    state["transformer.transformer_blocks.3.attn.norm_k.weight"] = norm.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        student, expected = pydit.prune(teacher, plan), pydit.prune(merged, plan)
    plain, size = run(student, batch), sum(p.numel() for p in student.parameters())
    pipe = FluxPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
                        tokenizer_2=None, transformer=student)
    with pytest.warns(UserWarning, match="4 LoRA weights have no place"):
        pipe.load_lora_weights(state)
    assert torch.allclose(run(student, batch), run(expected, batch), rtol=1e-4, atol=1e-5)
    pipe.unload_lora_weights()
    assert torch.equal(run(student, batch), plain) and size == sum(p.numel() for p in student.parameters())


def lora_of(teacher, name, modules):
    """:func:`lora` for one list of blocks."""
    found = {}
    for module in modules:
        for number, block in enumerate(getattr(teacher, name)):
            weight = block.get_submodule(module).weight
            generator = torch.Generator().manual_seed(number)
            found[f"transformer.{name}.{number}.{module}.lora_A.weight"] = torch.randn(2, weight.shape[1],
                                                                                       generator=generator)
            found[f"transformer.{name}.{number}.{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2,
                                                                                       generator=generator) * 0.1
    return found


def test_residuals_by_position():
    """The eighth argument of Qwen-Image's forward."""
    batch, model = tiny.batch(), pydit.prune(tiny.transformer(10), QWEN)
    samples = samples_of(batch, 3, 16)
    expected = run(model, {**batch, "controlnet_block_samples": samples})
    given = [batch[name] for name in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep",
                                      "img_shapes")]
    with torch.no_grad():
        assert torch.equal(model(*given, None, None, samples, return_dict=False)[0], expected)
        with pytest.raises(UserError, match="forward: expected up to 10 arguments, got 12"):
            model(*given, *[None] * 7)


@pytest.mark.parametrize("kind", ["lora_magnitude_vector.weight", "lora_B.bias"])
def test_adapters_that_have_no_average(kind):
    """Half of a DoRA would be another adapter: all of it is left out, and counted."""
    state = {f"transformer_blocks.{layer}.attn.to_q.{name}": torch.ones(shape) for layer in range(4)
             for name, shape in (("lora_A.weight", (2, 64)), ("lora_B.weight", (64, 2)), (kind, (64,)))}
    state["transformer_blocks.1.attn.to_k.lora_A.weight"] = torch.ones(2, 64)
    state["transformer_blocks.1.attn.to_k.lora_B.weight"] = torch.ones(64, 2)
    model = pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)]), init="average")
    renamed, dropped = model.follow_source(state)
    assert sorted(dropped) == sorted(key for key in state if ".to_q." in key and key.split(".")[1] in "12")
    assert {key.split(".")[1] for key in renamed if ".to_q." in key} == {"0", "2"}
    assert {key for key in renamed if ".to_k." in key} == {f"transformer_blocks.1.attn.to_k.lora_{x}.weight" for x in "AB"}


def test_a_saved_lora_says_whose_blocks_it_numbers(tmp_path):
    model = pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)]))
    state = {f"transformer.transformer_blocks.3.attn.to_q.lora_{x}.weight": torch.ones(shape)
             for x, shape in (("A", (2, 64)), ("B", (64, 2)))}
    model.load_lora_adapter(state, adapter_name="a")
    expected = run(model, tiny.batch())
    with pytest.warns(UserWarning, match='numbers the blocks of the pruned model; set lora_layers = "student" before'):
        model.save_lora_adapter(tmp_path, adapter_name="a")
    other = pydit.prune(tiny.transformer(4), PruningPlan.from_intervals(4, [(1, 2)]))
    other.lora_layers = "student"
    other.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix=None, adapter_name="a")
    assert torch.equal(run(other, tiny.batch()), expected)


@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_skipped_layers_of_sd3():
    """Those of skip-layer guidance are the teacher's numbers; what cannot be left out alone is refused."""
    def make(**fields):
        return pydit.prune(tiny.sd3(num_layers=6), PruningPlan("sd3.5", 6, **fields))

    batch = tiny.sd3_batch()
    model, teacher = make(intervals=[(1, 2)]), tiny.sd3(num_layers=6)
    stock, plain = model.to_stock(), run(model, batch)
    for layers, block in (([4], 3), ([1, 2], 1), ([9], 9)):
        found = run(model, {**batch, "skip_layers": layers})
        assert torch.equal(found, run(stock, {**batch, "skip_layers": [block]})) and torch.equal(found, plain) == (block == 9)
    with pytest.raises(UserError, match=r"skip_layers: expected all layers that a block stands for, \[1, 2\].* got \[2\]"):
        run(model, {**batch, "skip_layers": [2, 4]})
    model.set_active([])
    assert torch.equal(run(model, {**batch, "skip_layers": [2, 4]}), run(teacher, {**batch, "skip_layers": [2, 4]}))
    model = make(text_linear=[(1, 3)])
    for layer in (1, 3):
        with pytest.raises(UserError, match=rf"skip_layers: .* region of linear text begins or ends, got \[{layer}\]"):
            run(model, {**batch, "skip_layers": [layer]})
    assert not torch.equal(run(model, {**batch, "skip_layers": [2]}), run(model, batch))
