"""Attention over parts of the keys, merged, against attention over all of them."""

import pytest
import torch

from pydit import ops
from pydit.testing import assert_accurate
from tests.ops.test_joint_attention import expected, make

BACKENDS = ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]


def whole(q, k, v):
    """(out, lse) of one stream in the dtype of the tensors."""
    none = k[:, :0]
    out, _, lse, _ = expected([q, k, v, None, none, none])
    return out, lse


def halves(q, k, v, **more):
    """((out, lse), (out, lse)) of the op over each half of the keys, which are twice the queries."""
    found = []
    for keys, values in zip(k.split(q.shape[1], 1), v.split(q.shape[1], 1), strict=True):
        out, _, lse, _ = ops.joint_attention(q, keys, values, None, keys[:, :0], values[:, :0], return_lse=True, **more)
        found.append((out, lse))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", BACKENDS, indirect=True)
def test_two_halves_of_the_keys(device, dtype):
    q, *_ = make((2, 75, 0, 2, 64), dtype, device)
    _, k, v, *_ = make((2, 150, 0, 2, 64), dtype, device, seed=1, size=2.0)
    out, lse = ops.merge_attention(*zip(*halves(q, k, v), strict=True))
    exact, exact_lse = whole(q.double(), k.double(), v.double())
    plain, _ = whole(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_accurate(out, exact, plain)
    assert_accurate(lse, exact_lse, whole(q.float(), k.float(), v.float())[1])
    first = halves(q, k, v)[0][0]
    with pytest.raises(AssertionError, match="exceeds"):  # the half alone is another answer
        assert_accurate(first, exact, plain)


@pytest.mark.parametrize("device", BACKENDS, indirect=True)
def test_a_half_without_keys_has_no_part(device):
    """The second half is text of which the first sample has none, and the second as many as 24 queries and keys."""
    q, k, v, *_ = make((2, 40, 0, 1, 32), torch.bfloat16, device)
    _, k_2, v_2, *_ = make((2, 40, 0, 1, 32), torch.bfloat16, device, seed=1)
    none, lens = k[:, :0], torch.tensor([0, 24], dtype=torch.int32, device=device)
    out_1, _, lse_1, _ = ops.joint_attention(q, k, v, None, none, none, return_lse=True)
    _, out_2, _, lse_2 = ops.joint_attention(none, none, none, q, k_2, v_2, txt_lens=lens, return_lse=True)
    assert (lse_2[0] == -torch.inf).all() and (lse_2[1, :, 24:] == -torch.inf).all()
    out_2 = torch.where((lse_2 == -torch.inf).transpose(1, 2)[..., None], torch.nan, out_2)  # whatever it holds
    out, lse = ops.merge_attention((out_1, out_2), (lse_1, lse_2))

    def joined(dtype):
        parts = [x.to(dtype) for x in (q, k, v, k_2, v_2)]
        q_w, k_w, v_w, k_2w, v_2w = parts
        result, _ = whole(q_w, k_w, v_w)
        both, _ = whole(q_w[1:, :24], torch.cat((k_w, k_2w[:, :24]), 1)[1:], torch.cat((v_w, v_2w[:, :24]), 1)[1:])
        result[1:, :24] = both
        return result

    assert_accurate(out, joined(torch.float64), joined(torch.bfloat16))
    assert torch.equal(lse[0], lse_1[0])


def test_no_key_in_any_part():
    nothing = torch.full((1, 2, 3), -torch.inf, requires_grad=True)
    outs = [torch.full((1, 3, 2, 32), value, dtype=torch.float16, requires_grad=True) for value in (torch.nan, 7.0)]
    out, lse = ops.merge_attention(outs, [nothing, nothing])
    assert (out == 0).all() and (lse == -torch.inf).all()
    (out.float().sum() + lse.exp().sum()).backward()
    for tensor in (*outs, nothing):
        assert (tensor.grad == 0).all()


def test_many_parts_round_once():
    """One key each: what rounds at every merge would drift."""
    q, k, v, *_ = make((1, 1, 0, 2, 32), torch.bfloat16, "cpu")
    _, k, v, *_ = make((1, 64, 0, 2, 32), torch.bfloat16, "cpu", seed=1)
    parts = [whole(q.float(), k[:, i:i + 1].float(), v[:, i:i + 1].float()) for i in range(64)]
    out, _ = ops.merge_attention([out.bfloat16() for out, _ in parts], [lse for _, lse in parts])
    exact, _ = whole(q.double(), k.double(), v.double())
    assert_accurate(out, exact, exact.bfloat16())


def test_gradients_equal_those_of_the_whole():
    tensors = make((2, 6, 0, 2, 32), torch.float32, "cpu")[:1] + make((2, 12, 0, 2, 32), torch.float32, "cpu", seed=1)[1:3]
    generator = torch.Generator().manual_seed(2)
    d_out, d_lse = torch.randn(2, 6, 2, 32, generator=generator), torch.randn(2, 2, 6, generator=generator)

    def gradients(attention, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        return torch.autograd.grad(attention(*leaves), leaves, (d_out.to(dtype), d_lse.to(dtype)))

    found = gradients(lambda *x: ops.merge_attention(*zip(*halves(*x), strict=True)), torch.float32)
    for values in zip(found, gradients(whole, torch.float64), gradients(whole, torch.float32), strict=True):
        assert_accurate(*values)


def test_compiles_fullgraph():
    outs, lses = torch.randn(2, 1, 5, 2, 32), torch.randn(2, 1, 2, 5)
    compiled = torch.compile(lambda a, b: ops.merge_attention(a.unbind(0), b.unbind(0)), fullgraph=True,
                             backend="aot_eager")
    for found, right in zip(compiled(outs, lses), ops.merge_attention(outs, lses), strict=True):
        torch.testing.assert_close(found, right)


def test_bad_arguments():
    out, lse = torch.zeros(1, 3, 2, 32), torch.zeros(1, 2, 3)
    for outs, lses, words in [
            ([], [], "expected as many lses as outs, and one at least, got 0 outs and 0 lses"),
            ([out, out], [lse], "got 2 outs and 1 lses"),
            ([out[0]], [lse], r"outs\[0\]: expected shape \[B, S, H, D\], got \[3, 2, 32\]"),
            ([out, out[:, :2]], [lse, lse], r"outs\[1\]: expected shape \[1, 3, 2, 32\] like the first, got \[1, 2, 2, 32\]"),
            ([out, out], [lse, lse.transpose(1, 2)], r"lses\[1\]: expected shape \[1, 2, 3\], got \[1, 3, 2\]")]:
        with pytest.raises(ValueError, match=words):
            ops.merge_attention(outs, lses)
    with pytest.raises(TypeError, match=r"lses\[0\]: expected torch.float32 on cpu for outputs of torch.float32, got torch.float64"):
        ops.merge_attention([out], [lse.double()])
    with pytest.raises(TypeError, match=r"outs\[1\]: expected torch.float32 like the first argument, got torch.float16"):
        ops.merge_attention([out, out.half()], [lse, lse])
