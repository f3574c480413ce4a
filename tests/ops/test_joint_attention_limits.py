"""Joint attention where numbers end: scores in the billions, no token at all, NaN, and gradients that reach it by lse."""

import math

import pytest
import torch

from pydit import ops
from pydit.testing import assert_accurate
from tests.ops.test_joint_attention import NAMES, every_kernel, expected, make

HUGE = [(1000.0, 1e2), (1000.0, 1e4), (30.0, 1e6)]  # size, scale: scores from 1e9 to 1e12


def attend(tensors, lens, grads=None, **more):
    """(out_img, out_txt, lse_img, lse_txt), and the gradients of the tensors for those of the outputs and lse."""
    leaves = [None if t is None else t.detach().requires_grad_(grads is not None) for t in tensors]
    lengths = torch.tensor(lens, dtype=torch.int32, device=tensors[1].device)
    found = ops.joint_attention(*leaves, txt_lens=lengths, return_lse=True, **more)
    if grads is not None:
        fed = [pair for pair in zip(found, grads, strict=True) if pair[1] is not None]
        torch.autograd.backward(*zip(*fed, strict=True))
    return found, [None if t is None else t.grad for t in leaves]


@pytest.mark.again
@every_kernel
@pytest.mark.parametrize(("size", "scale"), HUGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_scores_in_the_billions(dim, dtype, size, scale, device):
    """The softmax is a step: of a query whose best key is clearly so, the output is that key's value, bit for bit."""
    tensors = make((2, 190, 40, 1, dim), dtype, device, size=size)
    tensors[2], tensors[5] = tensors[2] / size, tensors[5] / size
    lens = [13, 40]
    grads = [torch.ones_like(tensors[0]), torch.ones_like(tensors[3]), None, None]
    with torch.no_grad():  # without lse, which on a CPU another function computes
        plain = ops.joint_attention(*tensors, txt_lens=torch.tensor(lens, dtype=torch.int32, device=device), scale=scale)
    found, _ = attend(tensors, lens, scale=scale)
    host = [t.double().cpu() for t in tensors]
    for b, n in enumerate(lens):
        keys, values = (torch.cat((host[i][b, :, 0], host[i + 3][b, :n, 0])) for i in (1, 2))
        for stream, rows in ((0, 190), (3, n)):
            scores = host[stream][b, :rows, 0] @ keys.T * scale
            best = scores.topk(2).values
            clear = best[:, 0] - best[:, 1] > 1e-3 * best[:, 0].abs()
            assert clear.sum() > rows / 2
            right = values[scores.argmax(1)][clear].to(dtype)
            for outs in (found, plain):
                assert torch.equal(outs[stream // 3][b, :rows, 0].cpu()[clear], right)
            lse = found[2 + stream // 3][b, 0, :rows].cpu()
            single = host[stream][b, :rows, 0].float() @ keys.T.float() * scale
            assert_accurate(lse, scores.logsumexp(1), single.logsumexp(1), name="lse")
    if dtype == torch.bfloat16:  # gradients of queries and keys are beyond float16
        _, gradients = attend(tensors, lens, grads, scale=scale)
        for name, grad in zip(NAMES, gradients, strict=True):
            assert grad.isfinite().all(), name
            assert not name.startswith("v") or ((grad >= 0).all() and (grad <= 230).all()), name  # weights of 0 to 1


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_scores_in_the_billions(dtype, device):
    """All keys alike: weights are shares all the same, however coarse the scores."""
    tensors = make((1, 190, 40, 1, 64), dtype, device)
    tensors[1], tensors[4] = (t[:, :1].expand_as(t).contiguous() for t in (tensors[1], tensors[1][:, :40]))
    found, _ = attend(tensors, [33], scale=1e9)
    host = [t.cpu() for t in tensors]
    exact, same = expected([t.double() for t in host], [33], 1e9), expected(host, [33], 1.0)  # no score matters
    for name, a, r, t in zip(NAMES[::3], found[:2], exact[:2], same[:2], strict=True):
        assert_accurate(a, r, t, name=name)


@every_kernel
@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize(("image", "text", "lens"), [
    (0, 0, [0, 0]), (0, 9, [0, 0]), (5, 0, [0, 0]), (0, 130, [0, 129]), (7, 8, [])], ids=str)  # the last has no sample
def test_backward_of_empty_streams(image, text, lens, queries, device):
    tensors = make((len(lens), image, text, 2, 64), torch.bfloat16, device)
    for b, n in enumerate(lens):
        for x in tensors[3:]:
            x[b, n:] = math.nan
    if not queries:
        tensors[3] = None
    grads = [torch.ones_like(tensors[1]), torch.ones_like(tensors[4]) if queries else None, None, None]
    found, gradients = attend(tensors, lens, grads)
    assert (found[1] is None) is not queries
    for name, t, grad in zip(NAMES, tensors, gradients, strict=True):
        assert t is None or (grad.shape == t.shape and grad.isfinite().all()), name
    for x in gradients[3:]:
        assert x is None or not any(x[b, n:].any() for b, n in enumerate(lens))
    if queries and any(lens):
        assert (gradients[5][1, :129].float().sum(0) > 0).all()  # and something arrives where there are tokens


@every_kernel
@pytest.mark.parametrize("dim", [pytest.param(32, marks=pytest.mark.again), 64, pytest.param(128, marks=pytest.mark.again)])
@pytest.mark.parametrize("queries", [True, False])
def test_what_flows_back_through_lse(queries, dim, device):
    """On every kernel; what comes in for padding, NaN, goes nowhere."""
    tensors, lens = make((2, 90, 40, 2, dim), torch.bfloat16, device), [40, 7]
    if not queries:
        tensors[3] = None
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 90, 2, dim), (2, 40, 2, dim), (2, 2, 90), (2, 2, 40)]
    grads = [torch.randn(shape, generator=generator) for shape in shapes]
    if not queries:
        grads[1] = grads[3] = None

    def right(dtype):
        leaves = [None if t is None else t.detach().cpu().to(dtype).requires_grad_() for t in tensors]
        sums = [(x.nan_to_num(neginf=0) * g.to(dtype)).sum() for x, g in
                zip(expected(leaves, lens), grads, strict=True) if x is not None]
        return torch.autograd.grad(torch.stack(sums).sum(), [t for t in leaves if t is not None])

    grads = [None if g is None else g.to(torch.bfloat16).float() for g in grads]  # what each dtype can hold
    exact, same = right(torch.float64), right(torch.bfloat16)
    fed = [None if g is None else g.to(device, torch.bfloat16 if g.ndim == 4 else torch.float32) for g in grads]
    for x in tensors[3:] + ([fed[1], fed[3].transpose(1, 2)] if queries else []):
        if x is not None:
            x[1, 7:] = math.nan
    _, gradients = attend(tensors, lens, fed)
    given = [(name, grad) for name, grad in zip(NAMES, gradients, strict=True) if grad is not None]
    for (name, grad), r, t in zip(given, exact, same, strict=True):
        assert_accurate(grad, r, t, name=name)


@every_kernel
def test_nan_is_not_hidden(device):
    """A query that is NaN makes its output NaN, no other, and the gradients of all keys and values."""
    tensors = make((1, 200, 20, 1, 64), torch.bfloat16, device)
    tensors[0][0, 3] = math.nan
    grads = [torch.ones_like(tensors[0]), torch.ones_like(tensors[3]), None, None]
    found, gradients = attend(tensors, [20], grads)
    wrong = found[0].isnan().all(-1)[0, :, 0]
    assert wrong[3] and wrong.sum() == 1 and found[0].isfinite().sum() == 199 * 64 and found[1].isfinite().all()
    for name, grad in zip(NAMES, gradients, strict=True):
        assert name.startswith("q") or grad.isnan().all(), name
    assert gradients[0].isnan().all(-1).sum() == 1 and gradients[3].isfinite().all()
