"""What a call on a GPU is said to have taken; a stand-in plays the module with CUDA kernels."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from pydit import backend

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_kernel_that_no_gpu_has_timed_says_so(monkeypatch):
    monkeypatch.setenv("PYDIT_BACKEND", "auto")
    monkeypatch.setattr(backend, "extension", lambda: (SimpleNamespace(cuda="kernels"), None))
    monkeypatch.setattr(backend, "_taken", {})
    path = backend.choose("op", SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
    assert (path.kernels, path.name) == ("kernels", "cuda")
    measured = any(map(_of_a_gpu, RESULTS.glob("*.json")))
    assert (backend.report()["op"]["reason"] == backend.NOT_MEASURED) == (not measured)


def _of_a_gpu(file):
    machine = json.loads(file.read_text()).get("machine")
    return isinstance(machine, dict) and machine.get("kind") == "cuda"
