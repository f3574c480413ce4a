"""Which blocks the demo merges, and what the new blocks start from: every candidate is pruned and measured.

The candidates are the plans of PPCL's criterion (the paper's rule where it finds enough layers, and the least loss at
the target) and the greedy search, each with every initialisation. The least error of the velocity, on batches that
neither the search nor the refit has seen, decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from pydit.analysis import ActivationStats, detect, greedy_search, velocity_error
from pydit.demo import data
from pydit.errors import UserError
from pydit.plan import PruningPlan
from pydit.pruning import prune
from pydit.reporting import console

INITS = ("first", "probe")


def choose(pipe, stats: ActivationStats, *, target: float, batches: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Measure all candidates.

    Parameters
    ----------
    pipe, stats : the teacher's pipeline and its statistics.
    target : least share of the blocks to remove.
    batches, batch_size, seed : of the calibration batches of each of the three uses (search, refit, decision).

    Returns
    -------
    Plain data: ``plan`` and ``init`` of the best, and ``candidates``, one dict per pair with ``method``, ``init``,
    ``intervals`` and ``velocity_error`` (relative squared error), best first.
    """
    teacher = pipe.transformer
    plans: dict[str, PruningPlan] = {}
    try:
        plans["ppcl"] = detect(stats, method="ppcl", target=target)
    except UserError as error:  # the paper's rule finds too few on this teacher
        console.line(str(error))
    plans["ppcl, least loss"] = detect(stats, method="ppcl", target=target, selection="optimal")
    plans["greedy search"] = greedy_search(teacher, take(pipe, max(1, batches // 2), batch_size, seed), target=target)
    judges = take(pipe, batches, batch_size, seed + 2)
    rows = []
    for method, plan in plans.items():
        for init in INITS:
            student = start(pipe, plan, init, batches=batches, batch_size=batch_size, seed=seed)
            rows.append({"method": method, "init": init, "intervals": [list(pair) for pair in plan.intervals],
                         "velocity_error": velocity_error(teacher, student, judges)})
    rows.sort(key=lambda row: row["velocity_error"])
    for row in rows:
        console.line(f"velocity error {row['velocity_error']:.4f}   {row['method']}, init {row['init']}")
    best = rows[0]
    return {"plan": plans[best["method"]].to_dict(), "init": best["init"], "candidates": rows}


def start(pipe, plan: PruningPlan, init: str, *, batches: int, batch_size: int, seed: int) -> torch.nn.Module:
    """The pruned model that distillation starts from; the same for the same arguments."""
    few = take(pipe, batches, batch_size, seed + 1) if init == "probe" else None
    return prune(pipe.transformer, plan, init=init, batches=few, tokens_per_batch=512)


def take(pipe, count: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """Calibration batches of training prompts."""
    stream: Iterator = data.make_batches(pipe, batch_size=batch_size, seed=seed)
    return [batch for batch, _ in itertools.islice(stream, count)]
