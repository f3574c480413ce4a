"""HSIC of all pairs against the three-term formula of Song et al. (2012) in float64, on every backend."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pydit import backend, ops
from pydit.errors import UserError
from pydit.stats import CKA
from tests.ops import cases

HALF = [torch.bfloat16, torch.float16]
HOPPER = ["sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]
every_kernel = pytest.mark.parametrize("device", ["reference", "sim", *HOPPER], indirect=True)
hopper_kernel = pytest.mark.parametrize("device", HOPPER, indirect=True)


def make(n, widths, dtype, device, *, offset=0.0, layout="contiguous", seed=0):
    """One matrix per width, sharing three directions."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, 3, generator=generator)
    features = []
    for d in widths:
        x = common @ torch.randn(3, d, generator=generator) + torch.randn(n, d, generator=generator) + offset
        if layout == "strided":
            x = torch.cat((x, torch.full((n, 16 - d % 8), torch.nan)), 1)
        elif layout == "unaligned":
            x = torch.cat((torch.full((n, 1), torch.nan), x), 1)
        x = x.to(dtype).to(device)
        features.append(x[:, :d] if layout == "strided" else x[:, 1:] if layout == "unaligned" else x)
    return features


def three_term(features):
    n = len(features[0])
    grams = torch.stack([(x - x.mean(0)) @ (x - x.mean(0)).T for x in (x.cpu().double() for x in features)])
    grams.diagonal(dim1=1, dim2=2).zero_()
    rows, sums = grams.sum(2), grams.sum((1, 2))
    return (torch.einsum("aij,bij->ab", grams, grams) + torch.outer(sums, sums) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def check(features, bound=1e-4):
    """Relative to the geometric mean of the two self-HSICs, as CKA is; returns what was found."""
    hsic, exact = ops.hsic_matrix(features), three_term(features)
    assert hsic.dtype == torch.float64 and hsic.device == features[0].device
    assert torch.equal(hsic, hsic.T) and (hsic.diagonal() >= 0).all()
    scale = exact.diagonal().clamp_min(1e-30).sqrt()
    error = ((hsic.cpu() - exact) / torch.outer(scale, scale)).abs().max().item()
    assert error < bound, error
    return hsic


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n", "widths"), [(4, (5, 3)), (40, (64, 130, 8)), (135, (300,))])
def test_values(n, widths, dtype, device):
    check(make(n, widths, dtype, device))


# Row blocks of 64, tiles of 128 and super tiles of 256: one too many, one too few, none; a last step of 8 channels.
@hopper_kernel
@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize(("n", "widths"), [(129, (16, 8)), (192, (64,)), (255, (200,)), (257, (72,)),
                                           pytest.param(385, (24,), marks=pytest.mark.again)])
def test_values_of_super_tiles(n, widths, copies, device, monkeypatch):
    monkeypatch.setenv("PYDIT_SIM_ASYNC", copies)
    if device.type == "cpu":
        backend.configure_sim()
    features = make(n, widths, torch.bfloat16, device, layout="strided")
    found = check(features)
    assert device.type == "cuda" or backend.KERNEL_PATHS[0] in backend.report()["hsic_matrix"]["reason"]
    assert torch.equal(ops.hsic_matrix(features), found)


@pytest.mark.parametrize("device", ["sim", "sim-90a"], indirect=True)
@pytest.mark.parametrize("n", [4, 5, 63, 64, 65, 127, 128, 130, 256, pytest.param(513, marks=pytest.mark.again)])
def test_any_number_of_rows(n, device, monkeypatch):
    """As a kernel takes them, those too that the op gives to float64 instead."""
    monkeypatch.setattr(sys.modules["pydit.ops.hsic_matrix"], "_MIN_KERNEL_ROWS", 4)
    check(make(n, (8,), torch.bfloat16, device))
    assert "torch multiplies" not in backend.report()["hsic_matrix"]["reason"]


@pytest.mark.again
@every_kernel
@pytest.mark.parametrize(("n", "draws"), [(4, 10), (16, 3), (130, 1)])
def test_means_too_small_for_a_shift(n, draws, device):
    """Of six deviations, in all channels: K is a thousand times U, and few rows do not average the rounding."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(3072, generator=generator).sign()
    for _ in range(draws):
        check([((torch.randn(n, 3072, generator=generator) + 6) * signs).half().to(device) for _ in range(2)])
    assert n >= 16 or f"{n} rows: torch multiplies in float64" in backend.report()["hsic_matrix"]["reason"]


@every_kernel
@pytest.mark.parametrize("layers", [1, 2, *(pytest.param(n, marks=pytest.mark.again) for n in (17, 65))])
def test_layers_of_different_widths(layers, device):
    check(make(130, [8 * (1 + i % 10) for i in range(layers)], torch.float16, device))


@hopper_kernel
def test_thousands_of_channels_in_one_sum(device):
    """The Hopper kernel sums all channels in float32, 192 additions here; the bound is that of every other test."""
    check(make(140, (3072, 8192), torch.bfloat16, device))


@every_kernel
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_layouts(layout, device):
    check(make(140, (72, 24), torch.bfloat16, device, layout=layout))


@pytest.mark.parametrize("layers", [17, 33, 70])
def test_many_layers(layers, device):
    check(make(12, (9,) * layers, torch.bfloat16, device))


@pytest.mark.again
@pytest.mark.parametrize("device", ["sim", *HOPPER], indirect=True)
def test_groups_of_tiles(device, monkeypatch):
    """Little memory: super tiles of 256 x 256 one at a time, two at a time, and all at once give the same."""
    features = make(300, (24, 40), torch.bfloat16, device)
    whole = ops.hsic_matrix(features)
    for supers in (0, 1, 2, 3):
        monkeypatch.setattr(sys.modules["pydit.ops.hsic_matrix"], "_GRAM_BYTES", supers * 2 * 4 * 65536)
        torch.testing.assert_close(ops.hsic_matrix(features), whole, rtol=1e-6, atol=0)
    check(features)


@pytest.mark.again
@pytest.mark.parametrize("device", ["sim", *HOPPER], indirect=True)
def test_groups_of_sums(device, monkeypatch):
    """21 super tiles, one kept at a time: sums of rows are of 16, which end within a row of them, and of 5."""
    features = make(1300, (8,), torch.bfloat16, device)
    features[0][1280:] += 4
    monkeypatch.setattr(sys.modules["pydit.ops.hsic_matrix"], "_GRAM_BYTES", 0)
    check(features)


@pytest.mark.parametrize("device", ["sim"], indirect=True)
@pytest.mark.parametrize(("n", "layers"), [(7401, 60), (1 << 18, 2)])
def test_no_buffer_of_all_gram_matrices(n, layers, device, monkeypatch):
    """13 or 550 GB of Gram matrices, of which 600 MB are kept at a time; sums of their rows have no more memory."""
    class AskedForError(Exception):
        pass

    new_empty = torch.Tensor.new_empty

    def ask(self, size, **options):
        if isinstance(size, int):  # the workspace
            raise AskedForError(size)
        return new_empty(self, size, **options)

    features = [torch.zeros(n, 8, dtype=torch.bfloat16)] * layers
    monkeypatch.setattr(torch.Tensor, "new_empty", ask)
    with pytest.raises(AskedForError) as caught:
        ops.hsic_matrix(features)
    size = caught.value.args[0]
    assert 550 << 20 < size < 650 << 20 and size < layers * n**2 * 4 / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_wide_dtypes(dtype, device):
    check(make(30, (12, 7), dtype, device, offset=1000.0), bound=1e-9)
    assert "torch multiplies in float64" in backend.report()["hsic_matrix"]["reason"]


@every_kernel
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("offset", [3.0, 50.0, 1000.0])
def test_values_with_an_offset(dtype, offset, device):
    """The 16-bit input keeps what it keeps of a spread of 1; the kernel loses nothing more."""
    check(make(140, (64, 32), dtype, device, offset=offset))


@hopper_kernel
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("copies", ["lazy", "eager"])
def test_values_with_shifts_in_some_steps(copies, dtype, device, monkeypatch):
    """Channels shifted and not: alone in a step of 64, all of a step, none, the last of a step that is not whole."""
    monkeypatch.setenv("PYDIT_SIM_ASYNC", copies)
    if device.type == "cpu":
        backend.configure_sim()
    features = make(260, (328,), dtype, device)
    features[0][:, 5] += 1000
    features[0][:, 64:128] -= 300
    features[0][:, 327] += 1000
    check(features)


@every_kernel
def test_values_with_massive_channels(device):
    """One channel a thousand times as large as the rest and nearly constant, as diffusion transformers have."""
    features = make(140, (128, 64), torch.bfloat16, device)
    for x in features:
        x[:, 5] = 4000 + 16 * x[:, 5]
    check(features)


@every_kernel
@pytest.mark.parametrize("dtype", HALF)
def test_a_row_beyond_what_a_shift_takes_exactly(dtype, device):
    """It is rounded once more and decides the HSIC, which is off by up to an ulp, as documented; CKA hardly changes."""
    features = make(140, (128, 64), dtype, device)
    for x in features:
        x[:, 5] = 4000 + 16 * x[:, 5]
        x[71, 5] = -1000 + x[71, 6]
    check(features, bound=torch.finfo(dtype).eps)
    hsic, exact = ops.hsic_matrix(features).cpu(), three_term(features)
    found, right = (m[0, 1] / (m[0, 0] * m[1, 1]).sqrt() for m in (hsic, exact))
    assert (found - right).abs() < torch.finfo(dtype).eps / 4


def test_unrelated_wide_features(device):
    """Debiased: near 0 where the plain formula gives 0.98."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(64, 1024, generator=generator).bfloat16().to(device) for _ in range(2)]
    hsic = ops.hsic_matrix(features)
    assert abs(hsic[0, 1] / (hsic[0, 0] * hsic[1, 1]).sqrt()) < 0.05


@pytest.mark.again
@every_kernel
@pytest.mark.parametrize("n", [5, 20, 140])
def test_constant_rows_give_exactly_zero(n, device):
    x, = make(n, (24,), torch.bfloat16, device)
    for constant in (torch.zeros_like(x), x[:1].expand(n, -1), x[:1].expand(n, -1).clone(), torch.full_like(x, 0.1)):
        hsic = ops.hsic_matrix([x, constant])
        assert hsic[0, 0] > 0 and not hsic[1].any() and not hsic[:, 1].any()


@pytest.mark.again
@every_kernel
@pytest.mark.parametrize("n", [5, 20, 140])
@pytest.mark.parametrize("row", [0, 3])
def test_one_row_unlike_the_rest_gives_exactly_zero(n, row, device):
    """HSIC_1 does not see a single row; what rounding leaves of it would be a CKA of anything between -1 and 1."""
    x, rest, other = make(n, (24, 24, 24), torch.bfloat16, device)
    half = torch.arange(24, device=device) < 12
    for like, unlike in ((torch.zeros_like(rest), other), (rest[:1].repeat(n, 1), other),
                         (rest[:1].repeat(n, 1) * half, other * ~half + 1e-6 * rest)):  # the last with small products
        like[row] = unlike[row]
        hsic = ops.hsic_matrix([x, like])
        assert hsic[0, 0] > 0 and not hsic[1].any() and not hsic[:, 1].any()


@every_kernel
def test_run_to_run_equality(device):
    features = make(200, (40, 70, 33), torch.bfloat16, device)
    assert torch.equal(ops.hsic_matrix(features), ops.hsic_matrix(features))


@every_kernel
@pytest.mark.parametrize("n", [20, 140])
def test_not_finite_is_not_hidden(n, device):
    x, y = make(n, (8, 8), torch.bfloat16, device)
    x[3, 4] = torch.nan
    hsic = ops.hsic_matrix([x, y])
    assert hsic[0].isnan().all() and hsic[1, 1].isfinite()


def test_cka_takes_the_kernel(device):
    batches = [make(n, (24, 24, 16), torch.bfloat16, device, seed=n) for n in (40, 130, 7)]
    cka = CKA(3)
    for batch in batches:
        cka.update(batch)
    hsic = sum(three_term(batch) for batch in batches)
    scale = hsic.diagonal().sqrt()
    assert (cka.matrix() - hsic / torch.outer(scale, scale)).abs().max() < 1e-4
    assert (cka.matrix().diagonal() - 1).abs().max() < 1e-6
    with pytest.raises(UserError, match="at least 4 rows"):
        CKA(1).update([batches[0][0][:3]])


@pytest.mark.again
@pytest.mark.parametrize(("device", "n", "d", "layout", "words"), [
    ("sim", 140, 16, "contiguous", "not of compute capability 9.x"),
    ("sim", 16, 16, "contiguous", "not of compute capability 9.x"),
    ("sim", 15, 16, "contiguous", "15 rows: torch multiplies in float64"),
    ("sim-90a", 140, 16, "contiguous", backend.KERNEL_PATHS[0]),
    ("sim-90a", 140, 16, "unaligned", "not multiples of 16 bytes"),
    ("sim-90a", 140, 20, "contiguous", "not multiples of 16 bytes"),
    ("sim-90a", 140, 16, "expanded", "or a stride is 0"),
    ("sim-90a", 128, 16, "contiguous", "not for this shape"),
    ("sim-90a", 129, 8200, "contiguous", "not for this shape"),
    ("reference", 140, 16, "contiguous", "the tensors are on the CPU")], indirect=["device"])
def test_report_names_the_kernel(device, n, d, layout, words):
    features = make(n, (d,), torch.bfloat16, device, layout=layout)
    ops.hsic_matrix([x[:1].expand(n, -1) for x in features] if layout == "expanded" else features)
    assert words in backend.report()["hsic_matrix"]["reason"]


@cases.examples(12)
@every_kernel
@given(data=st.data())
def test_any_shape(device, data):
    widths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=4))
    check(make(data.draw(st.integers(4, 200)), widths, data.draw(st.sampled_from(HALF)), device,
               layout=data.draw(st.sampled_from(["contiguous", "strided", "unaligned"]))), bound=1e-4)


