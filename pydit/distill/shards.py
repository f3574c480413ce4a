"""The tensors of a checkpoint whose parameters are spread over processes: a directory that each writes its part of.

torch.distributed.checkpoint reads and writes it, as safetensors files. It can be read by any number of processes,
one without torch.distributed included.
"""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from pydit import files
from pydit.distill import distributed
from pydit.errors import FormatError


def are_needed(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether some of the tensors are spread over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a directory, every process its own part, atomically: it has its name once all of it is on the disk.

    Raises
    ------
    OSError
        On every process, when one could not write; nothing is left.
    """
    from torch.distributed import checkpoint

    temporary = path.with_name(f".{path.name}.part")

    def prepare() -> None:
        for leftover in (temporary, path):  # of a run that was killed before its index named it
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)

    distributed.together(prepare, main_only=True)
    error: OSError | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            checkpoint.save({name: tensor.detach() for name, tensor in tensors.items()},
                            storage_writer=checkpoint.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except checkpoint.api.CheckpointException as failed:  # raised by every process
        number, (cause, _) = next(iter(failed.failures.items()))
        error = cause if isinstance(cause, OSError) else OSError(errno.EIO, f"process {number}: {cause}")

    def finish() -> None:
        if error is None:
            files.put_directory(temporary, path)
        else:
            shutil.rmtree(temporary, ignore_errors=True)

    distributed.together(finish, main_only=True)
    if error is not None:
        raise error


def load(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read a directory; a tensor ``kind/name`` is cut like ``like[name]``, and whole without one.

    Raises
    ------
    FormatError
        Broken or incomplete.
    """
    from safetensors import SafetensorError
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(path))
    try:
        found = reader.read_metadata().state_dict_metadata
        tensors = {}
        for key, stored in found.items():
            model = like.get(key.partition("/")[2])
            dtype = stored.properties.dtype
            if isinstance(model, DTensor) and model.shape == stored.size:
                tensors[key] = torch.empty_like(model.detach(), dtype=dtype)
            else:
                tensors[key] = torch.empty(stored.size, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint.load(tensors, storage_reader=reader, no_dist=distributed.world_size() == 1)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, checkpoint.api.CheckpointException) as error:
        raise FormatError(f"checkpoint_dir: expected the shards of a checkpoint in {path}, got broken ones "
                          f"({' '.join(str(error).split())[:200]})") from None
    return tensors
