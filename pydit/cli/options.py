"""Options, checks and output that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pydit import files
from pydit.errors import UserError, one_line

MAX_SIDE = 1 << 16  # pixels of one side of an image; the models are made for 1328
MAX_IMAGES = 1_000_000


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as wide as the terminal; lines that begin with spaces, as examples do, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        # Not at hyphens, in either: names of presets and options have some.
        return "\n\n".join(paragraph if "\n " in paragraph else "\n".join(self._split_lines(paragraph, width))
                            for paragraph in paragraphs)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other bad input: in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, story: str,
             example: str, *, figures: bool = True, fields: dict[str, str] | None = None) -> argparse.ArgumentParser:
    """Add one command; ``figures`` gives it --json, ``fields`` are arguments of the API and the options they come from.
    """
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{story}",
                                 epilog=f"example:\n  {example}")
    parser.set_defaults(run=run, defaults=parser.get_default, fields=fields or {})
    if figures:
        parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    return parser


def in_options(text: str, arguments: argparse.Namespace, *, entries: bool = False) -> str:
    """An error of the API in the words of the command line: ``layers_steps: ...`` is ``steps: ...`` of --steps.

    entries : what follows the first name is about entries of a file, which are called as they are.
    """
    names = {name: name.replace("_", "-") for name in vars(arguments) if "_" in name} | getattr(arguments, "fields", {})
    first, sign, rest = text.partition(": ")
    for name, option in names.items():
        if "_" in name and not entries:
            # As a word of its own; neither in a path or a quotation nor where it is an English word.
            rest = re.sub(rf"(?<![\w./'\"-]){name}(?![\w./'\"-])", f"--{option}", rest)
    return names.get(first, first) + sign + rest


def add_pipeline(parser: argparse.ArgumentParser, *, optional: bool = False, stored: bool = False) -> None:
    """The positional PIPELINE, with device and dtype as in :func:`add_device`."""
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", nargs="?" if optional else None,
                        help="pipeline directory" + (" (default: the committed demo teacher)" if optional else ""))
    add_device(parser, stored=stored)


def add_device(parser: argparse.ArgumentParser, *, stored: bool = False) -> None:
    """Where and in what dtype models run; ``stored``: without --dtype weights that are only copied stay as they are."""
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default=None if stored else "float32", choices=("float32", "bfloat16", "float16"),
                        help="of the weights (default: " + ("as they are stored, float32 where batches run)" if stored
                                                            else "float32)"))


def add_batches(parser: argparse.ArgumentParser, *, batches: int | None, required: bool = True) -> None:
    """Where calibration batches come from, or with ``batches=None`` those to train on, which --data may give too."""
    parser.add_argument("--prompts", required=required, metavar="FILE|demo",
                        help="a text file with one prompt per line, or demo for the demo world's training prompts")
    if batches is not None:
        parser.add_argument("--batches", type=count, default=batches, help=f"calibration batches (default: {batches})")
    parser.add_argument("--batch-size", type=count, default=16,
                        help=f"images per batch, with --prompts demo{'' if batches else ' or --data'} (default: 16)")
    parser.add_argument("--sampling-steps", type=count, default=20,
                        help="denoising steps per prompt, with a file; each is one batch (default: 20)")
    parser.add_argument("--size", type=image_side, help="image height and width, with a file (default: the pipeline's)")
    parser.add_argument("--data-seed", type=seed, default=0, help="of noise and order (default: 0)")


def batch_stream(pipe, arguments: argparse.Namespace, *, pairs: bool = False,
                 drawn_by: Any = None) -> Callable[[int], Any]:
    """Calibration or training batches as a function start -> endless iterator from batch ``start``.

    pairs : every row with its prompt and with the empty one; of the demo's batches alone. drawn_by : a transformer
    whose sampling the states are of; None: that of ``pipe``, with prompts demo that of nobody.
    """
    _require_stream(arguments)
    if arguments.prompts == "demo":
        from pydit.demo.data import make_batches

        demo_pipeline(pipe)
        return lambda start: make_batches(pipe, batch_size=arguments.batch_size, seed=arguments.data_seed,
                                          start_step=start, pairs=pairs, drawn_by=drawn_by)
    from pydit.distill import distributed
    from pydit.inference.sampling import endless_batches, read_prompts, require_size, with_transformer

    prompts = read_prompts(arguments.prompts)
    require_size(pipe, size=arguments.size)
    rank, size = distributed.rank(), distributed.world_size()  # each process draws prompts of its own
    prompts = prompts[rank % len(prompts)::size]
    seed = arguments.data_seed + rank * 1_000_003
    if drawn_by is not None:
        pipe = with_transformer(pipe, drawn_by)
    return lambda start: endless_batches(pipe, prompts, start=start, steps=arguments.sampling_steps, seed=seed,
                                         size=arguments.size)


def first_batches(pipe, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """So many of them as --batches says, without targets."""
    stream = batch_stream(pipe, arguments)(0)
    return [inputs(next(stream)) for _ in range(arguments.batches)]


def stored_plan(directory: Path, *, what: str = "student") -> Any:
    """The plan of a pruned pipeline, of which nothing else is read; ``what`` names the argument in errors."""
    from pydit.inference.pipeline import PLAN_FILE
    from pydit.plan import PruningPlan

    if not (directory / PLAN_FILE).is_file():
        raise UserError(f"{what}: expected a directory written by `pydit prune`, got {directory} without {PLAN_FILE}")
    stored = files.read_json(directory / PLAN_FILE, what=what, strict=True)
    return PruningPlan.from_dict(stored.get("plan") if isinstance(stored, dict) else None, what=what)


def stream_identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """What decides the batches of :func:`batch_stream`, as plain data: a resumed run must have the same.

    Raises UserError for options that no such batches can be made by, or that none of them would read.
    """
    _require_stream(arguments)
    if arguments.prompts == "demo":
        return {"prompts": "demo", "batch-size": arguments.batch_size, "data-seed": arguments.data_seed}
    from pydit.inference.sampling import read_prompts

    prompts = read_prompts(arguments.prompts)
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    return {"prompts": f"{len(prompts)} with the checksum {digest}", "sampling-steps": arguments.sampling_steps,
            "size": arguments.size, "data-seed": arguments.data_seed}


def _require_stream(arguments: argparse.Namespace) -> None:
    if arguments.prompts is None:
        raise UserError("prompts: expected a file with one prompt per line or demo, got none")
    require_used(arguments, ("sampling_steps", "size"), arguments.prompts != "demo", "--prompts with a file")
    require_used(arguments, ("batch_size",), arguments.prompts == "demo",
                 "--prompts demo or --data" if hasattr(arguments, "data") else "--prompts demo")


def require_output(out: Path, *sources: Path) -> None:
    """Raise UserError, before any work, for an output directory that cannot be written or that holds what is read."""
    for source in sources:
        files.require_apart(out, source)
    files.require_replaceable(out)


def require_file_outputs(arguments: argparse.Namespace, outputs: dict[str, str], *sources: Path | None) -> None:
    """Raise UserError, before any work, for output files that would take the place of something else.

    outputs : options and the kinds of file they write, as for :func:`pydit.files.require_file`. sources : what is read,
        beside the prompts of a file.
    """
    prompts = getattr(arguments, "prompts", None)
    read = [*sources, Path(prompts) if isinstance(prompts, str) and prompts != "demo" else None]
    written = [getattr(arguments, name) for name in outputs]
    for number, (name, kind) in enumerate(outputs.items()):
        files.require_file(written[number], *read, *written[:number], what=name, kind=kind)


def require_batches_used(arguments: argparse.Namespace) -> None:
    """Raise UserError for options on batches without --prompts."""
    require_used(arguments, ("batches", "batch_size", "sampling_steps", "size", "data_seed"),
                 arguments.prompts is not None, "--prompts")


def is_given(arguments: argparse.Namespace, name: str) -> bool:
    """Whether an option says something other than without it."""
    return getattr(arguments, name) not in (None, False, arguments.defaults(name))


def require_used(arguments: argparse.Namespace, names: Iterable[str], used: bool, needed: str) -> None:
    """Raise UserError for an option that was given although nothing would read it."""
    for name in names:
        if not used and is_given(arguments, name):
            raise UserError(f"{name}: expected {needed} to go with it, got none")


def inputs(item: Any) -> dict[str, Any]:
    """The forward arguments of a batch, without its target."""
    return item[0] if isinstance(item, tuple) else item


def of_demo() -> tuple[dict[str, int], int, int]:
    """What the configuration of a transformer made for the demo world says, the side of its images in pixels, and the
    tokens of its longest prompts."""
    from pydit.demo import data, teacher

    return ({"in_channels": 4 * teacher.LATENT_CHANNELS, "joint_attention_dim": teacher.TEXT_WIDTH}, data.SIZE,
            data.TEXT_TOKENS)


def demo_pipeline(pipe):
    """``pipe``, or UserError when it was not made for the demo world."""
    config, expected = getattr(getattr(pipe, "transformer", None), "config", {}), of_demo()[0]
    got = {name: config.get(name) for name in expected}
    if got != expected:
        raise UserError(f"pipeline: expected one made for the demo world ({expected}), "
                        f"got {type(pipe).__name__} with {got}")
    return pipe


def sampling_defaults(pipe) -> tuple[int | None, int, float]:
    """Image size (None: the pipeline's own), denoising steps and guidance that suit a pipeline."""
    from pydit.demo.data import GUIDANCE, STEPS
    from pydit.demo.render import SIZE

    try:
        demo_pipeline(pipe)
    except UserError:
        return None, 40, 1.0
    return SIZE, STEPS, GUIDANCE


def load(path: Path, arguments: argparse.Namespace, *, transformer: bool = True, shard: bool = False):
    """The pipeline of a directory on the device and in the dtype of the options, without bars of its own.

    ``transformer=False`` leaves that one on the CPU, ``shard=True`` divides it over the processes as it is read.
    """
    import torch

    from pydit.inference.pipeline import load_pipeline

    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise UserError(f"device: expected a torch device such as cpu or cuda, got {arguments.device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: expected one that torch can use, got {arguments.device!r}, and torch sees no GPU "
                        "(`pydit doctor` says why)")
    try:
        torch.zeros(1, device=device).cpu()  # torch knows names of devices that this build or machine has not
    except Exception as error:  # of many kinds, from AssertionError to NotImplementedError
        reason = one_line(error)[:200]
        raise UserError(f"device: expected one that torch can use, got {arguments.device!r} ({reason})") from None
    quiet()
    dtype = getattr(torch, arguments.dtype or "float32")
    pipe = load_pipeline(path, dtype=dtype, device=device if transformer else "cpu", shard=shard)
    if not transformer:
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name != "transformer":
                part.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def progress(items: Any, total: int, unit: str) -> Any:
    """Yield the items of an iterator under a progress bar."""
    from pydit.reporting import console

    bar = console.bar(total, unit=unit)
    try:
        for item in items:
            yield item
            if bar is not None:
                bar.update(1)
    finally:
        if bar is not None:
            bar.close()


def _number(text: str, kind: Callable[[str], Any], accepts: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _countable(value: int) -> int:
    if value > 2**53:  # torch and numpy have no such sizes, and name none of our options
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 2^53, got {value}")
    return value


def count(text: str) -> int:
    """Type of an option: 1, 2, ..."""
    return _countable(_number(text, int, lambda v: v >= 1, "a whole number of at least 1"))


def image_side(text: str) -> int:
    """Type of an option: a side of an image in pixels."""
    return _number(text, int, lambda v: 1 <= v <= MAX_SIDE, f"a number of pixels from 1 to {MAX_SIDE}")


def image_count(text: str) -> int:
    """Type of an option: how many images are judged, all of whose prompts are drawn first."""
    if (found := count(text)) > MAX_IMAGES:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MAX_IMAGES}, got {text!r}")
    return found


def whole(text: str) -> int:
    """Type of an option: 0, 1, 2, ..."""
    return _countable(_number(text, int, lambda v: v >= 0, "a whole number of at least 0"))


def seed(text: str) -> int:
    """Type of an option: a whole number that generators take, as do those that are made of it and a step."""
    return _number(text, int, lambda v: abs(v) <= 2**40, "a whole number between -2^40 and 2^40")


def positive(text: str) -> float:
    """Type of an option: a finite number above 0."""
    return _number(text, float, lambda v: 0 < v < float("inf"), "a number above 0")


def at_least_one(text: str) -> float:
    """Type of an option: a finite number from 1."""
    return _number(text, float, lambda v: 1 <= v < float("inf"), "a number of at least 1")


def not_negative(text: str) -> float:
    """Type of an option: a finite number of at least 0."""
    return _number(text, float, lambda v: 0 <= v < float("inf"), "a number of at least 0")


def removal(text: str) -> float | int | None:
    """Type of an option: a share of the blocks, a number of them, or auto (None)."""
    if text == "auto":
        return None
    return _number(text, lambda text: int(text) if text.isdecimal() else float(text),
                   lambda v: v >= 1 if isinstance(v, int) else 0 < v < 1,
                   "a share between 0 and 1, a whole number of blocks or auto")


def parse_list(name: str, text: str, *, or_else: str = "") -> list:
    """The list that an option holds as JSON; ``or_else``: what it may hold besides, for the message."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        example = "[2,58]" if name != "text_linear" and name != "intervals" else "[[3,4],[5,7]]"
        raise UserError(f"{name.replace('_', '-')}: expected a JSON list such as '{example}'{or_else}, got {text!r}")
    return found


def quiet() -> None:
    """Keep the libraries' own notices and loading bars off the terminal; failures still raise."""
    with contextlib.suppress(ImportError):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def warnings_as_lines(name: str) -> Iterator[None]:
    """What the body warns of, on one line each on the standard error, as it comes: a run may take hours, or fail."""
    def show(message: Warning | str, *_where: Any, **_more: Any) -> None:
        line = f"pydit {name}: warning: {message}"
        try:
            from tqdm import tqdm
        except ImportError:
            print(line, file=sys.stderr)
        else:
            tqdm.write(line, file=sys.stderr)  # around bars

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def story_to(to_stderr: bool):
    """Where a command's story goes: to standard error when standard output is to hold JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
        yield


def print_json(data: Any) -> None:
    """Print plain data as JSON; NaN is refused."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
