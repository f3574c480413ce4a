"""Run calibration batches through a frozen transformer and keep statistics of what flows between its blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pydit.analysis.ablation import ablate
from pydit.analysis.activations import ActivationStats
from pydit.arguments import integer
from pydit.errors import UserError
from pydit.families import FAMILIES
from pydit.models import ModelAdapter, get_adapter
from pydit.models.adapter import STREAMS, require_batches
from pydit.stats import checks


def collect(transformer: nn.Module, batches: Iterable[Mapping[str, Any]], *, max_batches: int | None = None,
            tokens_per_batch: int = 256, sample_fraction: float = 0.5, with_ablation: bool = False,
            project: int | None = None, progress: bool = True, seed: int = 0, resume: ActivationStats | None = None,
            on_batch: Callable[[ActivationStats], None] | None = None) -> ActivationStats:
    """Collect activation statistics; the transformer is not changed.

    Parameters
    ----------
    transformer : diffusers transformer of a known family.
    batches : keyword-argument dicts for ``transformer.forward``. Their prompts, noise levels and resolutions are what
        the analysis will be about. A batch is the unit of resampling, so several images a batch and 20 batches or
        more serve better than the reverse.
    max_batches : stop after so many; needed when ``batches`` never ends.
    tokens_per_batch : tokens per stream and batch that are kept as samples (all if there are fewer); memory on the
        host is (L + 1) * tokens * C values per stream and sample batch.
    sample_fraction : share of the batches that become samples, spread evenly; the others feed the probes, with every
        token.
    with_ablation : also leave out each block in turn on the sample batches (:func:`pydit.analysis.ablate`), which
        the criteria that look at the output need; takes about L / 2 forwards per sample batch.
    project : keep this many random directions of the features in place of their C channels, to save memory (moments
        take (project / C)^2 of it). The directions are normal, drawn from ``seed``, the same for all blocks and both
        streams. Squared lengths then have a relative standard error of sqrt(2 / project), 6 % at 512 and 4 % at 1024
        before averaging over tokens, cosines no more; probes map directions to directions.
    progress : show a progress bar on stderr.
    seed : of the choice of tokens.
    resume : go on from these statistics, which are added to; ``batches`` must begin with number
        ``resume.batches_seen`` of the stream, and ``max_batches`` counts from its start. Options as before give what
        an uninterrupted run gives.
    on_batch : called with the statistics after every batch, for example to save them.

    Raises
    ------
    UserError
        Fewer than 2 batches, bad options, a batch that is not a dict, or ``resume`` from another model.
    """
    checks.number("sample_fraction", sample_fraction, "a number between 0 and 1", lambda x: 0 < x < 1)
    tokens_per_batch = integer("tokens_per_batch", tokens_per_batch, 4, expected="at least 4")
    if max_batches is not None:
        max_batches = integer("max_batches", max_batches, 2, expected="at least 2")
    seed = integer("seed", seed, -2**40, 2**40, expected="a whole number between -2^40 and 2^40")
    checks.flag("with_ablation", with_ablation)
    if on_batch is not None and not callable(on_batch):
        raise UserError(f"on_batch: expected a function or None, got {type(on_batch).__name__}")
    require_batches(batches)
    adapter = get_adapter(transformer)
    layers = adapter.num_layers(transformer)
    device = next(transformer.parameters()).device
    width = adapter.width(transformer)
    if project is not None:
        project = integer("project", project, 8, width - 1, expected=f"8 to {width - 1} directions")
    directions = None if project is None else torch.randn(
        width, project, generator=torch.Generator().manual_seed(seed)).div_(project ** 0.5).to(device)
    stats = ActivationStats(adapter.family, layers, project or width, last_text_used=adapter.last_text_used,
                            starts=adapter.starts(transformer), device=device, projected_from=project and width,
                            config={name: transformer.config[name] for name in FAMILIES[adapter.family].published[0]
                                    if name in transformer.config})
    if resume is not None:
        try:
            stats.merge(resume)  # refuses those of another model
        except UserError as error:
            raise UserError(f"resume: {str(error).removeprefix('other: ')}") from None
    first = stats.batches_seen
    rest = itertools.islice(batches, None if max_batches is None else max(max_batches - first, 0))
    for index, batch in enumerate(_bar(rest, max_batches, progress, first), first):
        if _samples(index + 1, sample_fraction) > _samples(index, sample_fraction):
            # One generator per batch: the choice does not depend on how many batches came before on this machine.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            seen = _Batch(adapter, stats, directions, keep=tokens_per_batch, generator=generator)
        else:
            seen = _Batch(adapter, stats, directions)
        adapter.capture(transformer, batch, range(layers + 1), seen.visit)
        if seen.keep is not None:
            stats.add_sample({stream: torch.stack(states) for stream, states in seen.rows.items()}, seen.owners)
            if with_ablation:
                stats.add_ablation(ablate(transformer, [batch]))
        stats.images_seen += seen.images
        stats.batches_seen = index + 1
        if on_batch is not None:
            on_batch(stats)
    samples = _samples(stats.batches_seen, sample_fraction)
    if min(samples, stats.batches_seen - samples) == 0:
        raise UserError("batches: expected enough for both probes and samples, "
                        f"got {stats.batches_seen - samples} probe and {samples} sample batches")
    return stats


class _Batch:
    """One forward, boundary by boundary: a sample keeps ``keep`` tokens of each, a probe batch (None) all of two.

    So a batch takes the memory of its samples or of two boundaries, not of L + 1.
    """

    def __init__(self, adapter: ModelAdapter, stats: ActivationStats, directions: torch.Tensor | None, *,
                 keep: int | None = None, generator: torch.Generator | None = None) -> None:
        self.adapter, self.stats, self.directions = adapter, stats, directions
        self.keep, self.generator = keep, generator
        self.images = 0
        self.tokens: dict[str, torch.Tensor] = {}
        self.owners: dict[str, torch.Tensor] = {}  # which image of the batch a kept token belongs to
        self.rows: dict[str, list[torch.Tensor]] = {stream: [] for stream in STREAMS}

    def visit(self, boundary: int, streams: tuple[torch.Tensor, torch.Tensor], kwargs: dict[str, Any]) -> None:
        if boundary == 0:
            self._choose(dict(zip(STREAMS, streams, strict=True)), self.adapter.text_mask(kwargs))
        for stream, state in zip(STREAMS, streams, strict=True):
            rows = state.flatten(0, 1)[self.tokens[stream].to(state.device)]
            if self.directions is not None:
                rows = rows.float() @ self.directions
            seen = self.rows[stream]
            seen.append(rows)
            if self.keep is None and boundary > 0:
                self.stats.add_probe_layer(boundary - 1, stream, *seen)
                del seen[0]

    def _choose(self, streams: dict[str, torch.Tensor], mask: torch.Tensor | None) -> None:
        self.images = streams["image"].shape[0]
        for stream, state in streams.items():
            tokens = _tokens(state, mask if stream == "text" else None)
            if self.keep is not None:
                tokens = tokens[torch.randperm(len(tokens), generator=self.generator)[:self.keep]].sort().values
            self.tokens[stream], self.owners[stream] = tokens, tokens // max(state.shape[1], 1)


def _samples(batches: int, fraction: float) -> int:
    """How many of the first ``batches`` become samples."""
    return int(batches * fraction + 1e-9)


def _tokens(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Indices of the real tokens of [B, S, C], flattened over B and S, on the CPU."""
    if mask is None:
        return torch.arange(state.shape[0] * state.shape[1])
    return mask.bool().flatten().cpu().nonzero().flatten()


def _bar(batches: Iterable, total: int | None, progress: bool, done: int) -> Iterable:
    from tqdm import tqdm

    if total is None and hasattr(batches, "__len__"):
        total = len(batches)
    return tqdm(batches, total=total, initial=done, desc="collect", unit="batch", disable=not progress)
