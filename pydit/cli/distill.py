"""The command that trains: distill, on one process or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from pydit import files
from pydit.cli.options import (
    add_batches,
    add_device,
    batch_stream,
    command,
    count,
    image_side,
    is_given,
    load,
    not_negative,
    of_demo,
    parse_list,
    positive,
    print_json,
    require_output,
    require_used,
    sampling_defaults,
    stored_plan,
    stream_identity,
    warnings_as_lines,
    whole,
)
from pydit.errors import UserError, one_line


def add_distill(commands: Any) -> None:
    parser = command(
        commands, "distill", _distill, "train the new blocks of a pruned pipeline to imitate its teacher",
        "First each new block alone, fed by the teacher, then, with --output-steps, the whole student against the\n"
        "teacher's prediction. With --resume a run that was stopped continues from OUT.checkpoint; Ctrl-C saves one.\n"
        "Under torchrun the same command trains on several processes: they share every batch, so that the steps are\n"
        "those of one process (with a prompt file each draws prompts of its own); --shard divides the memory too.",
        "pydit distill ./my-pipeline ./pruned --prompts prompts.txt --out ./distilled --steps 6000\n"
        "  torchrun --nproc-per-node 8 -m pydit distill ./my-pipeline ./pruned --data ./images --out ./distilled \\\n"
        "      --device cuda --dtype bfloat16 --shard student --output-steps 2000 --train all --flow-weight 1\n"
        "  pydit distill qwen-image ppcl-qwen-image-10b --steps 6000 --batch-size 2 --dtype bfloat16 --estimate",
        fields={"layers_steps": "steps", "layers_lr": "lr", "output_trainable": "train", "schedule": "then"})
    parser.add_argument("teacher", type=Path, metavar="TEACHER",
                        help="the pipeline that was pruned; with --estimate also a family of published size")
    parser.add_argument("student", type=Path, metavar="STUDENT",
                        help="directory written by `pydit prune`; with --estimate also a plan file or a preset")
    parser.add_argument("--out", type=Path, help="pipeline directory to write")
    parser.add_argument("--estimate", action="store_true",
                        help="print the memory, disk and time that the run will take, from configuration files alone")
    parser.add_argument("--steps", type=whole, default=1000,
                        help="steps of the first phase (default: 1000; 0 leaves it out)")
    parser.add_argument("--output-steps", type=whole, default=0, help="steps of the second phase (default: 0)")
    parser.add_argument("--then", action="append", default=[], metavar="PLAN:STEPS[:OUTPUT_STEPS]",
                        help="afterwards turn the student into that of this plan file and train again; may be "
                             "repeated, for depth and width in turn, or single-stream blocks a few at a time")
    apart = parser.add_argument_group("training new blocks apart, one after the other or on different machines")
    apart.add_argument("--intervals", metavar="JSON",
                       help="in the first phase train only the new blocks of these layers, such as '[[3,4],[8,10]]'\n"
                            "(first and last layer of each, as `pydit plan --show STUDENT` lists them)")
    apart.add_argument("--merge", type=Path, action="append", default=[], metavar="DISTILLED",
                       help="train nothing: put the new blocks that were trained in this output of --intervals into\n"
                            "STUDENT and write it; may be repeated")
    parser.add_argument("--lr", type=positive, help="learning rate of the first phase (default: 1e-5)")
    parser.add_argument("--output-lr", type=positive, help="learning rate of the second phase (default: 1e-5)")
    parser.add_argument("--loss", choices=("direction", "normalized_mse", "mse", "masked_mse"), help="per stream and "
                        "block of the first phase (default: direction)")
    parser.add_argument("--magnitude", type=not_negative, help="weight of the difference of log norms (default: 0)")
    parser.add_argument("--linear-weight", type=not_negative,
                        help="weight of the squared error of what linear maps stand for (default: 0)")
    parser.add_argument("--ema", type=not_negative,
                        help="relative width of the weight average; 0 is off (default: 0.05)")
    parser.add_argument("--train", choices=("replaced", "all"), dest="output_trainable",
                        help="second phase: the new blocks, or every parameter of the student (default: replaced)")
    parser.add_argument("--velocity-weight", type=not_negative,
                        help="second phase: weight of the error against the teacher's prediction (default: 1)")
    parser.add_argument("--boundary-weight", type=not_negative,
                        help="second phase: weight of --loss at the end of every new block (default: 0)")
    parser.add_argument("--muon-lr", type=positive, help="second phase: step hidden matrices by Muon at this rate")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--gradient-checkpointing", action="store_true", default=None,
                        help="recompute activations in the backward pass")
    memory.add_argument("--optimizer", choices=("adamw", "adamw8bit"),
                        help="adamw8bit needs bitsandbytes or torchao (default: adamw)")
    memory.add_argument("--teacher-memory", choices=("resident", "streamed"),
                        help="streamed: the teacher stays in host memory, its blocks visit the device one by one\n"
                             "(default: resident)")
    memory.add_argument("--cache-batches", type=whole, default=0,
                        help="keep what the teacher made of so many batches and go through them again, which spares\n"
                             "its forward pass (default: 0, new batches all the time)")
    memory.add_argument("--output-cache-batches", type=whole, help="the same for the second phase (default: as many)")
    memory.add_argument("--cache-dir", type=Path,
                        help="keep them on disk in the first phase; a later run over the same batches reads them")
    memory.add_argument("--shard", choices=("none", "student", "all"),
                        help="under torchrun: spread the student, or the teacher too, over the processes by FSDP2\n"
                             "(default: none)")
    memory.add_argument("--processes", type=count, default=1,
                        help="with --estimate: how many there will be (default: 1)")
    parser.add_argument("--max-minutes", type=positive, help="end, annealed, after this time")
    parser.add_argument("--save-every", type=count, default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in OUT.checkpoint")
    add_device(parser)
    add_batches(parser, batches=None, required=False)
    parser.add_argument("--on-policy", action="store_true",
                        help="with --prompts: learn from the states that the student itself meets as it draws them,\n"
                             "not from the teacher's (of a file) or from noised images (demo)")
    images = parser.add_argument_group("training on captioned images instead of --prompts")
    images.add_argument("--data", type=Path, metavar="DIR|TAR",
                        help="a folder of images with .txt or .json captions, or of WebDataset shards; latents and "
                             "embeddings are computed once, into --cache")
    images.add_argument("--cache", type=Path, help="directory of the computed data (default: OUT.data)")
    images.add_argument("--resolution", type=image_side, help="side of a square image (default: the pipeline's own)")
    images.add_argument("--timesteps", choices=("uniform", "logit-normal"), default="uniform",
                        help="distribution of the noise level (default: uniform)")
    images.add_argument("--shift", type=positive, default=1.0,
                        help="of the noise level, towards noise above 1 (default: 1)")
    images.add_argument("--prompt-dropout", type=not_negative, default=0.0,
                        help="share of samples with the empty prompt, for guidance (default: 0)")
    images.add_argument("--guidance", type=positive, metavar="SCALE",
                        help="the scale the student will be sampled with: every sample comes with its prompt and with\n"
                             "the empty one, and the second phase learns the guided prediction too; also with\n"
                             "--prompts demo (default: off)")
    images.add_argument("--flow-weight", type=not_negative,
                        help="second phase, also with --prompts demo: weight of the error against the images\n"
                             "(default: 0)")


# Options that only some runs read; given to another, they would be ignored.
_OF_IMAGES = ("cache", "resolution", "timesteps", "shift", "prompt_dropout")
_OF_OUTPUT = ("output_lr", "output_trainable", "velocity_weight", "boundary_weight", "flow_weight", "muon_lr",
              "output_cache_batches")


def _distill(arguments: argparse.Namespace) -> None:
    from pydit.distill import DistillConfig, distributed

    given = {"layers_lr": arguments.lr, "output_lr": arguments.output_lr}
    given |= {name: getattr(arguments, name) for name in (
        "max_minutes", "loss", "magnitude", "linear_weight", "flow_weight", "ema", "gradient_checkpointing",
        "output_trainable", "velocity_weight", "boundary_weight", "guidance", "muon_lr", "optimizer", "teacher_memory",
        "shard", "cache_batches", "output_cache_batches", "cache_dir")}
    if arguments.intervals is not None:
        given["intervals"] = tuple(tuple(pair) if isinstance(pair, list) else pair
                                   for pair in parse_list("intervals", arguments.intervals))
    if arguments.then:
        given["schedule"] = tuple(map(_stage, arguments.then))
    settings = {"layers_steps": arguments.steps, "output_steps": arguments.output_steps,
                **{name: value for name, value in given.items() if value is not None}}
    output = arguments.output_steps or any(stage.output_steps for stage in settings.get("schedule", ()))
    require_used(arguments, _OF_OUTPUT, bool(output), "--output-steps")
    if arguments.estimate and arguments.merge:
        raise UserError("merge: expected no --estimate, which is of a training, to go with it, got both")
    if arguments.estimate:
        _estimate(arguments, DistillConfig(**settings))
        return
    require_used(arguments, ("processes",), False, "--estimate")
    if arguments.merge:
        _merge(arguments)
        return
    arguments.device = distributed.start(arguments.device)
    with _alone(distributed):
        _train(arguments, settings)
    distributed.stop()


def _stage(text: str) -> Any:
    from pydit.distill import Stage
    from pydit.plan import PruningPlan

    found = re.fullmatch(r"(.+?):([0-9]+)(?::([0-9]+))?", text)  # the first part may hold colons itself
    if found is None:
        raise UserError(f"then: expected PLAN:STEPS or PLAN:STEPS:OUTPUT_STEPS, got {text!r}")
    path, *steps = found.groups()
    return Stage(PruningPlan.load(path), *(int(number) for number in steps if number is not None))


@contextlib.contextmanager
def _alone(distributed: Any):
    """Let the main process alone print; another one's failure is one line that says whose it is."""
    if distributed.is_main():
        yield
        return
    complain = sys.stderr
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except (OSError, ValueError, TypeError) as error:
            print(f"pydit: process {distributed.rank()}: error: {one_line(error)}", file=complain)
            raise SystemExit(2) from None


