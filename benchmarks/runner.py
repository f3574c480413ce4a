"""Runs the benchmark registry: verifies first, then times every provider in turn, and writes JSON.

    python -m benchmarks.runner [--size full|small] [--filter TEXT] [--json FILE]      (or: pydit bench)

On a GPU a case is captured as a CUDA graph over enough copies of its inputs to exceed the L2 cache (rotated buffers:
every call finds its inputs in device memory), providers take turns, and the median over replays counts. % of limit is
the floor (bytes over the copy bandwidth measured in the same run) over the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.registry import Case, cases
from pydit import backend
from pydit.files import write_json
from pydit.testing import assert_accurate

ROTATED_BYTES = 512 << 20  # several times the 60 MB of L2 of an H200
ROUNDS = 15


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (1 when a case computed a wrong result)."""
    parser = argparse.ArgumentParser(prog="pydit bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=("full", "small"), default="full" if torch.cuda.is_available() else "small")
    parser.add_argument("--filter", default="", help="only cases whose name contains this text")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(device)
    print(json.dumps(machine))
    limits = measure_limits(device)
    print(f"copy {limits['copy_gb_s']:.0f} GB/s"
          + (f", bf16 GEMM {limits['gemm_tflop_s']:.0f} TFLOP/s" if device == "cuda" else ""))
    rows, wrong = [], 0
    print(f"{'case':62} {'provider':14} {'us':>9} {'IQR':>7} {'GB/s':>7} {'% limit':>8} {'ratio':>6}")
    for case in cases(args.size):
        if args.filter not in case.name:
            continue
        try:
            rows.append(run_case(case, device, limits))
        except AssertionError as error:
            wrong += 1
            rows.append({"case": case.name, "wrong": str(error)})
            print(f"{case.name:62} WRONG: {error}")
    if args.json:
        write_json(args.json, {"machine": machine, "limits": limits, "rows": rows, "report": backend.report()})
    return 1 if wrong else 0


def run_case(case: Case, device: str, limits: dict) -> dict:
    """Verify a case, time it and its peers, print its lines and return its row."""
    verify(case, device)
    sets = max(2, -(-ROTATED_BYTES // case.bytes)) if device == "cuda" else 2
    inputs = [case.make(device) for _ in range(min(sets, 64))]
    providers = {"pydit": case.run, **case.peers}
    timers = {name: _graph_timer(function, inputs) if device == "cuda" else _host_timer(function, inputs)
              for name, function in providers.items()}
    samples = {name: [] for name in providers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():  # interleaved, so that drift of the clock hits all alike
            samples[name].append(timer())
    floor_us = case.bytes / limits["copy_gb_s"] / 1e3
    row = {"case": case.name, "bytes": case.bytes, "flops": case.flops, "floor_us": floor_us, "providers": {}}
    ours = median(samples["pydit"])
    for name, values in samples.items():
        us, (low, _, high) = median(values), quantiles(values, n=4)
        row["providers"][name] = {"us": us, "iqr_us": high - low, "gb_s": case.bytes / us / 1e3,
                                  "percent_of_limit": 100 * floor_us / us, "ratio": us / ours}
        print(f"{case.name if name == 'pydit' else '':62} {name:14} {us:9.2f} {high - low:7.2f} "
              f"{case.bytes / us / 1e3:7.0f} "
              f"{100 * floor_us / us:7.1f}% {us / ours:6.2f}", flush=True)
    return row


def verify(case: Case, device: str) -> None:
    """Hold the op against float64 under the tolerance policy; AssertionError when it is wrong."""
    args = case.make(device)
    results, exact, eager = (f(*args) for f in (case.run, case.exact, case.eager))
    outputs = zip(*(r if isinstance(r, tuple) else (r,) for r in (results, exact, eager)), strict=True)
    for i, (a, b, c) in enumerate(outputs):
        assert_accurate(a, b, c, name=f"{case.name} output {i}")


def _graph_timer(function, inputs):
    """A timer of one replay over all input sets, in us per call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for args in inputs[:2]:
            function(*args)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(*args) for args in inputs]  # all outputs live: nothing is written twice
    graph.replay()

    def timer(_keep=(kept, inputs)):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / (3 * len(inputs))

    return timer


def _host_timer(function, inputs):
    for args in inputs:
        function(*args)

    def timer():
        start = time.perf_counter()
        for _ in range(10):
            for args in inputs:
                function(*args)
        return (time.perf_counter() - start) * 1e6 / (10 * len(inputs))

    return timer


def measure_limits(device: str) -> dict:
    """Copy bandwidth (bytes read + written) at 91, 182 and 364 MB (best counts) and the bf16 GEMM rate, both cold."""
    if device == "cpu":
        source = torch.randn(16 << 20)
        target = torch.empty_like(source)
        us = median(_host_timer(lambda a, b: b.copy_(a), [(source, target)])() for _ in range(5))
        return {"copy_gb_s": 2 * source.nbytes / us / 1e3}
    copies = {}
    for megabytes in (91, 182, 364, 2048):
        pairs = [(torch.randn(megabytes * 125_000, device=device), torch.empty(megabytes * 125_000, device=device))
                 for _ in range(max(2, 1000 // megabytes))]
        timer = _graph_timer(lambda a, b: b.copy_(a), pairs)
        copies[megabytes] = megabytes * 1e6 / median(timer() for _ in range(ROUNDS)) / 1e3
        del pairs, timer
        torch.cuda.empty_cache()
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    timer = _graph_timer(torch.mm, [(a, b)] * 3)
    gemm_us = median(timer() for _ in range(ROUNDS))
    return {"copy_gb_s": max(copies.values()), "copy_gb_s_by_mb": copies, "gemm_tflop_s": 2 * 8192**3 / gemm_us / 1e6}


def describe_machine(device: str) -> dict:
    """The machine line: what a figure is worth without it is nothing."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parent).stdout.strip()
    line = {"device": platform.processor() or platform.machine(), "python": platform.python_version(),
            "torch": torch.__version__, "pydit": backend.info()["version"], "commit": commit,
            "cuda_archs": backend.info()["cuda_archs"], "date": time.strftime("%Y-%m-%d")}
    if device == "cuda":
        line |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            line |= {"driver": pynvml.nvmlSystemGetDriverVersion(),
                     "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
                     "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)}
        except Exception as error:  # nvidia-ml-py is optional and may not find its library
            line["driver"] = f"unknown ({error})"
    return line


if __name__ == "__main__":
    sys.exit(main())
