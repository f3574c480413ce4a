"""Latents and prompt embeddings of a set of captioned images, computed once: safetensors shards and an index.

``index.json`` names the shards and, sample by sample, key and size; it is written first without any and last with all.
In between every shard has a JSON file of its own, so a build that was stopped goes on behind the last one.
``empty.safetensors`` holds the embedding of the empty prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydit import files
from pydit.data.buckets import buckets, decode
from pydit.data.samples import Sample, Skipped, checksum, read_samples
from pydit.errors import FormatError, UserError

FORMAT, VERSION = "pydit-cached-dataset", 1
INDEX, EMPTY = "index.json", "empty.safetensors"


@files.advised()
def build_cache(pipe, source: str | os.PathLike, out: str | os.PathLike, *, resolution: int = 1328,
                shard_size: int = 64, progress: bool = True) -> dict[str, Any]:
    """Encode every readable sample of ``source``; samples that cannot be used are listed in the index.

    Parameters
    ----------
    pipe : a ``QwenImagePipeline``; its VAE and text encoder run where they are.
    source : what :func:`pydit.data.read_samples` takes.
    out : directory to write, or an unfinished cache of the same source and resolution to finish.
    resolution : side of a square image; others have about as many pixels.
    shard_size : samples per shard.

    Returns
    -------
    The index: ``samples`` (key, height, width, tokens of each), ``skipped`` (key and reason), ``complete``.

    Raises
    ------
    UserError
        Another pipeline, a cache of something else in ``out``, such as of a source that has changed since or by other
        weights of VAE and text encoder, or no sample that can be used.
    FormatError
        ``source`` or an index that cannot be read.
    """
    if type(pipe).__name__ != "QwenImagePipeline":
        raise UserError(f"pipe: expected a QwenImagePipeline, got {type(pipe).__name__}")
    if shard_size < 1:
        raise UserError(f"shard_size: expected at least 1, got {shard_size!r}")
    out = Path(out)
    step = 2 * pipe.vae_scale_factor
    sizes = buckets(resolution, step)
    made_of = {"source": str(Path(source).resolve().name), "files": _listed(source, out), "resolution": resolution,
               "shard_size": shard_size,
               "latent_channels": int(pipe.vae.config.z_dim), "text_channels": int(
                   pipe.transformer.config.joint_attention_dim), "encoders": _encoders(pipe)}
    index = _begun(out, made_of)
    if index["complete"]:
        _remove_parts(out)
        return index
    if not (out / EMPTY).exists():
        files.save_safetensors(out / EMPTY, {"embeds": _embeds(pipe, "")}, {"format": FORMAT})

    pending: dict[str, torch.Tensor] = {}
    entries: list[dict[str, Any]] = []
    told = len(index["skipped"])  # of those, how many a shard's file has

    def flush(read: int) -> None:
        nonlocal told
        index["read"] = read
        if entries:
            shard = out / f"shard-{len(index['shards']):05d}.safetensors"
            files.save_safetensors(shard, pending, {"format": FORMAT})
            files.write_json(shard.with_suffix(".json"), {
                "shards": [shard.name], "samples": entries, "skipped": index["skipped"][told:], "read": read})
            told = len(index["skipped"])
            index["shards"].append(shard.name)
            index["samples"] += entries
            pending.clear()
            entries.clear()

    read = 0
    for read, sample in enumerate(_bar(read_samples(source), progress), 1):
        if read <= index["read"]:
            continue
        problem = sample if isinstance(sample, Skipped) else None
        if problem is None:
            try:
                pixels = decode(sample.image, sizes)
            except ValueError as error:
                problem = Skipped(sample.key, str(error))
        if problem is not None:
            index["skipped"].append(asdict(problem))
            continue
        _add(pipe, sample, pixels, pending, entries, step)
        if len(entries) == shard_size:
            flush(read)
    flush(read)
    if not index["samples"]:
        for name in (EMPTY, INDEX):  # with another caption or two the same command is to work
            (out / name).unlink()
        with contextlib.suppress(OSError):
            out.rmdir()
        first = index["skipped"][0] if index["skipped"] else {"key": source, "reason": "nothing in it"}
        raise UserError(f"data: expected at least one captioned image that can be read, got none of {read} (the first: "
                        f"{first['key']}: {first['reason']})")
    index["complete"] = True
    files.write_json(out / INDEX, index)
    _remove_parts(out)
    return index


def _begun(out: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """The index of the cache in ``out`` as far as it is: whole, with what finished shards hold, or new and written."""
    if (out / INDEX).exists():
        index = read_index(out)
        other = [name for name, value in made_of.items() if value not in (None, index["made_of"].get(name, value))]
        if other:
            raise UserError(f"out: expected a cache of {made_of}, got one of {index['made_of']} ({out}), which differs "
                            f"in {', '.join(other)}; give another directory, or delete this one")
        for part in () if index["complete"] else _parts(out):
            for name in ("shards", "samples", "skipped"):
                index[name] += part[name]
            index["read"] = part["read"]
        return index
    if not files.is_unused(out):
        raise UserError(f"out: expected a new directory or a cache, got {out} with other files in it")
    index = {"format": FORMAT, "version": VERSION, "made_of": made_of, "read": 0, "complete": False, "shards": [],
             "samples": [], "skipped": []}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / INDEX, index)  # from here on the directory is known as an unfinished cache
    return index


def _listed(source: str | os.PathLike, out: Path) -> str | None:
    """A checksum of the names and sizes of a source's files; None where it is gone and a complete cache is left."""
    if not Path(source).exists() and (out / INDEX).exists() and read_index(out)["complete"]:
        return None
    return checksum(source)


