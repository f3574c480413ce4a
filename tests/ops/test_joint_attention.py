"""Joint attention against softmax in float64, on every backend and both simulated kernels."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pydit import backend, ops
from pydit.testing import assert_accurate
from tests.ops import cases

BACKENDS = ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]
every_kernel = pytest.mark.parametrize("device", BACKENDS, indirect=True)
NAMES = ("q_img", "k_img", "v_img", "q_txt", "k_txt", "v_txt")
# (B, S_img, S_txt, H, D): several tiles of each stream and ragged ends; one token; no text; no image
SHAPES = [(2, 150, 70, 2, 128), (1, 300, 140, 1, 64), (2, 129, 33, 1, 32), (1, 1, 1, 2, 64), (1, 70, 0, 1, 128),
          (1, 0, 45, 2, 32), (0, 8, 8, 1, 32)]
LAYOUTS = ["contiguous", "packed", "heads first", "unaligned"]


def make(shape, dtype, device, *, seed=0, layout="contiguous", size=1.0):
    """The six tensors, in one of the layouts the contract allows."""
    batch, image, text, heads, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def tensor(tokens):
        if layout == "packed":  # a slice of a projection to q, k and v
            wide = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
            return (size * wide).to(device, dtype)[:, :, 1]
        if layout == "heads first":
            return (size * torch.randn(batch, heads, tokens, dim, generator=generator)).to(device, dtype).transpose(1, 2)
        if layout == "unaligned":
            flat = size * torch.randn(batch * tokens * heads * dim + 1, generator=generator)
            return flat.to(device, dtype)[1:].view(batch, tokens, heads, dim)
        return (size * torch.randn(batch, tokens, heads, dim, generator=generator)).to(device, dtype)

    return [tensor(tokens) for tokens in (image, image, image, text, text, text)]


def expected(tensors, lens=None, scale=None):
    """(out_img, out_txt, lse_img, lse_txt), sample by sample with torch's softmax, in the dtype of the tensors."""
    q_img, k_img, v_img, q_txt, k_txt, v_txt = tensors
    scale = q_img.shape[3] ** -0.5 if scale is None else scale
    outs, lses = [[], []], [[], []]
    for b in range(q_img.shape[0]):
        n = k_txt.shape[1] if lens is None else min(max(int(lens[b]), 0), k_txt.shape[1])
        keys, values = torch.cat((k_img[b], k_txt[b, :n])), torch.cat((v_img[b], v_txt[b, :n]))
        for stream, query in enumerate((q_img[b], None if q_txt is None else q_txt[b, :n])):
            if query is None:
                continue
            scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
            out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            lse = scores.logsumexp(-1) if keys.shape[0] else scores.new_full(scores.shape[:2], -math.inf)
            rest = k_txt.shape[1] - n if stream else 0
            outs[stream].append(torch.cat((out, out.new_zeros(rest, *out.shape[1:]))))
            lses[stream].append(torch.cat((lse, lse.new_full((lse.shape[0], rest), -math.inf)), 1))
    found = [torch.stack(x) if x else None for x in (*outs, *lses)]
    return [like.new_zeros(like.shape) if value is None and like is not None else value for value, like in
            zip(found, (q_img, q_txt, None, None), strict=True)]


