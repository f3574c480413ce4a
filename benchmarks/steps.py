"""Adds the steps of ``gpu_check.sh`` to its results file and prints them.

    python -m benchmarks.steps STEPS.tsv OUT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import compare
from pydit.files import read_json, write_json


def main(argv: list[str]) -> int:
    steps_file, out = map(Path, argv)
    steps = []
    for line in steps_file.read_text().splitlines():
        name, state, seconds = line.split("\t")
        steps.append({"step": name, "state": state, "seconds": int(seconds)})
    if out.exists():
        data = read_json(out, what="out")
    else:  # the benchmark did not get to its first case: the other steps are worth keeping
        from benchmarks import machine

        data = {"format": compare.FORMAT, "version": compare.VERSION, "complete": False,
                "machine": machine.describe("cuda"), "limits": {}, "rows": [], "not_run": []}
    data["steps"] = steps
    write_json(out, data)
    print(f"\n{'step':12} {'state':40} {'s':>5}")
    print("\n".join(f"{step['step']:12} {step['state']:40} {step['seconds']:5}" for step in steps))
    wrong = [row["case"] for row in data["rows"] if "wrong" in row]
    print(f"{len(data['rows']) - len(wrong)} cases timed, {len(wrong)} wrong, {len(data['not_run'])} not run; "
          f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