def _encoders(pipe) -> str:
    """A fingerprint of VAE and text encoder, the same in every dtype they may be loaded in."""
    from pydit.distill.pair import digest

    scale = [list(pipe.vae.config.latents_mean), list(pipe.vae.config.latents_std)]
    parts = [str(scale), *(digest(model, torch.bfloat16) for model in (pipe.vae, pipe.text_encoder))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _parts(out: Path) -> Iterator[dict[str, Any]]:
    """What the shards of an unfinished build hold, in order."""
    for number in itertools.count():
        file = out / f"shard-{number:05d}.json"
        if not file.exists():
            return
        part = files.read_json(file, what="data", strict=True)
        if not isinstance(part, dict) or set(part) != {"shards", "samples", "skipped", "read"}:
            raise FormatError(f"data: expected the entries of a shard in {file}, got something else")
        _require_entries(part, file)
        yield part


def _remove_parts(out: Path) -> None:
    """What nobody reads once the index is complete: the shards' own files, and what killed writes left."""
    files.remove_leftovers(out, ".*.part")
    for file in out.glob("shard-*.json"):
        with contextlib.suppress(OSError):  # a cache may lie where nothing can be written
            file.unlink()


def read_index(path: str | os.PathLike) -> dict[str, Any]:
    """The index of a cache directory. Raises FormatError naming the file."""
    file = Path(path) / INDEX
    index = files.read_json(file, what="data", strict=True)
    if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
        raise FormatError(f"data: expected {FORMAT} version {VERSION} in {file}, got something else")
    made_of = index.get("made_of")
    if not isinstance(made_of, dict) or not isinstance(index.get("complete"), bool):
        raise FormatError(f"data: expected a complete {FORMAT} in {file}, got one with missing entries")
    for name in ("resolution", "shard_size", "latent_channels", "text_channels"):
        if type(made_of.get(name)) is not int or not 1 <= made_of[name] < 2**31:
            raise FormatError(f"data: expected {name} of at least 1 in {file}, got {made_of.get(name)!r}")
    _require_entries(index, file)
    return index


def _require_entries(index: dict[str, Any], file: Path) -> None:
    """Shards beside the file; key, height and width of every sample; key and reason of what was skipped."""
    kinds = {"read": int, "shards": list, "samples": list, "skipped": list}
    if any(type(index.get(name)) is not kind for name, kind in kinds.items()) or index["read"] < 0:
        raise FormatError(f"data: expected a complete {FORMAT} in {file}, got one with missing entries")
    for name in index["shards"]:
        files.require_file_name(name, what="data", where=file)
    for number, sample in enumerate(index["samples"]):
        if not isinstance(sample, dict) or not isinstance(sample.get("key"), str) or any(
                type(sample.get(side)) is not int or not 1 <= sample[side] < 2**20 for side in ("height", "width")):
            raise FormatError(f"data: expected key, height and width of sample {number} in {file}, got "
                              f"{str(sample)[:200]}")
    for skipped in index["skipped"]:
        if not isinstance(skipped, dict) or not all(isinstance(skipped.get(name), str) for name in ("key", "reason")):
            raise FormatError(f"data: expected key and reason of what is skipped in {file}, got {str(skipped)[:200]}")


@torch.no_grad()
def _add(pipe, sample: Sample, pixels: np.ndarray, pending: dict[str, torch.Tensor], entries: list[dict[str, Any]],
         step: int) -> None:
    vae = pipe.vae
    image = torch.from_numpy(pixels.copy()).to(vae.device).permute(2, 0, 1)[None, :, None].to(vae.dtype) / 127.5 - 1
    latents = vae.encode(image).latent_dist.mode()
    mean, std = (torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    latents = ((latents - mean) / std)[:, :, 0]
    tokens = pipe._pack_latents(latents, 1, latents.shape[1], latents.shape[2], latents.shape[3])[0]
    number = len(entries)
    pending[f"{number}.latents"], pending[f"{number}.embeds"] = tokens, _embeds(pipe, sample.caption)
    entries.append({"key": sample.key, "height": pixels.shape[0] // step, "width": pixels.shape[1] // step})


@torch.no_grad()
def _embeds(pipe, caption: str) -> torch.Tensor:
    """The text encoder's output for one prompt, [tokens, channels], as the pipeline feeds the transformer."""
    embeds, mask = pipe.encode_prompt(prompt=[caption], device=pipe.text_encoder.device)
    return embeds[0] if mask is None else embeds[0][mask[0].bool()]


def _bar(samples, show: bool):
    if not show:
        return samples
    from tqdm import tqdm

    return tqdm(samples, desc="encode", unit="image")