def _train(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    from pydit.distill import DistillConfig, checkpoint, distill, distributed, full_weights
    from pydit.inference.pipeline import save_pipeline

    if arguments.out is None:
        raise UserError("out: expected a directory to write (or --estimate), got none")
    prompts = _require_batches(arguments)
    require_output(arguments.out, arguments.teacher, arguments.student)
    kept = arguments.out.with_name(arguments.out.name + ".checkpoint")
    for name, folder in (("cache-dir", arguments.cache_dir), ("cache", arguments.cache)):
        for other, use in ((arguments.teacher, "read"), (arguments.student, "read"), (arguments.out, "written"),
                           (kept, "removed at the end")):
            if folder is not None:
                files.require_outside(folder, other, what=name, use=use)
    if arguments.resume and not checkpoint.exists(kept):
        raise UserError(f"resume: expected the checkpoint of an earlier run in {kept}, got none")
    later = max((int(path.name.removeprefix("stage-")) for path in kept.glob("stage-*[0-9]")
                 if checkpoint.exists(path)), default=0)
    if later > len(arguments.then):  # the run would end before them, and remove them
        raise UserError(f"then: expected {later} or more, as in the run that wrote {kept}, got {len(arguments.then)}")
    if checkpoint.exists(kept) and not arguments.resume:
        raise UserError(f"out: expected no checkpoint of an earlier run, got one in {kept}; pass --resume to "
                        "continue it, or delete it")
    config = DistillConfig(checkpoint_dir=kept, save_every=arguments.save_every, resume=arguments.resume,
                           split_batches=arguments.data is not None or arguments.prompts == "demo", **settings)
    config.validate()
    teacher = load(arguments.teacher, arguments, transformer=config.teacher_memory == "resident",
                   shard=config.shard == "all")
    student = _student(arguments.student, arguments, shard=config.shard != "none")
    if arguments.data is None:
        batches = batch_stream(teacher, arguments, pairs=arguments.guidance is not None,
                               drawn_by=student.transformer if arguments.on_policy else None)
        data = prompts
    else:
        batches, data = _image_batches(teacher, arguments)
    config = dataclasses.replace(config, data=data)
    with warnings_as_lines("distill"):
        try:
            result = distill(teacher.transformer, student.transformer, batches, config)
        except checkpoint.OtherRunError as error:
            raise UserError(_other_run(error, arguments, kept)) from None
    if not result.history:
        raise UserError(f"max_minutes: expected time for at least one step, got {config.max_minutes}")
    if config.shard != "none" and distributed.world_size() > 1:
        weights = full_weights(student.transformer)
        if distributed.is_main():  # the sharded one cannot be saved as a pipeline
            arguments.device = "cpu"
            student = load(arguments.student, arguments)
            student.transformer.load_state_dict(weights, strict=False)
    if distributed.is_main():
        save_pipeline(student, arguments.out)
        files.remove_directory(kept)
    distributed.barrier()
    if arguments.json:
        print_json({"out": str(arguments.out), "history": result.history})
    else:
        last = result.history[-1]
        print(f"wrote {arguments.out}: loss {last['loss']:.4g} after step {last['step']} of phase {last['phase']}")


def _other_run(error: Any, arguments: argparse.Namespace, kept: Path) -> str:
    """That a run was to go on with another option than it began with: which, and its value then and now."""
    if error.entry == "teacher":
        return (f"teacher: expected the weights and the --dtype of the run that wrote {kept}, got others in "
                f"{arguments.teacher} or {arguments.dtype}")
    if error.entry.startswith(("plan", "init")):
        what = "then" if arguments.then else "student"
        return f"{what}: expected the plan of the run that wrote {kept}, got one with another {error.entry}"
    name = error.entry.rpartition(".")[2]
    if error.entry.startswith("config.data.") and name != "size" and None in (error.theirs, error.ours):
        given = "prompts" if arguments.data is None else "data"  # batches of another kind, which have other options
        return f"{given}: expected those of the run that wrote {kept}, got {getattr(arguments, given)}"
    named = {"seed": "data_seed", "pairs": "guidance", **arguments.fields}
    return (f"{named.get(name, name).replace('_', '-')}: expected {error.theirs!r} as in the run that wrote {kept}, "
            f"got {error.ours!r}")


def _merge(arguments: argparse.Namespace) -> None:
    """`pydit distill TEACHER STUDENT --merge A --merge B`: one student of blocks that were trained apart."""
    from pydit.distill import merge
    from pydit.distill.pair import trained_apart
    from pydit.inference.pipeline import save_pipeline

    if arguments.out is None:
        raise UserError("out: expected a directory to write, got none")
    read = {"teacher", "student", "merge", "out", "device", "dtype", "json"}
    of_parser = {"command", "rest", "run", "defaults", "fields"}
    for name in sorted(vars(arguments).keys() - read - of_parser):
        if is_given(arguments, name):
            option = arguments.fields.get(name, name).replace("_", "-")
            raise UserError(f"merge: expected nothing to train, got --{option}")
    for source in (arguments.teacher, arguments.student, *arguments.merge):
        require_output(arguments.out, source)
    student, owner = _student(arguments.student, arguments), {}
    untrained = {name: p.clone() for name, p in student.transformer.state_dict().items()}
    for path in arguments.merge:
        part = _student(path, arguments).transformer
        pairs = trained_apart(student.transformer, untrained, part)
        if not pairs:
            raise UserError(f"merge: expected new blocks other than those of {arguments.student}, got none in {path}")
        for pair in pairs:
            if pair in owner:
                raise UserError(f"merge: expected every block trained once, got {list(pair)} in {owner[pair]} and "
                                f"in {path}")
            owner[pair] = path
        merge(student.transformer, dict.fromkeys(pairs, part))
    save_pipeline(student, arguments.out)
    left = [list(entry[1:]) for entry in student.transformer.replaced if entry[1:] not in owner]
    if arguments.json:
        print_json({"out": str(arguments.out), "merged": {f"{start}-{end}": str(path) for (start, end), path
                                                          in sorted(owner.items())}, "untrained": left})
        return
    for (start, end), path in sorted(owner.items()):
        print(f"layers {start}-{end}: from {path}")
    print(f"wrote {arguments.out}" + (f"; untrained: {', '.join(f'{start}-{end}' for start, end in left)}"
                                      if left else ""))


def _require_batches(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What decides the batches of --prompts, None with --data.

    Raises UserError, before anything is loaded, where the options on batches do not fit together.
    """
    from pydit.data.batches import require_options

    if arguments.data is not None and arguments.prompts is not None:
        raise UserError("data: expected --data or --prompts, got both")
    if arguments.guidance is not None and arguments.data is None and arguments.prompts != "demo":
        raise UserError("guidance: expected --data or --prompts demo to go with it, got "
                        f"{arguments.guidance:g} without")
    if arguments.data is not None:
        require_options(**_image_options(arguments))
        require_used(arguments, ("sampling_steps", "size"), False, "--prompts with a file")
        require_used(arguments, ("on_policy",), False, "--prompts")
        return None
    found = stream_identity(arguments)
    require_used(arguments, _OF_IMAGES, False, "--data")
    if arguments.on_policy:
        for name in ("cache_batches", "output_cache_batches", "flow_weight", "shard"):
            if getattr(arguments, name) not in (None, 0, "none"):
                raise UserError(f"{name}: expected none with --on-policy, whose states are new in every step, without "
                                f"images, and drawn by the whole student, got {getattr(arguments, name)}")
    found["on-policy"] = arguments.on_policy
    if arguments.flow_weight and arguments.prompts != "demo":
        raise UserError("flow-weight: expected --data or --prompts demo to go with it, because prompts alone come "
                        f"without images to learn from, got {arguments.prompts}")
    return found


def _student(path: Path, arguments: argparse.Namespace, *, shard: bool = False) -> Any:
    """A pruned pipeline."""
    student = load(path, arguments, shard=shard)
    if not hasattr(student.transformer, "plan"):
        raise UserError(f"student: expected a pipeline written by `pydit prune`, got a stock one ({path})")
    return student


def _image_batches(pipe, arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Batches from --data, whose latents and embeddings are computed first, and what they are."""
    import torch

    from pydit.data import CachedDataset, build_cache
    from pydit.distill import distributed

    folder = arguments.cache or arguments.out.with_name(arguments.out.name + ".data")
    resolution = arguments.resolution or sampling_defaults(pipe)[0] or 1328
    try:
        index = distributed.together(
            lambda: build_cache(pipe, arguments.data, folder, resolution=resolution, progress=not arguments.json),
            main_only=True)
    except UserError as error:  # what the API calls out is another option here
        raise type(error)(re.sub("^out: ", "cache: ", str(error))) from None
    if index is not None and index["skipped"]:
        first = index["skipped"][0]
        print(f"pydit distill: warning: {len(index['skipped'])} of {index['read']} samples are left out (the first: "
              f"{first['key']}: {first['reason']}); all are listed in {folder / 'index.json'}", file=sys.stderr)
    options = _image_options(arguments)
    dataset = CachedDataset(folder, **options)
    dataset.dtype = getattr(torch, arguments.dtype)  # a cache may be of a run in another one
    digest = hashlib.sha256(json.dumps(dataset.samples, sort_keys=True).encode()).hexdigest()[:12]
    return dataset, {"data": f"{len(dataset.samples)} images with the checksum {digest}", **options}


def _image_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the batches of --data."""
    return {"batch_size": arguments.batch_size, "seed": arguments.data_seed, "timesteps": arguments.timesteps,
            "shift": arguments.shift, "prompt_dropout": arguments.prompt_dropout,
            "pairs": arguments.guidance is not None}


def _estimate(arguments: argparse.Namespace, settings: Any) -> None:
    """`pydit distill --estimate`: no weights are read."""
    from pydit.distill.cost import estimate
    from pydit.families import FAMILIES
    from pydit.files import read_json
    from pydit.plan import PruningPlan
    from pydit.presets import PRESETS

    config = None if str(arguments.teacher) in FAMILIES else \
        read_json(arguments.teacher / "transformer" / "config.json", what="teacher")
    if arguments.student.is_dir():
        plan = stored_plan(arguments.student)
    elif arguments.student.suffix == ".json" or arguments.student.is_file():
        plan = PruningPlan.load(arguments.student)
    elif str(arguments.student) in PRESETS:
        plan = PruningPlan.preset(str(arguments.student))
    else:
        raise UserError(f"student: expected the directory of a pruned pipeline, a plan file or a preset "
                        f"({', '.join(PRESETS)}), got {str(arguments.student)!r}, which is none of them")
    family = str(arguments.teacher) if config is None else next(
        (family.name for family in FAMILIES.values() if family.class_name == config.get("_class_name")), None)
    if family != plan.family:
        raise UserError(f"student: expected a plan for {family or config.get('_class_name')} like {arguments.teacher}, "
                        f"got one for {plan.family}")
    usual, text = _usual(config)
    side = arguments.resolution or arguments.size
    tokens = (side or usual) // _pixels(arguments.teacher)
    size = {"bfloat16": 2, "float16": 2}.get(arguments.dtype, 4)
    rows = arguments.batch_size * (1 if settings.guidance is None else 2)
    found = estimate(plan, config, settings, batch_size=rows, element_bytes=size, processes=arguments.processes,
                     image_tokens=tokens ** 2, text_tokens=text)
    if arguments.json:
        print_json({"memory_bytes": found.memory, "host_bytes": found.host, "disk_bytes": found.disk,
                    "flops_per_step": found.flops,
                    "seconds": found.seconds})
    else:
        print(plan.describe(config).splitlines()[0])
        print(f"batches of {rows}, each of {tokens ** 2} image and {text} text tokens"
              + ("" if side else "; --resolution gives another size"))
        print(found.describe())


def _usual(config: dict[str, Any] | None) -> tuple[int, int]:
    """Side of an image in pixels, and text tokens: of the demo world for a pipeline that was made for it."""
    if config is not None and of_demo()[0].items() <= config.items():
        return of_demo()[1:]
    return 1328, 512


def _pixels(teacher: Path) -> int:
    """Side of an image token in pixels, from the VAE's configuration; 16 of the published models."""
    from pydit.files import read_json

    file = teacher / "vae" / "config.json"
    steps = read_json(file, what="teacher").get("temperal_downsample") if file.is_file() else None
    return 2 * 2 ** len(steps) if isinstance(steps, list) else 16
