"""``pydit doctor``: what is installed here, what is missing, and what each missing thing costs.

Nothing is taken for granted, torch and the compiled extension included: every look-up is guarded, and a broken
package is reported as such rather than ending the examination.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydit import env
from pydit.version import __version__

REQUIRED = {  # module -> (least version, what it is for)
    "torch": ("2.10", "every computation"),
    "numpy": ("0", "arrays handed to figures and to the verifier"),
    "safetensors": ("0", "every weight file that is read or written"),
    "diffusers": ("0.39", "pipelines and the transformer classes that are pruned"),
}
OPTIONAL = {  # module -> (distribution, what is lost without it)
    "transformers": ("transformers", "pipelines with a text encoder cannot be loaded: no demo, generate or analyze"),
    "PIL": ("pillow", "pictures cannot be saved: no generate, no demo report"),
    "matplotlib": ("matplotlib", "no figures: the demo report and `pydit analyze --plot` need it"),
    "tqdm": ("tqdm", "no progress bars"),
    "rich": ("rich", "tables are printed without colour"),
    "accelerate": ("accelerate", "models load more slowly and need about twice the memory while loading"),
    "peft": ("peft", "no LoRA adapters"),
    "pynvml": ("nvidia-ml-py", "benchmarks do not record the GPU's driver, clocks and power limit"),
}
BUILD_TOOLS = {  # executables tried in order -> what is lost
    "C++ compiler": (("c++", "g++", "clang++"), "the extension cannot be built from source"),
    "nvcc": (("nvcc", "/usr/local/cuda/bin/nvcc"), "a source build leaves the CUDA kernels out"),
    "cmake": (("cmake",), "pip fetches it for a source build; only needed to build by hand"),
    "ninja": (("ninja",), "pip fetches it for a source build; only needed to build by hand"),
    "ccache": (("ccache",), "rebuilding the extension takes minutes instead of seconds"),
}


@dataclass(frozen=True)
class Check:
    """One finding. ``status``: "ok", "missing" (a cost, nothing is wrong) or "problem" (something required fails)."""

    group: str
    name: str
    status: str
    found: str
    note: str = ""  # what it costs, or what to do


def examine() -> list[Check]:
    """Every check, in the order in which they are printed."""
    checks = [_python()]
    checks += [_required(name, least, use) for name, (least, use) in REQUIRED.items()]
    checks += [Check("Required", name, "problem", wrong, "unset or correct it") for name, wrong in env.refused()]
    checks += [Check("Required", name, "missing", "not a variable of pydit", "it does nothing; docs/environment.md has "
                     "those that do") for name in env.unknown()]
    checks += [_extension(), *_gpu(), _cuda_kernels(), _demo_teacher()]
    checks += [_optional(name, distribution, cost) for name, (distribution, cost) in OPTIONAL.items()]
    checks += [_tool(name, candidates, cost) for name, (candidates, cost) in BUILD_TOOLS.items()]
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The findings as plain data; "ok" is False when something required is missing."""
    info = _backend_info()
    return {"pydit": __version__, "ok": healthy(checks), "checks": [asdict(check) for check in checks], "backend": info}


def healthy(checks: list[Check]) -> bool:
    """Whether nothing required is missing."""
    return all(check.status != "problem" for check in checks)


def describe(checks: list[Check]) -> str:
    """The findings as text for a reader who has just installed the package."""
    marks = {"ok": "ok     ", "missing": "missing", "problem": "PROBLEM"}
    width = max(len(check.name) for check in checks)
    lines, group = [f"pydit {__version__} on {platform.platform(terse=True)}, {_cpu()}"], ""
    for check in checks:
        if check.group != group:
            group = check.group
            lines += ["", group]
        lines.append(f"  {marks[check.status]}  {check.name:<{width}}  {check.found}".rstrip())
        if check.note:
            lines.append(f"           {'':<{width}}  -> {check.note}")
    problems = [check.name for check in checks if check.status == "problem"]
    lines += ["", f"Not usable yet: fix {', '.join(problems)} first." if problems else _summary(checks)]
    return "\n".join(lines)


def _summary(checks: list[Check]) -> str:
    by_name = {check.name: check for check in checks}
    if by_name["GPU"].status == "ok" and by_name["CUDA kernels"].status == "ok":
        return "Ready: tensors on the GPU run the CUDA kernels. Try `pydit demo`."
    if by_name["GPU"].status == "ok":
        return "Ready: the GPU is used through plain torch; see CUDA kernels above. Try `pydit demo`."
    return "Ready for the CPU: everything works, without the kernels' speed. Try `pydit demo`."


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < (3, 10):  # noqa: UP036 - a check for whoever runs it from a checkout
        return Check("Required", "python", "problem", version, "pydit needs Python 3.10 or newer")
    return Check("Required", "python", "ok", f"{version} ({sys.executable})")


def _required(name: str, least: str, use: str) -> Check:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken installation raises anything; the report must go on
        missing = isinstance(error, ModuleNotFoundError) and importlib.util.find_spec(name) is None
        found = "not installed" if missing else f"cannot be imported: {_first_line(error)}"
        return Check("Required", name, "problem", found, f"needed for {use} (pip install '{name}>={least}')")
    version = str(getattr(module, "__version__", "unknown version"))
    if _numbers(version) < _numbers(least):
        return Check("Required", name, "problem", version,
                     f"pydit needs {name} {least} or newer (pip install -U {name})")
    if name == "torch":
        cuda = getattr(module.version, "cuda", None)
        built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
        return Check("Required", name, "ok", f"{version}, {built}")
    return Check("Required", name, "ok", version)


