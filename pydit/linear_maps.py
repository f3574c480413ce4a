"""Closed-form fits of the linear maps that a plan puts in place of text streams, FFNs and blocks (PPCL, Eq. 1, 8, 9).

Each map is ``x + (W x + b)``, fitted by ridge regression of its target on its input, from moments streamed over all
rows of all batches; padded text takes no part. The input is what the student's own block gives the map when it is fed
the teacher's activations, so an FFN's map sees the student's attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pydit.errors import UserError
from pydit.models import Capture, ModelAdapter
from pydit.models.pruned import Fit
from pydit.plan import PruningPlan
from pydit.stats import LinearProbe, Moments


class _Pair(NamedTuple):
    """One map and, from one batch, its input and target."""

    block: int
    name: str
    stream: str
    x: torch.Tensor
    y: torch.Tensor


def fit_linear_maps(adapter: ModelAdapter, teacher: nn.Module, plan: PruningPlan, blocks: Sequence[nn.Module],
                    originals: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]] | None, *, ridge: float
                    ) -> list[Fit]:
    """Fit every linear map of ``blocks`` in place; returns what each was fitted to, none without batches.

    Parameters
    ----------
    blocks : the student's, thinned out.
    originals : the same before that where their text is linear: what their projections expect is their own modulation
        of the text, not that of the teacher's layer.
    batches : keyword arguments of the teacher's forward.
    ridge : relative to the mean variance of a map's input; pulls the map to the identity.

    Raises
    ------
    UserError
        Batches are given and there are none.
    """
    plain = [i for i, spec in enumerate(plan.blocks) if spec.form == "affine" or spec.text == "linear"]
    ffn = [i for i, spec in enumerate(plan.blocks) if spec.linear_ffns]
    if not plain and not ffn:
        return []
    if batches is None:
        warnings.warn("the linear maps of the plan start as the identity, because there are no batches to fit "
                      "them to", UserWarning, stacklevel=3)
        return []
    if not batches:
        raise UserError("batches: expected at least one calibration batch to fit linear maps to, got none")
    layers = adapter.blocks(teacher)

    def of_block(i: int, capture: Capture) -> Iterator[_Pair]:
        spec = plan.blocks[i]
        start, end = capture.states[spec.source[0]], capture.states[spec.source[-1] + 1]
        if spec.form == "affine":
            yield _Pair(i, "img_map", "image", start[0], end[0])
            if blocks[i].txt_map is not None:
                yield _Pair(i, "txt_map", "text", start[1], end[1])
            return
        text, told = adapter.student_streams(plan, i, layers, capture)[1].chunk(2, dim=1)
        yield _Pair(i, "txt_proj", "text", told, adapter.modulated_text(originals[i], start[1], capture.kwargs))
        if spec.text_output:
            yield _Pair(i, "txt_out_proj", "text", text, end[1])

    def of_ffn(i: int, capture: Capture) -> Iterator[_Pair]:
        seen: dict[str, torch.Tensor] = {}
        names = [name for name in ("img_ffn", "txt_ffn") if hasattr(blocks[i], name)]
        handles = [getattr(blocks[i], name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})) for name in names]
        try:
            adapter.call_block(blocks[i], *adapter.student_streams(plan, i, layers, capture), capture.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        end = capture.states[plan.blocks[i].source[-1] + 1]
        for name in names:
            stream = "image" if name == "img_ffn" else "text"
            yield _Pair(i, name, stream, seen[name], end[0] if stream == "image" else end[1])

    fits = []
    with torch.no_grad():
        # FFNs last: their inputs depend on the text maps of the same block.
        for chosen, pairs_of in ((plain, of_block), (ffn, of_ffn)):
            boundaries = {k for i in chosen for k in adapter.feeding_boundaries(plan, i)}
            boundaries |= {plan.blocks[i].source[-1] + 1 for i in chosen}
            moments: dict[tuple[int, str], Moments] = {}
            for batch in batches if chosen else ():
                capture = adapter.capture(teacher, batch, boundaries)
                mask = adapter.text_mask(capture.kwargs)
                for pair in (pair for i in chosen for pair in pairs_of(i, capture)):
                    x, y = (_rows(t, mask if pair.stream == "text" else None) for t in (pair.x, pair.y))
                    one = moments.get((pair.block, pair.name)) or Moments(x.shape[1], y.shape[1], device=x.device)
                    moments[pair.block, pair.name] = one.update(x, y)
            fits += [_solve(plan, blocks[i], i, name, one, ridge) for (i, name), one in moments.items()]
    few = [fit for fit in fits if fit.rows < fit.inputs]
    if few:
        warnings.warn(f"{len(few)} of {len(fits)} linear maps have more unknowns than tokens (the first, "
                      f"{few[0].name}: {few[0].inputs} for {few[0].rows}), so the ridge decides part of them; give "
                      "more batches", UserWarning, stacklevel=3)
    return fits


def _rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, S, C] -> the tokens [N, C] that the mask keeps."""
    return x.flatten(0, 1) if mask is None else x[mask]


def _solve(plan: PruningPlan, block: nn.Module, index: int, name: str, moments: Moments, ridge: float) -> Fit:
    probe = LinearProbe.fit(moments, ridge=ridge, residual=True)
    linear = getattr(block, name)
    identity = torch.eye(moments.dim_x, dtype=probe.weight.dtype, device=probe.weight.device)
    linear.weight.copy_(probe.weight - identity)
    linear.bias.copy_(probe.bias)
    where = f"layers {plan.blocks[index].source[0]}-{plan.blocks[index].source[-1]}"
    return Fit(f"block {index} ({where}) {name}", int(moments.count), moments.dim_x + 1, probe.r2)
