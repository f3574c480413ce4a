"""Threads, processes and devices: the same results from two threads, after a fork, on a second device, without a GPU."""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pydit import backend, ops
from pydit.ops.second_moments import add_second_moments, zeros
from tests.ops.test_joint_attention import make

ROOT = Path(__file__).resolve().parents[2]


def both(work):
    """Results of work(0) and work(1), run at once; what a thread raises is raised here."""
    found, start = [None, None], threading.Barrier(2)

    def run(index):
        start.wait()
        try:
            found[index] = work(index)
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def results(tensors):
    """Of ops that ask for workspace, for shared memory beyond the default, and for neither, forward and backward."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    out_img, out_txt = ops.joint_attention(*tensors)
    grads = torch.autograd.grad((out_img.float().sum() + out_txt.float().sum()), tensors)
    x = tensors[0].detach().flatten(2)
    row = x[:, :1] * 0.1
    return [out_img, out_txt, *grads, ops.ada_layer_norm(x, row, row), *ops.second_moments(x[0])[1:]]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("device", ["reference", "sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)],
                         indirect=True)
def test_two_threads_get_what_one_gets(device):
    inputs = [make((1, 40, 12, 2, 32), torch.bfloat16, device, seed=seed) for seed in (0, 1)]
    alone = [results(tensors) for tensors in inputs]
    before = backend.report()["joint_attention"]["calls"]
    for _ in range(3):
        for found, expected in zip(both(lambda index: results(inputs[index])), alone, strict=True):
            assert_same(found, expected)
    assert backend.report()["joint_attention"]["calls"] == before + 6
    reason = backend.report()["joint_attention"]["reason"]
    assert len(set(reason.split("; "))) == len(reason.split("; "))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_two_streams_get_what_one_gets(device):
    """A stream for each of two threads: workspaces and counters are of one launch each."""
    inputs = [make((1, 1000, 300, 4, 64), torch.bfloat16, device, seed=seed) for seed in (0, 1)]
    alone = [results(tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in inputs]

    def work(index):
        with torch.cuda.stream(streams[index]):
            found = [results(inputs[index]) for _ in range(5)]
        streams[index].synchronize()
        return found

    for found, expected in zip(both(work), alone, strict=True):
        for once in found:
            assert_same(once, expected)


WITH_WORKSPACE = ["joint_attention backward", "second_moments", "hsic_matrix", "linear_gelu"]
CALLS = [*WITH_WORKSPACE, "joint_attention", "qk_norm_rope", "ada_layer_norm"]


def call_of(op, index, device):
    """A call of ``op`` after whose kernels no torch op reads what they wrote; ``index`` seeds its tensors."""
    tensors = make((1, 200, 60, 2, 64), torch.bfloat16, device, seed=index)
    rows = [x.flatten(2) for x in tensors[:3]]
    angle = torch.linspace(0, 1, 200, device=device)[:, None].expand(200, 32).contiguous()
    deep = torch.cat([rows[0][:, :72], rows[1][:, :72]], dim=2)  # 256 columns, whose sum is cut into parts
    row, held = rows[0][:, 0], []

    def backward():
        leaves = [x.clone().requires_grad_() for x in tensors]
        outs = ops.joint_attention(*leaves)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs])

    def moments():
        sums = zeros(128, 128, device)
        held.append(sums)
        add_second_moments(rows[0][0], rows[1][0], sums)
        return sums[1:]  # what the first holds below its diagonal is undefined

    return {"joint_attention": lambda: ops.joint_attention(*tensors), "joint_attention backward": backward,
            "second_moments": moments, "hsic_matrix": lambda: (ops.hsic_matrix([x[0] for x in rows]),),
            "linear_gelu": lambda: (ops.linear_gelu(deep, deep[0]),),
            "qk_norm_rope": lambda: ops.qk_norm_rope(*tensors[:2], None, None, (angle, angle)),
            "ada_layer_norm": lambda: (ops.ada_layer_norm(rows[0], row, row),)}[op]


@pytest.mark.parametrize("device", ["sim", "sim-90a", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("op", WITH_WORKSPACE)
def test_launches_at_once_share_no_workspace(op, device, monkeypatch):
    """Each of two threads, on a GPU each with a stream, has its workspace before either launches: theirs do not overlap.

    A workspace that an op kept for its next call, counters in it that a launch expects to be zero, a scratch of a device:
    any of them would be shared here.
    """
    monkeypatch.setenv("PYDIT_GEMM", "pydit")
    monkeypatch.setenv("PYDIT_PARTS", "2")
    calls = [call_of(op, index, device) for index in (0, 1)]
    alone = [call() for call in calls]
    streams = [torch.cuda.Stream(device) for _ in calls] if device.type == "cuda" else None
    new_empty, met, held = torch.Tensor.new_empty, threading.Barrier(2, timeout=60), []
    mine = set()  # on a GPU autograd has one thread of its own for both backwards, which would wait for itself

    def allocate(self, *size, **options):
        found = new_empty(self, *size, **options)
        if options.get("dtype") is torch.uint8:
            held.append((found.data_ptr(), *size))
            if threading.get_ident() in mine:
                met.wait()
        return found

    def work(index):
        mine.add(threading.get_ident())
        if streams is None:
            return calls[index]()
        with torch.cuda.stream(streams[index]):
            found = calls[index]()
        streams[index].synchronize()
        return found

    if device.type == "cuda":
        torch.cuda.synchronize()
    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    for found, expected in zip(both(work), alone, strict=True):
        assert_same(found, expected)
    if op == "linear_gelu" and backend.KERNEL_PATHS[0] not in backend.report()["linear_gelu"]["reason"]:
        assert held == []  # the portable kernel needs none
        return
    (a, size), (b, _) = held
    assert size > 0 and abs(a - b) >= size


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
@pytest.mark.parametrize("op", ["joint_attention", "linear_gelu", "second_moments"])
def test_first_launch_of_a_thread(op, device, monkeypatch):
    """A thread that has launched nothing has no current context, which the driver wants for a tensor map.

    Nothing but the op runs there, and the allocator has memory for its results already.
    """
    monkeypatch.setenv("PYDIT_GEMM", "pydit")
    tensors = make((1, 128, 64, 2, 64), torch.bfloat16, device)
    rows = tensors[0].flatten(2)
    weight = rows[0].clone()
    call = {"joint_attention": lambda: ops.joint_attention(*tensors),
            "linear_gelu": lambda: (ops.linear_gelu(rows, weight),),
            "second_moments": lambda: ops.second_moments(rows[0])[1:]}[op]
    expected = call()
    call(), call()  # and free again
    for found in both(lambda index: call()):
        torch.cuda.synchronize()
        assert_same(found, expected)


@pytest.fixture
def sim():
    module, error = backend.extension()
    if not hasattr(module, "sim"):
        pytest.skip(f"the simulator is not built ({error or 'PYDIT_SIM=off'})")
    return module.sim


def test_each_thread_has_its_own_error(sim):
    def work(index):
        for _ in range(200):
            x = torch.zeros(1, 2, 8 + index)
            with pytest.raises(RuntimeError, match=f"got {5 + index}$"):
                sim.ada_layer_norm(x, x[:, :1], x[:, :1], x, 1e-6, -1, 5 + index, 0)

    both(work)


@pytest.mark.parametrize("device", ["sim", "sim-90a"], indirect=True)
def test_a_second_device(device, sim):
    """The C API asks for the current device at every launch: its capability, and the shared memory it grants."""
    tensors = make((1, 40, 12, 2, 128), torch.bfloat16, device)
    first = ops.joint_attention(*tensors)
    taken = backend.report()["joint_attention"]["reason"]
    try:
        assert sim.set_device(1) == 0
        second = ops.joint_attention(*tensors)
        assert backend.KERNEL_PATHS[1] in backend.report()["joint_attention"]["reason"]
    finally:
        assert sim.set_device(0) == 0
    assert (backend.KERNEL_PATHS[0] in taken) == (os.environ["PYDIT_SIM_ARCH"] == "90a")
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=2 ** -7, atol=2 ** -9)
    assert sim.set_device(2) == 1
    both(lambda index: sim.set_device(index) or ops.joint_attention(*tensors))  # each thread has a device of its own
    assert torch.equal(ops.joint_attention(*tensors)[0], first[0])


def test_the_guard_goes_to_the_device_of_the_tensor(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or "guard")
    on = [SimpleNamespace(is_cuda=True, device=SimpleNamespace(type="cuda", index=index)) for index in (0, 1)]
    with backend.device_of(on[0]), backend.device_of(torch.zeros(1)):
        assert entered == []
    assert backend.device_of(on[1]) == "guard" and entered == [on[1].device]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    assert [backend.stream_of(x) for x in on] == [100, 101] and backend.stream_of(torch.zeros(1)) == 0


def keeping(held, function):
    def keep(*arguments, **options):
        held.append(function(*arguments, **options))
        return held[-1]

    return keep


@pytest.fixture
def on_streams(device, sim, monkeypatch):
    """``on_streams(calls, seed)``: results of each call, on a stream of its own, the host running ahead of all work.

    Only then is the work done, in the order of each stream, one stream before the other as ``seed`` draws. Where a
    kernel fails, the results are empty.
    """
    monkeypatch.setenv("PYDIT_GEMM", "pydit")
    monkeypatch.setenv("PYDIT_PARTS", "2")
    monkeypatch.setenv("PYDIT_SIM_THREADS", "1")  # the order of atomic sums is then the same too
    backend.configure_sim()
    given = SimpleNamespace(stream=0)

    def run(calls, seed):
        held = []  # a GPU's allocator gives memory of one stream to no other, nor before its work there is done
        with monkeypatch.context() as patch:
            patch.setattr(backend, "stream_of", lambda tensor: given.stream)
            for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch.Tensor, "contiguous")):
                patch.setattr(owner, name, keeping(held, getattr(owner, name)))
            sim.streams()  # what came before
            assert sim.run_ahead() == 0
            try:
                found = []
                for index, call in enumerate(calls):
                    given.stream = 7 + index
                    found.append(call())
                assert sim.streams() == [7 + index for index in range(len(calls))]
            finally:
                error = sim.synchronize(seed)
        return found if error == 0 else [[]] * len(calls)

    return run


@pytest.mark.parametrize("device", ["sim", "sim-90a"], indirect=True)
@pytest.mark.parametrize("op", CALLS)
def test_two_streams_in_any_order(op, device, on_streams):
    """What is cleared, counted and kept between the launches of an op is of one stream: the other's do not change it."""
    calls = [call_of(op, index, device) for index in (0, 1)]
    alone = [on_streams([call], 0)[0] for call in calls]
    assert all(alone)
    for seed in range(3):
        for found, expected in zip(on_streams(calls, seed), alone, strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("device", ["sim", "sim-90a"], indirect=True)
@pytest.mark.parametrize("op", ["joint_attention backward", "hsic_matrix"])
def test_two_streams_with_one_workspace_are_found_out(op, device, on_streams, monkeypatch):
    calls = [call_of(op, index, device) for index in (0, 1)]
    alone = [on_streams([call], 0)[0] for call in calls]
    assert all(alone)
    new_empty, shared = torch.Tensor.new_empty, {}

    def allocate(self, *size, **options):
        if options.get("dtype") is not torch.uint8:
            return new_empty(self, *size, **options)
        return shared.setdefault(size, new_empty(self, *size, **options))

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    same = [len(found) == len(expected) and all(map(torch.equal, found, expected))
            for seed in range(3) for found, expected in zip(on_streams(calls, seed), alone, strict=True)]
    assert not all(same)


@pytest.mark.parametrize("device", ["sim", "sim-90a"], indirect=True)
def test_two_threads_keep_to_their_streams(device, monkeypatch):
    """Of ops of two threads, each with a stream: kernels and the clearing of their counters stay each on theirs."""
    monkeypatch.setenv("PYDIT_GEMM", "pydit")
    monkeypatch.setenv("PYDIT_PARTS", "2")
    sim, given = backend.extension()[0].sim, threading.local()
    monkeypatch.setattr(backend, "stream_of", lambda tensor: given.stream)

    def work(index):
        given.stream, found = 7 + index, {}
        for op in CALLS:
            assert sim.streams() == []
            call_of(op, index, device)()
            found[op] = sim.streams()
        return found

    assert both(work) == [{op: [stream] for op in CALLS} for stream in (7, 8)]


def test_every_launch_is_guarded_and_takes_the_current_stream():
    """Calls of the compiled module in pydit.ops stand inside ``with backend.device_of`` and pass ``stream_of``."""
    module, error = backend.extension()
    if module is None:
        pytest.skip(f"pydit._C is not built: {error}")
    kernels = next(getattr(module, name) for name in ("sim", "cuda") if hasattr(module, name))
    launches, guarded = 0, 0
    for path in (ROOT / "pydit" / "ops").rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                 and ast.unparse(node.func.value).endswith("kernels") and hasattr(kernels, node.func.attr)]
        launches += len(calls)
        for block in ast.walk(tree):
            if isinstance(block, ast.With) and "backend.device_of" in ast.unparse(block.items[0].context_expr):
                inside = [call for call in calls if call in list(ast.walk(block))]
                guarded += sum("backend.stream_of" in ast.unparse(call) for call in inside)
    assert launches == guarded > 8


