"""Which blocks to keep, learned together with what the kept ones become: TinyFusion's differentiable depth pruning.

Fang et al., "TinyFusion: Diffusion Transformers Learned Shallow" (arXiv 2412.01199, CVPR 2025). The layers are cut
into local groups. Of every group the ways to keep so many of its layers are listed, and each way has a logit; a forward
draws one way per group and sample by the straight-through Gumbel-softmax (Jang et al. 2017) and runs
``x <- m B(x) + (1 - m) x``. The logits and low-rank updates of the kept blocks' weights (LoRA, Hu et al. 2021) go down
the same loss, so that a way is good when its model recovers fast, not when it is near at once. The likeliest ways
become the plan; the updates are thrown away.

Here the loss is the squared error against the teacher's velocity alone, relative to its size; the paper's adds a tenth
of the diffusion loss. Unlike the criteria of :mod:`pydit.analysis.criteria` this trains, so it asks for batches and not
for statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pydit.analysis.criteria.base import intervals_without, removal_target
from pydit.analysis.forward import shell_of, velocity
from pydit.arguments import integer, plain, shown
from pydit.distill.progress import step_bar
from pydit.distill.schedule import Budget
from pydit.errors import UserError
from pydit.models import ModelAdapter, get_adapter
from pydit.plan import PruningPlan
from pydit.stats import checks

LOGIT_SCALE = 100.0  # of the paper's code: what an optimiser step moves is felt a hundredfold
FIRST_LOGIT = 0.02


def learn_mask(transformer: nn.Module, make_batches: Callable[[int], Iterator[Any]], *, target: float | int,
               steps: int = 300, group: int = 4, rank: int = 8, lr: float = 1e-3,
               temperature: tuple[float, float] = (4.0, 0.1), seed: int = 0, progress: bool = False) -> PruningPlan:
    """Learn which layers to remove.

    Parameters
    ----------
    transformer : diffusers transformer of a known family, not pruned and not accelerated; it is left as it was.
    make_batches : ``make_batches(0)`` yields training batches, keyword arguments of the forward or pairs of them and
        anything, as for :func:`pydit.distill.distill`.
    target : layers to remove: an integer, or a share of the layers between 0 and 1 (rounded up), spread evenly over the
        groups.
    steps : optimiser steps (Adam), two forwards and one backward of all blocks each.
    group : layers of a local group; the ways to keep k of them are C(group, k).
    rank : of the updates of the linear layers.
    lr : peak learning rate of the updates, ten times that of the logits, with a cosine to zero.
    temperature : of the Gumbel-softmax at the first and the last step, linear between.
    seed : of the draws and the updates.
    progress : show a bar.

    Returns
    -------
    PruningPlan
        Every run of removed layers with the kept layer before it. ``provenance["groups"]`` holds, per group, its
        layers, those removed and the probability of that way.

    Raises
    ------
    UserError
        An option outside its range, more layers than may go (the first of a run of blocks of one class stays), too few
        batches, or a pruned model.
    """
    steps, group, rank = (integer(name, value, least, expected=f"a whole number of at least {least}")
                          for name, value, least in (("steps", steps, 1), ("group", group, 2), ("rank", rank, 1)))
    seed = integer("seed", seed, -2**63, 2**63 - 1, expected="a whole number")
    if not isinstance(temperature, (tuple, list)) or len(temperature) != 2:
        raise UserError(f"temperature: expected two numbers above 0, got {shown(temperature)}")
    for name, number in (("lr", lr), *(("temperature", one) for one in temperature)):
        checks.number(name, number, "a number above 0", lambda x: x > 0)
    adapter = get_adapter(transformer)
    shell, blocks = shell_of(adapter, transformer), adapter.blocks(transformer)
    count = removal_target(target, len(blocks))
    if count is None:
        raise UserError("target: expected a number or share of layers, got none")
    groups = make_groups(len(blocks), count, group, adapter.starts(transformer))
    generator = torch.Generator().manual_seed(seed)
    device = next(transformer.parameters()).device
    options = [_ways(layers, removed, adapter.starts(transformer)).to(device) for layers, removed in groups]
    logits = [nn.Parameter(torch.full((len(ways),), FIRST_LOGIT, device=device)) for ways in options]
    gates = [_Gate(adapter, block) for block in blocks]
    adapter.put_blocks(shell, gates)
    with _low_rank_updates(blocks, rank, generator) as updates:
        optimizer = torch.optim.Adam([{"params": updates.parameters, "lr": lr},
                                      {"params": logits, "lr": 10 * lr}], betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with step_bar(progress, "learn mask", Budget(steps, None), 0) as bar:
            for step, batch in enumerate(_batches(make_batches, steps)):
                wanted = velocity(transformer, batch).float()
                share = step / max(1, steps - 1)
                tau = temperature[0] + share * (temperature[1] - temperature[0])
                keep = torch.cat([_draw(choice, len(wanted), tau, generator) @ ways
                                  for choice, ways in zip(logits, options, strict=True)], 1)
                for layer, gate in enumerate(gates):
                    gate.keep = keep[:, layer]
                updates.active = True
                try:
                    found = shell(**{**batch, "return_dict": False})[0].float()
                finally:
                    updates.active = False
                loss = (found - wanted).square().sum() / wanted.square().sum()
                optimizer.zero_grad()
                loss.backward(inputs=[*updates.parameters, *logits])  # the teacher keeps what gradients it has
                optimizer.step()
                schedule.step()
                bar.update(1)
                bar.set_postfix(loss=f"{loss.item():.3g}")
    rows, removed = [], []
    for (layers, _), choice, ways in zip(groups, logits, options, strict=True):
        best = int(choice.argmax())
        gone = [layer for layer, kept in zip(layers, ways[best].tolist(), strict=True) if not kept]
        rows.append({"layers": list(layers), "removed": gone,
                     "probability": float((LOGIT_SCALE * choice.detach()).softmax(0)[best])})
        removed += gone
    provenance = {"method": "learned mask", "target": plain(target), "removed": removed, "groups": rows,
                  "options": {"steps": steps, "group": group, "rank": rank, "lr": lr,
                              "temperature": list(temperature), "seed": seed}}
    return PruningPlan.from_intervals(len(blocks), intervals_without(removed, len(blocks)), family=adapter.family,
                                      provenance=provenance)


def make_groups(num_layers: int, count: int, group: int, fixed: Sequence[int]) -> list[tuple[range, int]]:
    """Runs of ``group`` layers (the last may be shorter) and how many each gives up: evenly, ``count`` in all.

    The layers of ``fixed`` stay; what a group cannot give up for them the later ones do, then the earlier ones.
    """
    runs = [range(start, min(start + group, num_layers)) for start in range(0, num_layers, group)]
    room = [len(run) - sum(layer in run for layer in fixed) for run in runs]
    if count > sum(room):
        raise UserError(f"target: expected at most {sum(room)} layers, which is all but the first of each run of "
                        f"blocks of one class, got {count}")
    ends = [round(count * run.stop / num_layers) for run in runs]
    shares, owed = [], 0
    for limit, end, start in zip(room, ends, [0, *ends[:-1]], strict=True):
        shares.append(min(limit, end - start + owed))
        owed += end - start - shares[-1]
    for index in reversed(range(len(runs))):
        more = min(owed, room[index] - shares[index])
        shares[index], owed = shares[index] + more, owed - more
    return list(zip(runs, shares, strict=True))


def _ways(layers: range, removed: int, fixed: Sequence[int]) -> torch.Tensor:
    """Masks [ways, layers] of every set of ``removed`` layers that may go; 1 keeps a layer."""
    free = [i for i, layer in enumerate(layers) if layer not in fixed]
    rows = []
    for gone in itertools.combinations(free, removed):
        rows.append([float(i not in gone) for i in range(len(layers))])
    return torch.tensor(rows)


def _draw(logits: torch.Tensor, samples: int, tau: float, generator: torch.Generator) -> torch.Tensor:
    """One-hot rows [samples, ways], straight-through: forward the draw, backward the softmax at ``tau``."""
    uniform = torch.rand(samples, len(logits), generator=generator).clamp(1e-9, 1 - 1e-7).to(logits.device)
    soft = ((LOGIT_SCALE * logits - (-uniform.log()).log()) / tau).softmax(1)
    hard = F.one_hot(soft.argmax(1), len(logits)).to(soft)
    return hard + soft - soft.detach()


class _Gate(nn.Module):
    """A block that every sample takes or leaves: ``m B(x) + (1 - m) x`` in both streams."""

    def __init__(self, adapter: ModelAdapter, block: nn.Module) -> None:
        super().__init__()
        self.block, self.io = block, adapter.block_io
        self.keep: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        given = {**dict(zip(self.io.inputs, args, strict=False)), **kwargs}
        names = (self.io.text, self.io.image) if self.io.text_first else (self.io.image, self.io.text)
        return tuple(None if after is None else torch.lerp(given[name], after, self.keep.to(after)[:, None, None])
                     for name, after in zip(names, self.block(*args, **kwargs), strict=True))


class _Updates:
    """The low-rank updates of some linear layers, which count while ``active``."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.active = False

    def add(self, layer: nn.Linear, rank: int, generator: torch.Generator) -> Any:
        """Give ``layer`` an update of its own, zero at first; returns the hook's handle."""
        place = {"device": layer.weight.device, "dtype": torch.float32}
        down = nn.Parameter((torch.randn(rank, layer.in_features, generator=generator)
                             / layer.in_features ** 0.5).to(**place))
        up = nn.Parameter(torch.zeros(layer.out_features, rank, **place))
        self.parameters += [down, up]

        def hook(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            return output + (2 * F.linear(F.linear(args[0].float(), down), up)).to(output) if self.active else None

        return layer.register_forward_hook(hook)


@contextmanager
def _low_rank_updates(blocks: Iterable[nn.Module], rank: int, generator: torch.Generator) -> Iterator[_Updates]:
    """Updates of every linear layer of ``blocks``, whose own weights get no gradient; both end with the context."""
    blocks, updates = list(blocks), _Updates()
    trained = [p for block in blocks for p in block.parameters() if p.requires_grad]
    handles = []
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for block in blocks:
            handles += [updates.add(layer, rank, generator)
                        for layer in block.modules() if isinstance(layer, nn.Linear)]
        yield updates
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _batches(make_batches: Callable[[int], Iterator[Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    count = 0
    for item in itertools.islice(make_batches(0), steps):
        count += 1
        yield item[0] if isinstance(item, tuple) else item
    if count < steps:
        raise UserError(f"make_batches: expected at least {steps} batches, one a step, got {count}")
