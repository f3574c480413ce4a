"""Tables and curves of :mod:`benchmarks.quality`, from the cells of a run or from the file that sums them up.

    python -m benchmarks.quality_table --from benchmarks/results/quality-cpu-DATE.json --picture docs/quality.png
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydit import files
from pydit.errors import FormatError, UserError
from pydit.plan import PruningPlan

METHODS = ("ppcl", "amber", "laptop", "bi", "hierarchical", "learned mask", "uniform", "random")
LADDER = ("bi, sequential", "ppcl, sequential", "ppcl literal, sequential", "ppcl, least 1 - CKA, sequential",
          "ppcl", "+ text linear", "+ FFN linear", "+ fine-tuning")
HALF, HYBRID_HALF = "half the parameters", "hybrid stream, half"
HYBRID_MOST, HYBRID = "hybrid stream, 70 %", "hybrid stream, 30 %"
NAMES = {"methods": METHODS, "ladder": LADDER, "goals": (HALF, HYBRID_MOST, HYBRID_HALF, HYBRID)}  # rows, in order
FORMAT, VERSION = "pydit-quality", 1
#: Student's t, two-sided 95 %, by number of seeds: a normal's 1.96 is far too narrow for three.
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
TITLES = {"methods": "Methods side by side", "ladder": "PPCL's ablation ladder", "goals": "Goals",
          "subsets": "Pluggable subsets"}
_HEAD = ("| {} | layers removed | parameters | prompts met | relative loss | velocity error | seeds |\n"
         "|---|---|---|---|---|---|---|")


def summarise(out: Path) -> dict[str, Any]:
    """What the tables need of all cells in ``out``, small enough to keep: no verdicts of single prompts.

    Raises
    ------
    FormatError
        A cell is no cell, or there is none.
    """
    rows = [_short(files.read_json(path, what="cell")) for path in sorted((out / "cells").glob("*.json"))]
    if not rows:
        raise FormatError(f"out: expected finished cells in {out / 'cells'}, got none")
    teacher = files.read_json(out / "teacher.json", what="teacher")
    return {"format": FORMAT, "version": VERSION, **files.read_json(out / "settings.json", what="out"),
            "teacher_result": {key: teacher[key] for key in ("overall", "per_category", "images_per_category")},
            "rows": rows}


def _short(row: dict[str, Any]) -> dict[str, Any]:
    if "train_seconds" not in row:
        return row  # taken from a summary
    kept = {key: row[key] for key in ("cell", "parameters", "velocity_error_pruned", "velocity_error", "seconds",
                                      "machine", "versions")}
    kept["plan"] = dataclasses.replace(PruningPlan.from_dict(row["plan"]), provenance={}).to_dict()
    if "subsets" in row:
        kept["subsets"] = [{**{key: subset[key] for key in ("active", "parameters", "error", "loss")},
                            "overall": subset["result"]["overall"]} for subset in row["subsets"]]
    else:
        kept |= {"overall": row["result"]["overall"], "per_category": row["result"]["per_category"],
                 "prompts": len(row["result"]["samples"]), "loss": row["loss"]}
    return kept


def load(path: Path) -> dict[str, Any]:
    """A file of :func:`summarise`; FormatError when it is none."""
    data = files.read_json(path, what="quality")
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise FormatError(f"quality: expected {path} to be of format {FORMAT}, version {VERSION}, got another file")
    return data


def markdown(data: dict[str, Any], names: Mapping[str, Sequence[str]]) -> str:
    """Every table there are rows for; rows by share and then in the order of the table's ``names``."""
    lines = []
    for title in names:
        groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
        for row in data["rows"]:
            if row["cell"]["table"] == title:
                groups.setdefault((row["cell"]["share"], row["cell"]["name"]), []).append(row)
        if not groups:
            continue
        lines += [_HEAD.format(TITLES[title])]
        for (_, name), group in sorted(groups.items(), key=lambda item: (item[0][0], names[title].index(item[0][1]))):
            met = 100 * np.mean([row["overall"] for row in group])
            plan = PruningPlan.from_dict(group[0]["plan"])
            sizes = sorted({row["parameters"] for row in group})
            size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            error = np.mean([row["velocity_error"] for row in group])
            lines.append(f"| {name} | {plan.removed} of {plan.num_layers} | {size} | {met:.1f} % | "
                         f"{interval([row['loss'] for row in group])} | {error:.4f} | {len(group)} |")
        lines.append("")
    for row in data["rows"]:
        if row["cell"]["table"] == "subsets":
            head = f"{TITLES['subsets']}, seed {row['cell']['seed']}: intervals pruned"
            lines += [f"| {head} | parameters | prompts met | relative loss | output error |", "|---|---|---|---|---|"]
            lines += [f"| {len(s['active'])} | {s['parameters']:,} | {100 * s['overall']:.1f} % | "
                      f"{interval([s['loss']])} | {s['error']:.4f} |" for s in row["subsets"]] + [""]
    return "\n".join(lines)


