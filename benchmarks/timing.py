"""How a time is taken: cold inputs, providers in turn, medians with their quartiles; and the two ceilings of a machine.

Inputs are rotated: a timer walks over enough copies of them to exceed the last-level cache, so that every call finds
its inputs in memory. Short kernels are replayed from a CUDA graph, which leaves out the host; long ones are queued on
a stream between two events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch.utils import _pytree as pytree

from pydit.inference.capture import clean_up_after_capture

ROTATED_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # several times the last-level cache (60 MB of L2 on an H200)
MOST_SETS = {"cuda": 64, "cpu": 256}
LONG_US = 300.0  # from here the host keeps ahead of the GPU, and a graph only costs memory
HEAD_START_CYCLES = 1_000_000  # about half a millisecond, many times what a launch costs the host
WARM_UP_ROUNDS = 2
GPU_COPIES_MB, CPU_COPIES_MB = (91, 182, 364, 2048), (64,)  # bytes read plus written
# m, n, k of x [m, k] times the transpose of a weight [n, k], as linear layers have it: the fastest is the ceiling
GPU_PRODUCTS, CPU_PRODUCTS = ((8192, 8192, 8192), (4096, 4096, 4096), (7424, 12288, 3072)), ((512, 512, 512),)


def input_sets(make: Callable, nbytes: int, device: str) -> list[tuple]:
    """Enough input tuples that one walk over them exceeds the last-level cache."""
    count = max(2, -(-ROTATED_BYTES[device] // max(nbytes, 1)))
    return [make(device) for _ in range(min(count, MOST_SETS[device]))]


def timer(function: Callable, inputs: list[tuple], device: str, *, long: bool = False) -> tuple[Callable, str]:
    """A function that takes one sample (us per call), and how it does so: "graph", "stream" or "host".

    A function that cannot be captured (it allocates or synchronises), or whose graph does not do its work, is timed on
    the stream instead.
    """
    for args in inputs:  # all of them: what a peer keeps for its inputs is made before the clock starts
        function(*args)
    if device == "cpu":
        return _host_timer(function, inputs), "host"
    torch.cuda.synchronize()
    if not long:
        try:
            return _graph_timer(function, inputs), "graph"
        except Exception:  # it has run before: whatever it raises, it raises in the capture
            torch.cuda.synchronize()
    return _stream_timer(function, inputs), "stream"


def is_long(function: Callable, inputs: list[tuple], device: str) -> bool:
    """Whether one call takes at least LONG_US on the GPU."""
    if device == "cpu":
        return False
    function(*inputs[0])
    return _stream_timer(function, inputs[:2])() >= LONG_US


def interleave(timers: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """One sample of each timer per round, forwards and backwards in turn, so that drifting clocks hit all alike."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(WARM_UP_ROUNDS + rounds):
        for name in list(timers)[:: 1 if i % 2 == 0 else -1]:
            us = timers[name]()
            if i >= WARM_UP_ROUNDS:
                samples[name].append(us)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and interquartile range."""
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return {"us": middle, "q1_us": low, "q3_us": high, "iqr_us": high - low}


def measure_limits(device: str, rounds: int) -> dict:
    """Copy bandwidth (bytes read plus written per second) and the GEMM rate, both cold and the best of several sizes: a
    ceiling that is too low would flatter."""
    copies = {}
    for megabytes in GPU_COPIES_MB if device == "cuda" else CPU_COPIES_MB:
        elements = megabytes * 1_000_000 // 8
        pairs = [(torch.randn(elements, device=device), torch.empty(elements, device=device))
                 for _ in range(max(2, 1000 // megabytes) if device == "cuda" else 1)]
        take, _ = timer(lambda source, target: target.copy_(source), pairs, device)
        copies[str(megabytes)] = megabytes * 1e6 / median(interleave({"copy": take}, rounds)["copy"]) / 1e3
        del pairs, take
    dtype, name = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "fp32")
    products = {}
    for m, n, k in GPU_PRODUCTS if device == "cuda" else CPU_PRODUCTS:
        matrices = [tuple(torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n)) for _ in range(2)]
        take, _ = timer(lambda x, weight: torch.mm(x, weight.t()), matrices, device, long=True)
        products[f"{name} {m}x{n}x{k}"] = 2 * m * n * k / median(interleave({"gemm": take}, rounds)["gemm"]) / 1e6
        del matrices, take
    best = max(products, key=products.get)
    return {"copy_gb_s": max(copies.values()), "copy_gb_s_by_mb": copies, "gemm_tflop_s": products[best],
            "gemm_tflop_s_by_shape": products, "gemm": best}


def _graph_timer(function, inputs):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for args in inputs[:2]:
            function(*args)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            kept = [function(*args) for args in inputs]  # all outputs live: none is written twice in a walk
    except BaseException:
        clean_up_after_capture(stream, pool)
        raise
    _require_work(graph, kept, inputs)

    def sample(_keep=(kept, inputs)):
        return _between_events(graph.replay, 3) / len(inputs)

    return sample


def _require_work(graph, kept, inputs):
    """RuntimeError where a replay does not write every output: what a function launched on another stream is not in its
    graph, whose time would be that of nothing. Outputs that are inputs are left as they are."""
    own = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)}
    outputs = [x for x in pytree.tree_leaves(kept) if isinstance(x, torch.Tensor) and x.is_floating_point()
               and x.untyped_storage().data_ptr() not in own]
    for x in outputs:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    if any(bool(x.isnan().any()) for x in outputs):
        raise RuntimeError("the replay of a graph left outputs unwritten")


def _stream_timer(function, inputs):
    def walk():
        for args in inputs:
            function(*args)

    return lambda: _between_events(walk, 2) / len(inputs)


def _between_events(call, repeats):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)  # else the GPU passes the start at once, and waits for the first launch
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def _host_timer(function, inputs):
    def sample():
        start = time.perf_counter()
        for args in inputs:
            function(*args)
        return (time.perf_counter() - start) * 1e6 / len(inputs)

    return sample
