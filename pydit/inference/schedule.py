"""Modulation as a table over the timesteps of a schedule.

A DiT block turns the time embedding into shifts, scales and gates by one large matrix per stream; in Qwen-Image these
hold 6.8 of 20.4 billion parameters, and for a fixed schedule they only ever see its timesteps. :func:`bake_schedule`
computes the rows once and takes the matrices out of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pydit.errors import UserError
from pydit.models import get_adapter

_KEY = "_pydit_baked_schedule"


def bake_schedule(transformer: nn.Module, timesteps: Iterable[float] | torch.Tensor) -> nn.Module:
    """Replace the modulation of every block by a table over ``timesteps``, in place.

    Rows are computed one by one by the modules they replace, so a forward of batch 1 is equal to the last bit. The
    modules leave ``parameters()`` and the device; :func:`restore` brings them back. Baking again replaces the table.

    Parameters
    ----------
    transformer : a Qwen-Image transformer, stock or pruned, or a pipeline with one; blocks as they are active now.
    timesteps : the values that ``forward(timestep=...)`` will receive (Qwen-Image pipelines pass sigma, 0 to 1). They
        are looked up exactly, in the dtype in which the forward embeds them.

    Returns
    -------
    The argument. A timestep that is not in the table gives NaN for its sample, never a neighbour's row, and raises:
    at once on the CPU, at a later forward on a GPU, where finding out at once would mean to wait. Saving or loading
    weights of a baked model is refused.

    Raises
    ------
    UserError
        Another model, no or wrong timesteps, or a model with conditions beyond the timestep.
    """
    model = model_of(transformer)
    adapter = get_adapter(model)
    if adapter.family != "qwen-image":
        raise UserError(f"transformer: expected a Qwen-Image transformer, got {type(model).__name__}")
    if model.config.get("use_additional_t_cond") or model.config.get("guidance_embeds"):
        raise UserError("transformer: expected modulation by the timestep alone, got a model with guidance_embeds or "
                        "use_additional_t_cond")
    values = _checked(timesteps)
    restore(model)
    embed = model.time_text_embed
    first = next(embed.parameters())
    keys = values.to(first.device, torch.float32).to(first.dtype)  # as pipelines make them, as the forward casts them
    pairs = bool(model.config.get("zero_cond_t"))  # the image is modulated by two rows, that of the timestep and of 0
    keys = (torch.cat((keys, keys[:1] * 0)) if pairs else keys).unique()
    baked = _Baked()
    with torch.no_grad():
        # As many rows at a time as a forward of batch 1 has: a product of two rows is not that of one to the last bit.
        rows = [embed(torch.stack((key, key * 0)) if pairs else key[None], first[:0]) for key in keys]
        _swap(baked, model, "time_text_embed", BakedTimesteps(keys))
        for block in adapter.blocks(model):
            for name in (name for name in adapter.modulation if hasattr(block, name)):
                both = pairs and name == "img_mod"
                _swap(baked, block, name, BakedRows([getattr(block, name)(row if both else row[:1])[:1]
                                                     for row in rows]))
        _swap(baked, model.norm_out, "silu", BakedRows([model.norm_out.silu(row[:1]) for row in rows]))
    for hook in (model.register_state_dict_pre_hook, model.register_load_state_dict_pre_hook):
        baked.hooks.append(hook(_refuse))
    model.__dict__[_KEY] = baked
    return transformer


def restore(transformer: nn.Module) -> nn.Module:
    """Undo :func:`bake_schedule`, bit for bit, on the device where the model is now; returns its argument."""
    model = model_of(transformer)
    baked = model.__dict__.pop(_KEY, None)
    if baked is not None:
        device = next(model.parameters()).device
        for hook in baked.hooks:
            hook.remove()
        for owner, name, module in baked.originals:
            setattr(owner, name, module.to(device))
    return transformer


def is_baked(model: nn.Module) -> bool:
    """Whether :func:`bake_schedule` has been called."""
    return _KEY in model.__dict__


@dataclass
class _Baked:
    """What was taken out. Not a module, so that nothing of it is a parameter of the model."""

    originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)


class BakedTimesteps(nn.Module):
    """In place of the time embedding: the row of each timestep, int64 [B, 1], which flows where the embedding did."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys, persistent=False)
        self._pending: tuple[torch.Tensor, Any] | None = None  # whether a forward missed, on its way to the host

    def forward(self, timestep: torch.Tensor, *others: Any) -> torch.Tensor:
        """``others``: hidden states, whose dtype does not matter here, and nothing else."""
        if len(others) > 2 or (len(others) == 2 and others[1] is not None):
            raise UserError("transformer: expected a timestep alone with a baked schedule, got guidance or another "
                            "condition; pydit.restore it")
        found = timestep[:, None] == self.keys.to(timestep.dtype)
        missed = ~found.any(1)
        rows = torch.where(missed, len(self.keys), found.int().argmax(1))
        if not torch.compiler.is_compiling():
            self._raise_missed()
            self._send(missed)
        return rows[:, None]

    def _send(self, missed: torch.Tensor) -> None:
        if not missed.is_cuda:
            self._pending = missed, None
            self._raise_missed()
        elif not torch.cuda.is_current_stream_capturing():
            flag = torch.empty(1, dtype=torch.bool, pin_memory=True)
            flag.copy_(missed.any()[None], non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = flag, event

    def _raise_missed(self) -> None:
        if self._pending is None:
            return
        flag, event = self._pending
        if event is None or event.query():
            self._pending = None
            if bool(flag.any()):
                raise UserError(f"timestep: expected one of the {len(self.keys)} of the baked schedule, got another; "
                                "pydit.bake_schedule with the timesteps in use, or pydit.restore")


class BakedRows(nn.Module):
    """In place of a module of the time embedding: its outputs, one row per timestep, and one of NaN for a miss."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        super().__init__()
        table = torch.cat([*rows, torch.full_like(rows[0], torch.nan)])
        self.register_buffer("table", table, persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, 1] -> [B, channels]."""
        return self.table[rows[:, 0]]


def _swap(baked: _Baked, owner: nn.Module, name: str, table: nn.Module) -> None:
    module = getattr(owner, name)
    setattr(owner, name, table)
    baked.originals.append((owner, name, module.to("cpu")))


def _refuse(module: nn.Module, *_args: Any) -> None:
    raise UserError("transformer: expected one with its modulation weights, got a baked schedule; pydit.restore it "
                    "before saving or loading weights")


def model_of(transformer: Any) -> nn.Module:
    """The transformer of a pipeline, or the model itself; UserError for anything else."""
    model = getattr(transformer, "transformer", transformer)
    if not isinstance(model, nn.Module):
        raise UserError("transformer: expected a diffusers transformer or a pipeline, "
                        f"got {type(transformer).__name__}")
    return model


def _checked(timesteps: Iterable[float] | torch.Tensor) -> torch.Tensor:
    try:
        values = torch.as_tensor(timesteps if isinstance(timesteps, torch.Tensor) else list(timesteps)).detach()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"timesteps: expected numbers, got {timesteps!r}") from None
    if values.ndim != 1 or not len(values) or values.is_complex() or not bool(torch.isfinite(values.double()).all()):
        raise UserError(f"timesteps: expected one or more finite numbers, got {values.tolist()}")
    return values
