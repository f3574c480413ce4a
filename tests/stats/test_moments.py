"""Moments and probes against float64 formulas on all rows at once."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydit.errors import UserError
from pydit.stats import LinearProbe, Moments

FIELDS = ("mean_x", "mean_y", "m_xx", "m_xy", "s_yy")


def rows(n=200, d=6, e=4, offset=0.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x[:, :1].tanh() + 0.3 * torch.randn(n, e, generator=generator, dtype=torch.float64)
    return (x + offset).to(dtype), (y - offset).to(dtype)


def reference(x, y):
    x, y = x.double(), y.double()
    xc, yc = x - x.mean(0), y - y.mean(0)
    return dict(zip(FIELDS, (x.mean(0), y.mean(0), xc.T @ xc, xc.T @ yc, yc.square().sum(0)), strict=True))


def assert_same(moments, expected, rtol=1e-12):
    for name, value in expected.items():
        error = (getattr(moments, name) - value).abs().max() / value.abs().max()
        assert error < rtol, f"{name}: relative error {error:.2e}"


def accumulate(x, y, sizes):
    moments = Moments(x.shape[1], y.shape[1])
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.update(a, b)
    return moments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[200], [1] * 200, [3, 150, 0, 47]])
def test_streamed_equals_whole(dtype, sizes):
    x, y = rows(dtype=dtype)
    moments = accumulate(x, y, sizes)
    assert moments.count == 200
    assert_same(moments, reference(x, y))


def test_large_offset_costs_no_digits():
    x, y = rows(offset=1e4)
    assert_same(accumulate(x, y, [37, 60, 103]), reference(x, y), rtol=1e-9)


def test_merge_in_any_order():
    x, y = rows(offset=1e3)
    sizes = [20, 1, 100, 79]
    parts = [accumulate(a, b, [len(a)]) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        total = Moments(6, 4)
        for index in order:
            total.merge(copy.deepcopy(parts[index]))
        assert total.count == 200
        assert_same(total, reference(x, y), rtol=1e-9)
    left, right = parts[0].merge(parts[1]), parts[2].merge(parts[3])
    assert_same(left.merge(right), reference(x, y), rtol=1e-9)
    assert right.count == 179


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_split_and_any_order_of_merges(data):
    """Rows cut anywhere, each part streamed in batches of its own, parts merged two by two in any order."""
    x, y = rows(offset=data.draw(st.sampled_from([0.0, 1e3])))
    cuts = sorted(data.draw(st.lists(st.integers(0, 200), max_size=5)))
    parts = []
    for start, end in zip([0, *cuts], [*cuts, 200], strict=True):
        size = data.draw(st.integers(1, 60))
        a, b = x[start:end].split(size), y[start:end].split(size)
        parts.append(Moments(6, 4))
        for pair in zip(a, b, strict=True):
            parts[-1].update(*pair)
    while len(parts) > 1:
        one = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(one)
    assert parts[0].count == 200
    assert_same(parts[0], reference(x, y), rtol=1e-9)


def test_merge_with_empty_is_identity():
    x, y = rows()
    moments = accumulate(x, y, [200]).merge(Moments(6, 4))
    assert_same(moments, reference(x, y))
    assert_same(Moments(6, 4).merge(moments), reference(x, y))


def test_x_alone():
    x, _ = rows()
    moments = Moments(6).update(x)
    assert torch.allclose(moments.m_xx, reference(x, x)["m_xx"])
    with pytest.raises(UserError, match="y: expected no y"):
        moments.update(x, x)


def test_state_round_trip_continues_the_same():
    x, y = rows(offset=50)
    first = accumulate(x[:90], y[:90], [90])
    resumed = Moments(6, 4)
    resumed.load_state_dict(first.state_dict())
    first.update(x[90:], y[90:])
    resumed.update(x[90:], y[90:])
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(resumed, name))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("m_xx"), "m_xx is missing or unknown"),
    (lambda s: s.update(m_xx=torch.zeros(2, 2)), r"expected m_xx \[6, 6\], got \[2, 2\]"),
])
def test_bad_state(change, message):
    state = Moments(6, 4).state_dict()
    change(state)
    with pytest.raises(UserError, match=message):
        Moments(6, 4).load_state_dict(state)


@pytest.mark.parametrize("x, y, message", [
    (torch.zeros(3, 5), torch.zeros(3, 4), r"x: expected \[n, 6\], got \[3, 5\]"),
    (torch.zeros(3, 6), torch.zeros(2, 4), r"y: expected as many rows as x \(3\), got 2"),
    (torch.zeros(3, 6), None, r"y: expected \[n, 4\], got none"),
    (torch.zeros(3, 6, dtype=torch.int32), torch.zeros(3, 4), "x: expected a float tensor, got torch.int32"),
    (torch.full((3, 6), torch.nan), torch.zeros(3, 4), "expected finite values"),
])
def test_bad_rows(x, y, message):
    with pytest.raises(UserError, match=message):
        Moments(6, 4).update(x, y)


def test_merge_of_something_else():
    with pytest.raises(UserError, match="other: expected Moments, got dict"):
        Moments(6).merge(Moments(6).state_dict())


def test_probe_is_ridge_regression():
    x, y = rows(dtype=torch.float64, offset=3)
    moments = accumulate(x, y, [200])
    ridge = 0.1
    probe = LinearProbe.fit(moments, ridge=ridge)
    xc, yc = x - x.mean(0), y - y.mean(0)
    shrink = ridge * xc.square().sum() / 6
    # Ridge regression as ordinary least squares with sqrt(shrink) I stacked below.
    stacked = torch.cat([xc, shrink.sqrt() * torch.eye(6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([yc, torch.zeros(6, 4, dtype=torch.float64)])).solution.T
    assert torch.allclose(probe.weight, expected, atol=1e-10)
    error = y - (x @ expected.T + y.mean(0) - expected @ x.mean(0))
    assert torch.allclose(probe(x), y - error, atol=1e-10)
    assert abs(probe.r2 - (1 - float(error.square().sum() / yc.square().sum()))) < 1e-10


def test_probe_recovers_an_affine_map_also_in_residual_form():
    x, _ = rows(d=5, dtype=torch.float64)
    weight, bias = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    y = x @ weight.T + bias
    for residual in (False, True):
        probe = LinearProbe.fit(accumulate(x, y, [200]), ridge=0, residual=residual)
        assert torch.allclose(probe.weight, weight, atol=1e-9)
        assert torch.allclose(probe.bias, bias, atol=1e-9)
        assert abs(probe.r2 - 1) < 1e-12


def test_residual_ridge_pulls_to_the_identity():
    x, _ = rows(n=3, d=6, dtype=torch.float64)  # 3 rows, 6 channels: undetermined
    probe = LinearProbe.fit(Moments(6, 6).update(x, x + 1), residual=True)
    assert torch.allclose(probe.weight, torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(probe(x), x + 1)


def test_rank_deficient_without_ridge_is_finite():
    x, y = rows(dtype=torch.float64)
    x[:, 5] = x[:, 0]
    probe = LinearProbe.fit(accumulate(x, y, [200]), ridge=0)
    # The minimum-norm solution shares the weight between equal columns.
    assert torch.allclose(probe.weight[:, 0], probe.weight[:, 5], atol=1e-8)


def test_constant_input():
    _, y = rows(dtype=torch.float64)
    probe = LinearProbe.fit(accumulate(torch.ones(200, 6, dtype=torch.float64), y, [200]))
    assert torch.equal(probe.weight, torch.zeros(4, 6, dtype=torch.float64))
    assert torch.allclose(probe.bias, y.mean(0))


def test_probe_errors():
    x, y = rows()
    with pytest.raises(UserError, match="expected at least 2 rows, got 1"):
        LinearProbe.fit(Moments(6, 4).update(x[:1], y[:1]))
    with pytest.raises(UserError, match="got x alone"):
        LinearProbe.fit(Moments(6).update(x))
    with pytest.raises(UserError, match="ridge: expected a number >= 0, got -1"):
        LinearProbe.fit(accumulate(x, y, [200]), ridge=-1)
    with pytest.raises(UserError, match="of one width, got 6 and 4"):
        LinearProbe.fit(accumulate(x, y, [200]), residual=True)
    with pytest.raises(UserError, match=r"x: expected floats \[..., 6\]"):
        LinearProbe.fit(accumulate(x, y, [200]))(y)


def test_ten_million_tokens_with_outliers():
    """1e-6 relative, held against a second pass about the exact mean; one token in 1000 is 1e4 deviations out."""
    generator = torch.Generator().manual_seed(0)
    moments, batches = Moments(3, 2), []
    for _ in range(20):
        rows = torch.randn(500_000, 5, generator=generator) + 7
        rows[::1000, 1] += 1e4
        moments.update(rows[:, :3], rows[:, 3:])
        batches.append(rows)
    rows = torch.cat(batches).double()
    rows -= rows.mean(0)
    assert moments.count == 10_000_000
    products = rows.T @ rows
    scale = products.diagonal().sqrt()
    for found, exact, size in ((moments.m_xx, products[:3, :3], torch.outer(scale[:3], scale[:3])),
                               (moments.m_xy, products[:3, 3:], torch.outer(scale[:3], scale[3:])),
                               (moments.s_yy, products.diagonal()[3:], scale[3:].square())):
        assert ((found - exact).abs() / size).max() < 1e-6


def test_probes_in_batches_equal_probes_one_by_one():
    """More than one batch of factorisations, one of them singular."""
    all_moments = []
    for seed in range(11):
        x, y = rows(n=40, d=6, e=6, seed=seed, dtype=torch.float64)
        if seed == 4:
            x[:, 5] = x[:, 4]
        all_moments.append(Moments(6, 6).update(x, y))
    for options in (dict(ridge=1e-6), dict(ridge=0.0, residual=True)):
        for one, probe in zip(all_moments, LinearProbe.fit_all(all_moments, **options), strict=True):
            alone = LinearProbe.fit(one, **options)
            torch.testing.assert_close(probe.weight, alone.weight, rtol=1e-9, atol=1e-9)
            assert abs(probe.r2 - alone.r2) < 1e-9
    conditions = [probe.condition for probe in LinearProbe.fit_all(all_moments, ridge=0.0)]
    assert conditions[4] == float("inf")
    for one, condition in zip(all_moments[:4], conditions[:4], strict=True):
        values = torch.linalg.eigvalsh(one.m_xx)
        assert 0.9 * values[-1] / values[0] <= condition <= 1.001 * values[-1] / values[0]
    with pytest.raises(UserError, match="expected one shape"):
        LinearProbe.fit_all([Moments(6, 6).update(*rows(d=6, e=6)), Moments(6, 4).update(*rows())])
