"""Commands on a pipeline's transformer: analyze, plan, prune."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from pydit import files
from pydit.arguments import integer
from pydit.cli.check import add_check, measure, require_check, show
from pydit.cli.options import (
    add_batches,
    add_device,
    add_pipeline,
    batch_stream,
    command,
    count,
    first_batches,
    inputs,
    is_given,
    load,
    parse_list,
    positive,
    print_json,
    progress,
    removal,
    require_batches_used,
    require_file_outputs,
    require_output,
    require_used,
    stored_plan,
    stream_identity,
    warnings_as_lines,
    whole,
)
from pydit.errors import UserError
from pydit.families import FAMILIES
from pydit.presets import PRESETS


def add_analyze(commands: Any) -> None:
    parser = command(
        commands, "analyze", _analyze, "measure how redundant the blocks of a pipeline's transformer are",
        "Runs the transformer on calibration prompts and collects, for each stream, how well a linear map imitates\n"
        "every block (R2) and how similar the blocks' outputs are (CKA). `pydit plan` reads the statistics file.",
        "pydit analyze ./my-pipeline --prompts prompts.txt --ablate --out stats.safetensors --plot cka.png",
        fields={"max_batches": "batches", "tokens_per_batch": "tokens"})
    add_pipeline(parser)
    add_batches(parser, batches=24)
    parser.add_argument("--out", type=Path, required=True, help="statistics file to write (.safetensors)")
    parser.add_argument("--ablate", action="store_true",
                        help="also leave out each block in turn, for the criteria that look at the output")
    parser.add_argument("--tokens", type=count, default=256,
                        help="tokens per stream and batch that are kept as samples (default: 256)")
    parser.add_argument("--max-memory", type=positive, metavar="GB",
                        help="of the statistics; where all channels take more, random directions of them are kept")
    parser.add_argument("--save-every", type=count, default=8, help="batches between checkpoints (default: 8)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in OUT.partial")
    parser.add_argument("--plot", type=Path, help="also draw the CKA heat-maps into this PNG file")


def _analyze(arguments: argparse.Namespace) -> None:
    from pydit.analysis import ActivationStats, collect
    from pydit.analysis.activations import FORMAT
    from pydit.distill.pair import digest
    from pydit.reporting import statistics

    for name, least in (("batches", 2), ("tokens", 4)):  # before a model is read
        integer(name, getattr(arguments, name), least, expected=f"at least {least}")
    require_file_outputs(arguments, {"out": FORMAT, "plot": "picture"})
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    resume = None
    if arguments.resume:
        if not partial.exists():
            raise UserError(f"resume: expected the checkpoint of an earlier run in {partial}, got none")
        resume = ActivationStats.load(partial)
    elif partial.exists():
        raise UserError(f"out: expected no checkpoint of an earlier run, got one in {partial}; pass --resume to "
                        "continue it, or delete it")
    made_of = stream_identity(arguments)
    pipe = load(arguments.pipeline, arguments)
    project = None if arguments.max_memory is None else _directions(pipe.transformer, arguments)
    made_of |= {"tokens": arguments.tokens, "ablate": arguments.ablate, "random directions": project,
                "pipeline": digest(pipe.transformer)[:12]}
    if resume is not None:
        _require_same_run(resume, made_of, arguments.batches, partial)

    def keep(stats: ActivationStats) -> None:
        stats.made_of = made_of
        if stats.batches_seen % arguments.save_every == 0 and stats.batches_seen < arguments.batches:
            stats.save(partial)

    done = 0 if resume is None else resume.batches_seen
    stats = collect(pipe.transformer, map(inputs, batch_stream(pipe, arguments)(done)), max_batches=arguments.batches,
                    tokens_per_batch=arguments.tokens, with_ablation=arguments.ablate, project=project, resume=resume,
                    on_batch=keep)
    stats.save(arguments.out)
    partial.unlink(missing_ok=True)
    if arguments.plot:
        from pydit.reporting import figures

        figures.save(figures.cka_maps(statistics.cka_matrices(stats)), arguments.plot)
    if arguments.json:
        print_json(statistics.as_json(stats))
    else:
        statistics.print_statistics(stats)
        print(f"wrote {arguments.out}" + (f" and {arguments.plot}" if arguments.plot else ""))


def _require_same_run(resume: Any, made_of: dict[str, Any], batches: int, partial: Path) -> None:
    """UserError where a checkpoint of `analyze` is of other options: both would be mixed, and nobody could tell."""
    found = resume.made_of or {}
    for name in sorted(made_of.keys() | found.keys()):
        if found.get(name) != made_of.get(name):
            raise UserError(f"{name}: expected {found.get(name)!r} as in the run that wrote {partial}, "
                            f"got {made_of.get(name)!r}")
    if resume.batches_seen >= batches:
        raise UserError(f"batches: expected more than the {resume.batches_seen} that are in {partial}, got {batches}")


def _directions(transformer: Any, arguments: argparse.Namespace) -> int | None:
    """How many random directions fit --max-memory; None if all channels do. Says what it costs."""
    from pydit.analysis import ActivationStats
    from pydit.models import get_adapter

    adapter = get_adapter(transformer)
    layers, width = adapter.num_layers(transformer), adapter.width(transformer)

    def gigabytes(width: int) -> float:
        return ActivationStats.estimate_bytes(layers, width, sample_batches=arguments.batches // 2 + 1,
                                              tokens=arguments.tokens) / 1e9

    if gigabytes(width) <= arguments.max_memory:
        return None
    fitting = [m for m in range(8, width, 8) if gigabytes(m) <= arguments.max_memory]
    if not fitting:
        raise UserError(f"max-memory: expected at least {gigabytes(8):.3g} GB for {layers} blocks of {width} channels, "
                        f"got {arguments.max_memory:g}")
    print(f"memory: all {width} channels would take {gigabytes(width):.3g} GB; {fitting[-1]} random directions take "
          f"{gigabytes(fitting[-1]):.3g} GB (standard error of a cosine {100 * (2 / fitting[-1]) ** 0.5:.1f} %)",
          file=sys.stderr)
    return fitting[-1]


_OF_STATS = ("reference", "selection", "budget", "protect_first", "protect_last", "option", "scores")


def add_plan(commands: Any) -> None:
    parser = command(
        commands, "plan", _plan, "decide which blocks to merge, or show a plan",
        "A plan is made from statistics (STATS), by measuring what leaving out each block does to a pipeline's output\n"
        "(--search), from a published layout (--preset) or by hand (--intervals). An interval [s, e] puts one trained\n"
        "block in the place of the teacher's blocks s to e, both included.",
        "pydit plan stats.safetensors --method ppcl --target 0.4 --out plan.json\n"
        "  pydit plan stats.safetensors --compare --target 0.4\n"
        "  pydit plan stats.safetensors --compare --check ./my-pipeline --prompts prompts.txt --trial 50\n"
        "  pydit plan --search ./my-pipeline --prompts prompts.txt --target 0.4 --out plan.json\n"
        "  pydit plan --preset ppcl-qwen-image-12b --out plan.json\n"
        "  pydit plan --intervals '[[3,4],[5,7]]' --num-layers 60 --out plan.json\n"
        "  pydit plan --show plan.json",
        fields={"first_layer": "protect-first"})
    parser.add_argument("stats", nargs="?", type=Path, metavar="STATS", help="file written by `pydit analyze`")
    parser.add_argument("--search", type=Path, metavar="PIPELINE",
                        help="pipeline whose blocks are left out one by one, always the one that costs least")
    parser.add_argument("--preset", metavar="NAME", help="a layout by its name: " + ", ".join(sorted(PRESETS)))
    parser.add_argument("--intervals", metavar="JSON", help="intervals by hand, such as '[[3,4],[5,7]]'")
    parser.add_argument("--show", type=Path, metavar="PLAN", help="print a plan file, or the plan of a pruned pipeline")
    thin = parser.add_argument_group("what more a plan does to its blocks, named by the first layer they stand for")
    thin.add_argument("--text-linear", metavar="JSON",
                      help="text regions as '[[anchor,last],...]': linear maps from the anchor's text")
    thin.add_argument("--linear-ffn", metavar="JSON",
                      help="blocks with linear FFNs, such as '[2,58]'; or, with --search or --check, a number: so\n"
                           "many of which the output hears least")
    thin.add_argument("--linear-text-ffn", metavar="JSON",
                      help="blocks whose text FFN alone is linear, or a number of them likewise")
    thin.add_argument("--affine", metavar="JSON", help="blocks that become one affine map per stream")
    thin.add_argument("--single-stream", metavar="LAYER",
                      help="from this layer on both streams run through the image branch; with '[first,last]' between "
                           "these (FLUX.1: dual blocks)")
    thin.add_argument("--lean", action="store_true", help="leave out tensors that no output depends on")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                        help="with STATS: another option of the method, such as rule=literal, first_probe=u or\n"
                             "streams=min of ppcl (docs/criteria.md); may be repeated")
    parser.add_argument("--scores", type=Path, metavar="FILE",
                        help="with STATS: also write the method's scores, of ppcl the CKA of every start and end;\n"
                             "such a file (.safetensors) in the place of STATS replays the rule with other options")
    parser.add_argument("--num-layers", type=count, help="blocks of the teacher, with --intervals")
    parser.add_argument("--family", default="qwen-image", metavar="NAME",
                        help="with --intervals: " + ", ".join(sorted(FAMILIES)) + " (default: qwen-image)")
    parser.add_argument("--method", default="ppcl", metavar="NAME",
                        help="with STATS: how redundancy is found: amber, bi, hierarchical, laptop, ppcl, random,\n"
                             "rel_l1 or uniform (default: ppcl; what --compare calls ppcl optimal and ppcl cka is\n"
                             "ppcl with --selection optimal, or --budget cka)")
    parser.add_argument("--compare", action="store_true",
                        help="with STATS: a table of the plans of all methods, and where they agree")
    parser.add_argument("--report", type=Path, metavar="FILE.html",
                        help="with STATS: like --compare, as a page with CKA maps, difference curves and all choices")
    parser.add_argument("--reference", choices=("same-depth", "fixed"),
                        help="with STATS: what a chain of probes is compared with (default: same-depth)")
    parser.add_argument("--selection", choices=("difference", "optimal"),
                        help="with STATS: the paper's rule, or least loss at the target (default: difference)")
    parser.add_argument("--budget", choices=("auto", "cka", "output"),
                        help="with STATS: what intervals of ppcl cost (default: auto, output after --ablate, else cka)")
    parser.add_argument("--protect-first", type=count, metavar="N",
                        help="with STATS: blocks at the start that are kept (default: 1, of ppcl 0)")
    parser.add_argument("--protect-last", type=whole, metavar="N",
                        help="with STATS: blocks at the end that are kept (default: 0)")
    parser.add_argument("--target", type=removal, default=0.4,
                        help="with STATS or --search: share of blocks to remove, or their number; auto, of ppcl: all\n"
                             "that it finds redundant (default: 0.4)")
    parser.add_argument("--out", type=Path, help="plan file to write (.json)")
    add_check(parser)
    add_device(parser)
    add_batches(parser, batches=4, required=False)


def _plan(arguments: argparse.Namespace) -> None:
    from pydit.analysis.criteria.base import FORMAT as SCORES
    from pydit.plan import FORMAT, PruningPlan

    require_check(arguments)
    if arguments.compare or arguments.report:
        return _compare(arguments)
    ways = {"STATS": arguments.stats, "--search": arguments.search, "--preset": arguments.preset,
            "--intervals": arguments.intervals, "--show": arguments.show}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"plan: expected exactly one of {', '.join(ways)}, got {' and '.join(given) or 'none'}")
    require_used(arguments, ("method", *_OF_STATS), arguments.stats is not None, "STATS")
    require_used(arguments, ("target",), bool(arguments.stats or arguments.search), "STATS or --search")
    require_used(arguments, ("num_layers", "family"), arguments.intervals is not None, "--intervals")
    require_used(arguments, ("prompts",), bool(arguments.search or arguments.check), "--search or --check")
    require_batches_used(arguments)
    require_file_outputs(arguments, {"out": FORMAT, "scores": SCORES}, arguments.stats, arguments.show)
    counts = {name: int(text) for name in ("linear_ffn", "linear_text_ffn")
              if (text := getattr(arguments, name)) is not None and text.isdecimal()}
    for name in counts if not (arguments.search or arguments.check) else ():
        parse_list(name, getattr(arguments, name), or_else=", or a number of blocks with --search or --check")
    config = pipe = None
    if arguments.show is not None:
        plan = stored_plan(arguments.show, what="show") if arguments.show.is_dir() else PruningPlan.load(arguments.show)
    elif arguments.preset is not None:
        plan = PruningPlan.preset(arguments.preset)
    elif arguments.intervals is not None:
        if arguments.num_layers is None:
            raise UserError("num-layers: expected with --intervals, got none")
        plan = PruningPlan.from_intervals(arguments.num_layers, parse_list("intervals", arguments.intervals),
                                          family=arguments.family)
    elif arguments.search is not None:
        from pydit.analysis import greedy_search

        if arguments.target is None:
            raise UserError("target: expected a number of layers or a share between 0 and 1 with --search, got auto")
        pipe = load(arguments.search, arguments)
        with warnings_as_lines("plan"):
            plan = greedy_search(pipe.transformer, first_batches(pipe, arguments), target=arguments.target)
        config = pipe.transformer.config
    else:
        with warnings_as_lines("plan"):
            plan, config = _detected(arguments)
    more = {name: parse_list(name, getattr(arguments, name))
            for name in ("text_linear", "linear_ffn", "linear_text_ffn", "affine")
            if getattr(arguments, name) is not None and name not in counts}
    if arguments.single_stream is not None:
        text = arguments.single_stream
        more["single_stream"] = int(text) if text.isdecimal() else parse_list("single_stream", text)
    if more:
        plan = dataclasses.replace(plan, **more)
    if arguments.lean:
        plan = plan.lean()
    if counts:
        pipe = pipe or load(arguments.check, arguments)
        plan = _with_linear_ffns(plan, pipe, counts, arguments)
    checked = measure(arguments, {"plan": plan}) if arguments.check else []
    if arguments.out:
        plan.save(arguments.out)
    if arguments.json:
        print_json(plan.to_dict() | ({"check": checked} if checked else {}))
    else:
        print(plan.describe(config))
        if checked:
            show(arguments, checked)
        if arguments.out:
            print(f"wrote {arguments.out}")


def _with_linear_ffns(plan: Any, pipe: Any, counts: dict[str, int], arguments: argparse.Namespace) -> Any:
    """``plan`` with so many more linear FFNs, by field of the plan, chosen on a pipeline."""
    from pydit.analysis import choose_linear_ffns

    batches = first_batches(pipe, arguments)
    for name, wanted in counts.items():
        try:
            with warnings_as_lines("plan"):
                plan = choose_linear_ffns(pipe.transformer, plan, batches, count=wanted,
                                          streams="both" if name == "linear_ffn" else "text")
        except UserError as error:
            what, _, why = str(error).partition(": ")
            raise UserError(f"{name.replace('_', '-') if what == 'count' else what}: {why}") from None
    return plan


def _detected(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The plan of statistics, or of scores, and the model's configuration where it is known."""
    from pydit.analysis import ActivationStats, Scores, select
    from pydit.analysis.criteria import get_criterion
    from pydit.analysis.detect import decide
    from pydit.plan import FORMAT

    if files.format_of(arguments.stats) == FORMAT:
        raise UserError(f"stats: expected a file written by `pydit analyze`, got the plan {arguments.stats}; "
                        f"`pydit plan --show {arguments.stats}` prints it")
    scores = Scores.load(arguments.stats) if Scores.is_file(arguments.stats) else None
    method = arguments.method if scores is None else scores.method
    if arguments.method not in (method, arguments.defaults("method")):
        raise UserError(f"method: expected {method} as in {arguments.stats}, got {arguments.method}")
    options = {name: getattr(arguments, name) for name in ("reference", "selection", "budget", "protect_last")
               if getattr(arguments, name) is not None}
    if arguments.protect_first is not None:
        options["first_layer" if method == "ppcl" else "protect_first"] = arguments.protect_first
    for text in arguments.option:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UserError(f"option: expected NAME=VALUE, got {text!r}")
        options[name] = _value(value)
    if scores is not None:
        require_used(arguments, ("scores",), False, "statistics in the place of scores")
        return select(scores, target=arguments.target, **options), None
    stats = ActivationStats.load(arguments.stats)
    criterion = get_criterion(method, **options)
    scores = criterion.score(stats)
    if arguments.scores:
        scores.save(arguments.scores)
    return decide(criterion, scores, stats, arguments.target), stats.config


