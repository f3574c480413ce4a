"""Distillation of a pruned model: teacher-fed layer training, then optional end-to-end training, resumable.

>>> config = DistillConfig(layers_steps=2000, layers_lr=1e-3, checkpoint_dir="run", save_every=200, resume="auto")
>>> result = distill(teacher, student, batches, config)         # doctest: +SKIP
"""

from pydit.distill.config import DistillConfig
from pydit.distill.cost import Estimate, estimate
from pydit.distill.distributed import full_weights
from pydit.distill.losses import LOSSES
from pydit.distill.pair import merge
from pydit.distill.stages import Stage, progressive
from pydit.distill.trainer import DistillResult, NonFiniteLossError, distill

__all__ = ["LOSSES", "DistillConfig", "DistillResult", "Estimate", "NonFiniteLossError", "Stage", "distill",
           "estimate", "full_weights", "merge", "progressive"]
