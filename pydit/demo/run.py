"""``pydit demo``: the whole method on the committed teacher, within a time budget, ending in a report.

load teacher -> collect statistics -> detect, measure candidate plans -> prune -> distil -> evaluate teacher, pruned and
distilled model on the same held-out prompts and noise -> report. Every finished stage is kept in ``OUT/work`` under a
fingerprint of teacher and settings, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pydit import doctor
from pydit.analysis import ActivationStats, collect
from pydit.demo import choose, data, parallel, report, world
from pydit.demo.evaluate import Result, evaluate, print_results, relative_loss
from pydit.distill import DistillConfig
from pydit.errors import UserError
from pydit.files import is_unused, read_json, remove_directory, require_replaceable, write_json
from pydit.inference.checks import check_pipeline
from pydit.inference.pipeline import content_hash, load_pipeline, save_pipeline
from pydit.plan import PruningPlan
from pydit.reporting import console, statistics

FORMAT = 1  # of OUT/work; another number makes earlier work unusable
MODELS = ("teacher", "pruned", "distilled")
REPORT_SECONDS = 25.0  # kept back for figures and page


@dataclass(frozen=True)
class Settings:
    """What a run does; the time budget decides the rest."""

    seed: int
    budget_minutes: float
    prompts: int | None
    quick: bool
    target: float = 0.4  # share of blocks to remove, at least
    steps: int = data.STEPS
    guidance: float = data.GUIDANCE
    calibration_batches: int = 32
    batch_size: int = 32  # half of them the same images without their prompts, as guidance asks for both
    evaluation_share: float = 0.3  # of the budget, for all three models
    workers: int = 1  # processes of the distillation, each with batches of batch_size
    cache_batches: int = 0  # keeping the teacher's velocities is faster, and the student learns them by heart
    layers_lr: float = 2e-4  # a start as near to the teacher as this one is lost at the rates that training took
    output_lr: float = 4e-4
    muon_lr: float = 0.0015
    output_share: float = 0.95  # the layer phase lowers its own losses here, not the velocity error
    magnitude: float = 0.1
    layers_steps: int | None = None  # None: until the time is up
    output_steps: int | None = None
    gallery: int = 21

    @classmethod
    def make(cls, *, seed: int, budget_minutes: float, prompts: int | None, quick: bool) -> Settings:
        """The settings of the command's options."""
        if not quick:
            return cls(seed, budget_minutes, prompts, quick, workers=min(4, parallel.available_cores()))
        return cls(seed, budget_minutes, prompts or 14, quick, steps=4, calibration_batches=8, batch_size=8,
                   layers_steps=12, output_steps=8, gallery=7)


def run(out: str | os.PathLike, *, budget_minutes: float = 12.0, prompts: int | None = None, seed: int = 0,
        quick: bool = False, fresh: bool = False, teacher: str | os.PathLike | None = None) -> dict[str, Any]:
    """Run the demo, or what is left of it.

    Parameters
    ----------
    out : output directory; receives report.html, PNG files, metrics.json, ``distilled`` (a pipeline), ``work``.
    budget_minutes : for everything, split by measuring this machine. ``quick`` ignores it.
    prompts : evaluation prompts; None takes as many as the budget allows.
    fresh : forget the work of an earlier run.
    teacher : another demo pipeline than the committed one.

    Returns
    -------
    The content of metrics.json.

    Raises
    ------
    UserError
        ``out`` is a file, or a directory with something else or with a run with other options in it; there is no
        teacher, or an option is out of range.
    """
    started = time.monotonic()
    settings = Settings.make(seed=seed, budget_minutes=budget_minutes, prompts=prompts, quick=quick)
    folder = Path(teacher) if teacher is not None else data_teacher()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: expected a directory or a new path, got the file {out}")
    if not is_unused(out) and not (out / "work" / "state.json").is_file():
        raise UserError(f"out: expected a new path, an empty directory or the one of an earlier run, got {out}")
    require_replaceable(out / "distilled")
    check_pipeline(folder)
    console.heading(f"pydit demo on {doctor.machine()}")
    pipe = load_pipeline(folder, dtype=torch.float32)
    work = _Work(out / "work", asdict(settings), content_hash(folder), fresh=fresh, started=started)
    if work.stages:
        console.line(f"Continuing the run in {out} after the stage '{list(work.stages)[-1]}' (--fresh starts over).")
    return _Demo(out, settings, pipe, work, folder).run()


