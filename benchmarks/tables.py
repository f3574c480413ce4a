"""Tables of README.md and docs, generated from the files in ``benchmarks/results/`` and the benchmark registry.

    python -m benchmarks.tables --check      fails when a table differs from the files
    python -m benchmarks.tables --write      brings the tables up to date

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table: NAME -->``; NAME is ``gpu`` (the newest
complete run of each GPU), ``demo`` (the newest demo run), ``quality`` (the same of benchmarks.quality), ``narrow`` (of
`pydit bench model --narrow`) or ``work`` (what the cases of the registry move and compute).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks import compare, machine, quality_table, registry, table
from pydit.errors import FormatError, UserError
from pydit.files import read_json, write_text
from pydit.plan import H200_FLOPS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "kernels.md", ROOT / "docs" / "quality.md")
H200_BYTES = 4.8e12  # per second, NVIDIA H200 SXM data sheet
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table: \2 -->)", re.S)


def gpu_table(results: Path) -> str:
    """Per GPU the newest results file, a complete one before all others: each case against its fastest peer. A case
    that another run of the same commit raced against more peers is shown from there."""
    runs: dict[str, list[tuple[Path, dict]]] = {}
    for path in sorted(results.glob("*.json")):
        raw = read_json(path, what="results")
        if not isinstance(raw, dict) or raw.get("format") != compare.FORMAT:
            continue
        data = compare.load(path, what="results")
        if data["machine"].get("kind") == "cuda":
            runs.setdefault(data["machine"]["device"], []).append((path, data))
    if not runs:
        return "Not measured yet.\n"
    return "\n".join(_gpu(found) for found in runs.values())


def _rank(data: dict) -> tuple[bool, bool, str]:
    """What a GPU's table shows: a complete run, then one of at least half of the cases, then the newest."""
    return (bool(data.get("complete")), 2 * len(data["rows"]) >= len(registry.cases("full")),
            data["machine"].get("date", ""))


def _gpu(found: list[tuple[Path, dict]]) -> str:
    found = sorted(found, key=lambda run: _rank(run[1]), reverse=True)
    commit = found[0][1]["machine"].get("commit", "unknown")
    found = [found[0], *(run for run in found[1:] if run[1]["machine"].get("commit") == commit != "unknown")]
    rows: dict[str, tuple[int, dict]] = {}
    for number, (_, data) in enumerate(found, 1):
        for row in data["rows"]:
            known = rows.get(row["case"])
            if known is None or _raced(known[1]) < _raced(row):
                rows[row["case"]] = number, row
    lines = ["| op | shape | dtype | us (IQR) | rate | % of limit | fastest peer | ratio |",
             "|---|---|---|---|---|---|---|---|"]
    for number, row in rows.values():
        head, mark = f"| `{row['op']}` | {row['shape']} | {row['dtype']} |", "" if number == 1 else f" [{number}]"
        if "wrong" in row:
            lines.append(f"{head} no figure{mark}: {row['wrong'].replace('|', '/')[:100]} | | | | |")
            continue
        ours, peers = row["providers"]["pydit"], compare.rivals(row)
        best = min(peers, key=lambda name: peers[name]["us"], default=None)
        percent = "" if ours["percent_of_limit"] is None else f"{ours['percent_of_limit']:.0f} %"
        raced = "none |"
        if best:  # a function that no graph holds is timed with what the host takes, which a graph leaves out
            method = "" if peers[best]["method"] == ours["method"] else f" (by {peers[best]['method']})"
            raced = f"{best}{method} | {peers[best]['ratio']:.2f}"
        mark = " by torch" * bool(table.by_torch(row)) + mark
        lines.append(f"{head} {ours['us']:.1f} ({ours['iqr_us']:.1f}){mark} | {table.rate(row, ours)} | {percent} | "
                     f"{raced} |")
    numbers = {number for number, _ in rows.values()}
    for number, (path, data) in enumerate(found, 1):
        if number in numbers:
            lines += ["", f"{'' if number == 1 else f'[{number}] '}{machine.sentence(data['machine'])}. "
                          f"[Results](benchmarks/results/{path.name})."]
    lines += ["", _left_out([row for _, row in rows.values()]), ""]
    return "\n".join(lines[:-2] if not lines[-2] else lines)


def _raced(row: dict) -> int:
    """How many rivals a row has; of a wrong one none."""
    return -1 if "wrong" in row else len(compare.rivals(row))


def _left_out(rows: list[dict]) -> str:
    """How many of these cases each peer took no part in, and why: the fastest of those raced may not be fastest."""
    found = Counter((name, _in_short(reason) if kind == "failed" else reason) for row in rows
                    for kind in ("not_raced", "failed") for name, reason in row.get(kind, {}).items())
    return "" if not found else "Not raced, with the number of cases: " + "; ".join(
        f"{name} ({count}: {reason})" for (name, reason), count in sorted(found.items())) + "."


def _in_short(reason: str) -> str:
    """The kind of error that a peer raised, or that its result was wrong."""
    kind = re.search(r"(\w+): ", reason.removeprefix("while all were timed: "))
    return kind[1] if kind and kind[1].endswith("Error") else "wrong result"


