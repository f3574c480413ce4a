"""Model weights in one safetensors file or in several: read tensor by tensor, written as tensors come.

What :mod:`pydit.files` does for whole files, for those that are larger than memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydit.errors import FormatError
from pydit.files import existing_file, read_header, save_safetensors, shard_names, write_json


class SafetensorsReader:
    """Reads the tensors of one safetensors file or of a sharded one, one at a time, into memory of their own.

    Nothing is mapped, so that what is held is what was asked for: a limit on data memory counts private mappings.

    Parameters
    ----------
    folder : directory. name : of the file without a suffix, such as ``"diffusion_pytorch_model"``; shards are found
        through ``<name>.safetensors.index.json``.

    Raises
    ------
    FormatError
        No such file, a shard that is missing, or a broken one.
    """

    def __init__(self, folder: str | os.PathLike, name: str, *, what: str) -> None:
        folder, self.what = Path(folder), what
        index = folder / f"{name}.safetensors.index.json"
        shards = shard_names(index, what=what) if index.is_file() else [f"{name}.safetensors"]
        self._entries: dict[str, tuple[Path, int, dict]] = {}
        for shard in shards:
            path = existing_file(folder / shard, what=what, expected="a safetensors file")
            entries, begin = read_header(path, what=what)
            self._entries |= {key: (path, begin + entry["data_offsets"][0], entry) for key, entry in entries.items()}

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(self._entries[key][2]["shape"])

    def dtype(self, key: str) -> Any:
        """Of one tensor, torch.dtype."""
        from safetensors.torch import _TYPES

        return _TYPES[self._entries[key][2]["dtype"]]

    def __getitem__(self, key: str) -> Any:
        """One tensor, torch, on the CPU."""
        return self._read(key, 0, None)

    def rows(self, key: str, start: int, stop: int) -> Any:
        """Rows ``start`` to ``stop`` of one tensor along its first dimension; nothing else is read."""
        return self._read(key, start, stop)

    def _read(self, key: str, first: int, last: int | None) -> Any:
        import torch

        path, offset, entry = self._entries[key]
        shape, size = list(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0]
        if last is not None:
            row = size // shape[0]
            shape[0], offset, size = last - first, offset + first * row, (last - first) * row
        buffer = bytearray(size)
        with path.open("rb") as file:
            file.seek(offset)
            if file.readinto(buffer) != len(buffer):
                raise FormatError(f"{self.what}: expected a complete safetensors file, got one that was cut while it "
                                  f"was read ({path})")
        dtype = self.dtype(key)
        flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
        return flat.reshape(shape)


class SafetensorsWriter:
    """Writes tensors as they come into shards of bounded size, under diffusers' names.

    Parameters
    ----------
    folder : an existing directory. name : as for :class:`SafetensorsReader`. shard_bytes : most bytes of a shard.
    """

    def __init__(self, folder: str | os.PathLike, name: str, *, shard_bytes: int) -> None:
        self._folder, self._name, self._limit = Path(folder), name, shard_bytes
        self._pending: dict[str, Any] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, key: str, tensor: Any) -> None:
        """Take one tensor; a full shard is written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        self._pending[key] = tensor
        self._bytes, self._total = self._bytes + size, self._total + size

    def close(self) -> None:
        """Write what is left, give the shards their names and, if there are several, an index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [f"{self._name}.safetensors"] if count == 1 else [
            f"{self._name}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for number, name in enumerate(names):
            os.replace(self._folder / f"part-{number}", self._folder / name)
        if count > 1:
            write_json(self._folder / f"{self._name}.safetensors.index.json", {
                "metadata": {"total_size": self._total},
                "weight_map": {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}})

    def _flush(self) -> None:
        save_safetensors(self._folder / f"part-{len(self._shards)}", self._pending, {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0
