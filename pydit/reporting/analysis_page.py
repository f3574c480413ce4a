"""The analysis as one self-contained HTML page: CKA maps, difference curves, and what every criterion would remove."""

from __future__ import annotations

import html
import io
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pydit import files
from pydit.analysis.ablation import Ablation
from pydit.analysis.activations import ActivationStats
from pydit.analysis.candidates import Candidate, agreement, candidates
from pydit.analysis.criteria import PPCL, Scores
from pydit.analysis.criteria.base import removed_layers
from pydit.reporting import figures, statistics
from pydit.reporting.page import CSS, data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHARTS = (
    ("How alike the blocks' outputs are",
     "Debiased CKA between the outputs of all blocks, with tokens as examples; outlined: the units of the PPCL rule. "
     "Between neighbours it is close to 1 in any residual network."),
    ("Where the chains of linear probes break",
     "From the first block of each unit real activations go through linear probes instead of blocks. Shown is the CKA "
     "that each probe loses, both streams together, with its 95 % interval over calibration batches. A unit ends "
     "before the first loss that exceeds the one before it beyond that noise: the open circle. Where blocks were left "
     "out one by one, the bars below are the error of the output without each: what CKA does not know."),
    ("What every criterion removes", "Filled: the block is removed. The last row is the share of the criteria that do, "
     "without uniform and random."))
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pydit: redundancy of {family}</title><style>{css}</style></head>
<body><main><h1>Which blocks {family} can do without</h1>
<p class="lead">{layers} blocks; {images} calibration images in {batches} batches; target: {target}.</p>
{sections}
<section><h2>Candidate plans</h2>{table}
<p class="note">Predicted error: squared, relative to the output, the sum of what leaving out one block does; where
blocks depend on each other, leaving out all of them does something else (<code>--check</code> measures it). FLOPs: of
the blocks, as a share of the teacher's; predicted ms: the least that they take on an H200 at 989 TFLOP/s for one image
at 1328 x 1328, not measured.</p></section>
</main></body></html>
"""


def write(stats: ActivationStats, path: str | os.PathLike, *, target: float | int) -> list[Candidate]:
    """Score ``stats`` by every criterion and write the page, atomically.

    Parameters
    ----------
    target : layers to remove, as for :func:`pydit.analysis.detect`.

    Returns
    -------
    list of Candidate
        What the page's table shows.
    """
    scored: dict[str, Scores] = {}
    found = candidates(stats, target=target, scored=scored)
    ppcl = PPCL()
    scores = scored.get("ppcl") or ppcl.score(stats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the page says it
        units = ppcl.select(scores)
    said = [text for _, text in _CHARTS]
    if "stability" in units.provenance:
        share = 100 * units.provenance["stability"]
        said[0] += f" {share:.0f} % of bootstrap draws of the batches give the same units."
    curves = ppcl.curves(scores)
    pictures = (figures.cka_maps(statistics.cka_matrices(stats), units.intervals),
                difference_curves(curves, stats.num_layers, stats.ablation), choices(found, stats.num_layers))
    sections = "".join(
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p><figure><img class=\"chart\" "
        f'src="{data_uri(_png(picture))}" alt="{html.escape(title, quote=True)}"></figure></section>'
        for (title, _), text, picture in zip(_CHARTS, said, pictures, strict=True))
    page = _PAGE.format(family=html.escape(stats.family), css=CSS, layers=stats.num_layers,
                        images=stats.images_seen, batches=stats.batches_seen, sections=sections,
                        target=_target(target), table=_table(found))
    files.write_text(path, page)
    return found


@figures.styled
def difference_curves(curves: Sequence[dict[str, Any]], num_layers: int, ablation: Ablation | None = None) -> Figure:
    """One line per unit of :meth:`pydit.analysis.criteria.PPCL.curves`: CKA lost per step, with error bars.

    Below, with an ablation, the relative squared error of the output without each block, with 95 % error bars.
    """
    figure, ax = figures.new_figure(9.6, 3.8 if ablation is None else 5.8)
    if ablation is not None:
        errors = ablation.relative(500).numpy()
        ax.remove()
        ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        spread = np.abs(np.quantile(errors[1:], (0.025, 0.975), axis=0) - errors[0])
        below.bar(range(num_layers), errors[0], yerr=spread, color=figures.FAINT, width=0.6, ecolor=figures.INK,
                  error_kw={"elinewidth": 0.9, "capsize": 2})
        below.set_yscale("log")
        below.set_ylabel("error without it")
    palette = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00")
    for index, curve in enumerate(curves):
        colour = palette[index % len(palette)]
        layers, loss = np.array(curve["layers"]), np.array(curve["loss"])
        spread = np.abs(np.stack((loss - np.array(curve["low"]), np.array(curve["high"]) - loss)))
        ax.errorbar(layers, loss, yerr=spread, color=colour, linewidth=1.4, elinewidth=0.9, capsize=2, zorder=2)
        inside = layers <= curve["end"]
        ax.plot(layers[inside], loss[inside], "o", color=colour, markersize=4.5, zorder=3)
        ax.plot(layers[~inside], loss[~inside], "o", color=colour, markerfacecolor="white", markersize=5.5, zorder=3)
        ax.axvspan(curve["start"] - 0.3, curve["end"] + 0.3, color=colour, alpha=0.08, linewidth=0)
    (ax if ablation is None else below).set_xlabel("block")
    ax.set_ylabel("CKA lost by its probe")
    ax.set_xlim(-0.6, num_layers - 0.4)
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(axis="y")
    if not curves:
        ax.text(0.5, 0.5, "no unit of two blocks or more", transform=ax.transAxes, ha="center", color=figures.FAINT)
    return figure


@figures.styled
def choices(found: Sequence[Candidate], num_layers: int) -> Figure:
    """Criteria by blocks: filled where the criterion removes the block; below, the share of the criteria that do."""
    from matplotlib.patches import Rectangle

    found = [candidate for candidate in found if candidate.plan is not None]
    figure, ax = figures.new_figure(9.6, 1.5 + 0.32 * (len(found) + 1))
    shares = agreement(found, num_layers)
    for row, candidate in enumerate(found):
        gone = removed_layers(candidate.plan)
        for layer in range(num_layers):
            ax.add_patch(Rectangle((layer - 0.44, row - 0.4), 0.88, 0.8, linewidth=0,
                                   facecolor=figures.COLOURS["pruned"] if layer in gone else figures.GRID))
    for layer, share in enumerate(shares):
        ax.add_patch(Rectangle((layer - 0.44, len(found) - 0.4), 0.88, 0.8, linewidth=0, alpha=max(share, 0.04),
                               facecolor=figures.INK))
        if share and num_layers <= 24:
            ax.text(layer, len(found), f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5,
                    color="white" if share > 0.45 else figures.INK)
    ax.set_xlim(-0.6, num_layers - 0.4)
    ax.set_ylim(len(found) + 0.5, -0.6)
    ax.set_yticks(range(len(found) + 1), [*(candidate.name for candidate in found), "share, %"])
    ax.set_xlabel("block")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure


def _table(found: Sequence[Candidate]) -> str:
    rows = []
    for candidate in found:
        if candidate.plan is None:
            rows.append(f'<tr><td>{html.escape(candidate.name)}</td><td colspan="5">{html.escape(candidate.note)}</td>'
                        "</tr>")
            continue
        size = "" if candidate.parameters is None else f"{candidate.parameters:,}"
        flops = "" if candidate.flops is None else f"{100 * candidate.flops:.0f} %"
        latency = "" if candidate.latency_ms is None else f"{candidate.latency_ms:.3g}"
        loss = "not predicted" if candidate.loss is None else \
            f"{candidate.loss:.4f} ({candidate.low:.4f} to {candidate.high:.4f})"
        note = f"<br><span class=\"note\">{html.escape(candidate.note)}</span>" if candidate.note else ""
        rows.append(f"<tr><td style=\"white-space:normal\">{html.escape(candidate.name)}{note}</td>"
                    f"<td>{candidate.plan.num_student_layers}</td><td>{size}</td><td>{flops}</td><td>{latency}</td>"
                    f"<td>{loss}</td></tr>")
    head = "".join(f"<th>{name}</th>" for name in ("criterion", "blocks left", "parameters", "FLOPs",
                                                  "predicted ms", "predicted error (95 %)"))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _target(target: float | int) -> str:
    return f"{100 * target:.0f} % of the blocks" if isinstance(target, float) else f"{target} blocks"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figures.DPI, metadata={"Software": None})
    return buffer.getvalue()