@pytest.mark.parametrize(("features", "error", "words"), [
    ([], ValueError, "features: expected at least one matrix, got none"),
    ([torch.ones(3, 2)], ValueError, "features: expected at least 4 rows for the unbiased HSIC, got 3"),
    ([torch.ones(4)], ValueError, r"features\[0\]: expected shape \[n, d\], got \[4\]"),
    ([torch.ones(4, 2), torch.ones(5, 2)], ValueError, r"features\[1\]: expected shape \[4, d\], got \[5, 2\]"),
    ([torch.ones(4, 2), torch.ones(4, 2).half()], TypeError, r"features\[1\]: expected torch.float32"),
    ([torch.ones(4, 2).int()], TypeError, r"features\[0\]: expected a floating-point tensor"),
    ([1], TypeError, r"features\[0\]: expected a torch.Tensor, got int")])
def test_bad_arguments(features, error, words):
    with pytest.raises(error, match=words):
        ops.hsic_matrix(features)


def test_no_gradient_is_promised(device):
    features = [x.requires_grad_() for x in make(10, (6, 9), torch.float32, device)]
    assert not ops.hsic_matrix(features).requires_grad


def test_opcheck(device):
    torch.library.opcheck(torch.ops.pydit.hsic_matrix.default, (make(10, (6, 9), torch.bfloat16, device),))
