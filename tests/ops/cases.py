"""Shapes, layouts and independent float64 formulas shared by the op tests.

The formulas use torch.nn.functional and complex numbers, not pydit.ops.reference, so that the reference is under test
as much as the kernels.
"""

import torch
import torch.nn.functional as F
from hypothesis import settings

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, S, C): vector path of every row layout, the element-wise path (odd and unaligned C), C of 1 and 8192, no tokens
SHAPES = [(2, 5, 96), (1, 3, 3072), (1, 2, 8192), (2, 3, 5120), (1, 3, 1536), (3, 4, 33), (1, 2, 1001), (2, 3, 1),
          (1, 1, 8191), (2, 0, 64), (0, 3, 64)]


def tokens(shape, dtype, device, *, generator, layout="contiguous", offset=0.0):
    """A random [B, S, C] tensor in one of the layouts the contract allows."""
    b, s, c = shape
    if layout == "contiguous":
        return (torch.randn(shape, generator=generator) + offset).to(device, dtype)
    if layout == "packed":  # a slice of a wider last dimension, as a view of packed QKV
        return (torch.randn(b, s, 3 * c, generator=generator) + offset).to(device, dtype)[..., c:2 * c]
    if layout == "swapped":  # batch and tokens swapped in memory
        return (torch.randn(s, b, c, generator=generator) + offset).to(device, dtype).transpose(0, 1)
    if layout == "unaligned":  # one element past an allocation: no 16-byte access is legal
        flat = (torch.randn(b * s * c + 1, generator=generator) + offset).to(device, dtype)
        return flat[1:].view(b, s, c)
    raise ValueError(layout)


def modulation(batch, channels, count, dtype, device, *, generator):
    """`count` modulation vectors [B, 1, C] as views of one [B, count * C] tensor, as chunk() of a Linear returns."""
    return [m[:, None] for m in (0.5 * torch.randn(batch, count * channels, generator=generator)).to(device, dtype).chunk(count, -1)]


def rows(m, tokens, split):
    """[B, C] or [B, R, C] -> [B, S, C] by plain indexing."""
    m = m[:, None] if m.ndim == 2 else m
    index = torch.zeros(tokens, dtype=torch.long, device=m.device)
    if split is not None:
        index[split:] = 1
    return m[:, index]


def ada_layer_norm(x, scale, shift, eps=1e-6, split=None):
    """Eager diffusers, in the dtype it is given."""
    s = x.shape[1]
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + rows(scale, s, split)) + rows(shift, s, split)


def gated_residual(x, y, gate, split=None):
    return x + rows(gate, x.shape[1], split) * y


def qk_norm_rope(x, weight, freqs, eps=1e-6):
    """RMSNorm with torch's own op, rotation as a complex product."""
    x = F.rms_norm(x, x.shape[-1:], weight, eps)
    if freqs is None:
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rotation = torch.complex(freqs[0].to(wide), freqs[1].to(wide))[:, None, :]
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def angles(tokens, head_dim, device, *, generator):
    """cos and sin fp32 [S, D/2]."""
    theta = 6.28 * torch.rand(tokens, head_dim // 2, generator=generator)
    return theta.cos().to(device), theta.sin().to(device)


def examples(few):
    """Settings of an expensive test: so many examples in the profile ``ci``, as many as any in ``nightly``."""
    return settings(max_examples=few if settings().max_examples <= 100 else settings().max_examples)
