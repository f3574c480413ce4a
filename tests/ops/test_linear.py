"""Linear layers with their epilogues, of one stream and of two, against float64 under the tolerance policy."""

import os

import pytest
import torch
import torch.nn.functional as F

from pydit import backend, ops
from pydit.ops import reference
from pydit.testing import assert_accurate
from tests.ops import cases

BACKENDS = ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)]
every_kernel = pytest.mark.parametrize("device", BACKENDS, indirect=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def gated(x, w, b, r, g, split=None):
    return r + cases.rows(g, x.shape[1], split) * F.linear(x, w, b)


OPS = {  # name -> (op, the same in plain torch, which inputs it takes)
    "linear_gelu": (ops.linear_gelu, lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), "xwb"),
    "linear_gated_residual": (ops.linear_gated_residual, gated, "xwbrg"),
    "linear_residual": (ops.linear_residual, lambda x, w, b: x + F.linear(x, w, b), "xsc"),
}


@pytest.fixture(autouse=True)
def own_kernel(monkeypatch):
    """On a GPU too the kernel runs, not the library."""
    monkeypatch.setenv("PYDIT_GEMM", "pydit")


def inputs(names, dtype, device, batch=2, tokens=21, k=40, n=24, gate_rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, tokens, k), "w": (n, k), "b": (n,), "r": (batch, tokens, n), "s": (k, k), "c": (k,),
              "g": (batch, n) if gate_rows is None else (batch, gate_rows, n)}
    return [(torch.randn(shapes[name], generator=generator) / (k ** 0.5 if name in "ws" else 1)).to(device, dtype)
            for name in names]


def double(args):
    return [x.double().cpu() for x in args]


def no_memory(size):
    pytest.fail(f"a workspace of {size} bytes where none is needed")


def path_of(op):
    return backend.report()[op]["path"], backend.report()[op]["reason"]


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("tokens", [21, 0])
def test_values(name, tokens, dtype, device):
    op, plain, names = OPS[name]
    args = inputs(names, dtype, device, tokens=tokens)
    out = op(*args)
    assert_accurate(out, plain(*double(args)), plain(*args), name=name)
    assert out.dtype == dtype and out.shape == plain(*args).shape
    path, reason = path_of(name)
    if path != "reference":
        assert path == ("torch" if dtype == torch.float32 else "cuda" if device.type == "cuda" else "sim"), reason
        assert ("takes float16" if dtype == torch.float32 else "kernel") in reason


# Several tiles of each kernel, ragged rows, columns and K, one token, one feature, a warpgroup without rows.
@every_kernel
@pytest.mark.parametrize(("batch", "tokens", "k", "n"), [(2, 150, 72, 264), (1, 1, 8, 8), (1, 197, 200, 136)])
def test_values_of_tiles(batch, tokens, k, n, device):
    args = inputs("xwbrg", torch.bfloat16, device, batch, tokens, k, n)
    assert_accurate(ops.linear_gated_residual(*args), gated(*double(args)), gated(*args))
    assert "not multiples" not in path_of("linear_gated_residual")[1]


@every_kernel
def test_split_values(device):
    """A gate's second row from inside a tile on, from the first token on, and from beyond the last."""
    args = inputs("xwbrg", torch.float16, device, tokens=70, gate_rows=2)
    for split in (33, 0, 100):
        out = ops.linear_gated_residual(*args, split=split)
        assert_accurate(out, gated(*double(args), split), gated(*args, split), name=f"split {split}")


@every_kernel
@pytest.mark.parametrize("layout", ["packed", "swapped", "unaligned"])
def test_layouts(layout, device):
    generator = torch.Generator().manual_seed(0)
    x = cases.tokens((2, 20, 40), torch.bfloat16, device, generator=generator, layout=layout)
    r = cases.tokens((2, 20, 24), torch.bfloat16, device, generator=generator, layout=layout)
    _, w, b, _, g = inputs("xwbrg", torch.bfloat16, device, tokens=20)
    args = (x, w, b, r, g)
    assert_accurate(ops.linear_gated_residual(*args), gated(*double(args)), gated(*args))
    path, reason = path_of("linear_gated_residual")
    if path == "sim" and os.environ["PYDIT_SIM_ARCH"] == "90a":
        assert ("not multiples of 16 bytes" if layout == "unaligned" else "Hopper kernel") in reason


