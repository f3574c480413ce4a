"""A backend that the user chooses for all of diffusers wins over the fused attention, and only while it is chosen."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from torch._dynamo.testing import CompileCounter

import pydit
from pydit import backend
from tests.inference.test_graphs import recorded
from tests.models import tiny

FAMILIES = {"qwen-image": (lambda: tiny.transformer(2), tiny.batch), "flux": (tiny.flux, tiny.flux_batch)}
REASON = "diffusers' attention_backend chose _native_math"


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def attention(model):
    return {(row["path"], row["reason"]) for row in pydit.report(model)["model"]["attention"]}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_of_diffusers_wins_and_is_reported(family, exact, monkeypatch):
    make, batches = FAMILIES[family]
    model, batch = pydit.accelerate(make(), exact=exact), batches()
    fast, before = run(model, batch), attention(model)
    monkeypatch.setattr(backend, "_taken", {})
    with attention_backend("_native_math"):
        found, stock = run(model, batch), run(make(), batch)
        if not exact:
            assert attention(model) == {("stock", REASON)}
            row = pydit.report()["joint_attention"]
            assert (row["path"], row["reason"]) == ("torch", REASON)
        model.set_attention_backend("native")  # the model's own choice comes first
        assert torch.equal(run(model, batch), found) == torch.equal(run(make(), batch), stock)
        model.reset_attention_backend()
        assert torch.equal(run(model, batch), found)
    assert not torch.equal(found, fast)
    if exact:
        assert torch.equal(found, stock)
    else:
        with attention_backend("_native_math"):
            tiny.assert_as_stock(found, make, batch)
    assert torch.equal(run(model, batch), fast) and attention(model) == before


def test_a_reset_ends_the_choice_that_diffusers_leaves_behind():
    native = _AttentionBackendRegistry._active_backend
    model = pydit.accelerate(tiny.transformer(1))
    for _ in range(2):
        model.set_attention_backend("_native_math")
        model.set_attention_backend("_native_cudnn")
        assert _AttentionBackendRegistry._active_backend == "_native_cudnn"  # as in diffusers
        model.reset_attention_backend()
        assert _AttentionBackendRegistry._active_backend is native and attention(model) == {("pydit", "")}
    pydit.restore(model)
    assert not [name for name in vars(model) if "backend" in name]


def test_models_that_ask_no_backend_of_diffusers():
    """SD3's processor calls torch's attention itself, whatever is chosen."""
    model, batch = pydit.accelerate(tiny.sd3()), tiny.sd3_batch()
    fast, stock = run(model, batch), run(tiny.sd3(), batch)
    with attention_backend("_native_math"):
        assert torch.equal(run(tiny.sd3(), batch), stock) and torch.equal(run(model, batch), fast)
        assert attention(model) == {("pydit", "")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_follows(family):
    make, batches = FAMILIES[family]
    model, batch = pydit.accelerate(make()), batches()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    fast = run(compiled, batch)
    with attention_backend("_native_math"):
        tiny.assert_as_stock(run(compiled, batch), make, batch)
        assert not torch.equal(run(compiled, batch), fast)
    assert torch.equal(run(compiled, batch), fast) and counter.frame_count == 2


def test_recordings_are_of_one_backend():
    model, fake = recorded()
    batch = tiny.batch()
    fast = run(model, batch)
    with attention_backend("_native_math"):
        found = run(model, batch)
        assert fake.captures == 2 and not torch.equal(found, fast)
        assert torch.equal(found, run(tiny_in_place(), batch))
    assert torch.equal(run(model, batch), fast) and fake.captures == 2 and fake.replays == 3


def tiny_in_place():
    return pydit.accelerate(tiny.transformer(2).requires_grad_(False))
