"""A student that changes on the way: one plan after another, each trained before the next takes more away.

So blocks become single-stream a few at a time, the deepest first (Amber-Image's progressive distillation, whose steps
per block are not published), or depth and width phases follow each other in one run.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from pydit.errors import UserError
from pydit.families import BlockSpec
from pydit.models import get_adapter
from pydit.models.by_source import chosen_layer
from pydit.models.pruned import entry_of
from pydit.plan import PruningPlan


class Stage(NamedTuple):
    """plan : what the student becomes. layers_steps, output_steps : of the training that follows."""

    plan: PruningPlan
    layers_steps: int
    output_steps: int = 0


def progressive(plan: PruningPlan, stages: int, *, layers_steps: int, output_steps: int = 0
                ) -> tuple[PruningPlan, tuple[Stage, ...]]:
    """A plan with single-stream blocks, taken in stages: (the plan to prune by, the stages that end in ``plan``).

    The blocks from ``plan.single_stream`` on, or between its two ends, become single-stream in ``stages`` groups of
    about one size, the deepest first. The plan to prune by has none; where it would replace nothing, which cannot be
    trained, it is that of the first stage, and the steps of a run's own configuration are that stage's.

    Raises
    ------
    UserError
        No single-stream blocks, or fewer than stages.
    """
    if plan.single_stream is None:
        raise UserError("plan: expected one with single-stream blocks, got none to convert in stages")
    start, end = (plan.single_stream, None) if isinstance(plan.single_stream, int) else plan.single_stream
    first = [layers[0] for layers in plan.source if layers[0] >= start and (end is None or layers[-1] <= end)]
    if not 1 <= stages <= len(first):
        raise UserError(f"stages: expected 1 to {len(first)}, the single-stream blocks of the plan, got {stages!r}")
    starts = [first[len(first) - len(first) * number // stages] for number in range(1, stages + 1)]
    whole = plan.dead_tensors or not plan.text_linear  # a block that a lean plan has cut becomes no single-stream one
    begun = dataclasses.replace(plan, single_stream=None, dead_tensors=whole)
    made = tuple(Stage(dataclasses.replace(plan, single_stream=start if end is None else (start, end)), layers_steps,
                       output_steps) for start in starts)
    return (begun, made) if begun.replaced else (made[0].plan, made[1:])


def require_successor(before: PruningPlan, after: PruningPlan, *, what: str = "schedule") -> None:
    """Raise UserError when a student of one plan cannot become that of another: what is gone does not come back."""
    if (before.family, before.num_layers) != (after.family, after.num_layers):
        raise UserError(f"{what}: expected plans for {before.family} with {before.num_layers} layers, got one for "
                        f"{after.family} with {after.num_layers}")
    specs = {spec.source[0]: spec for spec in before.blocks}
    ends = {spec.source[-1] for spec in before.blocks}
    for spec in after.blocks:
        if spec.source[0] not in specs or spec.source[-1] not in ends:
            raise UserError(f"{what}: expected intervals that join blocks of the plan before, got "
                            f"[{spec.source[0]}, {spec.source[-1]}] across one")
        given = specs[spec.source[0]]
        if not (_same(given, spec) or given.is_stock or _has_image_whole(given, spec)):
            raise UserError(f"{what}: expected the block of layer {spec.source[0]} to stay '{given.kind}', because "
                            f"only a whole block can be changed, got '{spec.kind}'")


@torch.no_grad()
def change_plan(student: nn.Module, plan: PruningPlan, teacher: nn.Module) -> nn.Module:
    """Turn a student of ``teacher`` into that of a further plan, in place; returns it.

    A block that the plan leaves alone stays the same module. One that stands for several blocks of before goes on from
    the first of them; one that is thinned out keeps what it still has, and its new linear maps are the identity. What
    the student remembers of how its blocks began (``init``), by which a teacher's LoRA is put in its place, stays.

    Raises
    ------
    UserError
        The plan is no successor of the student's.
    """
    require_successor(student.plan, plan)
    adapter = get_adapter(student)
    old = dict(zip((spec.source[0] for spec in student.plan.blocks),
                   zip(student.own_blocks, student.plan.blocks, strict=True), strict=True))
    last = {spec.source[-1]: block for block, spec in zip(student.own_blocks, student.plan.blocks, strict=True)}
    blocks = []
    for spec in plan.blocks:
        block, given = old[spec.source[0]]
        if not _same(given, spec):
            block = copy.deepcopy(block)  # the one of before is whole should this fail
            if spec.source != given.source:
                began = spec.source[chosen_layer(len(spec.source), student.init)]
                whole = (one for one, before in old.values() if began in before.source and before.is_stock)
                block = adapter.conform(copy.deepcopy(next(whole, block)), last[spec.source[-1]])
            block = adapter.new_block(block, spec)
        elif "spec" in block.__dict__:
            block.spec = spec  # anchors are counted anew
        blocks.append(block)
    student.register_to_config(**adapter.student_config(adapter.teacher_config(student), plan),
                               pydit=entry_of(plan, student.init))
    student.install(plan, blocks)
    student.attach_teacher(teacher)
    return student


def _has_image_whole(given: BlockSpec, spec: BlockSpec) -> bool:
    """Whether what a block has lost, the text's own output, is nothing that a single-stream one has."""
    return spec.form == "single" and dataclasses.replace(given, dead_query=True, text="full").is_stock \
        and given.text == "keys" and given.source == spec.source


def _same(one: BlockSpec, other: BlockSpec) -> bool:
    return dataclasses.replace(one, anchor=None) == dataclasses.replace(other, anchor=None)