@every_kernel
@pytest.mark.parametrize("expanded", ["batch of x", "tokens of x", "residual", "weight"])
def test_expanded_inputs(expanded, device):
    """Of expanded tensors, which TMA is not given."""
    x, w, b, r, g = inputs("xwbrg", torch.bfloat16, device, tokens=20)
    if expanded == "weight":
        w = w[:1].expand_as(w)
    elif expanded == "residual":
        r = r[:1].expand_as(r)
    else:
        x = (x[:1] if expanded == "batch of x" else x[:, :1]).expand_as(x)
    args = (x, w, b, r, g)
    assert_accurate(ops.linear_gated_residual(*args), gated(*double(args)), gated(*args))
    path, reason = path_of("linear_gated_residual")
    if path == "sim" and os.environ["PYDIT_SIM_ARCH"] == "90a":
        assert "portable kernel" in reason and "or a stride is 0" in reason


@every_kernel
def test_odd_features_and_a_strided_weight_values(device):
    """Neither K nor N a multiple of 8, and a weight that is a slice: the element-wise path."""
    x, w, b = inputs("xwb", torch.bfloat16, device, k=33, n=27)
    w = torch.cat((w, w), 1)[:, :33]
    plain = OPS["linear_gelu"][1]
    assert_accurate(ops.linear_gelu(x, w, b), plain(*double((x, w, b))), plain(x, w, b))
    assert_accurate(ops.linear_gelu(x, w.T.contiguous().T), plain(*double((x, w)), None), plain(x, w, None))


