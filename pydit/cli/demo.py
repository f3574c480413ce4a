"""Commands that draw and judge images: demo, generate, eval."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from pydit.cli.options import (
    add_pipeline,
    at_least_one,
    command,
    count,
    demo_pipeline,
    image_count,
    image_side,
    load,
    positive,
    print_json,
    progress,
    quiet,
    require_file_outputs,
    sampling_defaults,
    seed,
    story_to,
    warnings_as_lines,
)
from pydit.errors import UserError


def add_demo(commands: Any) -> None:
    parser = command(
        commands, "demo", _demo, "compress a small text-to-image pipeline end to end and write a report",
        "Takes the committed teacher, finds redundant blocks, removes at least 40 % of them, distils, and lets an\n"
        "exact verifier compare teacher, pruned and distilled model on prompts that training never saw. Writes\n"
        "report.html, PNG files, metrics.json and the distilled pipeline. An interrupted run continues where it\n"
        "stopped.",
        "pydit demo --out demo_out --budget-minutes 12")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="output directory (default: demo_out)")
    parser.add_argument("--budget-minutes", type=positive, default=12.0,
                        help="time for everything, split by measuring this machine (default: 12)")
    parser.add_argument("--prompts", type=image_count,
                        help="evaluation prompts (default: as many as the budget allows)")
    parser.add_argument("--seed", type=seed, default=0, help="of calibration, training and evaluation (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a minute or two: shows the path, not the quality")
    parser.add_argument("--fresh", action="store_true", help="ignore what an earlier run left in OUT/work")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="another demo pipeline than the committed one")


def _demo(arguments: argparse.Namespace) -> None:
    from pydit.demo.run import run

    quiet()
    with story_to(arguments.json), warnings_as_lines("demo"):
        metrics = run(arguments.out, budget_minutes=arguments.budget_minutes, prompts=arguments.prompts,
                      seed=arguments.seed, quick=arguments.quick, fresh=arguments.fresh, teacher=arguments.teacher)
    if arguments.json:
        print_json(metrics)


def add_generate(commands: Any) -> None:
    parser = command(commands, "generate", _generate, "draw images",
                      "One PNG file per prompt, named after its number, text and seed.",
                      "pydit generate ./demo_out/distilled 'three red circles' 'a ring above a square' --out images\n"
                      "  pydit generate ./my-pipeline --prompts-file prompts.txt --dataset --resume --out data",
                      figures=False)
    add_pipeline(parser)
    parser.add_argument("prompts", nargs="*", default=[], metavar="PROMPT")  # without a default: "required"
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument("--dataset", action="store_true",
                        help="write each prompt beside its image: training data for `pydit distill --data`")
    parser.add_argument("--resume", action="store_true",
                        help="leave out images that are there already, drawn with the same steps, guidance and size")
    parser.add_argument("--out", type=Path, required=True, help="directory for the PNG files")
    parser.add_argument("--seed", type=seed, default=0,
                        help="of the first prompt; each next one takes the next (default: 0)")
    parser.add_argument("--steps", type=count, help="denoising steps (default: the demo's own for it, else 40)")
    parser.add_argument("--guidance", type=at_least_one,
                        help="classifier-free guidance; 1 is off (default: the demo's own for it, else 1)")
    parser.add_argument("--height", type=image_side, help="pixels (default: the pipeline's)")
    parser.add_argument("--width", type=image_side, help="pixels (default: the pipeline's)")


def _generate(arguments: argparse.Namespace) -> None:
    from pydit.files import require_room
    from pydit.inference.sampling import (
        add_captions,
        generate,
        image_name,
        read_prompts,
        require_same,
        require_size,
        save_images,
    )

    if bool(arguments.prompts) == (arguments.prompts_file is not None):
        got = "both" if arguments.prompts else "neither"
        raise UserError(f"prompts: expected prompts or --prompts-file, got {got}")
    prompts = arguments.prompts or read_prompts(arguments.prompts_file)
    pipe = load(arguments.pipeline, arguments)
    require_size(pipe, height=arguments.height, width=arguments.width)
    size, steps, guidance = sampling_defaults(pipe)
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"out: expected a directory or a new path, got the file {arguments.out}")
    require_room(arguments.out)
    made_of = {"steps": arguments.steps or steps,
               "guidance": guidance if arguments.guidance is None else arguments.guidance,
               "height": arguments.height or size, "width": arguments.width or size}
    numbers = list(range(len(prompts)))
    if arguments.resume:
        seeds = [arguments.seed + number for number in numbers]
        require_same(arguments.out, prompts, seeds, made_of)
        if arguments.dataset:
            add_captions(prompts, seeds, arguments.out)
        numbers = [number for number in numbers
                   if not (arguments.out / image_name(number, prompts[number], seeds[number])).exists()]
    prompts, seeds = [prompts[number] for number in numbers], [arguments.seed + number for number in numbers]
    images = generate(pipe, prompts, seeds=seeds, **made_of)
    with contextlib.closing(progress(images, len(prompts), "image")) as shown:  # ends before an error
        for path in save_images(shown, prompts, seeds, arguments.out, numbers=numbers, captions=arguments.dataset,
                                made_of=made_of):
            print(path)


def add_eval(commands: Any) -> None:
    parser = command(
        commands, "eval", _eval, "measure how often a demo pipeline draws what it is asked for",
        "Held-out prompts of the demo world, judged by its exact verifier; the overall figure is the mean over\n"
        "categories. Verdicts are appended to OUT.log.jsonl as they are found, and --resume continues from there.",
        "pydit eval ./demo_out/distilled --prompts 2500 --out distilled.json --compare teacher.json")
    add_pipeline(parser, optional=True)
    parser.add_argument("--prompts", type=image_count, default=2500, help="images to judge (default: 2500)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses prompts and noise (default: 0)")
    parser.add_argument("--steps", type=count, help="denoising steps (default: the demo's)")
    parser.add_argument("--guidance", type=at_least_one, help="1 is off (default: the demo's)")
    parser.add_argument("--batch", type=count, default=50, help="images drawn at once (default: 50)")
    parser.add_argument("--split", choices=("held_out", "train"), default="held_out", help="default: held_out")
    parser.add_argument("--out", type=Path, help="result file to write (.json)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted evaluation of the same OUT")
    parser.add_argument("--compare", type=Path, metavar="RESULT",
                        help="result file of the teacher on the same prompts: prints the relative loss")


def _eval(arguments: argparse.Namespace) -> None:
    from pydit import doctor
    from pydit.demo import data as demo
    from pydit.demo import teacher, world
    from pydit.demo.evaluate import FORMAT, Result, evaluate, print_results, relative_loss, require_comparable
    from pydit.files import read_json, write_json
    from pydit.inference.pipeline import content_hash

    if arguments.resume and arguments.out is None:
        raise UserError("resume: expected --out, whose log is continued, got none")
    require_file_outputs(arguments, {"out": FORMAT}, arguments.compare)
    other = None if arguments.compare is None else Result.from_json(
        read_json(arguments.compare, what="compare", strict=True), what="compare")
    path = arguments.pipeline or teacher.ASSETS
    pipe = demo_pipeline(load(path, arguments))
    prompts = world.sample_prompts(arguments.prompts, split=arguments.split, seed=arguments.seed)
    seeds = list(range(arguments.seed, arguments.seed + len(prompts)))
    settings = {"images": len(prompts), "steps": arguments.steps or demo.STEPS,
                "guidance": arguments.guidance or demo.GUIDANCE}
    if other is not None:  # before hours of drawing
        require_comparable(other, Result([p.text for p in prompts], [p.category for p in prompts], seeds, []))
        differing = [f"{name} {other.settings[name]}, not {value}" for name, value in settings.items()
                     if other.settings.get(name, value) != value]
        if differing:
            print(f"pydit eval: warning: {arguments.compare} was drawn with {' and '.join(differing)}", file=sys.stderr)
    log = None if arguments.out is None else arguments.out.with_name(arguments.out.name + ".log.jsonl")
    started = time.monotonic()
    result = evaluate(pipe, prompts, seeds, steps=settings["steps"], guidance=settings["guidance"],
                      batch_size=arguments.batch, log=log, resume=arguments.resume, identity=content_hash(path))
    data = {**result.to_json(), "pipeline": str(arguments.pipeline or "the committed teacher"), "seed": arguments.seed,
            "split": arguments.split, "seconds": round(time.monotonic() - started, 1), "machine": doctor.machine(),
            "versions": doctor.versions()}
    if other is not None:
        loss = relative_loss(other, result)
        data |= {"relative_loss": loss.value, "relative_loss_interval": [loss.low, loss.high]}
    if arguments.out:
        write_json(arguments.out, data)
        log.unlink(missing_ok=True)
    if arguments.json:
        print_json({name: value for name, value in data.items() if name != "samples"})
        return
    print_results({"teacher": other, "this pipeline": result} if other else {"this pipeline": result})
    if other is not None:
        print(f"relative loss to {arguments.compare}: {loss}")
    if arguments.out:
        print(f"wrote {arguments.out}")
