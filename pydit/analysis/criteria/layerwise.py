"""Criteria that give every layer one number and remove the layers with the smallest.

Local ones look at what a block does to its own streams: ``bi``, ``rel_l1``. Global ones look at the model's output with
the block left out, and need statistics with an ablation: ``amber``, ``laptop``, ``hierarchical``. ``uniform`` and
``random`` look at nothing and show what the others are worth.

Scores: ``score``, ``score_low`` and ``score_high`` (95 %), float64 [L], and ``resamples`` [R, L], the score under R
bootstrap draws of calibration batches, the same draws for all layers. A decision is inside the noise when the last
layer removed and the first layer kept could as well change places; the plan says so under ``margin``.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from pydit.analysis.ablation import Ablation
from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria.base import Scores, intervals_without, register, removal_target
from pydit.arguments import as_integer, make_plain, plain, shown
from pydit.errors import UserError
from pydit.models.adapter import STREAMS
from pydit.plan import PruningPlan
from pydit.stats import checks, clip_outliers
from pydit.stats.cka import bootstrap_ratios

_MOST_DRAWS = 100_000  # they are kept, for every layer
_SELECTION_OPTIONS = ("protect_first", "protect_last", "sizes", "seed")  # the scores do not depend on them


@dataclass(frozen=True)
class Layerwise(ABC):
    """Options of all of them.

    Parameters
    ----------
    protect_first : layers at the start that are kept, at least 1: a removed layer needs a kept one before it.
    protect_last : layers at the end that are kept.
    resamples : bootstrap draws.
    """

    protect_first: int = 1
    protect_last: int = 0
    resamples: int = 1000
    matrices: ClassVar = {**{name: (True, "L") for name in ("score", "score_low", "score_high")},
                          "resamples": (True, -2, "L"), "sizes": (False, "L")}

    def __post_init__(self) -> None:
        make_plain(self)
        for name, least, most in (("protect_first", 1, math.inf), ("protect_last", 0, math.inf),
                                  ("resamples", 2, _MOST_DRAWS)):
            value = getattr(self, name)
            if as_integer(value) is None or not least <= value <= most:
                raise UserError(f"{name}: expected a whole number of at least {least}"
                                + (f", at most {most}" if most < math.inf else "") + f", got {shown(value)}")

    def score(self, stats: ActivationStats) -> Scores:
        """The score of every layer with its interval."""
        draws = self.draws(stats)
        return Scores(self.method, stats.family, stats.num_layers, {
            name: value for name, value in asdict(self).items() if name not in _SELECTION_OPTIONS}, {
            "score": draws[0], "score_low": torch.quantile(draws[1:], 0.025, dim=0),
            "score_high": torch.quantile(draws[1:], 0.975, dim=0), "resamples": draws[1:].contiguous()}, stats.starts)

    @abstractmethod
    def draws(self, stats: ActivationStats) -> torch.Tensor:
        """Scores [1 + R, L]: over all batches, then over each draw of them."""

    def select(self, scores: Scores, target: float | int | None = None) -> PruningPlan:
        """Remove the ``target`` layers with the least score.

        Raises
        ------
        UserError
            No target, or more layers than are not protected.
        """
        count = self._count(scores, target)
        values = scores.matrices["score"]
        order = sorted(self._allowed(scores), key=lambda layer: (float(values[layer]), layer))
        return self._plan(scores, target, order[:count], self._margin(scores, order, count))

    def _allowed(self, scores: Scores) -> list[int]:
        """The layers that may go. The first of a run of blocks may not: no kept one of its class stands before it."""
        return [k for k in range(self.protect_first, scores.num_layers - self.protect_last) if k not in scores.starts]

    def _count(self, scores: Scores, target: float | int | None) -> int:
        count = removal_target(target, scores.num_layers)
        if count is None:
            raise UserError(f"target: expected a number or share of layers for method {scores.method!r}, got none")
        if count > len(self._allowed(scores)):
            raise UserError(f"target: expected at most the {len(self._allowed(scores))} layers that "
                            f"protect_first and protect_last leave removable, got {count}")
        return count

    def _margin(self, scores: Scores, order: list[int], count: int) -> dict | None:
        """How clearly the best layer kept lies above the worst one removed, from paired draws."""
        if count == len(order):
            return None
        removed, kept = order[count - 1], order[count]
        draws = scores.matrices["resamples"]
        low, high = torch.quantile(draws[:, kept] - draws[:, removed],
                                   torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        values = scores.matrices["score"]
        margin = {"removed": removed, "kept": kept, "difference": float(values[kept] - values[removed]), "low": low,
                  "high": high, "within_noise": low <= 0}
        if margin["within_noise"]:
            warnings.warn(f"{scores.method}: layer {removed} is removed and layer {kept} kept, but the difference of "
                          f"their scores is inside the noise ({margin['difference']:.3g}, 95 % {low:.3g} to "
                          f"{high:.3g}); more calibration batches would tell", stacklevel=3)
        return margin

    def _plan(self, scores: Scores, target: float | int | None, removed: list[int], margin: dict | None) -> PruningPlan:
        matrices = scores.matrices
        names = {"score": "score", "low": "score_low", "high": "score_high"}
        provenance = {"method": scores.method, "options": asdict(self), "target": plain(target),
                      "removed": sorted(removed),
                      "scores": [{"layer": layer, **{key: float(matrices[name][layer]) for key, name in names.items()}}
                                 for layer in range(scores.num_layers)]}
        if margin is not None:
            provenance["margin"] = margin
        return PruningPlan.from_intervals(scores.num_layers, intervals_without(removed, scores.num_layers),
                                          family=scores.family, provenance=provenance)


# What a block does to its streams --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Local(Layerwise):
    """Scores from a block's input and output at the sampled tokens.

    Parameters
    ----------
    streams : ``"mean"`` of both, or one stream. Text counts up to the last layer whose text output the model reads;
        after it the image stands for it.
    clip : :func:`pydit.stats.clip_outliers` first, or None. A cosine, or a norm, of features with massive channels says
        little about the other channels.
    """

    streams: str = "mean"
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streams not in ("mean", *STREAMS):
            raise UserError(f"streams: expected one of mean, {', '.join(STREAMS)}, got {self.streams!r}")
        if self.clip is not None:
            checks.number("clip", self.clip, "a number above 0 or None", lambda x: x > 0)

    def draws(self, stats: ActivationStats) -> torch.Tensor:
        blind = "text" in self._streams and not stats.last_text_used  # no output shows what its last block does
        found = {stream: self._of_stream(stats, stream) for stream in (STREAMS if blind else self._streams)}
        if blind:
            found["text"][:, -1] = found["image"][:, -1]
        return sum(found[stream] for stream in self._streams) / len(self._streams)

    @property
    def _streams(self) -> tuple[str, ...]:
        return STREAMS if self.streams == "mean" else (self.streams,)

    def _of_stream(self, stats: ActivationStats, stream: str) -> torch.Tensor:
        batches = [batch for batch in stats.samples[stream] if batch.shape[1]]
        if not batches:
            raise UserError(f"stats: expected a sample batch with {stream} tokens, got none")
        values = torch.stack([torch.stack([self.compare(*pair).mean() for pair in self._pairs(batch)])
                              for batch in batches])
        counts = torch.tensor([[float(batch.shape[1])] for batch in batches], dtype=torch.float64)
        return bootstrap_ratios(values * counts, counts, self.resamples)

    @abstractmethod
    def compare(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Of every token [n, C] float64: how much the block matters to it, [n]."""

    def _pairs(self, batch: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        states = batch.double()
        if self.clip is not None:
            states = clip_outliers(states, self.clip)
        return itertools.pairwise(states)


@register("bi")
@dataclass(frozen=True)
class BlockInfluence(_Local):
    """1 - cosine of a token before and after the block, on average (ShortGPT, arXiv 2403.03853)."""

    method = "bi"

    def compare(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1, eps=1e-30)


@register("rel_l1")
@dataclass(frozen=True)
class RelativeL1(_Local):
    """|after - before|_1 / |before|_1 of a token, on average."""

    method = "rel_l1"

    def compare(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return (after - before).abs().sum(-1) / before.abs().sum(-1).clamp_min(1e-30)


# What the output does without a block ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global(Layerwise):
    def draws(self, stats: ActivationStats) -> torch.Tensor:
        """Relative squared error of the output: sums of weighted losses over sums of weighted squared norms."""
        ablation = stats.ablation
        if ablation is None:
            raise UserError(f"stats: expected an ablation for method {self.method!r}, got none; "
                            "collect with with_ablation=True (pydit analyze --ablate)")
        weights = self.weights(ablation)
        return ablation.relative(self.resamples, weights)

    def weights(self, ablation: Ablation) -> torch.Tensor:
        """Of every image, [N, 1]."""
        return torch.ones(len(ablation.norms), 1, dtype=torch.float64)


@register("amber")
@dataclass(frozen=True)
class Amber(_Global):
    """Timestep-weighted change of the output (Amber-Image style): sum w_t |v - v without l|^2, over that of w_t |v|^2.

    The weights are not published beyond being larger at high noise; here w_t = t ^ timestep_power.

    Parameters
    ----------
    timestep_power : 0 weighs all timesteps alike.
    """

    timestep_power: float = 1.0
    method = "amber"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("timestep_power", self.timestep_power, "a number of 0 or more", lambda x: x >= 0)

    def weights(self, ablation: Ablation) -> torch.Tensor:
        return ablation.timesteps[:, None] ** self.timestep_power


@register("laptop")
@dataclass(frozen=True)
class Laptop(_Global):
    """Least sum of single-block losses for a number of parameters (LAPTOP-Diff, arXiv 2404.11098).

    The sum stands for the loss of leaving out all of them, as if their effects were independent;
    :func:`pydit.analysis.joint_removal` says how far that holds for the plan chosen. The target counts parameters: a
    share of those of all blocks, or as many as that number of average blocks has.

    Parameters
    ----------
    sizes : parameters of every block; None: those of the model that the statistics are of, where they know its
        configuration (the score ``sizes``), and otherwise all blocks are alike.
    """

    sizes: tuple[int, ...] | None = None
    method = "laptop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes is not None and not (isinstance(self.sizes, (list, tuple)) and self.sizes and all(
                type(size) is int and 1 <= size < 2**53 for size in self.sizes)):
            raise UserError(f"sizes: expected a list of positive whole numbers or None, got {self.sizes!r}"[:300])

    def score(self, stats: ActivationStats) -> Scores:
        scores = super().score(stats)
        if stats.config is not None:
            plan = PruningPlan(stats.family, stats.num_layers)
            scores.matrices["sizes"] = torch.tensor(plan.block_parameters(stats.config), dtype=torch.float64)
        return scores

    def select(self, scores: Scores, target: float | int | None = None) -> PruningPlan:
        count, layers = self._count(scores, target), scores.num_layers
        sizes = self.sizes or [int(n) for n in scores.matrices.get("sizes", torch.ones(layers))]
        if len(sizes) != layers:
            raise UserError(f"sizes: expected {layers} positive numbers, got {len(sizes)}")
        budget = target * sum(sizes) if isinstance(target, float) else count * sum(sizes) / layers
        losses = scores.matrices["score"].tolist()
        removed = least_loss(losses, list(sizes), self._allowed(scores), budget)
        if removed is None:
            raise UserError(f"target: expected at most the parameters of the {len(self._allowed(scores))} layers that "
                            f"protect_first and protect_last leave removable, got {target!r}")
        order = removed + sorted((k for k in self._allowed(scores) if k not in removed), key=losses.__getitem__)
        return self._plan(scores, target, removed, self._margin(scores, order, len(removed)))


