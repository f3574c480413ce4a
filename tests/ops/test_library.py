"""When an op goes around the dispatcher, and that what a kernel writes is not hidden from autograd."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pydit import ops
from pydit.ops._library import runs_straight


class Function(TorchFunctionMode):
    """Counts calls of torch functions; those of a plain op are seen."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    """Records the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """A tensor that listens to what is done with it."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_plain_tensors_go_straight_with_or_without_gradients_elsewhere():
    x = torch.randn(1, 3, 8)
    assert runs_straight((x, None, 1e-6)) and runs_straight((x.bfloat16(), x[:, 1:]))
    with torch.inference_mode():
        assert runs_straight((x, torch.randn(2)))
    with torch.no_grad():
        assert runs_straight((x, torch.randn(2, requires_grad=True)))


@pytest.mark.parametrize("tensor", [
    lambda: torch.randn(2, requires_grad=True), lambda: torch.randn(2, device="meta"), lambda: Subclass(torch.randn(2)),
    lambda: torch.randn(2, dtype=torch.complex64).conj(), lambda: torch.randn(2, dtype=torch.complex64).conj().imag,
    lambda: FakeTensorMode().from_tensor(torch.randn(2)), lambda: torch.randn(2).to_sparse()],
    ids=["gradient", "meta", "subclass", "conjugate", "negative", "fake", "sparse"])
def test_tensors_that_need_the_dispatcher_get_it(tensor):
    assert not runs_straight((torch.randn(2), tensor()))


@pytest.mark.parametrize("listener", [Function, Dispatch, FakeTensorMode, lambda: torch.profiler.profile()],
                         ids=["function mode", "dispatch mode", "fake mode", "profiler"])
def test_whoever_listens_is_told(listener):
    x = torch.randn(2)
    with listener():
        assert not runs_straight((x,))
    assert runs_straight((x,))


def test_a_transform_gets_the_dispatcher():
    straight = []

    def look(x):
        straight.append(runs_straight((x,)))
        return x * 2

    torch.vmap(look)(torch.randn(3, 2))
    torch.func.grad(lambda x: look(x).sum())(torch.randn(2))
    assert straight == [False, False]


def test_a_mode_sees_the_op():
    x, row = torch.randn(1, 3, 8), torch.randn(1, 8)
    with Dispatch() as mode:
        ops.gated_residual(x, x, row)
    assert "pydit.gated_residual.default" in mode.seen


def _in_place(q, k, mode):
    """q and k after norm, written over themselves."""
    one = torch.ones(q.shape[-1], dtype=q.dtype, device=q.device)
    if mode == "one":
        ops.qk_norm_rope(q, k, one, one, None, out=(q, k))
    elif mode == "both":
        text = [x[:, :1].clone() for x in (q, k)]
        ops.joint_qk_norm_rope(q, k, *text, [one] * 4, None, None, out=(q, k, *text))
    else:
        torch.ops.pydit.qk_norm_rope_out(q, k, one, one, None, None, 1e-6, q, k)


@pytest.mark.parametrize("mode", ["one", "both", "dispatcher"])
def test_a_backward_that_needs_what_was_overwritten_says_so(device, mode):
    q, k = (torch.randn(1, 4, 2, 32, device=device) for _ in range(2))
    weight = torch.ones((), device=device, requires_grad=True)
    product = q * weight  # keeps q
    _in_place(q, k, mode)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_tensors_can_be_overwritten(device):
    with torch.inference_mode():
        q, k = (torch.randn(1, 4, 2, 32, device=device) for _ in range(2))
        before = q.clone()
        _in_place(q, k, "one")
        assert not torch.equal(q, before)
