"""The two objectives. A phase turns one batch into gradients and names what it measured.

``LayerPhase`` is the paper's non-sequential distillation: every replacement block is fed by the *teacher* and compared
with the teacher, so the intervals are independent problems that share the teacher's forward. ``OutputPhase`` runs the
student by itself, end to end, and repairs what the intervals do to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pydit.distill import distributed
from pydit.distill.config import DistillConfig
from pydit.distill.losses import LOSSES, log_norm, token_mean
from pydit.distill.residence import called_in_parts
from pydit.distill.stream import Batch
from pydit.errors import UserError
from pydit.models.adapter import Capture, ModelAdapter
from pydit.models.by_source import init_weights
from pydit.plan import PruningPlan

Streams = tuple[torch.Tensor, torch.Tensor]  # (image [B, S_img, C], text [B, S_txt, C])


class Term(NamedTuple):
    """One measured loss: ``name`` is an interval such as "3-5" or "output", ``part`` a stream or a quantity."""

    name: str
    part: str
    weight: float


class Phase:
    """What both phases share. ``terms`` lists, in order, what :meth:`backward` returns."""

    name: str
    terms: list[Term]

    def __init__(self, teacher: nn.Module, student: nn.Module, adapter: ModelAdapter, config: DistillConfig) -> None:
        self.teacher, self.student, self.adapter, self.config = teacher, student, adapter, config
        self.intervals = config.trained(student.plan)  # (student block, first teacher layer, last teacher layer)
        self.specs = student.plan.blocks
        self.blocks = adapter.blocks(student)
        self.last = adapter.num_layers(teacher) - 1

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable parameters of the student: clipping group -> name -> parameter."""
        raise NotImplementedError

    def observe(self, batch: Batch) -> Any:
        """What the teacher has to say about a batch: all that :meth:`backward` needs, without gradients."""
        raise NotImplementedError

    def backward(self, observation: Any) -> torch.Tensor:
        """Add the gradients of the weighted sum of the terms; return the terms, fp32 [len(terms)], detached."""
        raise NotImplementedError

    def replaced_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """The replacement blocks' parameters, one group per interval."""
        label = {id(p): _label(start, end) for block, start, end in self.intervals
                 for p in self.blocks[block].parameters()}
        groups: dict[str, dict[str, nn.Parameter]] = {_label(start, end): {} for _, start, end in self.intervals}
        for name, p in self.student.named_parameters():
            if id(p) in label:
                groups[label[id(p)]][name] = p
        return groups

    def streams_of(self, index: int) -> tuple[str, ...]:
        """The streams to match after a student block: those that it writes, and that something reads."""
        spec = self.specs[index]
        writes = spec.text_output if spec.text == "linear" else spec.text == "full"
        dead = spec.source[-1] == self.last and not self.adapter.last_text_used
        return ("image", "text") if writes and not dead else ("image",)

    def boundary_losses(self, index: int, student: Streams, target: Streams, mask: torch.Tensor | None,
                        weights: Mapping[str, float] | None) -> list[torch.Tensor]:
        """The configured loss on every stream that matters after a student block."""
        image, text = student
        if self.specs[index].hands_on:  # the text for the blocks to come stands behind it
            text = text.chunk(2, dim=1)[0]
        pairs = {"image": (image, target[0], None), "text": (text, target[1], mask)}
        return [_weighted(token_mean(self._token_loss, *pairs[stream]), stream, weights)
                for stream in self.streams_of(index)]

    def _token_loss(self, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = LOSSES[self.config.loss](student, target)
        if self.config.magnitude:
            value = value + self.config.magnitude * log_norm(student, target)
        return value


class Seen(NamedTuple):
    """The teacher's activations on a batch, and the batch's weights."""

    capture: Capture
    weights: dict[str, float] | None


class LayerPhase(Phase):
    """Teacher-fed: block of [s, e] maps the teacher's input of layer s to the teacher's output of layer e."""

    name = "layers"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.terms = [Term(_label(start, end), part, weight)
                      for index, start, end in self.intervals for part, weight in self._parts(index)]
        self.layers = self.adapter.blocks(self.teacher)
        self.boundaries = boundaries(self.student.plan, self.config, self.adapter)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        return self.replaced_parameters()

    def observe_at(self, boundaries: list[int]) -> None:
        """Observe at these boundaries, all that are needed among them."""
        self.boundaries = boundaries

    def observe(self, batch: Batch) -> Seen:
        return Seen(self.adapter.capture(self.teacher, batch.inputs, self.boundaries), batch.weights)

    def backward(self, observation: Seen) -> torch.Tensor:
        capture, weights = observation
        states, kwargs = capture
        mask = self.adapter.text_mask(kwargs)
        values = []
        for index, _, end in self.intervals:
            inputs = self._inputs(index, capture)
            output = self._run(self.blocks[index], inputs, kwargs)
            losses = self.boundary_losses(index, output, states[end + 1], mask, weights)
            if self._is_linear(index):
                losses.append(self._linear_loss(index, inputs, output, observation, mask))
            # The intervals share no parameter: a backward pass each keeps one block's activations at a time.
            scales = losses[0].new_tensor([weight for _, weight in self._parts(index)])
            (torch.stack(losses) * scales).sum().backward()
            values += [loss.detach() for loss in losses]
        return torch.stack(values)

    @torch.no_grad()
    def _inputs(self, index: int, capture: Capture) -> Streams:
        """What the teacher feeds to a student block."""
        spec = self.specs[index]
        anchors = [self.layers[self.specs[spec.anchor].source[0]]] if spec.text == "linear" else []
        with called_in_parts(anchors):
            return self.adapter.student_streams(self.student.plan, index, self.layers, capture)

    def _parts(self, index: int) -> list[tuple[str, float]]:
        """What is measured of a student block, with weights."""
        linear = [("linear", self.config.linear_weight)] if self._is_linear(index) else []
        return [(stream, 1.0) for stream in self.streams_of(index)] + linear

    def _is_linear(self, index: int) -> bool:
        spec = self.specs[index]
        heard = {"image", *self.streams_of(index)} & {*spec.linear_ffns}  # nothing reads the last block's text
        return bool(self.config.linear_weight) and (spec.text == "linear" or bool(heard))

    def _linear_loss(self, index: int, inputs: Streams, output: Streams, observation: Seen,
                     mask: torch.Tensor | None) -> torch.Tensor:
        """PPCL's L_linear: squared error of what the linear maps of a block stand for."""
        spec, capture = self.specs[index], observation.capture
        start, target = capture.states[spec.source[0]], capture.states[spec.source[-1] + 1]
        pairs = []
        if spec.text == "linear":
            told = inputs[1].chunk(2, dim=1)[1]
            shares = init_weights(len(spec.source), self.student.init)
            began = [(self.layers[k], share) for k, share in zip(spec.source, shares, strict=True) if share]
            with torch.no_grad(), called_in_parts([layer for layer, _ in began]):
                wanted = sum(share * self.adapter.modulated_text(layer, start[1], capture.kwargs)
                             for layer, share in began)
            block = distributed.gathered(self.blocks[index])
            pairs.append(("text", told + block.txt_proj(told), wanted, mask))
        if "image" in spec.linear_ffns:
            pairs.append(("image", output[0], target[0], None))
        if "text" in self.streams_of(index):
            text = output[1].chunk(2, dim=1)[0] if spec.hands_on else output[1]
            pairs.append(("text", text, target[1], mask))
        return sum(_weighted(token_mean(LOSSES["mse"], *pair), stream, observation.weights) for stream, *pair in pairs)

    def _run(self, block: nn.Module, streams: Streams, kwargs: Mapping[str, Any]) -> Streams:
        if self.config.gradient_checkpointing:
            return checkpoint(self.adapter.call_block, block, *streams, kwargs, use_reentrant=False)
        return self.adapter.call_block(block, *streams, kwargs)


class _Forward(NamedTuple):
    """A batch and what the teacher made of it: its velocity, if asked, and its streams by last layer of an interval."""

    batch: Batch
    velocity: torch.Tensor | None
    boundaries: dict[int, Streams]


class OutputPhase(Phase):
    """Student-fed: the student matches the teacher's velocity, its boundaries, and the velocity given with a batch.

    Where only the last is asked for, the teacher does not run.
    """

    name = "output"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = self.config
        self.asks_teacher = bool(config.velocity_weight or config.boundary_weight)
        self.terms = [Term("output", "velocity", config.velocity_weight)] if self.asks_teacher else []
        if config.flow_weight:
            self.terms.append(Term("output", "flow", config.flow_weight))
        self.watched = self.intervals if config.boundary_weight else []
        self.terms += [Term(_label(start, end), stream, config.boundary_weight)
                       for index, start, end in self.watched for stream in self.streams_of(index)]

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        if self.config.output_trainable == "all":
            return {"output": dict(self.student.named_parameters())}
        return {"output": {name: p for named in self.replaced_parameters().values() for name, p in named.items()}}

    def observe(self, batch: Batch) -> _Forward:
        if not self.asks_teacher:
            return _Forward(batch, None, {})
        layers = self.adapter.blocks(self.teacher)
        boundaries: dict[int, Streams] = {}
        with torch.no_grad(), self._outputs({end: layers[end] for _, _, end in self.watched}, boundaries):
            velocity = self.teacher(**batch.inputs, return_dict=False)[0]
        return _Forward(batch, velocity, boundaries)

    def backward(self, observation: _Forward) -> torch.Tensor:
        batch, target, weights = observation.batch
        boundaries: dict[int, Streams] = {}
        with self._outputs({end: self.blocks[index] for index, _, end in self.watched}, boundaries):
            velocity = self.student(**batch, return_dict=False)[0]
        losses = []
        if self.asks_teacher:
            losses.append(self._velocity_loss(velocity, observation.velocity))
        if self.config.flow_weight:
            losses.append(self._velocity_loss(velocity, _flow_target(target, velocity)))
        losses = [_weighted(loss, "image", weights) for loss in losses]
        mask = self.adapter.text_mask(batch)
        for index, _, end in self.watched:
            losses += self.boundary_losses(index, boundaries[end], observation.boundaries[end], mask, weights)
        values = torch.stack(losses)
        (values * values.new_tensor([term.weight for term in self.terms])).sum().backward()
        return values.detach()

    def _velocity_loss(self, velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean square of the error e; with guidance g, of pairs, plus that of g e_1 - (g - 1) e_2.

        This is the error of what a sampler makes of a pair, v_2 + g (v_1 - v_2). It is divided by g^2 + (g - 1)^2, what
        it would be times that of e if the errors of a pair were independent: two terms of one size, then.
        """
        error, g = velocity.float() - target.float(), self.config.guidance
        loss = error.square().mean()
        if g is None:
            return loss
        if len(error) % 2:
            raise UserError("batches: expected an even number of rows, pairs of one state with a prompt and with the "
                            f"negative prompt, because guidance is set, got {len(error)} rows")
        norm = math.hypot(g, g - 1)  # before the square, which for a huge scale would overflow
        guided = g / norm * error[0::2] - (g - 1) / norm * error[1::2]
        return loss + guided.square().mean()

    @contextmanager
    def _outputs(self, modules: Mapping[int, nn.Module], found: dict[int, Streams]) -> Iterator[None]:
        """Store under each key what its block returns during the forward, as (image, text)."""
        def store(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Streams) -> None:
                found.setdefault(key, output[::-1] if self.adapter.block_io.text_first else output)
            return hook

        handles = [module.register_forward_hook(store(key)) for key, module in modules.items()]
        try:
            yield
        finally:  # before the backward pass, in which checkpointing runs the blocks again
            for handle in handles:
                handle.remove()


def boundaries(plan: PruningPlan, config: DistillConfig, adapter: ModelAdapter) -> list[int]:
    """The teacher's boundaries that the layer phase reads."""
    found = set()
    for index, _, end in config.trained(plan):
        found |= {end + 1} | adapter.feeding_boundaries(plan, index)
    return sorted(found)


def _weighted(loss: torch.Tensor, stream: str, weights: Mapping[str, float] | None) -> torch.Tensor:
    return loss if weights is None else loss * weights[stream]


def _label(start: int, end: int) -> str:
    return f"{start}-{end}"


def _flow_target(target: torch.Tensor | None, velocity: torch.Tensor) -> torch.Tensor:
    if target is None:
        raise UserError("batches: expected (batch, target) pairs, because flow_weight is set, got a batch alone")
    if target.shape != velocity.shape:
        raise UserError(f"batches: expected a target of shape {list(velocity.shape)}, got {list(target.shape)}")
    return target.float()
