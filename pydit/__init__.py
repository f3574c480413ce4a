"""pydit: fused CUDA kernels for diffusion transformers, and the pruning and distillation built on them.

Importing the package is cheap: torch, diffusers, the compiled extension, a driver and a GPU are needed only by what
uses them, and only when it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pydit.errors import FormatError, UserError
from pydit.version import __version__

if TYPE_CHECKING:
    from pydit import analysis, data, demo, distill, inference, models, ops, stats
    from pydit.backend import info as backend_info
    from pydit.backend import report
    from pydit.inference.accelerate import accelerate, restore
    from pydit.inference.pipeline import load_pipeline, save_pipeline
    from pydit.inference.schedule import bake_schedule
    from pydit.plan import PruningPlan
    from pydit.pruning import prune

_MODULES = ("analysis", "data", "demo", "distill", "inference", "models", "ops", "stats")
_NAMES = {
    "PruningPlan": ("pydit.plan", "PruningPlan"),
    "prune": ("pydit.pruning", "prune"),
    "backend_info": ("pydit.backend", "info"),
    "report": ("pydit.backend", "report"),
    "save_pipeline": ("pydit.inference.pipeline", "save_pipeline"),
    "load_pipeline": ("pydit.inference.pipeline", "load_pipeline"),
    "bake_schedule": ("pydit.inference.schedule", "bake_schedule"),
    "accelerate": ("pydit.inference.accelerate", "accelerate"),
    "restore": ("pydit.inference.accelerate", "restore"),
}

# What diffusers looks up here for a component that model_index.json declares as ["pydit", class].
_FOR_DIFFUSERS = {
    "PrunedQwenImageTransformer2DModel": "pydit.models.qwen_image",
    "PrunedFluxTransformer2DModel": "pydit.models.flux",
    "PrunedSD3Transformer2DModel": "pydit.models.sd3",
    "ModelMixin": "diffusers",
}

__all__ = ["FormatError", "UserError", "__version__", *_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pydit.{name}")
    if name in _NAMES:
        module, attribute = _NAMES[name]
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value
    if name in _FOR_DIFFUSERS:
        return getattr(importlib.import_module(_FOR_DIFFUSERS[name]), name)
    raise AttributeError(f"module 'pydit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
