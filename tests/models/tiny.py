"""Small random transformers of each family and batches for them."""

import copy

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from torch.utils import _pytree as pytree

from pydit.testing import assert_accurate

_MADE = {}  # copies of what has been made once cost a third


def transformer(num_layers=6, seed=0, **config):
    """Width 64 (2 heads of 32), float32; gates are enlarged so that every block does something."""
    key = repr((num_layers, seed, sorted(config.items())))
    if key not in _MADE:
        _MADE[key] = _transformer(num_layers, seed, config), torch.get_rng_state()
    model, state = _MADE[key]
    torch.set_rng_state(state)  # as if it had been made now
    return copy.deepcopy(model)


def _transformer(num_layers, seed, config):
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(**{
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": num_layers, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12), **config})
    with torch.no_grad():
        for block in model.transformer_blocks:
            for modulation in (block.img_mod, block.txt_mod):
                modulation[1].bias.normal_(std=0.5)
    return model.eval()


def batch(images=3, seed=0, text=7, masked=True):
    """Forward arguments for 4 x 4 image tokens and up to ``text`` text tokens, some of them padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, text + 1, (images, 1), generator=generator)
    return {
        "hidden_states": torch.randn(images, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(images, text, 24, generator=generator),
        "encoder_hidden_states_mask": (torch.arange(text) < lengths).long() if masked else None,
        "timestep": torch.rand(images, generator=generator),
        "img_shapes": [[(1, 4, 4)]] * images,
    }


def flux(seed=0, **config):
    """FLUX.1 of 2 dual and 2 single blocks, width 64, float32."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16,
        "axes_dims_rope": (8, 12, 12), **config}).eval()


def flux_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij"), -1).flatten(0, 1)
    return {"hidden_states": torch.randn(2, 20, 4, generator=generator),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
            "pooled_projections": torch.randn(2, 16, generator=generator), "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": torch.nn.functional.pad(image, (1, 0)), "txt_ids": torch.zeros(7, 3)}


def sd3(seed=0, **config):
    """SD3.5 of 3 blocks, the first two with the second attention, width 64, float32."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(**{
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 64, "pooled_projection_dim": 16,
        "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
        **config}).eval()


def sd3_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
            "pooled_projections": torch.randn(2, 16, generator=generator), "timestep": torch.tensor([300.0, 700.0])}


def cast(arguments, dtype):
    """Forward arguments with every float tensor in ``dtype``, those inside of lists and dicts too."""
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value,
                                arguments)


def assert_as_stock(found, make, batch, run=None):
    """``found`` under the tolerance policy, against the stock model that ``make`` makes, in float64 and as it is.

    run : (model, batch) -> tensor; None is the model's first output.
    """
    run = run or (lambda model, batch: model(**batch, return_dict=False)[0])
    with torch.no_grad():
        assert_accurate(found, run(make().double(), cast(batch, torch.float64)), run(make(), batch))


def fingerprint(model):
    """Copies of all parameters and buffers by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