def check(tensors, device, *, lens=None, scale=None, lse=True):
    lengths = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)
    with torch.no_grad():
        found = ops.joint_attention(*tensors, txt_lens=lengths, scale=scale, return_lse=True)
        outs = found[:2]
        if backend.choose("joint_attention", tensors[0]).kernels is None:  # on a CPU another function without lse
            outs += ops.joint_attention(*tensors, txt_lens=lengths, scale=scale)
    host = [None if t is None else t.detach().cpu() for t in tensors]
    exact = expected([None if t is None else t.double() for t in host], lens, scale)
    same = expected(host, lens, scale)
    for index, a in enumerate(outs):
        r, t = exact[index % 2], same[index % 2]
        if r is None:
            assert a is None
            continue
        assert a.dtype == tensors[0].dtype and a.is_contiguous()
        assert_accurate(a, r, t, name=("out_img", "out_txt", "out_img without lse", "out_txt without lse")[index])
    if not lse:
        return
    single = expected([None if t is None else t.float() for t in host], lens, scale)  # the dtype of lse
    for name, a, r, t in zip(("lse_img", "lse_txt"), found[2:], exact[2:], single[2:], strict=True):
        if r is None:
            continue
        finite = r.isfinite()
        assert torch.equal(a.cpu() == -math.inf, ~finite), name
        if finite.any():
            assert_accurate(a.cpu()[finite], r[finite], t[finite], name=name)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, device):
    check(make(shape, dtype, device), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_wide_dtypes(dtype):
    tensors = make(SHAPES[0], dtype, "cpu")
    exact = expected([t.double() for t in tensors], [70, 5])
    found = ops.joint_attention(*tensors, txt_lens=torch.tensor([70, 5], dtype=torch.int32), return_lse=True)
    joined = [torch.cat(pair, 1).transpose(1, 2) for pair in zip(tensors[:3], tensors[3:], strict=True)]
    seen = (torch.arange(220) < torch.tensor([[220], [155]]))[:, None, None]
    plain = torch.nn.functional.scaled_dot_product_attention(*joined, attn_mask=seen).transpose(1, 2)
    plain[1, 155:] = 0
    for a, r, t in zip(found[:2], exact[:2], plain.split((150, 70), 1), strict=True):
        assert_accurate(a, r, t)
    assert found[0].dtype == found[2].dtype == dtype


@every_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    check(make((2, 70, 40, 2, 64), torch.bfloat16, device, layout=layout), device, lens=[40, 7])


@every_kernel
def test_expanded_values(device):
    """One prompt for all samples, and one head of keys for all: strides of 0."""
    tensors = make((2, 70, 40, 2, 64), torch.bfloat16, device)
    tensors[3:] = [x[:1].expand(2, -1, -1, -1) for x in tensors[3:]]
    tensors[1:3] = [x[:, :, :1].expand(-1, -1, 2, -1) for x in tensors[1:3]]
    check(tensors, device, lens=[40, 7])
    check_gradients(tensors, [40, 40], device)
    for op in ("joint_attention", "joint_attention_backward"):  # TMA is not given them
        entry = backend.report()[op]
        if entry["path"] == "sim" and os.environ["PYDIT_SIM_ARCH"] == "90a":
            assert "portable kernel" in entry["reason"] and "or a stride is 0" in entry["reason"]


@every_kernel
@pytest.mark.parametrize("lens", [[70, 70], [0, 70], [1, 69], [64, 12], [-5, 1000]])
def test_lengths_values(lens, device):
    tensors = make((2, 60, 70, 1, 128), torch.float16, device)
    for b, n in enumerate(lens):
        for x in tensors[3:]:
            x[b, max(n, 0):] = math.nan
    check(tensors, device, lens=lens)


@every_kernel
def test_no_key_at_all(device):
    tensors = make((2, 0, 40, 2, 64), torch.bfloat16, device)
    check(tensors, device, lens=[0, 40])
    out_img, out_txt, _, lse = ops.joint_attention(*make((1, 0, 0, 1, 32), torch.bfloat16, device), return_lse=True)
    assert out_img.shape == out_txt.shape == (1, 0, 1, 32) and lse.shape == (1, 1, 0)


@every_kernel
def test_text_without_queries(device):
    tensors = make((1, 70, 30, 2, 64), torch.bfloat16, device)
    tensors[3] = None
    check(tensors, device, lens=[20])
    assert ops.joint_attention(*tensors)[1] is None


@every_kernel
@pytest.mark.parametrize(("shape", "lens"), [
    ((2, 80, 12, 70, 32), [12, 0]), ((3, 130, 300, 3, 128), [0, 129, 300]), ((3, 0, 260, 3, 128), [5, 0, 257]),
    pytest.param((2, 200, 500, 2, 64), None, marks=pytest.mark.again)], ids=str)
def test_values_of_more_tiles_than_multiprocessors(shape, lens, device):
    """Persistent blocks take several tiles each; those without a query come last."""
    if device.type == "cpu":  # the simulator has four
        shape = (*shape[:3], min(shape[3], 5), shape[4])
    tensors = make(shape, torch.bfloat16, device)
    for b, n in enumerate(lens or []):
        for x in tensors[3:]:
            x[b, n:] = math.nan
    check(tensors, device, lens=lens)


@every_kernel
@pytest.mark.parametrize(("size", "scale"), [(30.0, None), (1e-4, None), (1.0, 1e-6), (1.0, 50.0)])
def test_extreme_values(size, scale, device):
    """Huge and tiny logits: no overflow, no NaN."""
    tensors = make((1, 90, 20, 1, 64), torch.bfloat16, device, size=size)
    check(tensors, device, lens=[13], scale=scale)


@every_kernel
@cases.examples(12)
@given(data=st.data())
def test_any_shape(device, data):
    shape = (data.draw(st.integers(1, 2), "B"), data.draw(st.integers(0, 200), "S_img"),
             data.draw(st.integers(0, 90), "S_txt"), data.draw(st.integers(1, 2), "H"),
             data.draw(st.sampled_from([32, 64, 128]), "D"))
    lens = data.draw(st.none() | st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]), "lens")
    size = data.draw(st.sampled_from([1e-3, 1.0, 30.0]), "size")  # logits from 1e-6 to thousands
    tensors = make(shape, data.draw(st.sampled_from([torch.bfloat16, torch.float16])), device,
                   seed=data.draw(st.integers(0, 9)), layout=data.draw(st.sampled_from(LAYOUTS)), size=size)
    for b, n in enumerate(lens or []):
        for x in tensors[3:]:
            x[b, n:] = math.nan
    # Of a handful of rows torch's own lse may be exact, which leaves a bound of one ulp: other tests judge lse.
    check(tensors, device, lens=lens, scale=data.draw(st.none() | st.floats(0.01, 2)), lse=False)


