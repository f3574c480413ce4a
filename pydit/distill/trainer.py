"""The training loop: budgets, learning rate, history, checkpoints. What is minimised stands in ``phases``."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import torch
from torch import nn

from pydit.distill import checkpoint, distributed
from pydit.distill.activations import DiskStore
from pydit.distill.cache import MemoryStore, Observations
from pydit.distill.config import DistillConfig
from pydit.distill.optimizer import Optimizer, load_weights
from pydit.distill.pair import digest, prepared, require_pair
from pydit.distill.phases import LayerPhase, OutputPhase, Phase
from pydit.distill.progress import step_bar
from pydit.distill.residence import teacher_blocks
from pydit.distill.schedule import Budget, lr_factor
from pydit.distill.stages import change_plan, require_successor
from pydit.distill.stream import Batches, BatchStream, Drawn
from pydit.errors import FormatError, UserError
from pydit.models import get_adapter
from pydit.models.adapter import ModelAdapter

_PHASES: dict[str, type[Phase]] = {"layers": LayerPhase, "output": OutputPhase}


class NonFiniteLossError(UserError):
    """A loss or gradient became NaN or infinite; the student holds the weights of the step before."""


@dataclass(frozen=True)
class DistillResult:
    """What a run did; :meth:`to_dict` is JSON-able.

    Attributes
    ----------
    history
        One dict per ``log_every`` steps: ``phase`` ("layers" or "output"), ``step`` (within the phase, from 1),
        ``loss`` (weighted sum of the terms), ``intervals`` ({"3-5": {"image": ..., "text": ...}}), in the output
        phase ``output`` ({"velocity": ..., "flow": ...}), ``gradient_norm`` (the largest of any group, before
        clipping), ``lr``, ``seconds`` (since the run began, earlier parts of a resumed run included) and
        ``ms_per_step``. Losses are means over the row's steps.
    steps
        Optimiser steps per phase.
    seconds
        Duration, earlier parts included.
    resumed_from
        (phase, step) of the checkpoint that the run continued, or None; in a schedule, of the last stage that had one.
    batches
        Number of the batch that a further run would begin with.

    In a schedule every row has its ``stage`` too, 0 for the student as it came, and its time counts from its start.
    """

    history: list[dict[str, Any]]
    steps: dict[str, int]
    seconds: float
    resumed_from: tuple[str, int] | None = None
    batches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def distill(teacher: nn.Module, student: nn.Module, batches: Batches, config: DistillConfig, *,
            progress: bool = True) -> DistillResult:
    """Train the replacement blocks of a pruned model against the model it came from, in place.

    Two phases, each with its own steps and learning rate. ``layers``: the teacher runs once per batch without
    gradients; the block that stands for layers s..e gets the teacher's input of layer s and learns the teacher's
    output of layer e, text and image stream (PPCL, arXiv 2511.16156, Stage 1.3). ``output`` (optional): the student
    runs by itself and learns the teacher's final velocity.

    The student trains in its own dtype; losses are fp32 and bf16 parameters are stepped through fp32 master copies.
    With ``torch.distributed`` initialised every process calls this, with batches of its own or, with
    ``config.split_batches``, with the same ones; ``config.shard`` says what is sharded. Ctrl-C ends a run after the
    step at hand, with a checkpoint if there is a ``checkpoint_dir``.

    Parameters
    ----------
    teacher : a diffusers transformer. Left as it was: weights, mode, ``requires_grad``.
    student : what ``pydit.prune`` made of it, on the same device and in the same dtype. Only the replacement blocks
        change (every parameter in the output phase with ``output_trainable="all"``); mode and ``requires_grad`` are
        restored.
    batches : an iterable of batches, or a function ``start -> iterator`` that begins at batch ``start``, which lets a
        resumed run continue the stream without replaying it. A list starts over at its end. A batch is a dict of
        ``transformer.forward`` arguments, or a pair of it and a velocity, true or recorded, which only ``flow_weight``
        reads. Text tokens that the mask leaves out take no part, whatever they hold.
    config : DistillConfig
    progress : show a progress bar, if tqdm is installed.

    Returns
    -------
    DistillResult
        ``history``, a dict per logged step with phase, step and losses; ``steps`` of each phase, ``seconds``,
        ``resumed_from`` and ``batches`` taken from the stream. The student is what has changed.

    Raises
    ------
    UserError
        A wrong configuration, models that do not belong together, too few batches, or a checkpoint of another run.
    OSError
        A checkpoint could not be written; the one before is untouched.
    NonFiniteLossError
        Training diverged; the last checkpoint is untouched.
    """
    if not isinstance(config, DistillConfig):
        raise UserError(f"config: expected a DistillConfig, got {type(config).__name__}")
    config.validate()
    results: list[DistillResult] = []
    if config.schedule and isinstance(batches, Iterator):
        batches = Drawn(batches)
    for number in range(len(config.schedule) + 1):
        stage, first = config.stage(number), 0
        if number:
            change_plan(student, config.schedule[number - 1][0], teacher)
            first = results[-1].batches
        elif config.schedule:
            require_successor(student.plan, config.schedule[0][0])
        results.append(_distill_stage(teacher, student, batches, stage, first, progress))
    return results[0] if len(results) == 1 else _joined(results)


def _distill_stage(teacher: nn.Module, student: nn.Module, batches: Batches, config: DistillConfig, first: int,
                   progress: bool) -> DistillResult:
    """Train one student as it is, from batch ``first`` of the stream on."""
    adapter = get_adapter(student)
    require_pair(teacher, student, config)
    identity = {
        "plan": {name: value for name, value in student.plan.to_dict().items()
                 if name not in ("format", "version", "provenance")},
        "config": config.computation(), "teacher": digest(teacher)}
    if student.init != "first":  # as checkpoints say nothing of it
        identity["init"] = student.init
    distributed.broadcast(list(student.parameters()))
    if config.shard != "none":
        distributed.shard(student, adapter)
    if config.shard == "all":
        distributed.shard(teacher, adapter)
    device = next(student.parameters()).device
    with prepared(teacher, student, config), teacher_blocks(teacher, adapter, config, device):
        return _Run(teacher, student, adapter, batches, config, identity, first, progress).execute()


def _joined(results: list[DistillResult]) -> DistillResult:
    """Of a schedule: rows with the number of their stage, sums of the rest."""
    rows = [row | {"stage": number} for number, result in enumerate(results) for row in result.history]
    steps = {name: sum(result.steps[name] for result in results) for name in results[0].steps}
    resumed = [result.resumed_from for result in results if result.resumed_from is not None]
    return DistillResult(rows, steps, sum(result.seconds for result in results), resumed[-1] if resumed else None,
                         results[-1].batches)


class _Interrupt:
    """Turns the first Ctrl-C into a note, so that a step can end and be saved; a second one interrupts at once.

    With several processes no second one does: torchrun passes on to them the Ctrl-C that a terminal has given them
    already, and they must stop after the same step. Does nothing outside the main thread, where Python delivers no
    signals.
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.getsignal(signal.SIGINT)
        self._ours = (threading.current_thread() is threading.main_thread()
                      and self._before is signal.default_int_handler)
        if self._ours:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.came = True
        if distributed.world_size() == 1:
            signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: Any) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)


