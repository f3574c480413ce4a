"""Peers compute what they are raced for (on the CPU, where they exist there), and say why they are absent."""

import sys

import pytest
import torch

from benchmarks import registry
from benchmarks.cases.attention_backward import gradients, joined_gradients
from benchmarks.peers import Peer, compiled, installed, needs_gpu, never
from benchmarks.peers.attention import (
    FLASH_3,
    _flex,
    _imported,
    _of_lengths,
    attention_peers,
    joined,
    joined_peers,
    joint,
    masked_attention_peers,
    sdpa,
)
from benchmarks.peers.linear import FORMULAS, linear_peers
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


def test_the_backward_of_a_kernel_alone_gets_streams_that_lie_joined():
    (*image, d_image), (*text, d_text) = ([draw(2, s, 3, 8) for _ in range(4)] for s in (9, 4))
    args = (*image, *text, None, *[None] * 4, d_image, d_text)
    run = joined_gradients(sdpa("math"))
    found = run(*args), run(*args)
    wide = [x.double().requires_grad_() for x in (*image, *text)]
    q, k, v = (torch.cat(pair, 1) for pair in zip(wide[:3], wide[3:], strict=True))
    exact = torch.autograd.grad(attention(q, k, v), wide, torch.cat((d_image, d_text), 1).double())
    plain = gradients(joint(sdpa("math")))(*args)
    for first, second, right, other in zip(*found, exact, plain, strict=True):
        assert torch.equal(first, second)
        assert_accurate(first, right, other, name="gradient")
    for size in registry.SIZES:
        for case in registry.cases(size, "attention_backward"):
            names = {peer.name for peer in case.peers}
            assert ("flash-attention 3 joined" in names) == ("/" not in case.shape), case.name
    reasons = {peer.name: peer.available() for peer in registry.cases("full", "attention_backward")[0].peers}
    assert torch.cuda.is_available() or reasons["flash-attention 4 joined"] == (
        False, "flash_attn.cute.interface is not installed")


def test_every_block_with_attention_races_the_compiler_with_flash_attention():
    for size in registry.SIZES:
        for case in registry.cases(size, "whole_block"):
            peers = {peer.name: peer for peer in case.peers if "flash-attention" in peer.name}
            assert list(peers) == ([] if case.op == "block_affine" else [
                "torch.compile flash-attention 4", "torch.compile flash-attention 3"])
            for peer in peers.values():
                assert peer.rival and (torch.cuda.is_available() or "is not installed" in peer.available()[1])


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
        if peer.name in ("eager", "cublaslt addmm", "cublaslt then addcmul"):  # the gelu is tanh on a GPU only
            for found, right, plain in zip(peer.build()(*args), exact, eager, strict=True):
                assert_accurate(found, right, plain, name=peer.name)
    assert max((a.double() - b).abs().max() for a, b in zip(eager, exact, strict=True)) < 1e-4


def test_library_compiler_search_and_quack_are_raced_at_every_shape_or_named():
    for op in FORMULAS:
        names = [peer.name for peer in linear_peers(op)]
        assert {"eager", "torch.compile", "torch.compile max-autotune", "quack"} <= set(names)
    assert {peer.name for case in registry.cases("full", "linear") for peer in case.peers} >= {
        "cublaslt gelu", "cublaslt addmm", "cublaslt then addcmul"}


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


def by_lengths(q, k, v, lengths):
    """A kernel that takes the number of each sample's keys, int32."""
    assert lengths.dtype == torch.int32
    return torch.cat([attention(q[i:i + 1], k[i:i + 1, :n], v[i:i + 1, :n]) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("kernel", [lambda: joint(sdpa("math")), lambda: joint(sdpa()),
                                    lambda: joint(_flex(lambda function: function), mask="blocks"),
                                    lambda: joint(by_lengths, mask="lengths")])
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
        "sdpa cudnn masked", "sdpa efficient masked", "sdpa math masked", "flex_attention masked",
        "flash-attention 4 lengths", "flash-attention 3 lengths", "sdpa flash", "sageattention", "flash-attention varlen"]
    assert not any("lengths" in peer.name for peer in masked_attention_peers(lengths=False))


def test_a_kernel_alone_gets_streams_that_lie_joined():
    """It is handed the same tensors whenever it is called with the same streams, and its result is not copied."""
    image, text, seen = [draw(2, 9, 3, 8) for _ in range(3)], [draw(2, 4, 3, 8) for _ in range(3)], []
    kernel = joined(lambda q, k, v: seen.append((q, k, v)) or attention(q, k, v))
    outs = kernel(*image, *text, None), kernel(*image, *text, None)
    assert all(a is b for a, b in zip(*seen, strict=True)) and seen[0][0].shape == (2, 13, 3, 8)
    assert outs[0][0].untyped_storage().data_ptr() == outs[0][1].untyped_storage().data_ptr()
    for found, right in zip(outs[1], joint(sdpa("math"))(*image, *text), strict=True):
        torch.testing.assert_close(found, right)
    assert [peer.name for peer in joined_peers()] == [f"{name} joined" for name in (
        "sdpa flash", "sdpa cudnn", "flash-attention 4", "flash-attention 3")]


def test_a_package_that_breaks_when_it_is_looked_for_is_missing(tmp_path, monkeypatch, request):
    """As one does whose own requirement has another version; and the next of several names is taken."""
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise AttributeError('no such name')")
    (tmp_path / "fa3_fwd_interface.py").write_text(
        "def flash_attn_func(q, k, v): return q, 'lse'\ndef flash_attn_with_kvcache(q, k, v, cache_seqlens): return v, k")
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: sys.modules.pop("fa3_fwd_interface", None))
    assert needs_gpu("broken_package.interface")() == (False, "broken_package.interface is not installed")
    assert installed("broken_package.interface", "json") == "json" and installed("broken_package.interface") is None
    assert installed(*FLASH_3) == "fa3_fwd_interface" and _imported("flash_attn_func", *FLASH_3)(1, 2, 3) == 1
    assert _of_lengths("flash_attn_with_kvcache", "cache_seqlens", *FLASH_3)(1, 2, 3, 4) == 3
    found = next(peer for peer in attention_peers() if peer.name == "flash-attention 3").available()
    assert found == (False, "no GPU") or torch.cuda.is_available()


def test_own_forms_are_no_rivals():
    own = {peer.name for size in registry.SIZES for case in registry.cases(size) for peer in case.peers if not peer.rival}
    assert own == {"samples alone", "deterministic", "two launches", "forward", "pydit grouped linears", "blocks alone",
                   "clusters of two", "last wave whole"}