def _value(text: str) -> Any:
    """Of an option: a number, true, false, null or a list of JSON, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _compare(arguments: argparse.Namespace) -> None:
    """`pydit plan STATS --compare`: candidate plans, one line each."""
    from pydit.analysis import ActivationStats, agreement, candidates, removed_layers
    from pydit.reporting import console

    given = [name.replace("_", "-") for name in ("search", "preset", "intervals", "show", "out", "method", *_OF_STATS,
                                                 "text_linear", "linear_ffn", "linear_text_ffn", "affine",
                                                 "single_stream", "lean", "num_layers", "family")
             if is_given(arguments, name)]
    if arguments.stats is None or given:
        raise UserError(f"{'report' if arguments.report else 'compare'}: expected STATS alone, "
                        f"got {'--' + given[0] if given else 'no statistics file'}")
    if arguments.target is None:
        raise UserError("target: expected a share or a number of blocks, at which criteria are compared, got auto")
    require_file_outputs(arguments, {"report": "page"}, arguments.stats)
    stats = ActivationStats.load(arguments.stats)
    if arguments.report:
        from pydit.reporting import analysis_page

        found = analysis_page.write(stats, arguments.report, target=arguments.target)
    else:
        found = candidates(stats, target=arguments.target)
    shares = agreement(found, stats.num_layers)
    checked = measure(arguments, {c.name: c.plan for c in found if c.plan is not None}) if arguments.check else []
    if arguments.json:
        print_json({"candidates": [candidate.as_dict() for candidate in found], "removed_share": shares}
                   | ({"check": checked} if checked else {}))
        return
    rows = []
    for candidate in found:
        if candidate.plan is None:
            continue
        loss = "" if candidate.loss is None else f"{candidate.loss:.4f} ({candidate.low:.4f} to {candidate.high:.4f})"
        size = "" if candidate.parameters is None else f"{candidate.parameters:,}"
        flops = "" if candidate.flops is None else f"{100 * candidate.flops:.0f} %"
        latency = "" if candidate.latency_ms is None else f"{candidate.latency_ms:.3g}"
        rows.append([candidate.name, candidate.plan.num_student_layers, size, flops, latency, loss,
                     " ".join(map(str, sorted(removed_layers(candidate.plan))))])
    console.table(["method", "blocks", "parameters", "FLOPs", "predicted ms", "predicted error of the output (95 %)",
                   "removed blocks"], rows)
    for candidate in found:
        if candidate.note:
            print(f"{candidate.name}: {candidate.note}")
    print("removed by (share of the methods, without uniform and random): "
          + "  ".join(f"{layer}: {100 * share:.0f} %" for layer, share in enumerate(shares) if share))
    print("FLOPs: of the blocks, as a share of the teacher's; predicted ms: the least that they take on an H200 at 989 "
          "TFLOP/s for one image at 1328 x 1328, not measured; predicted error: squared, relative, the sum of what "
          "leaving out one block does")
    if checked:
        show(arguments, checked)
    if arguments.report:
        print(f"wrote {arguments.report}")


def add_prune(commands: Any) -> None:
    parser = command(
        commands, "prune", _prune, "apply a plan to a pipeline",
        "Writes a pipeline directory; stock diffusers loads it when the plan has intervals alone. The new blocks are\n"
        "only initialised: distil next. Without a probe and without maps to fit, blocks are read and written one at a\n"
        "time: a transformer of 41 GB does not need them in memory.",
        "pydit prune ./my-pipeline --plan plan.json --init first --out ./pruned", figures=False)
    add_pipeline(parser, stored=True)
    parser.add_argument("--plan", type=Path, required=True, help="plan file")
    parser.add_argument("--init", default="first",
                        choices=("first", "middle", "last", "average", "position-average", "probe"),
                        help="what a new block starts from (default: first); probe needs --prompts, and so do the\n"
                             "linear maps of a plan if they are to be fitted")
    parser.add_argument("--out", type=Path, help="pipeline directory to write")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, write nothing")
    add_batches(parser, batches=8, required=False)


def _prune(arguments: argparse.Namespace) -> None:
    from pydit.inference.pipeline import save_pipeline
    from pydit.plan import PruningPlan
    from pydit.pruning import prune

    if arguments.out is None and not arguments.dry_run:
        raise UserError("out: expected a directory to write (or --dry-run), got none")
    if not arguments.dry_run:
        require_output(arguments.out, arguments.pipeline)
    plan = PruningPlan.load(arguments.plan)
    require_batches_used(arguments)
    maps = any(spec.has_maps for spec in plan.blocks)
    require_used(arguments, ("prompts",), maps or arguments.init == "probe", "--init probe or a plan with linear maps")
    if arguments.init != "probe" and not arguments.dry_run and (plan.is_stock or not arguments.prompts):
        import torch

        from pydit.inference.streaming import prune_pipeline

        with warnings_as_lines("prune"):
            prune_pipeline(arguments.pipeline, plan, arguments.out, init=arguments.init,
                           dtype=getattr(torch, arguments.dtype) if arguments.dtype else None, progress=progress)
        _pruned(arguments.out, plan)
        return
    pipe = load(arguments.pipeline, arguments)
    batches = None
    if arguments.init == "probe" or (not plan.is_stock and arguments.prompts and not arguments.dry_run):
        batches = first_batches(pipe, arguments)
    with warnings_as_lines("prune"):
        result = prune(pipe.transformer, plan, init=arguments.init, batches=batches, dry_run=arguments.dry_run)
    if arguments.dry_run:
        print(result)
        return
    pipe.register_modules(transformer=result)
    save_pipeline(pipe, arguments.out)
    _pruned(arguments.out, plan)


def _pruned(out: Path, plan: Any) -> None:
    print(f"wrote {out}: {plan.num_layers} blocks became {plan.num_student_layers}")
