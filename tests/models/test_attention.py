"""Attention processors against the stock ones, in whole tiny models."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

import pydit
from pydit import backend
from pydit.models.attention import FluxAttnProcessor, QwenImageAttnProcessor, SD3AttnProcessor
from pydit.testing import assert_accurate
from tests.models import tiny

BACKENDS = ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]


def _run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def _exact(make, batch):
    """What the stock processors give in float64."""
    return _run(make().double(), tiny.cast(batch, torch.float64))


def _batch(mask):
    batch = tiny.batch(masked=mask != "none")
    if mask == "holes":
        batch["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0, 1], [1] * 7])
    return batch


def _to(batch, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("device", BACKENDS, indirect=True)
@pytest.mark.parametrize("mask", ["none", "prefix", "holes"])
def test_equals_the_stock_processor(mask, device):
    batch = _batch(mask)
    exact = _exact(lambda: tiny.transformer(num_layers=3), batch)
    model = tiny.transformer(num_layers=3).to(device, torch.bfloat16)
    batch = _to(tiny.cast(batch, torch.bfloat16), device)
    stock = _run(model, batch)
    model.set_attn_processor(QwenImageAttnProcessor())
    ours = _run(model, batch)
    assert_accurate(ours, exact.to(device), stock)
    assert not torch.equal(ours, stock)  # it is another computation


def test_single_precision_is_close():
    batch, model = _batch("holes"), tiny.transformer(num_layers=3)
    stock = _run(model, batch)
    model.set_attn_processor(QwenImageAttnProcessor())
    assert_accurate(_run(model, batch), _exact(lambda: tiny.transformer(num_layers=3), batch), stock)


def _gradients(model, batch):
    model(**batch, return_dict=False)[0].square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", BACKENDS, indirect=True)
@pytest.mark.parametrize("family", ["qwen, no mask", "qwen, prefix", "qwen, holes", "flux", "sd3.5"])
def test_gradients_reach_every_projection(family, device):
    make, batch, processor = _family(family)
    exact = _gradients(make().double(), tiny.cast(batch, torch.float64))
    batch, model = _to(tiny.cast(batch, torch.bfloat16), device), make().to(device, torch.bfloat16)
    stock = _gradients(copy.deepcopy(model), batch)
    model.set_attn_processor(processor())
    ours = _gradients(model, batch)
    # Stock gives the text query of the last block of SD3.5, which nothing reads, zeros; here it has no gradient.
    assert ours.keys() == {name for name, grad in exact.items() if grad.any() or name in ours}
    for name, grad in ours.items():
        assert_accurate(grad, exact[name], stock[name], name=name)


def test_a_wrapped_projection_is_called():
    """As LoRA does it: the projection is replaced by a module that adds to it."""
    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 0.1 * x

    model, batch = tiny.transformer(num_layers=2), _batch("prefix")
    for block in model.transformer_blocks:
        block.attn.to_q = Adapted(block.attn.to_q)
        block.attn.add_k_proj = Adapted(block.attn.add_k_proj)
    stock = _run(model, batch)
    model.set_attn_processor(QwenImageAttnProcessor())
    wide = copy.deepcopy(model).double()
    wide.set_attn_processor(QwenDoubleStreamAttnProcessor2_0())
    assert_accurate(_run(model, batch), _run(wide, tiny.cast(batch, torch.float64)), stock)


@pytest.mark.parametrize("family", ["qwen, prefix", "flux", "sd3.5"])
def test_lora_of_peft(family):
    """Adapters on the projections are called, can be trained and be taken off again."""
    pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
    from peft import LoraConfig

    make, batch, processor = _family(family)
    model = make()
    plain = _run(model, batch)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "add_k_proj"]))
    stock, exact = _run(model, batch), _run(copy.deepcopy(model).double(), tiny.cast(batch, torch.float64))
    model.set_attn_processor(processor())
    assert_accurate(_run(model, batch), exact, stock)
    with pytest.raises(AssertionError, match="exceeds"):  # without the adapters it is another model
        assert_accurate(plain, exact, stock)
    model(**batch, return_dict=False)[0].square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    model.disable_adapters()
    assert_accurate(_run(model, batch), _exact(make, batch), plain)


@pytest.mark.parametrize("family", ["qwen, no mask", "qwen, holes", "flux", "sd3.5"])
def test_compiles_fullgraph(family):
    """The whole model, forward and backward; nothing asks for a value of the mask, which would break the graph."""
    make, batch, processor = _family(family)
    models = [make(), make()]
    for model in models:
        model.set_attn_processor(processor())
    compiled = torch.compile(models[0], fullgraph=True, backend="aot_eager")
    out = compiled(**batch, return_dict=False)[0]
    torch.testing.assert_close(out.detach(), _run(models[1], batch))
    out.square().sum().backward()
    plain = _gradients(models[1], batch)
    found = {name: p.grad for name, p in models[0].named_parameters() if p.grad is not None}
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad)


def test_bad_arguments():
    processor, attn = QwenImageAttnProcessor(), tiny.transformer(num_layers=1).transformer_blocks[0].attn
    x = torch.zeros(1, 2, 64)
    with pytest.raises(ValueError, match="encoder_hidden_states: expected the text stream, got None"):
        processor(attn, x)
    with pytest.raises(ValueError, match=r"attention_mask: expected None, .* got a mask of shape \[1, 4\]"):
        processor(attn, x, x, attention_mask=torch.ones(1, 4))
    attn.norm_k = None
    with pytest.raises(ValueError, match="attn: expected RMSNorm on queries and keys"):
        processor(attn, x, x)


# FLUX.1 and SD3.5 -----------------------------------------------------------------------------------------------------


def test_a_stream_reads_tables_that_it_made(monkeypatch):
    """Another stream's may not be written yet, and their memory may be free before they are read."""
    from pydit.models import attention

    angles = torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    made = []
    for stream in (7, 8, 7, 8):
        monkeypatch.setattr(attention.backend, "stream_of", lambda table, stream=stream: stream)
        made.append(attention._cosine_and_sine(angles)[0])
    assert made[0] is made[2] and made[1] is made[3] and made[0] is not made[1]
    assert torch.equal(made[0], made[1])


