"""The tolerance policy itself: it passes what is right and fails what is wrong."""

import pytest
import torch

from pydit.testing import assert_accurate, ulp


def test_ulp():
    assert ulp(torch.float32, 1.0) == torch.finfo(torch.float32).eps
    assert ulp(torch.bfloat16, 3.0) == 2 * torch.finfo(torch.bfloat16).eps
    assert ulp(torch.float16, 0.0) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bound(dtype):
    reference = torch.linspace(-1, 1, 101, dtype=torch.float64)
    rounded = reference.to(dtype)
    assert_accurate(rounded, reference, rounded)
    wrong = rounded.clone()
    wrong[17] += 4 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match=r"worst error .* at \(17,\)"):
        assert_accurate(wrong, reference, rounded)


def test_nan_shape_and_dtype_fail():
    reference = torch.zeros(3, dtype=torch.float64)
    good = torch.zeros(3)
    with pytest.raises(AssertionError, match="1 of 3 elements are not finite"):
        assert_accurate(torch.tensor([0.0, float("nan"), 0.0]), reference, good)
    with pytest.raises(AssertionError, match="expected shape"):
        assert_accurate(torch.zeros(4), reference, good)
    with pytest.raises(TypeError, match="reference: expected float64"):
        assert_accurate(good, good, good)
