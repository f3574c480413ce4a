"""Accelerated float32 models under torch.autocast, where tensors of two dtypes meet in every block."""

import pytest
import torch

import pydit
from pydit.models.attention import QwenImageAttnProcessor
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny

PLAN = PruningPlan("qwen-image", 6, text_linear=[(1, 2)], linear_ffn=[3], linear_text_ffn=[0], affine=[4], single_stream=5)
MODELS = {"qwen-image": (lambda: tiny.transformer(2), tiny.batch),
          "edit": (lambda: tiny.transformer(2, zero_cond_t=True),
                   lambda: {**tiny.batch(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3}),
          "thinned": (lambda: pydit.prune(tiny.transformer(6), PLAN), tiny.batch),
          "flux": (tiny.flux, tiny.flux_batch), "sd3.5": (tiny.sd3, tiny.sd3_batch)}


def run(model, batch, dtype):
    with torch.autocast("cpu", dtype=dtype):
        return model(**batch, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize("device", ["reference", "sim"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_within_the_tolerance_policy(name, dtype, device):
    make, batches = MODELS[name]
    model, batch = make(), batches()
    with torch.no_grad():
        exact = make().double()(**tiny.cast(batch, torch.float64), return_dict=False)[0]
        stock = run(model, batch, dtype)
    pydit.accelerate(model)
    assert_accurate(run(model, batch, dtype), exact, stock)  # with gradients
    with torch.no_grad():
        assert_accurate(run(model, batch, dtype), exact, stock)
    assert "torch.autocast" in pydit.report()["ada_layer_norm"]["reason"]
    with torch.no_grad():
        pydit.accelerate(model, exact=True)
        assert torch.equal(run(model, batch, dtype), stock)


def test_gradients():
    """Training in mixed precision: weights in float32, products in bfloat16."""
    batch, grads = tiny.batch(), []
    for dtype, fast in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        model = tiny.transformer(2).to(dtype)
        if fast:
            pydit.accelerate(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            out = model(**tiny.cast(batch, dtype), return_dict=False)[0]
        out.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    exact, stock, found = grads
    assert found.keys() == stock.keys() and len(found) > 40
    for name, grad in found.items():
        assert_accurate(grad, exact[name], stock[name], name=name)


def test_a_processor_without_a_stock_one_behind_it():
    model, batch = tiny.transformer(2), tiny.batch()
    with torch.no_grad():
        exact = tiny.transformer(2).double()(**tiny.cast(batch, torch.float64), return_dict=False)[0]
    stock = run(model, batch, torch.bfloat16)
    model.set_attn_processor(QwenImageAttnProcessor())
    assert_accurate(run(model, batch, torch.bfloat16), exact, stock)


@pytest.mark.parametrize("name", ["qwen-image", "flux", "sd3.5"])
def test_shapes_on_the_meta_device_which_knows_no_autocast(name):
    make, batches = MODELS[name]
    batch = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in batches().items()}
    expected = make()(**batches(), return_dict=False)[0]
    found = pydit.accelerate(make().to("meta"))(**batch, return_dict=False)[0]
    assert found.is_meta and found.shape == expected.shape


@pytest.mark.slow  # importing the compiler
def test_compiles_whole():
    batch, model = tiny.batch(masked=False), pydit.accelerate(tiny.transformer(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(run(compiled, batch, torch.bfloat16), run(compiled, batch, torch.bfloat16))
        exact = tiny.transformer(2).double()(**tiny.cast(batch, torch.float64), return_dict=False)[0]
        stock = run(tiny.transformer(2), batch, torch.bfloat16)
        assert_accurate(run(compiled, batch, torch.bfloat16), exact, stock)
