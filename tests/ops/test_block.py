"""ada_layer_norm, gated_residual and their fusion: values, layouts, gradients, tracing, errors."""

import pytest
import torch

from pydit import ops
from pydit.ops import fallback
from pydit.testing import assert_accurate
from tests.ops import cases


def _inputs(shape, dtype, device, *, layout="contiguous", rows=1, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    b, _, c = shape
    x = cases.tokens(shape, dtype, device, generator=generator, layout=layout, offset=offset)
    y = cases.tokens(shape, dtype, device, generator=generator, layout=layout)
    if rows == 1:
        gate, scale, shift = cases.modulation(b, c, 3, dtype, device, generator=generator)
    else:
        packed = torch.randn(b, rows, 3 * c, generator=generator).to(device, dtype)
        gate, scale, shift = packed.chunk(3, -1)
    return x, y, gate, scale, shift


def _double(*tensors):
    return [t.double() for t in tensors]


def _check_all(x, y, gate, scale, shift, *, split=None, eps=1e-6):
    out = ops.ada_layer_norm(x, scale, shift, eps=eps, split=split)
    x64, y64, gate64, scale64, shift64 = _double(x, y, gate, scale, shift)
    assert_accurate(out, cases.ada_layer_norm(x64, scale64, shift64, eps, split),
                    cases.ada_layer_norm(x, scale, shift, eps, split), name="ada_layer_norm")

    out = ops.gated_residual(x, y, gate, split=split)
    total64, total = cases.gated_residual(x64, y64, gate64, split), cases.gated_residual(x, y, gate, split)
    assert_accurate(out, total64, total, name="gated_residual")

    residual, out = ops.gated_residual_ada_layer_norm(x, y, gate, scale, shift, eps=eps, split=split)
    assert_accurate(residual, total64, total, name="fused residual")
    assert_accurate(out, cases.ada_layer_norm(total64, scale64, shift64, eps, split),
                    cases.ada_layer_norm(total, scale, shift, eps, split), name="fused norm")
    for result in (residual, out):
        assert result.is_contiguous() and result.dtype == x.dtype and result.device == x.device


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_values(device, shape, dtype):
    _check_all(*_inputs(shape, dtype, device))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "swapped", "unaligned"])
@pytest.mark.parametrize("shape", [(2, 3, 96), (2, 3, 37)], ids=str)
def test_layouts(device, shape, layout, dtype):
    _check_all(*_inputs(shape, dtype, device, layout=layout))


@pytest.mark.parametrize("split", [0, 1, 4, 5, 9])
def test_split_rows(device, split):
    _check_all(*_inputs((2, 5, 64), torch.bfloat16, device, rows=2), split=split)


def test_expanded_modulation(device):
    x, y, gate, scale, shift = _inputs((3, 4, 64), torch.float32, device)
    _check_all(x, y, *(m[:1].expand(3, -1, -1) for m in (gate, scale, shift)))


def test_two_dimensional_modulation(device):
    x, y, gate, scale, shift = _inputs((2, 4, 64), torch.float16, device)
    _check_all(x, y, *(m[:, 0] for m in (gate, scale, shift)))


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_large_common_offset(device, offset):
    """Massive activations: mean/sigma up to 1e4 must not lose the variance in fp32."""
    _check_all(*_inputs((1, 3, 3072), torch.float32, device, offset=offset))


def test_many_rows_are_independent(device):
    """Every row of a large batch equals the same row alone."""
    x, _, _, scale, shift = _inputs((2, 700, 128), torch.bfloat16, device)
    whole = ops.ada_layer_norm(x, scale, shift)
    for b, s in ((0, 0), (0, 699), (1, 0), (1, 333), (1, 699)):
        alone = ops.ada_layer_norm(x[b:b + 1, s:s + 1], scale[b:b + 1], shift[b:b + 1])
        assert torch.equal(whole[b:b + 1, s:s + 1], alone)


