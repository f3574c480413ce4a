"""Checkpoints of a run: ``checkpoint.json`` beside the safetensors file that it names, and the one before.

The tensors are written first, under a name that holds phase and step; then the JSON of the checkpoint so far becomes
``previous.json``, and the new one takes its place, each in a single rename; then older tensor files go. A kill at any
moment leaves a JSON whose tensors exist. The JSON holds a checksum of the tensors: a checkpoint that a disk has damaged
is found, said so, and passed over for the one before. Where parameters are sharded over processes, a directory of the
same name takes the place of the tensor file (:mod:`pydit.distill.shards`); all else is as above.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pydit import files
from pydit.distill import distributed, shards
from pydit.errors import FormatError, UserError

FORMAT = "pydit-distill-checkpoint"
VERSION = 1
INDEX = "checkpoint.json"
PREVIOUS = "previous.json"


class OtherRunError(UserError):
    """A checkpoint of a run with something else.

    entry : of what made the run, such as ``config.layers_lr``. theirs, ours : of the checkpoint, and of the run that
        was to continue it.
    """

    def __init__(self, entry: str, theirs: Any, ours: Any) -> None:
        super().__init__(f"checkpoint_dir: expected a checkpoint with {entry} {ours!r}, got one made with {theirs!r}")
        self.entry, self.theirs, self.ours = entry, theirs, ours


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

    def problem(self) -> str | None:
        """What is wrong with an entry that was read from a file, or None."""
        if self.phase not in ("layers", "output", "done"):
            return f"phase {self.phase!r}"
        counts = {"step": self.step, "batches": self.batches, **(self.steps if isinstance(self.steps, dict) else {})}
        if len(counts) != 4 or not {"layers", "output"} <= set(counts):
            return f"steps {self.steps!r}"
        for name, value in counts.items():
            if type(value) is not int or not 0 <= value < 2**53:
                return f"{name} {value!r}"
        for name, value in (("seconds", self.seconds), ("phase_start", self.phase_start)):
            if type(value) not in (int, float) or not 0 <= value < 1e12:
                return f"{name} {value!r}"
        if self.phase != "done" and self.steps[self.phase] != self.step:
            return f"step {self.step} of {self.steps[self.phase]}"
        if not isinstance(self.history, list) or not all(
                isinstance(row, dict) and isinstance(row.get("phase"), str) and type(row.get("step")) is int
                and type(row.get("loss")) in (int, float) for row in self.history):
            return "a history that is no list of rows"
        return self._window_problem()

    def _window_problem(self) -> str | None:
        if not isinstance(self.window, dict):
            return "a window that is no row"
        numbers = [self.window.get(name) for name in ("count", "norm", "began", "lr")] if self.window else []
        values = self.window.get("values") if self.window else []
        if not isinstance(values, list) or any(type(number) not in (int, float) for number in (*numbers, *values)) \
                or (numbers and not numbers[0] >= 1):
            return "a window without its sums"
        return None


def exists(directory: str | Path) -> bool:
    """Whether a directory holds a checkpoint."""
    return any((Path(directory) / name).exists() for name in (INDEX, PREVIOUS))


def save(directory: str | Path, progress: Progress, tensors: Mapping[str, torch.Tensor], run: Mapping[str, Any],
         device: torch.device) -> None:
    """Write a checkpoint atomically, and keep the one before. Every process calls it.

    Parameters
    ----------
    tensors : weights, and in the middle of a phase averages and moments.
    run : plain data that a resumed run must agree on (plan, configuration, teacher).
    device : where training runs; its generator state is saved beside the CPU's, both of every process.

    Raises
    ------
    OSError
        The disk is full or not writable. The checkpoint of before is as it was; the message says where it is.
    """
    directory = Path(directory)
    name = f"state-{progress.phase}-{progress.step:08d}"
    spread = shards.are_needed(tensors)
    if not spread:
        name += ".safetensors"
    tensors = {**tensors, **_random_states(device)}
    metadata = {"format": FORMAT, "version": str(VERSION)}
    try:
        if spread:
            shards.save(directory / name, tensors)
        else:
            distributed.together(lambda: files.save_safetensors(directory / name, tensors, metadata), main_only=True)
        index = {"format": FORMAT, "version": VERSION, "tensors": name, "crc32": _crc32(directory / name),
                 "progress": asdict(progress), "run": dict(run)}
        distributed.together(lambda: _put_index(directory, index), main_only=True)
    except OSError as error:
        last = "there is no earlier one" if not exists(directory) else \
            f"the last good one is in {directory}: make room and resume"
        raise OSError(error.errno, f"could not write a checkpoint ({error.strerror or error}); {last}",
                      str(directory)) from None
    if distributed.is_main():
        _remove_old(directory, name)


def _put_index(directory: Path, index: dict[str, Any]) -> None:
    before = None
    with contextlib.suppress(FormatError):  # there is none, or a damaged one that a run was resumed past
        before = files.read_json(directory / INDEX, what="checkpoint_dir", strict=True)
    if isinstance(before, dict) and before.get("tensors") != index["tensors"]:
        files.write_json(directory / PREVIOUS, before)
    files.write_json(directory / INDEX, index)


def _remove_old(directory: Path, name: str) -> None:
    """Remove what no index names, killed writes included. A leftover costs space, not the run."""
    kept = {name}
    with contextlib.suppress(FormatError):
        before = files.read_json(directory / PREVIOUS, what="checkpoint_dir", strict=True)
        kept.add(before.get("tensors") if isinstance(before, dict) else None)
    for old in directory.glob("state-*"):
        if old.name not in kept:
            with contextlib.suppress(OSError):
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    files.remove_leftovers(directory, ".state-*.part")


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The generators of every process."""
    states = [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None]
    found = {}
    for number, (cpu, cuda) in enumerate(distributed.gather(states)):
        found[_of_process("random/cpu", number)] = cpu
        if cuda is not None:
            found[_of_process("random/cuda", number)] = cuda
    return found


