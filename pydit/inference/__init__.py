"""Running pipelines: accelerated, pruned or baked, saved and loaded, and recording what their transformer is fed."""

from pydit.lazy import submodules

__getattr__ = submodules(__name__, "accelerate", "graphs", "pipeline", "pluggable", "published", "sampling", "schedule",
                         "streaming")
