"""The little that data-parallel training needs: every process runs the same steps on its own batches.

Without an initialised ``torch.distributed`` each function is the identity. The caller gives every process its own
``batches``; weights start equal (:func:`broadcast`) and stay equal, because gradients are averaged. Memory is not
sharded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return world_size() == 1 or dist.get_rank() == 0


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors of one dtype and device by their mean over processes, in one collective."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite tensors by those of the main process."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def agree(value: float, device: torch.device) -> float:
    """The main process's value, so that all processes end a timed phase at the same step."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
