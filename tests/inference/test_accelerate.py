"""Accelerated models against stock ones, what stays stock and why, and the way back."""

import copy

import pytest
import torch

import pydit
from pydit.errors import UserError
from pydit.plan import PruningPlan
from pydit.testing import assert_accurate
from tests.models import tiny
from tests.models.test_attention import FAMILIES


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def moved(batch, device, dtype):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in tiny.cast(batch, dtype).items()}


def paths(model, kind):
    return {row["path"]: row["count"] for row in pydit.report(model)["model"][kind]}


@pytest.mark.parametrize("masked", [False, True])
def test_qwen_image_within_the_tolerance_policy(masked, device):
    batch = tiny.batch(masked=masked)
    exact = run(tiny.transformer(3).double(), tiny.cast(batch, torch.float64))
    model = tiny.transformer(3).to(device, torch.bfloat16)
    inputs = moved(batch, device, torch.bfloat16)
    stock = run(model, inputs)
    assert pydit.accelerate(model) is model
    assert_accurate(run(model, inputs), exact.to(device), stock)
    assert paths(model, "attention") == {"pydit": 3} and paths(model, "blocks") == {"pydit": 3}


def test_restore_is_exact_and_accelerating_twice_is_harmless():
    model = tiny.transformer(3)
    names, classes = [n for n, _ in model.named_modules()], [type(m) for m in model.modules()]
    before, batch = tiny.fingerprint(model), tiny.batch()
    stock = run(model, batch)
    pydit.accelerate(pydit.accelerate(model))
    assert [n for n, _ in model.named_modules()] == names and tiny.same(before, tiny.fingerprint(model))
    assert model.transformer_blocks[0].__class__.__name__ == "QwenImageTransformerBlock"
    assert isinstance(model.transformer_blocks[0], classes[names.index("transformer_blocks.0")])
    fast = run(model, batch)
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-4)
    assert not torch.equal(fast, stock)
    assert pydit.restore(model) is model and [type(m) for m in model.modules()] == classes
    assert torch.equal(run(model, batch), stock) and pydit.restore(model) is model


