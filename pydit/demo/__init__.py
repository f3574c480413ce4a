"""A small text-to-image world with an exact verifier, a trained teacher for it, and the whole method run on both."""

from pydit.lazy import submodules

__getattr__ = submodules(__name__, "data", "evaluate", "run", "teacher", "train_teacher", "verifier", "world")
