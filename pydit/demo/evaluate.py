"""How often a pipeline draws what a prompt of the demo world asks for, and how much a student loses to its teacher.

The overall figure is the mean over categories, so that a category with many prompts weighs no more than one with few.
Teacher and student are compared on the same prompts and seeds; the interval of the relative loss comes from a paired
bootstrap over prompts within each category.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pydit.demo.figures import category_name
from pydit.errors import FormatError, UserError
from pydit.reporting import console

FORMAT = "pydit-eval"
VERSION = 1
CHUNK = 64  # images between two lines of the log: what a kill can lose


@dataclass
class Result:
    """Verdicts on one image per prompt.

    Attributes
    ----------
    prompts, categories, seeds, passed : list
        Per image: the prompt's text, its category, the seed of the noise, and whether the image meets the prompt.
    settings : dict
        Steps, guidance and whatever else a reader needs to repeat the figures.
    images : list of uint8 arrays [H, W, 3]
        The first images, when they were asked for; not part of the saved form.
    """

    prompts: list[str]
    categories: list[str]
    seeds: list[int]
    passed: list[bool]
    settings: dict[str, Any] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Images per category, in order of first appearance."""
        return {name: self.categories.count(name) for name in dict.fromkeys(self.categories)}

    @property
    def per_category(self) -> dict[str, float]:
        """Share of images that meet their prompt, per category."""
        met = dict.fromkeys(self.counts, 0)
        for name, passed in zip(self.categories, self.passed, strict=True):
            met[name] += passed
        return {name: met[name] / count for name, count in self.counts.items()}

    @property
    def overall(self) -> float:
        """Mean of the categories' shares."""
        return float(np.mean(list(self.per_category.values())))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson 95 % interval of each category's share."""
        return {name: wilson(share * self.counts[name], self.counts[name]) for name, share in self.per_category.items()}

    def summary(self) -> dict[str, Any]:
        """The figures without the single verdicts: overall, per_category, intervals, counts."""
        return {"overall": self.overall, "per_category": self.per_category,
                "interval_per_category": {name: list(bounds) for name, bounds in self.intervals().items()},
                "images_per_category": self.counts}

    def to_json(self) -> dict[str, Any]:
        """Figures and every verdict, for :func:`pydit.files.write_json`."""
        samples = [{"prompt": p, "category": c, "seed": s, "passed": v}
                   for p, c, s, v in zip(self.prompts, self.categories, self.seeds, self.passed, strict=True)]
        return {"format": FORMAT, "version": VERSION, "settings": self.settings, **self.summary(), "samples": samples}

    @classmethod
    def from_json(cls, data: Any, *, what: str) -> Result:
        """The result in ``data``; FormatError (naming ``what``) when it is not one of ours."""
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise FormatError(f"{what}: expected a file written by `pydit eval` (format {FORMAT}, version {VERSION}), "
                              f"got {_describe(data)}")
        try:
            samples, settings = data["samples"], data.get("settings", {})
            if not samples:
                raise ValueError("none")
            if not isinstance(settings, dict) or not all(isinstance(s[name], str) for s in samples
                                                         for name in ("prompt", "category")):
                raise TypeError("settings, a prompt or a category of another kind")
            return cls([s["prompt"] for s in samples], [s["category"] for s in samples],
                       [int(s["seed"]) for s in samples], [bool(s["passed"]) for s in samples],
                       settings)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{what}: expected samples with prompt, category, seed and passed, "
                              f"got a file without them ({error!r})") from None


