"""The teacher's activations on disk: a safetensors file per batch and process, and an index that says what they are of.

``activations.json`` names the teacher (its fingerprint) and the boundaries; every file, the batch: a checksum of all
that the teacher was given, data, timestep and noise. What does not belong to a run is refused, never read, and so is
what a disk has damaged: each tensor has a checksum, looked at when a process reads it for the first time. Files are
written atomically, so a kill or a full disk costs the batch at hand. Activations keep their dtype: a run that reads
them takes the steps of one that computed them, bit for bit on the device that they were computed on.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pydit import files
from pydit.distill import distributed
from pydit.distill.phases import LayerPhase, Seen
from pydit.distill.stream import Batch
from pydit.errors import FormatError, UserError
from pydit.models.adapter import STREAMS, Capture

FORMAT, VERSION = "pydit-teacher-activations", 1
INDEX = "activations.json"


class DiskStore:
    """Keeps what the teacher-fed phase observes in a directory (:class:`pydit.distill.cache.Store`).

    One observation is in memory at a time. Another run of the same teacher and stream may read the directory, for the
    same intervals or some of them; one run at a time may write to it.

    Parameters
    ----------
    directory : new, empty, or of such a run.
    teacher : fingerprint of the teacher.
    phase : observes, from now on, at all boundaries of the directory.
    device : where observations go.

    Raises
    ------
    UserError
        A directory of another teacher, of boundaries that are not those of this run, or with other files in it.
    FormatError
        An index that cannot be read.
    """

    def __init__(self, directory: str | Path, teacher: str, phase: LayerPhase, device: torch.device) -> None:
        self._directory, self._device, self._needed = Path(directory), device, list(phase.boundaries)
        made_of = {"teacher": teacher, "boundaries": self._needed}
        distributed.together(lambda: self._open(made_of), main_only=True)
        phase.observe_at(distributed.together(lambda: self._open(made_of)))  # the disks of two machines may be two
        number, processes = distributed.rank(), distributed.world_size()
        self._suffix = ".safetensors" if processes == 1 else f".{number}-of-{processes}.safetensors"
        held = 0
        while self._path(held).exists():
            held += 1
        # Processes observe together (a sharded teacher runs on all of them), so they agree on what they have.
        self.held = min(distributed.gather(held))
        self._cleared = False
        self._checked: set[int] = set()

    def require_same(self, number: int, batch: Batch) -> None:
        _, metadata = self._read(number, [])
        if metadata["batch"] != fingerprint(batch):
            raise UserError(f"cache_dir: expected activations of this run's batches in {self._directory}, got those of "
                            f"other data, timesteps, noise or seed as batch {number}; give another directory, or "
                            "delete this one")

    def put(self, number: int, batch: Batch, observation: Seen) -> None:
        states, kwargs = observation.capture
        tensors = {f"{boundary}.{stream}": tensor for boundary, streams in states.items()
                   for stream, tensor in zip(STREAMS, streams, strict=True)}
        arguments = _pack(kwargs, tensors)
        # A stream that a block left alone is the same memory at two boundaries.
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
        tensors = {name: (tensor.clone() if places.count(place) > 1 else tensor).detach().cpu()
                   for (name, tensor), place in zip(tensors.items(), places, strict=True)}
        metadata = {"format": FORMAT, "version": str(VERSION), "batch": fingerprint(batch),
                    "arguments": json.dumps(arguments), "weights": json.dumps(observation.weights)}
        checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        metadata["crc32"] = json.dumps([_checksum_of_text(metadata), checksums])
        try:
            if not self._cleared:
                self._clear()
            files.save_safetensors(self._path(number), tensors, metadata)
        except OSError as error:
            raise OSError(error.errno, f"could not keep the teacher's activations ({error.strerror or error}); those "
                          f"of {number} batches are kept, and the last checkpoint is as it was: make room and resume",
                          str(self._directory)) from None

    def get(self, number: int) -> Seen:
        names = [f"{boundary}.{stream}" for boundary in self._needed for stream in STREAMS]
        tensors, metadata = self._read(number, names)
        try:
            states = {boundary: tuple(tensors[f"{boundary}.{stream}"] for stream in STREAMS)
                      for boundary in self._needed}
            kwargs = _unpack(json.loads(metadata["arguments"]), tensors)
            return Seen(Capture(states, kwargs), json.loads(metadata["weights"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"cache_dir: expected activations at boundaries {self._needed} in {self._path(number)}, "
                              f"got a broken file ({error!r})") from None

    def _open(self, made_of: dict[str, Any]) -> list[int]:
        """Found the directory or look whether it is of this run; the boundaries that it is for."""
        directory = self._directory
        if not (directory / INDEX).exists():
            if not files.is_unused(directory):
                raise UserError(f"cache_dir: expected a new directory or one with {INDEX}, got {directory} with other "
                                "files in it")
            files.write_json(directory / INDEX, {"format": FORMAT, "version": VERSION, "made_of": made_of})
        index = files.read_json(directory / INDEX, what="cache_dir")
        found = index.get("made_of") if isinstance(index, dict) else None
        if (not isinstance(found, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION)
                or set(found) != set(made_of)):
            raise FormatError(f"cache_dir: expected {FORMAT} version {VERSION} in {directory / INDEX}, got something "
                              "else")
        if found["teacher"] != made_of["teacher"]:
            raise UserError(f"cache_dir: expected activations of this run's teacher in {directory}, got those of one "
                            "with other weights; give another directory, or delete this one")
        if not set(made_of["boundaries"]) <= set(found["boundaries"]):
            raise UserError(f"cache_dir: expected activations at the boundaries of this run's plan, "
                            f"{made_of['boundaries']}, in {directory}, got those at {found['boundaries']}; give "
                            "another directory, or delete this one")
        return found["boundaries"]

    def _path(self, number: int) -> Path:
        return self._directory / f"batch-{number:08d}{self._suffix}"

    def _read(self, number: int, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The streams of these names and the arguments, if there are names; and the metadata."""
        def wanted(name: str) -> bool:
            return bool(names) and (name in names or name.startswith("argument."))

        path, is_new = self._path(number), bool(names) and number not in self._checked
        tensors, metadata = files.load_safetensors(path, what="cache_dir", wanted=wanted,
                                                   device="cpu" if is_new else str(self._device))
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)) or "batch" not in metadata:
            raise FormatError(f"cache_dir: expected {FORMAT} version {VERSION} in {path}, got something else")
        if not _is_whole(metadata, tensors if is_new else {}):
            raise FormatError(f"cache_dir: expected the activations that were written, got a damaged file ({path}: its "
                              "checksum is another); delete it, and the next run makes it again")
        if is_new:
            tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
            self._checked.add(number)
        return tensors, metadata

    def _clear(self) -> None:
        """Remove what a killed write left."""
        files.remove_leftovers(self._directory, f".batch-{'?' * 8}{self._suffix}.*.part")
        self._cleared = True