def demo_table(results: Path) -> str:
    """Teacher, pruned and distilled pipeline of the newest ``demo-*.json``."""
    files = sorted(results.glob("demo-*.json"), key=lambda path: path.stem[-10:])
    if not files:
        return "Not measured yet.\n"
    data = read_json(files[-1], what="results")
    blocks, parameters = data["blocks"], data["parameters"]
    lines = ["| demo pipeline, held-out prompts | blocks | transformer parameters | prompts met (mean over "
             f"{len(data['teacher']['per_category'])} categories) |", "|---|---|---|---|"]
    for label, key, model in (("teacher", "teacher", "teacher"), ("pruned, untrained", "pruned", "student"),
                              ("pruned and distilled", "distilled", "student")):
        lines.append(f"| {label} | {blocks[model]} | {parameters[model]:,} | {100 * data[key]['overall']:.1f} % |")
    return "\n".join(lines) + "\n"


def quality_tables(results: Path) -> str:
    """Criteria side by side, PPCL's ladder, goals and subsets of the newest ``quality-*.json``."""
    files = sorted(results.glob("quality-*.json"), key=lambda path: path.stem[-10:])
    if not files:
        return "Not measured yet.\n"
    return quality_table.markdown(quality_table.load(files[-1]), quality_table.NAMES)


def narrow_table(results: Path) -> str:
    """Stock over accelerated time on a CPU, of the newest ``narrow-*.json`` of each dtype."""
    from benchmarks import model  # which needs this module for its own tables

    found: dict[str, tuple[Path, dict]] = {}
    for path in sorted(results.glob("narrow-*.json"), key=lambda path: path.stem[-10:]):
        data = read_json(path, what="results")
        if not isinstance(data, dict) or data.get("format") != model.FORMAT:
            raise FormatError(f"results: expected a file written by `pydit bench model --narrow --json`, got {path}")
        found[data["rows"][0]["dtype"]] = path, data
    if not found:
        return "Not measured yet.\n"
    ratios: dict[str, dict[str, str]] = {}
    for dtype, (_, data) in found.items():
        for row in data["rows"]:
            ratios.setdefault(f"{row['model']} | {row['width']} | {row['tokens']}", {})[dtype] = (
                f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})")
    lines = [f"| blocks | channels | image tokens | {' | '.join(found)} |", "|---|---|---|" + "---|" * len(found)]
    lines += [f"| {key} | {' | '.join(row.get(dtype, '') for dtype in found)} |" for key, row in ratios.items()]
    for dtype, (path, data) in found.items():
        lines += ["", f"{dtype}: {machine.sentence(data['machine'])}. [Results](../benchmarks/results/{path.name})."]
    return "\n".join(lines) + "\n"


def work_table(_results: Path) -> str:
    """Bytes, FLOPs and the floor by the data sheet of Qwen-Image's cases at batch 1."""
    lines = ["| op | shape | dtype | MB | GFLOP | FLOP per byte | floor, us |", "|---|---|---|---|---|---|---|"]
    for case in registry.cases("full"):
        if not case.model.startswith("qwen-image") or not case.shape.startswith("1x"):
            continue
        size, flops = case.work.bytes, case.work.flops
        floor = max(size / H200_BYTES, flops / H200_FLOPS)
        lines.append(f"| `{case.op}` | {case.shape} | {case.dtype} | {size / 1e6:,.0f} | {flops / 1e9:,.1f} | "
                     f"{flops / size:,.1f} | {floor * 1e6:,.0f} |")
    return "\n".join(lines) + "\n"


TABLES = {"gpu": gpu_table, "demo": demo_table, "quality": quality_tables, "narrow": narrow_table, "work": work_table}


def render(text: str, results: Path) -> str:
    """``text`` with every marked table made anew; UserError when a marker names no table or none is there."""
    names = re.findall(r"<!-- (?:end of )?table: (\w+) -->", text)
    if not names or any(name not in TABLES for name in names) or len(names) != 2 * len(MARKED.findall(text)):
        raise UserError(f"readme: expected pairs of markers `<!-- table: NAME -->` and `<!-- end of table: NAME -->` "
                        f"with NAME one of {', '.join(TABLES)}, got {names or 'none'}")
    return MARKED.sub(lambda match: match[1] + _made(TABLES[match[2]], results, match[2]) + match[4], text)


def _made(make: Callable[[Path], str], results: Path, name: str) -> str:
    """A table; FormatError where the files it is made of lack something."""
    try:
        return make(results)
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(f"results: expected what the table {name} is made of, got a file in {results} where some is "
                          f"missing or of another kind ({type(error).__name__}: {error})") from None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 when --check finds a difference, 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="fail when a table differs from the results files")
    action.add_argument("--write", action="store_true", help="bring the tables up to date")
    parser.add_argument("--readme", type=Path, help="one page alone (default: all pages that have tables)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    differ = False
    for page in PAGES if args.readme is None else (args.readme,):
        try:
            old = page.read_text(encoding="utf-8")
            new = render(old, args.results)
            if args.write and new != old:
                write_text(page, new)
        except (UserError, OSError) as error:
            print(f"tables: error: {error}", file=sys.stderr)
            return 2
        if args.check and new != old:
            print(f"tables: {page} differs from its sources; run python -m benchmarks.tables --write", file=sys.stderr)
            differ = True
    return int(differ)

if __name__ == "__main__":
    sys.exit(main())
