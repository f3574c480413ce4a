"""Fixtures shared by all families: the backend under test, and memory that punishes unwritten outputs.

Each simulated case runs under a seed and a copy mode drawn from its name, so that one run of the suite covers many of
both and every run is the same. PYDIT_SIM_SEED and PYDIT_SIM_ASYNC in the environment take precedence; a failing case
prints the line that runs it again.
"""

import copy
import gc
import os
import sys
import zlib
from collections import OrderedDict

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores already; commands that a test starts inherit this
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

gc.set_threshold(20_000, 20, 20)  # the default looks through all modules again and again while they are imported
import torch
from hypothesis import HealthCheck, settings

from pydit import backend, env

# Without --hypothesis-profile=nightly every run draws the same examples: a change fails by its own doing.
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.register_profile("slow", settings.get_profile("ci"), max_examples=15)  # under sanitizers and the race detector
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=2000, derandomize=False)
settings.load_profile("ci")

SIM_SETTINGS = pytest.StashKey[dict]()


def _copied(found, memo):
    made = memo[id(found)] = OrderedDict()
    for attribute, value in vars(found).items():
        setattr(made, attribute, copy.deepcopy(value, memo))
    for key, value in found.items():
        made[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
    return made


# Every torch module holds eleven, most of them empty: copies of models, the most frequent thing here, take a quarter.
copy._deepcopy_dispatch[OrderedDict] = _copied


def _missing(name):
    """Why a backend cannot run here, or None."""
    info = backend.info()
    if name.startswith("sim") and not info["sim"]:
        return f"the simulator is not built ({info['extension_error'] or 'PYDIT_SIM=off'})"
    if name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if name == "cuda" and not info["cuda_archs"]:
        return f"no CUDA kernels in pydit._C ({info['extension_error'] or 'built without nvcc'})"
    return None


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler():
    """A file of tests has torch.compile's limit of recompilations to itself, whichever files ran in its process before."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(params=["reference", "sim", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Run a test on each backend: tensors made on the returned device go through that backend.

    A test of Hopper kernels names the backends itself, with indirect parameters: "sim-90a" is the simulator as sm_90a.
    """
    name = request.param
    reason = _missing(name)
    if reason:
        if name.startswith("sim") and os.environ.get("CI"):
            pytest.fail(f"CI must test the simulator: {reason}")
        pytest.skip(reason)
    if not name.startswith("sim"):
        monkeypatch.setenv("PYDIT_BACKEND", "auto")
        yield torch.device("cuda" if name == "cuda" else "cpu")
        if name == "cuda":
            torch.cuda.synchronize()  # what a kernel did wrong shows in its own test
        return
    settings = _sim_settings(request.node.nodeid, name)
    request.node.stash[SIM_SETTINGS] = settings
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    backend.configure_sim()
    yield torch.device("cpu")
    monkeypatch.undo()
    backend.configure_sim()


def _sim_settings(nodeid, name):
    """The environment of one simulated case."""
    drawn = zlib.crc32(nodeid.encode())
    drawn = {"PYDIT_SIM_SEED": str(drawn >> 1), "PYDIT_SIM_ASYNC": ("lazy", "eager")[drawn & 1],
             "PYDIT_SIM_ARCH": name.partition("-")[2] or env.get("PYDIT_SIM_ARCH")}
    given = {variable: os.environ[variable] for variable in drawn if os.environ.get(variable)}
    return {"PYDIT_BACKEND": "sim", **drawn, **given}


def pytest_collection_finish():
    """What is imported by now lives to the end: the garbage collector need not look through it after every test."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files with slow tests first: begun last, they leave one process at work and the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Add to the report of a failing simulated case the line that reproduces it."""
    report = yield
    if report.failed and (settings := item.stash.get(SIM_SETTINGS, None)):
        line = " ".join(f"{variable}={value}" for variable, value in settings.items())
        report.sections.append(("to reproduce", f"{line} python -m pytest '{item.nodeid}'"))
    return report


def pytest_runtest_logfinish():
    """A fault of the GPU stays with its process: this one ends, xdist begins another, and the other tests can pass."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)


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
