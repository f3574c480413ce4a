"""Checkpoints of a run: ``checkpoint.json`` beside the one safetensors file that it names.

The tensors are written first, under a name that holds phase and step, then the JSON replaces the old one in a single
rename, then older tensor files go. A kill at any moment leaves a JSON whose tensors exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pydit import files
from pydit.errors import FormatError, UserError

FORMAT = "pydit-distill-checkpoint"
VERSION = 1
INDEX = "checkpoint.json"


@dataclass
class Progress:
    """Where a run stands; plain data.

    phase : "layers", "output" or "done". step : optimiser steps in that phase.
    steps : optimiser steps of every phase so far. batches : batches taken from the stream.
    seconds, phase_start : seconds of training so far, and at the start of this phase.
    history : finished rows. window : the sums of the row being filled.
    """

    phase: str = "layers"
    step: int = 0
    steps: dict[str, int] = field(default_factory=lambda: {"layers": 0, "output": 0})
    batches: int = 0
    seconds: float = 0.0
    phase_start: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    window: dict[str, Any] = field(default_factory=dict)


def exists(directory: str | Path) -> bool:
    """Whether a directory holds a checkpoint."""
    return (Path(directory) / INDEX).exists()


def save(directory: str | Path, progress: Progress, tensors: Mapping[str, torch.Tensor], run: Mapping[str, Any],
         device: torch.device) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    tensors : weights, and in the middle of a phase averages and moments.
    run : plain data that a resumed run must agree on (plan, configuration, teacher).
    device : where training runs; its generator state is saved beside the CPU's.
    """
    directory = Path(directory)
    name = f"state-{progress.phase}-{progress.step:08d}.safetensors"
    random = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["random/cuda"] = torch.cuda.get_rng_state(device)
    metadata = {"format": FORMAT, "version": str(VERSION)}
    files.save_safetensors(directory / name, {**tensors, **random}, metadata)
    files.write_json(directory / INDEX, {"format": FORMAT, "version": VERSION, "tensors": name,
                                         "progress": asdict(progress), "run": dict(run)})
    for old in directory.glob("state-*.safetensors"):
        if old.name != name:
            with contextlib.suppress(OSError):  # a leftover costs space, not the run
                old.unlink()


def load(directory: str | Path, run: Mapping[str, Any]) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Read a checkpoint made by the same run.

    Raises
    ------
    FormatError
        Missing, broken, or of another format or version.
    UserError
        Made with another plan, configuration or teacher; the message names the first difference.
    """
    directory = Path(directory)
    index = files.read_json(directory / INDEX, what="checkpoint_dir")
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        got = "something else"
        if isinstance(index, dict):
            got = f"{index.get('format')!r} version {index.get('version')!r}"
        raise FormatError(f"checkpoint_dir: expected {FORMAT} version {VERSION} in {directory / INDEX}, got {got}")
    try:
        progress = Progress(**index["progress"])
        name, made_by = str(index["tensors"]), dict(index["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"checkpoint_dir: expected a complete {INDEX} in {directory}, "
                          f"got a broken one ({error!r})") from None
    if Path(name).name != name:
        raise FormatError(f"checkpoint_dir: expected a file name beside {INDEX}, got {name!r}")
    _require_same(made_by, run)
    tensors, _ = files.load_safetensors(directory / name, what="checkpoint_dir")
    return progress, tensors


def restore_random(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators to the state that was saved."""
    torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def _require_same(made_by: Mapping[str, Any], run: Mapping[str, Any], path: str = "") -> None:
    for key in sorted(set(made_by) | set(run)):
        theirs, ours = made_by.get(key), run.get(key)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            _require_same(theirs, ours, f"{path}{key}.")
        elif theirs != ours:
            raise UserError(f"checkpoint_dir: expected a checkpoint with {path}{key} {ours!r}, "
                            f"got one made with {theirs!r}")
