"""Recorded forwards: what a recording is keyed on, when it is dropped, and that a replay computes the same.

A recorder that replays by running again stands in for CUDA's; the last test records for real where there is a GPU.
"""

import contextlib
import copy
import itertools
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pydit
from pydit import backend
from pydit.errors import UserError
from pydit.inference import graphs
from tests.models import tiny
from tests.package.test_processes import both


class Fake:
    """Replays by running the function again into the memory of its first outputs."""

    def __init__(self):
        self.captures = self.replays = 0

    def refuses(self, tensors):
        return ""

    def in_turn(self):
        return contextlib.nullcontext()

    def warm_up(self, run):
        return run()

    def capture(self, run):
        self.captures += 1
        outputs = run()

        def replay():
            self.replays += 1
            for to, x in zip(torch.utils._pytree.tree_leaves(outputs), torch.utils._pytree.tree_leaves(run()), strict=True):
                to.copy_(x)

        return outputs, replay


def run(model, batch, **options):
    with torch.no_grad():
        return model(**batch, return_dict=False, **options)[0]


def recorded(make=lambda: tiny.transformer(2), **options):
    fake, model = Fake(), make().requires_grad_(False)
    pydit.accelerate(model)
    return graphs.enable(model, recorder=fake, **options), fake


FAMILIES = {"qwen-image": (lambda: tiny.transformer(2), tiny.batch),
            "qwen-image edit": (lambda: tiny.transformer(2, zero_cond_t=True),
                                lambda seed=0: {**tiny.batch(seed=seed), "img_shapes": [[(1, 2, 4), (1, 2, 4)]] * 3}),
            "flux": (tiny.flux, tiny.flux_batch), "sd3.5": (tiny.sd3, tiny.sd3_batch)}


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_equal_and_outputs_are_their_own(family):
    make, batch = FAMILIES[family]
    model, fake = recorded(make)
    plain = pydit.accelerate(make())
    outputs = []
    for seed in range(3):
        inputs = batch(seed=seed)
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        outputs.append((run(model, inputs), run(plain, inputs)))
        assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert fake.captures == 1 and fake.replays == 3
    for found, right in outputs:  # the first still holds its own values
        assert torch.equal(found, right)
    assert not torch.equal(outputs[0][0], outputs[1][0])
    rows = {row["path"]: row["count"] for row in pydit.report(model)["model"]["graphs"]}
    assert rows == {"recorded": 1, "graph": 3}


def test_shapes_arguments_and_eviction():
    model, fake = recorded(max_entries=2)
    a, b, c = (tiny.batch(images=n) for n in (1, 2, 3))
    for batch, captures in ((a, 1), (b, 2), (a, 2), (c, 3), (a, 3), (b, 4), (a, 4), (c, 5)):  # b goes, then c, then b
        run(model, batch)
        assert fake.captures == captures
    other = {**a, "img_shapes": [[(1, 2, 8)]]}  # same tensors, another meaning
    right = run(pydit.accelerate(tiny.transformer(2)), other)
    assert torch.equal(run(model, other), right) and fake.captures == 6
    assert model(**a).sample.shape == (1, 16, 16)
    with pytest.raises(UserError, match="max_entries: expected a number of 1 or more, got 0"):
        graphs.enable(model, max_entries=0)


def test_the_dtype_of_autocast_is_part_of_the_key():
    model, fake = recorded()
    plain, batch = pydit.accelerate(tiny.transformer(2).requires_grad_(False)), tiny.batch()
    for dtype, captures in ((torch.bfloat16, 1), (torch.float16, 2), (None, 3), (torch.bfloat16, 3)):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found, right = run(model, batch), run(plain, batch)
        assert found.dtype == right.dtype and torch.equal(found, right) and fake.captures == captures


