"""Commands about this machine: bench, doctor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydit.cli.options import command, print_json
from pydit.errors import UserError

WITH_HELP = (["bench", "layers"], ["bench", "model"])  # have a parser of their own, which has the help


def add_bench(commands: Any) -> None:
    parser = command(
        commands, "bench", _bench, "time the kernels against their peers",
        "Runs benchmarks/runner.py of a source checkout, which verifies every case first. `pydit bench layers` times\n"
        "each kind of block that a plan leaves, `pydit bench model` a whole step, dense and pruned (`pydit bench\n"
        "layers --help`, `pydit bench model --help`). Otherwise all options but --path are\n"
        "the runner's: --size, --filter, --list, --rounds, --peers, --json, --compare OLD.json, --plot FILE.png and\n"
        "more (`python -m benchmarks.runner --help`).",
        "pydit bench --filter ada_layer_norm --json results.json", figures=False)
    parser.add_argument("--path", type=Path, help="source checkout (default: the one this package is imported from)")


def _bench(arguments: argparse.Namespace) -> int:
    root = arguments.path or Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "runner.py").is_file():
        raise UserError(f"path: expected a source checkout of pydit with benchmarks/runner.py, got {root}, which has "
                        "none; the benchmarks are not part of the installed package")
    sys.path.insert(0, str(root))
    rest = arguments.rest or []
    if rest[:1] == ["layers"]:
        from benchmarks.layers import main
    elif rest[:1] == ["model"]:
        from benchmarks.model import main
    else:
        from benchmarks.runner import main
    return main(rest[1:] if rest[:1] in (["layers"], ["model"]) else rest)


def add_doctor(commands: Any) -> None:
    command(commands, "doctor", _doctor, "say what is installed here, what is missing and what that costs",
             "Exit code 1 when something required is missing.", "pydit doctor --json")


def _doctor(arguments: argparse.Namespace) -> int:
    from pydit import doctor

    checks = doctor.examine()
    if arguments.json:
        print_json(doctor.as_json(checks))
    else:
        print(doctor.describe(checks))
    return 0 if doctor.healthy(checks) else 1
