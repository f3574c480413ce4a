"""A step of a whole transformer: dense and pruned, eager, compiled and accelerated, in one run.

    pydit bench model --config qwen-image --plan ppcl-qwen-image-10b --size 1328
    pydit bench model --config sd3.5-large --plan ppcl-sd3.5-large-5b

Weights are random: latency and memory, never quality. Variants are built and timed one after another, because two dense
transformers do not fit a GPU; each is timed as the median of --rounds steps after two to warm up. torch.compile takes
the repeated blocks, as diffusers recommends. Peak memory is the GPU's, weights included and no teacher's beside a
pruned model's; on a CPU it stays empty. off is the norm of what a variant's output differs by from the eager one's,
over that one's norm: rounding, and beyond a half an error, whose time is not shown. ratio is the dense eager step over
the variant's.

    pydit bench model --narrow --dtype bf16 --samples 2

times what lies around the arithmetic: transformers of four narrow blocks of every family, stock and accelerated in
turn, on one thread of the CPU. ratio is the stock time over the accelerated one, median and quartiles of the rounds.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pydit
from benchmarks import blocks, compare, machine, timing
from benchmarks.layers import add_model, plan_of, settle_size
from benchmarks.output import JSON_HELP, Output
from pydit.cli.options import Parser, count, positive
from pydit.errors import UserError, one_line
from pydit.files import require_file

FORMAT = "pydit-bench-model"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_OFF = 0.5  # far above what rounding does; zeros give 1, other numbers of that size 1.4, NaN NaN
VARIANTS = ("eager", "torch.compile", "accelerate", "accelerate + graphs", "accelerate + table")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, 2 on bad input."""
    try:
        return _main(_parse(argv))
    except (UserError, OSError) as error:
        print(f"pydit bench model: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parse(argv):
    parser = Parser(prog="pydit bench model", description=__doc__)
    add_model(parser)
    parser.add_argument("--narrow", action="store_true", help="time narrow models of every family on a CPU instead")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of narrow models (default: fp32)")
    parser.add_argument("--samples", type=count, default=1, help="in a batch of narrow models (default: 1)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas (default: all)")
    parser.add_argument("--rounds", type=count, default=9, help="steps timed per variant (default: 9)")
    parser.add_argument("--seconds", type=positive, help="start no variant after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP.format("variant"))
    args = parser.parse_args(argv)
    require_file(args.json, args.plan, what="json", kind=FORMAT)
    if not args.narrow:
        settle_size(args)
    if args.narrow and args.rounds < 3:
        raise UserError(f"rounds: expected at least 3, got {args.rounds}")
    args.variants = [name.strip() for name in args.variants.split(",")]
    unknown = sorted(set(args.variants) - set(VARIANTS))
    if unknown:
        raise UserError(f"variants: expected names out of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return args


def _main(args) -> int:
    if args.narrow:
        return _narrow(args)
    plan, device = plan_of(args.plan, args.config), "cuda" if torch.cuda.is_available() else "cpu"
    blocks.config_of(args.config, plan)  # which refuses what does not belong together
    shapes = ("dense",) if plan.is_stock and not plan.removed else ("dense", "pruned")
    wanted = [(shape, variant) for variant in args.variants for shape in shapes]
    data = {"format": FORMAT, "version": compare.VERSION, "complete": False,
            "not_run": [f"{shape}, {variant}" for shape, variant in wanted], "machine": machine.describe(device),
            "limits": {}, "plan": plan.to_dict(), "rows": []}
    started, out = time.monotonic(), Output(args.json, kind=FORMAT)
    eager: dict[str, torch.Tensor] = {}  # outputs by model
    with machine.Sampler(device) as sampler:
        for shape, variant in wanted:
            if args.seconds is not None and time.monotonic() - started > args.seconds:
                break
            print(f"{shape}, {variant} ...", file=sys.stderr, flush=True)
            data["rows"].append(_row(plan, shape, variant, args, device, eager))
            data["not_run"].remove(f"{shape}, {variant}")
            data["machine"] |= sampler.result()
            _compare(data["rows"])
            out.write(data)
    data["complete"] = not data["not_run"]
    print(render(data["rows"]))
    print("".join(f"not run, out of time: {name}\n" for name in data["not_run"]), end="")
    out.finish(data, whole=data["complete"])
    return 0


def _row(plan: pydit.PruningPlan, shape: str, variant: str, args, device: str,
         eager: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One variant, whose memory is free again when it returns. Its output is held against ``eager``'s of the model,
    which is kept there; where that variant was not run, against none."""
    row: dict[str, Any] = {"model": shape, "variant": variant, "parameters": None, "off": None}
    try:
        model = _make(args.config, plan, shape, device)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        batch = _batch(model, args, device)
        run = _changed(model, variant, batch)
        row["off"] = _off(run, batch, shape, variant, eager)
        row |= _timed(run, batch, args.rounds, device)
    except Exception as error:  # one variant that cannot run here stops no other
        row["failed"] = f"{type(error).__name__}: {one_line(error)}"[:200]
    model = run = None
    torch._dynamo.reset()  # its caches keep what was compiled
    gc.collect()
    if device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return row


@torch.no_grad()
def _off(run: Callable[..., Any], batch: dict[str, Any], shape: str, variant: str,
         eager: dict[str, torch.Tensor]) -> float | None:
    """How far the output is off; AssertionError where it is another one."""
    output = run(**batch, return_dict=False)[0].float().cpu()
    if variant == "eager":
        eager[shape] = output
    if shape not in eager:
        return None
    off = float((output - eager[shape]).norm() / eager[shape].norm())
    if not off <= MOST_OFF:
        raise AssertionError(f"expected the output of the eager model, got one that is off by {off:.3g} of its norm")
    return off


def _compare(rows: list[dict]) -> None:
    eager = [row for row in rows if (row["model"], row["variant"]) == ("dense", "eager")]
    base = next((row["ms"] for row in eager if "ms" in row), None)
    for row in rows:
        row["ratio"] = base / row["ms"] if base and "ms" in row else None


def _make(config: str, plan: pydit.PruningPlan, shape: str, device: str) -> torch.nn.Module:
    """A transformer of random weights, bf16, made where it runs. The pruned one is made as it is loaded:
    pruning a dense one would hold both, and keep the layers that it replaces."""
    from pydit.models import get_adapter
    from pydit.models.pruned import entry_of

    adapter, settings = get_adapter(plan.family), blocks.config_of(config, plan) | blocks.CONFIGS[config].model
    if shape == "pruned":
        settings |= adapter.student_config(settings, plan) | {"pydit": entry_of(plan, "first")}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = (adapter.pruned_class() if shape == "pruned" else adapter.stock_class())(**settings)
    finally:
        torch.set_default_dtype(before)
    return _to(model.requires_grad_(False).eval(), device, torch.bfloat16)


def _to(model: torch.nn.Module, *what: Any) -> torch.nn.Module:
    """diffusers' own ``to`` says of every model that some of its modules should have stayed in float32: "[]"."""
    return torch.nn.Module.to(model, *what)


def _changed(model: torch.nn.Module, variant: str, batch: dict[str, Any]) -> Callable[..., Any]:
    if variant == "torch.compile":
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return model
    if variant == "accelerate + table":
        pydit.bake_schedule(model, batch["timestep"], pooled_projections=batch.get("pooled_projections"),
                            guidance=batch.get("guidance"))
    return model if variant == "eager" else pydit.accelerate(model, cuda_graphs=variant == "accelerate + graphs")


def _batch(model: torch.nn.Module, args, device: str) -> dict[str, Any]:
    side, config, family = args.size // 16, model.config, blocks.CONFIGS[args.config].family

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    batch = {"encoder_hidden_states": draw(1, args.text, config.joint_attention_dim),
             "timestep": torch.tensor([0.5], device=device)}
    if family == "sd3.5":
        return batch | {"hidden_states": draw(1, config.in_channels, 2 * side, 2 * side),
                        "pooled_projections": draw(1, config.pooled_projection_dim)}
    batch["hidden_states"] = draw(1, side * side, config.in_channels)
    if family == "qwen-image":
        return batch | {"img_shapes": [[(1, side, side)]]}
    rows = torch.arange(side, device=device, dtype=torch.float32)
    return batch | {"pooled_projections": draw(1, config.pooled_projection_dim),
                    "guidance": torch.tensor([3.5], device=device) if config.guidance_embeds else None,
                    "img_ids": torch.cartesian_prod(torch.zeros(1, device=device), rows, rows),
                    "txt_ids": torch.zeros(args.text, 3, device=device)}


@torch.no_grad()
def _timed(model: Callable[..., Any], batch: dict[str, Any], rounds: int, device: str) -> dict[str, Any]:
    """Median milliseconds of a step, and the peak memory in bytes."""
    def step() -> float:
        start = time.perf_counter()
        model(**batch, return_dict=False)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    step(), step()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = [step() for _ in range(rounds)]
    return {"ms": statistics.median(times),
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}


NARROW = ((64, 16), (64, 256), (256, 256), (768, 256))  # channels, image tokens; 16 text tokens


def _narrow(args) -> int:
    threads, wanted = torch.get_num_threads(), [(family, *shape) for shape in NARROW for family in _FAMILIES]
    out = Output(args.json, kind=FORMAT)
    data = {"format": FORMAT, "version": compare.VERSION, "complete": False, "not_run": [],
            "machine": machine.describe("cpu"), "limits": {}, "rows": []}
    torch.set_num_threads(1)
    try:
        for number, row in enumerate(wanted, 1):
            data["rows"].append(_narrow_row(*row, args))
            data["not_run"] = [f"{family}, {width} channels, {tokens} tokens"
                               for family, width, tokens in wanted[number:]]
            data["complete"] = not data["not_run"]
            out.write(data)
    finally:
        torch.set_num_threads(threads)
    out.finish(data, whole=True)
    return 0


@torch.no_grad()
def _narrow_row(family: str, width: int, tokens: int, args) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = _FAMILIES[family](width, round(tokens ** 0.5))
    model, batch = _to(model.requires_grad_(False).eval(), DTYPES[args.dtype]), _batch_of(batch, args)
    models = {"stock": model, "accelerated": pydit.accelerate(copy.deepcopy(model))}
    outs = [m(**batch, return_dict=False)[0] for m in models.values()]
    bound = 1e-4 if args.dtype == "fp32" else 5e-2
    torch.testing.assert_close(*outs, rtol=bound, atol=bound)
    samples = timing.interleave({name: lambda m=m: _microseconds(m, batch) for name, m in models.items()}, args.rounds)
    ratio = timing.summary([a / b for a, b in zip(*samples.values(), strict=True)])
    row = {"model": family, "width": width, "tokens": tokens, "dtype": args.dtype, "samples": args.samples,
           "providers": {name: timing.summary(values) for name, values in samples.items()},
           "ratio": ratio["us"], "ratio_q1": ratio["q1_us"], "ratio_q3": ratio["q3_us"]}
    print(f"{family:14} {width:4} channels {tokens:4} tokens  stock {row['providers']['stock']['us']:10.1f} us  "
          f"accelerated {row['providers']['accelerated']['us']:10.1f} us  ratio {row['ratio']:.3f} "
          f"({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})", flush=True)
    return row


def _batch_of(batch: dict[str, Any], args) -> dict[str, Any]:
    """A batch of one sample, in the dtype and of as many samples as are asked for; places serve all of them."""
    def change(name: str, value: Any) -> Any:
        if name in ("img_ids", "txt_ids"):
            return value
        if not isinstance(value, torch.Tensor):
            return value * args.samples
        value = torch.cat([value] * args.samples)
        return value if name == "timestep" else value.to(DTYPES[args.dtype])

    return {name: change(name, value) for name, value in batch.items()}


def _microseconds(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    start = time.thread_time()  # of this thread alone: other processes' turns do not count
    model(**batch, return_dict=False)
    return (time.thread_time() - start) * 1e6


def _sizes(width: int) -> dict[str, int]:
    dim = 32 if width < 256 else 64
    return {"attention_head_dim": dim, "num_attention_heads": width // dim, "joint_attention_dim": 24}


def _qwen(width: int, side: int, plan: pydit.PruningPlan | None = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    dim = _sizes(width)["attention_head_dim"]
    model = QwenImageTransformer2DModel(num_layers=4, in_channels=16, out_channels=4, **_sizes(width),
                                        axes_dims_rope=(dim // 4, dim * 3 // 8, dim * 3 // 8))
    if plan is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random weights: nothing to fit linear maps to
            model = pydit.prune(model, plan)
    return model, {"hidden_states": torch.randn(1, side * side, 16), "encoder_hidden_states": torch.randn(1, 16, 24),
                   "timestep": torch.tensor([0.5]), "img_shapes": [[(1, side, side)]]}


def _flux(width: int, side: int, dual: int = 4, single: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    dim = _sizes(width)["attention_head_dim"]
    model = FluxTransformer2DModel(num_layers=dual, num_single_layers=single, in_channels=16, pooled_projection_dim=16,
                                   **_sizes(width), axes_dims_rope=(dim // 4, dim * 3 // 8, dim * 3 // 8))
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
    return model, {"hidden_states": torch.randn(1, side * side, 16), "encoder_hidden_states": torch.randn(1, 16, 24),
                   "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.5]), "img_ids": places,
                   "txt_ids": torch.zeros(16, 3)}


def _sd3(width: int, side: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(num_layers=4, in_channels=4, out_channels=4, **_sizes(width), sample_size=64,
                                  caption_projection_dim=width, pooled_projection_dim=16, patch_size=2,
                                  pos_embed_max_size=64, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    return model, {"hidden_states": torch.randn(1, 4, 2 * side, 2 * side), "timestep": torch.tensor([0.5]),
                   "encoder_hidden_states": torch.randn(1, 16, 24), "pooled_projections": torch.randn(1, 16)}


_FAMILIES: dict[str, Callable[[int, int], tuple[torch.nn.Module, dict[str, Any]]]] = {
    "qwen-image": _qwen, "qwen-image 4>3": lambda *size: _qwen(*size, pydit.PruningPlan.from_intervals(4, [(1, 2)])),
    "flux dual": _flux, "flux single": lambda *size: _flux(*size, 0, 4), "sd3.5": _sd3}


def render(rows: list[dict]) -> str:
    """The table; a dash stands for what this machine does not measure."""
    lines = [f"{'model':7} {'variant':20} {'parameters':>15} {'ms':>10} {'peak GiB':>9} {'off':>8} {'ratio':>7}"]
    for row in rows:
        head = f"{row['model']:7} {row['variant']:20} {row['parameters'] or 0:15,}"
        if "failed" in row:
            lines.append(f"{head} failed: {row['failed']}")
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2 ** 30:.2f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        off = "-" if row["off"] is None else f"{row['off']:.4f}"
        lines.append(f"{head} {row['ms']:10.2f} {peak:>9} {off:>8} {ratio:>7}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
