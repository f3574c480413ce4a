"""The documented recipe, taken from its page and held against the block written out in plain torch."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from pydit.testing import assert_accurate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fuse_your_own_block.md"


def plain(block, image, text, temb, freqs_image, freqs_text):
    """By hand, in any dtype: complex rotation, concatenation, softmax."""
    parts, mods = [], []
    for x, w, freqs in ((image, block.image, freqs_image), (text, block.text, freqs_text)):
        mod = w["mod"](temb)[:, None].chunk(6, -1)
        mods.append(mod)
        q, k, v = (w["qkv"](F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod[1]) + mod[0])
                   .unflatten(-1, (3, block.heads, -1)).unbind(2))
        turn = torch.complex(*freqs).to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)[:, None]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        q, k = (torch.view_as_real(torch.view_as_complex(w[name](t).to(wide).unflatten(-1, (-1, 2))) * turn)
                .flatten(-2).to(x.dtype) for name, t in (("q_norm", q), ("k_norm", k)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(both, 1).transpose(1, 2) for both in zip(*parts, strict=True))
    out = (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2).flatten(2)
    done = []
    for x, w, mod, a in zip((image, text), (block.image, block.text), mods,
                            (out[:, :image.shape[1]], out[:, image.shape[1]:]), strict=True):
        x = x + mod[2] * w["out"](a)
        hidden = F.gelu(w["up"](F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod[4]) + mod[3]), approximate="tanh")
        done.append(x + mod[5] * w["down"](hidden))
    return done


def test_the_page_is_right(device):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
    forward = code[code.index("    def forward"):]
    assert len(forward.splitlines()) <= 30
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    torch.manual_seed(0)
    block = namespace["Block"](64, 2)
    inputs = [torch.randn(2, 5, 64), torch.randn(2, 3, 64), torch.randn(2, 64)]
    freqs = [tuple(f(torch.randn(n, 16)) for f in (torch.cos, torch.sin)) for n in (5, 3)]
    with torch.no_grad():
        exact = plain(block.double(), *(x.double() for x in inputs), *freqs)
        block = block.to(device, torch.bfloat16)
        low = [x.to(device, torch.bfloat16) for x in inputs]
        freqs = [tuple(x.to(device) for x in pair) for pair in freqs]
        eager, fused = plain(block, *low, *freqs), block(*low, *freqs)
    for found, right, stock in zip(fused, exact, eager, strict=True):
        assert_accurate(found, right.to(device), stock)
