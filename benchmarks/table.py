"""A run as text: the machine line, the ceilings, one line per provider, and everything that took no part."""

from __future__ import annotations

from benchmarks import machine

RIDGE = 50  # FLOP per byte from which a rate is printed in TFLOP/s


def render(data: dict) -> str:
    """The whole report of ``pydit bench``."""
    limits, lines = data["limits"], [machine.sentence(data["machine"])]
    if limits:
        lines.append(f"ceilings of this run: copy {limits['copy_gb_s']:.0f} GB/s, "
                     f"GEMM {limits['gemm_tflop_s']:.3g} TFLOP/s ({limits['gemm']})")
    else:
        lines.append("ceilings not measured: no % of limit")
    lines += [f"{op}: pydit ran the {path['path']} path" + (f" ({path['reason']})" if path["reason"] else "")
              for op, path in data.get("paths", {}).items()]
    width = max([len(f"{row['op']} {row['shape']}") for row in data["rows"]], default=2)
    lines += ["", f"{'op and shape':{width}} {'dtype':5} {'provider':22} {'us':>10} {'IQR':>8} {'rate':>13} "
                  f"{'% limit':>8} {'ratio':>6}"]
    for row in data["rows"]:
        lines += _row(row, width, data["machine"].get("peak_tflop_s"), data["machine"].get("kind"))
    lines += [f"not run, out of time: {name}" for name in data["not_run"]]
    return "\n".join(lines)


def _row(row: dict, width: int, peak: float | None, kind: str | None) -> list[str]:
    head = f"{row['op'] + ' ' + row['shape']:{width}} {row['dtype']:5}"
    if "wrong" in row:
        return [f"{head} WRONG, not timed: {row['wrong']}"]
    lines = []
    for name, entry in row["providers"].items():
        percent = entry["percent_of_limit"]
        note = "" if entry["method"] == row["providers"]["pydit"]["method"] else f"  (timed by {entry['method']})"
        if peak and rate(row, entry).endswith("TFLOP/s"):
            note = f"  {100 * entry['tflop_s'] / peak:.1f}% of {peak:.0f} TFLOP/s" + note
        lines.append(f"{head if name == 'pydit' else '':{len(head)}} {name:22} {entry['us']:10.2f} "
                     f"{entry['iqr_us']:8.2f} {rate(row, entry):>13} {'' if percent is None else f'{percent:.1f}%':>8} "
                     f"{entry['ratio']:6.2f}{note}")
    lines += [f"{'':{len(head)}} {name:22} not raced: {reason}" for name, reason in row["not_raced"].items()]
    lines += [f"{'':{len(head)}} {name:22} failed: {reason}" for name, reason in row["failed"].items()]
    if kind == "cuda" and (found := by_torch(row)):
        told = ", ".join(f"{op}, {row['paths'][op]}" for op in found)
        lines.insert(1, f"{'':{len(head)}} {'pydit':22} by torch: {told}")
    return lines


def by_torch(row: dict) -> list[str]:
    """Ops of a row from a GPU that no CUDA kernel of pydit ran: its own, or one that fell back to the reference. Blocks
    take the library's products by choice."""
    return [op for op, path in row.get("paths", {}).items()
            if path.startswith("reference") or (op == row["op"] and not path.startswith("cuda"))]


def rate(row: dict, entry: dict) -> str:
    """GB/s of a case bound by memory, TFLOP/s of one bound by arithmetic."""
    if row["flops"] / row["bytes"] < RIDGE:
        return f"{entry['gb_s']:.{1 if entry['gb_s'] < 100 else 0}f} GB/s"
    return f"{entry['tflop_s']:.3g} TFLOP/s"
