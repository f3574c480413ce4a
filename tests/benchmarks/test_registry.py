"""The registry: names, byte and FLOP counts against counts made another way, and peers that exist."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import registry, runner
from benchmarks.cases import Work, attention_backward, collect, second_moments, whole_block
from benchmarks.peers import Peer
from pydit.errors import UserError

SMALL = registry.cases("small")


FURTHER = [whole_block.block(*whole_block.SHAPES["small"][0], kind) for kind in whole_block.MORE_KINDS]


@pytest.mark.parametrize("case", SMALL + FURTHER, ids=lambda case: case.name)
def test_bytes_are_those_of_the_tensors(case):
    """Counted from the real inputs and outputs; an expanded or repeated view counts once."""
    args = case.make("cpu")
    outputs = case.run(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if case.op == "second_moments":  # adds to its sums; one of them is symmetric
        x, xx, sum_x, _ = args
        triangle = xx[torch.triu(torch.ones_like(xx)) > 0]
        args, outputs = (x, triangle, sum_x), (triangle, sum_x)
    if case.op.startswith("collect"):  # adds to five sums per stream, of which the first is symmetric
        sums = [t[torch.triu(torch.ones_like(t)) > 0] if i % 5 == 0 else t for i, t in enumerate(args[-10:])]
        args, outputs = (*args[:-10], *sums), (*outputs, *sums)
    size = sum(t.numel() * t.element_size() for t in (*args, *outputs) if t is not None)
    if any(t is not None and t.dtype == torch.int32 for t in args):  # lengths: padding is not read
        assert 0.5 * size < case.work.bytes < size
    else:
        assert case.work.bytes == size


def test_flops_of_one_token():
    """Counted by hand for one token: LN + modulate of 4 channels, a residual of 4, one head of 4 for q and k."""
    by_op = {module: __import__(f"benchmarks.cases.{module}", fromlist=["x"]) for module in ("modulate", "qk_norm_rope")}
    modulate, rope = by_op["modulate"], by_op["qk_norm_rope"]
    sums, centred, squares, normalised, modulated = 4, 4, 4 + 4, 4, 4 + 4 + 4
    assert modulate.ada_layer_norm_work(1, 1, 4, 2).flops == sums + centred + squares + normalised + modulated
    assert modulate.gated_residual_work(1, 1, 4, 2).flops == 4 + 4
    fused = modulate.gated_residual_ada_layer_norm_work(1, 1, 4, 2).flops
    assert fused == sums + centred + squares + normalised + modulated + 4 + 4
    attention = __import__("benchmarks.cases.attention", fromlist=["x"]).joint_attention_work
    assert attention(1, 1, (1, 0), 1, 4).flops == (4 + 1) * 2 * (2 * 4)  # pairs x products x (multiply, add) x D
    pairs = 2
    rotation = pairs * (4 + 2)  # 4 products, 2 sums
    assert rope.qk_norm_rope_work(1, 1, 1, 4, 2).flops == 2 * (8 + 4 + 4 + rotation)


def test_full_cases_have_the_shapes_of_real_models():
    full = registry.cases("full")
    names = {case.name for case in full}
    assert len(names) == len(full) and {case.op for case in full} == {case.op for case in SMALL}
    assert "ada_layer_norm/qwen-image/1x7401x3072/bf16" in names
    by_name = {case.name: case for case in full}
    tokens = 7401 * 3072 * 2  # the 45.47 MB of shared design figures
    work = by_name["gated_residual_ada_layer_norm/qwen-image/1x7401x3072/bf16"].work
    assert 4 * tokens < work.bytes < 4.001 * tokens
    rope = by_name["qk_norm_rope/qwen-image/1x7401x24x128/bf16"].work
    assert rope.bytes == 4 * tokens + 2 * 128 * 2 + 7401 * 128 * 4


def test_every_op_is_raced_against_eager_and_the_compiler():
    for size in registry.SIZES:
        for case in registry.cases(size):
            assert {"eager", "torch.compile"} <= {peer.name for peer in case.peers}, case.name
            assert len({peer.name for peer in case.peers}) == len(case.peers)
            assert not any("," in peer.name for peer in case.peers), "--peers and --without separate names by commas"


@pytest.mark.parametrize("flops, expected", [(1, 100.0), (10**12, 500.0)])
def test_floor_is_the_slower_of_memory_and_arithmetic(flops, expected):
    case = SMALL[0].__class__(**{**vars(SMALL[0]), "work": Work(bytes=100_000_000, flops=flops)})
    assert math.isclose(case.floor_us({"copy_gb_s": 1000.0, "gemm_tflop_s": 2000.0}), expected)


@pytest.mark.parametrize("limits", [{}, {"copy_gb_s": 1.0}, {"gemm_tflop_s": 1.0}])
def test_no_floor_unless_both_rates_were_measured(limits):
    assert SMALL[0].floor_us(limits) is None


def test_unknown_filter_is_refused():
    assert {case.op for case in registry.find("qk_norm", "small")} == {"qk_norm_rope", "joint_qk_norm_rope"}
    assert {case.op for case in registry.find("ada_layer_norm qk_norm_rope/", "small")} == {
        "ada_layer_norm", "gated_residual_ada_layer_norm", "qk_norm_rope", "joint_qk_norm_rope"}
    with pytest.raises(UserError, match="filter: expected part of a case name .* got 'nothing'"):
        registry.find("nothing", "small")


def test_cases_of_one_module():
    by_module = [registry.find("", "small", name) for name in registry.families().values()]
    assert {case.name for found in by_module for case in found} == {case.name for case in SMALL}
    assert {case.op for case in registry.find("", "full", "second_moments")} == {"second_moments"}


def test_inputs_are_random_and_not_zero():
    for case in SMALL:
        first, second = case.make("cpu"), case.make("cpu")
        assert not torch.equal(first[0], second[0]) and first[0].std() > 0.5


@pytest.mark.parametrize("op", ["joint_attention", "joint_attention_backward"])
def test_peers_of_a_padded_batch_are_right(op):
    """Those that can run on a CPU: with masks, each sample alone, sums in a fixed order."""
    case = next(case for case in SMALL if case.op == op and case.shape.endswith("/40,9"))
    args, names = case.make("cpu"), []
    modes = torch.is_deterministic_algorithms_warn_only_enabled, torch.are_deterministic_algorithms_enabled
    before = [mode() for mode in modes]
    for peer in case.peers:
        if peer.available()[0] and peer.name not in ("eager", "torch.compile"):
            runner.verify(peer.build(), case, args)
            names.append(peer.name)
    assert names == ["sdpa math masked", "samples alone" if op == "joint_attention" else "deterministic"]
    assert [mode() for mode in modes] == before


def test_torch_has_the_product_that_collecting_is_raced_against_on_a_gpu():
    """Tensors without data stand for a GPU's, whose branch no CPU takes."""
    products = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name == "aten::mm":
                products.append((args[0].dtype, args[-1]))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Listening():
        x = torch.empty(4, 8, device="cuda", dtype=torch.bfloat16)
        sums = [torch.empty(shape, device="cuda", dtype=torch.float64) for shape in ((8, 8), (8, 8), (8,), (8,), (8,))]
        collect._add_eager(x, x, sums)
    assert products == [(torch.bfloat16, torch.float32)] * 2


