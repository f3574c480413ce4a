"""AdamW and Muon over named groups of parameters, with fp32 master weights, clipping per group and a weight average."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from pydit.distill import distributed
from pydit.distill.config import DistillConfig
from pydit.distill.muon import Muon
from pydit.distill.schedule import ema_decay, ema_exponent
from pydit.errors import FormatError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_MOMENTUM = "momentum"  # of Muon


class Optimizer:
    """One phase's optimiser.

    A bf16 or fp16 parameter holds 8 or 11 significant bits, so a step of 1e-5 relative to the weight would vanish in
    rounding: such parameters get an fp32 master copy that is stepped and rounded back. fp32 parameters are their own
    master. Averages and moments have the master's dtype.

    Parameters
    ----------
    groups : group -> parameter name -> parameter. Gradients are clipped group by group.
    config : DistillConfig
    hidden : names of matrices that Muon steps, when ``config.muon_lr`` is given.

    Attributes
    ----------
    step_count : int
        Optimiser steps taken.
    """

    def __init__(self, groups: Mapping[str, Mapping[str, nn.Parameter]], config: DistillConfig,
                 hidden: Collection[str] = ()) -> None:
        self.groups = {group: dict(named) for group, named in groups.items()}
        self.clip = config.clip
        self.step_count = 0
        self._exponent = ema_exponent(config.ema) if config.ema else None
        self._named = {name: p for named in self.groups.values() for name, p in named.items()}
        self._masters = {name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
                         for name, p in self._named.items()}
        self._averages = ({name: p.detach().clone() for name, p in self._masters.items()} if config.ema else {})
        by_muon = [name for name in self._masters if config.muon_lr is not None and name in hidden]
        self._muon = Muon([self._masters[name] for name in by_muon]) if by_muon else None
        self._muon_lr = config.muon_lr
        others = [p for name, p in self._masters.items() if name not in by_muon]
        matrices = [p for p in others if p.ndim >= 2]
        vectors = [p for p in others if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0, betas=tuple(config.betas), eps=config.eps, fused=True)

    def gradient_norms(self) -> torch.Tensor:
        """Average gradients over processes, if there are several, and return each group's norm, fp32 [groups]."""
        for named in self.groups.values():
            distributed.average([p.grad for p in named.values() if p.grad is not None])
        norms = [torch.nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])
                 for named in self.groups.values()]
        device = next(iter(self._named.values())).device
        return torch.stack([norm.to(device, torch.float32) for norm in norms])

    @torch.no_grad()
    def step(self, lr: float, norms: torch.Tensor, factor: float = 1.0) -> None:
        """Clip by the ``norms`` of :meth:`gradient_norms`, step, average, and drop the gradients.

        AdamW steps at ``lr``, Muon at ``factor * config.muon_lr``.
        """
        if self.clip:
            for named, norm in zip(self.groups.values(), norms, strict=True):
                torch.nn.utils.clip_grads_with_norm_(named.values(), self.clip, norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for name, p in self._named.items():
            if self._masters[name] is not p:
                self._masters[name].grad = None if p.grad is None else p.grad.float()
        self._adamw.step()
        if self._muon is not None:
            self._muon.param_groups[0]["lr"] = factor * self._muon_lr
            self._muon.step()
        self.step_count += 1
        if self._averages:
            decay = ema_decay(self.step_count, self._exponent)
            torch._foreach_lerp_(list(self._averages.values()), list(self._masters.values()), 1 - decay)
        for name, p in self._named.items():
            if self._masters[name] is not p:
                p.copy_(self._masters[name])
                self._masters[name].grad = None
            p.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights into the model."""
        for name, average in self._averages.items():
            self._named[name].copy_(average)

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's trainable parameters by name."""
        return {f"weight/{name}": p for name, p in self._named.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed phase needs: masters, averages, moments."""
        tensors = {f"weight/{name}": master for name, master in self._masters.items()}
        tensors |= {f"average/{name}": average for name, average in self._averages.items()}
        for name, master in self._masters.items():
            moments = self._adamw.state.get(master)
            if moments:  # a parameter without a gradient has none
                tensors |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS}
            if self._muon is not None and (momentum := self._muon.state.get(master)):
                tensors[f"{_MOMENTUM}/{name}"] = momentum[_MOMENTUM]
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor], step_count: int) -> None:
        """Continue from :meth:`state` after ``step_count`` steps."""
        self.step_count = step_count
        for name, master in self._masters.items():
            master.copy_(_fitting(tensors, f"weight/{name}", master))
            self._named[name].copy_(master)
            if self._averages:
                self._averages[name].copy_(_fitting(tensors, f"average/{name}", master))
            if f"{_MOMENTS[0]}/{name}" in tensors:
                state = {moment: torch.empty_like(master).copy_(_fitting(tensors, f"{moment}/{name}", master))
                         for moment in _MOMENTS}
                state["step"] = torch.tensor(float(step_count), device=master.device)
                self._adamw.state[master] = state
            if self._muon is not None and f"{_MOMENTUM}/{name}" in tensors:
                momentum = torch.empty_like(master).copy_(_fitting(tensors, f"{_MOMENTUM}/{name}", master))
                self._muon.state[master] = {_MOMENTUM: momentum}


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the ``weight/<name>`` tensors of a checkpoint into a model's parameters."""
    parameters = dict(model.named_parameters())
    for name in _names(tensors, "weight/"):
        if name not in parameters:
            raise FormatError(f"checkpoint: expected parameters of the student, got {name!r}, which it does not have")
        parameters[name].copy_(_fitting(tensors, f"weight/{name}", parameters[name]))


def _names(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[str]:
    return (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def _fitting(tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    if name not in tensors:
        raise FormatError(f"checkpoint: expected a tensor {name!r}, got a file without it")
    if tensors[name].shape != like.shape:
        raise FormatError(f"checkpoint: expected {name!r} of shape {list(like.shape)}, got {list(tensors[name].shape)}")
    return tensors[name]
