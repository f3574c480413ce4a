"""Accelerated models against stock ones, what stays stock and why, and the way back."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pydit
from pydit.errors import UserError
from pydit.models import attention, projections
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
    model.transformer_blocks[1].forward = lambda *args, **kwargs: None  # by nothing whose way of doing it is known
    pydit.accelerate(model)
    rows = pydit.report(model)["model"]
    assert {"path": "stock", "reason": "set_attention_backend chose native", "count": 1} in rows["attention"]
    assert any("has replaced the block's forward" in row["reason"] for row in rows["blocks"])
    assert paths(model, "attention") == {"stock": 1, "pydit": 1} and paths(model, "blocks") == {"stock": 1, "pydit": 1}


@pytest.mark.parametrize("pruned", [False, True])
def test_two_modulation_rows(device, pruned):
    """One target size in the batch: fused, two rows in one launch. Several: the stock operations."""
    def make():
        model = tiny.transformer(3, zero_cond_t=True)
        if not pruned:
            return model
        with pytest.warns(UserWarning, match="start as the identity"):
            return pydit.prune(model, PruningPlan("qwen-image", 3, linear_ffn=[1], linear_text_ffn=[0]).lean())

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


class CountOps(TorchDispatchMode):
    """Operations that do work: views and allocations are left out, one of ours counts as one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in ("empty", "empty_like", "new_empty", "detach", "_unsafe_view"):
            self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def ops_per_block(model, batch, shorter):
    """From two depths, so that what is outside the blocks drops out."""
    counts = []
    for one in (model, shorter):
        with CountOps() as counter:
            run(one, batch)
        counts.append(len(counter.names))
    return counts[0] - counts[1]


def deepened(family):
    """(a model with n blocks of a kind, its inputs in bfloat16)."""
    make, batch = {
        "qwen-image": (lambda n: tiny.transformer(n), tiny.batch(masked=False)),
        "flux": (lambda n: tiny.flux(num_layers=n), tiny.flux_batch()),
        "flux single": (lambda n: tiny.flux(num_single_layers=n), tiny.flux_batch()),
        "sd3.5": (lambda n: tiny.sd3(num_layers=n, dual_attention_layers=()), tiny.sd3_batch()),
        "sd3.5 medium": (lambda n: tiny.sd3(num_layers=n, dual_attention_layers=range(n)), tiny.sd3_batch())}[family]
    return (lambda n: make(n).bfloat16().requires_grad_(False)), tiny.cast(batch, torch.bfloat16)


# Operations of a block, stock (as diffusers' facts count them) and accelerated. Most that remain are matrix products.
@pytest.mark.parametrize("family, stock, fused", [("qwen-image", 92, 20), ("flux", 96, 20), ("flux single", 49, 11),
                                                  ("sd3.5", 83, 20)])
def test_operations_of_a_block(family, stock, fused):
    make, batch = deepened(family)
    found = ops_per_block(make(3), batch, make(2))
    mine = ops_per_block(pydit.accelerate(make(3)), batch, pydit.accelerate(make(2)))
    print(family, found, mine)
    assert found >= 0.8 * stock and mine <= fused


# Where this package's matrix product runs, every operation but those of the modulation is one launch of ours.
@pytest.mark.parametrize("device", ["sim"], indirect=True)
@pytest.mark.parametrize("family, launches", [("qwen-image", 13), ("flux", 13), ("flux single", 9), ("sd3.5", 13),
                                              ("sd3.5 medium", 17)])
def test_launches_of_a_block(family, launches, device):
    make, batch = deepened(family)
    assert ops_per_block(pydit.accelerate(make(3)), batch, pydit.accelerate(make(2))) == launches


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize("device", ["sim"], indirect=True)
@pytest.mark.parametrize("fields, launches", [("linear_ffn", 10), ("linear_text_ffn", 13)])
def test_launches_of_a_thinned_out_block(fields, launches, device):
    make = [pydit.prune(tiny.transformer(n).bfloat16(), PruningPlan("qwen-image", n, **{fields: range(n)})) for n in (3, 2)]
    batch = tiny.cast(tiny.batch(masked=False), torch.bfloat16)
    assert ops_per_block(*[pydit.accelerate(make[0].requires_grad_(False)), batch],
                         pydit.accelerate(make[1].requires_grad_(False))) == launches