@pytest.mark.parametrize("left_out", ["all", "before", 0, 1, 2, 3, 4])
def test_sums_that_are_not_made_are_found(monkeypatch, left_out):
    """What is timed is a block and its sums, or sums alone: each of the five, added to what was there."""
    add = second_moments.add_second_moments

    def wrong(x, y, sums):
        if left_out == "before":
            for t in sums:
                t.zero_()
        if left_out != "all":
            add(x, y, tuple(torch.zeros_like(t) if i == left_out else t for i, t in enumerate(sums)))

    for module in ("collect", "second_moments"):
        for case in registry.cases("small", module):
            args = case.make("cpu")
            right = runner.references(case, args)
            runner.verify(case.run, case, args, right)
            for peer in case.peers:
                if peer.name == "forward":  # makes none, and is right
                    runner.verify(peer.build(), case, args, right)
            if left_out in (1, 3, 4) and case.op != "collect_xx_xy":  # which alone has a y
                continue
            with monkeypatch.context() as patch:
                patch.setattr(f"benchmarks.cases.{module}.add_second_moments", wrong)
                broken, = registry.find(case.name, "small", module)
                with pytest.raises(AssertionError, match="worst error"):
                    runner.verify(broken.run, case, args, right)


@pytest.mark.parametrize("newer", [True, False])
def test_sums_that_second_moments_is_held_against_on_a_gpu(monkeypatch, newer):
    """Torch before 2.11 may refuse to add to float32 what it multiplies in 16 bits, and the case would have no figure. A
    tensor on a CPU says that it is on a GPU, and products with an ``out_dtype`` are made there as a GPU makes them."""
    asked = []

    class OnGpu(torch.Tensor):
        is_cuda = True

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.pop("out_dtype", None) is not None:
                asked.append(func.__name__)
                args = [x.as_subclass(torch.Tensor).float() for x in args]
                return kwargs["out"].copy_(func(*args)) if "out" in kwargs else func(*args)
            return super().__torch_function__(func, types, args, kwargs)

    monkeypatch.setattr(second_moments, "_ADDS_IN_FLOAT32", newer)
    x, narrow = torch.randn(40, 8).bfloat16(), torch.ones(8, 8)
    right = 1 + x.float().T @ x.float()
    torch.testing.assert_close(second_moments.eager(x.as_subclass(OnGpu), None, None, narrow), right)
    torch.testing.assert_close(narrow, right)
    assert asked == (["addmm"] if newer else ["mm"])


def test_peers_of_hsic_matrix_get_layers_that_lie_stacked(monkeypatch):
    """Beside those that stack them, which pydit does not: in one tensor, made once for the same layers."""
    from benchmarks.cases import hsic_matrix

    case = registry.cases("small", "hsic_matrix")[0]
    args, other, stacks, stack = case.make("cpu"), case.make("cpu"), [], torch.stack
    peer = next(peer for peer in case.peers if peer.name == "eager stacked").build()
    runner.verify(peer, case, args)
    monkeypatch.setattr(hsic_matrix.torch, "stack", lambda x: stacks.append(x) or stack(x))
    peer(*args)
    assert not stacks
    assert torch.equal(peer(*other), case.eager(*other)) and len(stacks) == 2


def test_graphs_of_a_compiler_may_run_backward_again():
    """Whatever peer is built first: each keeps the graph of its forward."""
    import torch._functorch.config as functorch

    found = []
    with functorch.patch(donated_buffer=True):
        attention_backward._differentiated(Peer("x", lambda: found.append(functorch.donated_buffer))).build()
    assert found == [False]
