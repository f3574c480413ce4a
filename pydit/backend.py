"""Which kernels exist here and which one an op takes.

Every op asks :func:`choose` once per call. What it answered, and why nothing faster was possible, is kept per op and
shown by ``pydit.report()``: a fallback is never silent.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pydit import env
from pydit.version import __version__

# What a kernel with a Hopper version says it took, by number: PYDIT_PATH_* in pydit.h.
KERNEL_PATHS = ("the Hopper kernel (TMA, wgmma)", "the portable kernel: the device is not of compute capability 9.x",
                "the portable kernel: a tensor's address or strides are not multiples of 16 bytes, or a stride is 0",
                "the portable kernel: built without sm_90a",
                "the Hopper kernel (TMA, wgmma), clusters of two blocks that share what they load",
                "the portable kernel: the Hopper kernel is not for this shape",
                "the portable kernel: the CUDA toolkit or driver is older than 12.1")
# Until benchmarks/results holds a file of a GPU; tests/package/test_backend.py keeps the two together.
NOT_MEASURED = "the CUDA kernel, whose speed has not been measured yet"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # pydit_dtype in pydit.h
KERNEL_DTYPES = (torch.float16, torch.bfloat16)  # of the kernels that multiply on tensor cores
KERNEL_HEAD_DIMS = (32, 64, 128)  # of those that work on heads: joint_attention, joint_qkv


class Path(NamedTuple):
    """One choice: the kernel module (None: the torch reference), its name, and the reason."""

    kernels: ModuleType | None
    name: str  # "cuda", "sim" or "reference"
    reason: str  # why nothing faster; "" when nothing faster exists for these tensors


ON_CPU = Path(None, "reference", "the tensors are on the CPU")

_taken: dict[str, dict[str, Any]] = {}
_taking = threading.Lock()


def _load(path: str) -> ModuleType:
    if not path:
        return importlib.import_module("pydit._C")
    spec = importlib.util.spec_from_file_location("pydit._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"PYDIT_EXTENSION: expected the path of a built pydit._C, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def extension() -> tuple[ModuleType | None, str | None]:
    """The compiled module and None, or None and why it could not be imported."""
    try:
        module = _load(env.path("PYDIT_EXTENSION"))
    except ImportError as error:
        return None, str(error)
    _configure(module)
    return module, None


def _configure(module: ModuleType) -> None:
    for backend in ("cuda", "sim"):
        if kernels := getattr(module, backend, None):
            kernels.reserve_multiprocessors(env.get_int("PYDIT_SM_MARGIN"))
    if (sim := getattr(module, "sim", None)) is None:
        return
    sim.set_seed(env.get_int("PYDIT_SIM_SEED"))
    sim.set_threads(env.get_int("PYDIT_SIM_THREADS"))
    sim.set_async(env.get("PYDIT_SIM_ASYNC") == "eager")
    sim.set_arch({"80": 80, "90a": 90}[env.get("PYDIT_SIM_ARCH")])


def configure_sim() -> None:
    """Read PYDIT_SM_MARGIN and PYDIT_SIM_* again; they are otherwise read once, when the extension is loaded."""
    module, _ = extension()
    if module is not None:
        _configure(module)


def info() -> dict[str, Any]:
    """What was built and which path tensors take by default.

    Returns
    -------
    dict
        ``version``; ``extension`` (bool) and ``extension_error`` (str or None); ``cuda_archs`` (list of str, empty
        without CUDA kernels) and ``cuda_version``; ``sim`` (bool); ``default_backend`` {"cpu", "cuda"}.
    """
    module, error = extension()
    archs = [a for a in module.cuda_archs.split(",") if a] if module else []
    return {
        "version": __version__,
        "extension": module is not None,
        "extension_error": error,
        "cuda_archs": archs,
        "cuda_version": module.cuda_version if module else "",
        "sim": hasattr(module, "sim"),
        "default_backend": {device: default(device) for device in ("cpu", "cuda")},
    }


def default(device_type: str) -> str:
    """The path that tensors on a device of this type take by default: "cuda", "sim" or "reference"."""
    mode = env.get("PYDIT_BACKEND")
    if device_type == "cpu":
        return "sim" if mode == "sim" else "reference"
    module, _ = extension()
    built = device_type == "cuda" and module is not None and module.cuda_archs.strip(",")
    if not built or mode == "reference":
        return "reference"
    # Do not initialise CUDA in a process that has not used it yet: it may want to fork.
    return "reference" if torch.cuda.is_initialized() and unusable(torch.cuda.current_device()) else "cuda"


@functools.cache
def unusable(device: int) -> str:
    """Why the kernels that were built cannot run on the GPU of this index with its driver; "" where they can.

    Machine code runs on GPUs of the same major compute capability and at least its minor one; any newer GPU takes the
    PTX of the lowest, which the driver compiles if it knows that version of PTX. The CUDA runtime inside the module
    needs a driver of its own major version (CUDA compatibility guide). Code compressed by a toolkit from 12.8 on, as
    CMakeLists.txt asks for, needs a driver of CUDA 12.4 (nvcc's manual, --compress-mode). If torch does not tell the
    driver's version, such problems show at the launch.
    """
    module, _ = extension()
    built, versions = sorted(map(int, module.cuda_archs.split(","))), module.cuda_version.split(".")
    major, minor = torch.cuda.get_device_capability(device)
    toolkit = 1000 * int(versions[0]) + 10 * int(versions[1])
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()  # 12040 is 12.4; private to torch
    if 10 * major + minor < built[0]:
        return f"the kernels are built for compute capability {built[0] / 10} and newer, this GPU has {major}.{minor}"
    made, knows = f"CUDA {'.'.join(versions[:2])}", f"the driver knows CUDA {driver // 1000}.{driver % 1000 // 10}"
    if driver and driver // 1000 < toolkit // 1000:
        return (f"the kernels are built with {made}, {knows}: update it, or build with a toolkit of CUDA "
                f"{driver // 1000}")
    if toolkit >= 12080 and 0 < driver < 12040:
        return f"the kernels are built with {made}, whose code needs a driver of CUDA 12.4, {knows}: update it"
    if not any(arch // 10 == major and arch % 10 <= minor for arch in built) and 0 < driver < toolkit:
        return (f"the kernels are built without machine code for compute capability {major}.{minor} and as PTX of "
                f"{made}, {knows}: update it, or build with PYDIT_CUDA_ARCHS={major}{minor}")
    return ""


def choose(op: str, tensor: torch.Tensor) -> Path:
    """The path ``op`` takes for ``tensor`` (its device and dtype decide), recorded for :func:`report`.

    Raises
    ------
    RuntimeError
        The environment demands the simulator and it was not built.
    TypeError
        A kernel was chosen and the dtype is not float32, float16 or bfloat16.
    """
    mode = env.get("PYDIT_BACKEND")
    module, error = extension()
    if tensor.is_cuda:
        kernels = getattr(module, "cuda", None)
        if mode == "reference":
            path = Path(None, "reference", "PYDIT_BACKEND=reference")
        elif kernels is None:
            path = Path(None, "reference",
                        f"pydit._C could not be imported: {error}" if module is None else "built without nvcc")
        elif problem := unusable(tensor.get_device()):
            path = Path(None, "reference", problem)
        else:
            path = Path(kernels, "cuda", NOT_MEASURED)
    elif mode == "sim":
        kernels = getattr(module, "sim", None)
        if kernels is None:
            raise RuntimeError("PYDIT_BACKEND=sim: expected pydit._C with the simulator, got "
                               + (f"no extension ({error})" if module is None else "a build with PYDIT_SIM=off"))
        path = Path(kernels, "sim", "PYDIT_BACKEND=sim: the CUDA kernel, simulated")
    else:
        path = ON_CPU
    if path.kernels is not None and tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{op}: expected float32, float16 or bfloat16 on the {path.name} backend, got {tensor.dtype}")
    record(op, path.name, path.reason)
    return path


def explain(op: str, reason: str) -> None:
    """Add to the call that :func:`choose` has just recorded which of several kernels it took."""
    with _taking:
        entry = _taken[op]
        if not entry["reason"].endswith(reason):  # another thread's call may come between a choice and its explanation
            entry["reason"] = f"{entry['reason']}; {reason}" if entry["reason"] else reason


def record(op: str, path: str, reason: str) -> None:
    """Note for :func:`report` that a call of ``op`` took a path. Tracing a graph is no call and is not noted."""
    if torch.compiler.is_compiling():
        return
    with _taking:
        entry = _taken.get(op)
        if entry is None:
            entry = _taken[op] = {"path": "", "reason": "", "calls": 0}
        entry["path"], entry["reason"] = path, reason
        entry["calls"] += 1


def stream_of(tensor: torch.Tensor) -> int:
    """The raw CUDA stream that torch currently uses on the tensor's device; 0 for a CPU tensor."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def cluster() -> int:
    """``PYDIT_CLUSTER`` as pydit.h numbers it: 0 leaves the choice to the kernel."""
    return {"auto": 0, "1": 1, "2": 2}[env.get("PYDIT_CLUSTER")]


def parts() -> int:
    """``PYDIT_PARTS`` as pydit.h numbers it: 0 leaves the choice to the kernel."""
    choice = env.get("PYDIT_PARTS")
    return 0 if choice == "auto" else int(choice)


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's GPU is the current one; free for a CPU tensor or the current GPU."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def report(model: Any = None) -> dict[str, Any]:
    """Per op: the path its latest call took, the reason, and the number of calls so far in this process.

    With a model or pipeline also, under ``"model"``, which of its parts run on this package and why not the others
    (:func:`pydit.inference.accelerate.describe`).
    """
    found: dict[str, Any] = {op: dict(entry) for op, entry in sorted(_taken.items())}
    if model is not None:
        found["model"] = importlib.import_module("pydit.inference.accelerate").describe(model)
    return found
