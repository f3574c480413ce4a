"""What each kind of block of a pruned model costs, side by side with the dense one.

    pydit bench layers --config qwen-image --plan ppcl-qwen-image-10b --size 1328

Per kind of block in the plan: how many there are, time, the ideal (the sum over its ops of the slower of bytes over
copy bandwidth and FLOPs over GEMM rate, both measured in the same run), its share of the time, GB/s, TFLOP/s, energy
and memory beyond weights and inputs (on a GPU; empty elsewhere), and the fastest peer's time over ours. Then where the
time goes, matrix products, attention and the rest, before (diffusers' operations) and after (pydit's), beside the
ideal of each. Weights are random: latency, never quality.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import compare, machine, parts, timing
from benchmarks.cases import whole_block
from benchmarks.cases.linear import own_kernel
from benchmarks.runner import run_case, settle, unwanted_peers
from pydit import PruningPlan
from pydit.cli.options import Parser, count, positive
from pydit.errors import UserError, one_line
from pydit.families import BlockSpec
from pydit.files import write_json

FORMAT = "pydit-bench-layers"
ENERGY_SECONDS = 2.0  # of nothing but the block, as sensors of power average over one
_COLUMNS = "{:14} {:>5} {:>10} {:>10} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a block computed a wrong result, 2 on bad input."""
    try:
        return _main(_parse(argv))
    except (UserError, OSError) as error:
        print(f"pydit bench layers: error: {one_line(error)}", file=sys.stderr)
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
    parser.add_argument("--without", metavar="PARTS", default="",
                        help="no peer whose name contains one of these, separated by commas")
    parser.add_argument("--seconds", type=positive, help="start no kind of block after this time")
    parser.add_argument("--json", type=Path, help="write all figures to this file, after every kind")
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
    if spec.form == "affine":
        return "affine"
    if spec.form == "single":  # which no plan thins out further
        return "single_stream"
    ffn = "_ffn" if spec.ffn == "linear" else ""
    if spec.text == "full":
        return "linear_ffn" if ffn else "dense"
    if spec.text == "linear":
        return f"{'text_end' if spec.text_output else 'text_linear'}{ffn}"
    return f"text_keys{ffn}"


def _main(args) -> int:
    plan, device = plan_of(args.plan), "cuda" if torch.cuda.is_available() else "cpu"
    if plan.family != "qwen-image":
        raise UserError(f"plan: expected one of qwen-image, got one of {plan.family}")
    heads, dim = (24, 128) if args.config == "qwen-image" else (2, 32)
    started, without = time.monotonic(), unwanted_peers(args.without)
    kinds = Counter(kind_of(spec) for spec in plan.blocks)
    order = list(dict.fromkeys(["dense", *kinds]))
    data = {"format": FORMAT, "version": compare.VERSION, "complete": False, "not_run": list(order),
            "machine": machine.describe(device), "limits": {}, "plan": plan.to_dict(), "rows": []}
    with torch.no_grad():
        data["limits"] = timing.measure_limits(device, args.rounds)
        for kind in order:
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                break
            print(f"{kind} ...", file=sys.stderr, flush=True)
            case = whole_block.block(args.config, 1, (args.size // 16) ** 2, args.text, heads, dim, "bf16", kind)
            row = run_case(case, device, data["limits"], rounds=args.rounds, without=without)
            row |= {"kind": kind, "count": kinds[kind], "energy_j": None, "memory_bytes": None, "ideal_us": None}
            try:
                row |= _details(case, kind, args, {"num_attention_heads": heads, "attention_head_dim": dim}, device,
                                data["limits"], row)
            except RuntimeError as error:  # the times are worth more
                row["details_failed"] = " ".join(str(error).split())[:200]
            data["rows"].append(row)
            data["not_run"].remove(kind)
            settle(device)
            if args.json:
                write_json(args.json, data)
    data["complete"] = not data["not_run"]
    print(render(data["rows"]))
    if args.json:
        write_json(args.json, data)
    return 1 if any("wrong" in row for row in data["rows"]) else 0


def _details(case, kind: str, args, config: dict, device: str, limits: dict, row: dict) -> dict:
    """The ideal of a block, where its time goes, and on a GPU its energy and memory."""
    spec = (whole_block.KINDS | whole_block.MORE_KINDS)[kind]
    ideal = parts.floors(parts.works(config, spec, 1, (args.size // 16) ** 2, args.text, 2), limits)
    found = {"ideal_us": sum(ideal.values()) if ideal else None}
    if "wrong" in row:
        return found
    inputs = [case.make(device) for _ in range(2)]  # the weights of one exceed a GPU's cache
    providers = {"before": case.eager, "after": case.run}
    if device == "cuda":
        providers["grouped"] = own_kernel(case.run)
    found["parts"] = {"ideal": ideal} | {name: parts.measured(run, inputs, device) for name, run in providers.items()}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case.run(*inputs[0])
        found["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        found["energy_j"] = _joules(case.run, inputs, row["providers"]["pydit"]["us"])
    return found


def _joules(run: Callable, inputs: list[tuple], us: float) -> float | None:
    """Energy of a call, from the median power while nothing else runs; None without a sensor."""
    with machine.Sampler("cuda") as sampler:
        end = time.monotonic() + ENERGY_SECONDS
        while time.monotonic() < end:
            for args in inputs:
                run(*args)
            torch.cuda.synchronize()
        watts = sampler.result(last=ENERGY_SECONDS / 2).get("sampled", {}).get("power_w", {}).get("median")
    return watts * us * 1e-6 if isinstance(watts, (int, float)) else None


def render(rows: list[dict]) -> str:
    """The table; a dash stands for what this machine does not measure."""
    lines = [_COLUMNS.format("kind", "count", "us", "ideal us", "% ideal", "GB/s", "TFLOP/s", "mJ", "MiB", "peer/us")]
    for row in rows:
        if "wrong" in row:
            lines.append(f"{row['kind']:14} {row['count']:5} wrong: {row['wrong']}")
            continue
        ours = row["providers"]["pydit"]
        peers = [entry["ratio"] for entry in compare.rivals(row).values()]
        lines.append(_COLUMNS.format(
            row["kind"], row["count"], f"{ours['us']:.1f}", _cell(row["ideal_us"], "{:.1f}"),
            _cell(row["ideal_us"], "{:.1f}", 100 / ours["us"]), f"{ours['gb_s']:.2f}", f"{ours['tflop_s']:.3f}",
            _cell(row["energy_j"], "{:.2f}", 1e3), _cell(row["memory_bytes"], "{:.0f}", 2 ** -20),
            _cell(min(peers, default=None), "{:.3f}")))
    names = list(dict.fromkeys(name for row in rows for name in row.get("parts", {})))
    if names:
        lines += ["", "us by part".ljust(26) + "".join(f"{name:>11}" for name in names)]
    for row in rows:
        for part in parts.PARTS if "parts" in row else ():
            lines.append(f"{row['kind']:14} {part:11}" + "".join(
                f"{_cell((row['parts'].get(name) or {}).get(part), '{:.1f}'):>11}" for name in names))
    return "\n".join(lines)


def _cell(value, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
