"""Which lines and functions of csrc/kernels and csrc/device the tests execute. ``python -m build_tools.coverage``.

The simulated kernels are compiled with gcov's counters, tests/ops runs on them, and so does the program of
tests/sim/ptx, which holds what is in csrc/device for kernels to come. Both run under the sanitizers too: the build is
that of build_tools/sanitize.py. Exit code 1: a folder is below 95 % of its lines, or a __global__ or __device__
function was never entered. Lines that only nvcc compiles (inline PTX) do not count.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from build_tools import cmake, sanitize
from build_tools.cmake import ROOT
from build_tools.device_functions import device_functions

REQUIRED = 95.0  # per cent of the lines of each folder
FOLDERS = ("csrc/kernels", "csrc/device")
Lines = dict[str, dict[int, int]]  # path below the root -> line -> times executed


def measure(folder: Path) -> Lines:
    """Build, run the tests, and read the counters."""
    gcov = cmake.find_tool("gcov")
    environment = sanitize.environment(sanitize.build(folder))
    program = sanitize.program(folder, "ptx", (ROOT / "tests/sim/ptx").glob("*.cpp"), sanitize.COUNTERS)
    for old in folder.rglob("*.gcda"):
        old.unlink()
    for command in ([*sanitize.COMMAND, "-x"], [program]):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise cmake.BuildError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    counters = [path.resolve() for path in sorted(folder.rglob("*.gcda"))]
    reports = folder / "gcov"
    reports.mkdir(exist_ok=True)
    for old in reports.iterdir():
        old.unlink()
    cmake.run(gcov, "--json-format", "--hash-filenames", *counters, cwd=reports)
    return merge([json.loads(gzip.decompress(path.read_bytes())) for path in sorted(reports.iterdir())])


def merge(reports: Sequence[dict]) -> Lines:
    """One count per line over all objects and template instances, for the files of FOLDERS."""
    lines: Lines = {}
    for report in reports:
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if not path.is_relative_to(ROOT) or not path.relative_to(ROOT).as_posix().startswith(FOLDERS):
                continue
            counts = lines.setdefault(path.relative_to(ROOT).as_posix(), {})
            for line in file["lines"]:
                counts[line["line_number"]] = counts.get(line["line_number"], 0) + line["count"]
    return lines


def missed_functions(path: str, source: str, counts: dict[int, int]) -> list[str]:
    """The functions of a file no line of which was executed, also those that no test instantiates."""
    return [f"{path}:{function.first}: {function.name}" for function in device_functions(source)
            if not any(counts.get(line, 0) for line in range(function.first, function.last + 1))]


def ranges(numbers: Sequence[int]) -> str:
    """``1-3, 7`` for 1, 2, 3, 7."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def report(lines: Lines, sources: dict[str, str]) -> tuple[str, bool]:
    """The table, and whether enough was executed. ``sources`` are all files, also those that gcov never saw."""
    text, good = [f"{'file':45} lines  executed  not executed"], True
    missed = []
    for folder in FOLDERS:
        total = executed = 0
        for path in sorted(path for path in sources if path.startswith(folder)):
            counts = lines.get(path, {})
            missed += missed_functions(path, sources[path], counts)
            if not counts:  # macros and includes alone
                continue
            hit = sum(count > 0 for count in counts.values())
            total, executed = total + len(counts), executed + hit
            text.append(f"{path:45} {len(counts):5}  {100 * hit / len(counts):6.1f} %  "
                        f"{ranges([line for line, count in counts.items() if count == 0])}".rstrip())
        percent = 100 * executed / total if total else 0.0
        good = good and percent >= REQUIRED
        verdict = "" if percent >= REQUIRED else f"  below {REQUIRED:g} %"
        text.append(f"{folder:45} {total:5}  {percent:6.1f} %{verdict}")
    text += [f"never executed: {name}" for name in missed]
    return "\n".join(text), good and not missed


def main(arguments: Sequence[str] | None = None) -> int:
    """0: enough. 1: too little was executed. 2: it could not be measured, or a test failed, also by a sanitizer."""
    parser = argparse.ArgumentParser(prog="python -m build_tools.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--build", type=Path, default=cmake.BUILD / "sanitize", help="build folder (%(default)s)")
    folder = parser.parse_args(arguments).build
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for name in FOLDERS
               for path in (ROOT / name).rglob("*") if path.is_file()}
    try:
        text, good = report(measure(folder), sources)
    except cmake.BuildError as error:
        print(f"coverage: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
