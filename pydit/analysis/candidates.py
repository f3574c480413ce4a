"""Plans of all criteria at one target, side by side, with what each is expected to do to the output."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria import Scores, get_criterion, names
from pydit.analysis.criteria.base import BLIND, removal_target, removed_layers
from pydit.analysis.detect import decide, require_stats
from pydit.errors import UserError
from pydit.plan import H200_FLOPS, PruningPlan


@dataclass(frozen=True)
class Candidate:
    """What one criterion proposes.

    Attributes
    ----------
    name : of the criterion, with its option where it appears twice.
    plan : or None if it has none.
    note : why it has none, or its warnings; "" otherwise.
    loss : predicted relative squared error of the output right after pruning, the sum over removed blocks of the error
        without that block alone; None without an ablation.
    low, high : 95 % bootstrap interval of ``loss`` over calibration batches, or None.
    parameters : of the pruned transformer; None where the statistics do not know the configuration.
    flops : of its blocks for one image at 1328 x 1328, as a share of the teacher's.
    latency_ms : predicted, of one forward of that image: those FLOPs at the peak of an H200's data sheet, so the least
        that they can take there; nothing about latency has been measured.
    """

    name: str
    plan: PruningPlan | None
    note: str = ""
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    parameters: int | None = None
    flops: float | None = None
    latency_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**vars(self), "plan": None if self.plan is None else self.plan.to_dict()}


def candidates(stats: ActivationStats, *, target: float | int, methods: Iterable[str] | None = None,
               scored: dict[str, Scores] | None = None) -> list[Candidate]:
    """Let criteria choose; least predicted loss first, then those without one, then those without a plan.

    Parameters
    ----------
    target : layers to remove, as for :func:`pydit.analysis.detect`.
    methods : names of criteria; None takes all, and PPCL with both of its selections and, where there is an ablation,
        with a budget that does not look at it.
    scored : receives the scores by method, each of which is computed once.
    """
    require_stats(stats)
    removal_target(target, stats.num_layers)  # one that no criterion can reach is not the criteria's fault
    tries = [(name, {}) for name in (names() if methods is None else methods)]
    if methods is None:
        tries.append(("ppcl", {"selection": "optimal"}))
        if stats.ablation is not None:
            tries.append(("ppcl", {"budget": "cka"}))
    scored = {} if scored is None else scored
    found = []
    for method, options in tries:
        name = " ".join((method, *options.values()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                criterion = get_criterion(method, **options)
                if method not in scored:  # the options tried here are of the selection
                    scored[method] = criterion.score(stats)
                plan = decide(criterion, scored[method], stats, target)
            except UserError as error:
                found.append(Candidate(name, None, str(error)))
                continue
        note = "; ".join(str(w.message).removeprefix(f"{method}: ") for w in caught
                         if issubclass(w.category, UserWarning))
        found.append(Candidate(name, plan, note, *_predicted(stats, plan), **_price(stats, plan)))
    return sorted(found, key=lambda c: (c.plan is None, c.loss is None, c.loss or 0.0, c.name))


def agreement(found: Iterable[Candidate], num_layers: int) -> list[float]:
    """Of every layer, the share of the criteria that remove it: those with a plan that look at the model.

    Candidates of one criterion share its vote.
    """
    votes: dict[str, list[set[int]]] = {}
    for candidate in found:
        method = candidate.name.split()[0]
        if candidate.plan is not None and method not in BLIND:
            votes.setdefault(method, []).append(removed_layers(candidate.plan))
    return [sum(sum(layer in removed for removed in plans) / len(plans) for plans in votes.values())
            / max(len(votes), 1) for layer in range(num_layers)]


def _price(stats: ActivationStats, plan: PruningPlan) -> dict[str, Any]:
    if stats.config is None:
        return {}
    whole = PruningPlan(plan.family, plan.num_layers)
    flops = plan.num_flops(stats.config)
    return {"parameters": plan.num_parameters(stats.config), "flops": flops / whole.num_flops(stats.config),
            "latency_ms": 1e3 * flops / H200_FLOPS}


def _predicted(stats: ActivationStats, plan: PruningPlan) -> tuple[float, float, float] | tuple[()]:
    if stats.ablation is None:
        return ()
    errors = stats.ablation.relative(1000)[:, sorted(removed_layers(plan))].sum(1)
    low, high = torch.quantile(errors[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(errors[0]), low, high
