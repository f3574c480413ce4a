"""The block contract of Qwen-Image, checked against the model's own forward."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from pydit.errors import UserError
from pydit.models import get_adapter
from tests.models import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.transformer(5)


def rerun(model, capture, start, stop):
    """Run blocks start..stop-1 by hand from the captured state."""
    adapter = get_adapter(model)
    with torch.no_grad():
        image, text = capture.states[start]
        for block in adapter.blocks(model)[start:stop]:
            image, text = adapter.call_block(block, image, text, capture.kwargs)
    return image, text


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}])
@pytest.mark.parametrize("masked", [True, False])
def test_captured_states_chain(config, masked):
    model = tiny.transformer(4, **config)
    capture = get_adapter(model).capture(model, tiny.batch(masked=masked), range(5))
    assert list(capture.states) == [0, 1, 2, 3, 4]
    for start, stop in ((0, 1), (1, 3), (0, 4)):
        for got, expected in zip(rerun(model, capture, start, stop), capture.states[stop], strict=True):
            assert torch.equal(got, expected)
    assert capture.states[0][0].shape == (3, 16, 64) and capture.states[0][1].shape == (3, 7, 64)


def test_last_boundary_is_what_the_head_reads(model):
    batch = tiny.batch()
    capture = get_adapter(model).capture(model, batch, [5])
    seen = []
    handle = model.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    handle.remove()
    assert torch.equal(capture.states[5][0], seen[0])
    assert set(capture.kwargs) == {"encoder_hidden_states_mask", "temb", "image_rotary_emb", "joint_attention_kwargs",
                                   "modulate_index"}


def test_stops_early_and_leaves_no_hooks(model):
    ran = []
    handles = [block.register_forward_hook(lambda m, a, o, k=k: ran.append(k)) for k, block in
               enumerate(model.transformer_blocks)]
    before = tiny.fingerprint(model)
    capture = get_adapter(model).capture(model, tiny.batch(), (1, 2))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1] and list(capture.states) == [1, 2]
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.transformer_blocks)
    assert tiny.same(before, model.state_dict())
    assert not capture.states[1][0].requires_grad


def test_blocks_called_positionally(model):
    """Gradient checkpointing, and some callers, pass block arguments by position."""
    class Positional(type(model)):
        def forward(self, **batch):
            capture = get_adapter(model).capture(model, batch, [0])
            image, text = capture.states[0]
            names = get_adapter(model).block_io.inputs[2:]
            for block in self.transformer_blocks:
                text, image = block(image, text, *(capture.kwargs[name] for name in names))

    positional = Positional(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    positional.load_state_dict(model.state_dict())
    batch = tiny.batch()
    adapter = get_adapter(positional)
    assert adapter.family == "qwen-image"
    got, expected = adapter.capture(positional, batch, (2, 5)), adapter.capture(model, batch, (2, 5))
    for k in (2, 5):
        for a, b in zip(got.states[k], expected.states[k], strict=True):
            assert torch.equal(a, b)
    assert got.kwargs.keys() == expected.kwargs.keys()


def test_hooks_are_removed_when_the_forward_fails(model):
    with pytest.raises(KeyError, match="no such thing"):
        def fail(*_):
            raise KeyError("no such thing")
        handle = model.transformer_blocks[0].register_forward_hook(fail)
        try:
            get_adapter(model).capture(model, tiny.batch(), [3])
        finally:
            handle.remove()
    assert not model.transformer_blocks[3]._forward_pre_hooks


@pytest.mark.parametrize("boundaries", [[], [6], [-1, 2]])
def test_bad_boundaries(model, boundaries):
    with pytest.raises(UserError, match="boundaries: expected numbers in 0..5"):
        get_adapter(model).capture(model, tiny.batch(), boundaries)


def test_bad_batch(model):
    with pytest.raises(UserError, match="batch: expected a dict of forward arguments, got tuple"):
        get_adapter(model).capture(model, (tiny.batch(), None), [0])


def test_unknown_model_and_family():
    with pytest.raises(UserError, match="transformer: expected QwenImageTransformer2DModel, .* or a subclass, got Linear"):
        get_adapter(nn.Linear(1, 1))
    with pytest.raises(UserError, match="family: expected one of qwen-image, flux.1, sd3.5, got 'flux'"):
        get_adapter("flux")
    assert get_adapter("qwen-image").family == "qwen-image"


def test_without_diffusers():
    code = ("import sys; sys.modules['diffusers'] = None\n"
            "import pydit, pydit.models, pydit.plan, pydit.pruning, pydit.analysis, pydit.stats\n"
            "try: pydit.models.get_adapter('qwen-image')\n"
            "except pydit.UserError as error: print(error)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "this needs diffusers, which is not installed" in result.stdout, result.stderr


def test_hidden_matrices_are_those_of_attention_and_mlp(model):
    adapter = get_adapter(model)
    names = adapter.hidden_matrices(model)
    per_block = {f"attn.{n}.weight" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                                              "to_add_out")}
    per_block |= {f"{stream}_mlp.net.{n}.weight" for stream in ("img", "txt") for n in ("0.proj", "2")}
    layers = adapter.num_layers(model)
    assert set(names) == {f"transformer_blocks.{k}.{name}" for k in range(layers) for name in per_block}
    assert all(p is dict(model.named_parameters())[name] for name, p in names.items())
