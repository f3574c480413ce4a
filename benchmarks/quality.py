"""What pruning costs the demo world's teacher: criteria side by side, PPCL's ablation ladder, pluggable subsets.

    python -m benchmarks.quality --out DIR              # everything; says first how many cells and hours that is
    python -m benchmarks.quality --out DIR --only ladder --seeds 0 --hours 1
    python -m benchmarks.quality --out DIR --table      # the tables and curves of what is there

Every cell (a way to prune, a share, a seed) is one JSON file, so the command can be stopped at any time and goes on
where it stopped. All cells train for the same number of steps on the same data and are judged on the same prompts.
Quality here is that of a teacher of 16 blocks that was trained with stochastic depth; it says nothing about others.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydit import doctor, files
from pydit.analysis import ActivationStats, collect, detect, learn_mask, velocity_error
from pydit.demo import data, world
from pydit.demo.evaluate import Result, evaluate, relative_loss
from pydit.demo.teacher import ASSETS
from pydit.distill import DistillConfig, distill
from pydit.errors import UserError
from pydit.inference.pipeline import load_pipeline
from pydit.inference.pluggable import fallback_order
from pydit.plan import PruningPlan
from pydit.pruning import prune

METHODS = ("ppcl", "amber", "laptop", "bi", "hierarchical", "learned mask", "uniform", "random")
SHARES = (0.3, 0.5, 0.7)
LADDER = ("bi, sequential", "ppcl, sequential", "ppcl literal, sequential", "ppcl, least 1 - CKA, sequential",
          "ppcl", "+ text linear", "+ FFN linear", "+ fine-tuning")
LADDER_SHARE = 0.5  # at 0.6 every row loses more than three prompts in four


@dataclass(frozen=True)
class Settings:
    """The same for every cell.

    steps : optimiser steps; a fine-tuned row of the ladder has a sixth more. mask_steps : of the learned mask, whose
    updates are thrown away.
    """

    steps: int = 300
    batch_size: int = 32
    images: int = 4096
    calibration: int = 16
    mask_steps: int = 100
    prompts: int = 420
    sampling_steps: int = data.STEPS
    guidance: float = data.GUIDANCE


@dataclass(frozen=True)
class Cell:
    """One row of a table with one seed. table : "methods", "ladder" or "subsets"."""

    table: str
    name: str
    share: float
    seed: int

    @property
    def file(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.name)
        return f"{self.table}-{words}-{self.share:g}-{self.seed}.json"


def cells(only: str | None, seeds: list[int]) -> Iterator[Cell]:
    """All of them, seed by seed, so that a run that is cut short has whole tables of fewer seeds."""
    for seed in seeds:
        for table, names, shares in (("methods", METHODS, SHARES), ("ladder", LADDER, (LADDER_SHARE,)),
                                     ("subsets", ("ppcl",), (LADDER_SHARE,))):
            for share in shares if only in (None, table) else ():
                yield from (Cell(table, name, share, seed) for name in names)


class Bench:
    """The teacher, and what cells of one seed share."""

    def __init__(self, out: Path, settings: Settings, teacher: Path) -> None:
        self.out, self.settings = out, settings
        self.pipe = load_pipeline(teacher, dtype=torch.float32)
        self.teacher = self.pipe.transformer
        (out / "cells").mkdir(parents=True, exist_ok=True)
        stated = {"settings": asdict(settings), "teacher": teacher.name}
        if (out / "settings.json").exists():
            found = files.read_json(out / "settings.json", what="out")
            if found != stated:
                raise UserError(f"out: expected cells made with {stated}, got some made with {found}")
        files.write_json(out / "settings.json", stated)
        self.prompts = world.sample_prompts(settings.prompts, split="held_out", seed=0)

    def batches(self, seed: int, count: int) -> list[dict[str, Any]]:
        stream = data.make_batches(self.pipe, batch_size=self.settings.batch_size, seed=1000 + seed)
        return [next(stream)[0] for _ in range(count)]

    def stats(self, seed: int) -> ActivationStats:
        file = self.out / f"stats-{seed}.safetensors"
        if not file.exists():
            collect(self.teacher, self.batches(seed, 2 * self.settings.calibration), with_ablation=True,
                    progress=False).save(file)
        return ActivationStats.load(file)

    def plan(self, cell: Cell) -> PruningPlan:
        """The plan of a cell. PPCL's difference rule where it reaches the share, else its least cost.

        The literal row and that of least 1 - CKA look at CKA alone, as published.
        """
        if cell.name == "learned mask":
            return learn_mask(self.teacher, lambda start: self.training_batches(cell, start), target=cell.share,
                              steps=self.settings.mask_steps, seed=cell.seed)
        stats, options = self.stats(cell.seed), {}
        method = cell.name if cell.table == "methods" else "bi" if cell.name.startswith("bi") else "ppcl"
        if method == "random":
            options["seed"] = cell.seed
        if "literal" in cell.name:
            options |= {"rule": "literal", "budget": "cka"}
        if "least" in cell.name:
            options |= {"selection": "optimal", "budget": "cka"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # choices inside the noise are what seeds are for
            try:
                plan = detect(stats, method=method, target=cell.share, **options)
            except UserError:
                if method != "ppcl":
                    raise
                plan = detect(stats, method=method, target=cell.share, **{**options, "selection": "optimal"})
        extra: dict[str, Any] = {}
        if cell.name.startswith("+"):
            extra["text_linear"] = [self._region(plan)]
            if cell.name != "+ text linear":
                extra["linear_ffn"] = self._most_linear(plan, cell, count=2)
        return dataclasses.replace(plan, **extra) if extra else plan

    @staticmethod
    def _region(plan: PruningPlan) -> tuple[int, int]:
        """The text of the last quarter of the layers, from the first one there that is kept whole."""
        whole = [layers[0] for layers in plan.source if len(layers) == 1]
        late = [layer for layer in whole if 3 * plan.num_layers // 4 <= layer < plan.num_layers - 1]
        return (late[0] if late else max(layer for layer in whole if layer < plan.num_layers - 1), plan.num_layers - 1)

    def _most_linear(self, plan: PruningPlan, cell: Cell, count: int) -> list[int]:
        """The layers that are kept whole and whose FFNs, linear one layer at a time, change the velocity least.

        PPCL takes the FFNs with the least error of their own output; the share of the variance that a map explains
        says nothing about it, and the velocity hears which of them matter.
        """
        whole = [layers[0] for layers in plan.source if len(layers) == 1]
        batches = self.batches(cell.seed, self.settings.calibration)

        def error(layer: int) -> float:
            student = prune(self.teacher, dataclasses.replace(plan, linear_ffn=[layer]), batches=batches)
            return velocity_error(self.teacher, student, batches[:4])

        return sorted(sorted(whole, key=error)[:count])

    def train(self, cell: Cell, student) -> float:
        """Distil as the cell says; returns seconds."""
        settings, started = self.settings, time.monotonic()
        common = {"layers_lr": 2e-4, "output_lr": 2e-4, "magnitude": 0.1, "log_every": 50}
        if "sequential" in cell.name:
            config = DistillConfig(layers_steps=0, output_steps=settings.steps, velocity_weight=0.0,
                                   boundary_weight=1.0, **common)
        elif cell.name == "+ fine-tuning":
            config = DistillConfig(layers_steps=settings.steps, output_steps=settings.steps // 6,
                                   output_trainable="all", flow_weight=1.0, linear_weight=1.0, **common)
        elif cell.table == "ladder":
            config = DistillConfig(layers_steps=settings.steps, linear_weight=1.0, **common)
        else:
            first = settings.steps // 10
            config = DistillConfig(layers_steps=first, output_steps=settings.steps - first, output_trainable="all",
                                   muon_lr=0.0015, **common)
        distill(self.teacher, student, lambda start: self.training_batches(cell, start), config, progress=False)
        return time.monotonic() - started

    def training_batches(self, cell: Cell, start: int) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        settings = self.settings
        return data.make_batches(self.pipe, start_step=start, batch_size=settings.batch_size, seed=cell.seed,
                                 images=settings.images, prompt_dropout=0.1)

    def judge(self, transformer, label: str) -> Result:
        self.pipe.register_modules(transformer=transformer)
        try:
            return evaluate(self.pipe, self.prompts, list(range(len(self.prompts))), steps=self.settings.sampling_steps,
                            guidance=self.settings.guidance, label=label)
        finally:
            self.pipe.register_modules(transformer=self.teacher)

    def teacher_result(self) -> Result:
        file = self.out / "teacher.json"
        if not file.exists():
            files.write_json(file, self.judge(self.teacher, "teacher").to_json())
        return Result.from_json(files.read_json(file, what="teacher"), what="teacher")

    def run(self, cell: Cell) -> None:
        started, teacher = time.monotonic(), self.teacher_result()
        plan = self.plan(cell)
        calibration = self.batches(cell.seed + 1, self.settings.calibration)
        student = prune(self.teacher, plan, batches=None if plan.is_stock else calibration)
        judged = self.batches(cell.seed + 2, self.settings.calibration)
        before = velocity_error(self.teacher, student, judged)
        trained = self.train(cell, student)
        row = {"cell": asdict(cell), "plan": plan.to_dict(), "parameters": plan.num_parameters(self.teacher.config),
               "velocity_error_pruned": before, "velocity_error": velocity_error(self.teacher, student, judged),
               "train_seconds": trained, "machine": doctor.machine(), "versions": doctor.versions()}
        if cell.table == "subsets":
            row["subsets"] = []
            for subset in fallback_order(student, judged[:2]):
                student.set_active(subset.active)
                result = self.judge(student, f"{len(subset.active)} active")
                row["subsets"].append({**asdict(subset), "result": result.to_json(),
                                       "loss": asdict(relative_loss(teacher, result))})
        else:
            result = self.judge(student, cell.name)
            row |= {"result": result.to_json(), "loss": asdict(relative_loss(teacher, result))}
        files.write_json(self.out / "cells" / cell.file, {**row, "seconds": time.monotonic() - started})


def table(out: Path) -> str:
    """Markdown of every cell that is there: mean over seeds, and its 95 % interval where there are several."""
    rows: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for file in sorted((out / "cells").glob("*.json")):
        row = files.read_json(file, what="cell")
        rows.setdefault((row["cell"]["table"], row["cell"]["name"], row["cell"]["share"]), []).append(row)
    lines: list[str] = []
    for title in ("methods", "ladder"):
        found = {key: value for key, value in rows.items() if key[0] == title}
        if found:
            lines += [f"**{title}**", "", "| | layers removed | parameters | prompts met | relative loss (95 %) | "
                      "velocity error | seeds |", "|---|---|---|---|---|---|---|"]
        order = list(METHODS) if title == "methods" else list(LADDER)
        for (_, name, share), group in sorted(found.items(), key=lambda item: (item[0][2], order.index(item[0][1]))):
            met = [row["result"]["overall"] for row in group]
            lines.append(f"| {name} | {100 * share:.0f} % | {group[0]['parameters']:,} | {100 * np.mean(met):.1f} % | "
                         f"{_loss(group)} | {np.mean([row['velocity_error'] for row in group]):.4f} | {len(group)} |")
        lines.append("")
    for (title, name, _), group in rows.items():
        if title == "subsets":
            lines += [f"**pluggable subsets, {name}, seed {group[0]['cell']['seed']}**", "",
                      "| intervals pruned | parameters | prompts met | output error |", "|---|---|---|---|"]
            lines += [f"| {len(s['active'])} | {s['parameters']:,} | {100 * s['result']['overall']:.1f} % | "
                      f"{s['error']:.4f} |" for s in group[0]["subsets"]]
    return "\n".join(lines)


def _loss(group: list[dict[str, Any]]) -> str:
    """Over seeds the spread of the seeds, with one seed that of the prompts."""
    losses = [row["loss"]["value"] for row in group]
    if None in losses or group[0]["loss"]["low"] is None:
        return "undefined"  # the teacher meets nothing
    if len(group) == 1:
        low, high = group[0]["loss"]["low"], group[0]["loss"]["high"]
    else:
        half = 1.96 * np.std(losses, ddof=1) / len(losses) ** 0.5
        low, high = np.mean(losses) - half, np.mean(losses) + half
    return f"{100 * np.mean(losses):.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def curves(out: Path, path: Path) -> None:
    """Prompts met against parameters: one line a method, and the subsets."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    found = [files.read_json(file, what="cell") for file in sorted((out / "cells").glob("*.json"))]
    for method in METHODS:
        points: dict[int, list[float]] = {}
        for row in found:
            if row["cell"]["table"] == "methods" and row["cell"]["name"] == method:
                points.setdefault(row["parameters"], []).append(100 * row["result"]["overall"])
        if points:
            axes.plot([size / 1e6 for size in sorted(points)], [np.mean(points[size]) for size in sorted(points)],
                      marker="o", label=method)
    for row in found:
        if row["cell"]["table"] == "subsets":
            axes.plot([s["parameters"] / 1e6 for s in row["subsets"]],
                      [100 * s["result"]["overall"] for s in row["subsets"]], "k--", marker="s", label="ppcl, subsets")
    axes.set_xlabel("transformer parameters, millions")
    axes.set_ylabel("prompts met, % (mean over categories)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the cells, made or continued")
    parser.add_argument("--only", choices=("methods", "ladder", "subsets"))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--hours", type=float, help="start no cell after this time")
    parser.add_argument("--shard", default="0/1", help="I/N: only every Nth cell from the Ith on (default: 0/1)")
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: whether it runs, no quality")
    parser.add_argument("--table", action="store_true", help="print what is there, write curves.png, run nothing")
    parser.add_argument("--teacher", type=Path, default=ASSETS, help="a demo pipeline (default: the committed one)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if not args.table:
            settings = Settings(steps=6, batch_size=4, images=64, calibration=4, prompts=14, sampling_steps=2,
                                mask_steps=4) \
                if args.quick else Settings()
            bench = Bench(args.out, settings, args.teacher)
            shard, of = (int(part) for part in args.shard.split("/"))
            wanted = list(cells(args.only, [int(seed) for seed in args.seeds.split(",")]))[shard::of]
            todo = [cell for cell in wanted if not (args.out / "cells" / cell.file).exists()]
            print(f"{len(wanted)} cells of {settings.steps} steps and {settings.prompts} prompts, {len(todo)} to do; "
                  f"about {_hours(args.out, todo)} on this machine", flush=True)
            for number, cell in enumerate(todo):
                if args.hours is not None and time.monotonic() - started > 3600 * args.hours:
                    print(f"time is up; {len(todo) - number} cells left")
                    break
                bench.run(cell)
                print(f"{number + 1}/{len(todo)}  {cell.file}", flush=True)
        print(table(args.out))
        curves(args.out, args.out / "curves.png")
    except (UserError, ValueError, OSError) as error:
        parser.exit(2, f"quality: error: {error}\n")
    return 0


def _hours(out: Path, todo: list[Cell]) -> str:
    done = [files.read_json(file, what="cell")["seconds"] for file in (out / "cells").glob("*.json")]
    return f"{len(todo) * np.mean(done) / 3600:.1f} h" if done else "an unknown time until the first cell is done"


if __name__ == "__main__":
    raise SystemExit(main())