def data_teacher() -> Path:
    """The committed teacher's directory; UserError when this installation has none."""
    from pydit.demo.teacher import ASSETS

    if not (ASSETS / "model_index.json").is_file():
        raise UserError(f"teacher: expected the demo's trained pipeline in {ASSETS}, got none; reinstall pydit, or "
                        "train one with `python -m pydit.demo.train_teacher` and pass --teacher DIR")
    return ASSETS


class _Work:
    """Finished stages on disk: ``state.json`` holds fingerprint and settings and, per stage, its data and duration."""

    def __init__(self, path: Path, settings: dict[str, Any], teacher: str, *, fresh: bool, started: float) -> None:
        self.path = path
        identity = {**settings, "teacher": teacher, "format": FORMAT, "versions": doctor.versions()}
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self.stages: dict[str, dict[str, Any]] = {}
        file = path / "state.json"
        if file.is_file():
            state = {} if fresh else read_json(file, what="work")
            state = state if isinstance(state, dict) else {}
            if state.get("fingerprint") == self.fingerprint:
                self.stages = state["stages"]
            else:
                made_of = state.get("settings", {})
                other = [f"{name.replace('_', '-')} {made_of[name]}" for name, value in settings.items()
                         if made_of.get(name, value) != value]
                if other and state.get("stages"):
                    raise UserError(f"out: expected the options of the run that {path.parent} holds "
                                    f"({', '.join(other)}), or --fresh to start over, got others")
                remove_directory(path)  # of another teacher or version, or not wanted
        self._settings = settings
        path.mkdir(parents=True, exist_ok=True)
        self._save()

        self._started, self._staged = started, 0.0  # begin of this run; seconds of it spent in stages

    @property
    def seconds(self) -> float:
        """Time spent so far: on all finished stages, whichever run did them, and by this run between stages."""
        between = time.monotonic() - self._started - self._staged
        return sum(stage["seconds"] for stage in self.stages.values()) + between

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute()`` returns (plain data), computed once.

        A stage that an interrupted run had begun says with "seconds" in its data how long it took in all.
        """
        if name not in self.stages:
            started = time.monotonic()
            value = compute()
            took = time.monotonic() - started
            self._staged += took
            known = value.get("seconds") if isinstance(value, dict) else None
            self.stages[name] = {"seconds": took if known is None else known, "data": value}
            self._save()
        return self.stages[name]["data"]

    def _save(self) -> None:
        write_json(self.path / "state.json",
                   {"fingerprint": self.fingerprint, "settings": self._settings, "stages": self.stages})


class _Demo:
    """One run, stage by stage."""

    def __init__(self, out: Path, settings: Settings, pipe, work: _Work, folder: Path) -> None:
        self.out, self.settings, self.pipe, self.work, self.folder = out, settings, pipe, work, folder
        self.teacher = pipe.transformer
        self.results: dict[str, Result] = {}

    def run(self) -> dict[str, Any]:
        stats = self._collect()
        plan = self._plan(stats)
        student = self._prune(plan)
        prompts, seeds = self._choose_prompts(student)
        console.heading(f"Evaluate teacher and pruned model on {len(prompts)} held-out prompts")
        for name, transformer in (("teacher", self.teacher), ("pruned", student)):
            self._evaluate(name, transformer, prompts, seeds)
        history = self._distill(student)
        console.heading("Evaluate the distilled model on the same prompts and noise")
        self._evaluate("distilled", student, prompts, seeds)
        return self._finish(stats, plan, student, history)

    def _collect(self) -> ActivationStats:
        console.heading("Measure redundancy on calibration prompts of the training split")
        file = self.work.path / "stats.safetensors"

        def compute() -> None:
            batches = data.make_batches(self.pipe, batch_size=self.settings.batch_size, seed=self.settings.seed + 1)
            count = self.settings.calibration_batches
            collect(self.teacher, (batch for batch, _ in batches), max_batches=count).save(file)

        self.work.stage("collect", compute)
        stats = ActivationStats.load(file)
        statistics.print_statistics(stats)
        return stats

    def _plan(self, stats: ActivationStats) -> PruningPlan:
        console.heading(f"Choose blocks to merge: at least {100 * self.settings.target:.0f} %")

        chosen = self.work.stage("plan", lambda: choose.choose(
            self.pipe, stats, target=self.settings.target, **self._calibration()))
        plan = PruningPlan.from_dict(chosen["plan"])
        console.line(plan.describe(self.teacher.config))
        return plan

    def _prune(self, plan: PruningPlan):
        return choose.start(self.pipe, plan, self.work.stages["plan"]["data"]["init"], **self._calibration())

    def _calibration(self) -> dict[str, int]:
        """The batches of which the plan and the start are made."""
        return {"batches": self.settings.calibration_batches // 8, "batch_size": self.settings.batch_size,
                "seed": self.settings.seed + 4}

    def _choose_prompts(self, student) -> tuple[list[world.Prompt], list[int]]:
        """As many prompts as the evaluation's share of the budget allows, the same number for each category."""
        count = self.settings.prompts
        if count is None:
            per_image = self.work.stage("speed", self._seconds_per_image)
            share = _parameters(student) / _parameters(self.teacher)
            seconds = 60 * self.settings.evaluation_share * self.settings.budget_minutes
            count = int(seconds / (per_image * (1 + 2 * share)))
            categories = len(world.CATEGORIES)
            count = max(10 * categories, min(100 * categories, count // categories * categories))
        prompts = world.sample_prompts(count, split="held_out", seed=self.settings.seed)
        return prompts, [self.settings.seed + i for i in range(count)]

    def _seconds_per_image(self) -> float:
        prompts = world.sample_prompts(32, split="train", seed=0)
        arguments = {"steps": self.settings.steps, "guidance": self.settings.guidance, "batch_size": 32,
                     "progress": False}
        data.generate(self.pipe, [p.text for p in prompts[:4]], seeds=[0] * 4, **arguments)  # warm up
        started = time.monotonic()
        data.generate(self.pipe, [p.text for p in prompts], seeds=list(range(32)), **arguments)
        return (time.monotonic() - started) / len(prompts)

    def _evaluate(self, name: str, transformer, prompts: list[world.Prompt], seeds: list[int]) -> None:
        """Fill ``results[name]``; verdicts found before a kill are kept."""
        self.pipe.register_modules(transformer=transformer)
        try:
            def compute() -> dict[str, Any]:
                self._verdicts(name, prompts, seeds)
                return self.results[name].to_json()

            stored = self.work.stage(name, compute)
            if name not in self.results:
                self.results[name] = Result.from_json(stored, what=name)
                # Pictures are not stored: the few that the report shows are drawn again.
                few = min(self.settings.gallery, len(prompts))
                self.results[name].images = data.generate(
                    self.pipe, [p.text for p in prompts[:few]], seeds=seeds[:few], steps=self.settings.steps,
                    guidance=self.settings.guidance, progress=False)
        finally:
            self.pipe.register_modules(transformer=self.teacher)
        console.line(f"{name:<9} meets {console.percent(self.results[name].overall)} (mean over categories)")

    def _verdicts(self, name: str, prompts: list[world.Prompt], seeds: list[int]) -> None:
        log = self.work.path / f"{name}.log.jsonl"
        self.results[name] = evaluate(
            self.pipe, prompts, seeds, steps=self.settings.steps, guidance=self.settings.guidance, log=log, resume=True,
            identity=f"{self.work.fingerprint} {name}", keep=self.settings.gallery, label=name)
        log.unlink(missing_ok=True)

    def _distill(self, student) -> list[dict[str, Any]]:
        settings = self.settings

        def minutes() -> float | None:
            if settings.quick:
                return None
            # What remains after the last evaluation, which costs what that of the pruned model did, and the report.
            later = self.work.stages["pruned"]["seconds"] + REPORT_SECONDS
            return max(0.5, settings.budget_minutes - (self.work.seconds + later) / 60)

        budget = self.work.stage("distill_minutes", minutes)
        limit = "" if budget is None else f" for {budget:.1f} minutes"
        console.heading(f"Distil{limit}: each new block alone, then the whole student")
        config = DistillConfig(
            layers_steps=settings.layers_steps, layers_lr=settings.layers_lr, output_steps=settings.output_steps,
            output_lr=settings.output_lr, output_share=settings.output_share, output_trainable="all",
            muon_lr=settings.muon_lr, output_cache_batches=settings.cache_batches, max_minutes=budget,
            magnitude=settings.magnitude, guidance=settings.guidance, log_every=2 if settings.quick else 10,
            checkpoint_dir=self.work.path / "distill", save_every_seconds=20.0, resume="auto")
        results = []

        def compute() -> dict[str, Any]:
            results.append(parallel.train(
                self.pipe, student, config, folder=self.folder, work=self.work.path / "distill",
                workers=settings.workers,
                batches={"batch_size": settings.batch_size // 2, "seed": settings.seed + 3, "pairs": True,
                         "weights": data.CATEGORY_WEIGHTS, "on_policy": True}))
            return {"seconds": results[0].seconds, "steps": results[0].steps}

        self.work.stage("distill", compute)
        if not results:
            compute()  # finished by an earlier run: its checkpoint gives weights and history
        result = results[0]
        for phase, steps in result.steps.items():
            rows = [row for row in result.history if row["phase"] == phase]
            if rows:
                console.line(f"{phase:<7} {steps} steps, loss {rows[0]['loss']:.4g} -> {rows[-1]['loss']:.4g}")
        return result.history

    def _finish(self, stats: ActivationStats, plan: PruningPlan, student,
                history: list[dict[str, Any]]) -> dict[str, Any]:
        console.heading("Save the distilled pipeline and write the report")
        self.pipe.register_modules(transformer=student)
        save_pipeline(self.pipe, self.out / "distilled")
        self.pipe.register_modules(transformer=self.teacher)
        metrics = self._metrics(plan, student)
        gallery = [{"prompt": prompt, "category": category,
                    "images": {name: self.results[name].images[i] for name in MODELS},
                    "passed": {name: self.results[name].passed[i] for name in MODELS}}
                   for i, (prompt, category) in enumerate(zip(self.results["teacher"].prompts,
                                                              self.results["teacher"].categories, strict=True))
                   if i < self.settings.gallery]
        page = report.write(self.out, metrics, cka=statistics.cka_matrices(stats), r2=statistics.linearity(stats),
                            intervals=plan.intervals, history=history, gallery=gallery)
        metrics["seconds"] = round(self.work.seconds, 1)
        write_json(self.out / "metrics.json", metrics)
        print_results(self.results)
        console.line(f"blocks      {plan.num_layers} -> {plan.num_student_layers}, parameters "
                     f"{metrics['parameters']['teacher']:,} -> {metrics['parameters']['student']:,}")
        console.line(f"relative loss {self.loss}")
        console.line(f"report      {page} ({console.duration(metrics['seconds'])} in all)")
        return metrics

    def _command(self) -> str:
        """What a reader would type for the same; where it is written to is no part of it."""
        settings = self.settings
        parts = ["pydit demo", "--quick" if settings.quick else f"--budget-minutes {settings.budget_minutes:g}"]
        parts += [f"--{name} {value}" for name, value in (("prompts", settings.prompts), ("seed", settings.seed))
                  if value and not (settings.quick and (name, value) == ("prompts", 14))]
        return " ".join(parts)

    def _metrics(self, plan: PruningPlan, student) -> dict[str, Any]:
        self.loss = relative_loss(self.results["teacher"], self.results["distilled"])
        distilled = self.work.stages["distill"]["data"]
        return {
            **{name: self.results[name].summary() for name in MODELS},
            "parameters": {"teacher": _parameters(self.teacher), "student": _parameters(student)},
            "blocks": {"teacher": plan.num_layers, "student": plan.num_student_layers},
            "intervals": [list(pair) for pair in plan.intervals],
            **{name: self.work.stages["plan"]["data"][name] for name in ("init", "candidates")},
            "prompts": len(self.results["teacher"].prompts),
            "relative_loss": self.loss.value, "relative_loss_interval": [self.loss.low, self.loss.high],
            "seconds": round(self.work.seconds, 1), "distill_seconds": round(distilled["seconds"], 1),
            "settings": {"command": self._command(), **asdict(self.settings),
                         "layer_steps": distilled["steps"]["layers"], "output_steps": distilled["steps"]["output"]},
            "versions": doctor.versions(), "machine": doctor.machine(),
        }


def _parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())