def _of_process(name: str, number: int) -> str:
    return f"{name}/{number}" if number else name


def load(directory: str | Path, run: Mapping[str, Any], like: Mapping[str, torch.Tensor]
         ) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Read the latest checkpoint made by the same run that is whole. Every process calls it.

    Parameters
    ----------
    like : the student's parameters; those that are sharded are read in shards, if they were written so.

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
        return _load(directory, INDEX, run, like)
    except FormatError as error:
        try:
            found = _load(directory, PREVIOUS, run, like)
        except FormatError:
            raise error from None
        warnings.warn(f"{error}; going on from the checkpoint before, step {found[0].step} of phase {found[0].phase}",
                      UserWarning, stacklevel=2)
        return found


def _load(directory: Path, file: str, run: Mapping[str, Any], like: Mapping[str, torch.Tensor]
          ) -> tuple[Progress, dict[str, torch.Tensor]]:
    progress, path, tensors = distributed.together(lambda: _read(directory, file, run))
    return progress, shards.load(path, like) if tensors is None else tensors


def _read(directory: Path, file: str, run: Mapping[str, Any]
          ) -> tuple[Progress, Path, dict[str, torch.Tensor] | None]:
    """What one process can read for itself: (progress, path of the tensors, the tensors if they are one file)."""
    index = files.read_json(directory / file, what="checkpoint_dir", strict=True)
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("version") != VERSION:
        got = "something else"
        if isinstance(index, dict):
            got = f"{index.get('format')!r} version {index.get('version')!r}"
        raise FormatError(f"checkpoint_dir: expected {FORMAT} version {VERSION} in {directory / file}, got {got}")
    try:
        progress, made_by = Progress(**index["progress"]), dict(index["run"])
        problem = progress.problem()
    except (KeyError, TypeError, ValueError) as error:
        problem = repr(error)
    if problem:
        raise FormatError(f"checkpoint_dir: expected a complete {file} in {directory}, got a broken one ({problem})")
    name = files.require_file_name(index.get("tensors"), what="checkpoint_dir", where=directory / file)
    _require_same(made_by, run)
    path, tensors = directory / name, None
    if not path.is_dir():
        tensors, _ = files.load_safetensors(path, what="checkpoint_dir")
    if "crc32" in index and _crc32(path) != index["crc32"]:
        raise FormatError(f"checkpoint_dir: expected the tensors that were written, got a damaged file "
                          f"({path}: its checksum is another)")
    return progress, path, tensors


def _crc32(path: Path) -> int | dict[str, int]:
    """Of a file; of a directory, of each of its files by name."""
    if path.is_dir():
        return {file.name: _crc32(file) for file in sorted(path.iterdir())}
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            value = zlib.crc32(part, value)
    return value


def restore_random(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set torch's generators to the state that was saved by this process; if there were fewer, leave them."""
    cpu, cuda = (_of_process(name, distributed.rank()) for name in ("random/cpu", "random/cuda"))
    try:
        if cpu in tensors:
            torch.set_rng_state(tensors[cpu].cpu())
        if device.type == "cuda" and cuda in tensors:
            torch.cuda.set_rng_state(tensors[cuda].cpu(), device)
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"checkpoint_dir: expected states of torch's generators as {cpu} and {cuda}, "
                          f"got something else ({error})") from None


def _require_same(made_by: Mapping[str, Any], run: Mapping[str, Any], path: str = "") -> None:
    for key in sorted(set(made_by) | set(run)):
        theirs, ours = made_by.get(key), run.get(key)
        if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
            _require_same(theirs, ours, f"{path}{key}.")
        elif theirs != ours:
            raise OtherRunError(f"{path}{key}", theirs, ours)
