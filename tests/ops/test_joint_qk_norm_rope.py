"""joint_qk_norm_rope: both streams, against the formulas of the single op's test."""

import pytest
import torch

from pydit import ops
from pydit.testing import assert_accurate
from tests.ops import cases

NAMES = ("q_img", "k_img", "q_txt", "k_txt")
# (B, S_img, S_txt, H, D): several blocks of both streams, one without tokens, the element-wise path
SHAPES = [(2, 37, 9, 3, 32), (1, 5, 12, 24, 128), (1, 6, 3, 5, 64), (2, 7, 0, 3, 64), (1, 0, 5, 2, 128), (2, 3, 4, 2, 10),
          (1, 0, 0, 2, 32)]


def _inputs(shape, dtype, device, *, weights=True, freqs=True, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    b, image, text, h, d = shape
    tensors = []
    for tokens in (image, text):
        if layout == "packed":
            tensors += torch.randn(b, tokens, 3, h, d, generator=generator).to(device, dtype).unbind(2)[:2]
        elif layout == "unaligned":
            count = b * tokens * h * d
            tensors += [torch.randn(count + 1, generator=generator).to(device, dtype)[1:].view(b, tokens, h, d)
                        for _ in range(2)]
        else:
            tensors += [torch.randn(b, tokens, h, d, generator=generator).to(device, dtype) for _ in range(2)]
    scales = [(1 + 0.3 * torch.randn(d, generator=generator)).to(device, dtype) for _ in range(4)] if weights else None
    tables = [cases.angles(tokens, d, device, generator=generator) if freqs else None for tokens in (image, text)]
    return tensors, scales, tables


def _formula(tensors, weights, tables):
    weights = [None] * 4 if weights is None else weights
    return [cases.qk_norm_rope(x, w, table) for x, w, table in
            zip(tensors, weights, (tables[0], tables[0], tables[1], tables[1]), strict=True)]


def _check(tensors, weights, tables):
    found = ops.joint_qk_norm_rope(*tensors, weights, *tables)
    exact = _formula([x.double() for x in tensors], weights and [w.double() for w in weights], tables)
    for name, a, r, s in zip(NAMES, found, exact, _formula(tensors, weights, tables), strict=True):
        assert_accurate(a, r, s, name=name)
        assert a.is_contiguous()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape, dtype):
    _check(*_inputs(shape, dtype, device))


@pytest.mark.parametrize("layout", ["packed", "unaligned"])
@pytest.mark.parametrize("weights, freqs", [(True, True), (False, True), (True, False)])
def test_layouts_and_optional_parts(device, layout, weights, freqs):
    _check(*_inputs((2, 5, 3, 4, 64), torch.bfloat16, device, weights=weights, freqs=freqs, layout=layout))


def test_equals_the_single_op(device):
    """Bit for bit, with one stream without rotation and one weight missing."""
    tensors, weights, tables = _inputs((2, 9, 5, 3, 128), torch.bfloat16, device)
    weights[3], tables[1] = None, None
    found = ops.joint_qk_norm_rope(*tensors, weights, *tables)
    single = (*ops.qk_norm_rope(*tensors[:2], *weights[:2], tables[0]),
              *ops.qk_norm_rope(*tensors[2:], *weights[2:], tables[1]))
    assert all(torch.equal(a, b) for a, b in zip(found, single, strict=True))


