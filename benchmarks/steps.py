"""Brings the parts of a run of ``gpu_check.sh`` together: one results file, with the steps, which are printed too.

    python -m benchmarks.steps STEPS.tsv OUT.json [PART.json ...]

A part is what one process of the runner wrote, for one module of cases. Percentages of limits stay those of the part's
own ceilings; each part's ceilings are under "parts", the first part's are the file's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import compare, machine, registry
from pydit.errors import FormatError
from pydit.files import write_json


def main(argv: list[str]) -> int:
    steps_file, out, *parts = map(Path, argv)
    steps = []
    for line in steps_file.read_text().splitlines():
        name, state, seconds = line.split("\t")
        steps.append({"step": name, "state": state, "seconds": int(seconds)})
    found = {}
    for path in parts:
        try:
            found[path.stem] = compare.load(path, what="part")
        except FormatError as error:  # what one process left behind does not cost what the others did
            print(error, file=sys.stderr)
    data = merge(found) if found else None
    if data is None and out.exists():
        try:
            data = compare.load(out, what="out")
        except FormatError as error:  # what is there stays, and the steps stand beside it
            print(error, file=sys.stderr)
            out = out.with_name(f"{out.stem}.steps.json")
    if data is None:  # the benchmark did not get to its first case: the other steps are worth keeping
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        data = {"format": compare.FORMAT, "version": compare.VERSION, "complete": False,
                "machine": machine.describe(kind), "limits": {}, "rows": [], "not_run": []}
    data["steps"] = steps
    write_json(out, data)
    width = max((len(step["step"]) for step in steps), default=4)
    print(f"\n{'step':{width}} {'state':40} {'s':>5}")
    print("\n".join(f"{step['step']:{width}} {step['state']:40} {step['seconds']:5}" for step in steps))
    wrong = [row["case"] for row in data["rows"] if "wrong" in row]
    print(f"{len(data['rows']) - len(wrong)} cases timed, {len(wrong)} wrong, {len(data['not_run'])} not run; "
          f"wrote {out}")
    return 0


def merge(parts: dict[str, dict]) -> dict:
    """One results file out of several of the same machine, by name. What none of them ran of the full-size cases is
    "not_run", for whatever reason: their time was over, their process ended, they were not asked for."""
    files = [{key: value for key, value in data.items() if key != "running"} for data in parts.values()]
    rows = [row for data in files for row in data["rows"]]
    not_run = [case.name for case in registry.cases("full") if case.name not in {row["case"] for row in rows}]
    paths = {op: path for data in files for op, path in data.get("paths", {}).items()}
    return {**files[0], "complete": not not_run, "rows": rows, "not_run": not_run, "paths": paths,
            "limits": next((data["limits"] for data in files if data["limits"]), {}),
            "machine": files[0]["machine"] | machine.together([data["machine"] for data in files]),
            "parts": {name: {key: data[key] for key in ("limits", "limits_failed", "not_run", "running") if key in data}
                      for name, data in parts.items()}}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
