"""AdamW and Muon over named groups of parameters, with fp32 master weights, clipping per group and a weight average."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pydit.distill import distributed
from pydit.distill.config import DistillConfig
from pydit.distill.muon import Muon
from pydit.distill.schedule import ema_decay, ema_exponent
from pydit.errors import FormatError, UserError

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
        self._plain = config.optimizer == "adamw"
        self._adamw = _adamw([{"params": matrices, "weight_decay": config.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], config)

    def gradient_norms(self) -> torch.Tensor:
        """Average gradients over processes, if there are several, and return each group's norm, fp32 [groups]."""
        norms = []
        for named in self.groups.values():
            gradients = [p.grad for p in named.values() if p.grad is not None]
            distributed.average(gradients)
            norms.append(distributed.whole(torch.nn.utils.get_total_norm(gradients)))
        device = next(iter(self._named.values())).device
        return torch.stack([norm.to(device, torch.float32) for norm in norms])

    @torch.no_grad()
    def step(self, lr: float, norms: torch.Tensor, factor: float = 1.0) -> None:
        """Clip by the ``norms`` of :meth:`gradient_norms`, step, average, and drop the gradients.

        AdamW steps at ``lr``, Muon at ``factor * config.muon_lr``.
        """
        if self.clip:
            for named, norm in zip(self.groups.values(), norms, strict=True):
                gradients = [distributed.local(p.grad) for p in named.values() if p.grad is not None]
                torch._foreach_mul_(gradients, (self.clip / (norm + 1e-6)).clamp(max=1.0))
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
            torch._foreach_lerp_([distributed.local(average) for average in self._averages.values()],
                                 [distributed.local(master) for master in self._masters.values()], 1 - decay)
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

    def parameters(self) -> Iterator[torch.Tensor]:
        """All that a model is made of in the end: its trainable parameters and their averages."""
        yield from self._named.values()
        yield from self._averages.values()

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's trainable parameters by name."""
        return {f"weight/{name}": p for name, p in self._named.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed phase needs: masters, averages, moments."""
        tensors = {f"weight/{name}": master for name, master in self._masters.items()}
        tensors |= {f"average/{name}": average for name, average in self._averages.items()}
        for name, master in self._masters.items():
            # A parameter without a gradient has no moments.
            for moment, value in self._adamw.state.get(master, {}).items():
                if moment != "step" and isinstance(value, torch.Tensor):
                    tensors |= {f"{part}/{name}": tensor for part, tensor in _parts(moment, value).items()}
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
            if self._plain and f"{_MOMENTS[0]}/{name}" in tensors:
                state = {moment: torch.empty_like(master).copy_(_fitting(tensors, f"{moment}/{name}", master))
                         for moment in _MOMENTS}
                state["step"] = torch.tensor(float(step_count), device=master.device)
                self._adamw.state[master] = state
            if self._muon is not None and f"{_MOMENTUM}/{name}" in tensors:
                momentum = torch.empty_like(master).copy_(_fitting(tensors, f"{_MOMENTUM}/{name}", master))
                self._muon.state[master] = {_MOMENTUM: momentum}
        if not self._plain:
            self._load_quantised(tensors)

    def _load_quantised(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Moments in a form that only their library can make: it makes them in a step at rate 0, then they are set."""
        stored = {name for key in tensors for name in [key.partition("/")[2]] if name in self._masters
                  and key.partition("/")[0] not in ("weight", "average", _MOMENTUM)}
        for name in stored:
            self._masters[name].grad = torch.zeros_like(self._masters[name])
        for group in self._adamw.param_groups:
            group["lr"] = 0.0
        self._adamw.step()
        for name in stored:
            master = self._masters[name]
            master.grad = None
            state = self._adamw.state[master]
            for moment, value in state.items():
                if moment == "step":
                    state[moment] = torch.full_like(value, self.step_count) if isinstance(value, torch.Tensor) \
                        else self.step_count
                elif isinstance(value, torch.Tensor):
                    for part, tensor in _parts(moment, value).items():
                        tensor.copy_(_fitting(tensors, f"{part}/{name}", tensor))


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the ``weight/<name>`` tensors of a checkpoint into a model's parameters."""
    parameters = dict(model.named_parameters())
    for name in _names(tensors, "weight/"):
        if name not in parameters:
            raise FormatError(f"checkpoint: expected parameters of the student, got {name!r}, which it does not have")
        parameters[name].copy_(_fitting(tensors, f"weight/{name}", parameters[name]))


def _adamw(groups: list[dict], config: DistillConfig) -> torch.optim.Optimizer:
    options = {"lr": 0.0, "betas": tuple(map(float, config.betas)), "eps": config.eps}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    return eight_bit_adamw()([group for group in groups if group["params"]], **options)


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """AdamW with 8-bit moments, of bitsandbytes or else of torchao; UserError when neither can be imported."""
    found = []
    for module in ("bitsandbytes.optim", "torchao.optim"):
        try:
            return importlib.import_module(module).AdamW8bit
        except (ImportError, AttributeError, RuntimeError) as error:  # a build for another GPU or torch is no use
            found.append(f"{module.partition('.')[0]}: {' '.join(str(error).split())[:100]}")
    raise UserError("optimizer: expected bitsandbytes or torchao to be installed for 'adamw8bit' "
                    f"(pip install bitsandbytes), got {'; '.join(found)}")


def _parts(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A quantised tensor of torchao by its plain parts; any other as it is."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    inner, _ = tensor.__tensor_flatten__()
    return {f"{name}.{part}": getattr(tensor, part) for part in inner}


def _names(tensors: Mapping[str, torch.Tensor], prefix: str) -> Iterator[str]:
    return (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def _fitting(tensors: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    if name not in tensors:
        raise FormatError(f"checkpoint: expected a tensor {name!r}, got a file without it")
    if tensors[name].shape != like.shape:
        raise FormatError(f"checkpoint: expected {name!r} of shape {list(like.shape)}, got {list(tensors[name].shape)}")
    return distributed.spread(tensors[name], like)
