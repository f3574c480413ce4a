"""Training batches from a cache: shuffled by bucket, noised, with some prompts left out; any batch by its number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pydit import files
from pydit.arguments import integer, plain
from pydit.data.cache import EMPTY, read_index
from pydit.errors import FormatError, UserError

TIMESTEPS = ("uniform", "logit-normal")


def require_options(*, batch_size: int, seed: int, prompt_dropout: float, pairs: bool, timesteps: str = "uniform",
                    shift: float = 1.0) -> None:
    """Raise UserError for an option of :class:`CachedDataset` that is out of range, or does not go with another."""
    integer("seed", seed, -2**63, 2**63 - 1, expected="a whole number")
    integer("batch_size", batch_size, expected="a whole number from 1 to 2^31 - 1")
    if timesteps not in TIMESTEPS:
        raise UserError(f"timesteps: expected one of {', '.join(TIMESTEPS)}, got {timesteps!r}")
    if not shift > 0:
        raise UserError(f"shift: expected a number above 0, got {shift!r}")
    if not 0 <= prompt_dropout <= 1:
        raise UserError(f"prompt_dropout: expected a share from 0 to 1, got {prompt_dropout!r}")
    if pairs and prompt_dropout:
        raise UserError("prompt_dropout: expected 0, because in pairs every sample has the empty prompt once, "
                        f"got {prompt_dropout!r}")


class CachedDataset:
    """Batches for a Qwen-Image transformer from a directory that :func:`pydit.data.build_cache` wrote.

    Parameters
    ----------
    path : the cache.
    batch_size : images per batch, all of one bucket; what is left of a bucket makes a smaller batch.
    seed : of order, noise and dropout. Batch b of a seed is always the same.
    timesteps : distribution of sigma: ``"uniform"`` (as PPCL trained), or ``"logit-normal"``, the sigmoid of a standard
        normal number (Esser et al. 2024), which prefers the middle.
    shift : sigma becomes shift sigma / (1 + (shift - 1) sigma), towards noise above 1 (Esser et al. 2024, Eq. 23).
    prompt_dropout : share of samples that get the empty prompt, for guidance.
    pairs : every noised sample makes two rows, 2 i with its prompt and 2 i + 1 with the empty one, as
        ``DistillConfig.guidance`` wants them. Goes without ``prompt_dropout``.

    Raises
    ------
    FormatError
        No complete cache, or a broken one.
    UserError
        An option out of range.
    """

    #: Of the batches; None is that of the cache, whoever wrote it in which.
    dtype: torch.dtype | None = None

    def __init__(self, path: str | os.PathLike, *, batch_size: int = 1, seed: int = 0, timesteps: str = "uniform",
                 shift: float = 1.0, prompt_dropout: float = 0.0, pairs: bool = False) -> None:
        require_options(batch_size=batch_size, seed=seed, timesteps=timesteps, shift=shift,
                        prompt_dropout=prompt_dropout, pairs=pairs)
        self.path, self.batch_size, self.seed = Path(path), plain(batch_size), plain(seed)
        self.timesteps, self.shift, self.prompt_dropout, self.pairs = timesteps, shift, prompt_dropout, pairs
        index = read_index(self.path)
        if not index["complete"]:
            raise FormatError(f"data: expected a complete cache in {self.path}, got an unfinished one; "
                              "build it again to finish it")
        self._shards, self._shard_size = index["shards"], index["made_of"]["shard_size"]
        self.samples, self.skipped = index["samples"], index["skipped"]
        if len(self._shards) != -(-len(self.samples) // self._shard_size):
            raise FormatError(f"data: expected {-(-len(self.samples) // self._shard_size)} shards in {self.path}, "
                              f"got {len(self._shards)}")
        if not self.samples:
            raise FormatError(f"data: expected at least one sample in {self.path}, got none")
        self._channels = index["made_of"]["latent_channels"], index["made_of"]["text_channels"]
        embeds = files.load_safetensors(self.path / EMPTY, what="data")[0].get("embeds")
        self._empty = self._fitting("embeds", embeds, self.path / EMPTY, None, self._channels[1])
        self._whole: set[Path] = set()  # shards whose header was looked at
        self._buckets: dict[tuple[int, int], list[int]] = {}
        for number, sample in enumerate(self.samples):
            self._buckets.setdefault((sample["height"], sample["width"]), []).append(number)
        self.batches_per_epoch = sum(-(-len(members) // batch_size) for members in self._buckets.values())

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, start: int = 0) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Endless (forward arguments, velocity ``noise - x0``) from batch ``start``: what ``distill`` takes."""
        number = start
        while True:
            epoch, place = divmod(number, self.batches_per_epoch)
            order = self._order(epoch)
            for members in order[place:]:
                yield self._batch(members, number)
                number += 1

    def _order(self, epoch: int) -> list[list[int]]:
        """Samples of every batch of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        batches = []
        for _, members in sorted(self._buckets.items()):
            shuffled = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            batches += [shuffled[i:i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _batch(self, members: list[int], number: int) -> tuple[dict[str, Any], torch.Tensor]:
        generator = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + number)
        loaded = [self._load(member) for member in members]
        clean = torch.stack([latents for latents, _ in loaded]).to(dtype=self.dtype)
        dropped = (torch.rand(len(members), generator=generator) < self.prompt_dropout).tolist()
        embeds = [self._empty if drop else text for (_, text), drop in zip(loaded, dropped, strict=True)]
        rows = 1
        if self.pairs:
            rows, embeds = 2, [text for prompted in embeds for text in (prompted, self._empty)]
        lengths = torch.tensor([len(text) for text in embeds])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        sigma = self._sigma(len(members), generator).to(clean.dtype)
        noise = torch.randn(clean.shape, generator=generator).to(clean.dtype)
        clean, noise, sigma = (tensor.repeat_interleave(rows, dim=0) for tensor in (clean, noise, sigma))
        size = self.samples[members[0]]
        batch = {
            "hidden_states": torch.lerp(clean, noise, sigma[:, None, None]),
            "timestep": sigma,
            "encoder_hidden_states": torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True).to(dtype=self.dtype),
            "encoder_hidden_states_mask": None if bool(mask.all()) else mask,
            "img_shapes": [[(1, size["height"], size["width"])]] * len(clean),
        }
        return batch, noise - clean

    def _sigma(self, count: int, generator: torch.Generator) -> torch.Tensor:
        if self.timesteps == "uniform":
            sigma = torch.rand(count, generator=generator)
        else:
            sigma = torch.sigmoid(torch.randn(count, generator=generator))
        sigma = sigma.clamp(1e-3, 1.0)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def _load(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(latent tokens, prompt embedding) of one sample; only its bytes are read."""
        from safetensors import SafetensorError, safe_open

        shard, place = divmod(number, self._shard_size)
        file, size = self.path / self._shards[shard], self.samples[number]
        if file not in self._whole:
            files.read_header(files.existing_file(file, what="data", expected="a shard"), what="data")
            self._whole.add(file)
        try:
            with safe_open(str(file), framework="pt") as tensors:
                latents, embeds = (tensors.get_tensor(f"{place}.{name}") for name in ("latents", "embeds"))
        except (SafetensorError, OSError) as error:
            raise FormatError(f"data: expected sample {number} in {file}, got a broken shard ({error})") from None
        return (self._fitting(f"{place}.latents", latents, file, size["height"] * size["width"], 4 * self._channels[0]),
                self._fitting(f"{place}.embeds", embeds, file, None, self._channels[1]))

    @staticmethod
    def _fitting(name: str, tensor: torch.Tensor | None, file: Path, tokens: int | None, channels: int) -> torch.Tensor:
        if tensor is None or not tensor.is_floating_point() or tensor.ndim != 2 or tensor.shape[1] != channels or (
                tokens is not None and len(tensor) != tokens):
            got = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"data: expected {name} as floats [{tokens or 'tokens'}, {channels}] in {file}, "
                              f"got {got}")
        return tensor
