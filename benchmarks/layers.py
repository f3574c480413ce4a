"""What each kind of block of a pruned model costs, side by side with the dense one.

    pydit bench layers --config qwen-image --plan ppcl-qwen-image-10b --size 1328
    pydit bench layers --config flux.1-dev --plan ppcl-flux.1-8b
    pydit bench layers --config sd3.5-medium --plan dense

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import blocks, compare, machine, parts, timing
from benchmarks.cases import whole_block
from benchmarks.cases.linear import own_kernel
from benchmarks.output import JSON_HELP, Output
from benchmarks.runner import run_case, settle, unwanted_peers
from pydit import PruningPlan
from pydit.cli.options import Parser, count, positive
from pydit.errors import UserError, one_line
from pydit.families import BlockSpec
from pydit.files import require_file

FORMAT = "pydit-bench-layers"
ENERGY_SECONDS = 2.0  # of nothing but the block, as sensors of power average over one
_COLUMNS = "{:20} {:>5} {:>10} {:>10} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a block computed a wrong result, 2 on bad input."""
    try:
        return _main(_parse(argv))
    except (UserError, OSError) as error:
        print(f"pydit bench layers: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parse(argv):
    parser = Parser(prog="pydit bench layers", description=__doc__)
    add_model(parser)
    parser.add_argument("--rounds", type=count, default=15, help="samples per provider, at least 3 (default: 15)")
    parser.add_argument("--without", metavar="PARTS", default="",
                        help="no peer whose name contains one of these, separated by commas")
    parser.add_argument("--seconds", type=positive, help="start no kind of block after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP.format("kind"))
    args = parser.parse_args(argv)
    require_file(args.json, args.plan, what="json", kind=FORMAT)
    if args.rounds < 3:
        raise UserError(f"rounds: expected at least 3, got {args.rounds}")
    settle_size(args)
    return args


def add_model(parser: Parser) -> None:
    """The options that say which model, which plan and at what size."""
    parser.add_argument("--config", choices=sorted(blocks.CONFIGS),
                        default="qwen-image" if torch.cuda.is_available() else "tiny",
                        help="a published size, or a narrow one for a CPU (default: what suits the machine)")
    parser.add_argument("--plan", help="a plan file, the name of a preset, or `dense`")
    parser.add_argument("--size", type=count,
                        help="pixels of a square image's side (default: 1328 for Qwen-Image, else 1024)")
    parser.add_argument("--text", type=count, help="text tokens (default: 333 for a published SD3.5, else 512)")


def settle_size(args) -> None:
    """The configuration's own size where none was asked for; UserError where it cannot be."""
    usual = blocks.CONFIGS[args.config]
    args.size, args.text = args.size or usual.pixels, args.text or usual.text
    if args.plan is None:
        raise UserError("plan: expected a plan file, the name of a preset or `dense`, got none")
    if args.size % 16:
        raise UserError(f"size: expected a multiple of 16, got {args.size}")


def plan_of(name: str, config: str = "qwen-image") -> PruningPlan:
    """A plan from a file, a preset by its name, or what removes nothing of a configuration."""
    if name == "dense":
        return blocks.dense_plan(config)
    return PruningPlan.load(name) if Path(name).exists() or name.endswith(".json") else PruningPlan.preset(name)


def kinds_of(family: str, config: Mapping[str, Any], plan: PruningPlan) -> tuple[dict[str, BlockSpec], Counter]:
    """One block of each kind that the dense model or a plan has, by name, and how many a plan has of it."""
    specs, counts = {}, Counter()
    for blocks_of_plan, counted in ((PruningPlan(family, plan.num_layers).blocks, 0), (plan.blocks, 1)):
        for spec in blocks_of_plan:
            kind = blocks.kind_of(family, config, spec)
            specs.setdefault(kind, blocks.representative(family, config, spec))
            counts[kind] += counted
    return specs, counts


def _main(args) -> int:
    plan, device = plan_of(args.plan, args.config), "cuda" if torch.cuda.is_available() else "cpu"
    family, config = plan.family, blocks.config_of(args.config, plan)
    started, without = time.monotonic(), unwanted_peers(args.without)
    specs, counts = kinds_of(family, config, plan)
    order, out = list(specs), Output(args.json, kind=FORMAT)
    data = {"format": FORMAT, "version": compare.VERSION, "complete": False, "not_run": list(order),
            "machine": machine.describe(device), "limits": {}, "plan": plan.to_dict(), "rows": []}
    with torch.no_grad():
        data["limits"] = timing.measure_limits(device, args.rounds)
        for kind in order:
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                break
            print(f"{kind} ...", file=sys.stderr, flush=True)
            case = whole_block.block_of(family, config, specs[kind], kind, args.config, 1, (args.size // 16) ** 2,
                                        args.text, "bf16")
            row = run_case(case, device, data["limits"], rounds=args.rounds, without=without)
            row |= {"kind": kind, "count": counts[kind], "energy_j": None, "memory_bytes": None, "ideal_us": None}
            try:
                row |= _details(case, family, config, specs[kind], args, device, data["limits"], row)
            except RuntimeError as error:  # the times are worth more
                row["details_failed"] = " ".join(str(error).split())[:200]
            data["rows"].append(row)
            data["not_run"].remove(kind)
            settle(device)
            out.write(data)
    data["complete"] = not data["not_run"]
    print(render(data["rows"]))
    out.finish(data, whole=data["complete"])
    return 1 if any("wrong" in row for row in data["rows"]) else 0


def _details(case, family: str, config: dict, spec: BlockSpec, args, device: str, limits: dict, row: dict) -> dict:
    """The ideal of a block, where its time goes, and on a GPU its energy and memory."""
    ideal = parts.floors(parts.works(config, spec, 1, (args.size // 16) ** 2, args.text, 2, family), limits)
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
            lines.append(f"{row['kind']:20} {row['count']:5} wrong: {row['wrong']}")
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
        lines += ["", "us by part".ljust(32) + "".join(f"{name:>11}" for name in names)]
    for row in rows:
        for part in parts.PARTS if "parts" in row else ():
            lines.append(f"{row['kind']:20} {part:11}" + "".join(
                f"{_cell((row['parts'].get(name) or {}).get(part), '{:.1f}'):>11}" for name in names))
    return "\n".join(lines)


def _cell(value, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(value * factor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