@pytest.mark.parametrize("device", ["reference", "sim"], indirect=True)
@pytest.mark.parametrize("gemm", ["pydit", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_dtype(dtype, gemm, device, monkeypatch):
    """Values and gradients as outside of it, in the arguments' dtype."""
    monkeypatch.setenv("PYDIT_GEMM", gemm)
    for op, _, names in OPS.values():
        args = inputs(names, dtype, device)
        expected = op(*args)
        leaves = [x.clone().requires_grad_() for x in args]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found, graph = op(*args), op(*leaves)
        assert found.dtype == graph.dtype == dtype and torch.equal(found, expected)
        graph.float().sum().backward()
        assert all(x.grad.dtype == dtype for x in leaves)
    x, w, b = inputs("xwb", dtype, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        pair = ops.joint_linear(x, x[:, :3], w, w, b, b)
        q = torch.randn(1, 9, 2, 32, device=device, dtype=torch.bfloat16 if device.type == "cpu" and "sim" in os.environ[
            "PYDIT_BACKEND"] else dtype)
        assert ops.joint_attention(q, q, q, q, q, q)[0].dtype == q.dtype
    assert {out.dtype for out in pair} == {dtype}


@pytest.mark.parametrize("device", ["sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("cluster", ["1", "2"])
@pytest.mark.parametrize(("batch", "tokens", "k", "n"), [(2, 300, 200, 264), (1, 70, 72, 136), (1, 1, 8, 8)])
def test_blocks_alone_and_in_clusters(batch, tokens, k, n, cluster, copies, device, monkeypatch):
    """Pairs of tiles with rows of one, of both and of half a block; the epilogue's residual and gate, and heads."""
    monkeypatch.setenv("PYDIT_CLUSTER", cluster)
    monkeypatch.setenv("PYDIT_SIM_ASYNC", copies)
    if device.type == "cpu":
        backend.configure_sim()
    args = inputs("xwbrg", torch.bfloat16, device, batch, tokens, k, n)
    assert_accurate(ops.linear_gated_residual(*args), gated(*double(args)), gated(*args))
    reason = path_of("linear_gated_residual")[1]
    if backend.KERNEL_PATHS[0] in reason:
        assert ("clusters of two" in reason) == (cluster == "2")
    args = qkv_inputs(torch.bfloat16, device, 32, tokens=(tokens, 9), k=k)
    exact, same = qkv_plain(args, 32, lambda x: x.double().cpu()), qkv_plain(args, 32)
    for a, b, c in zip(ops.joint_qkv(*args, head_dim=32), exact, same, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("device", ["sim-90a"], indirect=True)
@pytest.mark.parametrize(("tokens", "pairs"), [(128, False), (129, True), (384, True)])
def test_pairs_of_blocks_where_they_read_less(tokens, pairs, device, monkeypatch):
    monkeypatch.setenv("PYDIT_CLUSTER", "auto")
    ops.linear_gelu(*inputs("xw", torch.bfloat16, device, 1, tokens, 8, 264))
    assert ("clusters of two" in path_of("linear_gelu")[1]) == pairs


@every_kernel
def test_values_of_large_gelu_inputs(device, kernel_only):
    """Results far below and above zero, where 1 + tanh would cancel or an exponential overflow."""
    x = torch.linspace(-40, 40, 64, device=device, dtype=torch.bfloat16)[None, :, None].expand(1, 64, 8).contiguous()
    w = torch.eye(8, device=device, dtype=torch.bfloat16)
    out, exact = ops.linear_gelu(x, w), F.gelu(x.double().cpu(), approximate="tanh")
    assert_accurate(out, exact, F.gelu(x, approximate="tanh"))
    small = (exact < 0) & (exact > -1e-2) & (exact < -1e-9)
    error = (out.double().cpu() - exact).abs()[small]
    assert small.any() and (error <= 2 ** -8 * exact.abs()[small]).all()


def joint_inputs(names, dtype, device, text, **shape):
    """Pairs of image and text inputs, in the order of the joint ops' arguments."""
    image, words = (inputs(names, dtype, device, tokens=tokens, n=n, k=k, seed=seed, **shape)
                    for tokens, n, k, seed in ((70, 136, 72, 0), (text, 48, 40, 1)))
    return [x for pair in zip(image, words, strict=True) for x in pair]


JOINT = {"joint_linear": (ops.joint_linear, F.linear, "xwb"),
         "joint_linear_gelu": (ops.joint_linear_gelu, OPS["linear_gelu"][1], "xwb"),
         "joint_linear_gated_residual": (ops.joint_linear_gated_residual, gated, "xwbrg"),
         "joint_linear_residual": (ops.joint_linear_residual, OPS["linear_residual"][1], "xsc")}


@every_kernel
@pytest.mark.parametrize("text", [9, 0])
@pytest.mark.parametrize("name", JOINT)
def test_joint_values(name, text, device):
    op, plain, names = JOINT[name]
    args = joint_inputs(names, torch.bfloat16, device, text)
    for found, stream, tokens in zip(op(*args), (args[::2], args[1::2]), (70, text), strict=True):
        assert found.shape[1] == tokens
        assert_accurate(found, plain(*double(stream)), plain(*stream), name=name)


@every_kernel
def test_joint_values_without_an_image(device):
    x, w, b = inputs("xwb", torch.bfloat16, device)
    none, out = ops.joint_linear(x[:, :0], x, w, w, None, b)
    assert none.shape == (2, 0, 24)
    assert_accurate(out, F.linear(*double((x, w, b))), F.linear(x, w, b))


def qkv_inputs(dtype, device, head_dim, heads=2, tokens=(37, 9), k=40, text_queries=True, batch=2):
    generator = torch.Generator().manual_seed(head_dim)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    streams = []
    for s in tokens:
        theta = 6.28 * torch.rand(s, head_dim // 2, generator=generator)
        streams.append([draw(batch, s, k), [draw(heads * head_dim, k, scale=k ** -0.5) for _ in "qkv"],
                        [draw(heads * head_dim) for _ in "qkv"], [1 + draw(head_dim, scale=0.1) for _ in "qk"],
                        (theta.cos().to(device), theta.sin().to(device))])
    if not text_queries:
        streams[1][1][0] = streams[1][2][0] = None
    return [x for pair in zip(*streams, strict=True) for x in pair]


def qkv_plain(args, head_dim, to=lambda x: x):
    found = []
    for x, weights, biases, norms, freqs in (args[::2], args[1::2]):
        for w, b, norm in zip(weights, biases, (*norms, None), strict=True):
            if w is None:
                found.append(None)
                continue
            heads = F.linear(to(x), to(w), None if b is None else to(b)).unflatten(-1, (-1, head_dim))
            found.append(heads if norm is None else cases.qk_norm_rope(
                heads, to(norm), None if freqs is None else tuple(to(t) if heads.dtype == torch.float64 else t
                                                                  for t in freqs)))
    return found


@every_kernel
@pytest.mark.parametrize(("head_dim", "text_queries", "dtype"), [
    (128, True, torch.bfloat16), (64, False, torch.float16), (32, True, torch.bfloat16), (48, True, torch.bfloat16)])
def test_qkv_values(head_dim, text_queries, dtype, device):
    args = qkv_inputs(dtype, device, head_dim, text_queries=text_queries)
    found = ops.joint_qkv(*args, head_dim=head_dim)
    exact, same = qkv_plain(args, head_dim, lambda x: x.double().cpu()), qkv_plain(args, head_dim)
    for name, a, b, c in zip(("q_img", "k_img", "v_img", "q_txt", "k_txt", "v_txt"), found, exact, same, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_accurate(a, b, c, name=name)
    if path_of("joint_qkv")[0] != "reference":
        assert ("head_dim 48" in path_of("joint_qkv")[1]) == (head_dim == 48)


@every_kernel
def test_qkv_values_bare(device):
    """No bias, no weights of the norm, no rotation; no text; unaligned inputs."""
    args = qkv_inputs(torch.bfloat16, device, 64, tokens=(20, 0))
    x = torch.empty(args[0].numel() + 1, dtype=torch.bfloat16, device=device)[1:].view(args[0].shape).copy_(args[0])
    found = ops.joint_qkv(x, args[1], args[2], args[3], head_dim=64)
    plain = [x, args[1], args[2], args[3], [None] * 3, [None] * 3, *[[torch.ones(64, device=device)] * 2] * 2, None, None]
    exact = qkv_plain(plain, 64, lambda t: t.double().cpu())
    same = qkv_plain(plain, 64, lambda t: t.to(torch.bfloat16))
    for a, b, c in zip(found, exact, same, strict=True):
        assert_accurate(a, b, c)


HOPPER = pytest.mark.parametrize("device", ["sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
EVERY_CLUSTER = pytest.mark.parametrize("cluster", ["1", "2"])


# Of the simulator's four multiprocessors: whole tiles first and none, runs of one part and of several, one that ends one
# tile and begins the next, warpgroups without rows, a last step of 8.
@HOPPER
@EVERY_CLUSTER
@pytest.mark.parametrize("parts", ["2", pytest.param("3", marks=pytest.mark.again), "8"])
@pytest.mark.parametrize(("batch", "tokens", "k", "n"), [(1, 641, 200, 136), (1, 333, 584, 24), (3, 71, 328, 264)])
def test_values_of_cut_tiles(batch, tokens, k, n, parts, cluster, device, monkeypatch):
    monkeypatch.setenv("PYDIT_CLUSTER", cluster)
    monkeypatch.setenv("PYDIT_PARTS", parts)
    args = inputs("xwbrg", torch.bfloat16, device, batch, tokens, k, n, gate_rows=2)
    first, second = (ops.linear_gated_residual(*args, split=65) for _ in range(2))
    assert_accurate(first, gated(*double(args), 65), gated(*args, 65))
    assert torch.equal(first, second)


@HOPPER
@EVERY_CLUSTER
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [*JOINT, "joint_qkv"])
def test_values_of_cut_tiles_of_two_layers(name, dtype, cluster, device, monkeypatch):
    monkeypatch.setenv("PYDIT_CLUSTER", cluster)
    for image, parts in ((401, "2"), (151, "3")):
        monkeypatch.setenv("PYDIT_PARTS", parts)
        if name == "joint_qkv":
            args = qkv_inputs(dtype, device, 32, tokens=(image, 9), k=200)
            found = ops.joint_qkv(*args, head_dim=32)
            exact, same = qkv_plain(args, 32, lambda x: x.double().cpu()), qkv_plain(args, 32)
        else:
            op, plain, names = JOINT[name]
            streams = [inputs(names, dtype, device, 1, tokens, 200, 136, seed=tokens) for tokens in (image, 9)]
            found = op(*(x for pair in zip(*streams, strict=True) for x in pair))
            exact, same = [plain(*double(s)) for s in streams], [plain(*s) for s in streams]
        for a, b, c in zip(found, exact, same, strict=True):
            assert_accurate(a, b, c, name=f"{image} tokens")


def cut(device, k, tokens=71, n=136, *, cluster=1, parts=0, allocate=None):
    """out, and the sizes of the workspaces that were asked for."""
    x, w = inputs("xw", torch.bfloat16, device, 1, tokens, k, n)
    out, sizes = torch.empty(1, tokens, n, dtype=x.dtype, device=device), []

    def memory(size):
        sizes.append(size)
        return torch.full((size,), 255, dtype=torch.uint8, device=device) if allocate is None else allocate(size)

    with backend.device_of(x):
        backend.choose("linear", x).kernels.grouped_linear(
            [(x, w, None, None, None, -1, None, None, None, 0, out)], 0, 0.0, memory, cluster, parts,
            backend.DTYPE_CODES[x.dtype], backend.stream_of(x))
    return out, sizes


@pytest.mark.parametrize("device", ["sim-90a"], indirect=True)
@EVERY_CLUSTER
def test_workspace_of_cut_tiles(cluster, device):
    """64 KB and a counter for each warpgroup of the clusters that share parts, and a ticket, where something is cut."""
    cluster = int(cluster)

    def size(sharers):
        return [sharers * cluster * 2 * (64 * 256 * 4 + 4) + 4]

    whole, none = cut(device, 200, cluster=cluster, parts=1)
    chosen, too = cut(device, 200, cluster=cluster)
    assert none == too == [] and torch.equal(whole, chosen)  # too shallow to gain by it
    assert cut(device, 200, cluster=cluster, parts=2)[1] == size(2)
    assert cut(device, 200, cluster=cluster, parts=8)[1] == size(4 // cluster)  # in as many parts as it has steps
    assert cut(device, 64, cluster=cluster, parts=8)[1] == []
    assert cut(device, 200, tokens=512 - 9, cluster=cluster, parts=2)[1] == []  # whole waves
    assert cut(device, 3072, n=8, cluster=cluster)[1] == size(4 // cluster)
    half, _ = cut(device, 200, cluster=cluster, parts=2)
    assert_accurate(half, whole.double(), whole)


@pytest.mark.parametrize("device", ["sim-90a"], indirect=True)
def test_the_report_says_what_was_cut(device, monkeypatch):
    for parts in ("2", "1"):
        monkeypatch.setenv("PYDIT_PARTS", parts)
        ops.linear_gelu(*inputs("xw", torch.bfloat16, device, 1, 71, 200, 136))
        assert path_of("linear_gelu")[1].endswith(", tiles of the last wave cut along K") == (parts == "2")


@pytest.mark.parametrize("device", ["sim-90a"], indirect=True)
def test_an_unaligned_workspace_is_refused(device):
    with pytest.raises(RuntimeError, match="grouped_linear: workspace: expected a multiple of 16, got 0x"):
        cut(device, 200, parts=2, allocate=lambda size: torch.empty(size + 4, dtype=torch.uint8)[4:])


@every_kernel
def test_out_may_be_the_residual(device, kernel_only):
    """The C API's aliasing rule, through the binding."""
    x, w, b, r, g = inputs("xwbrg", torch.bfloat16, device, tokens=70, n=136)
    expected = ops.linear_gated_residual(x, w, b, r, g)
    kernels = backend.choose("linear", x).kernels
    with backend.device_of(x):
        kernels.grouped_linear([(x, w, b, r, g[:, None], -1, None, None, None, 0, r)], 0, 0.0, no_memory, 0, 1,
                               backend.DTYPE_CODES[x.dtype], backend.stream_of(x))
    assert torch.equal(r, expected)


@pytest.mark.parametrize(("change", "words"), [
    ({"dtype": 0}, r"dtype: expected float16 \(1\) or bfloat16 \(2\), got 0"),
    ({"activation": 7}, r"activation: expected none \(0\) or GELU \(1\), got 7"),
    ({"cluster": 3}, "cluster: expected 0, 1 or 2, got 3"),
    ({"parts": 9}, "parts: expected 0 to 8, got 9"),
    ({"head_dim": 48}, "head_dim of layer 0: expected 0, 32, 64 or 128, a divisor of 64, got 48"),
    ({"head_dim": 32, "activation": 1}, "expected no residual, gate or activation beside a layer with head_dim"),
    ({"head_dim": 32, "cos": True}, "cos, sin of layer 0: expected both or neither, got one"),
    ({"k": 0}, r"features of layer 0: expected 1 to 2\^24, got 0")])
def test_bad_arguments_of_the_kernel(change, words, device, kernel_only):
    x, w = inputs("xw", torch.bfloat16, device, k=change.get("k", 40), n=64)
    cos = torch.ones(21, 16, device=device) if "cos" in change else None
    with pytest.raises(RuntimeError, match=words):
        backend.choose("linear", x).kernels.grouped_linear(
            [(x, w, None, None, None, -1, None, cos, None, change.get("head_dim", 0), torch.empty(2, 21, 64))],
            change.get("activation", 0), 1e-6, no_memory, change.get("cluster", 0), change.get("parts", 1),
            change.get("dtype", 2), backend.stream_of(x))


def fresh(args, dtype):
    """A copy of nested arguments in another dtype; tensors want gradients, but for those in tuples, which are tables."""
    def copied(x, wants):
        if isinstance(x, (list, tuple)):
            return type(x)(copied(y, wants and isinstance(x, list)) for y in x)
        return None if x is None else x.detach().to(dtype, copy=True).requires_grad_(wants)

    return copied(list(args), True)


def gradients(function, args):
    out = torch.cat([x.flatten() for x in function(args) if x is not None])
    (out * torch.arange(len(out), device=out.device).remainder(7)).sum().backward()
    tensors = [x for a in args for x in (a if isinstance(a, list) else [a])]
    return [x.grad for x in tensors if isinstance(x, torch.Tensor)]


def check_gradients(op, plain, args, dtype):
    found = gradients(op, fresh(args, dtype))
    exact, same = (gradients(plain, fresh(args, wide)) for wide in (torch.float64, dtype))
    for i, (a, b, c) in enumerate(zip(found, exact, same, strict=True)):
        assert (a is None) == (b is None)  # the norm of queries that are not there
        if a is not None:
            assert_accurate(a, b, c, name=f"gradient {i}")


@pytest.mark.parametrize("name", [*OPS, *JOINT, "joint_qkv"])
def test_gradients(name, device):
    """In float32; the backward is one formula for every dtype."""
    if name == "joint_qkv":
        args = qkv_inputs(torch.float32, device, 32, text_queries=False)
        op, plain = (lambda a: ops.joint_qkv(*a, head_dim=32), lambda a: qkv_plain(a, 32))
    elif name in JOINT:
        kernel, formula, names = JOINT[name]
        args = joint_inputs(names, torch.float32, device, 9)
        op, plain = (lambda a: kernel(*a), lambda a: (formula(*a[::2]), formula(*a[1::2])))
    else:
        kernel, formula, names = OPS[name]
        args = inputs(names, torch.float32, device)
        op, plain = (lambda a: (kernel(*a),), lambda a: (formula(*a),))
    check_gradients(op, plain, args, torch.float32)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_two_gate_rows(dtype, device):
    args = inputs("xwbrg", dtype, device, gate_rows=2)
    check_gradients(lambda a: (ops.linear_gated_residual(*a, split=8),), lambda a: (gated(*a, 8),), args, dtype)


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(name, device):
    op, _plain, names = OPS[name]
    args = inputs(names, torch.float32, device)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(op, backend="aot_eager", fullgraph=True)(*args), op(*args))


def test_opcheck(device):
    args = [x.requires_grad_() for x in inputs("xwbrg", torch.float32, device, gate_rows=2)]
    torch.library.opcheck(torch.ops.pydit.linear.default, (*args, 8, False, "linear_gated_residual"))
    torch.library.opcheck(torch.ops.pydit.joint_linear.default,
                          (*args[:3], None, None, *args[:3], None, None, -1, True, "joint_linear_gelu"))
    image = [x for a in qkv_inputs(torch.float32, device, 32)[::2] for x in (a if isinstance(a, (list, tuple)) else [a])]
    torch.library.opcheck(torch.ops.pydit.joint_qkv.default, (*image, image[0], None, *image[2:], 32, 1e-6))


def test_opcheck_of_a_residual_with_tokens_first(device):
    """Whose strides the result does not take."""
    def turned(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    x, w, b, residual, gate = inputs("xwbrg", torch.float32, device, tokens=3)
    stream = x, w, b, turned(residual), gate
    torch.library.opcheck(torch.ops.pydit.linear.default, (*stream, -1, False, "linear_gated_residual"))
    torch.library.opcheck(torch.ops.pydit.joint_linear.default,
                          (*stream, *stream, -1, False, "joint_linear_gated_residual"))
    assert ops.linear_gated_residual(*stream).is_contiguous()


def test_the_library_is_named_when_it_runs(device, monkeypatch):
    monkeypatch.setenv("PYDIT_GEMM", "library")
    for name, (op, plain, names) in OPS.items():
        args = inputs(names, torch.float32, device)
        torch.testing.assert_close(op(*args), plain(*args))
        assert path_of(name) == ("torch", "the product is the library's: PYDIT_GEMM=library")
    args = joint_inputs("xwb", torch.float32, device, 9)
    torch.testing.assert_close(ops.joint_linear(*args)[1], F.linear(*args[1::2]))
    qkv = qkv_inputs(torch.float32, device, 32, text_queries=False)
    exact, same = qkv_plain(qkv, 32, lambda x: x.double().cpu()), qkv_plain(qkv, 32)
    for a, b, c in zip(ops.joint_qkv(*qkv, head_dim=32), exact, same, strict=True):
        assert a is b is None or assert_accurate(a, b, c) is None
    if device.type == "cuda":
        monkeypatch.setenv("PYDIT_GEMM", "auto")
        ops.linear_gelu(*inputs("xwb", torch.bfloat16, device))
        assert "has not been raced" in path_of("linear_gelu")[1]


X, W = torch.ones(2, 3, 4), torch.ones(5, 4)
W4 = torch.ones(4, 4)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: ops.linear_gelu(1, W), TypeError, "linear_gelu: x: expected a torch.Tensor, got int"),
    (lambda: ops.linear_gelu(X[0, 0, 0], W), ValueError, r"x: expected shape \[..., K\], got \[\]"),
    (lambda: ops.in_one_launch(1), TypeError, "in_one_launch: x: expected a torch.Tensor, got int"),
    (lambda: ops.linear_gelu(X, W.half()), TypeError, "weight: expected torch.float32"),
    (lambda: ops.linear_gelu(X, W.T), ValueError, r"weight: expected shape \[N, 4\], got \[4, 5\]"),
    (lambda: ops.linear_gelu(X, W, torch.ones(4)), ValueError, r"bias: expected shape \[5\], got \[4\]"),
    (lambda: ops.linear_residual(X, W), ValueError, r"weight: expected a square matrix, got \[5, 4\]"),
    (lambda: ops.linear_gated_residual(X[0], W, None, X, X), ValueError, r"x: expected shape \[B, S, K\]"),
    (lambda: ops.linear_gated_residual(X, W, None, X, torch.ones(2, 5)), ValueError,
     r"residual: expected shape \[2, 3, 5\], got \[2, 3, 4\]"),
    (lambda: ops.linear_gated_residual(X, W, None, torch.ones(2, 3, 5), torch.ones(2, 4)), ValueError, "gate: expected"),
    (lambda: ops.linear_gated_residual(X, W4, None, X, torch.ones(2, 4), split=-1), ValueError, "split: expected 0"),
    (lambda: ops.joint_linear(X, X[:1], W, W), ValueError, r"x_txt: expected shape \[B, S, K\], B the same"),
    (lambda: ops.joint_linear(X, X, W, W, None, torch.ones(4)), ValueError, r"bias_txt: expected shape \[5\]"),
    (lambda: ops.joint_qkv(X, X, (W, W), (W, W, W), head_dim=2), TypeError, "weights_img: expected 3 tensors"),
    (lambda: ops.joint_qkv(X, X, (W4, W4, W), (W4,) * 3, head_dim=2), ValueError, "weights_img v: expected a multiple"),
    (lambda: ops.joint_qkv(X, X, (W4,) * 3, (W4,) * 3, head_dim=3), ValueError, "head_dim: expected an even number"),
    (lambda: ops.joint_qkv(X, X, (W4,) * 3, (W4,) * 3, norms_txt=(torch.ones(3), None), head_dim=2), ValueError,
     r"norms_txt q: expected shape \[2\]"),
    (lambda: ops.joint_qkv(X, X, (None, W4, W4), (W4,) * 3, head_dim=2), TypeError, "weights_img q: expected a torch")])
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_reference_equals_the_formula():
    x, w, b, r, g = inputs("xwbrg", torch.float64, "cpu", gate_rows=2)
    found = reference.linear(x, w, b, r, g, gelu=True, split=8)
    plain = r + cases.rows(g, 21, 8) * F.gelu(F.linear(x, w, b), approximate="tanh")
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
