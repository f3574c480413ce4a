"""What a distillation run does, as one frozen record that is checked before anything starts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydit.arguments import make_plain
from pydit.distill.losses import LOSSES
from pydit.distill.schedule import MAX_EMA_WIDTH
from pydit.distill.stages import Stage, require_successor
from pydit.errors import UserError
from pydit.plan import PruningPlan

SHARD = ("none", "student", "all")
MEMORY = ("resident", "streamed")  # of the teacher
OPTIMIZERS = ("adamw", "adamw8bit")
_LARGEST = 3e38  # what float32, in which weights are stepped, can hold

#: Fields that say where a run's memory is and how often it reports, not what it computes; a resumed run may change
#: them.
BOOKKEEPING = ("checkpoint_dir", "save_every", "save_every_seconds", "resume", "log_every", "shard", "teacher_memory",
               "cache_dir")


@dataclass(frozen=True)
class DistillConfig:
    """Settings of :func:`pydit.distill.distill`.

    Attributes
    ----------
    layers_steps
        Optimiser steps of the teacher-fed layer phase. 0 leaves the phase out; None lets ``max_minutes`` end it.
    layers_lr
        Peak learning rate of that phase. The default is that of the public PPCL code for a 20 B teacher; a model of
        a few million parameters learns at about 1e-3.
    output_steps, output_lr
        The same for the end-to-end phase, which is off by default.
    max_minutes
        Wall-clock budget of the whole run, checkpoints and earlier parts of a resumed run included. A phase ends
        when its steps or its minutes are used up, whichever comes first, and the learning rate follows the larger of
        the two fractions, so that a slow machine ends annealed too. At most one step runs over.
    output_share
        Part of ``max_minutes`` kept for the output phase. What the layer phase leaves unused is added to it.
    schedule
        :class:`pydit.distill.Stage` s: after the steps above, on the student as it came, the student becomes that of
        each stage's plan and is trained for its steps, with the same settings; at the end it is that of the last.
        Rates and averages begin anew in each stage. Needs ``max_minutes`` None, ``intervals`` None, ``shard`` "none".
    loss
        Name in :data:`pydit.distill.LOSSES`, applied to each stream of each interval.
    magnitude
        Weight of the squared difference of log norms, added per token to ``loss``.
    intervals
        Layer phase: train only the blocks that stand for these (first layer, last layer) pairs; None is all. The
        blocks are independent given the teacher, so parts trained apart, on several machines say, and put together by
        :func:`pydit.distill.merge` are what one run would have made of them. Needs ``output_steps`` 0.
    linear_weight
        Layer phase: weight of the plain squared error of what a linear map stands for, on top of ``loss``: the
        modulated text and the text output of a text-linear block, both streams after a linear FFN (PPCL, L_linear,
        which has weight 1).
    output_trainable
        ``"replaced"``: only the replacement blocks move. ``"all"``: every parameter of the student does.
    velocity_weight
        Output phase: weight of the squared error against the teacher's velocity. 0 with a ``boundary_weight`` is
        sequential distillation: blocks fed by the student, judged where the teacher's would end.
    boundary_weight
        Output phase: weight of ``loss`` between student and teacher at the end of every interval, with the student
        fed by itself.
    flow_weight
        Output phase: weight of the squared error against the second item of ``(batch, target)``: the true velocity, or
        that of a teacher which was recorded with the batch. With the two weights before at 0 the teacher does not run.
    guidance
        Output phase: the scale g of classifier-free guidance that the student will be sampled with. Rows of a batch
        are then pairs, 2 i and 2 i + 1: one state with its prompt and with the negative prompt. To each squared error
        of a velocity, e, is added that of the guided one, g e_1 - (g - 1) e_2, divided by g^2 + (g - 1)^2. A sampler
        adds up that error, not e: what the two have in common counts once in it, what they have not up to g times.
        None leaves it out.
    warmup
        Fraction of a phase's budget during which its learning rate rises linearly.
    final_lr
        Learning rate at the end of the cosine, as a fraction of the peak.
    betas, weight_decay, eps
        AdamW; defaults as reported for PPCL. Vectors (biases, norm gains) are not decayed.
    muon_lr
        Output phase: step the weight matrices of attention and MLP by Muon, at this peak rate (in spectral norm, so
        that 0.01 moves every singular value by about 0.01 a step), and everything else by AdamW at ``output_lr``.
        None is AdamW for all, as in PPCL.
    clip
        Largest gradient norm, per interval in the layer phase and over all parameters in the output phase; 0 is off.
    ema
        Relative width of the weight average, whose window grows with the run
        (:func:`pydit.distill.schedule.ema_decay`); the student ends each phase with the averaged weights. 0 is off.
    cache_batches
        Each phase keeps what the teacher computed on its first ``cache_batches`` batches, and goes through them again
        instead of drawing new ones. The memory, on the device, is in the layer phase that of every interval's inputs
        and targets: at most 2 x intervals x tokens x channels values per sample. 0 draws a new batch and runs the
        teacher every step.
    output_cache_batches
        The same for the output phase, where a sample costs little more than its input and velocity. None is
        ``cache_batches``.
    cache_dir
        Directory in which the layer phase keeps its ``cache_batches`` instead of in memory: safetensors files, one per
        batch and process. A later run over the same batches reads them and does not run the teacher, whatever its
        losses and rates, also for some of the ``intervals``; one with another teacher, other boundaries or other
        batches is refused. Stages of a ``schedule`` have directories of their own inside it. The output phase
        runs the student and keeps nothing there.
    gradient_checkpointing
        Recompute the student's blocks in the backward pass instead of keeping their activations.
    optimizer
        ``"adamw"``, or ``"adamw8bit"``: moments in 8 bits, by bitsandbytes or torchao, whichever is installed. Not for
        a sharded student.
    shard
        With several processes (torchrun): ``"none"`` keeps both models whole in each, ``"student"`` shards the student
        with its gradients and optimiser block by block (FSDP2), ``"all"`` the teacher too. Afterwards the parameters
        of a sharded model are DTensors still; :func:`pydit.distill.full_weights` collects them.
    split_batches
        True: all processes are given the same batches, and each trains on its rows of them, so that any number of
        processes takes the same steps, up to rounding. False: every process has batches of its own.
    teacher_memory
        ``"resident"``, or ``"streamed"``: the teacher is passed on the CPU, stays there, and its blocks are copied to
        the student's device one by one as they run. What it computes is the same to the last bit.
    log_every
        Steps per history row; a row holds means over those steps.
    data
        What the batches are (files, order, noise), as plain data for JSON, or None. It decides nothing by itself; a
        checkpoint is only continued with the same, because a run cannot look at batches that it has left behind.
    checkpoint_dir, save_every, save_every_seconds
        Where to save, and after how many steps or seconds. None is never; with a directory, the end of each phase
        is always saved.
    resume
        False: start anew, and refuse a directory that already holds a checkpoint. True: continue, and refuse one
        that does not. ``"auto"``: continue if there is a checkpoint.
    """

    layers_steps: int | None = 1000
    layers_lr: float = 1e-5
    output_steps: int | None = 0
    output_lr: float = 1e-5
    max_minutes: float | None = None
    output_share: float = 0.3
    schedule: tuple[Stage, ...] = ()
    loss: str = "direction"
    magnitude: float = 0.0
    linear_weight: float = 0.0
    intervals: tuple[tuple[int, int], ...] | None = None
    output_trainable: str = "replaced"
    velocity_weight: float = 1.0
    boundary_weight: float = 0.0
    flow_weight: float = 0.0
    guidance: float | None = None
    warmup: float = 0.02
    final_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.02
    eps: float = 1e-8
    muon_lr: float | None = None
    clip: float = 1.0
    ema: float = 0.05
    cache_batches: int = 0
    output_cache_batches: int | None = None
    cache_dir: str | Path | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    shard: str = "none"
    split_batches: bool = False
    teacher_memory: str = "resident"
    log_every: int = 10
    data: Mapping[str, Any] | None = None
    checkpoint_dir: str | Path | None = None
    save_every: int | None = None
    save_every_seconds: float | None = None
    resume: bool | str = False

    def __post_init__(self) -> None:
        make_plain(self)

    def validate(self) -> None:
        """Raise UserError naming the first field that is wrong, what was expected and what came."""
        for name in ("layers_steps", "output_steps", "output_cache_batches"):
            _require(name, getattr(self, name), "a whole number >= 0, or None", lambda v: v is None or _whole(v, 0))
        for name in ("layers_lr", "output_lr", "eps"):
            _require(name, getattr(self, name), "a number > 0", lambda v: _number(v) and v > 0)
        for name in ("magnitude", "linear_weight", "velocity_weight", "boundary_weight", "flow_weight", "weight_decay",
                     "clip"):
            _require(name, getattr(self, name), "a number >= 0", lambda v: _number(v) and v >= 0)
        for name in ("max_minutes", "save_every_seconds", "muon_lr", "guidance"):
            most = sys.float_info.max if name == "guidance" else _LARGEST  # of a guidance the error is scaled down
            _require(name, getattr(self, name), "a number > 0, or None",
                     lambda v, most=most: v is None or (_number(v, most) and v > 0))
        for name in ("output_share", "warmup"):
            _require(name, getattr(self, name), "a number from 0 up to, not including, 1",
                     lambda v: _number(v) and 0 <= v < 1)
        _require("final_lr", self.final_lr, "a number from 0 to 1", lambda v: _number(v) and 0 <= v <= 1)
        _require("ema", self.ema, f"a number from 0 to {MAX_EMA_WIDTH}",
                 lambda v: _number(v) and 0 <= v <= MAX_EMA_WIDTH)
        _require("betas", self.betas, "two numbers from 0 up to, not including, 1",
                 lambda v: isinstance(v, (tuple, list)) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v))
        _require("intervals", self.intervals, "pairs of whole numbers, or None", lambda v: v is None or _is_pairs(v))
        _require("schedule", self.schedule, "stages of a plan and steps, at least one in each", _is_schedule)
        for before, after in pairwise(self.schedule):
            require_successor(before[0], after[0])
        _require("loss", self.loss, f"one of {', '.join(LOSSES)}", lambda v: isinstance(v, str) and v in LOSSES)
        _require("output_trainable", self.output_trainable, "'replaced' or 'all'", lambda v: v in ("replaced", "all"))
        for name in ("gradient_checkpointing", "split_batches"):
            _require(name, getattr(self, name), "True or False", lambda v: isinstance(v, bool))
        for name, choices in (("optimizer", OPTIMIZERS), ("shard", SHARD), ("teacher_memory", MEMORY)):
            _require(name, getattr(self, name), f"one of {', '.join(choices)}",
                     lambda v, choices=choices: isinstance(v, str) and v in choices)
        _require("cache_batches", self.cache_batches, "a whole number >= 0", lambda v: _whole(v, 0))
        _require("log_every", self.log_every, "a whole number >= 1", lambda v: _whole(v, 1))
        _require("save_every", self.save_every, "a whole number >= 1, or None", lambda v: v is None or _whole(v, 1))
        for name in ("checkpoint_dir", "cache_dir"):
            _require(name, getattr(self, name), "a path or None",
                     lambda v: v is None or (isinstance(v, (str, Path)) and str(v) != ""))
        _require("data", self.data, "a mapping of plain data for JSON, or None", _is_plain)
        _require("resume", self.resume, "True, False or 'auto'", lambda v: isinstance(v, bool) or v == "auto")
        self._validate_together()

    def _validate_together(self) -> None:
        for name, free in (("max_minutes", None), ("intervals", None), ("shard", "none")):
            if self.schedule and getattr(self, name) != free:
                raise UserError(f"{name}: expected {free!r}, because there is a schedule, got {getattr(self, name)!r}")
        if self.teacher_memory == "streamed" and self.shard == "all":
            raise UserError("teacher_memory: expected resident, because shard is 'all', got 'streamed'; a teacher is "
                            "streamed from each process's memory or sharded over all of them")
        if self.optimizer == "adamw8bit" and self.shard != "none":
            raise UserError(f"optimizer: expected 'adamw', because shard is {self.shard!r} and moments are sharded in "
                            "full precision only, got 'adamw8bit'")
        if self.max_minutes is None:
            for name in ("layers_steps", "output_steps"):
                if getattr(self, name) is None:
                    raise UserError(f"{name}: expected a whole number, because max_minutes is not given, got None")
        if self.layers_steps == 0 and self.output_steps == 0:
            raise UserError("layers_steps: expected at least one phase with steps, got 0 here and in output_steps")
        if self.intervals is not None and self.output_steps != 0:
            raise UserError("intervals: expected None, because output_steps is not 0 and the output phase runs the "
                            f"whole student, got {self.intervals!r}")
        if self.output_steps != 0 and not (self.velocity_weight or self.boundary_weight or self.flow_weight):
            raise UserError("velocity_weight: expected a weight above 0 here, in boundary_weight or in flow_weight, "
                            "because output_steps is not 0, got 0")
        if self.cache_dir is not None:
            self._validate_cache_dir()
        if self.checkpoint_dir is None:
            for name in ("save_every", "save_every_seconds", "resume"):
                if getattr(self, name):
                    raise UserError(f"{name}: expected a checkpoint_dir to go with it, got {getattr(self, name)!r} "
                                    "and checkpoint_dir None")

    def _validate_cache_dir(self) -> None:
        if self.layers_steps == 0 and not any(stage[1] for stage in self.schedule):
            raise UserError("cache_dir: expected None, because layers_steps is 0 and only what the teacher-fed phase "
                            f"sees is kept on disk, got {str(self.cache_dir)!r}")
        if not self.cache_batches:
            raise UserError("cache_batches: expected at least 1, because there is a cache_dir, got 0")
        output = self.output_steps != 0 or any(len(stage) == 3 and stage[2] for stage in self.schedule)
        if output and self.output_cache_batches is None:
            raise UserError("output_cache_batches: expected a whole number, because there is a cache_dir, which is for "
                            "the teacher-fed phase, and the output phase keeps its batches in memory, got None")

    def trained(self, plan: PruningPlan) -> list[tuple[int, int, int]]:
        """What ``intervals`` leaves of :attr:`pydit.PruningPlan.replaced`."""
        chosen = None if self.intervals is None else {tuple(pair) for pair in self.intervals}
        return [entry for entry in plan.replaced if chosen is None or entry[1:] in chosen]

    def cache_size(self, phase: str) -> int:
        """Batches that the phase "layers" or "output" keeps."""
        if phase == "layers" or self.output_cache_batches is None:
            return self.cache_batches
        return self.output_cache_batches

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["betas"] = list(self.betas)
        fields["schedule"] = [[plan.to_dict(), *steps] for plan, *steps in self.schedule]
        fields["intervals"] = None if self.intervals is None else [list(pair) for pair in self.intervals]
        for name in ("checkpoint_dir", "cache_dir"):
            fields[name] = None if fields[name] is None else str(fields[name])
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DistillConfig:
        """The inverse of :meth:`to_dict`, validated; an unknown field raises UserError."""
        if not isinstance(fields, dict):
            raise UserError(f"config: expected a mapping of field names to values, got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise UserError(f"config: expected fields among {', '.join(known)}, got {name!r}")
        fields = dict(fields)
        if isinstance(fields.get("betas"), list):
            fields["betas"] = tuple(fields["betas"])
        if isinstance(fields.get("schedule"), list):
            if not all(isinstance(stage, (list, tuple)) and len(stage) == 3 for stage in fields["schedule"]):
                raise UserError("schedule: expected [plan, layers_steps, output_steps] each, "
                                f"got {fields['schedule']!r}")
            fields["schedule"] = tuple(Stage(PruningPlan.from_dict(plan, what="schedule"), *steps)
                                       for plan, *steps in fields["schedule"])
        if isinstance(fields.get("intervals"), list):
            fields["intervals"] = tuple(tuple(pair) if isinstance(pair, list) else pair for pair in fields["intervals"])
        config = cls(**fields)
        config.validate()
        return config

    def computation(self) -> dict[str, Any]:
        """The fields that decide the result: what a checkpoint must agree on to be continued.

        Not the schedule, of which every stage has a checkpoint of its own.
        """
        return {name: value for name, value in self.to_dict().items() if name not in (*BOOKKEEPING, "schedule")}

    def stage(self, number: int) -> DistillConfig:
        """The configuration of a stage by itself: 0 is the student as it came."""
        if number == 0:
            return dataclasses.replace(self, schedule=())
        stage = Stage(*self.schedule[number - 1])
        directories = {name: None if path is None else Path(path) / f"stage-{number}" for name, path in (
            ("checkpoint_dir", self.checkpoint_dir), ("cache_dir", self.cache_dir))}
        return dataclasses.replace(
            self, schedule=(), layers_steps=stage.layers_steps, output_steps=stage.output_steps,
            resume="auto" if self.resume else False, **directories)


def _require(name: str, value: Any, expected: str, accepts: Any) -> None:
    if not accepts(value):
        if isinstance(value, (int, float)) and _LARGEST < abs(value) < float("inf"):
            expected, value = f"{expected}, at most {_LARGEST:g}", str(value)[:40]
            raise UserError(f"{name}: expected {expected}, got {value}")
        raise UserError(f"{name}: expected {expected}, got {value!r}")


def _number(value: Any, most: float = _LARGEST) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= most


def _is_pairs(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(_whole(k, 0) for k in pair) for pair in value)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(stage, (tuple, list)) and 2 <= len(stage) <= 3 and isinstance(stage[0], PruningPlan)
        and all(_whole(steps, 0) for steps in stage[1:]) and any(stage[1:]) for stage in value)


def _is_plain(value: Any) -> bool:
    if not isinstance(value, Mapping | None):
        return False
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