OTHERS = {**{family: (make, batch) for family, (make, batch, _) in FAMILIES.items()},
          "sd3 without second attention": (lambda: tiny.sd3(dual_attention_layers=()), tiny.sd3_batch),
          "sd3 without norms": (lambda: tiny.sd3(qk_norm=None, dual_attention_layers=()), tiny.sd3_batch)}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_within_the_tolerance_policy(family, device):
    make, batch = OTHERS[family]
    exact = run(make().double(), tiny.cast(batch(), torch.float64))
    model = make().to(device, torch.bfloat16)
    inputs = moved(batch(), device, torch.bfloat16)
    stock = run(model, inputs)
    pydit.accelerate(model)
    assert set(paths(model, "attention")) == set(paths(model, "blocks")) == {"pydit"}
    assert_accurate(run(model, inputs), exact.to(device), stock)
    assert torch.equal(run(pydit.restore(model), inputs), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_train_and_compile(family):
    make, batch, _processor = FAMILIES[family]
    model, inputs, grads = make().train(), batch(), []
    for change in (lambda: None, lambda: pydit.accelerate(model), model.enable_gradient_checkpointing):
        change()
        model.zero_grad()
        model(**inputs, return_dict=False)[0].square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() | {name for name in grads[0] if not grads[0][name].any()}
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grads[2][name], grad)
    model.disable_gradient_checkpointing()
    expected = run(model, inputs)
    torch._dynamo.reset()
    out = run(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_chunked_feed_forward_keeps_its_path():
    model, inputs = tiny.sd3(), tiny.sd3_batch()
    stock = run(model, inputs)
    pydit.accelerate(model).enable_forward_chunking(chunk_size=1, dim=0)
    torch.testing.assert_close(run(model, inputs), stock, rtol=1e-4, atol=1e-4)


def test_pruned_and_baked():
    """All three together, undone by one call."""
    teacher = tiny.transformer(5)
    model = pydit.prune(teacher, PruningPlan.from_intervals(5, [(1, 2)]))
    batch = {**tiny.batch(images=1), "timestep": torch.tensor([0.5])}
    stock = run(model, batch)
    pydit.bake_schedule(pydit.accelerate(model), [0.5])
    assert paths(model, "blocks") == {"pydit": 4} and paths(model, "modulation") == {"table": 1}
    torch.testing.assert_close(run(model, batch), stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(pydit.restore(model), batch), stock)
    assert paths(model, "modulation") == {"stock": 1}


def test_what_the_user_chose_stays():
    model = tiny.transformer(2)
    model.transformer_blocks[0].attn.processor._attention_backend = "native"
    model.transformer_blocks[1].forward = model.transformer_blocks[1].forward  # as a hook leaves it
    pydit.accelerate(model)
    rows = pydit.report(model)["model"]
    assert {"path": "stock", "reason": "set_attention_backend chose native", "count": 1} in rows["attention"]
    assert any("hook has replaced" in row["reason"] for row in rows["blocks"])
    assert paths(model, "attention") == {"stock": 1, "pydit": 1} and paths(model, "blocks") == {"stock": 1, "pydit": 1}


@pytest.mark.parametrize("pruned", [False, True])
def test_two_modulation_rows(device, pruned):
    """One target size in the batch: fused, two rows in one launch. Several: the stock operations."""
    def make():
        model = tiny.transformer(3, zero_cond_t=True)
        if not pruned:
            return model
        with pytest.warns(UserWarning, match="start as the identity"):
            return pydit.prune(model, PruningPlan("qwen-image", 3, linear_ffn=[1]).lean())

    for shapes in ([[(1, 2, 4), (1, 2, 4)]] * 3, [[(1, 3, 4), (1, 1, 4)]] * 3,
                   [[(1, 2, 4), (1, 2, 4)], [(1, 1, 4), (1, 3, 4)], [(1, 2, 4), (1, 2, 4)]]):
        batch = {**tiny.batch(), "img_shapes": shapes}
        exact = run(make().double(), tiny.cast(batch, torch.float64))
        model = make().to(device, torch.bfloat16)
        inputs = moved(batch, device, torch.bfloat16)
        stock = run(model, inputs)
        pydit.accelerate(model)
        assert paths(model, "blocks") == {"pydit": 3}
        assert any("differ in size" in row["reason"] for row in pydit.report(model)["model"]["blocks"])
        assert_accurate(run(model, inputs), exact.to(device), stock)
        assert torch.equal(run(copy.deepcopy(model), inputs), run(model, inputs))
        assert torch.equal(run(pydit.restore(model), inputs), stock)
        assert not model._forward_pre_hooks and not hasattr(model.transformer_blocks[0], "_pydit_target")


def test_a_copy_with_two_rows_reads_its_own_batch():
    model = pydit.accelerate(tiny.transformer(2, zero_cond_t=True))
    other = copy.deepcopy(model)
    batch = {**tiny.batch(images=1), "img_shapes": [[(1, 2, 4), (1, 2, 4)]]}
    expected = run(other, batch)
    run(model, {**batch, "img_shapes": [[(1, 1, 4), (1, 3, 4)]]})
    assert torch.equal(run(other, batch), expected)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, batch), expected, rtol=1e-4, atol=1e-4)


def test_single_precision_keeps_stock_attention_where_kernels_run(device, kernel_only):
    model = tiny.transformer(2).to(device)
    batch = moved(tiny.batch(), device, torch.float32)
    stock = run(model, batch)
    pydit.accelerate(model)
    assert "take float16 and bfloat16" in pydit.report(model)["model"]["attention"][0]["reason"]
    torch.testing.assert_close(run(model, batch), stock, rtol=1e-4, atol=1e-4)


def test_exact_changes_nothing_and_says_so():
    model, batch = tiny.transformer(2), tiny.batch()
    stock = run(model, batch)
    pydit.accelerate(model, exact=True)
    assert torch.equal(run(model, batch), stock)
    assert "exact=True" in pydit.report(model)["model"]["blocks"][0]["reason"]


def test_gradients_flow_and_checkpointing_works():
    model, batch = tiny.transformer(2).train(), tiny.batch()
    grads = []
    for change in (lambda: None, lambda: pydit.accelerate(model), model.enable_gradient_checkpointing):
        change()
        model.zero_grad()
        model(**batch, return_dict=False)[0].square().sum().backward()
        grads.append(model.transformer_blocks[0].img_mlp.net[0].proj.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grads[2], grads[1])


def test_compiles_whole():
    model, batch = pydit.accelerate(tiny.transformer(2)), tiny.batch(masked=False)
    expected = run(model, batch)
    torch._dynamo.reset()
    out = run(torch.compile(model, backend="aot_eager", fullgraph=True), batch)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_copies_are_independent():
    model, batch = pydit.accelerate(tiny.transformer(2)), tiny.batch()
    other = copy.deepcopy(model)
    pydit.restore(model)
    assert torch.equal(run(other, batch), run(pydit.accelerate(model), batch))
    assert paths(other, "blocks") == {"pydit": 2}


def test_other_models_are_refused():
    with pytest.raises(UserError, match="transformer: expected QwenImageTransformer2DModel, .* got Linear"):
        pydit.accelerate(torch.nn.Linear(2, 2))