@every_kernel
def test_run_to_run_equality(device):
    tensors = make(SHAPES[0], torch.bfloat16, device)
    first, second = (ops.joint_attention(*tensors, return_lse=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _gradients(tensors, lens, grads, attention):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outs = attention(leaves, lens)
    sums = [(o * g).sum() for o, g in zip(outs, grads, strict=False) if o is not None]
    torch.stack(sums).sum().backward()
    return [None if t is None else torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


@every_kernel
@pytest.mark.parametrize(("shape", "lens", "layout", "queries"), [
    ((2, 40, 30, 2, 32), [30, 11], "packed", True), ((2, 40, 30, 2, 32), [30, 11], "contiguous", False),
    ((1, 150, 70, 1, 128), [66], "contiguous", True), ((1, 70, 100, 2, 64), [64], "heads first", True),
    ((2, 33, 20, 1, 128), [0, 20], "unaligned", True), ((1, 0, 20, 1, 64), [20], "contiguous", True),
    ((1, 70, 0, 1, 64), [0], "contiguous", True)], ids=str)
def test_gradients(shape, lens, layout, queries, device):
    tensors = make(shape, torch.bfloat16, device, layout=layout)
    if not queries:
        tensors[3] = None
    check_gradients(tensors, lens, device)


@every_kernel
@pytest.mark.parametrize(("shape", "lens", "layout"), [
    ((2, 40, 30, 1, 32), [-3, 99], "packed"), ((1, 70, 20, 1, 64), [11], "unaligned"),
    ((1, 33, 20, 2, 128), [20], "heads first")], ids=str)
def test_gradients_of_float16(shape, lens, layout, device):
    """Lengths outside are clamped here too."""
    check_gradients(make(shape, torch.float16, device, layout=layout), lens, device)


def check_gradients(tensors, lens, device):
    """Against float64 autograd; what is past the length has a gradient of 0, whatever it and its gradient hold."""
    generator, queries = torch.Generator().manual_seed(5), tensors[3] is not None
    grads = [torch.randn(keys.shape, generator=generator).to(keys) for keys in (tensors[1], tensors[4])]
    host = [None if t is None else t.detach().cpu() for t in tensors]

    def formula(x, lens):
        return expected(x, lens)[:2 if queries else 1]

    exact = _gradients([None if t is None else t.double() for t in host], lens, [g.cpu().double() for g in grads],
                       formula)
    same = _gradients(host, lens, [g.cpu() for g in grads], formula)
    for b, n in enumerate(lens):
        for x in (*tensors[3:], grads[1]):
            if x is not None:
                x[b, max(n, 0):] = math.nan
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    lengths = torch.tensor(lens, dtype=torch.int32, device=device)
    outs = ops.joint_attention(*leaves, txt_lens=lengths)
    torch.autograd.backward([o for o in outs if o is not None], grads[:2 if queries else 1])
    for name, leaf, r, s in zip(NAMES, leaves, exact, same, strict=True):
        if leaf is None:
            continue
        assert_accurate(leaf.grad, r, s, name=name)
        for b, n in enumerate(lens):
            assert not name.endswith("txt") or not leaf.grad[b, max(n, 0):].any()


@every_kernel
@pytest.mark.parametrize(("size", "scale", "offset"), [(30.0, None, 0), (1e-4, None, 0), (1.0, 50.0, 0),
                                                       (1.0, 1.0, 4.0), (1.0, 1.0, -4.0)])
def test_gradients_of_extreme_values(size, scale, offset, device):
    """Huge and tiny logits; with an offset all are far above 0, or far below: there e^-lse has no float."""
    tensors = make((1, 70, 20, 1, 64), torch.bfloat16, device, size=size)
    tensors[0], tensors[1] = tensors[0] + abs(offset), tensors[1] + offset
    tensors[3], tensors[4] = tensors[3] + abs(offset), tensors[4] + offset
    grads = [torch.ones(1, 70, 1, 64), torch.ones(1, 20, 1, 64)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    lens = torch.tensor([13], dtype=torch.int32, device=device)
    found = ops.joint_attention(*leaves, txt_lens=lens, scale=scale)
    torch.autograd.backward(found, [g.to(device, torch.bfloat16) for g in grads])
    host = [t.cpu() for t in tensors]
    exact, same = (_gradients([t.to(dtype) for t in host], [13], [g.to(dtype) for g in grads],
                              lambda x, n: expected(x, n, scale)[:2]) for dtype in (torch.float64, torch.bfloat16))
    for name, leaf, r, s in zip(NAMES, leaves, exact, same, strict=True):
        assert leaf.grad.isfinite().all(), name
        if size ** 2 * (scale or 0.125) < 10:  # above it the softmax is a step: a rounding of the scores decides
            assert_accurate(leaf.grad, r, s, name=name)


@every_kernel
@cases.examples(8)
@given(data=st.data())
def test_gradients_of_any_shape(device, data):
    shape = (data.draw(st.integers(1, 2), "B"), data.draw(st.integers(16, 150), "S_img"),
             data.draw(st.integers(0, 80), "S_txt"), data.draw(st.integers(1, 2), "H"),
             data.draw(st.sampled_from([32, 64, 128]), "D"))  # of one key torch has a gradient of exactly 0
    lens = data.draw(st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]), "lens")
    layout, queries = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.booleans(), "text queries")
    tensors = make(shape, data.draw(st.sampled_from([torch.bfloat16, torch.float16])), device, layout=layout)
    if not queries:
        tensors[3] = None
    check_gradients(tensors, lens, device)


@every_kernel
def test_gradients_with_sums_in_no_order(device):
    """The faster mode, which torch.use_deterministic_algorithms(False), the default, chooses."""
    torch.use_deterministic_algorithms(False)
    check_gradients(make((2, 150, 70, 2, 64), torch.bfloat16, device), [70, 9], device)


@every_kernel
def test_run_to_run_equality_of_gradients(device):
    """Whatever the order in which blocks run: the simulator has another in every launch."""
    tensors = make((2, 300, 70, 1, 64), torch.bfloat16, device)
    runs = [_gradients(tensors, None, [torch.ones_like(tensors[0]), torch.ones_like(tensors[3])],
                       lambda x, _: ops.joint_attention(*x)) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_gradient_of_lse():
    tensors = make((1, 6, 4, 1, 32), torch.float64, "cpu")
    for t in tensors:
        t.requires_grad_()
    lens = torch.tensor([3], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *t: [x[:, :, :3] if i == 3 else x for i, x in
                    enumerate(ops.joint_attention(*t, txt_lens=lens, return_lse=True))], tensors, fast_mode=True)


@every_kernel
def test_second_derivatives_are_refused(device):
    tensors = [t.requires_grad_() for t in make((1, 8, 4, 1, 32), torch.bfloat16, device)]
    first = torch.autograd.grad(sum(x.sum() for x in ops.joint_attention(*tensors)), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="joint_attention: expected first derivatives only, got a second"):
        first[0].square().sum().backward()


@every_kernel
def test_opcheck(device):
    tensors = make((1, 20, 10, 1, 32), torch.bfloat16, device)
    for t in tensors:
        t.requires_grad_()
    lens = torch.tensor([7], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.pydit.joint_attention.default, (*tensors, lens, 0.2))
    torch.library.opcheck(torch.ops.pydit.joint_attention.default, (*tensors[:3], None, *tensors[4:], None, 0.2))


@every_kernel
@pytest.mark.parametrize("queries", [True, False])
def test_opcheck_without_gradients_and_of_the_backward(queries, device):
    """One sample and head, where slices of a whole are contiguous: results must share no memory all the same."""
    tensors = make((1, 20, 10, 1, 32), torch.bfloat16, device)
    if not queries:
        tensors[3] = None
    lens = torch.tensor([7], dtype=torch.int32, device=device)
    checks = ("test_schema", "test_faketensor")
    for limit in (lens, None):
        torch.library.opcheck(torch.ops.pydit.joint_attention.default, (*tensors, limit, 0.2, False), test_utils=checks)
        outs = torch.ops.pydit.joint_attention(*tensors, limit, 0.2)
        torch.library.opcheck(torch.ops.pydit.joint_attention_backward.default,
                              (*tensors, limit, *outs, *map(torch.ones_like, outs), 0.2), test_utils=checks)


@every_kernel
def test_compiles_whole(device):
    tensors = make((1, 20, 10, 1, 32), torch.bfloat16, device)
    lens = torch.tensor([7], dtype=torch.int32, device=device)
    for queries in (True, False):  # of the text
        if not queries:
            tensors[3] = None
        leaves = [[None if t is None else t.clone().requires_grad_() for t in tensors] for _ in range(2)]

        def attend(*t):
            return [out for out in ops.joint_attention(*t, txt_lens=lens) if out is not None]

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        found, plain = compiled(*leaves[0]), attend(*leaves[1])
        for outs in (found, plain):
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
        grads = [[t.grad for t in of if t is not None] for of in leaves]
        assert len(found) == 1 + queries and len(grads[0]) == 5 + queries
        assert all(torch.equal(a, b) for a, b in zip([*found, *grads[0]], [*plain, *grads[1]], strict=True))


@pytest.mark.parametrize(("device", "layout", "words"), [
    ("sim", "contiguous", "not of compute capability 9.x"), ("sim-90a", "packed", "the Hopper kernel"),
    ("sim-90a", "unaligned", "not multiples of 16 bytes"), ("reference", "packed", "the tensors are on the CPU")],
    indirect=["device"])
def test_report_names_the_kernel(device, layout, words):
    tensors = [t.detach().requires_grad_() for t in make((1, 20, 10, 1, 64), torch.bfloat16, device, layout=layout)]
    sum(out.sum() for out in ops.joint_attention(*tensors)).backward()
    for op in ("joint_attention", "joint_attention_backward"):
        assert words in backend.report()[op]["reason"]


@every_kernel
def test_a_mask_with_holes(device):
    """Packing by the mask equals attention that sees the kept tokens only."""
    tensors = make((2, 30, 12, 1, 32), torch.bfloat16, device)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    lens, order, *packed = ops.pack_text(mask, *tensors[3:])
    out_img, out_txt = ops.joint_attention(*tensors[:3], *packed, txt_lens=lens)
    out_txt = ops.unpack_text(order, out_txt)
    assert (out_txt[~mask] == 0).all()
    for b in range(2):
        kept = [t[b:b + 1].cpu() for t in tensors[:3]] + [t[b:b + 1, mask[b]].cpu() for t in tensors[3:]]
        exact, same = expected([t.double() for t in kept]), expected(kept)
        for a, r, t in zip((out_img[b], out_txt[b, mask[b]]), exact[:2], same[:2], strict=True):
            assert_accurate(a, r[0], t[0])
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor \[B, S\], got torch.float32 \[2, 3\]"):
        ops.pack_text(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected tensors \[2, 12, ...\] like mask, got \[2, 5\]"):
        ops.pack_text(mask, torch.ones(2, 5, device=device))
    with pytest.raises(TypeError, match="expected tensors behind mask, got list"):
        ops.pack_text(mask, [1])


def masked(mask, tensors):
    lens, order, *packed = ops.pack_text(mask, *tensors[3:])
    out_img, out_txt = ops.joint_attention(*tensors[:3], *packed, txt_lens=lens)
    return out_img, ops.unpack_text(order, out_txt)


def test_packing_reads_nothing_on_the_host():
    """Tensors without data: whoever asks for a value of one, as a synchronisation does, is refused."""
    with FakeTensorMode():
        mask, tensors = torch.ones(2, 12, dtype=torch.bool), make((2, 30, 12, 1, 32), torch.bfloat16, "cpu")
        assert [out.shape[1] for out in masked(mask, tensors)] == [30, 12]
        with pytest.raises(DataDependentOutputException):
            bool(mask.all())


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_packing_waits_for_nothing_and_is_recorded_in_a_graph(device):
    torch.use_deterministic_algorithms(False)  # torch's scatter in that mode copies from the host and waits
    tensors = make((2, 30, 12, 1, 32), torch.bfloat16, device)
    mask = torch.rand(2, 12, device=device) < 0.6
    masked(mask, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        masked(mask, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = masked(mask, tensors)
    mask.copy_(~mask)  # a replay sees other lengths
    graph.replay()
    for a, b in zip(found, masked(mask, tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("change", "error", "words"), [
    (dict(q_img=lambda t: t.tolist()), TypeError, "q_img: expected a torch.Tensor, got list"),
    (dict(k_img=lambda t: t.tolist()), TypeError, "k_img: expected a torch.Tensor, got list"),
    (dict(k_txt=lambda t: None), TypeError, "k_txt: expected a torch.Tensor, got NoneType"),
    (dict(q_img=lambda t: None), TypeError, "q_img: expected a torch.Tensor, got NoneType"),
    (dict(k_img=lambda t: t.float()), TypeError, "k_img: expected torch.bfloat16 like the first argument"),
    (dict(k_img=lambda t: t[0]), ValueError, r"k_img: expected shape \[B, S, H, D\], got \[8, 2, 32\]"),
    (dict(k_txt=lambda t: t[:0]), ValueError, r"k_txt: expected shape \[1, 4, 2, 32\], got \[0, 4, 2, 32\]"),
    (dict(k_img=lambda t: torch.cat((t, t), 3)), ValueError,
     r"k_img: expected shape \[1, 8, 2, 32\], got \[1, 8, 2, 64\]"),
    (dict(v_img=lambda t: t[0]), ValueError, r"v_img: expected shape \[B, S, H, D\], got \[8, 2, 32\]"),
    (dict(k_img=lambda t: t[:, :, :1]), ValueError, r"k_img: expected shape \[1, 8, 2, 32\], got \[1, 8, 1, 32\]"),
    (dict(v_txt=lambda t: t[:, :3]), ValueError, r"v_txt: expected shape \[1, 4, 2, 32\], got \[1, 3, 2, 32\]"),
    (dict(q_txt=lambda t: t[..., :16]), ValueError, "q_txt: expected a head dim of 32, 64 or 128, got 16"),
    (dict(k_txt=lambda t: t.transpose(1, 3).contiguous().transpose(1, 3)), ValueError,
     "k_txt: expected a contiguous last dimension, got stride 8"),
    (dict(k_txt=lambda t: t.to("meta")), ValueError, "k_txt: expected device cpu like the first argument, got meta"),
    (dict(txt_lens=[3]), TypeError, "txt_lens: expected a torch.Tensor or None, got list"),
    (dict(txt_lens=torch.tensor([3])), TypeError, "txt_lens: expected torch.int32, got torch.int64"),
    (dict(txt_lens=torch.tensor([3, 1], dtype=torch.int32)), ValueError, r"txt_lens: expected shape \[1\], got \[2\]"),
    (dict(txt_lens=torch.tensor([3], dtype=torch.int32, device="meta")), ValueError,
     "txt_lens: expected device cpu like k_txt, got meta"),
    *((dict(scale=scale), ValueError, f"scale: expected a number above 0, of float32's range, or None, got {words}$")
      for scale, words in ((0, "0"), (-0.5, "-0.5"), (math.inf, "inf"), (math.nan, "nan"), (1e39, r"1e\+39"),
                           (1e-46, "1e-46"), ("x", "'x'"), (True, "True"), (torch.tensor(1.0), "Tensor")))])
def test_bad_arguments(change, error, words):
    arguments = dict(zip(NAMES, make((1, 8, 4, 2, 32), torch.bfloat16, "cpu"), strict=True))
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error, match=f"joint_attention: {words}"):
        ops.joint_attention(**arguments)


def test_lengths_outside_are_reported_on_request(monkeypatch):
    tensors = make((1, 8, 4, 2, 32), torch.bfloat16, "cpu")
    lens = torch.tensor([5], dtype=torch.int32)
    assert torch.equal(ops.joint_attention(*tensors, txt_lens=lens)[0], ops.joint_attention(*tensors)[0])
    monkeypatch.setenv("PYDIT_CHECK", "1")
    with pytest.raises(ValueError, match=r"txt_lens: expected lengths from 0 to 4, got \[5\]"):
        ops.joint_attention(*tensors, txt_lens=lens)


@pytest.mark.parametrize("device", ["sim"], indirect=True)
def test_kernels_refuse_wide_dtypes(device):
    with pytest.raises(TypeError, match="expected float16 or bfloat16 on the sim backend, got torch.float32"):
        ops.joint_attention(*make((1, 8, 4, 2, 32), torch.float32, device))


def test_gradient_checkpointing(device):
    """Saved tensors may be read only once when they are recomputed."""
    from torch.utils.checkpoint import checkpoint

    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 20, 2, 32)] * 3 + [(1, 5, 2, 32)] * 3
    tensors = [torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_() for shape in shapes]
    grads = []
    for call in (lambda f, *t: f(*t), lambda f, *t: checkpoint(f, *t, use_reentrant=False)):
        for tensor in tensors:
            tensor.grad = None
        sum(out.float().square().sum() for out in call(ops.joint_attention, *tensors)).backward()
        grads.append([tensor.grad.clone() for tensor in tensors])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
