"""accelerate(exact=True): eager's bits, from fewer launches where the order of operations allows."""

import copy

import pytest
import torch

import pydit
from pydit import ops
from pydit.models import exact
from tests.models import tiny

FAMILIES = {"qwen-image": (lambda: tiny.transformer(2), tiny.batch),
            "qwen-image edit": (lambda: tiny.transformer(2, zero_cond_t=True),
                                lambda: {**tiny.batch(), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3}),
            "flux": (tiny.flux, tiny.flux_batch), "sd3.5": (tiny.sd3, tiny.sd3_batch)}


def run(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


def on(device, batch, dtype):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in tiny.cast(batch, dtype).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_last_bit(family, dtype, device):
    make, batch = FAMILIES[family]
    model, inputs = make().to(device, dtype), on(device, batch(), dtype)
    stock = run(model, inputs)
    pydit.accelerate(model, exact=True)
    for _ in range(2):  # the first time the self-check runs both, then the fused form alone
        assert torch.equal(run(model, inputs), stock)
    rows = pydit.report(model)["model"]
    assert all(row["reason"] for row in (*rows["blocks"], *rows["attention"]))
    if family != "qwen-image edit":
        found = {row["op"]: row for row in rows["exact"]}
        assert found.keys() == {"gated_residual", "modulate", "projections"}
        assert all(row["path"] == "pydit" or row["reason"] for row in found.values())
    assert torch.equal(run(pydit.restore(model), inputs), stock)


def test_kernels_round_where_eager_does(device, kernel_only):
    """The fused forms are used, not only allowed."""
    model, inputs = tiny.transformer(1).to(device, torch.bfloat16), on(device, tiny.batch(), torch.bfloat16)
    pydit.accelerate(model, exact=True)
    run(model, inputs)
    paths = {row["op"]: row["path"] for row in pydit.report(model)["model"]["exact"]}
    assert paths["modulate"] == paths["gated_residual"] == "pydit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exact_gated_residual(dtype, device):
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 37, device=device).to(dtype) for _ in range(2))
    gate, rows = torch.randn(2, 37, device=device).to(dtype), torch.randn(2, 2, 37, device=device).to(dtype)
    assert torch.equal(ops.gated_residual(x, y, gate, exact=True), x + gate[:, None] * y)
    assert torch.equal(ops.gated_residual(gate[:, None].expand(2, 3, 37), y, gate, exact=True),
                       gate[:, None] + gate[:, None] * y)
    expected = torch.cat((x[:, :1] + rows[:, :1] * y[:, :1], x[:, 1:] + rows[:, 1:] * y[:, 1:]), 1)
    assert torch.equal(ops.gated_residual(x, y, rows, split=1, exact=True), expected)
    if dtype == torch.bfloat16:
        assert not torch.equal(ops.gated_residual(x, y, gate), x + gate[:, None] * y)


def test_a_form_with_other_bits_is_dropped(monkeypatch):
    """One bit in one element, found at the first use of each signature; the result is eager's all the same."""
    monkeypatch.setenv("PYDIT_BACKEND", "sim")
    model, batch = tiny.transformer(2), tiny.batch()
    stock = run(model, batch)
    right = ops.gated_residual

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        out[-1, -1, -1] = torch.nextafter(out[-1, -1, -1], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(exact.ops, "gated_residual", wrong)
    pydit.accelerate(model, exact=True)
    for _ in range(2):
        assert torch.equal(run(model, batch), stock)
    rows = [row for row in pydit.report(model)["model"]["exact"] if row["op"] == "gated_residual"]
    assert rows == [{"op": "gated_residual", "path": "stock", "count": 2,
                     "reason": "the self-check found other bits than eager's"}]
    assert torch.equal(run(copy.deepcopy(model), batch), stock)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["qwen-image", "flux", "sd3.5"])
def test_a_checkpointed_first_step(family, adapter, monkeypatch):
    """The self-check leaves neither saved tensors nor random numbers drawn, which recomputation would do without."""
    monkeypatch.setenv("PYDIT_BACKEND", "sim")
    make, batch = FAMILIES[family]

    def gradients(model):
        if adapter:
            peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'pydit[train]')")
            torch.manual_seed(2)
            model.requires_grad_(False)
            model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], lora_dropout=0.5,
                                              init_lora_weights=False))
        model.train().enable_gradient_checkpointing()
        torch.manual_seed(3)
        model(**batch(), return_dict=False)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, torch.get_rng_state()

    expected, state = gradients(make())
    found, left = gradients(pydit.accelerate(make(), exact=True))
    assert found.keys() == expected.keys() and torch.equal(left, state)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)
