"""Where benchmark cases are looked up. A case lives in ``benchmarks/cases/<op>.py``: adding an op adds one file there.

    for case in cases("full"): print(case.name, case.work.bytes, case.work.flops)
"""

from __future__ import annotations

import importlib
import pkgutil

import benchmarks.cases
from benchmarks.cases import DTYPES, Case, Work
from pydit.errors import UserError

__all__ = ["DTYPES", "SIZES", "Case", "Work", "cases", "families", "find"]
SIZES = ("full", "small")  # shapes of real models; shapes for a CPU


def cases(size: str = "full", module: str | None = None) -> list[Case]:
    """All cases of a size, module by module in alphabetical order, or those of one module; names are unique."""
    names = _modules() if module is None else [module]
    found = [case for name in names for case in importlib.import_module(f"benchmarks.cases.{name}").cases(size)]
    if len({case.name for case in found}) != len(found):
        raise RuntimeError("benchmarks/cases: expected unique case names, got a repeated one")
    return found


def families() -> dict[str, str]:
    """By op, the module of its cases."""
    return {case.op: name for name in _modules() for size in SIZES
            for case in importlib.import_module(f"benchmarks.cases.{name}").cases(size)}


def _modules() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(benchmarks.cases.__path__))


def find(text: str, size: str = "full", module: str | None = None) -> list[Case]:
    """The cases, of all modules or of one, whose name contains ``text``, or one of several that spaces separate;
    UserError when there is none."""
    if module is not None and module not in _modules():
        raise UserError(f"module: expected one of {', '.join(_modules())}, got {module!r}")
    parts = text.split() or [""]
    found = [case for case in cases(size, module) if any(part in case.name for part in parts)]
    if not found:
        raise UserError(f"filter: expected part of a case name (`--list` shows them), got {text!r}")
    return found
