"""`pydit plan --check` and `--trial`: plans measured on a pipeline, beyond what their criteria predict."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydit.cli.options import batch_stream, count, first_batches, load, positive, progress
from pydit.errors import UserError


def add_check(parser: argparse.ArgumentParser) -> None:
    """The options."""
    group = parser.add_argument_group("measuring plans on a pipeline, with --prompts and --batches")
    group.add_argument("--check", type=Path, metavar="PIPELINE",
                       help="error of the output with all of a plan's blocks left out, against the sum of the errors\n"
                            "with one of them left out, which is what criteria go by")
    group.add_argument("--trial", type=count, metavar="STEPS",
                       help="with --check: also train each plan's student for so many steps, on other batches, and\n"
                            "say what is left of the error; the best plan before training need not be the best after")
    group.add_argument("--trial-lr", type=positive, help="learning rate of --trial (default: 1e-5)")


def require_check(arguments: argparse.Namespace) -> None:
    """Raise UserError where the options do not go together."""
    for name in ("trial", "trial_lr"):
        needed = "check" if name == "trial" else "trial"
        if getattr(arguments, name) is not None and getattr(arguments, needed) is None:
            what = "a pipeline" if needed == "check" else "steps"
            raise UserError(f"{needed}: expected {what} with --{name.replace('_', '-')}, got none")


def measure(arguments: argparse.Namespace, plans: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each different plan: names, blocks, predicted, measured, ratio, and ``after`` a trial; best first."""
    from pydit.analysis import ablate, joint_removal, recoverability
    from pydit.distill import DistillConfig

    different: dict[str, Any] = {}
    for name, plan in plans.items():
        twin = next((other for other, known in different.items() if known == plan), None)
        if twin is not None:
            different.pop(twin)
        different[name if twin is None else f"{twin}, {name}"] = plan
    pipe = load(arguments.check, arguments)
    for plan in different.values():
        plan.require_match(pipe.transformer)
    judge = first_batches(pipe, arguments)
    ablation = ablate(pipe.transformer, progress(judge, len(judge), "batch"))
    rows = [{"plan": name, "blocks": plan.num_student_layers,
             **joint_removal(pipe.transformer, plan, judge, ablation=ablation)} for name, plan in different.items()]
    for row in rows:
        row["ratio"] = row["ratio"] if math.isfinite(row["ratio"]) else None  # nothing was predicted
    if arguments.trial:
        settings = {} if arguments.trial_lr is None else {"output_lr": arguments.trial_lr}
        stream = batch_stream(pipe, arguments)
        found = recoverability(pipe.transformer, different, lambda start: stream(len(judge) + start),
                               steps=arguments.trial, judge=judge, config=DistillConfig(**settings), progress=True)
        after = {row["plan"]: row["after"] for row in found}
        rows = [{**row, "after": after[row["plan"]]} for row in rows]
    return sorted(rows, key=lambda row: row["after" if arguments.trial else "measured"])


def show(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table."""
    from pydit.reporting import console

    trained = [f"after {arguments.trial} steps"] if arguments.trial else []
    print()
    console.table(["plan", "blocks", "predicted", "measured", "ratio", *trained], [
        [row["plan"], row["blocks"], *(None if row[name] is None else f"{row[name]:.{digits}f}" for name, digits in (
            ("predicted", 4), ("measured", 4), ("ratio", 2))), *(f"{row['after']:.4f}" for _ in trained)]
        for row in rows])
    print(f"on {arguments.batches} batches: squared, relative error of the output; predicted: the sum of leaving out "
          "one block at a time; ratio: measured over predicted, above 1 where they make each other worse")
