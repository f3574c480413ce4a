"""What a distillation will need, from configuration values alone: memory by item, work per step, time.

Memory is counted, except that of one block's activations, which is estimated. Time is the work over an assumed share of
a GPU's peak; copies, collectives and the disk are left out. None of it has been compared with a run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydit.distill.config import DistillConfig
from pydit.distill.phases import boundaries
from pydit.distill.residence import AHEAD
from pydit.families import FAMILIES, BlockSpec
from pydit.models import get_adapter
from pydit.plan import H200_FLOPS, PruningPlan

_SHARE = 0.4  # of H200_FLOPS that a training step reaches; assumed
_SAVED = 34  # values per token and channel that a block keeps for its backward pass


@dataclass(frozen=True)
class Estimate:
    """What one process needs.

    memory : item -> bytes on the device. host : the same for host memory. disk : the same for the disk, of all
        processes together.
    flops : phase -> work of one optimiser step over its batch.
    seconds : phase -> duration at 40 % of an H200's dense bfloat16 peak; None for a phase that only a time limit ends.
    """

    memory: dict[str, int]
    flops: dict[str, int]
    seconds: dict[str, float | None]
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """A table and the sums."""
        items = {**{name: value for name, value in self.memory.items() if value},
                 "device memory of one process": sum(self.memory.values()), **self.host,
                 **self.disk}
        column = max(map(len, items))
        rows = [f"{name:<{column}}" + (f"{value / 1e9:>10.1f} GB" if value >= 1e8 else f"{value / 1e6:>10.1f} MB")
                for name, value in items.items()]
        for phase, flops in self.flops.items():
            if not flops:
                continue
            seconds = self.seconds[phase]
            hours = "until the time is up" if seconds is None else f"{seconds / 3600:.1f} h"
            rows.append(f"phase {phase}: {flops / 1e12:.0f} TFLOP a step, {flops / (H200_FLOPS * _SHARE):.2f} s, "
                        f"{hours} (predicted at {100 * _SHARE:.0f} % of an H200's peak, not measured)")
        return "\n".join(rows)


def estimate(plan: PruningPlan, config: Mapping[str, Any] | None, settings: DistillConfig, *, batch_size: int = 1,
             element_bytes: int = 2, image_tokens: int = 6889, text_tokens: int = 512, processes: int = 1) -> Estimate:
    """Memory and time of :func:`pydit.distill.distill` in one process, with one GPU.

    For a schedule, memory is that of the stage that needs most, disk and time are sums over the stages, and work per
    step is that of the first.

    Parameters
    ----------
    plan : of the student.
    config : the teacher's configuration; None is the family's published size.
    settings : phases, steps, schedule, checkpointing, averaging, caches, optimiser, sharding and teacher's memory.
    batch_size : of all processes together; each takes its share of every batch.
    element_bytes : of weights and activations: 2 for bfloat16, 4 for float32.
    image_tokens, text_tokens : of a sample.
    processes : that share the work, with a GPU each.

    Returns
    -------
    Estimate
        Bytes of one GPU's memory and of the disk by what they are for, seconds of each phase; ``describe()`` prints it.

    Raises
    ------
    UserError
        Settings that are wrong, or a configuration of another depth than the plan's.
    """
    settings.validate()
    sizes = {"batch_size": batch_size, "element_bytes": element_bytes, "image_tokens": image_tokens,
             "text_tokens": text_tokens, "processes": processes}
    plans = [plan, *(stage[0] for stage in settings.schedule)]
    stages = [_stage(stage, config, settings.stage(number), **sizes) for number, stage in enumerate(plans)]
    largest = max(stages, key=lambda stage: sum(stage.memory.values()))
    disk: dict[str, int] = {}
    for name, size in (item for stage in stages for item in stage.disk.items()):
        disk[name] = disk.get(name, 0) + size
    seconds = {phase: None if stages[0].seconds[phase] is None else sum(stage.seconds[phase] for stage in stages)
               for phase in stages[0].seconds}
    return Estimate(largest.memory, stages[0].flops, seconds, largest.host, disk)


def _stage(plan: PruningPlan, config: Mapping[str, Any] | None, settings: DistillConfig, *, batch_size: int,
           element_bytes: int, image_tokens: int, text_tokens: int, processes: int) -> Estimate:
    """Of a student that stays as it is."""
    family, full = FAMILIES[plan.family], plan.full_config(config)
    teacher = PruningPlan(plan.family, plan.num_layers)
    width = full["num_attention_heads"] * full["attention_head_dim"]
    replaced = [plan.blocks[block] for block, _, _ in settings.trained(plan)]

    rows = -(-batch_size // processes)  # of the process with the most

    def work(specs: list[BlockSpec]) -> int:
        return rows * sum(family.block_flops(full, spec, image_tokens, text_tokens) for spec in specs)

    layers, output = settings.layers_steps != 0, settings.output_steps != 0
    trained = sum(family.block_parameters(full, spec) for spec in replaced)
    if output and settings.output_trainable == "all":
        trained = plan.num_parameters(full)
    masters = 0 if element_bytes == 4 else 4
    moments = 8 if settings.optimizer == "adamw" else 2
    per_parameter = element_bytes + masters + moments + (4 if settings.ema else 0)  # with gradient and average
    scales = 0 if settings.optimizer == "adamw" else 2 * 4 * -(-trained // 256)  # of every 256 values, two moments
    largest = max(family.block_parameters(full, spec) for spec in teacher.blocks)
    parts = {"none": (1, 1), "student": (1, processes), "all": (processes, processes)}[settings.shard]
    teacher_held = -(-element_bytes * teacher.num_parameters(full) // parts[0])
    host = {}
    if settings.teacher_memory == "streamed":
        blocks = sum(family.block_parameters(full, spec) for spec in teacher.blocks)
        host["teacher's blocks, streamed, in host memory"] = element_bytes * blocks
        visiting = min(AHEAD + 1, len(teacher.blocks)) * largest
        teacher_held = element_bytes * (teacher.num_parameters(full) - blocks + visiting)
    tokens = rows * (image_tokens + text_tokens) * width * element_bytes
    seen = len(boundaries(plan, settings, get_adapter(plan.family)))
    deepest = len(plan.blocks) if output else 1
    memory = {
        f"teacher's weights{_over(parts[0])}": teacher_held,
        f"student's weights{_over(parts[1])}": -(-element_bytes * plan.num_parameters(full) // parts[1]),
        f"gradients, optimiser{', average' if settings.ema else ''} of {trained:,} trained parameters{_over(parts[1])}":
            -(-(per_parameter * trained + scales) // parts[1]),
        # Gathered for its turn, with the next one on its way and a gradient before it is scattered.
        "blocks gathered from all processes": 3 * element_bytes * largest if parts[1] > 1 else 0,
        "teacher's activations at the boundaries of one batch": tokens * seen if layers else 0,
    }
    by_turns = {  # the activations are gone when the optimiser steps
        "activations for the backward pass": tokens * (_SAVED + deepest if settings.gradient_checkpointing
                                                       else _SAVED * deepest),
        "gradients in float32 while the optimiser steps": masters * -(-trained // parts[1]),
    }
    name = max(by_turns, key=by_turns.get)
    memory[name] = by_turns[name]
    kept, kept_output = settings.cache_size("layers") if layers else 0, settings.cache_size("output") if output else 0
    disk = {}
    if kept and settings.cache_dir is None:
        memory[f"teacher's activations of {kept} batches, kept"] = tokens * seen * kept
    elif kept:  # a process without a row of its own takes one all the same
        disk[f"teacher's activations of {kept} batches, on disk"] = (
            tokens // rows * max(batch_size, processes) * seen * kept)
    if kept_output:
        pixels = full["patch_size"] ** 2 * (full["out_channels"] or full["in_channels"])  # of latents and velocity
        values = image_tokens * 2 * pixels + text_tokens * full["joint_attention_dim"]
        watched = len({spec.source[-1] for spec in replaced}) if settings.boundary_weight else 0
        memory[f"inputs and teacher's outputs of {kept_output} batches, kept"] = kept_output * (
            rows * values * element_bytes + tokens * watched)
    last = max((spec.source[-1] for spec in replaced), default=-1)
    passes = 4 if settings.gradient_checkpointing else 3  # forward, backward twice its work, forward again
    looks = {"layers": work([BlockSpec((k,)) for k in range(last + 1)]) if layers else 0,
             "output": work(list(teacher.blocks)) if output else 0}
    learns = {"layers": passes * work(replaced) if layers else 0,
              "output": passes * work(list(plan.blocks)) if output else 0}
    flops = {phase: looks[phase] + learns[phase] for phase in looks}
    seconds: dict[str, float | None] = {}
    for phase, steps, cache in (("layers", settings.layers_steps, kept),
                                ("output", settings.output_steps, kept_output)):
        seconds[phase] = None if steps is None else (
            (min(steps, cache) if cache else steps) * looks[phase] + steps * learns[phase]) / (H200_FLOPS * _SHARE)
    return Estimate(memory, flops, seconds, host, disk)


def _over(parts: int) -> str:
    return f", sharded over {parts}" if parts > 1 else ""
