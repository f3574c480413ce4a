"""Statistics as the tables and plain data that ``pydit analyze`` and the demo show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pydit.reporting import console

if TYPE_CHECKING:
    from pydit.analysis import ActivationStats

STREAMS = ("image", "text")


def cka_matrices(stats: ActivationStats) -> dict[str, np.ndarray]:
    """Per stream, debiased CKA between the outputs of all blocks, float64 [L, L]."""
    return {stream: stats.cka(stream).matrix()[1:, 1:].numpy() for stream in STREAMS}


def linearity(stats: ActivationStats) -> dict[str, list[float]]:
    """Per stream and block, the share of what the block adds to its stream that an affine map of its input explains.

    The stream itself passes a block unchanged, so the R2 of the whole output is near 1 whatever the block does; here
    the error is measured against the change, output minus input. Below 0 where the map does worse than no change.
    """
    shares: dict[str, list[float]] = {}
    for stream in STREAMS:
        shares[stream] = []
        for moments, probe in zip(stats.moments[stream], stats.probes(stream), strict=True):
            total = float(moments.s_yy.sum())
            error = (1 - probe.r2) * total
            change = total - 2 * float(moments.m_xy.trace()) + float(moments.m_xx.trace())
            shares[stream].append(1 - error / change if change > 1e-12 * max(total, 1e-300) else 1.0)
    return shares


def sample_rows(stats: ActivationStats, stream: str) -> list[int]:
    """Tokens of every sample batch that CKA takes."""
    return [batch.shape[1] for batch in stats.sample_batches(stream)]


def block_rows(stats: ActivationStats) -> list[dict[str, float]]:
    """Per block and stream: R2 of its probe, share of its change explained, CKA between its input and its output, and
    the condition number of the probe's matrix (None where it is singular)."""
    explained = linearity(stats)
    probes = {stream: stats.probes(stream) for stream in STREAMS}
    neighbours = {stream: stats.cka(stream).matrix().diagonal(1).tolist() for stream in STREAMS}
    return [{"block": layer,
             **{f"{name}_{stream}": value for stream in STREAMS for name, value in (
                 ("r2", probes[stream][layer].r2), ("explained", explained[stream][layer]),
                 ("cka", neighbours[stream][layer]), ("condition", _finite(probes[stream][layer].condition)))}}
            for layer in range(stats.num_layers)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_statistics(stats: ActivationStats) -> None:
    """One line per block, and the rows behind them."""
    from pydit.stats.cka import describe_rows

    rows = block_rows(stats)
    console.table(["block", *(f"{stream} {name}" for stream in STREAMS for name in ("R2", "change", "CKA", "cond."))],
                  [[f"{value:.0e}" if name.startswith("condition") and value is not None else value
                    for name, value in row.items()] for row in rows])
    print("R2: of an affine map from a block's input to its output; change: the same for what the block adds; "
          "CKA: between input and output; cond.: condition number of the map's equations, - where singular.")
    for stream in STREAMS:
        print(f"CKA of {stream} tokens: {describe_rows(sample_rows(stats, stream))}")


def as_json(stats: ActivationStats) -> dict[str, Any]:
    """The table and the matrices as plain data."""
    return {"family": stats.family, "num_layers": stats.num_layers, "images": stats.images_seen,
            "blocks": block_rows(stats), "rows": {stream: sample_rows(stats, stream) for stream in STREAMS},
            "cka": {stream: m.tolist() for stream, m in cka_matrices(stats).items()}}
