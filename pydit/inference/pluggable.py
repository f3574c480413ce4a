"""Which of a pruned model's intervals to run: subsets from the smallest model up, and the one that meets a budget.

Any subset of a student's units may run (``student.set_active``), 2^k of them without retraining. :func:`fallback_order`
measures a chain of k + 1, each of which gives one more unit back to the teacher, and :func:`choose` picks from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pydit import files
from pydit.errors import FormatError, UserError
from pydit.families import FAMILIES, BlockSpec
from pydit.models import get_adapter
from pydit.plan import PruningPlan

_FORMAT, _VERSION = "pydit-fallback-order", 1


@dataclass(frozen=True)
class Subset:
    """One way to run a pruned model.

    active : the units that run the student's blocks, as ``set_active`` takes them.
    parameters : that a forward uses. flops : of the blocks for one image.
    error : squared error of the model's output against the teacher's, relative to the teacher's squared output.
    """

    active: tuple[tuple[int, int], ...]
    parameters: int
    flops: int
    error: float


def resources(plan: PruningPlan, config: Mapping[str, Any], active: Iterable[Sequence[int]], *,
              image_tokens: int = 6889, text_tokens: int = 512) -> tuple[int, int]:
    """(parameters, FLOPs of the blocks for one image) of a student with these units active.

    Parameters
    ----------
    config : the teacher's.
    """
    family = FAMILIES[plan.family]
    running = {tuple(unit) for unit in active}
    idle = {layer for start, end in plan.units if (start, end) not in running for layer in range(start, end + 1)}
    specs = [spec for spec in plan.blocks if spec.source[0] not in idle]
    specs += [BlockSpec((layer,)) for layer in sorted(idle)]
    return (family.other_parameters(config) + sum(family.block_parameters(config, spec) for spec in specs),
            sum(family.block_flops(config, spec, image_tokens, text_tokens) for spec in specs))


@torch.no_grad()
def fallback_order(student: nn.Module, batches: Iterable[Mapping[str, Any]], *, image_tokens: int = 6889,
                   text_tokens: int = 512) -> list[Subset]:
    """A chain of subsets from every unit active to none, each giving one more unit back to the teacher.

    Greedy: the next unit is the one whose return lowers the output's error most for what it adds in FLOPs. With k units
    it takes k (k + 1) / 2 + 1 passes over the batches.

    Parameters
    ----------
    student : made by ``pydit.prune``, with the teacher's layers attached. Its active units are put back afterwards.
    batches : forward arguments; kept in a list.
    image_tokens, text_tokens : of the image that FLOPs are given for.

    Returns
    -------
    list of Subset, smallest model first; the last is the teacher, with an error of 0 where kept blocks are untrained.

    Raises
    ------
    UserError
        Another model, no batches, or teacher layers that are not attached.
    """
    if not hasattr(student, "plan") or not hasattr(student, "set_active"):
        raise UserError(f"student: expected a model made by pydit.prune, got {type(student).__name__}")
    batches, plan = list(batches), student.plan
    if not batches:
        raise UserError("batches: expected at least one batch, got none")
    config = get_adapter(student).teacher_config(student)
    before = student.active

    def outputs(active: Iterable[tuple[int, int]]) -> list[torch.Tensor]:
        student.set_active(active)
        return [student(**{**batch, "return_dict": False})[0].double() for batch in batches]

    try:
        targets = outputs([])
        total = sum(float(target.square().sum()) for target in targets)

        def measured(active: Iterable[tuple[int, int]]) -> Subset:
            active = tuple(sorted(active))
            error = sum(float((found - target).square().sum())
                        for found, target in zip(outputs(active), targets, strict=True))
            return Subset(active, *resources(plan, config, active, image_tokens=image_tokens, text_tokens=text_tokens),
                          error / total if total else 0.0)

        chain = [measured(plan.units)]
        while chain[-1].active:
            last = chain[-1]
            options = [measured(set(last.active) - {unit}) for unit in last.active]
            chain.append(min(options, key=lambda subset: (
                (subset.error - last.error) / max(subset.flops - last.flops, 1), subset.error)))
        return chain
    finally:
        student.set_active(before)


def choose(subsets: Sequence[Subset], *, max_parameters: float = math.inf, max_flops: float = math.inf,
           max_error: float = math.inf) -> Subset:
    """The subset that meets a budget.

    With ``max_error`` the cheapest (least FLOPs) of those within all limits, otherwise the most accurate.

    Raises
    ------
    UserError
        None is within the limits; the message says what the nearest one needs.
    """
    if not subsets:
        raise UserError("subsets: expected those of fallback_order, got none")
    fitting = [s for s in subsets if s.parameters <= max_parameters and s.flops <= max_flops and s.error <= max_error]
    if not fitting:
        small, exact = min(subsets, key=lambda s: s.flops), min(subsets, key=lambda s: s.error)
        raise UserError(f"subsets: expected one within the limits, got none: the smallest has {small.parameters:,} "
                        f"parameters and {small.flops / 1e12:.3g} TFLOP at an error of {small.error:.3g}, the most "
                        f"accurate an error of {exact.error:.3g}")
    if max_error < math.inf:
        return min(fitting, key=lambda s: (s.flops, s.error))
    return min(fitting, key=lambda s: (s.error, s.flops))


def save_order(subsets: Sequence[Subset], path: str | os.PathLike) -> None:
    """Write a fallback order as JSON, atomically."""
    files.write_json(path, {"format": _FORMAT, "version": _VERSION, "subsets": [asdict(s) for s in subsets]})


def load_order(path: str | os.PathLike) -> list[Subset]:
    """Read what :func:`save_order` wrote. Raises FormatError naming the file."""
    data = files.read_json(path, what="order", strict=True)
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
        raise FormatError(f"order: expected {_FORMAT} version {_VERSION} in {path}, got something else")
    try:
        return [Subset(tuple((int(a), int(b)) for a, b in entry["active"]), int(entry["parameters"]),
                       int(entry["flops"]), float(entry["error"])) for entry in data["subsets"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"order: expected complete {_FORMAT} in {path}, got {error!r}") from None
