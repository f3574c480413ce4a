"""IP-adapters of FLUX.1: processors that pipelines set and take away, on accelerated, exact and pruned models."""

import re
import warnings

import pytest
import torch
from diffusers.models.transformers import transformer_flux

import pydit
from pydit.errors import UserError
from pydit.plan import PruningPlan
from tests.inference.test_changes import rows, run
from tests.models import tiny


def ip_adapter(model):
    """As pipelines load it: other processors in the dual blocks, new ones of the same class in the single blocks."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"{block}.to_{which}_ip.{name}": torch.randn(shape, generator=generator) * 0.3
               for block in range(2) for which in "kv" for name, shape in (("weight", (64, 24)), ("bias", (64,)))}
    projection = {"proj.weight": torch.randn(96, 16, generator=generator), "proj.bias": torch.zeros(96),
                  "norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return model


def test_an_ip_adapter_of_flux():
    def batch():
        image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
        return {**tiny.flux_batch(), "joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}

    def adapted(backend=None):
        stock = ip_adapter(tiny.flux())
        if backend is not None:
            stock.set_attention_backend(backend)
        return stock

    expected = run(adapted(), batch())
    kind = "FluxIPAdapterAttnProcessor"
    for make, reason in ((lambda: pydit.accelerate(ip_adapter(tiny.flux())), f"no fused form of {kind}"),
                         (lambda: ip_adapter(pydit.accelerate(tiny.flux())), f"{kind} was set after pydit.accelerate")):
        model = make()
        assert rows(model, "attention") == {("pydit", ""): 2, ("stock", reason): 2}
        tiny.assert_as_stock(run(model, batch()), adapted, batch())
        model.set_attention_backend("_native_math")
        assert sum(count for (path, _), count in rows(model, "attention").items() if path == "stock") == 4
        tiny.assert_as_stock(run(model, batch()), lambda: adapted("_native_math"), batch())
        model.reset_attention_backend()
        tiny.flux().set_attention_backend("native")  # the choice above is global in diffusers
        pydit.restore(model)
        assert {type(p).__module__ for p in model.attn_processors.values()} == {transformer_flux.__name__}
        assert torch.equal(run(model, batch()), expected)


def test_an_ip_adapter_of_flux_with_exact_blocks():
    """Loading and unloading one makes processors anew, without what these carry."""
    batch = tiny.flux_batch()
    with_image = {**batch, "joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}}
    model, stock = tiny.flux(), tiny.flux()
    pydit.accelerate(model, exact=True)
    for one in (model, stock):
        ip_adapter(one)
    assert torch.equal(run(model, with_image), run(stock, with_image))
    for one in (model, stock):  # as pipelines unload it
        one.encoder_hid_proj, one.config.encoder_hid_dim_type = None, None
        one.set_attn_processor({name: transformer_flux.FluxAttnProcessor() if "IPAdapter" in type(processor).__name__
                                else type(processor)() for name, processor in one.attn_processors.items()})
    assert torch.equal(run(model, batch), run(stock, batch))
    assert torch.equal(run(pydit.restore(model), batch), run(tiny.flux(), batch))


def test_an_ip_adapter_of_a_pruned_model():
    """It numbers the teacher's layers: pruned with them, or refused where numbers would be another layer's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merged = pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, [(0, 1)]))
        thinned = pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[1]))
    with pytest.raises(UserError, match="load_ip_adapter: expected a model of as many layers as the adapter"):
        ip_adapter(merged)
    batch = {**tiny.flux_batch(), "joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}}
    before = run(pydit.prune(ip_adapter(tiny.flux()), PruningPlan("flux.1", 4, [(0, 1)])), batch)
    assert not torch.allclose(before, run(merged, tiny.flux_batch()), rtol=1e-2)
    ip_adapter(thinned)


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize(("family", "fields", "without"), [
    ("flux.1", {"affine": [0]}, [0]), ("flux.1", {"single_stream": (1, 1)}, [1]), ("sd3.5", {"affine": [1]}, [1]),
    ("sd3.5", {"single_stream": 2}, [2]), ("sd3.5", {"text_linear": [(0, 1)], "dead_tensors": False}, [1, 2])])
def test_an_ip_adapter_of_blocks_without_their_attention(family, fields, without):
    """An affine block would hand its layer of the adapter to the next block without a word; others fail in a forward."""
    teacher, depth = (tiny.flux(), 4) if family == "flux.1" else (tiny.sd3(), 3)
    model = pydit.prune(teacher, PruningPlan(family, depth, **fields))
    with pytest.raises(UserError, match=f"load_ip_adapter: expected dual-stream blocks .*, got blocks {re.escape(str(without))}"):
        ip_adapter(model)


@pytest.mark.filterwarnings("ignore:.*start as the identity")
@pytest.mark.parametrize(("fields", "lost"), [({"affine": [0]}, [0]), ({"single_stream": (0, 1)}, [0, 1]),
                                              ({"linear_ffn": [1]}, [1]), ({"linear_ffn": [3]}, None)])
def test_an_ip_adapter_that_a_plan_leaves_out_is_named(fields, lost):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student = pydit.prune(ip_adapter(tiny.flux()), PruningPlan("flux.1", 4, **fields))
    said = [str(one.message) for one in caught if "IP-adapter" in str(one.message)]
    assert said == ([] if lost is None else [f"the teacher's IP-adapter is left out of blocks {lost} of the student, which are "
                                             "thinned out; the others keep it"])
    kept = {name.split(".")[1] for name, _ in student.named_parameters() if ".processor." in name}
    assert kept == {str(k) for k in range(2) if k not in (lost or ())}


@pytest.mark.filterwarnings("ignore:.*start as the identity")
def test_an_ip_adapter_is_not_for_layers_of_the_teacher():
    model = pydit.prune(tiny.flux(), PruningPlan("flux.1", 4, linear_ffn=[1]))
    model.set_active([])
    with pytest.raises(UserError, match="load_ip_adapter: .* got layers of the teacher that run in place of some"):
        ip_adapter(model)
    model.set_active(model.plan.units)
    ip_adapter(model)
