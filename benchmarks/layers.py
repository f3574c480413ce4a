"""What each kind of block of a pruned model costs, side by side with the dense one.

    pydit bench layers --config qwen-image --plan ppcl-qwen-image-10b --size 1328

Per kind of block in the plan: how many there are, time, the floor (the slower of bytes over copy bandwidth and FLOPs
over GEMM rate, both measured in the same run), its share of the time, GB/s, TFLOP/s, energy and peak memory (on a
GPU; empty elsewhere), and the best peer's time over ours. Weights are random: latency, never quality.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

from benchmarks import compare, machine, timing
from benchmarks.cases import whole_block
from benchmarks.runner import run_case
from pydit import PruningPlan
from pydit.cli.options import Parser, count
from pydit.errors import UserError
from pydit.families import BlockSpec
from pydit.files import write_json

_COLUMNS = "{:14} {:>5} {:>10} {:>10} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a block computed a wrong result, 2 on bad input."""
    try:
        return _main(_parse(argv))
    except (UserError, OSError) as error:
        print(f"pydit bench layers: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parse(argv):
    parser = Parser(prog="pydit bench layers", description=__doc__)
    parser.add_argument("--config", choices=["qwen-image", "tiny"], default="qwen-image" if torch.cuda.is_available()
                        else "tiny",
                        help="widths: the published ones, or ones for a CPU (default: what suits the machine)")
    parser.add_argument("--plan", required=True, help="a plan file, or the name of a preset")
    parser.add_argument("--size", type=count, default=1328, help="pixels of a square image's side (default: 1328)")
    parser.add_argument("--text", type=count, default=512, help="text tokens (default: 512)")
    parser.add_argument("--rounds", type=count, default=15, help="samples per provider, at least 3 (default: 15)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    if args.rounds < 3:
        raise UserError(f"rounds: expected at least 3, got {args.rounds}")
    if args.size % 16:
        raise UserError(f"size: expected a multiple of 16, got {args.size}")
    return args


def plan_of(name: str) -> PruningPlan:
    """A plan from a file, or a preset by its name."""
    return PruningPlan.load(name) if Path(name).exists() or name.endswith(".json") else PruningPlan.preset(name)


def kind_of(spec: BlockSpec) -> str:
    """The case of :mod:`benchmarks.cases.whole_block` that a block of a plan is timed as."""
    if spec.form in ("affine", "single"):
        return {"affine": "affine", "single": "single_stream"}[spec.form]
    if spec.text != "full":
        return {"keys": "text_keys", "linear": "text_linear"}[spec.text]
    return "linear_ffn" if spec.ffn == "linear" else "dense"


def _main(args) -> int:
    plan, device = plan_of(args.plan), "cuda" if torch.cuda.is_available() else "cpu"
    if plan.family != "qwen-image":
        raise UserError(f"plan: expected one of qwen-image, got one of {plan.family}")
    heads, dim = (24, 128) if args.config == "qwen-image" else (2, 32)
    kinds = Counter({"dense": 0}) + Counter(kind_of(spec) for spec in plan.blocks)
    rows = []
    with torch.no_grad():
        limits = timing.measure_limits(device, args.rounds)
        for kind in dict.fromkeys(["dense", *kinds]):
            case = whole_block.block(args.config, 1, (args.size // 16) ** 2, args.text, heads, dim, "bf16", kind)
            with machine.Sampler(device) as sampler:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                row = run_case(case, device, limits, rounds=args.rounds)
                watts = sampler.result().get("sampled", {}).get("power_w", {}).get("median")
            ours = row.get("providers", {}).get("pydit", {})
            row |= {"kind": kind, "count": kinds[kind],
                    "energy_j": watts * ours["us"] * 1e-6 if isinstance(watts, (int, float)) and ours else None,
                    "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}
            rows.append(row)
    data = {"format": compare.FORMAT, "version": compare.VERSION, "complete": True, "not_run": [],
            "machine": machine.describe(device), "limits": limits, "plan": plan.to_dict(), "rows": rows}
    print(render(rows))
    if args.json:
        write_json(args.json, data)
    return 1 if any("wrong" in row for row in rows) else 0


def render(rows: list[dict]) -> str:
    """The table; a dash stands for what this machine does not measure."""
    lines = [_COLUMNS.format("kind", "count", "us", "ideal us", "% ideal", "GB/s", "TFLOP/s", "mJ", "MiB", "peer/us")]
    for row in rows:
        if "wrong" in row:
            lines.append(f"{row['kind']:14} {row['count']:5} wrong: {row['wrong']}")
            continue
        ours = row["providers"]["pydit"]
        peers = [entry["ratio"] for name, entry in row["providers"].items() if name != "pydit"]
        lines.append(_COLUMNS.format(
            row["kind"], row["count"], f"{ours['us']:.1f}", _cell(row["floor_us"], "{:.1f}"),
            _cell(ours["percent_of_limit"], "{:.1f}"), f"{ours['gb_s']:.2f}", f"{ours['tflop_s']:.3f}",
            _cell(row["energy_j"], "{:.2f}", 1e3), _cell(row["memory_bytes"], "{:.0f}", 2 ** -20),
            _cell(min(peers, default=None), "{:.3f}")))
    return "\n".join(lines)


def _cell(value, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