def least_loss(losses: list[float], sizes: list[int], allowed: list[int], budget: float) -> list[int] | None:
    """The 0-1 knapsack: layers of at least ``budget`` size together and the least sum of losses, worst last.

    Exact: of the sets of the layers so far, one that another beats in both size and loss leads nowhere, and the others
    go on. None if nothing is enough.
    """
    needed = budget * (1 - 1e-9)
    front: list[tuple[float, float, Any]] = [(0.0, 0.0, None)]  # loss, size up to what is needed, (layer, those before)
    for layer in sorted(allowed, key=lambda k: (losses[k], k)):
        longer = [(loss + losses[layer], min(size + sizes[layer], needed), (layer, chosen))
                  for loss, size, chosen in front if size < needed]
        found, front, most = sorted(front + longer, key=lambda one: (one[0], -one[1])), [], -1.0
        for one in found:
            if one[1] > most:
                front.append(one)
                most = one[1]
    _, size, chosen = front[-1]
    if size < needed:
        return None
    layers = []
    while chosen is not None:
        layer, chosen = chosen
        layers.append(layer)
    return sorted(layers, key=losses.__getitem__)


@register("hierarchical")
@dataclass(frozen=True)
class Hierarchical(_Global):
    """Change of the output over W_pos = exp((l - L) / L), so that later blocks go first (HierarchicalPrune).

    arXiv 2508.04663.
    The paper multiplies a negative score by W_pos, which has the opposite effect of the one it describes; this follows
    the description. Its change is one of a quality metric, here it is that of the output.
    """

    method = "hierarchical"

    def draws(self, stats: ActivationStats) -> torch.Tensor:
        position = torch.arange(stats.num_layers, dtype=torch.float64)
        return super().draws(stats) / torch.exp((position - stats.num_layers) / stats.num_layers)


# Nothing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blind(Layerwise):
    def draws(self, stats: ActivationStats) -> torch.Tensor:
        return torch.zeros(1 + self.resamples, stats.num_layers, dtype=torch.float64)

    def _margin(self, scores: Scores, order: list[int], count: int) -> None:
        return None


@register("uniform")
@dataclass(frozen=True)
class Uniform(_Blind):
    """Layers at equal distances."""

    method = "uniform"

    def select(self, scores: Scores, target: float | int | None = None) -> PruningPlan:
        count, allowed = self._count(scores, target), self._allowed(scores)
        removed = [allowed[math.floor((i + 0.5) * len(allowed) / count)] for i in range(count)]
        return self._plan(scores, target, removed, None)


@register("random")
@dataclass(frozen=True)
class Random(_Blind):
    """Layers drawn at random.

    Parameters
    ----------
    seed : of the draw.
    """

    seed: int = 0
    method = "random"

    def select(self, scores: Scores, target: float | int | None = None) -> PruningPlan:
        count, allowed = self._count(scores, target), self._allowed(scores)
        order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return self._plan(scores, target, [allowed[i] for i in order[:count]], None)
