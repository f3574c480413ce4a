"""Plans of all criteria at one target, side by side, with what each is expected to do to the output."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria import Scores, get_criterion, names
from pydit.analysis.criteria.base import BLIND, removed_layers
from pydit.analysis.detect import decide
from pydit.errors import UserError
from pydit.plan import PruningPlan


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
    """

    name: str
    plan: PruningPlan | None
    note: str = ""
    loss: float | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**vars(self), "plan": None if self.plan is None else self.plan.to_dict()}


def candidates(stats: ActivationStats, *, target: float | int, methods: Iterable[str] | None = None,
               scored: dict[str, Scores] | None = None) -> list[Candidate]:
    """Let criteria choose; least predicted loss first, then those without one, then those without a plan.

    Parameters
    ----------
    target : layers to remove, as for :func:`pydit.analysis.detect`.
    methods : names of criteria; None takes all, and PPCL with both of its selections.
    scored : receives the scores by method, each of which is computed once.
    """
    tries = [(name, {}) for name in (names() if methods is None else methods)]
    if methods is None:
        tries.append(("ppcl", {"selection": "optimal"}))
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
        note = "; ".join(str(w.message) for w in caught if issubclass(w.category, UserWarning))
        found.append(Candidate(name, plan, note, *_predicted(stats, plan)))
    return sorted(found, key=lambda c: (c.plan is None, c.loss is None, c.loss or 0.0, c.name))


def agreement(found: Iterable[Candidate], num_layers: int) -> list[float]:
    """Of every layer, the share of the candidates that remove it: those with a plan that look at the model."""
    plans = [candidate.plan for candidate in found if candidate.plan is not None and candidate.name not in BLIND]
    if not plans:
        return [0.0] * num_layers
    return [sum(layer in removed_layers(plan) for plan in plans) / len(plans) for layer in range(num_layers)]


def _predicted(stats: ActivationStats, plan: PruningPlan) -> tuple[float, float, float] | tuple[()]:
    if stats.ablation is None:
        return ()
    errors = stats.ablation.relative(1000)[:, sorted(removed_layers(plan))].sum(1)
    low, high = torch.quantile(errors[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(errors[0]), low, high
