"""A tiny Qwen-Image transformer, its pruned student and a stream of batches that differ in length and noise."""

import copy
import functools

import torch
from diffusers import QwenImageTransformer2DModel

import pydit
from pydit import PruningPlan

GRID = 3
TEXT = 5
JOINT = 12


def make_teacher(layers=6, *, seed=0, dtype=torch.float32, heads=2):
    """A random transformer whose blocks do something: gates and biases are far from zero."""
    return copy.deepcopy(_made(layers, seed, dtype, heads))


@functools.cache
def _made(layers, seed, dtype, heads):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=layers, attention_head_dim=16,
            num_attention_heads=heads, joint_attention_dim=JOINT, axes_dims_rope=(4, 6, 6))
        with torch.no_grad():
            for block in teacher.transformer_blocks:
                for mod in (block.img_mod[1], block.txt_mod[1]):
                    mod.bias.normal_(std=0.5)
    return teacher.to(dtype).eval()


def make_pair(intervals=((1, 2), (4, 5)), **kwargs):
    """(teacher, student) with the student's blocks copied from the first layer of each interval."""
    teacher = make_teacher(**kwargs)
    plan = PruningPlan.from_intervals(len(teacher.transformer_blocks), list(intervals))
    return teacher, pydit.prune(teacher, plan, init="first")


def make_batch(number, *, size=2, padding=True, dtype=torch.float32):
    """Batch ``number`` of the stream: always the same, as (forward arguments, target)."""
    generator = torch.Generator().manual_seed(1000 + number)
    mask = None
    if padding:
        lengths = torch.tensor([TEXT - index % 3 for index in range(size)])
        mask = torch.arange(TEXT) < lengths[:, None]
    batch = {
        "hidden_states": torch.randn(size, GRID * GRID, 16, generator=generator).to(dtype),
        "timestep": torch.rand(size, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(size, TEXT, JOINT, generator=generator).to(dtype),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, GRID, GRID)]] * size,
    }
    return batch, torch.randn(size, GRID * GRID, 16, generator=generator).to(dtype)


def stream(start=0, **kwargs):
    """An endless iterator from batch ``start`` on; pass the function itself as ``batches``."""
    while True:
        yield make_batch(start, **kwargs)
        start += 1


def weights(model):
    """A copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before, model):
    """Names of the parameters that differ from ``before``."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
