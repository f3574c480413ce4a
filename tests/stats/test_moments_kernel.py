"""Moments of 16-bit rows, which kernels add to plain sums: same state, merges and errors as the shifted path."""

import copy

import pytest
import torch

from pydit.errors import UserError
from pydit.stats import LinearProbe, Moments
from tests.stats.test_moments import FIELDS, assert_same, reference, rows

HALF = [torch.bfloat16, torch.float16]


def accumulate(x, y, sizes):
    moments = Moments(x.shape[1], y.shape[1], device=x.device)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.update(a, b)
    return moments


def exact(x, y):
    return {name: value.to(x.device) for name, value in reference(x.cpu(), y.cpu()).items()}


def half_rows(dtype, device, **changes):
    return (t.to(device) for t in rows(n=600, d=24, e=12, dtype=dtype, **changes))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", [[600], [1, 0, 299, 300]])
def test_streamed_equals_whole(dtype, sizes, device):
    x, y = half_rows(dtype, device)
    moments = accumulate(x, y, sizes)
    assert moments.count == 600
    assert_same(moments, exact(x, y), rtol=1e-5)
    assert torch.equal(moments.m_xx, moments.m_xx.T)


@pytest.mark.parametrize("dtype", HALF)
def test_a_state_that_inference_mode_has_touched(dtype, device):
    x, y = half_rows(dtype, device)
    with torch.inference_mode():
        moments = Moments(24, 12, device=device).merge(accumulate(x[:200], y[:200], [200]))
        moments.update(x[200:300], y[200:300])
        loaded = Moments(24, 12, device=device)
        loaded.load_state_dict(moments.state_dict())
    for each in (moments, loaded):
        each.update(x[300:], y[300:])
        assert_same(each, exact(x, y), rtol=1e-5)


@pytest.mark.parametrize("ratio", [0, 1, 3, 30, 100, 1000])
def test_error_of_a_mean_of_many_deviations(ratio, device):
    """Inside the documented bound on a variance, 1.8e-5 (1 + r^2): that of 288 additions in float32."""
    x, y = half_rows(torch.float16, device, offset=ratio)
    moments, right = accumulate(x, y, [600]), exact(x, y)
    spread = right["m_xx"].diagonal()
    r = 600 * right["mean_x"].square() / spread
    error = (moments.m_xx.diagonal() - spread).abs() / spread
    assert (error <= 288 * 2.0 ** -24 * (1 + r)).all()
    assert (moments.mean_x - right["mean_x"]).abs().max() < 1e-5 * max(ratio, 1)


def test_reading_between_updates_changes_nothing(device):
    x, y = half_rows(torch.bfloat16, device, offset=2.0)
    moments = Moments(24, 12, device=device)
    for a, b in zip(x.split(200), y.split(200), strict=True):
        moments.update(a, b)
        before = {name: getattr(moments, name).clone() for name in FIELDS}
        for name in FIELDS:
            assert torch.equal(getattr(moments, name), before[name])
    assert_same(moments, exact(x, y), rtol=1e-5)


def test_merge_resume_and_mixed_dtypes(device):
    """Parts that were streamed in bfloat16 and float32, merged either way round, saved and continued."""
    x, y = half_rows(torch.bfloat16, device, offset=1.0)
    halves = list(zip(x.split(300), y.split(300), strict=True))
    narrow = Moments(24, 12, device=device).update(*halves[0])
    wide = Moments(24, 12, device=device).update(*(t.float() for t in halves[1]))
    for first, second in ((narrow, wide), (wide, narrow)):
        assert_same(copy.deepcopy(first).merge(copy.deepcopy(second)), exact(x, y), rtol=1e-5)
    resumed = Moments(24, 12, device=device)
    resumed.update(*halves[1])
    resumed.load_state_dict(narrow.state_dict())
    assert_same(resumed.update(*halves[1]), exact(x, y), rtol=1e-5)
    assert_same(narrow.update(*(t.float() for t in halves[1])), exact(x, y), rtol=1e-5)


