"""CKA against the three-term formula of unbiased HSIC in float64, written out here."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydit.errors import UserError
from pydit.ops.reference import centred, u_centred_gram
from pydit.stats import CKA, clip_outliers, linear_cka
from pydit.stats.cka import debiased_hsic_features, describe_rows
from tests.ops import cases


def features(n, widths, seed=0, dtype=torch.float64):
    """One [n, d] matrix per width, sharing some structure."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return [(common @ torch.randn(3, d, generator=generator, dtype=torch.float64)
             + torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype) for d in widths]


def three_term(x, y):
    """Unbiased HSIC of Song et al. (2012)."""
    n = len(x)
    k, l = x @ x.T, y @ y.T
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())
    one = torch.ones(n, dtype=torch.float64)
    return ((k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def reference_matrix(batches):
    """CKA from HSIC averaged over batches, each counting equally."""
    size = len(batches[0])
    hsic = sum(torch.stack([torch.stack([three_term(x, y) for y in batch]) for x in batch]) for batch in batches)
    return torch.stack([torch.stack([hsic[i, j] / (hsic[i, i] * hsic[j, j]).sqrt() for j in range(size)])
                        for i in range(size)])


@pytest.mark.parametrize("n", [4, 5, 16, 100])
def test_three_formulas_agree(n):
    x, y = features(n, (7, 5))
    u_form = (u_centred_gram(x) * u_centred_gram(y)).sum() / (n * (n - 3))
    feature_form = debiased_hsic_features(centred(x), centred(y)) / (n * (n - 3))
    expected = three_term(x, y)
    assert torch.allclose(u_form, expected, rtol=1e-10)
    assert torch.allclose(feature_form, expected, rtol=1e-9)


def test_matrix_averages_hsic_over_unequal_batches():
    batches = [features(n, (6, 9, 4), seed=n) for n in (12, 40, 5)]
    cka = CKA(3)
    for batch in batches:
        cka.update(batch)
    assert torch.allclose(cka.matrix(), reference_matrix(batches), atol=1e-12)
    assert (cka.matrix().diagonal() - 1).abs().max() <= 1e-6


def test_large_offset_in_float32():
    """A common offset of 1000 standard deviations: the three-term formula in float32 loses everything."""
    x, y = features(16, (64, 64))
    x32, y32 = (x + 1000).float(), (y + 1000).float()
    expected = three_term(x, y) / (three_term(x, x) * three_term(y, y)).sqrt()
    assert abs(linear_cka(x32, y32) - float(expected)) < 1e-3
    assert torch.allclose(CKA(2).update([x32, y32]).matrix()[0, 1], expected, atol=1e-3)


def test_many_small_batches_in_float32_never_nan():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(16, 256, generator=generator) + 50
        matrix = CKA(2).update([x, torch.randn(16, 256, generator=generator) + 50]).matrix()
        assert torch.isfinite(matrix).all()
        assert matrix.abs().max() <= 1 + 1e-12


def test_unrelated_wide_features_are_near_zero():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3072, generator=generator), torch.randn(64, 3072, generator=generator)
    assert abs(linear_cka(x, y)) < 0.05
    assert linear_cka(x, y, debiased=False) > 0.95


def test_clip_takes_shared_outliers_out():
    """8 of 1024 tokens share one channel at 100 deviations; the rest is unrelated."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1024, 64, generator=generator), torch.randn(1024, 64, generator=generator)
    for features in (x, y):
        features[:8, 3] = 100
    assert linear_cka(x, y) > 0.7
    assert abs(linear_cka(clip_outliers(x, 5.0), clip_outliers(y, 5.0))) < 0.1
    assert torch.equal(clip_outliers(x, 1e9), x)
    sparse = torch.where(torch.rand(1024, 64, generator=generator) < 0.7, 0.0, x)  # a median of 0
    assert torch.equal(clip_outliers(sparse, 5.0), sparse)
    with pytest.raises(UserError, match="limit: expected a number above 0, got 0"):
        clip_outliers(x, 0)


def test_biased_is_the_textbook_formula():
    x, y = features(50, (6, 9))
    h = torch.eye(50, dtype=torch.float64) - 1 / 50
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    assert math.isclose(linear_cka(x, y, debiased=False), float((k * l).sum() / (k.norm() * l.norm())), rel_tol=1e-10)


def test_many_rows_take_the_feature_form_and_agree(monkeypatch):
    x, y = features(300, (6, 9))
    expected = linear_cka(x, y)
    monkeypatch.setattr("pydit.stats.cka._MAX_GRAM_ROWS", 10)
    assert math.isclose(linear_cka(x, y), expected, rel_tol=1e-9)


@cases.examples(30)
@given(st.integers(4, 20), st.floats(0.1, 100), st.integers(0, 1000))
def test_invariant_to_rotation_scale_and_translation(n, scale, seed):
    x, y = features(n, (5, 6), seed=seed)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    assert math.isclose(linear_cka(x, y), linear_cka(scale * x @ rotation + 3, y), abs_tol=1e-9)


@pytest.mark.parametrize("gram_rows", [2, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 41])
def test_layers_without_an_hsic_give_zero(n, dtype, gram_rows, monkeypatch):
    """Constant ones, and those of which one row alone is unlike the rest, which HSIC_1 does not see."""
    monkeypatch.setattr("pydit.stats.cka._MAX_GRAM_ROWS", gram_rows)
    x, other, row = features(n, (5, 5, 5), dtype=dtype)
    constant = torch.full_like(x, 0.1)
    for nothing in (torch.zeros_like(x), constant, constant.index_copy(0, torch.tensor([1]), row[1:2])):
        matrix = CKA(3).update([x, nothing, other]).matrix()
        assert not matrix[1].any() and not matrix[:, 1].any()
        assert (matrix.diagonal()[::2] - 1).abs().max() <= 1e-6
        assert linear_cka(x, nothing) == linear_cka(nothing, nothing) == 0.0
    assert linear_cka(x, constant, debiased=False) == 0.0


@given(n=st.integers(4, 12), kinds=st.lists(st.sampled_from(["plain", "offset", "massive", "same", "zero", "constant",
                                                             "one row", "tiny", "huge"]), min_size=1, max_size=4),
       dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_never_nan_and_diagonal_one(n, kinds, dtype, seed):
    """Whatever the layers are: 1 on the diagonal or, without an HSIC, 0; nothing beyond 1."""
    layers = features(n, (6,) * len(kinds), seed=seed)
    for kind, x in zip(kinds, layers, strict=True):
        x += {"offset": 1000.0, "massive": torch.eye(n, 6) * 1e4}.get(kind, 0.0)
        x *= {"zero": 0.0, "constant": 0.0, "one row": torch.eye(n)[:, 2:3], "tiny": 1e-8, "huge": 1e8}.get(kind, 1.0)
        x += kind == "constant"
    matrix = CKA(len(kinds)).update([(layers[0] if kind == "same" else x).to(dtype)
                                     for kind, x in zip(kinds, layers, strict=True)]).matrix()
    assert matrix.isfinite().all() and matrix.abs().max() <= 1 + 1e-6
    diagonal = matrix.diagonal()
    assert (torch.minimum((diagonal - 1).abs(), diagonal.abs()) <= 1e-6).all()
    nothing = {"zero", "constant", "one row", "same"} | ({"offset"} if dtype == torch.bfloat16 else set())
    assert all(value > 0.5 for kind, value in zip(kinds, diagonal.tolist(), strict=True) if kind not in nothing)


def test_merge_and_state_round_trip():
    batches = [features(10, (4, 4), seed=s) for s in range(6)]
    whole, left, right = CKA(2), CKA(2), CKA(2)
    for index, batch in enumerate(batches):
        whole.update(batch)
        (left if index % 2 else right).update(batch)
    resumed = CKA(2)
    resumed.load_state_dict(left.state_dict())
    assert torch.allclose(resumed.merge(right).matrix(), whole.matrix(), atol=1e-14)
    assert torch.allclose(right.merge(left).matrix(), whole.matrix(), atol=1e-14)


@given(st.permutations(range(5)), st.lists(st.integers(0, 2), min_size=5, max_size=5), st.permutations(range(3)))
def test_any_order_and_any_merge_of_the_same_batches(order, part_of, merged):
    """Of three parts, some empty, each with its batches in any order."""
    batches = [features(n, (6, 8), seed=n) for n in (10, 11, 12, 13, 4)]
    parts = [CKA(2) for _ in range(3)]
    for index in order:
        parts[part_of[index]].update(batches[index])
    whole = parts[merged[0]].merge(parts[merged[1]]).merge(parts[merged[2]])
    assert torch.allclose(whole.matrix(), reference_matrix(batches), atol=1e-12) and whole.batches == 5


def test_interval_is_a_paired_bootstrap():
    cka = CKA(3)
    for seed in range(30):
        cka.update(features(12, (4, 5, 4), seed=seed))
    low, high = cka.interval(0.9)
    matrix = cka.matrix()
    off = ~torch.eye(3, dtype=torch.bool)
    assert ((low <= matrix) & (matrix <= high))[off].all() and (low < high)[off].all()
    assert torch.allclose(low.diagonal(), torch.ones(3, dtype=torch.float64))
    wide_low, wide_high = cka.interval(0.99)
    assert (wide_low <= low + 1e-12).all() and (wide_high >= high - 1e-12).all()
    # Two layers that are equal up to rotation get equal intervals: the same batches are drawn for all pairs.
    twin = CKA(3)
    for seed in range(30):
        x, y = features(12, (4, 5), seed=seed)
        twin.update([x, y, x.flip(1)])
    low, high = twin.interval()
    assert torch.allclose(low[0], low[2], atol=1e-12) and torch.allclose(high[0], high[2], atol=1e-12)


def test_interval_covers():
    """The true value lies inside a 90 % interval about 9 times out of 10."""
    truth_of = CKA(2)
    for seed in range(2000):
        truth_of.update(correlated(8, seed))
    truth = truth_of.matrix()[0, 1]
    inside = 0
    for trial in range(60):
        cka = CKA(2)
        for index in range(25):
            cka.update(correlated(8, 10_000 + 100 * trial + index))
        low, high = cka.interval(0.9, resamples=300)
        inside += bool(low[0, 1] <= truth <= high[0, 1])
    assert 44 <= inside <= 60


def correlated(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return [x, x + torch.randn(n, 3, generator=generator, dtype=torch.float64)]


def test_errors():
    x, y = features(10, (4, 4))
    with pytest.raises(UserError, match="at least 4 rows for the unbiased HSIC, got 3"):
        CKA(2).update([x[:3], y[:3]])
    with pytest.raises(UserError, match="expected 2 layers, got 1"):
        CKA(2).update([x])
    with pytest.raises(UserError, match="with one n"):
        CKA(2).update([x, y[:5]])
    with pytest.raises(UserError, match="expected finite values"):
        CKA(2).update([x, y * torch.inf])
    for debiased in (True, False):
        with pytest.raises(UserError, match="x, y: expected finite values"):
            linear_cka(x, y * torch.nan, debiased=debiased)
    with pytest.raises(UserError, match="at least 1 batch, got 0"):
        CKA(2).matrix()
    with pytest.raises(UserError, match="at least 2 batches, got 1"):
        CKA(2).update([x, y]).interval()
    with pytest.raises(UserError, match="same number of rows, at least 4, got 3 and 3"):
        linear_cka(x[:3], y[:3])
    with pytest.raises(UserError, match="expected 3 layers, got 2"):
        CKA(3).merge(CKA(2))
    with pytest.raises(UserError, match="other: expected a CKA, got list"):
        CKA(2).merge([x, y])
    with pytest.raises(UserError, match="features: expected a torch.Tensor, got list"):
        CKA(2).update([x, y.tolist()])
    with pytest.raises(UserError, match="y: expected a torch.Tensor, got ndarray"):
        linear_cka(x, y.numpy())
    with pytest.raises(UserError, match=r"expected hsic \[batches, 2, 2\]"):
        CKA(2).load_state_dict({"hsic": torch.zeros(1, 3, 3)})


def test_rows_of_batches_are_reported():
    cka = CKA(2)
    for n in (10, 10, 6):
        cka.update(features(n, (4, 4), seed=n))
    other = CKA(2)
    other.load_state_dict(cka.state_dict())
    assert other.merge(cka).rows == [10, 10, 6] * 2
    assert cka.describe() == "3 batches of 10 rows; batch 2 has 6"
    assert describe_rows([9, *range(6)]) == ("7 batches of 9 rows; batch 1 has 0, batch 2 has 1, batch 3 has 2, "
                                             "batch 4 has 3 and 2 more are shorter")
