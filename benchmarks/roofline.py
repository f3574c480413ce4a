"""A roofline picture: rates over FLOP per byte, under the ceilings of a machine.

    python -m benchmarks.roofline --out docs/roofline.png                        what an H200's data sheet allows
    python -m benchmarks.roofline --out docs/roofline.png --results FILE.json    and what was measured there

``pydit bench --plot`` draws a run alone, under the ceilings that the same run measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import compare, registry
from benchmarks.machine import sentence
from benchmarks.tables import H200_BYTES
from pydit.errors import UserError, one_line
from pydit.plan import H200_FLOPS
from pydit.reporting import figures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#3f4854")
MARKERS = "osD^v<>"
HOLLOW, FILLED, PEER = "limit by the model, not measured yet", "measured", "fastest peer"


@dataclass
class Point:
    """A case. intensity : FLOP per byte of least memory traffic. rate, peer : TFLOP/s, measured, or None."""

    op: str
    intensity: float
    rate: float | None = None
    peer: float | None = None


@dataclass
class Ceilings:
    """copy : GB/s. product : TFLOP/s. What each is called in the picture."""

    copy: float
    product: float
    copy_name: str
    product_name: str

    def at(self, intensity: float) -> float:
        """TFLOP/s that they allow."""
        return min(self.product, intensity * self.copy / 1e3)


H200 = Ceilings(H200_BYTES / 1e9, H200_FLOPS / 1e12, "memory, data sheet", "bf16 tensor cores, data sheet")


def draw(data: dict, path: Path) -> None:
    """Draw the results of ``pydit bench`` into a PNG file."""
    limits, machine, ceilings = data["limits"], data["machine"], None
    if limits.get("copy_gb_s") and limits.get("gemm_tflop_s"):
        ceilings = Ceilings(limits["copy_gb_s"], limits["gemm_tflop_s"], "copy", f"{limits['gemm']} GEMM")
    figures.save(_figure(measured(data), ceilings, f"{machine['device']}, commit {machine['commit']}"), path,
                 description=sentence(machine))


def measured(data: dict) -> list[Point]:
    """The cases of a results file that are right."""
    return [_measured(row) for row in data["rows"] if "wrong" not in row]


def modelled(results: Sequence[dict] = ()) -> list[Point]:
    """The registry's full-size cases, in its order, with the rates of the results files that have them."""
    rows = {row["case"]: row for data in results for row in data["rows"] if "wrong" not in row}
    return [_measured(rows[case.name]) if case.name in rows else Point(case.op, case.work.flops / case.work.bytes)
            for case in registry.cases("full")]


def _on_an_h200(path: Path) -> dict:
    """A results file, as points of another machine have no place under this roof."""
    data = compare.load(path, what="results")
    if not data["machine"]["device"].startswith("NVIDIA H200"):
        raise UserError(f"results: expected what was measured on an H200, got {path} of {data['machine']['device']}")
    return data


def digest(points: Sequence[Point]) -> str:
    """A checksum of what a picture shows; the committed one carries that of its points."""
    return hashlib.sha256(json.dumps([asdict(point) for point in points]).encode()).hexdigest()


def _measured(row: dict) -> Point:
    peers = [provider["us"] for provider in compare.rivals(row).values()]
    rate = row["flops"] / row["providers"]["pydit"]["us"] / 1e6
    return Point(row["op"], row["flops"] / row["bytes"], rate, row["flops"] / min(peers) / 1e6 if peers else None)


@figures.styled
def _figure(points: list[Point], ceilings: Ceilings | None, title: str) -> Any:
    """The roof above, and below which case of which op is where."""
    families = registry.families()
    ops = list(dict.fromkeys(point.op for point in points))
    kinds = list(dict.fromkeys(families.get(op, op) for op in ops))
    figure, (roof, names) = figures.new_figure(8.4, 4.4 + 0.18 * len(ops), nrows=2, ncols=1, sharex=True,
                                               height_ratios=[3.8, 0.4 + 0.18 * len(ops)])
    for point in points:
        i = kinds.index(families.get(point.op, point.op))
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
                 "linestyle": "none", "markersize": 6.5, "clip_on": False}
        hollow = {} if point.rate else {"markerfacecolor": "none"}
        names.plot(point.intensity, ops.index(point.op), **style | hollow)
        if point.rate or ceilings:
            roof.plot(point.intensity, point.rate or ceilings.at(point.intensity), **style | hollow)
        if point.peer:
            roof.plot(point.intensity, point.peer, **style | {"marker": "_", "markersize": 11})
    _legend(roof, points)
    roof.set(xscale="log", yscale="log", ylabel="TFLOP/s", title=title)
    names.set(xlabel="FLOP per byte of least memory traffic", yticks=range(len(ops)), yticklabels=ops)
    names.set_ylim(len(ops) - 0.5, -0.5)
    names.tick_params(axis="y", length=0)
    roof.grid(which="major")
    names.grid(which="major")
    if ceilings:
        _roof(roof, names, ceilings, points)
    return figure


def _roof(roof: Any, names: Any, ceilings: Ceilings, points: list[Point]) -> None:
    """The two lines, each with its name along it, and where they meet."""
    ridge = ceilings.product * 1e3 / ceilings.copy
    low = min([point.intensity for point in points] + [ridge]) / 2.5
    high = max([point.intensity for point in points] + [ridge]) * 2.5
    rates = [ceilings.at(low), *(point.rate for point in points if point.rate)]
    roof.set(xlim=(low, high), ylim=(min(rates) / 1.5, ceilings.product * 3))
    roof.plot([low, ridge, high], [ceilings.at(low), ceilings.product, ceilings.product], color=figures.INK,
              linewidth=1.1, zorder=1)
    place = low * (ridge / low) ** 0.75
    roof.annotate(f"{ceilings.copy_name}: {ceilings.copy:,.0f} GB/s", (place, ceilings.at(place)), xytext=(-8, 2),
                  textcoords="offset points", ha="right")
    roof.annotate(f"{ceilings.product_name}: {ceilings.product:.3g} TFLOP/s", (high, ceilings.product),
                  xytext=(-4, 9), textcoords="offset points", ha="right")
    style = {"color": figures.FAINT, "linewidth": 0.8, "linestyle": ":", "zorder": 1}
    roof.plot([ridge, ridge], [roof.get_ylim()[0], ceilings.product], **style)
    names.axvline(ridge, **style)
    roof.annotate(f"below {ridge:,.3g} FLOP per byte\nmemory is the limit", (ridge, min(rates)), xytext=(-6, 0),
                  textcoords="offset points", ha="right", va="bottom", color=figures.FAINT)


def _legend(roof: Any, points: list[Point]) -> None:
    style = {"color": figures.FAINT, "linestyle": "none"}
    if any(point.rate is None for point in points):
        roof.plot([], [], "o", markerfacecolor="none", label=HOLLOW, **style)
    if any(point.rate for point in points):
        roof.plot([], [], "o", label=FILLED, **style)
    if any(point.peer for point in points):
        roof.plot([], [], "_", markersize=11, label=PEER, **style)
    roof.legend(loc="upper left")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--results", type=Path, nargs="*", default=[], metavar="FILE.json",
                        help="what `pydit bench --json` wrote on an H200; of a case in several files the last counts")
    args = parser.parse_args(argv)
    try:
        points = modelled([_on_an_h200(path) for path in args.results])
        figures.save(_figure(points, H200, "NVIDIA H200, cases of the benchmark registry"), args.out,
                     description=digest(points))
    except (UserError, OSError) as error:
        print(f"roofline: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