@pytest.mark.parametrize("device", ["sim"], indirect=True)
def test_an_adapter_on_one_layer_leaves_the_others_in_one_launch(device):
    """And the block computes what it computed."""
    model, batch = tiny.transformer(2).bfloat16().requires_grad_(False), tiny.cast(tiny.batch(), torch.bfloat16)
    expected = run(pydit.accelerate(model), batch)
    for path in ("attn.to_k", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp", "attn"):
        changed = copy.deepcopy(model)
        seen = []
        changed.transformer_blocks[0].get_submodule(path).register_forward_hook(lambda *args, seen=seen: seen.append(1))
        torch.testing.assert_close(run(changed, batch), expected, rtol=0.05, atol=0.05)
        assert len(seen) == 1


def test_modules_that_something_listens_to_are_called():
    """A hook on a layer of the MLP, or an adapter in its place, sees what it would have seen."""
    for family, path in (("qwen", "img_mlp.net.0.proj"), ("qwen", "img_mlp"), ("flux", "proj_mlp")):
        model, batch = (tiny.transformer(2), tiny.batch()) if family == "qwen" else (tiny.flux(), tiny.flux_batch())
        block = model.transformer_blocks[0] if family == "qwen" else model.single_transformer_blocks[0]
        seen = []
        block.get_submodule(path).register_forward_hook(lambda module, args, out, seen=seen: seen.append(out * 2) or out * 2)
        stock = run(model, batch)
        pydit.accelerate(model)
        torch.testing.assert_close(run(model, batch), stock, rtol=1e-4, atol=1e-4)
        assert len(seen) == 2


def test_projections_lie_together_and_come_apart_again(tmp_path):
    """One product for query, key and value; the numbers, names and files stay, whatever moves them."""
    model, batch = tiny.transformer(2).requires_grad_(False), tiny.batch()
    before = tiny.fingerprint(model)
    identities = [id(p) for p in model.parameters()]
    pydit.accelerate(model)
    assert tiny.same(before, model.state_dict()) and [id(p) for p in model.parameters()] == identities
    attn = model.transformer_blocks[0].attn
    x = torch.randn(2, 5, 64)
    assert projections.adjacent(attn, [attn.to_q, attn.to_k, attn.to_v], x) is not None
    together = [part.clone() for part in attention._project(attn, x, "to_q", "to_k", "to_v")]
    for part, linear in zip(together, (attn.to_q, attn.to_k, attn.to_v), strict=True):
        torch.testing.assert_close(part, linear(x).unflatten(-1, (-1, 32)))
    stock = run(model, batch)
    with torch.no_grad():  # a merged adapter writes into the weights
        attn.to_k.weight.mul_(1.5)
    changed = run(model, batch)
    assert not torch.allclose(changed, stock)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded, batch), changed, rtol=1e-4, atol=1e-4)
    attn.to_k.weight.data = attn.to_k.weight.data.clone()  # as offloading leaves it
    assert projections.adjacent(attn, [attn.to_q, attn.to_k, attn.to_v], x) is None
    torch.testing.assert_close(run(model, batch), changed, rtol=1e-4, atol=1e-4)
    model.double().float()
    torch.testing.assert_close(run(model, batch), changed, rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(pydit.accelerate(model))
    torch.testing.assert_close(run(copied, batch), changed, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        copied.transformer_blocks[0].attn.to_q.weight.zero_()
    torch.testing.assert_close(run(model, batch), changed, rtol=1e-4, atol=1e-4)


def test_gradients_of_projections_that_lie_together():
    model, batch = tiny.transformer(2), tiny.batch()
    model(**batch, return_dict=False)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pydit.accelerate(model)(**batch, return_dict=False)[0].square().sum().backward()
    for name, grad in expected.items():
        found = model.get_parameter(name).grad
        if found is not None:
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-3)
    assert model.transformer_blocks[0].attn.to_v.weight.grad.abs().max() > 0
