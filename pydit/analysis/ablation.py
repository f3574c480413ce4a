"""What leaving out one block, and only that, does to a transformer's output.

The change of the output is global where CKA and cosines are local. Amber-Image and LAPTOP-Diff (arXiv 2404.11098) rank
layers by it. Blocks before the one left out see what they always see, so one forward goes on block by block, and at
each the rest is run without it: L (L + 1) / 2 block evaluations per batch, where running every ablation from the start
takes L^2, and one boundary in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pydit.analysis.forward import GivenStates, shell_of, velocity
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.models.adapter import require_batches
from pydit.stats.cka import bootstrap_ratios


@dataclass(frozen=True)
class Ablation:
    """Losses of N calibration images with one of L blocks left out.

    Attributes
    ----------
    losses : float64 [N, L], squared distance of the ablated output from the full one, summed over its elements
    norms : float64 [N], squared norm of the full output
    timesteps : float64 [N], what the model was told (Qwen-Image: the share of noise, 0 to 1)
    batches : int64 [N], the calibration batch of an image, which is what resampling draws
    """

    losses: torch.Tensor
    norms: torch.Tensor
    timesteps: torch.Tensor
    batches: torch.Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Ablation:
        """What a file holds, checked: names, shapes and kinds, and batches that are numbered from 0 on."""
        found = cls(**tensors)
        images = len(found.norms) if found.norms.ndim == 1 else -1
        for name, dims in (("losses", 2), ("norms", 1), ("timesteps", 1)):
            tensor = getattr(found, name)
            if tensor.ndim != dims or len(tensor) != images or not tensor.is_floating_point() or not bool(
                    (torch.isfinite(tensor) & ((tensor >= 0) | (name == "timesteps"))).all()):
                raise UserError(f"ablation.{name}: expected {dims}-dimensional finite floats of {max(images, 0)} "
                                f"images, not below 0, got {tensor.dtype} {list(tensor.shape)}")
        # None, or each batch has an image: a sum over batches is no longer than the images are many.
        if found.batches.dtype != torch.int64 or tuple(found.batches.shape) != (images,) or not torch.equal(
                found.batches.unique(), torch.arange(len(found.batches.unique()))):
            raise UserError(f"ablation.batches: expected the numbers of the batches of {images} images, got "
                            f"{found.batches.dtype} {list(found.batches.shape)}")
        return found

    def by_batch(self, values: torch.Tensor) -> torch.Tensor:
        """Sums [batches, W] of values [N, W] over the images of each batch."""
        sums = torch.zeros(int(self.batches.max()) + 1, values.shape[1], dtype=torch.float64)
        return sums.index_add_(0, self.batches, values)

    def relative(self, resamples: int, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Relative squared error of the output without each block, float64 [1 + resamples, L].

        Sums over images of weights [N, 1] (None: 1) times losses, over those of weights times norms: first over all
        batches, then over each bootstrap draw of them.
        """
        weights = torch.ones_like(self.norms[:, None]) if weights is None else weights
        return bootstrap_ratios(self.by_batch(weights * self.losses), self.by_batch(weights * self.norms[:, None]),
                                resamples)

    def join(self, other: Ablation) -> Ablation:
        """Both sets of images; the batches of ``other`` are numbered after these."""
        return Ablation(torch.cat((self.losses, other.losses)), torch.cat((self.norms, other.norms)),
                        torch.cat((self.timesteps, other.timesteps)),
                        torch.cat((self.batches, other.batches + 1 + int(self.batches.max()))))


def ablate(transformer: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Ablation:
    """Leave out each block in turn, on every batch.

    Parameters
    ----------
    transformer : diffusers transformer of a known family, not pruned; only read.
    batches : keyword-argument dicts for ``transformer.forward``.

    Raises
    ------
    UserError
        A pruned model, no batch, or a batch without ``timestep``.
    """
    require_batches(batches)
    adapter = get_adapter(transformer)
    shell, blocks = shell_of(adapter, transformer), adapter.blocks(transformer)
    losses, norms, timesteps, numbers = [], [], [], []
    for number, batch in enumerate(batches):
        states, kwargs = adapter.capture(transformer, batch, [0])
        if not isinstance(batch.get("timestep"), torch.Tensor):
            raise UserError(f"batch: expected timestep [B] as a tensor, got {type(batch.get('timestep')).__name__}")
        streams, outputs = states.pop(0), []
        for layer in range(len(blocks) + 1):  # what enters a block enters the one after it; at last, the full output
            tail = [GivenStates(adapter, streams), *blocks[layer + 1:]]
            outputs.append(velocity(adapter.put_blocks(shell, tail), batch).flatten(1))
            if layer < len(blocks):
                with torch.no_grad():
                    streams = adapter.call_block(blocks[layer], *streams, kwargs)
        *without, full = outputs
        losses.append(torch.stack([(output - full).square().sum(1) for output in without], 1).cpu())
        norms.append(full.square().sum(1).cpu())
        timesteps.append(batch["timestep"].detach().double().cpu().expand(len(full)).clone())
        numbers.append(torch.full((len(full),), number))
    if not losses:
        raise UserError("batches: expected at least one, got none")
    return Ablation(torch.cat(losses), torch.cat(norms), torch.cat(timesteps), torch.cat(numbers))
