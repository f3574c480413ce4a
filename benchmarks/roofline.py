"""A roofline picture of one run: what each case reached, under the two ceilings that the same run measured."""

from __future__ import annotations

from pathlib import Path

from benchmarks.machine import sentence

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def draw(data: dict, path: Path) -> None:
    """Draw the results of ``pydit bench`` into a PNG file: filled marks are pydit, hollow ones its best peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in data["rows"] if "wrong" not in row]
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for i, op in enumerate(sorted({row["op"] for row in rows})):
        mine = [row for row in rows if row["op"] == op]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
        x = [row["flops"] / row["bytes"] for row in mine]
        axes.plot(x, [_rate(row, row["providers"]["pydit"]["us"]) for row in mine], label=op, **style)
        best = [min((p["us"] for name, p in row["providers"].items() if name != "pydit"), default=None) for row in mine]
        axes.plot([a for a, us in zip(x, best, strict=True) if us],
                  [_rate(row, us) for row, us in zip(mine, best, strict=True) if us], markerfacecolor="none", **style)
    axes.plot([], [], "o", color="grey", markerfacecolor="none", linestyle="none", label="fastest peer")
    copy, gemm = data["limits"].get("copy_gb_s"), data["limits"].get("gemm_tflop_s")
    if copy and gemm:
        ridge = gemm * 1e3 / copy
        low = min([row["flops"] / row["bytes"] for row in rows] + [ridge]) / 4
        high = max([row["flops"] / row["bytes"] for row in rows] + [ridge]) * 4
        axes.plot([low, ridge, high], [low * copy / 1e3, gemm, gemm], color="black", linewidth=1.2)
        axes.annotate(f"copy {copy:.0f} GB/s", (low * 1.3, low * 1.3 * copy / 1e3), xytext=(10, -8),
                      textcoords="offset points", fontsize=9)
        axes.annotate(f"{data['limits']['gemm']} GEMM {gemm:.3g} TFLOP/s", (ridge, gemm), xytext=(0, 5),
                      textcoords="offset points", fontsize=9, ha="center")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of least memory traffic", ylabel="TFLOP/s")
    axes.grid(which="major", color="0.9")
    axes.legend(fontsize=8, loc="lower right")
    machine = data["machine"]
    axes.set_title(f"{machine['device']}, commit {machine['commit']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, metadata={"Description": sentence(machine)})
    plt.close(figure)


def _rate(row: dict, us: float) -> float:
    return row["flops"] / us / 1e6
