"""What every public op is called with when hypothesis chooses: shapes, strides (zero ones too), dtypes, empty dimensions.

A case is the arguments by name, the call, and the same in plain torch, which runs in any dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from pydit import ops
from tests.ops import cases, test_joint_attention, test_linear

LAYOUTS = ("contiguous", "packed", "swapped", "unaligned", "expanded")


@dataclass
class Case:
    """arguments : name -> tensor, tuple of tensors or plain value. plain : of the arguments -> tensor or tuple."""

    op: Any
    arguments: dict[str, Any]
    plain: Any

    def call(self):
        return self.op(**self.arguments)


class Draw:
    """Draws tensors of one dtype on one device."""

    def __init__(self, data, dtype, device):
        self.data, self.dtype, self.device = data, dtype, device
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))

    def number(self, low, high, name=None):
        return self.data.draw(st.integers(low, high), name)

    def maybe(self, make, name=None):
        return make() if self.data.draw(st.booleans(), name) else None

    def tensor(self, *shape, dtype=None, scale=1.0):
        """Random values in a layout that has a contiguous last dimension."""
        layout = self.data.draw(st.sampled_from(LAYOUTS if len(shape) > 1 else ("contiguous", "unaligned")), "layout")
        dtype = dtype or self.dtype

        def filled(*size):
            return (scale * torch.randn(size, generator=self.generator)).to(self.device, dtype)

        if layout == "packed":
            return filled(*shape[:-1], 3 * shape[-1])[..., shape[-1]:2 * shape[-1]]
        if layout == "swapped" and len(shape) > 2:
            return filled(shape[1], shape[0], *shape[2:]).transpose(0, 1)
        if layout == "unaligned":
            count = torch.Size(shape).numel()
            return filled(count + 1)[1:].view(shape)
        if layout == "expanded":
            place = self.number(0, len(shape) - 2)
            return filled(*shape[:place], 1, *shape[place + 1:]).expand(shape)
        return filled(*shape)

    def rows(self, batch, channels, split):
        """A modulation vector."""
        shapes = [(batch, channels), (batch, 1, channels)] if split is None else [(batch, 2, channels)]
        return self.tensor(*self.data.draw(st.sampled_from(shapes), "rows"), scale=0.5)

    def tables(self, tokens, dim):
        return cases.angles(tokens, dim, self.device, generator=self.generator)


def split_of(draw, tokens):
    return draw.maybe(lambda: draw.number(0, tokens + 1, "split"))


def ada_layer_norm(draw):
    b, s, c = draw.number(0, 3, "B"), draw.number(0, 5, "S"), draw.number(1, 40, "C")
    split = split_of(draw, s)
    return Case(ops.ada_layer_norm, {"x": draw.tensor(b, s, c), "scale": draw.rows(b, c, split),
                                     "shift": draw.rows(b, c, split), "split": split}, cases.ada_layer_norm)


def gated_residual(draw):
    b, s, c = draw.number(0, 3, "B"), draw.number(0, 5, "S"), draw.number(1, 40, "C")
    split = split_of(draw, s)
    return Case(ops.gated_residual, {"x": draw.tensor(b, s, c), "y": draw.tensor(b, s, c),
                                     "gate": draw.rows(b, c, split), "split": split}, cases.gated_residual)


def gated_residual_ada_layer_norm(draw):
    b, s, c = draw.number(0, 3, "B"), draw.number(0, 5, "S"), draw.number(1, 40, "C")
    split = split_of(draw, s)

    def plain(x, y, gate, scale, shift, split):
        total = cases.gated_residual(x, y, gate, split)
        return total, cases.ada_layer_norm(total, scale, shift, split=split)

    rows = {name: draw.rows(b, c, split) for name in ("gate", "scale", "shift")}
    return Case(ops.gated_residual_ada_layer_norm,
                {"x": draw.tensor(b, s, c), "y": draw.tensor(b, s, c), **rows, "split": split}, plain)


def qk_norm_rope(draw):
    b, s, h, d = draw.number(0, 2, "B"), draw.number(0, 5, "S"), draw.number(1, 3, "H"), 2 * draw.number(1, 40, "D/2")

    def plain(q, k, q_weight, k_weight, freqs):
        return cases.qk_norm_rope(q, q_weight, freqs), cases.qk_norm_rope(k, k_weight, freqs)

    return Case(ops.qk_norm_rope, {
        "q": draw.tensor(b, s, h, d), "k": draw.tensor(b, s, h, d), "q_weight": draw.maybe(lambda: draw.tensor(d)),
        "k_weight": draw.maybe(lambda: draw.tensor(d)), "freqs": draw.maybe(lambda: draw.tables(s, d))}, plain)


def joint_qk_norm_rope(draw):
    b, s, t, h = (draw.number(0, high, name) for high, name in ((2, "B"), (5, "S_img"), (4, "S_txt"), (2, "H")))
    h, d = h + 1, 2 * draw.number(1, 40, "D/2")

    def plain(q_img, k_img, q_txt, k_txt, weights, freqs_img, freqs_txt):
        weights = (None,) * 4 if weights is None else weights
        return tuple(cases.qk_norm_rope(x, weight, freqs) for x, weight, freqs in zip(
            (q_img, k_img, q_txt, k_txt), weights, (freqs_img, freqs_img, freqs_txt, freqs_txt), strict=True))

    return Case(ops.joint_qk_norm_rope, {
        "q_img": draw.tensor(b, s, h, d), "k_img": draw.tensor(b, s, h, d), "q_txt": draw.tensor(b, t, h, d),
        "k_txt": draw.tensor(b, t, h, d), "weights": draw.maybe(lambda: tuple(draw.tensor(d) for _ in range(4))),
        "freqs_img": draw.maybe(lambda: draw.tables(s, d)), "freqs_txt": draw.maybe(lambda: draw.tables(t, d))}, plain)


def linear_gelu(draw):
    leading = [draw.number(0, 4) for _ in range(draw.number(0, 3, "leading dimensions"))]
    k, n = draw.number(0, 40, "K"), draw.number(0, 40, "N")
    return Case(ops.linear_gelu, {"x": draw.tensor(*leading, k), "weight": draw.tensor(n, k, scale=0.2),
                                  "bias": draw.maybe(lambda: draw.tensor(n))},
                lambda x, weight, bias: F.gelu(F.linear(x, weight, bias), approximate="tanh"))


def linear_residual(draw):
    leading, c = [draw.number(0, 4) for _ in range(draw.number(0, 3, "leading dimensions"))], draw.number(0, 40, "C")
    return Case(ops.linear_residual, {"x": draw.tensor(*leading, c), "weight": draw.tensor(c, c, scale=0.2),
                                      "bias": draw.maybe(lambda: draw.tensor(c))},
                lambda x, weight, bias: x + F.linear(x, weight, bias))


def linear_gated_residual(draw):
    b, s, k, n = draw.number(0, 2, "B"), draw.number(0, 5, "S"), draw.number(0, 40, "K"), draw.number(1, 40, "N")
    split = split_of(draw, s)

    def plain(x, weight, bias, residual, gate, split):
        return test_linear.gated(x, weight, bias, residual, gate, split)

    return Case(ops.linear_gated_residual, {
        "x": draw.tensor(b, s, k), "weight": draw.tensor(n, k, scale=0.2), "bias": draw.maybe(lambda: draw.tensor(n)),
        "residual": draw.tensor(b, s, n), "gate": draw.rows(b, n, split), "split": split}, plain)


def _joint(draw, op, plain, *, square=False, gated=False):
    b, arguments, split = draw.number(0, 2, "B"), {}, None
    for stream in ("img", "txt"):
        s, k, n = draw.number(0, 5, f"S_{stream}"), draw.number(0, 24, "K"), draw.number(1, 24, "N")
        k = n if square else k
        arguments |= {f"x_{stream}": draw.tensor(b, s, k), f"weight_{stream}": draw.tensor(n, k, scale=0.2),
                      f"bias_{stream}": draw.maybe(lambda n=n: draw.tensor(n))}
        if gated:
            own = split = split_of(draw, s) if stream == "img" else None
            arguments |= {f"residual_{stream}": draw.tensor(b, s, n), f"gate_{stream}": draw.rows(b, n, own)}
            if stream == "img":
                arguments["split"] = split

    def both(split=None, **named):
        names = [name.removesuffix("_img") for name in named if name.endswith("_img")]
        return tuple(plain(*(named[f"{name}_{stream}"] for name in names),
                           *([split if stream == "img" else None] if gated else [])) for stream in ("img", "txt"))

    return Case(op, arguments, both)


def joint_linear(draw):
    return _joint(draw, ops.joint_linear, F.linear)


def joint_linear_gelu(draw):
    return _joint(draw, ops.joint_linear_gelu, lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"))


def joint_linear_residual(draw):
    return _joint(draw, ops.joint_linear_residual, lambda x, w, b: x + F.linear(x, w, b), square=True)


def joint_linear_gated_residual(draw):
    return _joint(draw, ops.joint_linear_gated_residual, test_linear.gated, gated=True)


def joint_qkv(draw):
    b, d = draw.number(0, 2, "B"), draw.data.draw(st.sampled_from((2, 6, 32, 64)), "D")
    arguments = {"head_dim": d}
    for stream in ("img", "txt"):
        s, k, h = draw.number(0, 4, f"S_{stream}"), draw.number(0, 24, "K"), draw.number(1, 2, "H")
        weights = [draw.tensor(h * d, k, scale=0.3) for _ in range(3)]
        arguments |= {
            f"x_{stream}": draw.tensor(b, s, k), f"weights_{stream}": tuple(weights),
            f"biases_{stream}": draw.maybe(lambda n=h * d: tuple(draw.maybe(lambda: draw.tensor(n)) for _ in range(3))),
            f"norms_{stream}": draw.maybe(lambda: tuple(draw.maybe(lambda: draw.tensor(d)) for _ in range(2))),
            f"freqs_{stream}": draw.maybe(lambda s=s: draw.tables(s, d))}

    def plain(head_dim, **named):
        found = []
        for stream in ("img", "txt"):
            biases = named[f"biases_{stream}"] or (None,) * 3
            norms = (*(named[f"norms_{stream}"] or (None,) * 2), None)
            for part, (weight, bias, norm) in enumerate(zip(named[f"weights_{stream}"], biases, norms, strict=True)):
                x = F.linear(named[f"x_{stream}"], weight, bias).unflatten(-1, (-1, head_dim))
                found.append(x if part == 2 else cases.qk_norm_rope(x, norm, named[f"freqs_{stream}"]))
        return tuple(found)

    return Case(ops.joint_qkv, arguments, plain)


def joint_attention(draw):
    b, s, t, h = draw.number(0, 2, "B"), draw.number(0, 20, "S_img"), draw.number(0, 10, "S_txt"), draw.number(1, 2, "H")
    d = draw.data.draw(st.sampled_from((32, 64)), "D")
    lens = draw.maybe(lambda: torch.tensor([draw.number(0, t) for _ in range(b)], dtype=torch.int32, device=draw.device))

    def plain(txt_lens, **named):
        out = test_joint_attention.expected([named[name] for name in test_joint_attention.NAMES], txt_lens)
        return tuple(out[:2])

    tensors = {name: draw.tensor(b, s if name.endswith("img") else t, h, d) for name in test_joint_attention.NAMES}
    return Case(ops.joint_attention, {**tensors, "txt_lens": lens}, plain)


def merge_attention(draw):
    b, s, h, d = draw.number(0, 2, "B"), draw.number(0, 5, "S"), draw.number(1, 2, "H"), draw.number(1, 20, "D")
    parts = draw.number(1, 3, "parts")

    def plain(outs, lses):
        logs = torch.stack(lses)
        shares = logs.softmax(0).transpose(2, 3)[..., None].to(outs[0].dtype)
        return (shares * torch.stack(outs)).sum(0), logs.logsumexp(0)

    return Case(ops.merge_attention, {
        "outs": tuple(draw.tensor(b, s, h, d) for _ in range(parts)),
        "lses": tuple(draw.tensor(b, h, s, dtype=torch.float32) for _ in range(parts))}, plain)


_WITH_A_FORMULA = (
    "ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm", "qk_norm_rope", "joint_qk_norm_rope", "linear_gelu",
    "linear_residual", "linear_gated_residual", "joint_linear", "joint_linear_gelu", "joint_linear_residual",
    "joint_linear_gated_residual", "joint_qkv", "joint_attention", "merge_attention")
NAMES = tuple(name for name in _WITH_A_FORMULA if hasattr(ops, name))
