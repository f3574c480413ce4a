"""Peers compute what they are raced for (on the CPU, where they exist there), and say why they are absent."""

import pytest
import torch

from benchmarks.peers import Peer, compiled, needs_gpu, never
from benchmarks.peers.attention import _flex, attention_peers, joint, masked_attention_peers, sdpa
from benchmarks.peers.linear import linear_peers
from pydit.testing import assert_accurate

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def attention(q, k, v):
    weights = torch.einsum("bshd,bthd->bhst", q, k / 8**0.5).exp()
    return torch.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdim=True), v)


def test_sdpa_math_is_attention_over_both_streams():
    image, text = ([draw(2, s, 3, 8) for _ in range(3)] for s in (9, 4))
    peer = next(peer for peer in attention_peers() if peer.name == "sdpa math")
    assert peer.available() == (True, "")
    out_img, out_txt = peer.build()(*image, *text)
    joint = [torch.cat(pair, 1) for pair in zip(image, text, strict=True)]
    exact, eager = attention(*(x.double() for x in joint)), attention(*joint)
    assert_accurate(out_img, exact[:, :9], eager[:, :9], name="image")
    assert_accurate(out_txt, exact[:, 9:], eager[:, 9:], name="text")
    assert out_img.is_contiguous() and out_txt.is_contiguous()


def test_every_attention_kernel_of_the_plan_is_named():
    names = [peer.name for peer in attention_peers()]
    assert names == ["sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math", "flex_attention", "flash-attention 4",
                     "flash-attention 3", "sageattention"]


@pytest.mark.parametrize("op, formula", [
    ("joint_linear", lambda y, x, r, g: y),
    ("joint_linear_gelu", lambda y, x, r, g: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))),
    ("joint_linear_gated_residual", lambda y, x, r, g: r + g * y),
    ("joint_linear_residual", lambda y, x, r, g: x + y),
])
def test_linear_peers(op, formula):
    streams = [(draw(2, s, 16), draw(16, 16), draw(16), draw(2, s, 16), draw(2, 1, 16)) for s in (5, 3)]
    args = [x for pair in zip(*streams, strict=True) for x in pair][:10 if op == "joint_linear_gated_residual" else 6]
    exact = [formula((x @ w.t()) + b, x, r, g) for x, w, b, r, g in ([t.double() for t in stream] for stream in streams)]
    eager = next(peer for peer in linear_peers(op) if peer.name == "eager").build()(*args)
    for peer in linear_peers(op):
        if peer.name not in ("torch.compile", "cublaslt gelu"):  # the latter is tanh on a GPU only
            for found, right, plain in zip(peer.build()(*args), exact, eager, strict=True):
                assert_accurate(found, right, plain, name=peer.name)
    assert max((a.double() - b).abs().max() for a, b in zip(eager, exact, strict=True)) < 1e-4


def test_the_search_of_the_compiler_is_raced_where_asked():
    names = [peer.name for peer in linear_peers("joint_linear_gelu", search=True)]
    assert names == ["eager", "torch.compile", "torch.compile max-autotune", "cublaslt gelu"]


def test_absent_peers_give_their_reason():
    peer = never("x", "only in a server")
    assert peer.available() == (False, "only in a server")
    with pytest.raises(RuntimeError, match="only in a server"):
        peer.build()
    assert needs_gpu("no_such_module_of_ours")() == (False, "no_such_module_of_ours is not installed")
    assert needs_gpu("no_such_package.sub.module")() == (False, "no_such_package.sub.module is not installed")
    if not torch.cuda.is_available():
        assert needs_gpu("torch")() == (False, "no GPU")
    assert Peer("y", lambda: abs).available() == (True, "")
    assert compiled(abs).name == "torch.compile"


@pytest.mark.parametrize("kernel", [lambda: joint(sdpa("math")), lambda: joint(sdpa()),
                                    lambda: joint(_flex(lambda function, dynamic: function), blocks=True)])
def test_masked_peers_leave_padding_out(kernel):
    image, text = ([draw(2, s, 3, 8) for _ in range(3)] for s in (9, 4))
    outs = kernel()(*image, *text, torch.tensor([4, 1], dtype=torch.int32))
    for b, n in enumerate((4, 1)):
        whole = [torch.cat((i[b:b + 1], t[b:b + 1, :n]), 1) for i, t in zip(image, text, strict=True)]
        exact, eager = attention(*(x.double() for x in whole)), attention(*whole)
        assert_accurate(outs[0][b:b + 1], exact[:, :9], eager[:, :9], name="image")
        assert_accurate(outs[1][b:b + 1, :n], exact[:, 9:], eager[:, 9:], name="text")
        assert not outs[1][b, n:].any()


def test_every_kernel_that_takes_a_mask_is_named():
    assert [peer.name for peer in masked_attention_peers()] == [
        "sdpa cudnn masked", "sdpa efficient masked", "sdpa math masked", "flex_attention masked", "sdpa flash",
        "sageattention", "flash-attention varlen"]
