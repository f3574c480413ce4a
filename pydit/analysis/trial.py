"""Two looks at a plan beyond its scores: what leaving out all its blocks does at once, and how fast training helps.

Criteria that rank single blocks add up losses as if blocks were independent, and a low loss right after pruning does
not predict the quality after training (TinyFusion, Fang et al. 2025). Both can be checked on a few batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from pydit.analysis.ablation import Ablation, ablate
from pydit.analysis.criteria.base import removed_layers
from pydit.analysis.forward import shell_of
from pydit.analysis.search import velocity_error
from pydit.distill import DistillConfig, distill
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.models.adapter import require_batches, require_plan
from pydit.plan import PruningPlan
from pydit.pruning import prune


def joint_removal(transformer: nn.Module, plan: PruningPlan, batches: Iterable[Mapping[str, Any]], *,
                  ablation: Ablation | None = None) -> dict[str, float]:
    """Leave out all blocks of a plan but the first of each interval: predicted and measured loss.

    Parameters
    ----------
    transformer : the teacher; only read.
    plan : of it.
    batches : keyword-argument dicts for ``transformer.forward``.
    ablation : of the same batches, if there is one (:func:`pydit.analysis.ablate`); else it is made here.

    Returns
    -------
    dict
        ``predicted``: the sum of the relative squared errors of the output with one of the blocks left out;
        ``measured``: that with all of them left out; ``ratio``: measured over predicted, 1 if the blocks' effects are
        independent, above 1 if they make each other worse (inf if the prediction is 0).

    Raises
    ------
    UserError
        The plan or the ablation does not fit the model, or there is no batch.
    """
    require_plan(plan)
    plan.require_match(transformer)
    adapter = get_adapter(transformer)
    removed, blocks = removed_layers(plan), adapter.blocks(transformer)
    if ablation is not None:
        found = f"with {ablation.losses.shape[1]}" if isinstance(ablation, Ablation) else type(ablation).__name__
        if found != f"with {len(blocks)}":
            raise UserError(f"ablation: expected one of a model with {len(blocks)} layers, got {found}")
    kept = [block for k, block in enumerate(blocks) if k not in removed]
    require_batches(batches)
    batches = list(batches)
    measured = velocity_error(transformer, adapter.put_blocks(shell_of(adapter, transformer), kept), batches)
    singles = ablate(transformer, batches) if ablation is None else ablation
    predicted = float(singles.losses[:, sorted(removed)].sum() / singles.norms.sum())
    return {"predicted": predicted, "measured": measured,
            "ratio": measured / predicted if predicted else (1.0 if not measured else float("inf"))}


def recoverability(transformer: nn.Module, plans: Mapping[str, PruningPlan],
                   make_batches: Callable[[int], Iterator[Mapping[str, Any]]], *, steps: int = 50,
                   judge: Iterable[Mapping[str, Any]], config: DistillConfig | None = None,
                   progress: bool = False) -> list[dict[str, Any]]:
    """Prune by each plan, train a little, and see which student is best then.

    Parameters
    ----------
    transformer : the teacher; not changed.
    plans : by name.
    make_batches : ``make_batches(start)`` yields training batches from number ``start`` on, as for
        :func:`pydit.distill.distill`.
    steps : of output distillation, the same for every plan.
    judge : batches on which the students are judged; not among the training batches.
    config : other settings of the training.
    progress : show a bar for each plan.

    Returns
    -------
    list of dict
        ``plan`` (its name), ``before``, ``after`` (:func:`pydit.analysis.velocity_error`) and ``rank_before``,
        ``rank_after`` from 1; best after training first.
    """
    if not isinstance(plans, Mapping) or not plans:
        raise UserError(f"plans: expected at least one by name, got {'none' if plans == {} else type(plans).__name__}")
    require_batches(judge)
    judge = list(judge)
    config = dataclasses.replace(config or DistillConfig(), layers_steps=0, output_steps=steps)
    rows = []
    for name, plan in plans.items():
        student = prune(transformer, plan)
        before = velocity_error(transformer, student, judge)
        distill(transformer, student, make_batches, config, progress=progress)
        rows.append({"plan": name, "before": before, "after": velocity_error(transformer, student, judge)})
    for key in ("before", "after"):
        for rank, row in enumerate(sorted(rows, key=lambda row: row[key]), 1):
            row[f"rank_{key}"] = rank
    return sorted(rows, key=lambda row: row["rank_after"])