@dataclass(frozen=True)
class RelativeLoss:
    """(teacher - student) / teacher of the overall figures, with its 95 % interval; None where the teacher has 0."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined (the teacher meets no prompt)"
        interval = "" if self.low is None else f", 95 % interval [{100 * self.low:.1f} %, {100 * self.high:.1f} %]"
        return f"{100 * self.value:.1f} %{interval}"


def evaluate(pipe, prompts: Sequence, seeds: Sequence[int], *, steps: int, guidance: float, batch_size: int = 32,
             log: str | os.PathLike | None = None, resume: bool = False, identity: str = "", keep: int = 0,
             progress: bool = True, label: str = "eval") -> Result:
    """Draw one image per (prompt, seed) and let the verifier judge it.

    Parameters
    ----------
    pipe : a demo pipeline (see :mod:`pydit.demo.teacher`).
    prompts, seeds : as many of each: :class:`pydit.demo.world.Prompt` and int.
    steps, guidance : of the sampler.
    log : file that receives the verdicts chunk by chunk; with ``resume`` those it holds already are not drawn again.
    identity : what the verdicts depend on besides the arguments here (the weights); a log of another one is refused.
    keep : number of images to keep in the result (they are drawn again when the log had their verdicts).

    Raises
    ------
    UserError
        ``prompts`` and ``seeds`` differ in length or are empty; the log belongs to another evaluation.
    """
    from pydit.demo import data
    from pydit.demo.verifier import verify

    if not prompts or len(prompts) != len(seeds):
        raise UserError(f"seeds: expected one per prompt and at least one, got {len(seeds)} for {len(prompts)} prompts")
    settings = {"images": len(prompts), "steps": steps, "guidance": guidance}

    def draw(first: int, last: int) -> list[np.ndarray]:
        return data.generate(pipe, [p.text for p in prompts[first:last]], seeds=list(seeds[first:last]), steps=steps,
                             guidance=guidance, batch_size=batch_size, progress=False)

    journal = _Journal(log, _fingerprint(prompts, seeds, settings, identity), resume=resume)
    passed, images = list(journal.passed[:len(prompts)]), []
    if keep and passed:
        images = draw(0, min(keep, len(passed)))
    with contextlib.closing(_Bar(len(prompts), len(passed), label, progress)) as bar:  # before an error is printed
        while len(passed) < len(prompts):
            first = len(passed)
            last = min(first + max(CHUNK, batch_size), len(prompts))
            drawn = draw(first, last)
            verdicts = [bool(verify(image, prompt).ok)
                        for image, prompt in zip(drawn, prompts[first:last], strict=True)]
            journal.append(verdicts)
            passed += verdicts
            images += drawn[:max(0, keep - len(images))]
            bar.update(last)
    return Result([p.text for p in prompts], [p.category for p in prompts], list(seeds), passed, settings,
                  images[:keep])


def relative_loss(teacher: Result, student: Result, *, resamples: int = 10_000, level: float = 0.95,
                  seed: int = 0) -> RelativeLoss:
    """Relative loss of the overall figure, with a paired percentile bootstrap interval.

    The unit that is resampled is the prompt, with all its seeds, within its category; teacher and student are
    resampled together. Resamples in which the teacher meets no prompt are left out.

    Raises
    ------
    UserError
        The two results are not of the same prompts and seeds in the same order.
    """
    require_comparable(teacher, student)
    if teacher.overall == 0:
        return RelativeLoss(None, None, None)
    generator = np.random.default_rng(seed)
    drawn = np.stack([_resampled_shares(teacher, student, name, resamples, generator) for name in teacher.counts])
    of_teacher, of_student = drawn.mean(0)
    usable = of_teacher > 0
    losses = 1 - of_student[usable] / of_teacher[usable]
    low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
    return RelativeLoss(1 - student.overall / teacher.overall, float(low), float(high))


def require_comparable(teacher: Result, student: Result) -> None:
    """UserError unless both results are of the same prompts and seeds in the same order."""
    if (teacher.prompts, teacher.seeds) != (student.prompts, student.seeds):
        raise UserError("compare: expected two results on the same prompts and seeds, got "
                        f"{_sample_text(teacher)} and {_sample_text(student)}")


def wilson(successes: float, count: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson 1927); (0, 1) for no observations."""
    if count == 0:
        return 0.0, 1.0
    share, spread = successes / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the bound equals the share, which rounding must not push past it.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == count else centre + half


