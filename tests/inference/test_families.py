"""Every family that accelerate takes: ControlNets, pipelines, compilation, and that no op runs eager without a reason."""

import types

import pytest
import torch
from diffusers import FluxControlNetModel, QwenImageControlNetModel, SD3ControlNetModel
from torch._dynamo.testing import CompileCounter

import pydit
from pydit import backend, ops
from pydit.testing import assert_accurate
from tests.models import tiny


def call(model, batch):
    with torch.no_grad():
        out = model(**batch, return_dict=False)
    out = out if isinstance(out, (list, tuple)) else [out]
    return [x for part in out if part is not None for x in (part if isinstance(part, (list, tuple)) else [part])]


def qwen_control():
    torch.manual_seed(3)
    config = {k: v for k, v in tiny.transformer(1).config.items()
              if k in ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
                       "joint_attention_dim", "axes_dims_rope")}
    return _loud(QwenImageControlNetModel(**config, num_layers=2))


def flux_control():
    torch.manual_seed(3)
    return _loud(FluxControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=[8, 12, 12]))


def sd3_control():
    torch.manual_seed(3)
    return _loud(SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=64, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm"))


def _loud(model):
    """ControlNets begin with projections of zeros."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


CONTROLNETS = {  # controlnet, its transformer, batch, the names of the control image and of the residuals
    "qwen-image": (qwen_control, lambda: tiny.transformer(2), tiny.batch, ["controlnet_block_samples"]),
    "flux": (flux_control, tiny.flux, tiny.flux_batch, ["controlnet_block_samples", "controlnet_single_block_samples"]),
    "sd3.5": (sd3_control, tiny.sd3, tiny.sd3_batch, ["block_controlnet_hidden_states"])}


def cond(batch):
    return {**batch, "controlnet_cond": batch["hidden_states"] * 0.5}


@pytest.mark.parametrize("family", CONTROLNETS)
def test_controlnets_alone_and_in_a_pipeline(family):
    make, transformer, batch, names = CONTROLNETS[family]
    inputs = batch()
    exact = call(make().double(), tiny.cast(cond(inputs), torch.float64))
    model, low = make().bfloat16(), tiny.cast(cond(inputs), torch.bfloat16)
    stock = call(model, low)
    pydit.accelerate(model)
    assert {row["path"] for row in pydit.report(model)["model"]["blocks"]} == {"pydit"}
    for found, right, eager in zip(call(model, low), exact, stock, strict=True):
        assert_accurate(found, right, eager)
    assert all(map(torch.equal, call(pydit.restore(model), low), stock))
    pipe = types.SimpleNamespace(transformer=transformer(), controlnet=make())
    residuals = call(pipe.controlnet, cond(inputs))
    split = [residuals[:1], residuals[1:]] if len(names) == 2 else [residuals]
    expected = call(pipe.transformer, {**inputs, **dict(zip(names, split, strict=True))})
    assert pydit.accelerate(pipe) is pipe
    rows = pydit.report(pipe)["model"]
    assert {row["path"] for row in rows["controlnets"][0]["blocks"]} == {row["path"] for row in rows["blocks"]} == {"pydit"}
    fast = call(pipe.controlnet, cond(inputs))
    split = [fast[:1], fast[1:]] if len(names) == 2 else [fast]
    torch.testing.assert_close(call(pipe.transformer, {**inputs, **dict(zip(names, split, strict=True))}), expected,
                               rtol=1e-4, atol=1e-4)
    pydit.restore(pipe)
    assert all(map(torch.equal, call(pipe.controlnet, cond(inputs)), residuals))


def test_a_compiled_controlnet_is_taken_along():
    pipe = types.SimpleNamespace(transformer=tiny.transformer(2), controlnet=torch.compile(qwen_control(), backend="eager"))
    pydit.accelerate(pipe)
    assert {row["path"] for row in pydit.report(pipe)["model"]["controlnets"][0]["blocks"]} == {"pydit"}
    pydit.restore(pipe)
    assert not [m for m in pipe.controlnet.modules() if type(m).__module__.startswith("pydit")]


VARIANTS = {  # model, batch
    "qwen-image": (lambda: tiny.transformer(2), tiny.batch),
    "qwen-image edit": (lambda: tiny.transformer(2, zero_cond_t=True),
                        lambda: {**tiny.batch(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3}),
    "qwen-image layered": (
        lambda: tiny.transformer(2, use_layer3d_rope=True, use_additional_t_cond=True),
        lambda: {**tiny.batch(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3, "additional_t_cond": torch.tensor([0, 1, 0])}),
    "flux": (tiny.flux, tiny.flux_batch),
    "flux with guidance": (lambda: tiny.flux(guidance_embeds=True),
                           lambda: {**tiny.flux_batch(), "guidance": torch.tensor([3.5, 4.0])}),
    "sd3.5 medium": (tiny.sd3, tiny.sd3_batch),
    "sd3.5 large": (lambda: tiny.sd3(dual_attention_layers=()), tiny.sd3_batch)}


@pytest.mark.parametrize("family", VARIANTS)
def test_no_op_runs_eager_without_a_reason(family, device, monkeypatch):
    """And every part of the model is ours."""
    make, batch = VARIANTS[family]
    model = make().to(device, torch.bfloat16).requires_grad_(False)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tiny.cast(batch(), torch.bfloat16).items()}
    stock = call(model, inputs)
    pydit.accelerate(model)
    monkeypatch.setattr(backend, "_taken", {})
    found = call(model, inputs)
    torch.testing.assert_close(found, stock, rtol=0.05, atol=0.1)
    report = pydit.report(model)
    rows = report.pop("model")
    expected = {"ada_layer_norm", "joint_attention"}
    if ops.in_one_launch(found[0].to(torch.bfloat16)):
        expected |= {"joint_qkv", "joint_linear_gelu", "joint_linear_gated_residual"}
        assert not {"projections", "joint_qk_norm_rope", "gated_residual"} & report.keys()
    else:
        expected |= {"gated_residual", "gated_residual_ada_layer_norm", "joint_qk_norm_rope", "linear_gelu",
                     "projections"}
    assert expected <= report.keys()
    kernels = backend.info()["default_backend"][device.type] != "reference"
    for op, row in report.items():
        assert row["calls"] > 0 and (row["reason"] or row["path"] == "cuda"), op
        if kernels and op not in ("linear_gelu", "linear_residual", "projections"):
            assert row["path"] in ("sim", "cuda"), op
    for kind in ("attention", "blocks"):
        assert {row["path"] for row in rows[kind]} == {"pydit"}
    assert all(row["reason"] for kind in ("modulation", "graphs") for row in rows[kind])


def test_compile_repeated_blocks():
    for make, batch in ((lambda: tiny.transformer(3), tiny.batch(masked=False)), (tiny.flux, tiny.flux_batch())):
        model = pydit.accelerate(make())
        expected = call(model, batch)
        graphs = []  # as many as of the stock model: one for each kind of block and each layout of its inputs
        for compiled in (make(), model):
            torch._dynamo.reset()
            counter = CompileCounter()
            compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
            found = call(compiled, batch)
            graphs.append(counter.frame_count)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert graphs[0] == graphs[1] >= 1
