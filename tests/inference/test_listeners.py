"""What users put on, or in the place of, a block's modules takes part as in the stock model, whatever is fused there."""

import pytest
import torch

import pydit
from pydit import backend
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny

FAMILIES = {
    "qwen-image": (lambda: tiny.transformer(2), tiny.batch, "transformer_blocks.0",
                   ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "attn", "attn.norm_q", "attn.norm_added_k",
                    "attn.to_v", "attn.to_out.0", "attn.to_out.1", "img_mlp", "img_mlp.net.0", "txt_mlp.net.2", "img_mod")),
    "edit": (lambda: tiny.transformer(2, zero_cond_t=True),
             lambda: {**tiny.batch(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3}, "transformer_blocks.1",
             ("img_norm1", "img_norm2", "txt_norm1")),
    "thinned": (lambda: pydit.prune(tiny.transformer(4), PruningPlan("qwen-image", 4, text_linear=[(1, 2)],
                                                                     linear_ffn=[3])),
                tiny.batch, "transformer_blocks.3", ("img_norm1", "attn.norm_q", "attn.to_out.0")),
    "linear text FFN": (lambda: pydit.prune(tiny.transformer(2), PruningPlan("qwen-image", 2, linear_text_ffn=[0])),
                        tiny.batch, "transformer_blocks.0", ("img_norm1", "img_norm2", "txt_norm1", "img_mlp")),
    "flux dual": (tiny.flux, tiny.flux_batch, "transformer_blocks.0",
                  ("norm1", "norm1.norm", "norm1.linear", "norm1_context", "norm2", "norm2_context", "attn.norm_k",
                   "attn.to_add_out", "ff", "ff.net.0", "ff_context.net.2")),
    "flux single": (tiny.flux, tiny.flux_batch, "single_transformer_blocks.1",
                    ("norm", "norm.norm", "norm.linear", "attn", "attn.norm_q", "proj_mlp", "act_mlp", "proj_out")),
    "sd3.5": (tiny.sd3, tiny.sd3_batch, "transformer_blocks.0",
              ("norm1", "norm1.norm", "norm1_context", "norm2", "attn2", "attn2.norm_q", "attn.norm_added_q", "ff.net.0")),
    "sd3.5 last": (tiny.sd3, tiny.sd3_batch, "transformer_blocks.2", ("norm1_context", "norm2", "attn.norm_added_k")),
}


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def tilted(x):
    """Every channel by a factor of its own, which no norm undoes."""
    return x * torch.linspace(0.5, 2, x.shape[-1]) if isinstance(x, torch.Tensor) else x


def after(_module, _args, output):
    return tuple(map(tilted, output)) if isinstance(output, tuple) else tilted(output)


def before(_module, args, kwargs):
    args = (tilted(args[0]), *args[1:]) if args else args
    return args, {name: tilted(value) if name == "hidden_states" else value for name, value in kwargs.items()}


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_any_module_of_a_block(family, exact):
    make, batches, block, names = FAMILIES[family]
    batch, stock, wide, model = batches(), make(), make().double(), pydit.accelerate(make(), exact=exact)
    plain, fast = run(stock, batch), run(model, batch)
    for name in names:
        for kind, hook, options in (("forward_hook", after, {}), ("forward_pre_hook", before, {"with_kwargs": True})):
            handles = [getattr(m.get_submodule(f"{block}.{name}"), f"register_{kind}")(hook, **options)
                       for m in (stock, wide, model)]
            expected, right, found = run(stock, batch), run(wide, tiny.cast(batch, torch.float64)), run(model, batch)
            for handle in handles:
                handle.remove()
            assert (expected - plain).abs().max() > 2e-4, (name, kind)
            if exact:
                assert torch.equal(found, expected), (name, kind)
            else:
                assert_accurate(found, right, expected, name=f"{name}, {kind}")
    assert torch.equal(run(model, batch), fast)


@pytest.mark.parametrize("kind", ["layer_norm", "fp32_layer_norm"])
def test_other_norms_of_queries_and_keys(kind, monkeypatch):
    monkeypatch.setattr(backend, "_taken", {})

    def make():
        model = tiny.sd3(qk_norm=kind, dual_attention_layers=())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "attn.norm" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
        return model

    batch, expected = tiny.sd3_batch(), run(make(), tiny.sd3_batch())
    assert not torch.allclose(expected, run(tiny.sd3(dual_attention_layers=()), batch), rtol=1e-3, atol=1e-3)
    tiny.assert_as_stock(run(pydit.accelerate(make()), batch), make, batch)
    assert "in the place of RMSNorm: it is called as it is" in pydit.report()["qk_norm_rope"]["reason"]


def test_norms_that_differ_from_each_other():
    batch, models = tiny.batch(), (tiny.transformer(2), pydit.accelerate(tiny.transformer(2)))
    plain = run(models[0], batch)
    for model in models:
        model.transformer_blocks[0].attn.norm_k.eps = 0.7
        model.transformer_blocks[1].img_norm1.eps = 0.3
        model.transformer_blocks[1].txt_mlp.net[0].approximate = "none"
    expected = run(models[0], batch)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(models[1], batch), expected, rtol=1e-4, atol=1e-4)


class Packed(torch.Tensor):
    """A weight of 8 bits and a scale, as quantizers put in a plain linear layer's place: it has no numbers of its own."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.detach().abs().amax() / 127
        self.values = (weight.detach() / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight, *rest = args
            return func(x, weight.values.to(x.dtype) * weight.scale.to(x.dtype), *rest, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantized weight")


@pytest.mark.parametrize("device", ["reference", "sim"], indirect=True)
@pytest.mark.parametrize("family", ["qwen-image", "flux dual", "sd3.5"])
def test_quantized_weights_multiply_by_themselves(family, device):
    make, batches = FAMILIES[family][:2]
    batch = tiny.cast(batches(), torch.bfloat16)

    def quantized():
        model = make().to(torch.bfloat16).requires_grad_(False)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "_blocks." in name:
                module.weight = torch.nn.Parameter(Packed(module.weight), requires_grad=False)
        return model

    expected = run(quantized(), batch)
    assert not torch.equal(expected, run(make().to(torch.bfloat16), batch))
    model = pydit.accelerate(quantized())
    torch.testing.assert_close(run(model, batch), expected, rtol=0.05, atol=0.1)
    assert torch.equal(run(pydit.restore(model), batch), expected)