def test_inference_mode_has_recordings_of_its_own():
    """Nothing outside it may write to the memory of those that it made."""
    model, fake = recorded()
    plain, captures = pydit.accelerate(tiny.transformer(2)), 0
    for seed, inference in enumerate((False, True, False, True)):
        right = run(plain, tiny.batch(seed=seed))
        with torch.inference_mode(inference):
            found = run(model, tiny.batch(seed=seed))
        captures += seed < 2
        assert torch.equal(found, right) and fake.captures == captures


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_and_adapters_that_change_are_recorded_anew():
    model, fake = recorded()
    batch = tiny.batch()
    outputs, captures = [run(model, batch)], [fake.captures]

    def step(change):
        change()
        outputs.append(run(model, batch))
        captures.append(fake.captures)

    linear = model.transformer_blocks[0].img_mlp.net[2]
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 64) * 0.3,
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(64, 2) * 0.3}
    step(lambda: None)
    step(lambda: linear.weight.mul_(2))  # in place: the version counts
    step(lambda: setattr(linear.weight, "data", linear.weight.data * 2))  # moved: the address
    step(lambda: model.load_lora_adapter(lora, adapter_name="a"))
    step(lambda: model.set_adapters(["a"], weights=[0.5]))  # a Python number inside the recording
    step(model.disable_lora)
    step(model.unload_lora)
    step(lambda: model.set_attention_backend("native"))
    assert captures == [1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(outputs[0], outputs[1])
    for before, after in itertools.pairwise(outputs[1:6]):
        assert not torch.allclose(before, after)
    torch.testing.assert_close(outputs[6], outputs[3])
    assert torch.equal(run(model, batch, attention_kwargs={"scale": 0.5}), outputs[-1])


def test_what_is_not_recorded_runs_as_it_is_and_says_why():
    model, fake = recorded()
    batch = tiny.batch()
    expected = run(model, batch)
    handle = model.transformer_blocks[1].register_forward_hook(lambda *_: None)
    assert torch.equal(run(model, batch), expected)
    handle.remove()
    model.requires_grad_(True)
    model(**batch).sample.sum().backward()
    model.requires_grad_(False)
    needs = {**batch, "hidden_states": batch["hidden_states"].clone().requires_grad_()}
    model(**needs).sample.sum().backward()
    assert needs["hidden_states"].grad.any() and fake.captures == 1
    run(model, batch, attention_kwargs={"unknown": object()})
    fake.capture = lambda run: (_ for _ in ()).throw(RuntimeError("operation not permitted when stream is capturing"))
    other = tiny.batch(images=2)
    assert torch.equal(run(model, other), run(pydit.accelerate(tiny.transformer(2)), other))
    reasons = [row["reason"] for row in pydit.report(model)["model"]["graphs"] if row["path"] == "stock"]
    for words in ("something listens to a QwenImageTransformerBlock", "gradients are enabled", "an input needs a gradient",
                  "an argument is a object",
                  "could not be recorded: RuntimeError: operation not permitted"):
        assert any(words in reason for reason in reasons), (words, reasons)


def test_offloading_is_refused_before_and_respected_after():
    model = tiny.transformer(2)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(UserError, match="cuda_graphs: expected a model whose weights stay where they are, got one with "
                                        "diffusers' .*Hook"):
        pydit.accelerate(model, cuda_graphs=True)
    assert "forward" not in model.__dict__ or "_pydit_graphs" not in model.__dict__
    model, fake = recorded()
    expected = run(model, tiny.batch())
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(run(model, tiny.batch()), expected) and fake.replays == 1
    pydit.restore(model)  # under the hook, which stays
    torch.testing.assert_close(run(model, tiny.batch()), expected, rtol=1e-4, atol=1e-4)
    assert "_pydit_graphs" not in model.__dict__


def test_off_again_copies_and_the_cpu():
    model, fake = recorded()
    expected = run(model, tiny.batch())
    other = copy.deepcopy(model)
    assert torch.equal(run(other, tiny.batch()), expected) and fake.captures == 1
    assert pydit.restore(model) is model and "forward" not in model.__dict__
    pydit.accelerate(model, cuda_graphs=True)
    assert torch.equal(run(model, tiny.batch()), expected)
    assert {row["reason"] for row in pydit.report(model)["model"]["graphs"]} == {"the inputs are not all on one GPU"}
    assert "graphs" in pydit.report(model)["model"] and "timestep" in __import__("inspect").signature(model.forward).parameters


def test_a_table_of_the_schedule_is_recorded_and_still_checked():
    model, fake = recorded()
    batch = {**tiny.batch(images=1), "timestep": torch.tensor([0.5])}
    pydit.bake_schedule(model, [0.5, 0.25])
    run(model, batch)
    expected = run(pydit.bake_schedule(pydit.accelerate(tiny.transformer(2)), [0.25]),
                   {**batch, "timestep": torch.tensor([0.25])})
    assert torch.equal(run(model, {**batch, "timestep": torch.tensor([0.25])}), expected) and fake.captures == 1
    with pytest.raises(UserError, match="baked schedule"):
        run(model, {**batch, "timestep": torch.tensor([0.3])})


def test_memory_that_only_a_cache_of_the_model_keeps_stays_alive():
    model, _fake = recorded(lambda: tiny.transformer(1))
    batch = tiny.batch(images=1)
    run(model, batch)
    kept = next(iter(model.__dict__["_pydit_graphs"].entries.values())).kept
    assert any(isinstance(x, torch.Tensor) and x.is_complex() for x in kept)  # rotary tables, of an lru_cache


def test_a_capture_that_fails_leaves_no_trace(monkeypatch):
    """A stand-in for ``torch.cuda.graph``: it changes the stream, has the allocator record to the pool and the generator
    count for the capture, and its exit raises before it ends any of it. A pool that is recorded to already, or that
    nothing is left in, takes no other capture.
    """
    now, pools, ended = ["default"], [], []
    generator = SimpleNamespace(clone_state=lambda: "free", graphsafe_set_state=lambda state: now.append(state))

    class Graph:
        def __init__(self, graph, pool, stream):
            now[0] = stream
            pools.append(pool)

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {"graph": Graph, "CUDAGraph": lambda: None, "graph_pool_handle": lambda: (0, len(pools) + 1),
                        "current_device": lambda: 0, "Stream": lambda: "capture", "current_stream": lambda: now[0], "set_stream": lambda to: now.__setitem__(0, to)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: ended.append((name, *args)), raising=False)
    recorder = graphs.CudaRecorder()
    for number in (1, 2):
        with pytest.raises(RuntimeError, match="during capture"):
            recorder.capture(lambda: None)
        assert now == ["default"] + ["free"] * number and pools[-1] == (0, number)
        assert ended[-2:] == [("_cuda_endAllocateToPool", 0, (0, number)), ("_cuda_releasePool", 0, (0, number))]


def test_a_gpu_captures_on_a_stream_of_its_own(monkeypatch):
    """torch.cuda.graph's own stream is of the first GPU that captured; pytorch/pytorch#87894 is what becomes of that."""
    on, device = [], [0]

    @contextlib.contextmanager
    def graph(graph, pool, stream):
        on.append(stream)
        yield

    for name, value in {"graph": graph, "CUDAGraph": lambda: SimpleNamespace(replay=None), "graph_pool_handle": lambda: 1,
                        "current_device": lambda: device[0], "Stream": lambda: ("stream of", device[0]),
                        "current_stream": lambda: None, "set_stream": lambda to: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = graphs.CudaRecorder()
    for device[0] in (0, 1, 0):
        recorder.capture(lambda: None)
    assert on == [("stream of", 0), ("stream of", 1), ("stream of", 0)]


def test_the_gpu_of_the_inputs_is_current(monkeypatch):
    """While a forward warms up, is recorded and replayed, and while its turn begins and ends."""
    current, seen = ["another"], []

    @contextlib.contextmanager
    def device_of(tensor):
        current[0] = tensor.device
        yield
        current[0] = "another"

    class Watched(Fake):
        @contextlib.contextmanager
        def in_turn(self):
            seen.append(current[0])
            yield
            seen.append(current[0])

        def warm_up(self, run):
            seen.append(current[0])
            return run()

        def capture(self, run):
            outputs, replay = super().capture(run)
            return outputs, lambda: (seen.append(current[0]), replay())

    model = graphs.enable(nn.Linear(4, 4).requires_grad_(False), recorder=Watched())
    monkeypatch.setattr(backend, "device_of", device_of)
    model(torch.ones(2, 4))
    assert seen == [torch.device("cpu")] * 5 and current == ["another"]


def test_each_dtype_of_autocast_is_recorded():
    fake, model = Fake(), nn.Linear(4, 4).requires_grad_(False)
    graphs.enable(model, recorder=fake)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype):
            assert model(torch.ones(2, 4)).dtype == dtype
    assert fake.captures == 2


def test_two_threads_take_turns():
    """They share the memory that a replay reads and writes: each gets the output of its own inputs."""
    class Slow(Fake):
        def capture(self, run):
            outputs, replay = super().capture(run)
            return outputs, lambda: (time.sleep(0.02), replay(), time.sleep(0.02))

    model = graphs.enable(pydit.accelerate(tiny.transformer(2).requires_grad_(False)), recorder=Slow())
    batches = [tiny.batch(seed=seed) for seed in range(2)]
    expected = [run(pydit.accelerate(tiny.transformer(2)), batch) for batch in batches]
    found = both(lambda index: [run(model, batches[index]) for _ in range(3)])
    assert all(torch.equal(x, right) for outputs, right in zip(found, expected, strict=True) for x in outputs)


def test_streams_take_turns(monkeypatch):
    """What is queued on a stream waits for what the turn before queued on another; the first waits for nothing."""
    queued = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            queued.append((self.name, "waits for", event))

        def record_event(self):
            queued.append((self.name, "ends", None))
            return self.name

    recorder = graphs.CudaRecorder()
    for name in ("a", "b", "a"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda name=name: Stream(name))
        with recorder.in_turn():
            queued.append((name, "replays", None))
    assert queued == [("a", "replays", None), ("a", "ends", None), ("b", "waits for", "a"), ("b", "replays", None),
                      ("b", "ends", None), ("a", "waits for", "b"), ("a", "replays", None), ("a", "ends", None)]


@pytest.mark.cuda
def test_two_streams_on_a_gpu():
    """Not run yet: no GPU was at hand."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.use_deterministic_algorithms(False)
    model = tiny.transformer(2).to("cuda", torch.bfloat16).requires_grad_(False)
    plain = pydit.accelerate(copy.deepcopy(model))
    pydit.accelerate(model, cuda_graphs=True)
    batches = [{name: value.cuda() if isinstance(value, torch.Tensor) else value
                for name, value in tiny.cast(tiny.batch(seed=seed), torch.bfloat16).items()} for seed in range(2)]
    expected = [run(plain, batch) for batch in batches]
    run(model, batches[0])  # while nothing else runs: a capture forbids it
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]

    def work(index):
        with torch.cuda.stream(streams[index]):
            found = [run(model, batches[index]) for _ in range(20)]
        streams[index].synchronize()
        return found

    for found, right in zip(both(work), expected, strict=True):
        assert all(torch.equal(x, right) for x in found)


@pytest.mark.cuda
def test_a_capture_that_fails_on_a_gpu_leaves_no_trace():
    """Not run yet: no GPU was at hand."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recorder, stream, x = graphs.CudaRecorder(), torch.cuda.current_stream(), torch.ones(4, device="cuda")
    recorder.warm_up(lambda: x * 2)
    with pytest.raises(RuntimeError):
        recorder.capture(lambda: x.sum().item())  # waits, which a capture must not
    assert torch.cuda.current_stream() == stream
    torch.rand(4, device="cuda")
    found, replay = recorder.capture(lambda: x * 2)
    x.fill_(3)
    replay()
    assert torch.equal(found, x * 2)


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    """Not run yet: no GPU was at hand."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.use_deterministic_algorithms(False)  # torch's scatter in that mode copies from the host, which no capture may
    make, batch = FAMILIES[family]
    model = make().to("cuda", torch.bfloat16).requires_grad_(False)
    plain = pydit.accelerate(copy.deepcopy(model))
    pydit.accelerate(model, cuda_graphs=True)
    for seed in range(3):
        inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value
                  for name, value in tiny.cast(batch(seed=seed), torch.bfloat16).items()}
        assert torch.equal(run(model, inputs), run(plain, inputs))
    assert {row["path"]: row["count"] for row in pydit.report(model)["model"]["graphs"]} == {"recorded": 1, "graph": 3}
