"""Second moments against float64 on every backend: sums of 16-bit products are nearly exact, so bounds are tight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydit import backend, ops
from pydit.ops.second_moments import add_second_moments, mirror, zeros
from tests.ops import cases

BACKENDS = ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]
every_kernel = pytest.mark.parametrize("device", BACKENDS, indirect=True)
HALF = [torch.bfloat16, torch.float16]
# (N, d, e): one tile; several tiles and ragged ends; more than a chunk of 256 tokens; columns of 192; one column or token
SHAPES = [(40, 64, 0), (300, 150, 136), (700, 130, 20), (70, 400, 8), (9, 1, 3), (1, 12, 12)]


def make(shape, dtype, device, *, layout="contiguous", mean=0.0, seed=0):
    n, d, e = shape
    generator = torch.Generator().manual_seed(seed)
    wide = mean + torch.randn(n, d + e + 8, generator=generator)
    if layout == "unaligned":
        flat = torch.empty(n * (d + e + 9) + 1, dtype=dtype, device=device)[1:]
        rows = flat[:n * (d + e + 8)].view(n, -1).copy_(wide)
    else:
        rows = wide.to(device, dtype)
    x, y = rows[:, :d], rows[:, d + 8 - d % 8:][:, :e]
    if layout == "expanded":
        return rows[:1, :d].expand(n, d), (rows[:, d:d + e] if e else None)
    if layout == "contiguous":
        x, y = x.contiguous(), y.contiguous()
    return x, (y if e else None)


def bound(x, y, n):
    """Of the error of x^T y: the fp32 sums of 256 products and of 32 such sums, each rounded or truncated, no more."""
    return (256 + 32) * 2.0 ** -24 * (x.double().abs().T @ y.double().abs()) + 1e-12 * n


def check(x, y, device, shift_x=None, shift_y=None):
    n, sum_x, sum_y, xx, xy = ops.second_moments(x, y, shift_x=shift_x, shift_y=shift_y)
    x, y = x.cpu(), x.cpu()[:, :0] if y is None else y.cpu()
    u = x.double() - (0 if shift_x is None else shift_x.cpu().double())
    v = y.double() - (0 if shift_y is None else shift_y.cpu().double())
    assert n == len(x)
    assert all(t.dtype == torch.float64 and t.device.type == device.type for t in (sum_x, sum_y, xx, xy))
    assert torch.equal(xx, xx.T)
    for name, found, exact, limit in (("xx", xx, u.T @ u, bound(x, x, n)), ("xy", xy, u.T @ v, bound(x, y, n)),
                                      ("sum_x", sum_x, u.sum(0), 1e-5 * x.double().abs().sum(0) + 1e-12),
                                      ("sum_y", sum_y, v.sum(0), 1e-5 * y.double().abs().sum(0) + 1e-12)):
        error = (found.cpu() - exact).abs()
        assert found.shape == exact.shape and (error <= limit).all(), (name, error.max().item())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_reference_takes_and_gives_what_the_op_does(dtype):
    x, y = (t.double() for t in make((40, 6, 4), dtype, "cpu"))
    shift_x, shift_y = torch.linspace(-1, 1, 6), torch.linspace(2, 3, 4)
    u, v = x - shift_x.double(), y - shift_y.double()
    n, *found = ops.reference.second_moments(x.to(dtype), y.to(dtype), shift_x=shift_x, shift_y=shift_y)
    assert n == 40
    for one, exact in zip(found, (u.sum(0), v.sum(0), u.T @ u, u.T @ v), strict=True):
        assert one.dtype == torch.float64 and torch.equal(one, exact)
    _, sum_x, sum_y, xx, xy = ops.reference.second_moments(x.to(dtype))
    assert torch.equal(sum_x, x.sum(0)) and torch.equal(xx, x.T @ x) and sum_y.shape == (0,) and xy.shape == (6, 0)


@every_kernel
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, device):
    check(*make(shape, dtype, device), device)


@pytest.mark.parametrize("device", ["sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("cluster", ["1", "2"])
@pytest.mark.parametrize("shape", [(9, 1, 3), pytest.param((530, 264, 200), marks=pytest.mark.again),
                                   (300, 520, 0), (65, 130, 193)])
def test_blocks_alone_and_in_clusters(shape, cluster, copies, device, monkeypatch):
    """Blocks alone and in pairs: pairs with one block beyond the last column, tiles below the diagonal, ragged steps."""
    monkeypatch.setenv("PYDIT_CLUSTER", cluster)
    monkeypatch.setenv("PYDIT_SIM_ASYNC", copies)
    if device.type == "cpu":
        backend.configure_sim()
    x, y = make(shape, torch.bfloat16, device)
    check(x, y, device)
    reason = backend.report()["second_moments"]["reason"]
    if backend.KERNEL_PATHS[0] in reason:
        assert ("clusters of two" in reason) == (cluster == "2")
    first, second = (ops.second_moments(x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


@pytest.mark.parametrize("device", ["sim-90a"], indirect=True)
@pytest.mark.parametrize(("shape", "pairs"), [((40, 128, 0), False), ((40, 256, 0), True), ((700, 400, 0), True),
                                              ((2000, 100, 8), False), ((40, 100, 400), False)])
def test_pairs_of_blocks_where_they_read_less(shape, pairs, device, monkeypatch):
    monkeypatch.setenv("PYDIT_CLUSTER", "auto")
    ops.second_moments(*make(shape, torch.bfloat16, device))
    assert ("clusters of two" in backend.report()["second_moments"]["reason"]) == pairs


@pytest.mark.parametrize("device", ["sim"], indirect=True)
def test_a_cluster_of_another_size_is_refused(device):
    x, sums = torch.ones(4, 8, dtype=torch.bfloat16), zeros(8, 0, device)
    kernels = backend.choose("second_moments", x).kernels
    with pytest.raises(RuntimeError, match="second_moments: cluster: expected 0, 1 or 2, got 3"):
        kernels.second_moments(x, None, sums, lambda size: x.new_empty(size, dtype=torch.uint8), 3, 2, 0)


@every_kernel
@pytest.mark.parametrize("layout", ["strided", "unaligned", "expanded"])
def test_layouts(layout, device):
    check(*make((270, 136, 24), torch.bfloat16, device, layout=layout), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_wide_dtypes(dtype, device):
    x, y = make((70, 30, 9), dtype, device)
    _, _, _, xx, xy = ops.second_moments(x, y)
    torch.testing.assert_close(xx, x.double().T @ x.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(xy, x.double().T @ y.double(), rtol=1e-12, atol=1e-12)
    assert "torch multiplies in float64" in backend.report()["second_moments"]["reason"]


@every_kernel
def test_shift_values(device):
    """With a mean of 50 standard deviations the shifted sums keep the digits that bfloat16 input has."""
    x, y = make((520, 40, 17), torch.float16, device, mean=50.0)
    shift_x, shift_y = (t.float().mean(0) for t in (x, y))
    check(x, y, device, shift_x, shift_y)
    check(x, y, device, shift_x, None)
    check(x, y, device, None, shift_y)
    check(x, None, device, shift_x)


@every_kernel
def test_sums_go_on_values(device):
    """Additions to what is there, as accumulators use it, equal one call over all tokens."""
    x, y = make((600, 70, 20), torch.bfloat16, device)
    sums, whole = zeros(70, 20, x.device), zeros(70, 20, x.device)
    for a, b in zip(x.split([256, 1, 343]), y.split([256, 1, 343]), strict=True):
        add_second_moments(a, b, sums)
    add_second_moments(x, y, whole)
    for a, b in zip((mirror(sums[0]), *sums[1:]), (mirror(whole[0]), *whole[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(sums[4], y.double().square().sum(0), rtol=1e-5, atol=0)


@every_kernel
def test_error_does_not_grow_with_tokens(device, kernel_only):
    """Ten times as many tokens of one sign: fp32 alone would lose digits, chunks in fp64 do not."""
    errors = []
    for n in (256, 2560):
        x = make((n, 16, 0), torch.bfloat16, device, mean=3.0)[0]
        xx = ops.second_moments(x)[3].cpu()
        exact = x.cpu().double().T @ x.cpu().double()
        errors.append(((xx - exact).abs() / exact).max().item())
    assert errors[1] <= max(errors[0], 256 * 2.0 ** -24)


@every_kernel
@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0, 1000.0])
def test_error_is_not_above_that_of_float32_sums(mean, device, kernel_only):
    """Of cuBLAS with float32 output on a GPU, of tokens added one by one in float32 elsewhere."""
    x = make((2560, 24, 0), torch.bfloat16, device, mean=mean)[0]
    if device.type == "cuda":
        peer = torch.mm(x.T, x, out_dtype=torch.float32)
    else:
        peer = torch.zeros(24, 24)
        for token in x.float():
            peer.addr_(token, token)
    exact = x.cpu().double().T @ x.cpu().double()
    ours, theirs = ((t.cpu().double() - exact).abs().max() for t in (ops.second_moments(x)[3], peer))
    assert theirs > 0 and ours <= theirs


@every_kernel
def test_more_chunks_than_one_sum_takes(device):
    """More chunks than one fp32 sum may have: 32 of 256 tokens."""
    check(*make((34 * 256 + 5, 16, 0), torch.bfloat16, device, mean=2.0), device)


@every_kernel
def test_run_to_run_equality(device):
    x, y = make((900, 140, 130), torch.bfloat16, device)
    first, second = (ops.second_moments(x, y) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


@every_kernel
def test_nothing(device):
    for shape in ((0, 8, 3), (5, 0, 0)):
        n, sum_x, _, xx, xy = ops.second_moments(*make(shape, torch.bfloat16, device))
        assert n == shape[0] and not xx.any() and xy.shape == (shape[1], shape[2]) and not sum_x.any()


@every_kernel
@cases.examples(15)
@given(data=st.data())
def test_any_shape(device, data):
    shape = (data.draw(st.integers(1, 600), "N"), data.draw(st.integers(1, 300), "d"), data.draw(st.integers(0, 140)))
    x, y = make(shape, data.draw(st.sampled_from(HALF)), device, seed=data.draw(st.integers(0, 9)),
                layout=data.draw(st.sampled_from(["contiguous", "strided", "unaligned"])))
    check(x, y, device)


@pytest.mark.parametrize(("device", "layout", "words"), [
    ("sim", "contiguous", "not of compute capability 9.x"), ("sim-90a", "contiguous", "the Hopper kernel"),
    ("sim-90a", "unaligned", "not multiples of 16 bytes"), ("sim-90a", "expanded", "or a stride is 0"), ("reference", "contiguous", "the tensors are on the CPU")],
    indirect=["device"])
def test_report_names_the_kernel(device, layout, words):
    ops.second_moments(*make((20, 16, 8), torch.bfloat16, device, layout=layout))
    assert words in backend.report()["second_moments"]["reason"]


@pytest.mark.parametrize(("arguments", "error", "words"), [
    (([1],), TypeError, "x: expected a torch.Tensor, got list"),
    ((torch.ones(3, dtype=torch.int32),), TypeError, "x: expected a floating-point tensor of 16, 32 or 64 bits, got torch.int32"),
    ((torch.ones(3),), ValueError, r"x: expected shape \[N, d\], got \[3\]"),
    ((torch.ones(3, 4).T,), ValueError, "x: expected a contiguous last dimension, got stride 4"),
    ((torch.ones(3, 4), torch.ones(2, 4)), ValueError, r"y: expected as many rows as x \(3\), got 2"),
    ((torch.ones(3, 4), torch.ones(3, 4).half()), TypeError, "y: expected torch.float32 like the first argument")])
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.second_moments(*arguments)


def test_no_gradient_on_any_path(device):
    x, y = (t.requires_grad_() for t in make((20, 10, 6), torch.float32, device))
    found = ops.second_moments(x, y, shift_x=torch.ones(10, device=device, requires_grad=True))
    assert not any(t.requires_grad for t in found[1:])


@pytest.mark.parametrize(("shifts", "error", "words"), [
    (dict(shift_x=1.0), TypeError, "shift_x: expected a floating-point tensor or None, got float"),
    (dict(shift_x=torch.ones(3)), ValueError, r"shift_x: expected shape \[4\] on cpu, got \[3\] on cpu"),
    (dict(shift_y=torch.ones(3)), ValueError, "shift_y: expected None without y, got a Tensor")])
def test_bad_shifts(shifts, error, words):
    with pytest.raises(error, match=words):
        ops.second_moments(torch.ones(3, 4), **shifts)


def test_opcheck(device):
    x, y = make((20, 10, 6), torch.bfloat16, device)
    torch.library.opcheck(torch.ops.pydit.add_second_moments.default, (x, y, *zeros(10, 6, x.device)))