def python(*arguments, **environment):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_optimised_without_warnings_and_without_a_gpu():
    """``python -O -W error``, CUDA_VISIBLE_DEVICES="": imports, runs, and still refuses bad arguments."""
    code = """
import torch, pydit, pydit.stats
x = torch.ones(1, 2, 8)
pydit.ops.ada_layer_norm(x, x[:, 0], x[:, 0])
for call in (lambda: pydit.ops.ada_layer_norm(x[0], x, x), lambda: pydit.ops.merge_attention([], [])):
    try:
        call()
    except ValueError as error:
        print("expected" in str(error), __debug__)
print(torch.cuda.is_available(), pydit.report()["ada_layer_norm"]["path"])
"""
    out = python("-O", "-W", "error", "-c", code, CUDA_VISIBLE_DEVICES="", PYDIT_BACKEND="auto")
    assert out.split() == ["True", "False", "True", "False", "False", "reference"]


def test_fork_after_import_and_after_a_launch(sim):
    code = """
import os
import torch
torch.set_num_threads(1)
from pydit import ops
from tests.ops.test_joint_attention import make
tensors = make((1, 40, 12, 2, 32), torch.bfloat16, "cpu")
expected = ops.joint_attention(*tensors)
child = os.fork()
same = all(torch.equal(a, b) for a, b in zip(ops.joint_attention(*tensors), expected))
if child == 0:
    os._exit(0 if same else 3)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("same")
"""
    assert python("-c", code, PYDIT_BACKEND="sim", CUDA_VISIBLE_DEVICES="").strip() == "same"
