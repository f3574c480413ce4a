"""Options, checks and output that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pydit.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like any other bad input: in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, story: str,
             example: str, *, figures: bool = True) -> argparse.ArgumentParser:
    """Add one command; ``figures`` gives it --json."""
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.\n\n{story}",
                                 epilog=f"example:\n  {example}")
    parser.set_defaults(run=run)
    if figures:
        parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    return parser


def add_pipeline(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The positional PIPELINE, with device and dtype."""
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", nargs="?" if optional else None,
                        help="pipeline directory" + (" (default: the committed demo teacher)" if optional else ""))
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where and in what dtype models run."""
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of the weights (default: float32)")


def add_batches(parser: argparse.ArgumentParser, *, batches: int | None, required: bool = True) -> None:
    """Where calibration or training batches come from."""
    parser.add_argument("--prompts", required=required, metavar="FILE|demo",
                        help="a text file with one prompt per line, or demo for the demo world's training prompts")
    if batches is not None:
        parser.add_argument("--batches", type=count, default=batches, help=f"calibration batches (default: {batches})")
    parser.add_argument("--batch-size", type=count, default=16,
                        help="images per batch, with --prompts demo or --data (default: 16)")
    parser.add_argument("--sampling-steps", type=count, default=20,
                        help="denoising steps per prompt, with a file; each is one batch (default: 20)")
    parser.add_argument("--size", type=count, help="image height and width, with a file (default: the pipeline's)")
    parser.add_argument("--data-seed", type=int, default=0, help="of noise and order (default: 0)")


def batch_stream(pipe, arguments: argparse.Namespace) -> Callable[[int], Any]:
    """Calibration or training batches as a function start -> endless iterator from batch ``start``."""
    if arguments.prompts is None:
        raise UserError("prompts: expected a file with one prompt per line or demo, got none")
    if arguments.prompts == "demo":
        from pydit.demo.data import make_batches

        demo_pipeline(pipe)
        return lambda start: make_batches(pipe, batch_size=arguments.batch_size, seed=arguments.data_seed,
                                          start_step=start)
    from pydit.distill import distributed
    from pydit.inference.sampling import endless_batches, read_prompts

    prompts = read_prompts(arguments.prompts)
    rank, size = distributed.rank(), distributed.world_size()  # each process draws prompts of its own
    prompts = prompts[rank % len(prompts)::size]
    seed = arguments.data_seed + rank * 1_000_003
    return lambda start: endless_batches(pipe, prompts, start=start, steps=arguments.sampling_steps, seed=seed,
                                         size=arguments.size)


def inputs(item: Any) -> dict[str, Any]:
    """The forward arguments of a batch, without its target."""
    return item[0] if isinstance(item, tuple) else item


def demo_pipeline(pipe):
    """``pipe``, or UserError when it was not made for the demo world."""
    from pydit.demo import teacher

    config = getattr(getattr(pipe, "transformer", None), "config", {})
    expected = {"in_channels": 4 * teacher.LATENT_CHANNELS, "joint_attention_dim": teacher.TEXT_WIDTH}
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


def require_apart(out: Path, **inputs: Path) -> None:
    """UserError when ``out`` is the directory of an input: what it would replace is wanted again, as the teacher is."""
    for name, path in inputs.items():
        if out.resolve() == path.resolve():
            raise UserError(f"out: expected another directory than the {name}'s, which stays as it is, got {out}")


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
    from pydit.demo import console

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


def count(text: str) -> int:
    """Type of an option: 1, 2, ..."""
    return _number(text, int, lambda v: v >= 1, "a whole number of at least 1")


def whole(text: str) -> int:
    """Type of an option: 0, 1, 2, ..."""
    return _number(text, int, lambda v: v >= 0, "a whole number of at least 0")


def positive(text: str) -> float:
    """Type of an option: a finite number above 0."""
    return _number(text, float, lambda v: 0 < v < float("inf"), "a number above 0")


def at_least_one(text: str) -> float:
    """Type of an option: a finite number from 1."""
    return _number(text, float, lambda v: 1 <= v < float("inf"), "a number of at least 1")


def not_negative(text: str) -> float:
    """Type of an option: a finite number of at least 0."""
    return _number(text, float, lambda v: 0 <= v < float("inf"), "a number of at least 0")


def share(text: str) -> float:
    """Type of an option: strictly between 0 and 1."""
    return _number(text, float, lambda v: 0 < v < 1, "a share between 0 and 1")


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
    """What the body warns of, on one line each on the standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"pydit {name}: warning: {warning.message}", file=sys.stderr)


@contextlib.contextmanager
def story_to(to_stderr: bool):
    """Where a command's story goes: to standard error when standard output is to hold JSON alone."""
    with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
        yield


def print_json(data: Any) -> None:
    """Print plain data as JSON; NaN is refused."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))