class _Run:
    """One call of :func:`distill`."""

    def __init__(self, teacher: nn.Module, student: nn.Module, adapter: ModelAdapter, batches: Batches,
                 config: DistillConfig, identity: dict[str, Any], first: int, show: bool) -> None:
        self.teacher, self.student, self.adapter, self.config = teacher, student, adapter, config
        self.batches, self.stream = batches, None
        self.show = show and distributed.is_main()
        self.device = next(student.parameters()).device
        self.identity = identity
        self.progress, self.loaded = self._start(first)
        self.resumed_from = (self.progress.phase, self.progress.step) if self.loaded else None
        self.began = monotonic() - self.progress.seconds
        self.saved_at = self.progress.seconds

    def _start(self, first: int) -> tuple[checkpoint.Progress, dict[str, torch.Tensor]]:
        directory, resume = self.config.checkpoint_dir, self.config.resume
        found = directory is not None and checkpoint.exists(directory)
        if found and not resume:
            raise UserError("checkpoint_dir: expected a directory without a checkpoint, because resume is False, "
                            f"got {directory}")
        if not found and resume is True:
            raise UserError(f"checkpoint_dir: expected a checkpoint to resume, got none in {directory}")
        distributed.barrier()  # no process may write before every one has looked
        if found:
            return checkpoint.load(directory, self.identity, dict(self.student.named_parameters()))
        return checkpoint.Progress(batches=first), {}

    def execute(self) -> DistillResult:
        """Run what is left of the phases."""
        state = self.progress
        if state.phase == "done" or state.step == 0:
            load_weights(self.student, self.loaded)
        if state.phase == "done":  # for the stage to come
            checkpoint.restore_random(self.loaded, self.device)
        names = list(_PHASES)
        for name, following in zip(names, [*names[1:], "done"], strict=True):
            if state.phase == name:
                self._phase(_PHASES[name](self.teacher, self.student, self.adapter, self.config), following)
        state.seconds = self._now()
        return DistillResult(state.history, state.steps, state.seconds, self.resumed_from, state.batches)

    def _phase(self, phase: Phase, following: str) -> None:
        state = self.progress
        budget, peak = self._budget(phase.name)
        if budget.steps == 0:
            state.phase, state.step = following, 0
            return
        groups = phase.parameters()
        trainable = [p for named in groups.values() for p in named.values()]
        for p in trainable:
            p.requires_grad_(True)
        hidden = self.adapter.hidden_matrices(self.student) if phase.name == "output" else ()
        optimizer = Optimizer(groups, self.config, hidden)
        if state.step:
            optimizer.load_state(self.loaded, state.step)
        if state.window and len(state.window["values"]) != len(phase.terms):
            raise FormatError(f"checkpoint_dir: expected a window of {len(phase.terms)} values, "
                              f"got {len(state.window['values'])}")
        observations = Observations(phase, self._stream_behind, self._store(phase),
                                    self.config.cache_size(phase.name), state.step)
        if self.loaded:  # after the stream, which may have drawn numbers of its own
            checkpoint.restore_random(self.loaded, self.device)
        self.loaded = {}
        self._train(phase, observations, optimizer, budget, peak)
        self._require_finite_weights(phase, optimizer)
        optimizer.finish()
        for p in trainable:
            p.requires_grad_(False)
        state.phase, state.step, state.phase_start = following, 0, self._now()
        if self.config.checkpoint_dir is not None:
            self._save(optimizer.weights())

    def _stream_behind(self, batches: int) -> BatchStream:
        """The stream; the first phase of a resumed run enters it so many batches behind its place."""
        if self.stream is None:
            if batches > self.progress.batches:  # a resumed phase observes again what its cache held
                raise FormatError(f"checkpoint_dir: expected a run of {batches} batches or more at step "
                                  f"{self.progress.step}, got one of {self.progress.batches}")
            part = (distributed.rank(), distributed.world_size()) if self.config.split_batches else None
            self.stream = BatchStream(self.batches, self.progress.batches - batches, self.adapter, self.device,
                                      None if part == (0, 1) else part, 1 if self.config.guidance is None else 2,
                                      self.student)
        return self.stream

    def _store(self, phase: Phase) -> MemoryStore | DiskStore:
        if self.config.cache_dir is None or not isinstance(phase, LayerPhase):
            return MemoryStore()
        return DiskStore(self.config.cache_dir, self.identity["teacher"], phase, self.device)

    def _train(self, phase: Phase, observations: Observations, optimizer: Optimizer, budget: Budget,
               peak: float) -> None:
        state, config = self.progress, self.config
        with step_bar(self.show, phase.name, budget, state.step) as bar, _Interrupt() as interrupt:
            while True:
                elapsed = self._now() - state.phase_start
                if budget.seconds is not None:
                    elapsed = distributed.agree(elapsed, self.device)
                if budget.spent(state.step, elapsed):
                    break
                fraction = budget.fraction(state.step, elapsed)
                factor = lr_factor(fraction, warmup=config.warmup, final=config.final_lr)
                lr = peak * factor
                values = phase.backward(observations.get(state.step))
                norms = optimizer.gradient_norms()
                shared = torch.cat([values, values.new_tensor([float(interrupt.came)])])
                distributed.average([shared])
                numbers = torch.cat([shared, norms]).tolist()  # the only synchronisation of a step
                interrupted = numbers.pop(len(values))
                self._require_finite(phase, list(optimizer.groups), numbers)
                optimizer.step(lr, norms, factor)
                state.step += 1
                state.steps[phase.name] = state.step
                state.batches = self.stream.delivered
                self._record(phase, numbers, lr, state.phase_start + elapsed)
                if state.window["count"] >= config.log_every:
                    self._close_row(phase)
                bar.update(1)
                if state.history:
                    bar.set_postfix(loss=f"{state.history[-1]['loss']:.4g}", lr=f"{lr:.1e}", refresh=False)
                if interrupted:  # in any process, between two steps, where everything fits together
                    if config.checkpoint_dir is not None:
                        self._require_finite_weights(phase, optimizer)
                        self._save(optimizer.state())
                    raise KeyboardInterrupt
                if self._save_is_due(budget):
                    self._require_finite_weights(phase, optimizer)
                    self._save(optimizer.state())
        if state.window:
            self._close_row(phase)

    def _budget(self, name: str) -> tuple[Budget, float]:
        config = self.config
        steps = config.layers_steps if name == "layers" else config.output_steps
        lr = config.layers_lr if name == "layers" else config.output_lr
        if config.max_minutes is None:
            return Budget(steps, None), lr
        total = 60.0 * config.max_minutes
        if name == "layers" and config.output_steps != 0:
            return Budget(steps, total * (1 - config.output_share)), lr
        return Budget(steps, max(0.0, total - self.progress.phase_start)), lr

    def _record(self, phase: Phase, numbers: list[float], lr: float, began: float) -> None:
        values, norms = numbers[:len(phase.terms)], numbers[len(phase.terms):]
        window = self.progress.window or {"count": 0, "values": [0.0] * len(values), "norm": 0.0, "began": began}
        window["count"] += 1
        window["values"] = [total + value for total, value in zip(window["values"], values, strict=True)]
        window["norm"] = max(window["norm"], *norms)
        window["lr"] = lr
        self.progress.window = window

    def _close_row(self, phase: Phase) -> None:
        state, window = self.progress, self.progress.window
        means = [total / window["count"] for total in window["values"]]
        now = self._now()
        row: dict[str, Any] = {
            "phase": phase.name, "step": state.step,
            "loss": sum(term.weight * mean for term, mean in zip(phase.terms, means, strict=True)), "intervals": {}}
        for term, mean in zip(phase.terms, means, strict=True):
            place = row if term.name == "output" else row["intervals"]
            place.setdefault(term.name, {})[term.part] = mean
        row |= {"gradient_norm": window["norm"], "lr": window["lr"], "seconds": now,
                "ms_per_step": 1000 * (now - window["began"]) / window["count"]}
        state.history.append(row)
        state.window = {}

    def _require_finite(self, phase: Phase, groups: list[str], numbers: list[float]) -> None:
        labels = [(term.name, term.part) for term in phase.terms] + [(group, "gradient") for group in groups]
        for (name, part), value in zip(labels, numbers, strict=True):
            if not math.isfinite(value):
                step = self.progress.step + 1
                where = f"{part} of the output" if name == "output" else f"{part} of interval {name}"
                raise NonFiniteLossError(
                    f"distill: expected finite losses and gradients, got {value} in step {step} of phase {phase.name}, "
                    f"{where}; the student holds the weights of step {step - 1}, {self._kept()}")

    def _require_finite_weights(self, phase: Phase, optimizer: Optimizer) -> None:
        """Before they are kept: a step from finite gradients may lead beyond all numbers."""
        values = torch.stack([p.isfinite().all().logical_not() for p in map(distributed.local, optimizer.parameters())])
        wrong = values.sum().to(torch.float32)
        distributed.average([wrong])
        if wrong.item():
            raise NonFiniteLossError(
                f"distill: expected finite weights after step {self.progress.step} of phase {phase.name}, got some "
                f"that are not, {self._kept()}; a lower learning rate may help")

    def _kept(self) -> str:
        directory = self.config.checkpoint_dir
        return (f"the last checkpoint is in {directory}" if directory is not None and checkpoint.exists(directory)
                else "there is no checkpoint")

    def _save_is_due(self, budget: Budget) -> bool:
        config, state = self.config, self.progress
        if config.checkpoint_dir is None or state.step == budget.steps:  # the end of a phase is saved anyway
            return False
        by_steps = config.save_every is not None and state.step % config.save_every == 0
        if by_steps or config.save_every_seconds is None:
            return by_steps
        # By one clock: a process that saves a step before the others would wait for them for ever.
        return distributed.agree(self._now() - self.saved_at, self.device) >= config.save_every_seconds

    def _save(self, tensors: dict[str, torch.Tensor]) -> None:
        self.progress.seconds = self._now()
        checkpoint.save(self.config.checkpoint_dir, self.progress, tensors, self.identity, self.device)
        self.saved_at = self._now()

    def _now(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return monotonic() - self.began
