"""Results files: their format, and the comparison of two of them."""

from __future__ import annotations

from math import inf
from pathlib import Path

from benchmarks import table
from pydit.errors import FormatError
from pydit.files import read_json

FORMAT, VERSION = "pydit-bench", 1
NOISE = 0.01  # two runs of the same code differ by this much whatever their quartiles say
SAME_MACHINE = ("device", "kind", "threads")
SAME_SOFTWARE = ("torch", "cuda", "driver")


def load(path: Path, *, what: str = "compare") -> dict:
    """A results file, checked: it can be shown whole. FormatError names ``what``."""
    data = read_json(path, what=what)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{what}: expected a file written by `pydit bench --json`, got {path}")
    if data.get("version") != VERSION:
        raise FormatError(f"{what}: expected version {VERSION}, got {data.get('version')!r} ({path})")
    rows = data.get("rows")
    if not isinstance(data.get("machine"), dict) or not isinstance(rows, list) or not all(
            isinstance(row, dict) and isinstance(row.get("case"), str) for row in rows):
        raise FormatError(f"{what}: expected machine and rows, got a file without them ({path})")
    try:
        table.render(data)
        for row in rows:
            if "wrong" in row:
                row["wrong"].strip()
            elif not all(0 < entry[key] < inf for entry in (row["providers"]["pydit"], *row["providers"].values())
                         for key in ("us", "q1_us", "q3_us")):
                raise ValueError(f"expected positive us, q1_us and q3_us of {row['case']}, got others")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise FormatError(f"{what}: expected all that `pydit bench --json` writes, got a file where some is missing or "
                          f"wrong ({path}: {type(error).__name__}: {error})") from None
    return data


def rivals(row: dict) -> dict[str, dict]:
    """Of a row the providers that pydit is held against: neither itself nor what is no rival to it, as a peer says."""
    return {name: entry for name, entry in row["providers"].items() if name != "pydit" and entry.get("rival", True)}


def compare(old: dict, new: dict) -> dict:
    """Per case old time over new time, with a verdict.

    Returns
    -------
    dict
        ``machine``: [(field, old, new)] that make it another machine; ``software``: likewise, but the same machine;
        ``rows``: [{case, old_us, new_us, ratio, verdict}] with ratio above 1 where the new one is faster and verdict
        one of "faster", "slower", "within noise" (the interquartile ranges overlap, or the medians differ by under
        1 %), "other machine", "other method" (timed from a graph in one run, on the stream in the other); ``only_old``,
        ``only_new``: case names without a time on the other side.
    """
    differ = {kind: [(name, old["machine"].get(name), new["machine"].get(name)) for name in names
                     if old["machine"].get(name) != new["machine"].get(name)]
              for kind, names in (("machine", SAME_MACHINE), ("software", SAME_SOFTWARE))}
    before, after = _times(old), _times(new)
    rows = []
    for case in (case for case in after if case in before):
        a, b = before[case], after[case]
        verdict = ("other machine" if differ["machine"] else "other method" if a["method"] != b["method"]
                   else _verdict(a, b))
        rows.append({"case": case, "old_us": a["us"], "new_us": b["us"], "ratio": a["us"] / b["us"],
                     "verdict": verdict})
    return {**differ, "rows": rows, "only_old": [case for case in before if case not in after],
            "only_new": [case for case in after if case not in before]}


def describe(result: dict, path: Path) -> str:
    """The comparison as text."""
    lines = [f"compared with {path}: ratio = old time / new time"]
    if result["machine"]:
        lines = ["!" * 100, "ANOTHER MACHINE: " + "; ".join(f"{n} was {a}, is {b}" for n, a, b in result["machine"])
                 + ". The ratios below compare machines, not code.", "!" * 100, *lines]
    if result["software"]:
        lines.append("other versions: " + "; ".join(f"{n} was {a}, is {b}" for n, a, b in result["software"]))
    width = max((len(row["case"]) for row in result["rows"]), default=4)
    lines.append(f"{'case':{width}} {'old us':>10} {'new us':>10} {'ratio':>7}  verdict")
    lines += [f"{row['case']:{width}} {row['old_us']:10.2f} {row['new_us']:10.2f} {row['ratio']:7.3f}  {row['verdict']}"
              for row in result["rows"]]
    lines += [f"{case}: only in {path}" for case in result["only_old"]]
    lines += [f"{case}: only in this run" for case in result["only_new"]]
    return "\n".join(lines)


def _times(data: dict) -> dict[str, dict]:
    return {row["case"]: row["providers"]["pydit"] for row in data["rows"] if "wrong" not in row}


def _verdict(old: dict, new: dict) -> str:
    if abs(old["us"] / new["us"] - 1) < NOISE or (new["q1_us"] <= old["q3_us"] and old["q1_us"] <= new["q3_us"]):
        return "within noise"
    return "faster" if new["us"] < old["us"] else "slower"
