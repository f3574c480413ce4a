"""Plans judged by what the pruned model puts out, before any training.

Statistics of the blocks say how alike they are; they do not say what leaving some of them out does to the velocity.
:func:`velocity_error` measures that, and :func:`greedy_search` builds a plan from it, layer by layer, as SLEB does for
language models (Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks", arXiv 2402.09025), with the error of the velocity in the place of perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pydit.analysis.criteria.base import intervals_without, removal_target
from pydit.analysis.forward import shell_of, velocity
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.models.adapter import require_batches
from pydit.plan import PruningPlan


def velocity_error(teacher: nn.Module, student: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Relative squared error of a student's velocity: ``sum |v_student - v_teacher|^2 / sum |v_teacher|^2``.

    Parameters
    ----------
    teacher, student : diffusers transformers of one family, on one device.
    batches : keyword-argument dicts for ``transformer.forward``.

    Raises
    ------
    UserError
        There is no batch.
    """
    require_batches(batches)
    error = total = 0.0
    for batch in batches:
        target = velocity(teacher, batch)
        error += (velocity(student, batch) - target).square().sum().item()
        total += target.square().sum().item()
    if not total:
        raise UserError("batches: expected at least one batch with a velocity that is not zero, got none")
    return error / total


def greedy_search(transformer: nn.Module, batches: Iterable[Mapping[str, Any]], *, target: float | int) -> PruningPlan:
    """Remove one layer after the other, each time the one whose absence changes the velocity least.

    Layer 0 stays, of FLUX.1 also the first single block. Every run of removed layers forms an interval with the kept
    layer before it, which ``pydit.prune(init="first")`` turns into exactly the model that was measured. With L layers
    and n to remove it runs about ``n (L - n / 2)`` forwards per batch of ever fewer layers; nothing is copied and
    ``transformer`` is only read.

    Parameters
    ----------
    transformer : diffusers transformer of a known family, not itself pruned.
    batches : keyword-argument dicts for ``transformer.forward``; kept in a list. One batch with many noise levels
        does more than several alike.
    target : layers to remove: an integer, or a share of the layers between 0 and 1 (rounded up).

    Returns
    -------
    PruningPlan
        ``provenance``: method "greedy", ``order`` (layers in the order of removal) and ``errors``
        (:func:`velocity_error` after each).

    Raises
    ------
    UserError
        An unknown family, a model that is already pruned, no batch, or a target out of range.
    """
    adapter = get_adapter(transformer)
    shell, layers = shell_of(adapter, transformer), adapter.blocks(transformer)
    count = removal_target(target, len(layers))
    if count is None:
        raise UserError("target: expected a number of layers or a share between 0 and 1, got None")
    starts = adapter.starts(transformer)
    if count > len(layers) - len(starts):
        raise UserError(f"target: expected at most {len(layers) - len(starts)} layers, which is all but the first of "
                        f"each run of blocks of one class, got {count}")
    require_batches(batches)
    batches = list(batches)
    targets = [velocity(transformer, batch) for batch in batches]
    total = sum(value.square().sum().item() for value in targets)
    if not total:
        raise UserError("batches: expected at least one batch with a velocity that is not zero, got none")

    def error(kept: list[int]) -> float:
        adapter.put_blocks(shell, [layers[k] for k in kept])
        return sum((velocity(shell, batch) - value).square().sum().item()
                   for batch, value in zip(batches, targets, strict=True)) / total

    kept, order, errors = list(range(len(layers))), [], []
    for _ in range(count):
        least, layer = min((error([k for k in kept if k != layer]), layer) for layer in kept if layer not in starts)
        kept.remove(layer)
        order.append(layer)
        errors.append(least)
    return PruningPlan.from_intervals(len(layers), intervals_without(order, len(layers)), family=adapter.family,
                                      provenance={"method": "greedy", "order": order, "errors": errors})
