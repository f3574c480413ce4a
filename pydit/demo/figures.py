"""Figures of the demo's report: losses, prompts met, images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pydit.reporting.figures import COLOURS, GRID, INK, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"teacher": "teacher", "pruned": "pruned, not trained", "distilled": "pruned and distilled"}
PASS, FAIL = "#00795a", "#b3470a"
CATEGORY_NAMES = {"single_object": "single object", "two_object": "two objects", "colors": "colours",
                  "color_attr": "colour binding", "glyph": "glyphs"}  # categories keep GenEval's spelling in the code


def category_name(category: str) -> str:
    """A category as a reader would write it."""
    return CATEGORY_NAMES.get(category, category.replace("_", " "))


@styled
def losses(phases: dict[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Loss against step, one panel per phase of the distillation: every step faintly, a running mean on top.

    Parameters
    ----------
    phases : title -> (steps, losses).
    """
    phases = {title: values for title, values in phases.items() if len(values[0])}
    figure, axes = new_figure(4.9 * max(1, len(phases)), 3.3, ncols=max(1, len(phases)), squeeze=False)
    for ax, (title, (steps, values)) in zip(axes[0], phases.items(), strict=False):
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        ax.plot(steps, values, color=COLOURS["distilled"], alpha=0.25, linewidth=0.9)
        ax.plot(steps, _running_mean(values), color=COLOURS["distilled"], linewidth=2)
        if (values > 0).all() and values.max() > 3 * values.min():
            ax.set_yscale("log")
            _plain_log_ticks(ax)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(axis="y", which="both")
        ax.margins(x=0.01)
        final = float(_running_mean(values)[-1])
        ax.annotate(f"{final:.3g}", (steps[-1], final), xytext=(5, 0), textcoords="offset points", va="center",
                    color=COLOURS["distilled"], fontweight="bold", annotation_clip=False)
        ax.set_ylabel("loss")
    return figure


@styled
def category_bars(results: dict[str, dict[str, Any]]) -> Figure:
    """Share of prompts met per category, three bars each, with Wilson 95 % intervals.

    Parameters
    ----------
    results : model name -> {"overall", "per_category", "interval_per_category"}.
    """
    categories = list(next(iter(results.values()))["per_category"])
    groups = ["mean over\ncategories", *(category_name(name).replace(" ", "\n") for name in categories)]
    figure, ax = new_figure(9.8, 3.9)
    width = 0.8 / len(results)
    centres = np.arange(len(groups)) + np.array([0.0] + [0.35] * len(categories))
    for k, (model, figures) in enumerate(results.items()):
        x = centres + (k - (len(results) - 1) / 2) * width
        y = np.array([figures["overall"], *(figures["per_category"][c] for c in categories)])
        ax.bar(x, y, width * 0.92, color=COLOURS[model], label=NAMES[model], hatch="///" if model == "pruned" else None,
               edgecolor="white", linewidth=0)
        bounds = np.array([figures["interval_per_category"][c] for c in categories]).T
        ax.errorbar(x[1:], y[1:], yerr=np.abs(bounds - y[1:]), fmt="none", ecolor=INK, elinewidth=0.8, capsize=2,
                    alpha=0.65)
        for where, value in zip(x, y, strict=True):
            ax.text(where, -0.015, f"{100 * value:.0f}", ha="center", va="top", fontsize=7.5, color=COLOURS[model])
    ax.axvline((centres[0] + centres[1]) / 2, color=GRID, linewidth=1.2)
    ax.set_xticks(centres, groups)
    ax.tick_params(axis="x", length=0, pad=12)
    ax.set_ylim(0, 1.0)
    ax.set_yticks(np.linspace(0, 1, 6), [f"{p} %" for p in range(0, 101, 20)])
    ax.set_ylabel("prompts met")
    ax.grid(axis="y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(results), borderaxespad=0.2, handlelength=1.2)
    return figure


@styled
def image_grid(gallery: Sequence[dict[str, Any]], models: Sequence[str] = tuple(COLOURS)) -> Figure:
    """The same prompts and seeds drawn by each model, with the verifier's verdict.

    Parameters
    ----------
    gallery : entries with "prompt" (str), "images" {model: uint8 [H, W, 3]} and "passed" {model: bool}.
    models : rows, from the top.
    """
    columns = min(7, len(gallery))
    bands = -(-len(gallery) // columns)
    figure, axes = new_figure(1.5 * columns + 0.9, bands * (1.42 * len(models) + 0.55), nrows=bands * len(models),
                           ncols=columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, entry in enumerate(gallery):
        band, column = divmod(i, columns)
        for row, model in enumerate(models):
            ax = axes[band * len(models) + row][column]
            ax.set_axis_on()
            ax.imshow(entry["images"][model], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            passed = entry["passed"][model]
            for spine in ax.spines.values():
                spine.set(visible=True, color=PASS if passed else FAIL, linewidth=1.6)
            _verdict(ax, passed)
            if row == 0:
                ax.set_title("\n".join(textwrap.wrap(entry["prompt"], 17)), fontsize=8.5, fontweight="normal",
                             loc="center", pad=5)
            if column == 0:
                ax.set_ylabel(NAMES[model].replace(", ", ",\n").replace(" and ", "\nand "), fontsize=9,
                              color=COLOURS[model], fontweight="bold")
    return figure


def _verdict(ax: Axes, passed: bool) -> None:
    """A check or a cross on the upper right corner, drawn rather than typed so that no font is needed."""
    from matplotlib.patches import Circle

    ax.add_patch(Circle((0.975, 0.975), 0.095, transform=ax.transAxes, facecolor=PASS if passed else FAIL,
                        edgecolor="white", linewidth=1.2, zorder=5, clip_on=False))
    strokes = [((0.93, 0.963, 1.02), (0.975, 0.938, 1.015))] if passed else \
        [((0.94, 1.01), (0.94, 1.01)), ((0.94, 1.01), (1.01, 0.94))]
    for x, y in strokes:
        ax.plot(x, y, transform=ax.transAxes, color="white", linewidth=1.6, solid_capstyle="round", zorder=6,
                clip_on=False)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a trailing window of a fifteenth of the steps, shorter at the start; same length."""
    window = max(1, len(values) // 15)
    total = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


def _plain_log_ticks(ax: Axes) -> None:
    """0.2 rather than 2 x 10^-1 on a logarithmic axis that spans one or two decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
