"""Fused ops for (pruned) DiT blocks. Each is one torch.library op: traceable, differentiable, checked.

CUDA tensors run the CUDA kernel, CPU tensors the formula in :mod:`pydit.ops.reference`, or with ``PYDIT_BACKEND=sim``
the CUDA kernel in the simulator. ``pydit.report()`` says which path each op took and why.
"""

from pydit.ops import reference
from pydit.ops.block import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm
from pydit.ops.hsic_matrix import hsic_matrix
from pydit.ops.joint_attention import joint_attention, pack_text, unpack_text
from pydit.ops.joint_qk_norm_rope import joint_qk_norm_rope
from pydit.ops.joint_qkv import joint_qkv
from pydit.ops.linear import (
    in_one_launch,
    joint_linear,
    joint_linear_gated_residual,
    joint_linear_gelu,
    joint_linear_residual,
    linear_gated_residual,
    linear_gelu,
    linear_residual,
)
from pydit.ops.merge_attention import merge_attention
from pydit.ops.qk_norm_rope import qk_norm_rope
from pydit.ops.second_moments import second_moments

__all__ = ["ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm", "hsic_matrix", "in_one_launch",
           "joint_attention", "joint_linear", "joint_linear_gated_residual", "joint_linear_gelu",
           "joint_linear_residual", "joint_qk_norm_rope", "joint_qkv", "linear_gated_residual", "linear_gelu",
           "linear_residual", "merge_attention", "pack_text", "qk_norm_rope", "reference", "second_moments",
           "unpack_text"]
