"""Activation statistics of a transformer: what every redundancy criterion reads, in memory and on disk.

Two disjoint sets of calibration batches are kept apart, as in PPCL: the probe set gives second moments of every
block's input and output, from which linear probes are fitted; the sample set gives token features at every boundary,
on which the probes are judged. Text and image are separate throughout, padded text tokens are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from pydit import files
from pydit.analysis.ablation import Ablation
from pydit.errors import FormatError, UserError
from pydit.families import FAMILIES
from pydit.models.adapter import STREAMS
from pydit.stats import CKA, LinearProbe, Moments, checks, clip_outliers

FORMAT = "pydit-activation-stats"
VERSION = "1"


class ActivationStats:
    """Moments and token samples of an L-layer transformer, per stream (``"image"``, ``"text"``).

    Parameters
    ----------
    family : str
    num_layers : int
        L.
    width : int
        Channels C of both streams.
    last_text_used : bool
        Whether the model reads the text output of its last block. If not, that output carries no information and
        criteria leave it out.
    starts : tuple of int
        First layers of the runs of blocks of one class; no interval crosses into one. FLUX.1 has two.
    device : optional
        Where moments are accumulated; samples are kept on the CPU.
    config : mapping, optional
        The transformer's configuration, from which plans are priced; JSON-able.
    projected_from : int, optional
        Channels of the model, if features were projected to ``width`` random directions
        (:func:`pydit.analysis.collect`).

    Attributes
    ----------
    moments : stream -> list of L :class:`~pydit.stats.Moments`, x = block input, y = block output
    samples : stream -> list of [L + 1, n_b, C] tensors, one per sample batch, in the model's dtype: the same n_b
        tokens at every boundary (boundary k is the input of block k, boundary L the output of the last)
    sample_ids : stream -> list of int64 [n_b]: which image of the calibration stream a token belongs to
    images_seen : int, images of both sets; the next sample gets this id
    batches_seen : int, batches of both sets, from which :func:`pydit.analysis.collect` goes on
    made_of : what the batches were and how they were taken, as plain data for JSON, or None; whoever collects sets it
    ablation : :class:`~pydit.analysis.Ablation` of the sample batches, or None if none was made
    """

    def __init__(self, family: str, num_layers: int, width: int, *, last_text_used: bool = True,
                 starts: tuple[int, ...] = (0,), device: torch.device | str | None = None,
                 projected_from: int | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.starts, self.projected_from = tuple(starts), projected_from
        self.config = None if config is None else dict(config)
        self.family, self.num_layers, self.width, self.last_text_used = family, num_layers, width, last_text_used
        self.moments = {stream: [Moments(width, width, device=device) for _ in range(num_layers)]
                        for stream in STREAMS}
        self.samples: dict[str, list[torch.Tensor]] = {stream: [] for stream in STREAMS}
        self.sample_ids: dict[str, list[torch.Tensor]] = {stream: [] for stream in STREAMS}
        self.images_seen = self.batches_seen = 0
        self.made_of: dict[str, Any] | None = None
        self.ablation: Ablation | None = None

    @staticmethod
    def estimate_bytes(num_layers: int, width: int, *, sample_batches: int, tokens: int, element_bytes: int = 4) -> int:
        """Memory that statistics of this size take: float64 moments, and samples of ``element_bytes`` each."""
        moments = len(STREAMS) * num_layers * (2 * width + 5) * width * 8
        return moments + sample_batches * len(STREAMS) * (num_layers + 1) * tokens * width * element_bytes

    def add_probe_rows(self, rows: Mapping[str, list[torch.Tensor]]) -> None:
        """Add to the moments: per stream, L + 1 tensors [n, C], the same tokens at every boundary."""
        for stream, states in rows.items():
            self._check(stream, states)
            for layer in range(self.num_layers):
                self.add_probe_layer(layer, stream, states[layer], states[layer + 1])

    def add_probe_layer(self, layer: int, stream: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """The same of one block alone: its input x and its output y [n, C]. A batch counts when all blocks have it."""
        self.moments[stream][layer].update(x, y)

    def add_sample(self, rows: Mapping[str, torch.Tensor], ids: Mapping[str, torch.Tensor]) -> None:
        """Add one sample batch: per stream [L + 1, n, C] features and [n] image numbers within this batch's images."""
        for stream, states in rows.items():
            self._check(stream, states)
            if not bool(torch.isfinite(states).all()):
                raise UserError(f"{stream}: expected finite activations, got NaN or infinity")
            self.samples[stream].append(states.detach().cpu().clone())
            self.sample_ids[stream].append((ids[stream].cpu() + self.images_seen).to(torch.int64))

    def add_ablation(self, ablation: Ablation) -> None:
        """Add the losses of more images."""
        if ablation.losses.shape[1] != self.num_layers:
            raise UserError(f"ablation: expected {self.num_layers} layers, got {ablation.losses.shape[1]}")
        self.ablation = ablation if self.ablation is None else self.ablation.join(ablation)

    def probe(self, layer: int, stream: str, *, ridge: float = 1e-6) -> LinearProbe:
        """The affine map closest to block ``layer`` on the probe set (fitted to what the block adds).

        Raises UserError for a layer or stream that is not there.
        """
        self._check_stream(stream)
        if not 0 <= layer < self.num_layers:
            raise UserError(f"layer: expected 0 to {self.num_layers - 1}, got {layer!r}")
        return LinearProbe.fit(self.moments[stream][layer], ridge=ridge, residual=True)

    def probes(self, stream: str, *, ridge: float = 1e-6) -> list[LinearProbe]:
        """:meth:`probe` of every block."""
        self._check_stream(stream)
        return LinearProbe.fit_all(self.moments[stream], ridge=ridge, residual=True)

    def sample_batches(self, stream: str) -> list[torch.Tensor]:
        """The sample batches usable for debiased CKA: [L + 1, n, C] with n >= 4."""
        return [batch for batch in self.samples[stream] if batch.shape[1] >= 4]

    def cka_matrix(self, stream: str, *, rows: str = "token", clip: float | None = None,
                   level: float = 0.95) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Debiased CKA between all boundaries of a stream -> (matrix, low, high), float64 [L + 1, L + 1] each.

        HSIC is averaged over sample batches, and the interval is a paired bootstrap over them.

        Parameters
        ----------
        stream : ``"image"`` or ``"text"``.
        rows : what counts as an example. ``"token"`` (the default): every sampled token; images that differ in their
            mean make tokens look alike. ``"image"``: image x timestep, the mean of an image's sampled tokens, one row
            for each image at its noise level (an image that comes again at another level is another row; at one level
            for all, rows are images); needs batches of at least 4 images. The values differ; compare only like with
            like.
        clip : see :func:`pydit.stats.clip_outliers`; None leaves features as they are.
        level : of the interval.
        """
        cka = self.cka(stream, rows=rows, clip=clip, least=2)
        return cka.matrix(), *cka.interval(level)

    def cka(self, stream: str, *, rows: str = "token", clip: float | None = None, least: int = 1) -> CKA:
        """What :meth:`cka_matrix` takes its values from; UserError where fewer than ``least`` batches can be used."""
        self._check_stream(stream)
        if rows not in ("token", "image"):
            raise UserError(f"rows: expected token or image, got {rows!r}")
        if clip is not None:
            checks.number("clip", clip, "a number above 0", lambda x: x > 0)
        cka = CKA(self.num_layers + 1)
        for batch, ids in zip(self.samples[stream], self.sample_ids[stream], strict=True):
            features = batch if clip is None else clip_outliers(batch, clip)
            if rows == "image":
                images, which = ids.unique(return_inverse=True)
                sums = features.new_zeros(len(features), len(images), self.width, dtype=torch.float64)
                features = sums.index_add_(1, which, features.double()) / which.bincount()[:, None]
            if features.shape[1] >= 4:
                cka.update(list(features))
        if cka.batches < least:
            raise UserError(f"stats: expected at least {least} sample {'batch' if least == 1 else 'batches'} with 4 or "
                            f"more {stream} {rows}s, got {cka.batches}")
        return cka

    def merge(self, other: ActivationStats) -> ActivationStats:
        """Add what ``other`` has seen; ``other`` is unchanged. Returns self."""
        if not isinstance(other, ActivationStats):
            raise UserError(f"other: expected ActivationStats, got {type(other).__name__}")
        for name in ("family", "num_layers", "width", "projected_from", "last_text_used", "starts"):
            if getattr(self, name) != getattr(other, name):
                raise UserError(f"other: expected {name} {getattr(self, name)!r}, got {getattr(other, name)!r}")
        for stream in STREAMS:
            for mine, theirs in zip(self.moments[stream], other.moments[stream], strict=True):
                mine.merge(theirs)
            self.samples[stream].extend(other.samples[stream])
            self.sample_ids[stream].extend([ids + self.images_seen for ids in other.sample_ids[stream]])
        self.images_seen += other.images_seen
        self.batches_seen += other.batches_seen
        if other.ablation is not None:
            self.add_ablation(other.ablation)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, atomically."""
        tensors = {}
        for stream in STREAMS:
            for layer, moments in enumerate(self.moments[stream]):
                for name, tensor in moments.state_dict().items():
                    tensors[f"moments.{stream}.{layer}.{name}"] = tensor
            for index, (batch, ids) in enumerate(zip(self.samples[stream], self.sample_ids[stream], strict=True)):
                tensors[f"samples.{stream}.{index}"] = batch
                tensors[f"sample_ids.{stream}.{index}"] = ids
        if self.ablation is not None:
            tensors |= {f"ablation.{name}": value for name, value in vars(self.ablation).items()}
        files.save_safetensors(path, tensors, {
            "format": FORMAT, "version": VERSION, "family": self.family, "num_layers": str(self.num_layers),
            "width": str(self.width), "last_text_used": str(int(self.last_text_used)),
            "images_seen": str(self.images_seen), "batches_seen": str(self.batches_seen),
            "config": json.dumps(self.config), "made_of": json.dumps(self.made_of),
            "projected_from": str(self.projected_from or 0),
            "starts": " ".join(map(str, self.starts)),
            **{f"batches_{stream}": str(len(self.samples[stream])) for stream in STREAMS}})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ActivationStats:
        """Read a file written by :meth:`save`. Raises FormatError naming the file."""
        tensors, metadata = files.load_safetensors(path, what="stats")
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise FormatError(f"stats: expected {FORMAT} version {VERSION} in {path}, "
                              f"got {metadata.get('format')!r} version {metadata.get('version')!r}")
        try:
            num_layers, width = int(metadata["num_layers"]), int(metadata["width"])
            # What the file announces is allocated only after the file is seen to hold it.
            held = tensors.get(f"moments.{STREAMS[-1]}.{num_layers - 1}.m_xx")
            if held is None or tuple(held.shape) != (width, width):
                raise ValueError(f"{num_layers} layers of {width} channels are not in it")
            config, made_of = (json.loads(metadata.get(name, "null")) for name in ("config", "made_of"))
            for name, value in (("config", config), ("made_of", made_of)):
                if not isinstance(value, dict | None):
                    raise ValueError(f"{name}: {type(value).__name__} instead of an object")
            stats = cls(metadata["family"], num_layers, width,
                        last_text_used=bool(int(metadata["last_text_used"])),
                        starts=tuple(map(int, metadata.get("starts", "0").split())),
                        projected_from=int(metadata["projected_from"]) or None, config=config)
            stats.made_of = made_of
            stats.images_seen, stats.batches_seen = int(metadata["images_seen"]), int(metadata["batches_seen"])
            for stream in STREAMS:
                for layer, moments in enumerate(stats.moments[stream]):
                    prefix = f"moments.{stream}.{layer}."
                    moments.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in tensors.items()
                                             if key.startswith(prefix)})
                for index in range(int(metadata[f"batches_{stream}"])):
                    batch, ids = (tensors[f"{kind}.{stream}.{index}"] for kind in ("samples", "sample_ids"))
                    stats._check(stream, batch)
                    _require_sample(f"samples.{stream}.{index}", batch, ids)
                    stats.samples[stream].append(batch)
                    stats.sample_ids[stream].append(ids)
            if "ablation.losses" in tensors:
                stats.add_ablation(Ablation.from_tensors({
                    field.name: tensors[f"ablation.{field.name}"] for field in dataclasses.fields(Ablation)}))
            stats._require_sound()
        except (KeyError, ValueError, RecursionError) as error:
            raise FormatError(f"stats: expected complete {FORMAT} in {path}, got a file that does not fit "
                              f"({error})") from None
        return stats

    def _require_sound(self) -> None:
        """Raise UserError where single entries, each of its own kind, do not belong together."""
        if self.family not in FAMILIES:
            raise UserError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.starts[:1] != (0,) or list(self.starts) != sorted({*self.starts} & {*range(self.num_layers)}):
            raise UserError(f"starts: expected layers from 0 on, below {self.num_layers}, got {list(self.starts)}")
        if min(self.images_seen, self.batches_seen) < 0:
            raise UserError(f"images_seen, batches_seen: expected 0 or more, got {self.images_seen} and "
                            f"{self.batches_seen}")
        if self.projected_from is not None and self.projected_from < self.width:
            raise UserError(f"projected_from: expected 0 or more than {self.width} channels, got {self.projected_from}")
        if self.config is not None:
            FAMILIES[self.family].require({**FAMILIES[self.family].published[0], **self.config})

    @staticmethod
    def _check_stream(stream: str) -> None:
        if stream not in STREAMS:
            raise UserError(f"stream: expected one of {', '.join(STREAMS)}, got {stream!r}")

    def _check(self, stream: str, states: list[torch.Tensor] | torch.Tensor) -> None:
        shapes = {tuple(state.shape) for state in states}
        if stream not in STREAMS or len(states) != self.num_layers + 1 or len(shapes) != 1 or \
                next(iter(shapes))[1:] != (self.width,):
            raise UserError(f"{stream}: expected {self.num_layers + 1} boundaries of [n, {self.width}], "
                            f"got {len(states)} of {sorted(shapes)}")


def _require_sample(name: str, batch: torch.Tensor, ids: torch.Tensor) -> None:
    if batch.ndim != 3 or not batch.is_floating_point() or not bool(torch.isfinite(batch).all()):
        raise UserError(f"{name}: expected finite floats [boundaries, n, C], got {batch.dtype} {list(batch.shape)}")
    if ids.dtype != torch.int64 or tuple(ids.shape) != (batch.shape[1],):
        raise UserError(f"sample_ids of {name}: expected int64 [{batch.shape[1]}], got {ids.dtype} {list(ids.shape)}")
