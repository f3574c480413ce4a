"""Linear layers with their epilogues against float64 under the tolerance policy, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from pydit import backend, ops
from pydit.ops import reference
from pydit.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = {  # name -> (op, the same in plain torch, which inputs it takes)
    "linear_gelu": (ops.linear_gelu, lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), "xwb"),
    "linear_gated_residual": (ops.linear_gated_residual,
                              lambda x, w, b, r, g: r + (g if g.ndim == 3 else g[:, None]) * F.linear(x, w, b), "xwbrg"),
    "linear_residual": (ops.linear_residual, lambda x, w, b: x + F.linear(x, w, b), "xsc"),
}


def inputs(names, dtype, device, tokens=21, k=40, n=24, gate_ndim=2):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, tokens, k), "w": (n, k), "b": (n,), "r": (2, tokens, n), "s": (k, k), "c": (k,),
              "g": (2, n) if gate_ndim == 2 else (2, 1, n)}
    return [(torch.randn(shapes[name], generator=generator) / (k ** 0.5 if name in "ws" else 1)).to(device, dtype)
            for name in names]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("tokens", [21, 1, 0])
def test_values(name, tokens, dtype, device):
    op, plain, names = OPS[name]
    args = inputs(names, dtype, device, tokens)
    exact = getattr(reference, name)(*(x.double() for x in args))
    assert_accurate(op(*args), exact, plain(*args), name=name)
    assert op(*args).dtype == dtype and op(*args).shape == exact.shape
    assert backend.report()[name]["path"] == "torch" and "no kernel of our own" in backend.report()[name]["reason"]


def test_values_without_bias_and_with_a_third_gate_dimension(device):
    x, w, s = inputs("xws", torch.float32, device)
    torch.testing.assert_close(ops.linear_gelu(x, w), F.gelu(F.linear(x, w), approximate="tanh"))
    torch.testing.assert_close(ops.linear_residual(x, s), x + F.linear(x, s))
    args = inputs("xwbrg", torch.float32, device, gate_ndim=3)
    torch.testing.assert_close(ops.linear_gated_residual(*args), OPS["linear_gated_residual"][1](*args))
    torch.testing.assert_close(ops.linear_gelu(x[0, 0], w), F.gelu(F.linear(x[0, 0], w), approximate="tanh"))


@pytest.mark.parametrize("name", OPS)
def test_gradients(name, device):
    op, plain, names = OPS[name]
    found, right = ([x.requires_grad_() for x in inputs(names, torch.float32, device)] for _ in range(2))
    for function, args in ((op, found), (plain, right)):
        (function(*args) * torch.arange(1.0, 3.0, device=device)[:, None, None]).sum().backward()
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(name, device):
    op, _plain, names = OPS[name]
    args = inputs(names, torch.float32, device)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(op, backend="aot_eager", fullgraph=True)(*args), op(*args))


X, W = torch.ones(2, 3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: ops.linear_gelu(1, W), TypeError, "linear_gelu: x: expected a torch.Tensor, got int"),
    (lambda: ops.linear_gelu(X, W.half()), TypeError, "weight: expected torch.float32"),
    (lambda: ops.linear_gelu(X, W.T), ValueError, r"weight: expected shape \[N, 4\], got \[4, 5\]"),
    (lambda: ops.linear_gelu(X, W, torch.ones(4)), ValueError, r"bias: expected shape \[5\], got \[4\]"),
    (lambda: ops.linear_residual(X, W), ValueError, r"weight: expected a square matrix, got \[5, 4\]"),
    (lambda: ops.linear_gated_residual(X[0], W, None, X, X), ValueError, r"x: expected shape \[B, S, K\]"),
    (lambda: ops.linear_gated_residual(X, W, None, X, torch.ones(2, 5)), ValueError,
     r"residual: expected shape \[2, 3, 5\], got \[2, 3, 4\]"),
    (lambda: ops.linear_gated_residual(X, W, None, torch.ones(2, 3, 5), torch.ones(2, 4)), ValueError, "gate: expected")])
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()