def test_repeat_is_bitwise_equal(device):
    args = _inputs((2, 9, 1001), torch.float16, device)
    first, second = (ops.gated_residual_ada_layer_norm(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_in_its_row(device):
    x, _, _, scale, shift = _inputs((1, 3, 96), torch.float32, device)
    x[0, 1, 7] = float("nan")
    out = ops.ada_layer_norm(x, scale, shift)
    assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()


def _cases_for_opcheck(device):
    x, y, gate, scale, shift = _inputs((2, 3, 40), torch.float32, device)
    tensors = [t.detach().requires_grad_() for t in (x, y, gate, scale, shift)]
    x, y, gate, scale, shift = tensors
    return {
        "ada_layer_norm": (x, scale, shift, 1e-6, None),
        "gated_residual": (x, y, gate, None),
        "gated_residual_ada_layer_norm": (x, y, gate, scale, shift, 1e-6, None),
    }


@pytest.mark.parametrize("name", ["ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm"])
def test_opcheck(device, name):
    result = torch.library.opcheck(getattr(torch.ops.pydit, name), _cases_for_opcheck(device)[name])
    assert set(result.values()) == {"SUCCESS"}


def _block(x, y, gate, scale, shift, split=None):
    residual, out = ops.gated_residual_ada_layer_norm(x, y, gate, scale, shift, split=split)
    return ops.gated_residual(ops.ada_layer_norm(residual, scale, shift, split=split), out, gate, split=split)


def _block_formula(x, y, gate, scale, shift, split=None):
    residual = cases.gated_residual(x, y, gate, split)
    out = cases.ada_layer_norm(residual, scale, shift, split=split)
    return cases.gated_residual(cases.ada_layer_norm(residual, scale, shift, split=split), out, gate, split)


@pytest.mark.parametrize("split", [None, 0, 2])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients(device, dtype, split):
    """Gradients of all three ops against float64 autograd through independent formulas."""
    values = _inputs((2, 5, 48), dtype, device, rows=1 if split is None else 2)
    grads = {}
    for key, function, wide in (("kernel", _block, False), ("torch", _block_formula, False),
                                ("exact", _block_formula, True)):
        leaves = [(v.double() if wide else v).detach().clone().requires_grad_() for v in values]
        result = function(*leaves, split=split)
        weight = torch.linspace(-1, 1, result.numel(), device=device).view_as(result).to(result.dtype)
        grads[key] = torch.autograd.grad((result * weight).sum(), leaves)
    for name, kernel, plain, exact in zip(("x", "y", "gate", "scale", "shift"), *(grads[k] for k in ("kernel", "torch", "exact")),
                                          strict=True):
        assert_accurate(kernel, exact, plain, name=f"d {name}")


def test_gradcheck_float64():
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    assert torch.autograd.gradcheck(_block, (leaf(2, 3, 6), leaf(2, 3, 6), leaf(2, 6), leaf(2, 6), leaf(2, 6)))


def test_compiles_fullgraph(device):
    args = [a.detach().requires_grad_() for a in _inputs((2, 5, 64), torch.float32, device)]
    compiled = torch.compile(_block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(_block(*args).sum(), args)
    actual = torch.autograd.grad(compiled(*args).sum(), args)
    assert torch.equal(compiled(*args), _block(*args))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change, error, message", [
    ({"x": torch.zeros(2, 3)}, ValueError, r"x: expected shape \[B, S, C\], got \[2, 3\]"),
    ({"x": torch.zeros(2, 3, 8, dtype=torch.int32)}, TypeError, "x: expected a floating-point tensor of 16, 32 or 64 bits, got torch.int32"),
    ({"x": [[1.0]]}, TypeError, "x: expected a torch.Tensor, got list"),
    ({"x": torch.zeros(2, 3, 8).to(torch.float8_e4m3fn)}, TypeError, "x: expected a floating-point tensor of 16, 32 or"),
    ({"x": torch.nested.nested_tensor([torch.zeros(3, 8)])}, ValueError, "x: expected a dense tensor, got a nested one"),
    ({"x": torch.zeros(1, 1, 8193)}, ValueError, "expected 1 to 8192 channels, got 8193"),
    ({"x": torch.zeros(2, 8, 3).transpose(1, 2)}, ValueError, "x: expected a contiguous last dimension, got stride 3"),
    ({"y": torch.zeros(2, 4, 8)}, ValueError, r"y: expected shape \[2, 3, 8\] like x, got \[2, 4, 8\]"),
    ({"gate": torch.zeros(2, 8).half()}, TypeError, "gate: expected torch.float32 like the first argument, got torch.float16"),
    ({"gate": torch.zeros(2, 8, device="meta")}, ValueError, "gate: expected device cpu like the first argument, got meta"),
    ({"scale": torch.zeros(1, 8)}, ValueError, r"scale: expected shape \[2, 8\] or \[2, 1, 8\], got \[1, 8\]"),
    ({"shift": torch.zeros(2, 2, 8)}, ValueError, r"shift: expected shape \[2, 8\] or \[2, 1, 8\], got \[2, 2, 8\]"),
    ({"split": 1}, ValueError, r"gate: expected shape \[2, 2, 8\] with split=1, got \[2, 8\]"),
    ({"split": -1}, ValueError, "split: expected 0 or more, got -1"),
    ({"split": 1.5}, TypeError, "split: expected an int or None, got float"),
    ({"eps": -1.0}, ValueError, "eps: expected a finite number of 0 or more, got -1.0"),
    ({"eps": "1"}, TypeError, "eps: expected a float, got str"),
])
def test_bad_arguments(change, error, message):
    args = {"x": torch.zeros(2, 3, 8), "y": torch.zeros(2, 3, 8), "gate": torch.zeros(2, 8), "scale": torch.zeros(2, 8),
            "shift": torch.zeros(2, 8), "split": None, "eps": 1e-6, **change}
    with pytest.raises(error, match=f"gated_residual_ada_layer_norm: {message}" if ":" in message else message):
        ops.gated_residual_ada_layer_norm(args["x"], args["y"], args["gate"], args["scale"], args["shift"],
                                          eps=args["eps"], split=args["split"])
    if set(change) <= {"x", "scale", "shift", "eps"}:
        with pytest.raises(error, match=message):
            ops.ada_layer_norm(args["x"], args["scale"], args["shift"], eps=args["eps"])
    if set(change) <= {"x", "y", "gate"}:
        with pytest.raises(error, match=message):
            ops.gated_residual(args["x"], args["y"], args["gate"])


@pytest.mark.parametrize("split", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_a_gpu_takes_one_dtype(monkeypatch, dtype, split):
    """A stand-in for tensors of a GPU that no kernel runs on. torch's LayerNorm there takes no float32 affine map for 16
    bits (pytorch/pytorch#138128)."""
    class OnGpu(torch.Tensor):
        is_cpu = False

    real = torch.layer_norm

    def one_dtype(x, shape, weight, bias, *rest):
        assert x.dtype == weight.dtype == bias.dtype
        return real(x, shape, weight, bias, *rest)

    x, _, _, scale, shift = _inputs((1, 5, 64), dtype, "cpu", rows=1 if split is None else 2)
    rows = (scale[:, None], shift[:, None]) if split is None else (scale, shift)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "layer_norm", one_dtype)
        out = fallback.ada_layer_norm(x.as_subclass(OnGpu), *rows, split=split).as_subclass(torch.Tensor)
    assert out.dtype == dtype
    assert_accurate(out, cases.ada_layer_norm(*_double(x, scale, shift), 1e-6, split),
                    cases.ada_layer_norm(x, scale, shift, 1e-6, split), name="ada_layer_norm")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_gpu_without_kernels(monkeypatch, dtype):
    """Not run yet: no GPU was at hand."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("PYDIT_BACKEND", "reference")
    _check_all(*_inputs((2, 3, 96), dtype, "cuda"))
    _check_all(*_inputs((2, 5, 64), dtype, "cuda", rows=2), split=2)


def test_float64_needs_the_reference(device, kernel_only):
    x = torch.zeros(1, 2, 8, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match="ada_layer_norm: expected float32, float16 or bfloat16 .* got torch.float64"):
        ops.ada_layer_norm(x, x[:, 0], x[:, 0])
