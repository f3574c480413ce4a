"""Checkpoints of a run: ``checkpoint.json`` beside the safetensors file that it names, and the one before.

The tensors are written first, under a name that holds phase and step; then the JSON of the checkpoint so far becomes
``previous.json``, and the new one takes its place, each in a single rename; then older tensor files go. A kill at any
moment leaves a JSON whose tensors exist. The JSON holds a checksum of the tensors: a checkpoint that a disk has damaged
is found, said so, and passed over for the one before.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
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
PREVIOUS = "previous.json"


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
    return any((Path(directory) / name).exists() for name in (INDEX, PREVIOUS))


def save(directory: str | Path, progress: Progress, tensors: Mapping[str, torch.Tensor], run: Mapping[str, Any],
         device: torch.device) -> None:
    """Write a checkpoint atomically, and keep the one before.

    Parameters
    ----------
    tensors : weights, and in the middle of a phase averages and moments.
    run : plain data that a resumed run must agree on (plan, configuration, teacher).
    device : where training runs; its generator state is saved beside the CPU's.

    Raises
    ------
    OSError
        The disk is full or not writable. The checkpoint of before is as it was; the message says where it is.
    """
    directory = Path(directory)
    name = f"state-{progress.phase}-{progress.step:08d}.safetensors"
    random = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["random/cuda"] = torch.cuda.get_rng_state(device)
    metadata = {"format": FORMAT, "version": str(VERSION)}
    index = directory / INDEX
    try:
        files.save_safetensors(directory / name, {**tensors, **random}, metadata)
        new = {"format": FORMAT, "version": VERSION, "tensors": name, "crc32": _crc32(directory / name),
               "progress": asdict(progress), "run": dict(run)}
        before = None
        with contextlib.suppress(FormatError):  # there is none, or a damaged one that a run was resumed past
            before = files.read_json(index, what="checkpoint_dir")
        if isinstance(before, dict) and before.get("tensors") != name:
            files.write_json(directory / PREVIOUS, before)
        files.write_json(index, new)
    except OSError as error:
        last = "there is no earlier one" if not exists(directory) else \
            f"the last good one is in {directory}: make room and resume"
        raise OSError(error.errno, f"could not write a checkpoint ({error.strerror or error}); {last}",
                      str(directory)) from None
    kept = {name}
    with contextlib.suppress(FormatError):
        kept.add(files.read_json(directory / PREVIOUS, what="checkpoint_dir").get("tensors"))
    for old in directory.glob("state-*.safetensors"):
        if old.name not in kept:
            with contextlib.suppress(OSError):  # a leftover costs space, not the run
                old.unlink()


def load(directory: str | Path, run: Mapping[str, Any]) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Read the latest checkpoint made by the same run that is whole.

    Raises
    ------
    FormatError
        None is: missing, broken, or of another format or version; the message is about the latest.
    UserError
        Made with another plan, configuration or teacher; the message names the first difference.

    Warns
    -----
    UserWarning
        The latest checkpoint is broken and the one before is taken.
    """
    directory = Path(directory)
    try:
        return _load(directory, INDEX, run)
    except FormatError as error:
        try:
            found = _load(directory, PREVIOUS, run)
        except FormatError:
            raise error from None
        warnings.warn(f"{error}; going on from the checkpoint before, step {found[0].step} of phase {found[0].phase}",
                      UserWarning, stacklevel=2)
        return found


def _load(directory: Path, file: str, run: Mapping[str, Any]) -> tuple[Progress, dict[str, torch.Tensor]]:
    index = files.read_json(directory / file, what="checkpoint_dir")
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        got = "something else"
        if isinstance(index, dict):
            got = f"{index.get('format')!r} version {index.get('version')!r}"
        raise FormatError(f"checkpoint_dir: expected {FORMAT} version {VERSION} in {directory / file}, got {got}")
    try:
        progress = Progress(**index["progress"])
        name, made_by = str(index["tensors"]), dict(index["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"checkpoint_dir: expected a complete {file} in {directory}, "
                          f"got a broken one ({error!r})") from None
    if Path(name).name != name:
        raise FormatError(f"checkpoint_dir: expected a file name beside {file}, got {name!r}")
    _require_same(made_by, run)
    tensors, _ = files.load_safetensors(directory / name, what="checkpoint_dir")
    if "crc32" in index and _crc32(directory / name) != index["crc32"]:
        raise FormatError(f"checkpoint_dir: expected the tensors that were written, got a damaged file "
                          f"({directory / name}: its checksum is another)")
    return progress, tensors


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


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
