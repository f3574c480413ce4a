"""qk_norm_rope: values, layouts, in place, gradients, tracing, errors."""

import pytest
import torch

from pydit import ops
from pydit.testing import assert_accurate
from tests.ops import cases

# (B, S, H, D): every width of the 16-byte path, several tokens per block, head counts that leave groups idle,
# head dims of the element-wise path, no tokens
SHAPES = [(2, 5, 3, 32), (1, 4, 24, 128), (1, 3, 5, 64), (2, 2, 1, 128), (1, 3, 40, 32), (1, 5, 2, 6), (2, 3, 3, 256),
          (1, 2, 7, 90), (1, 3, 2, 2), (2, 0, 3, 32), (0, 3, 2, 64)]


def _inputs(shape, dtype, device, *, weights=True, freqs=True, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    b, s, h, d = shape
    if layout == "contiguous":
        q, k = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    elif layout == "packed":
        q, k, _ = torch.randn(b, s, 3, h, d, generator=generator).to(device, dtype).unbind(2)
    elif layout == "head-major":
        q, k = (torch.randn(b, h, s, d, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(2))
    else:
        q, k = (torch.randn(b * s * h * d + 1, generator=generator).to(device, dtype)[1:].view(shape) for _ in range(2))
    w_q, w_k = ((1 + 0.3 * torch.randn(d, generator=generator)).to(device, dtype) if weights else None for _ in range(2))
    return q, k, w_q, w_k, cases.angles(s, d, device, generator=generator) if freqs else None


def _wide(x):
    return None if x is None else x.double()


def _check(q, k, w_q, w_k, freqs, eps=1e-6):
    results = ops.qk_norm_rope(q, k, w_q, w_k, freqs, eps=eps)
    for name, result, x, weight in zip("qk", results, (q, k), (w_q, w_k), strict=True):
        assert_accurate(result, cases.qk_norm_rope(x.double(), _wide(weight), freqs, eps),
                        cases.qk_norm_rope(x, weight, freqs, eps), name=name)
        assert result.is_contiguous() and result.dtype == x.dtype


@pytest.mark.again
@pytest.mark.parametrize("device", ["sim", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_more_samples_than_a_grid_has_rows(device):
    """A CUDA grid has at most 65535 blocks in y."""
    _check(*_inputs((65537, 1, 1, 2), torch.bfloat16, device))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape, dtype):
    _check(*_inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "head-major", "unaligned"])
@pytest.mark.parametrize("head_dim", [32, 10])
def test_layouts(device, layout, head_dim, dtype):
    _check(*_inputs((2, 3, 4, head_dim), dtype, device, layout=layout))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("freqs", [True, False])
@pytest.mark.parametrize("head_dim", [64, 12])
def test_optional_parts(device, head_dim, weights, freqs):
    _check(*_inputs((1, 4, 2, head_dim), torch.bfloat16, device, weights=weights, freqs=freqs))


def test_one_weight_missing(device):
    q, k, w_q, _, freqs = _inputs((1, 4, 2, 64), torch.float32, device)
    _check(q, k, w_q, None, freqs)


@pytest.mark.parametrize("layout", ["contiguous", "packed"])
@pytest.mark.parametrize("head_dim", [128, 10])
def test_in_place(device, layout, head_dim):
    q, k, w_q, w_k, freqs = _inputs((2, 5, 3, head_dim), torch.bfloat16, device, layout=layout)
    expected = ops.qk_norm_rope(q, k, w_q, w_k, freqs)
    result = ops.qk_norm_rope(q, k, w_q, w_k, freqs, out=(q, k))
    assert result[0] is q and result[1] is k
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_writes_into_a_strided_buffer_and_nothing_else(device):
    q, k, w_q, w_k, freqs = _inputs((2, 3, 2, 32), torch.float16, device)
    joint = torch.full((2, 3, 3, 2, 32), 7.0, dtype=torch.float16, device=device)
    ops.qk_norm_rope(q, k, w_q, w_k, freqs, out=(joint[:, :, 0], joint[:, :, 1]))
    expected = ops.qk_norm_rope(q, k, w_q, w_k, freqs)
    assert torch.equal(joint[:, :, 0], expected[0]) and torch.equal(joint[:, :, 1], expected[1])
    assert (joint[:, :, 2] == 7).all()


@pytest.mark.parametrize("op", ["qk_norm_rope", "qk_norm_rope_out"])
def test_opcheck(device, op):
    q, k, w_q, w_k, (cos, sin) = _inputs((1, 3, 2, 8), torch.float32, device)
    if op == "qk_norm_rope":
        args = (*(t.requires_grad_() for t in (q, k, w_q, w_k)), cos, sin, 1e-6)
    else:
        args = (q, k, w_q, w_k, cos, sin, 1e-6, torch.zeros_like(q), torch.zeros_like(k))
    result = torch.library.opcheck(getattr(torch.ops.pydit, op), args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("freqs", [True, False])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients(device, dtype, freqs):
    q, k, w_q, w_k, table = _inputs((2, 4, 3, 32), dtype, device, freqs=freqs)

    def formula(q, k, w_q, w_k):
        return cases.qk_norm_rope(q, w_q, table), cases.qk_norm_rope(k, w_k, table)

    def kernel(q, k, w_q, w_k):
        return ops.qk_norm_rope(q, k, w_q, w_k, table)

    grads = {}
    for key, function, wide in (("kernel", kernel, False), ("torch", formula, False), ("exact", formula, True)):
        leaves = [(v.double() if wide else v).detach().clone().requires_grad_() for v in (q, k, w_q, w_k)]
        a, b = function(*leaves)
        weight = torch.linspace(-1, 1, a.numel(), device=device).view_as(a).to(a.dtype)
        grads[key] = torch.autograd.grad((a * weight - b * weight.flip(0)).sum(), leaves)
    for name, *values in zip(("q", "k", "q_weight", "k_weight"), *(grads[x] for x in ("kernel", "exact", "torch")),
                             strict=True):
        assert_accurate(*values, name=f"d {name}")


def test_tables_that_want_a_gradient_are_refused(device):
    """The ops give none, and a model with learned frequencies would train without them."""
    q, k, w_q, w_k, (cos, sin) = _inputs((1, 4, 2, 32), torch.float32, device)
    sin.requires_grad_()
    for call in (lambda: ops.qk_norm_rope(q, k, w_q, w_k, (cos, sin)),
                 lambda: ops.joint_qk_norm_rope(q, k, q, k, (w_q, w_k, w_q, w_k), (cos, sin), (cos, sin))):
        with pytest.raises(ValueError, match="sin: expected a table that needs no gradient, got one that does"):
            call()
        with torch.no_grad():
            call()


def test_gradients_by_torch_func_are_refused(device):
    q, k, *_ = _inputs((1, 4, 2, 32), torch.float32, device)
    with pytest.raises(NotImplementedError, match="qk_norm_rope: expected tensors outside torch.func.grad"):
        torch.func.grad(lambda q: ops.qk_norm_rope(q, k, None, None, None)[0].sum())(q)


def test_compiles_fullgraph(device):
    q, k, w_q, w_k, freqs = _inputs((1, 4, 2, 32), torch.float32, device)

    def function(q, k):
        q, k = ops.qk_norm_rope(q * 2, k, w_q, w_k, freqs)
        return (q * k).sum()

    q, k = q.requires_grad_(), k.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), function(q, k))
    for a, b in zip(torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(function(q, k), (q, k)), strict=True):
        torch.testing.assert_close(a, b)


_Q = torch.zeros(2, 3, 4, 8)


@pytest.mark.parametrize("change, error, message", [
    ({"q": torch.zeros(2, 3, 8)}, ValueError, r"q: expected shape \[B, S, H, D\], got \[2, 3, 8\]"),
    ({"q": torch.zeros(2, 3, 4, 7)}, ValueError, "q: expected an even head dim from 2 to 256, got 7"),
    ({"q": torch.zeros(2, 3, 4, 258)}, ValueError, "q: expected an even head dim from 2 to 256, got 258"),
    ({"k": torch.zeros(2, 3, 5, 8)}, ValueError, r"k: expected shape \[2, 3, 4, 8\] like the first argument, got \[2, 3, 5, 8\]"),
    ({"k": _Q.half()}, TypeError, "k: expected torch.float32 like the first argument, got torch.float16"),
    ({"q_weight": torch.zeros(4)}, ValueError, r"q_weight: expected shape \[8\], got \[4\]"),
    ({"k_weight": torch.zeros(8).double()}, TypeError, "k_weight: expected torch.float32"),
    ({"freqs": torch.zeros(3, 4)}, TypeError, r"freqs: expected a pair \(cos, sin\) or None, got Tensor"),
    ({"freqs": (torch.zeros(3, 4).half(),) * 2}, TypeError, "freqs cos: expected torch.float32, got torch.float16"),
    ({"freqs": (torch.zeros(3, 8),) * 2}, ValueError, r"freqs cos: expected shape \[3, 4\], got \[3, 8\]"),
    ({"freqs": (torch.zeros(3, 4), torch.zeros(4, 3).T)}, ValueError, "freqs sin: expected a contiguous tensor"),
    ({"out": _Q}, TypeError, "out: expected a pair of tensors, got Tensor"),
    ({"out": (_Q, torch.zeros(2, 3, 4, 6))}, ValueError, r"out\[1\]: expected shape \[2, 3, 4, 8\] like the first argument"),
    ({"q": torch.zeros(2, 3, 4, 8, requires_grad=True), "out": (_Q, _Q)}, ValueError, "out: expected tensors that need no gradient"),
    ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
])
def test_bad_arguments(change, error, message):
    args = {"q": _Q, "k": _Q, "q_weight": None, "k_weight": None, "freqs": None, **change}
    with pytest.raises(error, match=f"qk_norm_rope: {message}"):
        ops.qk_norm_rope(**args)
