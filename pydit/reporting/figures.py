"""The house style, and figures of a model's blocks, drawn with matplotlib without a display.

The three models keep one colour each throughout; the colours are from the Okabe-Ito palette, which stays apart for
colour-blind readers, and no figure relies on colour alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pydit import files
from pydit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"teacher": "#3f4854", "pruned": "#d55e00", "distilled": "#0072b2"}
INK, FAINT, GRID = "#20262e", "#68717d", "#e3e6ea"
STREAMS = {"image": "#0072b2", "text": "#009e73"}
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 9.5, "axes.labelcolor": INK,
    "axes.edgecolor": "#b8bec6", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "axes.titlecolor": INK, "text.color": INK, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID, "grid.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": "white", "savefig.facecolor": "white",
}
DPI = 160


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a drawing function in the house style; UserError where matplotlib is missing."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        try:
            from matplotlib import rc_context
        except ImportError:
            raise UserError("matplotlib: expected for figures, got an environment without it; "
                            "pip install 'pydit[report]'") from None
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure in inches and its axes; no global state, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**kwargs)


def save(figure: Figure, path: str | os.PathLike, *, description: str | None = None) -> None:
    """Write a figure as PNG, atomically. ``description`` goes into the file, unseen."""
    from matplotlib import rc_context

    with files.replace_file(path) as temporary, rc_context(_STYLE):
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None, "Description": description})


@styled
def cka_maps(matrices: dict[str, np.ndarray], intervals: Sequence[tuple[int, int]] = ()) -> Figure:
    """Heat-maps of the similarity between the outputs of all blocks, one panel per stream.

    Parameters
    ----------
    matrices : stream name -> [L, L] CKA.
    intervals : [s, e] inclusive, outlined along the diagonal.
    """
    from matplotlib.patches import Rectangle

    size = len(next(iter(matrices.values())))
    lowest = min(float(np.nanmin(matrix)) for matrix in matrices.values())
    low = max(0.0, np.floor(lowest * 10) / 10)
    figure, axes = new_figure(4.6 * len(matrices) + 0.6, 5.1, ncols=len(matrices), squeeze=False)
    for ax, (stream, matrix) in zip(axes[0], matrices.items(), strict=True):
        shown = ax.imshow(matrix, cmap="cividis", vmin=low, vmax=1, interpolation="nearest")
        for start, end in intervals:
            length = end - start + 1
            for colour, thickness in (("white", 3.0), (COLOURS["pruned"], 1.8)):
                ax.add_patch(Rectangle((start - 0.5, start - 0.5), length, length, fill=False, edgecolor=colour,
                                       linewidth=thickness, clip_on=False))
        ticks = _depth_ticks(size)
        ax.set_xticks(ticks)
        ax.set_yticks(ticks)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.set_title(f"{stream} stream")
        ax.set_xlabel("output of block")
    axes[0][0].set_ylabel("output of block")
    bar = figure.colorbar(shown, ax=axes, shrink=0.82, aspect=28, pad=0.02)
    bar.set_label("CKA, debiased (1 = same up to rotation and scale)")
    bar.outline.set_visible(False)
    return figure


@styled
def depth_axis(num_layers: int, intervals: Sequence[tuple[int, int]], r2: dict[str, Sequence[float]]) -> Figure:
    """How well a linear map predicts each block, and below it which blocks the plan replaces.

    Parameters
    ----------
    num_layers : L of the teacher.
    intervals : [s, e] inclusive: one student block for the teacher's blocks s..e.
    r2 : stream name -> share of the block's change of its stream that a linear map explains, L values.
    """
    from matplotlib.patches import FancyBboxPatch

    figure, (top, strip) = new_figure(9.8, 4.2, nrows=2, sharex=True, height_ratios=[2.6, 1])
    depth = np.arange(num_layers)
    for (stream, values), marker in zip(r2.items(), ("o", "s", "^"), strict=False):
        top.plot(depth, values, marker=marker, markersize=4.5, linewidth=1.6, color=STREAMS.get(stream, INK),
                 label=f"{stream} stream")
    for start, end in intervals:
        top.axvspan(start - 0.45, end + 0.45, color=COLOURS["pruned"], alpha=0.10, linewidth=0)
    top.set_ylabel("share of the block's change\nthat a linear map explains")
    top.set_title("How linear is each block?")
    top.grid(axis="y")
    top.tick_params(axis="x", length=0, labelbottom=False)
    if r2:
        top.legend(loc="lower center", ncols=len(r2), bbox_to_anchor=(0.86, 1.0), borderaxespad=0)

    owner = {i: k for k, (start, end) in enumerate(intervals) for i in range(start, end + 1)}
    for i in range(num_layers):
        inside = i in owner
        strip.add_patch(FancyBboxPatch(
            (i - 0.36, 1.0), 0.72, 0.8, boxstyle="round,pad=0,rounding_size=0.10",
            facecolor="#fbe3d3" if inside else "#e8ebef", edgecolor=COLOURS["pruned"] if inside else "#b8bec6",
            linewidth=1))
        strip.text(i, 1.4, str(i), ha="center", va="center", fontsize=8.5 if num_layers <= 24 else 5.5)
    for start, end in intervals:
        strip.add_patch(FancyBboxPatch(
            (start - 0.36, -0.25), end - start + 0.72, 0.7, boxstyle="round,pad=0,rounding_size=0.10",
            facecolor=COLOURS["distilled"], edgecolor="none"))
        strip.text((start + end) / 2, 0.1, "1 block", ha="center", va="center", color="white", fontsize=8)
        strip.plot([start - 0.36, start - 0.36], [0.5, 0.95], color=COLOURS["pruned"], linewidth=1)
        strip.plot([end + 0.36, end + 0.36], [0.5, 0.95], color=COLOURS["pruned"], linewidth=1)
    removed = sum(end - start for start, end in intervals)
    strip.text(0, 1.02, f"teacher's {num_layers} blocks (upper row); one trained block takes the place of each group "
               f"(lower row): {num_layers - removed} blocks remain", transform=strip.transAxes, fontsize=9, color=FAINT,
               va="bottom")
    strip.set_ylim(-0.35, 2.0)
    strip.set_xlim(-0.7, num_layers - 0.3)
    strip.set_axis_off()
    return figure


def _depth_ticks(size: int) -> np.ndarray:
    return np.arange(0, size, 1 if size <= 16 else 2 if size <= 32 else 5)
