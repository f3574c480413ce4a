"""What a call on a GPU is said to have taken; a stand-in plays the module with CUDA kernels."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pydit import backend, doctor

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_kernel_that_no_gpu_has_timed_says_so(monkeypatch):
    monkeypatch.setenv("PYDIT_BACKEND", "auto")
    gpu(monkeypatch, (9, 0), 13000)
    path = backend.choose("op", TENSOR)
    assert (path.kernels, path.name) == ("kernels", "cuda")
    measured = any(map(_of_a_gpu, RESULTS.glob("*.json")))
    assert (backend.report()["op"]["reason"] == backend.NOT_MEASURED) == (not measured)


@pytest.mark.parametrize(("capability", "driver", "reason"), [
    ((8, 0), 13000, ""), ((8, 9), 13010, ""), ((9, 0), 14000, ""), ((9, 0), 0, ""), ((12, 0), 13000, ""),
    ((7, 5), 13000, "the kernels are built for compute capability 8.0 and newer, this GPU has 7.5"),
    ((9, 0), 12090, "the kernels are built with CUDA 13.0, the driver knows CUDA 12.9: update it, or build with a toolkit "
                    "of CUDA 12")])
def test_kernels_that_this_gpu_or_its_driver_cannot_run(monkeypatch, capsys, capability, driver, reason):
    """They are not launched to fail: the formula runs, and report and doctor say why."""
    gpu(monkeypatch, capability, driver)
    path = backend.choose("op", TENSOR)
    assert (path.kernels, path.name) == ((None, "reference") if reason else ("kernels", "cuda"))
    assert (reason or backend.NOT_MEASURED) == backend.report()["op"]["reason"] == path.reason
    assert backend.default("cuda") == path.name
    check = doctor._cuda_kernels()
    assert check.found == "built for compute capability 80, 90 with CUDA 13.0.88"
    assert (check.status, check.note) == (
        ("problem", f"GPU 0: {reason}; until then every op runs plain torch there") if reason else ("ok", ""))


def test_ptx_that_the_driver_does_not_know(monkeypatch):
    """A GPU without machine code of its own needs a driver that compiles PTX of that version; an older one does not."""
    gpu(monkeypatch, (12, 0), 13000, version="13.1.20")
    assert backend.unusable(0).endswith("as PTX of CUDA 13.1, the driver knows CUDA 13.0: update it, or build with "
                                        "PYDIT_CUDA_ARCHS=120")
    gpu(monkeypatch, (9, 0), 13000, version="13.1.20")
    assert backend.unusable(0) == ""


@pytest.mark.parametrize(("version", "driver", "works"), [
    ("12.9.86", 12030, False), ("12.9.86", 12040, True), ("12.9.86", 0, True), ("12.6.85", 12020, True)])
def test_compressed_code_that_the_driver_cannot_unpack(monkeypatch, version, driver, works):
    gpu(monkeypatch, (9, 0), driver, version)
    assert backend.unusable(0) == ("" if works else "the kernels are built with CUDA 12.9, whose code needs a driver of "
                                   "CUDA 12.4, the driver knows CUDA 12.3: update it")


def test_a_process_that_has_not_used_its_gpu_is_left_so(monkeypatch):
    gpu(monkeypatch, (7, 5), 13000)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(backend, "unusable", None)  # must not be called
    assert backend.default("cuda") == "cuda"


TENSOR = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, get_device=lambda: 0)


def gpu(monkeypatch, capability, driver, version="13.0.88"):
    """A module with kernels for 8.0 and 9.0, and torch with one GPU."""
    module = SimpleNamespace(cuda="kernels", cuda_archs="80,90", cuda_version=version)
    monkeypatch.setenv("PYDIT_BACKEND", "auto")
    monkeypatch.setattr(backend, "extension", lambda: (module, None))
    monkeypatch.setattr(backend, "_taken", {})
    monkeypatch.setattr(backend, "unusable", functools.cache(backend.unusable.__wrapped__))
    for name, value in {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)


def _of_a_gpu(file):
    machine = json.loads(file.read_text()).get("machine")
    return isinstance(machine, dict) and machine.get("kind") == "cuda"