def test_x_alone_and_strided_rows(device):
    x, y = half_rows(torch.bfloat16, device)
    moments = Moments(24, device=device).update(x[::2]).update(x[1::2].T.contiguous().T)
    torch.testing.assert_close(moments.m_xx, exact(x, y)["m_xx"], rtol=1e-5, atol=1e-4)


def test_not_finite_is_found_when_the_state_is_read(device):
    x, y = half_rows(torch.bfloat16, device)
    x[7, 3] = torch.nan
    moments = Moments(24, 12, device=device)
    for _ in range(2):
        with pytest.raises(UserError, match="expected finite values"):
            moments.update(x, y).m_xx  # noqa: B018 - reading raises


def test_constant_channels_have_no_spread(device):
    x = torch.linspace(0.1, 3, 64).half().expand(513, -1).contiguous().to(device)
    moments = Moments(64, 64, device=device).update(x, x)
    assert (moments.s_yy >= 0).all() and (moments.m_xx.diagonal() >= 0).all()
    assert moments.m_xx.abs().max() < 288 * 2.0 ** -24 * 513 * 3 ** 2


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_probe_of_fewer_rows_than_channels(mean, ridge, device):
    """The rounding of float32 sums is more than such a ridge: left alone it fills the directions that no row has."""
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(200, 128, generator=generator)
    x[:, 5] *= 50
    x[:, 7] += 200
    y = x + 0.1 * (x @ torch.randn(128, 128, generator=generator) / 128 ** 0.5).tanh()
    x, y = x.bfloat16(), y.bfloat16()
    (seen, target), (x, y) = (x[:100], y[:100]), (x[100:].double(), y[100:].double())
    moments = Moments(128, 128, device=device).update(seen.to(device), target.to(device))
    wide = Moments(128, 128).update(seen.double(), target.double())
    assert moments.rounded == (100 if moments.rounding().any() else 0) and wide.rounded == 0
    probe, right = (LinearProbe.fit(one, ridge=ridge, residual=True) for one in (moments, wide))
    errors = [(one(x.to(device)).cpu() - y).square().mean().sqrt() for one in (probe, right)]
    assert errors[0] <= 2 * errors[1] and probe.r2 <= 1


def test_probe_of_channels_with_large_means(device):
    """With rows enough the ridge is what was asked for: one above the rounding would take the most from such channels."""
    generator = torch.Generator().manual_seed(0)
    x = 50 + torch.randn(1200, 64, generator=generator)
    y = (x - 50) @ torch.randn(64, 64, generator=generator)
    x, y = x.half(), y.half()
    probe, right = (LinearProbe.fit(Moments(64, 64, device=one.device).update(one[:600], other[:600]))
                    for one, other in ((x.to(device), y.to(device)), (x.double(), y.double())))
    x, y = x[600:].double(), y[600:].double()
    errors = [(one(x.to(one.weight)).cpu() - y).square().mean().sqrt() for one in (probe, right)]
    assert errors[0] <= 1.1 * errors[1]


def test_rounded_rows_are_counted(device):
    """By updates, merges and states, in each part as many as a kernel took."""
    x, y = half_rows(torch.bfloat16, device)
    moments = Moments(24, 12, device=device).update(x, y)
    taken = moments.rounded
    wide = Moments(24, 12, device=device).update(x.float(), y.float()).merge(moments)
    assert taken in (0, 600) and (wide.count, wide.rounded) == (1200, taken)
    few = Moments(24, 12, device=device).update(x[:10], y[:10])
    both = Moments(24, 12, device=device).update(x[:10].float(), y[:10].float()).merge(few)
    torch.testing.assert_close(both.rounding(), few.rounding())  # twice the squares, half of the rows
    resumed = Moments(24, 12, device=device)
    resumed.load_state_dict(wide.state_dict())
    assert resumed.rounded == taken
    with pytest.raises(UserError, match="expected rounded to be a number of rows up to 1200, got torch.int64"):
        resumed.load_state_dict({**wide.state_dict(), "rounded": torch.tensor(1201)})
