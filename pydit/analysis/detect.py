"""Statistics -> plan, in one step (:func:`detect`) or two (:func:`score`, then :func:`select`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria import Criterion, Scores, get_criterion
from pydit.errors import UserError
from pydit.plan import PruningPlan


def score(stats: ActivationStats, method: str = "ppcl", **options: Any) -> Scores:
    """Evaluate a criterion; the matrices can be saved, plotted, and given to :func:`select` any number of times."""
    return get_criterion(method, **options).score(stats)


def select(scores: Scores, *, target: float | int | None = None, **options: Any) -> PruningPlan:
    """Choose intervals from scores.

    Options that the scores depend on are those of :func:`score`; giving another value here raises UserError.
    """
    for name, value in scores.options.items():
        if name in options and options[name] != value:
            raise UserError(f"{name}: expected {value!r} as in the scores, got {options[name]!r}; score again")
    return get_criterion(scores.method, **{**scores.options, **options}).select(scores, target)


def detect(stats: ActivationStats, method: str = "ppcl", *, target: float | int | None = None,
           **options: Any) -> PruningPlan:
    """Find redundant intervals.

    Parameters
    ----------
    stats : from :func:`pydit.analysis.collect`.
    method : a registered criterion; ``"ppcl"`` is :class:`pydit.analysis.criteria.PPCL`.
    target : layers to remove: an integer, or a share of the layers between 0 and 1 (rounded up). None takes all that
        the criterion finds.
    options : of the criterion, for example ``reference="fixed"`` or ``selection="optimal"``.

    Returns
    -------
    PruningPlan
        Its ``provenance`` holds the method, the options and the score of every interval.
    """
    criterion = get_criterion(method, **options)
    return decide(criterion, criterion.score(stats), stats, target)


def decide(criterion: Criterion, scores: Scores, stats: ActivationStats, target: float | int | None) -> PruningPlan:
    """The plan that a criterion selects from its scores of ``stats``, with the images they come from."""
    plan = criterion.select(scores, target)
    return dataclasses.replace(plan, provenance={**plan.provenance, "images": stats.images_seen})
