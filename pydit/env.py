"""Every environment variable the package reads, in one table.

The same table stands in ``docs/environment.md``; a test compares the two. Nothing else under ``pydit/`` reads
``os.environ``. Build-time variables are read by CMake and listed here so that there is one place to look.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

from pydit.errors import UserError


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, default, allowed values, when it is read, and what it does."""

    name: str
    default: str
    values: tuple[str, ...]  # empty: free text
    read: str  # "run" or "build"
    effect: str


VARIABLES = (
    Variable("PYDIT_BACKEND", "auto", ("auto", "reference", "sim"), "run",
             "auto: CUDA tensors run CUDA kernels, CPU tensors run the torch reference. "
             "reference: torch everywhere. sim: CPU tensors run the CUDA kernels in the simulator."),
    Variable("PYDIT_SIM_SEED", "0", (), "run", "Seed of the order in which the simulator resumes warps."),
    Variable("PYDIT_SIM_THREADS", "0", (), "run", "Host threads of the simulator; 0 means one per core."),
    Variable("PYDIT_SIM_ASYNC", "lazy", ("lazy", "eager"), "run",
             "When the simulator's asynchronous copies land: in the wait for them, or at once."),
    Variable("PYDIT_SIM_ARCH", "80", ("80", "90a"), "run", "The GPU architecture that the simulator plays."),
    Variable("PYDIT_EXTENSION", "", (), "run",
             "Path of another build of pydit._C to load, such as one with the simulator's race detector."),
    Variable("PYDIT_GEMM", "auto", ("auto", "pydit", "library"), "run",
             "Whose matrix product linear ops use. auto: this package's kernel in the simulator, the library's "
             "(cuBLASLt) on a GPU, until a race there says otherwise. pydit: the kernel everywhere. library: torch's "
             "everywhere."),
    Variable("PYDIT_CLUSTER", "auto", ("auto", "1", "2"), "run",
             "Blocks per cluster, which share what they load, in the Hopper kernels of second_moments and the linear "
             "ops. auto: two where that reads fewer bytes, by count."),
    Variable("PYDIT_PARTS", "auto", ("auto", *"12345678"), "run",
             "Into how many parts along K the Hopper kernel of the linear ops cuts the tiles that would not fill a "
             "wave. auto: what takes the fewest steps, by count. 1: none is cut."),
    Variable("PYDIT_SM_MARGIN", "0", (), "run",
             "Multiprocessors that persistent kernels leave free for others, such as a collective that runs at the "
             "same time. Read when the extension is loaded."),
    Variable("PYDIT_CHECK", "0", ("0", "1"), "run",
             "1: ops also check the contents of index tensors (txt_lens), which waits for the GPU."),
    Variable("PYDIT_DEBUG", "0", ("0", "1"), "run", "1: the command line shows the traceback of an error."),
    Variable("PYDIT_CUDA", "auto", ("auto", "on", "off"), "build",
             "auto: build CUDA kernels when nvcc is found. on: fail without nvcc. off: leave them out."),
    Variable("PYDIT_SIM", "on", ("on", "off"), "build", "off: leave the simulator out of the extension."),
    Variable("PYDIT_SIM_RACE", "off", ("on", "off"), "build",
             "on: compile the simulated kernels for the race detector; several times slower, for tests."),
    Variable("PYDIT_CUDA_ARCHS", "80;90", (), "build",
             "Semicolon-separated compute capabilities to build machine code for; PTX of the lowest is added."),
)
_BY_NAME = {v.name: v for v in VARIABLES}
_ENCODED = {name: name if os.name == "nt" else os.fsencode(name) for name in _BY_NAME}


def get(name: str) -> str:
    """The value of a declared variable, lower-cased and checked against its allowed values.

    Raises
    ------
    KeyError
        ``name`` is not in :data:`VARIABLES`.
    UserError
        The environment holds a value that is not allowed.
    """
    # For a name that is not set, os.environ raises and catches inside, which takes longer than a small op's arithmetic.
    # The dictionary below it does not; its keys are bytes where the system's names are bytes.
    try:
        raw = os.environ._data.get(_ENCODED[name], "")
    except AttributeError:  # os.environ was replaced by another mapping
        raw = os.environ.get(name, "")
    return _checked(name, raw)


@functools.lru_cache(maxsize=64)
def _checked(name: str, raw: str | bytes) -> str:
    variable = _BY_NAME[name]
    value = os.fsdecode(raw).strip().lower() or variable.default
    if variable.values and value not in variable.values:
        raise UserError(f"{name}: expected one of {', '.join(variable.values)}, got {value!r}")
    return value


def refused() -> list[tuple[str, str]]:
    """(name, what was expected and what came) of each variable of the environment with a value that is not allowed."""
    found = []
    for variable in VARIABLES:
        try:
            get(variable.name)
        except UserError as error:
            found.append((variable.name, str(error).partition(": ")[2]))
    return found


def unknown() -> list[str]:
    """Variables of the environment that are named like this package's and are none of them."""
    return sorted(name for name in os.environ if name.startswith("PYDIT_") and name not in _BY_NAME)


def path(name: str) -> str:
    """The value of a declared variable as it stands, for a path: case matters."""
    return os.environ.get(_BY_NAME[name].name, "").strip()


def get_int(name: str) -> int:
    """Like :func:`get`, for a non-negative integer."""
    value = get(name)
    if not value.isdigit():
        raise UserError(f"{name}: expected a non-negative integer, got {value!r}")
    return int(value)