def interval(losses: Sequence[dict[str, Any]]) -> str:
    """Relative loss with its 95 % interval: of one seed over prompts, of several over seeds (Student's t).

    Two seeds have no interval worth printing; both values stand there.
    """
    values = [loss["value"] for loss in losses]
    if None in values or losses[0]["low"] is None:
        return "undefined"  # the teacher meets nothing
    mean, count = np.mean(values), len(values)
    if count == 1:
        low, high = losses[0]["low"], losses[0]["high"]
    elif count == 2:
        return f"{100 * mean:.1f} % ({' and '.join(f'{100 * value:.1f}' for value in values)})"
    else:
        half = STUDENT.get(count, 2.571) * np.std(values, ddof=1) / count ** 0.5
        low, high = mean - half, mean + half
    return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def curves(data: dict[str, Any], path: Path, methods: Sequence[str]) -> None:
    """Prompts met against parameters: one line a method, the subsets, the goals as stars, the teacher."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    styles = zip(("o", "s", "^", "v", "D", "P", "X", "<"), pyplot.get_cmap("tab10").colors, strict=False)
    for method, (marker, colour) in zip(methods, styles, strict=False):
        points: dict[int, list[float]] = {}
        for row in data["rows"]:
            if row["cell"]["table"] == "methods" and row["cell"]["name"] == method:
                points.setdefault(row["parameters"], []).append(100 * row["overall"])
        if points:
            axes.plot([size / 1e6 for size in sorted(points)], [np.mean(points[size]) for size in sorted(points)],
                      color=colour, marker=marker, label=method)
    subsets = [row["subsets"] for row in data["rows"] if row["cell"]["table"] == "subsets"]
    for number, rows in enumerate(subsets):
        axes.plot([s["parameters"] / 1e6 for s in rows], [100 * s["overall"] for s in rows], "k--", linewidth=1,
                  label="ppcl, subsets of one model" if number == 0 else None)
    goals = [row for row in data["rows"] if row["cell"]["table"] == "goals"]
    for row, face in zip(goals, ("black", "grey", "silver", "white"), strict=False):
        axes.plot(row["parameters"] / 1e6, 100 * row["overall"], "k*", markersize=12, markerfacecolor=face,
                  linestyle="none", label=f"{row['cell']['name']}, trained longer")
    axes.axhline(100 * data["teacher_result"]["overall"], color="grey", linewidth=1, linestyle=":")
    axes.annotate("teacher", (axes.get_xlim()[0], 100 * data["teacher_result"]["overall"]), xytext=(4, 3),
                  textcoords="offset points", fontsize=8, color="grey")
    axes.set_xlabel("transformer parameters, millions")
    axes.set_ylabel("prompts met, % (mean over categories)")
    axes.set_ylim(0, 105)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_table",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, help="a file that --summary wrote")
    parser.add_argument("--picture", type=Path, help="write the curves there")
    args = parser.parse_args(argv)
    try:
        data = load(args.source)
        print(markdown(data, NAMES))
        if args.picture:
            curves(data, args.picture, METHODS)
    except (UserError, OSError) as error:
        parser.exit(2, f"quality_table: error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