def fingerprint(batch: Batch) -> str:
    """A checksum of everything that a forward is given: names, dtypes, shapes and bytes of the tensors, plain values.

    Raises
    ------
    UserError
        Forward arguments that are neither tensors nor plain values.
    """
    tensors: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256(json.dumps(_pack(batch.inputs, tensors), sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _is_whole(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the metadata of a file, and these of its tensors, are what was written."""
    try:
        of_metadata, checksums = json.loads(metadata["crc32"])
        return of_metadata == _checksum_of_text(metadata) and all(
            checksums.get(name) == _checksum(tensor) for name, tensor in tensors.items())
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _checksum(tensor: torch.Tensor) -> int:
    """Of dtype, shape and bytes."""
    return zlib.crc32(_bytes(tensor), zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode()))


def _checksum_of_text(metadata: Mapping[str, str]) -> int:
    """Of all metadata but the checksums."""
    return zlib.crc32(json.dumps(sorted(item for item in metadata.items() if item[0] != "crc32")).encode())


def _bytes(tensor: torch.Tensor) -> Any:
    """Those of a tensor, as an array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON data, its tensors apart: they are added to ``tensors``, complex ones as pairs of real ones."""
    if isinstance(value, torch.Tensor):
        name = f"argument.{len(tensors)}"
        tensors[name] = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        return {"tensor": name, "complex": value.is_complex()}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _pack(item, tensors) for key, item in sorted(value.items())}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError("cache_dir: expected batches and block arguments of tensors and plain values, "
                    f"got a {type(value).__name__}, which cannot be kept on disk; leave cache_dir out")


def _unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of :func:`_pack`."""
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        tensor = tensors[packed["tensor"]]
        return torch.view_as_complex(tensor) if packed["complex"] else tensor
    if "dict" in packed:
        return {key: _unpack(item, tensors) for key, item in packed["dict"].items()}
    (kind, items), = packed.items()
    return {"tuple": tuple, "list": list}[kind](_unpack(item, tensors) for item in items)