def _extension() -> Check:
    try:
        module = importlib.import_module("pydit._C")
    except ImportError as error:
        return Check("Speed", "pydit._C", "missing", _first_line(error),
                     "the compiled extension: without it every op runs its plain torch formula, correct but slower. "
                     "Reinstall with `pip install .` where there is a C++ compiler")
    found = "compiled extension, " + ("simulator included" if hasattr(module, "sim") else "built with PYDIT_SIM=off")
    note = "" if hasattr(module, "sim") else "kernels cannot be tried without a GPU"
    return Check("Speed", "pydit._C", "ok", found, note)


def _cuda_kernels() -> Check:
    info = _backend_info()
    archs = info.get("cuda_archs") or []
    if archs:
        found = f"built for compute capability {', '.join(archs)} with CUDA {info['cuda_version']}"
        problems = _unusable()
        if problems:
            return Check("Speed", "CUDA kernels", "problem", found, "; ".join(problems)
                         + "; until then every op runs plain torch there")
        return Check("Speed", "CUDA kernels", "ok", found)
    return Check("Speed", "CUDA kernels", "missing", "not built",
                 "on a GPU every op runs plain torch; to build them install the CUDA toolkit (nvcc), then pydit again")


def _unusable() -> list[str]:
    """Of every GPU on which the kernels cannot run: which, and why."""
    try:
        import torch

        from pydit import backend

        if not torch.cuda.is_available():
            return []
        reasons = {index: backend.unusable(index) for index in range(torch.cuda.device_count())}
    except Exception:  # torch missing or broken: another line says so
        return []
    return [f"GPU {index}: {reason}" for index, reason in reasons.items() if reason]


def _gpu() -> list[Check]:
    cost = "computations run on the CPU: fine for the demo, far too slow for a model of billions of parameters"
    driver = _driver()
    try:
        import torch

        available = torch.cuda.is_available()
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if available else []
    except Exception as error:  # torch missing or its CUDA start-up failing must not end the report
        return [Check("Speed", "GPU", "missing", f"torch cannot tell: {_first_line(error)}", cost), *driver]
    if not available:
        built = torch.version.cuda is not None
        found = "none that torch can use" if built or not driver[0].found.startswith("version") else \
            "a driver is there, but this torch is built without CUDA"
        return [Check("Speed", "GPU", "missing", found, cost), *driver]
    shown = "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
                      for p in names)
    return [Check("Speed", "GPU", "ok", shown), *driver]


def _driver() -> list[Check]:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        return [Check("Speed", "NVIDIA driver", "ok", f"version {version}")]
    except Exception:  # nvidia-ml-py missing, or no driver behind it
        pass
    smi = shutil.which("nvidia-smi")
    output = _run([smi, "--query-gpu=driver_version", "--format=csv,noheader"]) if smi else ""
    if re.match(r"^\d+(\.\d+)+", output):
        return [Check("Speed", "NVIDIA driver", "ok", f"version {output.splitlines()[0]}")]
    return [Check("Speed", "NVIDIA driver", "missing", "not found", "no NVIDIA GPU can be used")]


def _demo_teacher() -> Check:
    folder = Path(__file__).parent / "demo" / "assets" / "teacher"
    if (folder / "model_index.json").is_file():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return Check("Demo", "demo teacher", "ok", f"{size / 2**20:.1f} MiB in {folder}")
    return Check("Demo", "demo teacher", "missing", f"no pipeline in {folder}",
                 "`pydit demo` has no model to compress; reinstall pydit, or train one with "
                 "`python -m pydit.demo.train_teacher`")


def _optional(name: str, distribution: str, cost: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check("Optional", distribution, "missing", "not installed", f"{cost} (pip install {distribution})")
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "installed, version unknown"
    return Check("Optional", distribution, "ok", version)


def _tool(name: str, candidates: tuple[str, ...], cost: str) -> Check:
    path = next((found for found in map(shutil.which, candidates) if found), None)
    if path is None:
        # Build tools installed as wheels sit beside the interpreter, which need not be on PATH.
        beside = Path(sys.executable).parent / candidates[0]
        path = str(beside) if beside.is_file() else None
    if path is None:
        return Check("Building from source", name, "missing", "not found", cost)
    output = _run([path, "--version"]).splitlines()
    versions = [line for line in output if re.search(r"\d+\.\d+", line)]
    found = versions[-1 if name == "nvcc" and len(versions) == 1 else 0].strip() if versions else "version unknown"
    return Check("Building from source", name, "ok", f"{found} ({path})")


def _backend_info() -> dict[str, Any]:
    try:
        from pydit import backend

        return backend.info()
    except Exception as error:  # without torch the backend cannot be asked
        return {"error": _first_line(error)}


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def machine() -> str:
    """The processor, its number of cores, and the GPU if there is one: the line beside every measured figure."""
    checks = _gpu()
    return _cpu() + (f"; {checks[0].found}" if checks[0].status == "ok" else "")


def versions() -> dict[str, str]:
    """Versions of this package and of what decides its figures, as installed."""
    found = {"pydit": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu() -> str:
    name = platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
        name = found.group(1) if found else name
    except OSError:
        pass  # not Linux
    return f"{name}, {os.cpu_count()} cores"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
