"""Images from any diffusers pipeline, and what its transformer is fed on the way."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pydit import files
from pydit.errors import FormatError, UserError

RECORD = "pydit"  # the text in a PNG file that says, as JSON, what the image was drawn with


def generate(pipe, prompts: Sequence[str], *, seeds: Sequence[int], steps: int, guidance: float,
             height: int | None = None, width: int | None = None) -> Iterator[Any]:
    """Yield one PIL image per (prompt, seed), each from its own generator, one pipeline call each.

    Parameters
    ----------
    steps : denoising steps. guidance : 1 turns guidance off where the pipeline can.
    height, width : pixels; None leaves the pipeline's default.

    Raises
    ------
    UserError
        What was drawn is no picture but NaN, which a pipeline makes black pixels of without a word.
    """
    for prompt, seed in zip(prompts, seeds, strict=True):
        pixels = _call(pipe, prompt, seed, steps, guidance, height, width, "np").images
        require_drawn(pixels, guidance, pipe)
        yield pipe.image_processor.numpy_to_pil(pixels)[0]


def require_drawn(pixels: Any, guidance: float, pipe) -> None:
    """UserError for pixels with a NaN among them."""
    if not np.isfinite(pixels).all():
        raise UserError(f"guidance: expected numbers of which a picture can be made, got NaN in it with guidance "
                        f"{guidance:g} in {str(pipe.dtype).removeprefix('torch.')}; less guidance or float32 may help, "
                        "unless the weights of the pipeline are NaN themselves")


def record_batches(pipe, prompts: Sequence[str], *, steps: int, seed: int, height: int | None = None,
                   width: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield what the transformer of a pipeline is fed while it draws prompts: a batch per denoising step.

    These are the activations that matter at run time, and they need no images. One prompt is drawn at a time, so no
    more than ``steps`` batches are held.

    Yields
    ------
    dict of keyword arguments for ``pipe.transformer.forward``.
    """
    for number, prompt in enumerate(prompts):
        seen: list[dict[str, Any]] = []

        def keep(module, args, kwargs, seen=seen):
            names = list(inspect.signature(module.forward).parameters)
            batch = {**dict(zip(names, args, strict=False)), **kwargs}
            batch.pop("return_dict", None)
            # The pipeline goes on to write into some of these tensors.
            seen.append({name: value.clone() if isinstance(value, torch.Tensor) else value
                         for name, value in batch.items()})

        handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            _call(pipe, prompt, seed + number, steps, 1.0, height, width, "latent")
        finally:
            handle.remove()
        yield from seen


def with_transformer(pipe, transformer):
    """A pipeline without bars that shares every part of ``pipe`` but the transformer."""
    other = type(pipe)(**{**pipe.components, "transformer": transformer})
    other.set_progress_bar_config(disable=True)
    return other


