"""Plans judged by what the pruned model puts out, before any training.

Statistics of the blocks say how alike they are; they do not say what leaving some of them out does to the velocity.
:func:`velocity_error` measures that, and :func:`greedy_search` builds a plan from it, layer by layer, as SLEB does for
language models (Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks", arXiv 2402.09025), with the error of the velocity in the place of perplexity. :func:`choose_linear_ffns` does
the same for the FFNs of a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pydit.analysis.criteria.base import intervals_without, removal_target
from pydit.analysis.forward import shell_of, velocity
from pydit.arguments import integer
from pydit.errors import UserError
from pydit.models import get_adapter
from pydit.models.adapter import require_batches, require_plan
from pydit.plan import PruningPlan
from pydit.pruning import prune


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
    targets, total = _velocities(transformer, batches)

    def error(kept: list[int]) -> float:
        return _squared(adapter.put_blocks(shell, [layers[k] for k in kept]), batches, targets) / total

    kept, order, errors = list(range(len(layers))), [], []
    for _ in range(count):
        least, layer = min((error([k for k in kept if k != layer]), layer) for layer in kept if layer not in starts)
        kept.remove(layer)
        order.append(layer)
        errors.append(least)
    return PruningPlan.from_intervals(len(layers), intervals_without(order, len(layers)), family=adapter.family,
                                      provenance={"method": "greedy", "order": order, "errors": errors})


def choose_linear_ffns(transformer: nn.Module, plan: PruningPlan, batches: Iterable[Mapping[str, Any]], *, count: int,
                       streams: str = "both", init: str = "first") -> PruningPlan:
    """Make ``count`` more FFNs linear, one after the other, each time the one that changes the velocity least.

    PPCL (arXiv 2511.16156) takes the FFNs whose own output an affine map comes closest to. How much of an FFN's output
    a map explains does not say how much of it the velocity hears; this asks the velocity. Maps are fitted as in
    :func:`pydit.prune`, all in one pass, as none depends on which other FFNs are linear. It holds two students, and
    runs about ``count`` forwards per batch and block.

    Parameters
    ----------
    transformer : diffusers transformer of a known family, not itself pruned. It is only read.
    plan : of it. Its own linear FFNs stay.
    batches : keyword-argument dicts for ``transformer.forward``, for the fit and the choice; kept in a list.
    count : of blocks.
    streams : ``"both"`` (``linear_ffn`` of the plan), or ``"text"``: the text's FFN alone (``linear_text_ffn``).
    init : as for :func:`pydit.prune`.

    Returns
    -------
    PruningPlan
        ``provenance["linear_ffn"]`` or ``["linear_text_ffn"]``: ``order`` (blocks, by their first layers, as they were
        chosen) and ``errors`` (:func:`velocity_error` before, then after each).

    Raises
    ------
    UserError
        As :func:`pydit.prune`; no batch, or more blocks asked for than have such an FFN.
    """
    require_plan(plan)
    if streams not in ("both", "text"):
        raise UserError(f"streams: expected both or text, got {streams!r}")
    require_batches(batches)
    adapter, batches = get_adapter(transformer), list(batches)
    field = "linear_ffn" if streams == "both" else "linear_text_ffn"

    def with_linear(layers: Iterable[int]) -> PruningPlan:
        return dataclasses.replace(plan, **{field: (*getattr(plan, field), *layers)})

    def fits(layer: int) -> bool:
        try:
            with_linear([layer]).require_match(transformer)
        except UserError:
            return False
        return True

    plan.require_match(transformer)
    place = {spec.source[0]: index for index, spec in enumerate(plan.blocks)
             if not spec.linear_ffns and (streams == "both" or spec.text == "full") and fits(spec.source[0])}
    count = integer("count", count)
    if count > len(place):
        raise UserError(f"count: expected at most {len(place)}, the blocks with such an FFN that the plan leaves "
                        f"whole, got {count}")
    targets, total = _velocities(transformer, batches)
    student = prune(transformer, plan, init=init, batches=batches)
    linear = adapter.blocks(prune(transformer, with_linear(place), init=init, batches=batches))
    slots = [(blocks, index) for blocks in (getattr(student, name) for name in adapter.block_lists)
             for index in range(len(blocks))]

    def put(layer: int, block: nn.Module) -> nn.Module:
        blocks, index = slots[place[layer]]
        before, blocks[index] = blocks[index], block
        return before

    def error() -> float:
        return _squared(student, batches, targets) / total

    def error_with(layer: int) -> float:
        whole = put(layer, linear[place[layer]])
        found = error()
        put(layer, whole)
        return found

    order, errors = [], [error()]
    for _ in range(count):
        least, layer = min((error_with(layer), layer) for layer in place if layer not in order)
        put(layer, linear[place[layer]])
        order.append(layer)
        errors.append(least)
    return dataclasses.replace(with_linear(order), provenance={
        **plan.provenance, field: {"order": order, "errors": errors}})


def _velocities(transformer: nn.Module, batches: Sequence[Mapping[str, Any]]) -> tuple[list[torch.Tensor], float]:
    """The teacher's velocity on each batch, and the sum of their squares."""
    targets = [velocity(transformer, batch) for batch in batches]
    total = sum(value.square().sum().item() for value in targets)
    if not total:
        raise UserError("batches: expected at least one batch with a velocity that is not zero, got none")
    return targets, total


def _squared(student: nn.Module, batches: Sequence[Mapping[str, Any]], targets: Sequence[torch.Tensor]) -> float:
    return sum((velocity(student, batch) - value).square().sum().item()
               for batch, value in zip(batches, targets, strict=True))
