"""What training on several processes needs, all of it torch.distributed: FSDP2 for sharding, collectives for the rest.

Every process runs the same steps, on batches of its own or on its rows of common ones. Without an initialised
``torch.distributed`` each function is the identity. Gradients of whole parameters are averaged here; those of sharded
ones FSDP2 reduces and scatters in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pydit.errors import UserError
from pydit.models.adapter import ModelAdapter


def world_size() -> int:
    """Number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if world_size() == 1 else dist.get_rank()


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace whole tensors of one dtype and device by their mean over processes, in one collective."""
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def broadcast(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite whole tensors by those of the main process."""
    if world_size() > 1:
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), src=0)  # a parameter is not trained by it


def agree(value: float, device: torch.device) -> float:
    """The main process's value, so that all processes end a timed phase, or save, at the same step."""
    if world_size() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.item()


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The value of every process, on every process; small plain data."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], Any], *, main_only: bool = False) -> Any:
    """Run ``action`` everywhere, or on the main process alone; an error of any process is raised by all of them.

    A process that failed alone would leave the others waiting in their next collective.
    """
    result, error = None, None
    if is_main() or not main_only:
        try:
            result = action()
        except (OSError, ValueError) as caught:
            error = caught
    for found in gather(error):
        if found is not None:
            raise found
    return result


def shard(model: nn.Module, adapter: ModelAdapter, *, device: torch.device | None = None) -> None:
    """Shard every block, and every other child with parameters, over all processes (FSDP2); again does nothing.

    Each is a unit of its own, gathered for its own forward and backward pass, because the layer phase runs blocks
    without their model. Gradients are reduced in float32. ``device`` : where parameters without memory (meta) will be.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if world_size() == 1:
        return
    lists = [getattr(model, name) for name in adapter.block_lists]
    blocks = [blocks[index] for blocks in lists for index in range(len(blocks))]
    others = [child for child in model.children() if not any(child is blocks for blocks in lists)]
    units = [unit for unit in [*blocks, *others] if any(True for _ in unit.parameters())]
    if any(isinstance(unit, FSDPModule) for unit in units):
        return
    mesh = init_device_mesh((device or next(model.parameters()).device).type, (world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    # Without a common context (share_comm_ctx): FSDP2's order of a forward would go on from one phase to the next, and
    # its prefetch in a backward fails where two blocks that are neighbours have run alone.
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def gathered(module: nn.Module) -> nn.Module:
    """``module`` with whole parameters, to call its parts; its next forward or backward pass shards it again."""
    if hasattr(module, "unshard"):
        module.unshard()
    return module


def spread(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, cut like ``like``; unchanged where ``like`` is whole."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the parts of all processes; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a sharded model, whole and on the CPU, on the main process; every process must ask.

    The others get an empty dict. One parameter is gathered at a time.
    """
    found = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if is_main():
            found[name] = tensor.cpu()
    return found


def start(device: str) -> str:
    """Join the processes that torchrun or ``accelerate launch`` started, if one did; the device of this process.

    Raises
    ------
    UserError
        More processes on this machine than GPUs.
    """
    from datetime import timedelta

    if not dist.is_available() or not dist.is_torchelastic_launched():
        return device
    kind = torch.device(device).type
    if kind == "cuda":
        number = dist.get_node_local_rank(0)
        if number >= torch.cuda.device_count():
            raise UserError(f"nproc-per-node: expected at most {torch.cuda.device_count()} processes, one per GPU, "
                            f"got process {number + 1}")
        torch.cuda.set_device(number)
        device = f"cuda:{number}"
    if not dist.is_initialized():
        # Long, because the others wait while the main process encodes a data set.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=2))
    return device


def stop() -> None:
    """Part from the other processes, at the end of a command that called :func:`start`."""
    if world_size() > 1:
        dist.barrier()
    if dist.is_available() and dist.is_initialized() and dist.is_torchelastic_launched():
        dist.destroy_process_group()
