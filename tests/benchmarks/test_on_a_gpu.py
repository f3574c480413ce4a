"""The paths of the runner that only a GPU takes, on a stand-in for one: its tensors are on the CPU, and its clocks, graphs
and sensors answer. Says that nothing there is misspelt or forgotten, and nothing about a GPU."""

import contextlib
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import compare, layers, machine, runner, timing

PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 << 30, uuid="abc")


class OnCpu(TorchFunctionMode):
    """What is asked to be made on a GPU is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {key: "cpu" if key == "device" and str(value).startswith("cuda") else value
                  for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Graph:
    """Recorded once; a replay does nothing."""

    replays = 0

    def replay(self):
        Graph.replays += 1


class Sensors(SimpleNamespace):
    """nvidia-ml-py, of which one sensor is missing."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlInit(self): pass
    def nvmlSystemGetDriverVersion(self): return b"580.1"
    def nvmlDeviceGetPowerManagementLimit(self, handle): return 700_000
    def nvmlDeviceGetHandleByUUID(self, uuid): return uuid
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle): return 0x4
    def nvmlDeviceGetClockInfo(self, handle, clock): return 1980 if clock == 1 else 2619
    def nvmlDeviceGetPowerUsage(self, handle): return 500_000

    def nvmlDeviceGetTemperature(self, handle, kind):
        raise self.NVMLError("not supported")


@pytest.fixture
def gpu(monkeypatch):
    """Stand-ins for torch.cuda and nvidia-ml-py; two input sets of each case."""
    @contextlib.contextmanager
    def graph(target, pool):
        assert pool == (0, 1)
        yield

    Graph.replays = 0
    class Stream:
        def wait_stream(self, other):
            pass

    stream = Stream()
    for name, value in {
            "is_available": lambda: True, "current_device": lambda: 0, "get_device_capability": lambda *_: (9, 0),
            "get_device_properties": lambda _: PROPERTIES, "synchronize": lambda: None, "empty_cache": lambda: None,
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: (0, 1),
            "Stream": Stream, "current_stream": lambda *_: stream, "set_stream": lambda _: None,
            "stream": lambda _: contextlib.nullcontext(), "_sleep": lambda cycles: None, "memory_allocated": lambda: 5,
            "max_memory_allocated": lambda: 7 << 20, "reset_peak_memory_stats": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(timing, "_require_work", lambda graph, kept, inputs: graph.replay())
    monkeypatch.setitem(sys.modules, "pynvml", Sensors())
    monkeypatch.setitem(timing.ROTATED_BYTES, "cuda", 1)
    monkeypatch.setattr(timing, "GPU_COPIES_MB", (1,))
    monkeypatch.setattr(timing, "GPU_PRODUCTS", ((64, 64, 64), (32, 32, 32)))
    with OnCpu():
        yield


@pytest.fixture
def flash(monkeypatch):
    """FlashAttention-3 and 4 by torch, in the modules that a machine with them has; the second returns the log-sum-exp
    too. Nothing is compiled."""
    def attention(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2)

    for name, found in (("flash_attn_interface", attention), ("flash_attn", None), ("flash_attn.cute", None),
                        ("flash_attn.cute.interface", lambda q, k, v: (attention(q, k, v), None))):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        if found is not None:
            module.flash_attn_func = found
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("module", ["attention_backward", "whole_block"])
def test_flash_attention_where_it_can_be_imported(module, gpu, flash, tmp_path):
    """Alone on joined streams in the backward, and within a compiled block, at right results."""
    path = tmp_path / "part.json"
    names = [f"{of}flash-attention {n}{alone}" for n in (3, 4) for of, alone in (("", ""), ("", " joined"),
                                                                                 ("torch.compile ", ""))]
    assert runner.main(["--size", "small", "--module", module, "--rounds", "3", "--json", str(path), "--filter",
                        "1x100+40 block_dense block_text_keys block_affine", "--peers",
                        ",".join([*names, "sdpa flash joined"])]) == 0
    rows = {row["op"]: row for row in compare.load(path)["rows"]}
    if module == "attention_backward":
        row, = rows.values()
        assert {"flash-attention 3", "flash-attention 4", "flash-attention 3 joined", "flash-attention 4 joined",
                "sdpa flash joined"} <= set(row["providers"]), row
    else:
        for op in ("block_dense", "block_text_keys"):
            assert {"torch.compile flash-attention 3", "torch.compile flash-attention 4"} <= set(rows[op]["providers"]), rows
        assert not any("flash" in name for name in rows["block_affine"]["providers"])


@pytest.mark.parametrize("module", ["modulate", "attention", "linear", "second_moments"])
def test_the_runner(module, gpu, tmp_path, capsys):
    path = tmp_path / "part.json"
    arguments = ["--size", "small", "--module", module, "--rounds", "3", "--json", str(path), "--resume", "--seconds", "900",
                 "--case-seconds", "600", "--without", "compile,flex,math,pairwise"]
    assert runner.main(arguments) == 0
    data, out = compare.load(path), capsys.readouterr().out
    assert not data["not_run"] and "running" not in data and data["limits"]["gemm_tflop_s"] > 0
    methods = {entry["method"] for row in data["rows"] for entry in row["providers"].values()}
    assert methods <= {"graph", "stream"} and Graph.replays > 0  # of the copies at least
    assert all(row["providers"]["pydit"]["percent_of_limit"] > 0 for row in data["rows"])
    assert all(row["op"] in row["paths"] or row["op"] == "normed_attention" for row in data["rows"])
    assert "by torch: " in out  # its tensors are on the CPU
    line = machine.sentence(data["machine"])
    assert "NVIDIA H100 80GB HBM3 | driver 580.1 | cuda 13.0" in line and "1980 MHz SM" in line and "500 W" in line
    assert "throttled: software power cap 100%" in line and "limit 700 W" in line and line in out
    if module == "attention":
        assert any("sdpa flash joined" in row["providers"] for row in data["rows"])
        assert all("RuntimeError" in row["failed"]["sdpa cudnn"] for row in data["rows"] if "sdpa cudnn" in row["failed"])
        assert data["rows"][0]["not_raced"]["flash-attention 3"].endswith("is not installed")
    if module == "linear":
        assert all(row["providers"]["two launches"]["rival"] is False for row in data["rows"] if row["op"] != "joint_qkv")


def test_layers(gpu, tmp_path, monkeypatch, capsys):
    """Energy, memory and the grouped products; the profiler sees no kernels here."""
    monkeypatch.setattr(layers, "ENERGY_SECONDS", 0.1)
    monkeypatch.setattr(layers.parts, "measured", lambda run, inputs, device: run(*inputs[0]) and {
        "products": 1.0, "attention": 2.0, "rest": 3.0})
    assert layers.main(["--config", "tiny", "--plan", "ppcl-qwen-image-14b", "--size", "32", "--text", "6", "--rounds", "3",
                        "--without", "compile", "--json", str(tmp_path / "layers.json")]) == 0
    out = capsys.readouterr().out
    assert "grouped" in out and "details_failed" not in (tmp_path / "layers.json").read_text()
    row = next(line for line in out.splitlines() if line.startswith("dense "))
    assert row.split()[8] == "7" and float(row.split()[7]) > 0  # MiB, mJ
