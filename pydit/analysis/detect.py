"""Statistics -> plan, in one step (:func:`detect`) or two (:func:`score`, then :func:`select`)."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from pydit.analysis.activations import ActivationStats
from pydit.analysis.criteria import Criterion, Scores, get_criterion
from pydit.analysis.criteria.base import BLIND, DEAF, removed_layers
from pydit.errors import UserError
from pydit.plan import PruningPlan


def score(stats: ActivationStats, method: str = "ppcl", **options: Any) -> Scores:
    """Evaluate a criterion; the matrices can be saved, plotted, and given to :func:`select` any number of times."""
    require_stats(stats)
    return get_criterion(method, **options).score(stats)


def select(scores: Scores, *, target: float | int | None = None, **options: Any) -> PruningPlan:
    """Choose intervals from scores.

    Options that the scores depend on are those of :func:`score`; giving another value here raises UserError.
    """
    if not isinstance(scores, Scores):
        raise UserError(f"scores: expected Scores, got {type(scores).__name__}")
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
        Its ``provenance`` holds the method, the options and the score of every interval; see also :func:`decide`.
    """
    require_stats(stats)
    criterion = get_criterion(method, **options)
    return decide(criterion, criterion.score(stats), stats, target)


def decide(criterion: Criterion, scores: Scores, stats: ActivationStats, target: float | int | None) -> PruningPlan:
    """The plan that a criterion selects from its scores of ``stats``, with the images they come from.

    Where the statistics hold an ablation, ``provenance["output"]`` compares the plan's predicted error of the output
    with the least that as many layers can have, and a UserWarning says when the criterion was deaf to the output.
    """
    plan = criterion.select(scores, target)
    more: dict[str, Any] = {"images": stats.images_seen}
    removed = removed_layers(plan)
    if stats.ablation is not None and removed:
        errors = stats.ablation.relative(1)[0].tolist()
        least = sorted((k for k in range(stats.num_layers) if k not in stats.starts), key=errors.__getitem__)
        found = {"predicted": sum(errors[k] for k in removed), "least": sum(errors[k] for k in least[:len(removed)])}
        more["output"] = found
        if found["predicted"] > DEAF * found["least"] and scores.method not in BLIND:
            worst = max(removed, key=errors.__getitem__)
            warnings.warn(f"{scores.method} does not hear the output here: leaving out layer {worst} alone changes it "
                          f"by {errors[worst]:.3g} (squared, relative), all {len(removed)} layers by "
                          f"{found['predicted']:.3g} if effects add up, those that laptop and amber look for by "
                          f"{found['least']:.3g}", stacklevel=3)
    return dataclasses.replace(plan, provenance={**plan.provenance, **more})


def require_stats(stats: Any) -> None:
    """UserError unless ``stats`` are statistics."""
    if not isinstance(stats, ActivationStats):
        raise UserError(f"stats: expected ActivationStats, got {type(stats).__name__}")