def test_in_place(device):
    tensors, weights, tables = _inputs((2, 5, 3, 4, 64), torch.float16, device, layout="packed")
    expected = ops.joint_qk_norm_rope(*tensors, weights, *tables)
    found = ops.joint_qk_norm_rope(*tensors, weights, *tables, out=tensors)
    assert all(a is b for a, b in zip(found, tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("out", [False, True])
def test_opcheck(device, out):
    tensors, weights, tables = _inputs((1, 3, 2, 2, 8), torch.float32, device)
    arguments = (*tensors, *weights, *tables[0], *tables[1], 1e-6)
    if out:
        op, arguments = torch.ops.pydit.joint_qk_norm_rope_out, (*arguments, *(torch.zeros_like(x) for x in tensors))
    else:
        op = torch.ops.pydit.joint_qk_norm_rope
        for x in (*tensors, *weights):
            x.requires_grad_()
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(device, dtype):
    tensors, weights, tables = _inputs((2, 5, 3, 2, 32), dtype, device)
    found = {}
    for key, wide, function in (("op", False, lambda x, w: ops.joint_qk_norm_rope(*x, w, *tables)),
                                ("torch", False, lambda x, w: _formula(x, w, tables)),
                                ("exact", True, lambda x, w: _formula(x, w, tables))):
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in (*tensors, *weights)]
        sums = [(a * torch.linspace(-1, 1, a.numel(), device=device).view_as(a).to(a.dtype)).sum()
                for a in function(leaves[:4], leaves[4:])]
        found[key] = torch.autograd.grad(torch.stack(sums).sum(), leaves)
    for name, *values in zip((*NAMES, *(f"weight of {n}" for n in NAMES)), *(found[k] for k in ("op", "exact", "torch")),
                             strict=True):
        assert_accurate(*values, name=name)


def test_compiles_fullgraph(device):
    tensors, weights, tables = _inputs((1, 4, 2, 2, 32), torch.bfloat16, device)
    compiled = torch.compile(lambda *x: ops.joint_qk_norm_rope(*x, weights, *tables), fullgraph=True,
                             backend="aot_eager")
    for a, b in zip(compiled(*tensors), ops.joint_qk_norm_rope(*tensors, weights, *tables), strict=True):
        assert torch.equal(a, b)


_X, _Y = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize("change, error, message", [
    ({"q_img": _X[0]}, ValueError, r"q_img: expected shape \[B, S, H, D\], got \[3, 4, 8\]"),
    ({"k_img": _X[:, :2]}, ValueError, r"k_img: expected shape \[2, 3, 4, 8\] like the first argument, got \[2, 2, 4, 8\]"),
    ({"q_txt": _X[:, :, :2]}, ValueError, r"q_txt: expected shape \[2, 3, 4, 8\] like the first argument"),
    ({"k_txt": _X[:, :2]}, ValueError, r"k_txt: expected shape \[2, 3, 4, 8\] like q_txt, got \[2, 2, 4, 8\]"),
    ({"weights": (None,) * 3}, TypeError, "weights: expected four tensors or None, got 3"),
    ({"weights": (None, None, torch.zeros(4), None)}, ValueError, r"weights q_txt: expected shape \[8\], got \[4\]"),
    ({"freqs_txt": (torch.zeros(2, 4),) * 2}, ValueError, r"freqs_txt cos: expected shape \[3, 4\], got \[2, 4\]"),
    ({"out": _X}, TypeError, "out: expected four tensors, got Tensor"),
    ({"q_img": _X.clone().requires_grad_(), "out": (_X,) * 4}, ValueError, "out: expected tensors that need no gradient"),
    ({"out": (_X, _Y, _Y.clone(), _Y.clone())}, ValueError,
     "out q_img: expected memory of its own or exactly that of q_img, got some that k_img lies in"),
    ({"out": (_Y, _Y.clone(), torch.from_dlpack(_Y), _Y.clone())}, ValueError,
     "out q_txt: expected memory of its own or exactly that of q_txt, got some that out q_img lies in"),
    ({"eps": -1.0}, ValueError, "eps: expected a finite number")])
def test_bad_arguments(change, error, message):
    arguments = {**dict.fromkeys(NAMES, _X), "weights": None, "freqs_img": None, "freqs_txt": None, **change}
    with pytest.raises(error, match=f"joint_qk_norm_rope: {message}"):
        ops.joint_qk_norm_rope(**arguments)