def _resampled_shares(teacher: Result, student: Result, category: str, resamples: int,
                      generator: np.random.Generator) -> np.ndarray:
    """Shares of one category in every resample, float64 [2, resamples]: teacher, student."""
    totals: dict[str, list[int]] = {}
    for i, (text, name) in enumerate(zip(teacher.prompts, teacher.categories, strict=True)):
        if name == category:
            total = totals.setdefault(text, [0, 0, 0])
            for column, amount in enumerate((1, teacher.passed[i], student.passed[i])):
                total[column] += amount
    per_prompt = np.array(list(totals.values()), dtype=np.float64)  # [prompts, (images, teacher, student)]
    times = generator.multinomial(len(per_prompt), np.full(len(per_prompt), 1 / len(per_prompt)), size=resamples)
    images, met_teacher, met_student = (times @ per_prompt).T
    return np.stack((met_teacher / images, met_student / images))


class _Journal:
    """A log of verdicts, one JSON line per chunk after a first line that says what they belong to."""

    def __init__(self, path: str | os.PathLike | None, fingerprint: str, *, resume: bool) -> None:
        self.path = None if path is None else Path(path)
        self.passed: list[bool] = []
        if self.path is None:
            return
        header = {"format": "pydit-eval-log", "version": VERSION, "fingerprint": fingerprint}
        if self.path.exists():
            if not resume and self.path.stat().st_size > len(json.dumps(header)) + 1:
                raise UserError(f"log: expected no verdicts of an earlier evaluation, got some in {self.path}; pass "
                                "--resume (resume=True) to go on with them, or delete the file")
            if resume:
                self._read(header)
        if not self.passed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write(json.dumps(header) + "\n", "w")

    def append(self, verdicts: list[bool]) -> None:
        if self.path is not None:
            self._write(json.dumps({"passed": [int(v) for v in verdicts]}) + "\n", "a")

    def _read(self, header: dict[str, Any]) -> None:
        whole = self.path.read_bytes()
        kept = whole[:whole.rfind(b"\n") + 1]  # a kill can leave half a line
        try:
            found, *chunks = [json.loads(text) for text in kept.splitlines()] or [None]
            verdicts = [bool(v) for chunk in chunks for v in chunk["passed"]]
        except (ValueError, KeyError, TypeError):
            raise FormatError(f"log: expected the log of an evaluation, got something else ({self.path})") from None
        if found is not None and found != header:
            raise UserError("resume: expected a log of this evaluation (same pipeline, prompts, seeds and settings), "
                            f"got the log of another one ({self.path}); leave out --resume to start afresh")
        self.passed = verdicts
        if len(kept) != len(whole):
            os.truncate(self.path, len(kept))

    def _write(self, text: str, mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(self.path)  # which a write or a flush that fails does not name
            raise


def print_results(results: dict[str, Result]) -> None:
    """Print one line per category and one for their mean, a column per model; Wilson intervals behind the last."""
    last = list(results.values())[-1]
    rows = []
    for name, count in last.counts.items():
        low, high = last.intervals()[name]
        rows.append([category_name(name), *(console.percent(r.per_category.get(name)) for r in results.values()),
                     f"{100 * low:.1f} to {100 * high:.1f}", count])
    overall = [console.percent(result.overall) for result in results.values()]
    rows.append(["mean over categories", *overall, "", len(last.prompts)])
    console.table(["category", *results, "95 % interval", "images"], rows)


class _Bar:
    """A tqdm bar that advances by absolute position; nothing where tqdm is missing."""

    def __init__(self, total: int, start: int, label: str, enabled: bool) -> None:
        self._bar = console.bar(total, start=start, label=label, unit="image") if enabled else None

    def update(self, position: int) -> None:
        if self._bar is not None:
            self._bar.update(position - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _fingerprint(prompts: Sequence, seeds: Sequence[int], settings: dict[str, Any], identity: str) -> str:
    content = json.dumps([[p.text for p in prompts], list(seeds), settings, identity])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _sample_text(result: Result) -> str:
    if not result.prompts:
        return "none"
    return f"{len(result.prompts)} images (first: {result.prompts[0]!r}, seed {result.seeds[0]})"


def _describe(data: Any) -> str:
    if not isinstance(data, dict):
        return type(data).__name__
    return f"format {data.get('format')!r}, version {data.get('version')!r}"
