"""Fixtures shared by all families: the backend under test, and memory that punishes unwritten outputs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from pydit import backend


def _missing(name):
    """Why a backend cannot run here, or None."""
    info = backend.info()
    if name == "sim" and not info["sim"]:
        return f"the simulator is not built ({info['extension_error'] or 'PYDIT_SIM=off'})"
    if name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "cuda" and not info["cuda_archs"]:
        return f"no CUDA kernels in pydit._C ({info['extension_error'] or 'built without nvcc'})"
    return None


@pytest.fixture(params=["reference", "sim", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Run a test on each backend: tensors made on the returned device go through that backend."""
    name = request.param
    reason = _missing(name)
    if reason:
        if name == "sim" and os.environ.get("CI"):
            pytest.fail(f"CI must test the simulator: {reason}")
        pytest.skip(reason)
    monkeypatch.setenv("PYDIT_BACKEND", "sim" if name == "sim" else "auto")
    return torch.device("cuda" if name == "cuda" else "cpu")


@pytest.fixture
def kernel_only(device):
    """Skip where the reference runs: for behaviour that only kernels have."""
    if device.type == "cpu" and os.environ["PYDIT_BACKEND"] != "sim":
        pytest.skip("the reference accepts this")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN, so an output element that no kernel writes is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    algorithms = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms)
    torch.utils.deterministic.fill_uninitialized_memory = before
