"""What pruning costs the demo world's teacher: criteria side by side, PPCL's ablation ladder, subsets, goals.

    python -m benchmarks.quality --out DIR              # everything; says first how many cells and hours that is
    python -m benchmarks.quality --out DIR --only ladder --seeds 0 --hours 1
    python -m benchmarks.quality --out DIR --start benchmarks/results/quality-cpu-DATE.json   # what is missing there
    python -m benchmarks.quality --out DIR --table      # the tables and curves of what is there
    python -m benchmarks.quality --out DIR --summary benchmarks/results/quality-cpu-DATE.json

Every cell (a way to prune, a share, a seed) is one JSON file, so the command can be stopped at any time and goes on
where it stopped. All cells train for the same number of steps on the same data and are judged on the same prompts,
but for those of the goals, which ask how far a longer training gets: at half the parameters, with dual blocks and with
the hybrid stream, and at 70 and 30 % of them with the hybrid stream.
Quality here is that of a teacher of 16 blocks that was trained with stochastic depth; it says nothing about others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import quality_table
from benchmarks.quality_table import HALF, HYBRID, HYBRID_HALF, HYBRID_MOST, LADDER, METHODS, NAMES
from pydit import doctor, files
from pydit.analysis import ActivationStats, choose_linear_ffns, collect, detect, learn_mask, velocity_error
from pydit.demo import data, world
from pydit.demo.evaluate import Result, evaluate, relative_loss
from pydit.demo.teacher import ASSETS
from pydit.distill import DistillConfig, distill
from pydit.errors import UserError, one_line
from pydit.inference.pipeline import load_pipeline
from pydit.inference.pluggable import fallback_order
from pydit.plan import PruningPlan
from pydit.pruning import prune

SHARES = (0.3, 0.5, 0.7)
LADDER_SHARE = 0.5  # at 0.6 every row loses more than three prompts in four


@dataclass(frozen=True)
class Goal:
    """A student that trains longer.

    share : of the blocks, to be removed. linear_ffns : blocks whose FFNs become linear maps, linear_text_ffns : whose
    text FFN alone does. anchor : the block whose
    text stands in for that of the blocks behind it, as linear maps; it is one layer, what detection merged into it
    stays. dual : blocks that do not become single-stream; None is all. init : at which end of an interval the layer
    stands that is kept. rate : of Muon, a tenth of it for everything else; near the teacher a high one loses more than
    a short training wins back. guided : learns from half as many images, each with and without its prompt, and from
    the error of the velocity that the sampler makes of the two. on_policy : of images that it draws itself, of prompts
    drawn as often as the teacher's training drew them.
    """

    name: str
    share: float
    steps: int
    rate: float
    linear_ffns: int = 0
    linear_text_ffns: int = 0
    anchor: int | None = None
    dual: int | None = None
    init: str = "first"
    guided: bool = False
    on_policy: bool = False


GOALS = (
    # The teacher's redundancy is 7 blocks: the rest of a half is text FFNs and not an eighth block.
    Goal(HALF, share=0.43, linear_text_ffns=3, steps=4000, rate=0.0015, guided=True, on_policy=True),
    Goal(HYBRID_MOST, share=0.25, dual=10, steps=2000, rate=0.005),
    Goal(HYBRID_HALF, share=0.43, dual=6, steps=2000, rate=0.005),
    # All nine blocks that the teacher needs: with text as maps of the first one's and three linear FFNs they fit.
    Goal(HYBRID, share=0.43, linear_ffns=3, anchor=0, dual=6, init="last", steps=8000, rate=0.01),
)


@dataclass(frozen=True)
class Settings:
    """The same for every cell.

    steps : optimiser steps; a fine-tuned row of the ladder has a sixth more. mask_steps : of the learned mask, whose
    updates are thrown away. goal_images, goal_prompts : from which the goals learn, on which they are judged.
    """

    steps: int = 300
    batch_size: int = 32
    images: int = 4096
    calibration: int = 16
    mask_steps: int = 100
    prompts: int = 420
    sampling_steps: int = data.STEPS
    guidance: float = data.GUIDANCE
    goals: tuple[Goal, ...] = GOALS
    goal_images: int = 16384
    goal_prompts: int = 2500


QUICK = Settings(steps=3, batch_size=4, images=64, calibration=2, prompts=7, sampling_steps=2, mask_steps=2,
                 goals=tuple(dataclasses.replace(goal, steps=3) for goal in GOALS), goal_images=64, goal_prompts=7)


@dataclass(frozen=True)
class Cell:
    """One row of a table with one seed. table : "methods", "ladder", "subsets" or "goals"."""

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
                                     ("subsets", ("ppcl",), (LADDER_SHARE,)),
                                     *(("goals", (goal.name,), (goal.share,)) for goal in GOALS)):
            if only not in (None, table) or (table == "goals" and seed != seeds[0]):
                continue  # a goal trains ten times as long: one seed, more prompts
            for share in shares:
                yield from (Cell(table, name, share, seed) for name in names)


class Bench:
    """The teacher, and what cells of one seed share."""

    def __init__(self, out: Path, settings: Settings, teacher: Path) -> None:
        self.out, self.settings = out, settings
        self.pipe = load_pipeline(teacher, dtype=torch.float32)
        self.teacher = self.pipe.transformer
        (out / "cells").mkdir(parents=True, exist_ok=True)
        stated = {"settings": json.loads(json.dumps(asdict(settings))), "teacher": teacher.name}
        if (out / "settings.json").exists():
            found = files.read_json(out / "settings.json", what="out")
            if found != stated:
                raise UserError(f"out: expected cells made with {stated}, got some made with {found}")
        files.write_json(out / "settings.json", stated)

    def take(self, start: Path) -> None:
        """Count a summary's cells as done, where none was made here; a goal's only if it trained as it would here."""
        found, ours = quality_table.load(start), json.loads(json.dumps(asdict(self.settings)))

        def shared(settings: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in settings.items() if not name.startswith("goal")}

        def of_goal(settings: dict[str, Any], name: str) -> list[Any]:
            goals = [Goal(**goal) for goal in settings["goals"] if goal["name"] == name]
            return [goals, settings["goal_images"], settings["goal_prompts"]]

        if shared(found["settings"]) != shared(ours):
            raise UserError(f"start: expected cells made with {shared(ours)}, got some made with "
                            f"{shared(found['settings'])}")
        for row in found["rows"]:
            cell = Cell(**row["cell"])
            file = self.out / "cells" / cell.file
            same = cell.table != "goals" or of_goal(found["settings"], cell.name) == of_goal(ours, cell.name)
            if same and not file.exists():
                files.write_json(file, row)

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
        if cell.table == "goals":
            return self._thinned(plan, cell)
        if cell.name.startswith("+"):
            extra["text_linear"] = [self._region(plan)]
            if cell.name != "+ text linear":
                batches = self.batches(cell.seed, self.settings.calibration)
                return choose_linear_ffns(self.teacher, dataclasses.replace(plan, **extra), batches, count=2)
        return dataclasses.replace(plan, **extra) if extra else plan

    def _thinned(self, plan: PruningPlan, cell: Cell) -> PruningPlan:
        """The plan of a goal: the layers that ``plan`` keeps, thinned out."""
        goal, intervals, extra = self.goal(cell), plan.intervals, {}
        if goal.init == "last":
            intervals = [(start + 1, end + 1) for start, end in intervals]
        if goal.anchor is not None:
            anchor = dataclasses.replace(plan, intervals=intervals).source[goal.anchor][0]
            intervals = [pair for pair in intervals if pair[0] != anchor]
        plan = dataclasses.replace(plan, intervals=intervals, dead_tensors=False)  # lossless
        single = None if goal.dual is None else plan.source[goal.dual][0]
        if single is not None:
            extra["single_stream"] = single
        if goal.anchor is not None:
            extra["text_linear"] = [(anchor, (plan.num_layers if single is None else single) - 1)]
        plan, batches = dataclasses.replace(plan, **extra), self.batches(cell.seed, self.settings.calibration)
        for streams, count in (("both", goal.linear_ffns), ("text", goal.linear_text_ffns)):
            if count:
                plan = choose_linear_ffns(self.teacher, plan, batches, count=count, streams=streams, init=goal.init)
        return plan

    def goal(self, cell: Cell) -> Goal:
        return next(goal for goal in self.settings.goals if goal.name == cell.name)

    def init(self, cell: Cell) -> str:
        """Of the blocks of intervals."""
        return self.goal(cell).init if cell.table == "goals" else "first"

    @staticmethod
    def _region(plan: PruningPlan) -> tuple[int, int]:
        """The text of the last quarter of the layers, from the first one there that is kept whole."""
        whole = [layers[0] for layers in plan.source if len(layers) == 1]
        late = [layer for layer in whole if 3 * plan.num_layers // 4 <= layer < plan.num_layers - 1]
        return (late[0] if late else max(layer for layer in whole if layer < plan.num_layers - 1), plan.num_layers - 1)

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
            steps, more = settings.steps, {"muon_lr": 0.0015}
            if cell.table == "goals":
                goal = self.goal(cell)
                steps = goal.steps
                more = {"checkpoint_dir": self._work(cell), "save_every_seconds": 60.0, "resume": "auto",
                        "muon_lr": goal.rate, "output_lr": goal.rate / 10,
                        "guidance": settings.guidance if goal.guided else None}
            first = settings.steps // 10
            config = DistillConfig(layers_steps=first, output_steps=steps - first, output_trainable="all",
                                   **{**common, **more})
        distill(self.teacher, student, lambda start: self.training_batches(cell, start, student), config,
                progress=False)
        return time.monotonic() - started

    def training_batches(self, cell: Cell, start: int, student=None) -> Iterator[tuple[dict[str, Any], Any]]:
        """``student`` : who draws the images of a goal that learns from its own."""
        settings, goal = self.settings, self.goal(cell) if cell.table == "goals" else None
        pairs = goal is not None and goal.guided
        if goal is not None and goal.on_policy:
            images = {"drawn_by": student, "weights": data.CATEGORY_WEIGHTS}
        else:
            images = {"images": settings.images if goal is None else settings.goal_images}
        return data.make_batches(self.pipe, start_step=start, seed=cell.seed, pairs=pairs,
                                 batch_size=settings.batch_size // 2 if pairs else settings.batch_size,
                                 prompt_dropout=0.0 if pairs else 0.1, **images)

    def _work(self, cell: Cell) -> Path:
        """Checkpoints of a cell that trains for long; gone when it is done."""
        return self.out / f"work-{Path(cell.file).stem}"

    def judge(self, transformer, label: str, count: int) -> Result:
        self.pipe.register_modules(transformer=transformer)
        prompts = world.sample_prompts(count, split="held_out", seed=0)
        try:
            return evaluate(self.pipe, prompts, list(range(count)), steps=self.settings.sampling_steps,
                            guidance=self.settings.guidance, label=label)
        finally:
            self.pipe.register_modules(transformer=self.teacher)

    def teacher_result(self, count: int) -> Result:
        """That of the teacher on ``count`` prompts, drawn once."""
        file = self.out / ("teacher.json" if count == self.settings.prompts else f"teacher-{count}.json")
        if not file.exists():
            files.write_json(file, self.judge(self.teacher, "teacher", count).to_json())
        return Result.from_json(files.read_json(file, what="teacher"), what="teacher")

    def run(self, cell: Cell) -> None:
        count = self.settings.goal_prompts if cell.table == "goals" else self.settings.prompts
        started, plan = time.monotonic(), self.plan(cell)
        calibration = self.batches(cell.seed + 1, self.settings.calibration)
        student = prune(self.teacher, plan, batches=None if plan.is_stock else calibration, init=self.init(cell))
        judged = self.batches(cell.seed + 2, self.settings.calibration)
        before = velocity_error(self.teacher, student, judged)
        trained = self.train(cell, student)
        row = {"cell": asdict(cell), "plan": plan.to_dict(), "parameters": plan.num_parameters(self.teacher.config),
               "velocity_error_pruned": before, "velocity_error": velocity_error(self.teacher, student, judged),
               "train_seconds": trained, "machine": doctor.machine(), "versions": doctor.versions()}
        teacher = self.teacher_result(count)
        if cell.table == "subsets":
            row["subsets"] = []
            for subset in fallback_order(student, judged[:2]):
                student.set_active(subset.active)
                result = self.judge(student, f"{len(subset.active)} active", count)
                row["subsets"].append({**asdict(subset), "result": result.to_json(),
                                       "loss": asdict(relative_loss(teacher, result))})
        else:
            result = self.judge(student, cell.name, count)
            row |= {"result": result.to_json(), "loss": asdict(relative_loss(teacher, result))}
        files.write_json(self.out / "cells" / cell.file, {**row, "seconds": time.monotonic() - started})
        files.remove_directory(self._work(cell))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the cells, made or continued")
    parser.add_argument("--only", choices=tuple(quality_table.TITLES))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    parser.add_argument("--hours", type=float, help="start no cell after this time")
    parser.add_argument("--shard", default="0/1", help="I/N: only every Nth cell from the Ith on (default: 0/1)")
    parser.add_argument("--start", type=Path, metavar="FILE", help="a file of --summary: its cells count as done")
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: whether it runs, no quality")
    parser.add_argument("--table", action="store_true", help="print what is there, write curves.png, run nothing")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="the same, and write the figures to FILE")
    parser.add_argument("--teacher", type=Path, default=ASSETS, help="a demo pipeline (default: the committed one)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    try:
        if not args.table and args.summary is None:
            settings = QUICK if args.quick else Settings()
            bench = Bench(args.out, settings, args.teacher)
            if args.start is not None:
                bench.take(args.start)
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
            bench.teacher_result(settings.prompts)  # the tables name it, even where no cell drawn here needed it
        found = quality_table.summarise(args.out)
        if args.summary is not None:
            files.write_json(args.summary, found)
        print(quality_table.markdown(found, NAMES))
        quality_table.curves(found, args.out / "curves.png", METHODS)
    except (UserError, ValueError, OSError) as error:
        parser.exit(2, f"quality: error: {one_line(error)}\n")
    return 0


def _hours(out: Path, todo: list[Cell]) -> str:
    done = [files.read_json(file, what="cell")["seconds"] for file in (out / "cells").glob("*.json")]
    return f"{len(todo) * np.mean(done) / 3600:.1f} h" if done else "an unknown time until the first cell is done"


if __name__ == "__main__":
    raise SystemExit(main())