def endless_batches(pipe, prompts: Sequence[str], *, start: int = 0, steps: int, seed: int,
                    size: int | None = None) -> Iterator[dict[str, Any]]:
    """Batches of :func:`record_batches` without end, from batch number ``start``; each round has other noise.

    One prompt gives ``steps`` batches, so the stream can be entered anywhere at the cost of one prompt.
    """
    number, skip = divmod(start, steps)
    while True:
        chosen = prompts[number % len(prompts)]
        for batch in record_batches(pipe, [chosen], steps=steps, seed=seed + number, height=size, width=size):
            if skip:
                skip -= 1
            else:
                yield batch
        number += 1


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Prompts from a UTF-8 text file, one per line; blank lines are left out. FormatError when there are none."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"prompts: expected a text file with one prompt per line, got {path}, which is no file")
    try:
        text = files.read_text(path, what="prompts")  # some editors begin a file with a mark of its byte order
        lines = io.StringIO(text.removeprefix("\ufeff"), newline=None)  # splitlines would split at U+2028 and \f too
        prompts = [line.strip() for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise FormatError(f"prompts: expected UTF-8 text in {path}, got something else ({error})") from None
    if not prompts:
        raise FormatError(f"prompts: expected at least one prompt in {path}, got an empty file")
    return prompts


@torch.no_grad()
def _call(pipe, prompt: str, seed: int, steps: int, guidance: float, height: int | None, width: int | None,
          output_type: str):
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"prompt": prompt, "num_inference_steps": steps, "output_type": output_type,
                                 "generator": torch.Generator().manual_seed(seed)}
    if "true_cfg_scale" in accepted:
        arguments["true_cfg_scale"] = guidance
        if guidance > 1:
            arguments["negative_prompt"] = ""
    elif "guidance_scale" in accepted:
        arguments["guidance_scale"] = guidance
    elif guidance != 1:
        raise UserError(f"guidance: expected 1, because {type(pipe).__name__} has no guidance, got {guidance:g}")
    arguments |= {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    return pipe(**arguments)


def require_size(pipe, **sides: int | None) -> None:
    """UserError for a height, width or size that is no whole number of the transformer's patches: diffusers would draw
    another one, and say so in a log alone."""
    step = 2 * getattr(pipe, "vae_scale_factor", 1)  # of Qwen-Image, FLUX.1 and SD3.5 alike
    for name, side in sides.items():
        if side is not None and side % step:
            raise UserError(f"{name}: expected a multiple of {step} for this pipeline, got {side}")


def image_name(number: int, prompt: str, seed: int) -> str:
    """``000-a-red-circle-seed0.png``."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
    return f"{number:03d}-{words}-seed{seed}.png"


def add_captions(prompts: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Put the prompt beside every image under :func:`image_name` that was drawn without."""
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        path = out / image_name(number, prompt, seed)
        if path.exists() and not path.with_suffix(".txt").exists():
            files.write_text(path.with_suffix(".txt"), prompt + "\n")


def require_same(out: Path, prompts: Sequence[str], seeds: Sequence[int], made_of: Mapping[str, Any]) -> None:
    """UserError where an image under :func:`image_name` says that it was drawn with something else than ``made_of``.

    Images that say nothing, of another program say, are taken as they are.
    """
    from PIL import Image

    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        path = out / image_name(number, prompt, seed)
        if not path.exists():
            continue
        try:
            with Image.open(path) as image:
                found = json.loads(image.info.get(RECORD, "{}"))
        except (OSError, ValueError, SyntaxError) as error:  # the last is PIL's for a broken PNG file
            raise FormatError(f"resume: expected an image in {path}, got something else ({error})") from None
        for name, value in made_of.items():
            if isinstance(found, dict) and found.get(name, value) != value:
                was, now = ("the pipeline's own" if v is None else v for v in (found[name], value))
                raise UserError(f"{name}: expected {was}, with which {path} was drawn, got {now}; without --resume all "
                                "images are drawn anew")


def save_images(images: Iterable[Any], prompts: Sequence[str], seeds: Sequence[int], out: Path, *,
                numbers: Sequence[int] | None = None, captions: bool = False,
                made_of: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Write PIL images under :func:`image_name`, each under its final name only when it is whole.

    numbers : of the images; None counts from 0.
    captions : the prompt goes beside the image, first, as a ``.txt`` file, which makes a data set.
    made_of : what the images were drawn with besides prompt and seed; all of it is kept in the file, as JSON in the
    text chunk ``pydit``.
    """
    from PIL.PngImagePlugin import PngInfo

    out.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(out, ".[0-9]*-seed*.part")  # of killed writes, also of images that are not written again
    numbers = range(len(prompts)) if numbers is None else numbers
    for image, number, prompt, seed in zip(images, numbers, prompts, seeds, strict=True):
        path = out / image_name(number, prompt, seed)
        if captions:
            files.write_text(path.with_suffix(".txt"), prompt + "\n")
        record = PngInfo()
        record.add_itxt(RECORD, json.dumps({"prompt": prompt, "seed": seed, **(made_of or {})}))
        with files.replace_file(path) as temporary:
            image.save(temporary, format="PNG", pnginfo=record)
        yield path
