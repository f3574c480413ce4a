"""One adapter per model family, and the pruned model classes.

Importing this package does not import diffusers; asking for an adapter does.
"""

from pydit.lazy import submodules
from pydit.models.adapter import BlockIO, Capture, ModelAdapter, get_adapter

__getattr__ = submodules(__name__, "attention")

__all__ = ["BlockIO", "Capture", "ModelAdapter", "get_adapter"]