def test_tables_are_made_once_and_follow_their_source():
    from pydit.models import attention

    angles = torch.polar(torch.ones(5, 4), torch.randn(5, 4))
    first = attention._cosine_and_sine(angles)
    assert attention._cosine_and_sine(angles)[0] is first[0]
    assert torch.equal(first[0], angles.real) and torch.equal(first[1], angles.imag)
    angles.mul_(1j)  # changed in place: made again
    again = attention._cosine_and_sine(angles)
    assert torch.equal(again[0], angles.real) and not torch.equal(again[0], first[0])
    with torch.inference_mode():
        inference = torch.polar(torch.ones(2, 4), torch.randn(2, 4))
        assert attention._cosine_and_sine(inference)[0] is attention._cosine_and_sine(inference)[0]
    held = len(attention._MADE)
    del angles, inference
    assert len(attention._MADE) < held  # and forgotten with it


FAMILIES = {"flux": (tiny.flux, tiny.flux_batch, FluxAttnProcessor),
            "sd3.5": (tiny.sd3, tiny.sd3_batch, SD3AttnProcessor)}


def _family(name):
    """(make, batch, processor): "flux", "sd3.5", or "qwen, " and what mask it has."""
    if name in FAMILIES:
        make, batch, processor = FAMILIES[name]
        return make, batch(), processor
    mask = name.removeprefix("qwen, ").removeprefix("no mask") or "none"
    return lambda: tiny.transformer(num_layers=2), _batch(mask), QwenImageAttnProcessor


@pytest.mark.parametrize("device", BACKENDS, indirect=True)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_equal_their_stock_processors(family, device):
    make, batch, processor = FAMILIES[family]
    exact = _exact(make, batch())
    model = make().to(device, torch.bfloat16)
    inputs = _to(tiny.cast(batch(), torch.bfloat16), device)
    stock = _run(model, inputs)
    model.set_attn_processor(processor())
    assert_accurate(_run(model, inputs), exact.to(device), stock)


@pytest.mark.parametrize(("make", "batch", "processor"), [
    (tiny.flux, tiny.flux_batch, FluxAttnProcessor), (tiny.sd3, tiny.sd3_batch, SD3AttnProcessor),
    (lambda: tiny.sd3(qk_norm=None, dual_attention_layers=()), tiny.sd3_batch, SD3AttnProcessor)],
    ids=["flux", "sd3.5", "sd3 medium"])
def test_other_families_are_close_in_single_precision(make, batch, processor):
    model = make()
    stock = _run(model, batch())
    model.set_attn_processor(processor())
    before = _calls("joint_attention")
    assert_accurate(_run(model, batch()), _exact(make, batch()), stock)
    assert _calls("joint_attention") == before + sum(getattr(m, "processor", None) is not None for m in model.modules())


def _calls(op):
    return backend.report().get(op, {"calls": 0})["calls"]


def test_fused_projections_of_flux():
    model = tiny.flux()
    stock = _run(model, tiny.flux_batch())
    model.fuse_qkv_projections()
    model.set_attn_processor(FluxAttnProcessor())
    assert_accurate(_run(model, tiny.flux_batch()), _exact(tiny.flux, tiny.flux_batch()), stock)


@pytest.mark.parametrize("processor", [FluxAttnProcessor, SD3AttnProcessor])
def test_other_families_refuse_masks(processor):
    with pytest.raises(ValueError, match=r"attention_mask: expected None, got a mask of shape \[1, 4\]"):
        processor()(None, torch.zeros(1, 2, 64), attention_mask=torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_text_of_several_samples_may_hold_anything(dtype):
    """On a CPU: attention over packed projections, with a mask whose holes are anywhere."""
    batch, model = tiny.cast(tiny.batch(), dtype), tiny.transformer(2).to(dtype)
    batch["encoder_hidden_states_mask"][:, 1] = 0
    with torch.no_grad():
        expected = tiny.transformer(2).double()(**tiny.cast(batch, torch.float64), return_dict=False)[0]
        stock = model(**batch, return_dict=False)[0]
        found = pydit.accelerate(model)(**batch, return_dict=False)[0]
        holes = batch["encoder_hidden_states_mask"][..., None] == 0
        text = batch["encoder_hidden_states"].masked_fill(holes, torch.nan)
        assert torch.equal(model(**{**batch, "encoder_hidden_states": text}, return_dict=False)[0], found)
    assert_accurate(found, expected, stock)
