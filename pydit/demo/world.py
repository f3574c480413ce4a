"""The demo's world: prompts with an exact meaning, in seven categories modelled on GenEval (Ghosh et al. 2023).

A prompt names the objects an image must show: coloured shapes, how many, how they stand to each other, or one glyph.
An image meets it when it shows exactly those objects and nothing else (stricter than GenEval, which ignores extras).
Whatever a prompt leaves open (colour, place) is sampled. :mod:`pydit.demo.render` draws, :mod:`pydit.demo.verifier`
decides. ``python -m pydit.demo.world --sheet sheet.png`` draws a contact sheet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from pydit.errors import UserError

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "glyph")
COLOURS = {"red": (222, 45, 38), "green": (35, 155, 70), "blue": (40, 85, 220), "yellow": (250, 200, 20),
           "purple": (145, 50, 175), "black": (30, 30, 34)}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
GLYPHS = tuple("ACEHKLNTUX123457")

HELD_OUT_BYTES = 44  # of 256: the share of prompts that training never sees


@dataclass(frozen=True)
class Item:
    """One required object: a shape or a glyph, and its colour (None: any)."""

    kind: str
    colour: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt and what an image must show: exactly ``objects``; ``relation`` holds from the first to the second."""

    text: str
    category: str
    objects: tuple[Item, ...]
    relation: str | None = None


@cache
def all_prompts() -> tuple[Prompt, ...]:
    """Every prompt of the world, in a fixed order."""
    prompts = tuple(_grammar())
    assert len({p.text for p in prompts}) == len(prompts)
    return prompts


def _grammar() -> Iterator[Prompt]:
    for shape in SHAPES:
        for form in ("a {}", "one {}", "a single {}", "a picture of a {}", "a photo of a {}", "a drawing of a {}",
                     "an image of a {}", "just a {}"):
            yield Prompt(form.format(shape), "single_object", (Item(shape),))
        for colour in COLOURS:
            for form in ("a {} {}", "one {} {}", "a picture of a {} {}"):
                yield Prompt(form.format(colour, shape), "colors", (Item(shape, colour),))
        for word, count in NUMBERS.items():
            yield Prompt(f"{word} {PLURALS[shape]}", "counting", (Item(shape),) * count)
            for colour in COLOURS:
                yield Prompt(f"{word} {colour} {PLURALS[shape]}", "counting", (Item(shape, colour),) * count)
        for other in SHAPES:
            if other == shape:
                continue
            for joint in ("and", "with", "next to"):
                yield Prompt(f"a {shape} {joint} a {other}", "two_object", (Item(shape), Item(other)))
            for relation in RELATIONS:
                yield Prompt(f"a {shape} {relation} a {other}", "position", (Item(shape), Item(other)), relation)
            for first in COLOURS:
                for second in COLOURS:
                    if first != second:
                        yield Prompt(f"a {first} {shape} and a {second} {other}", "color_attr",
                                     (Item(shape, first), Item(other, second)))
    for glyph in GLYPHS:
        noun = "letter" if glyph.isalpha() else "digit"
        for form in ("the {} {}", "a {} {}"):
            yield Prompt(form.format(noun, glyph), "glyph", (Item(glyph),))
        for colour in COLOURS:
            yield Prompt(f"a {colour} {noun} {glyph}", "glyph", (Item(glyph, colour),))
            yield Prompt(f"the {noun} {glyph} in {colour}", "glyph", (Item(glyph, colour),))


@cache
def _by_text() -> dict[str, int]:
    return {prompt.text: index for index, prompt in enumerate(all_prompts())}


def index_of(prompt: Prompt | str) -> int:
    """Index into :func:`all_prompts` of a prompt or its text; UserError when the grammar does not produce it."""
    text = prompt if isinstance(prompt, str) else prompt.text
    index = _by_text().get(" ".join(text.split()))
    if index is None:
        raise UserError(f"prompt: expected one of the demo world's {len(all_prompts())} prompts such as "
                        f"'three red circles' or 'a ring above a square', got {text!r}")
    return index


def parse(text: str) -> Prompt:
    """The prompt with this text; UserError when the world's grammar does not produce it."""
    return all_prompts()[index_of(text)]


def split_of(prompt: Prompt) -> str:
    """``"train"`` or ``"held_out"``, decided by a hash of the text."""
    return "held_out" if hashlib.sha256(prompt.text.encode()).digest()[0] < HELD_OUT_BYTES else "train"


@cache
def _pools(split: str) -> tuple[torch.Tensor, ...]:
    if split not in ("train", "held_out"):
        raise UserError(f"split: expected 'train' or 'held_out', got {split!r}")
    return tuple(torch.tensor([i for i, p in enumerate(all_prompts()) if p.category == c and split_of(p) == split])
                 for c in CATEGORIES)


def sample_indices(count: int, *, split: str, generator: torch.Generator,
                   weights: tuple[float, ...] = (1.0,) * len(CATEGORIES)) -> torch.Tensor:
    """``count`` random indices into :func:`all_prompts`, categories drawn by ``weights``; int64 [count]."""
    chances = torch.tensor(weights, device=generator.device)
    category = torch.multinomial(chances, count, replacement=True, generator=generator)
    place = torch.rand(count, generator=generator, device=generator.device)
    indices = torch.zeros_like(category)
    for c, pool in enumerate(_pools(split)):
        chosen = category == c
        indices[chosen] = pool.to(generator.device)[(place[chosen] * len(pool)).long()]
    return indices


def sample_prompts(count: int, *, split: str, seed: int) -> list[Prompt]:
    """``count`` prompts that take the categories in turn; within a category every prompt comes before any repeats."""
    generator = torch.Generator().manual_seed(seed)
    orders = [pool[torch.randperm(len(pool), generator=generator)].tolist() for pool in _pools(split)]
    return [all_prompts()[orders[i % len(orders)][i // len(orders) % len(orders[i % len(orders)])]]
            for i in range(count)]


VOCABULARY = tuple(sorted({word for prompt in all_prompts() for word in prompt.text.split()}))


def sample_images(indices, generator: torch.Generator, device: str | torch.device = "cpu") -> torch.Tensor:
    """Images that meet prompts, everything left open drawn at random.

    Parameters
    ----------
    indices : int64 tensor [N] of indices into :func:`all_prompts`, or a list of prompts.
    generator : torch.Generator on ``device``.

    Returns
    -------
    torch.Tensor, float32 [N, 3, 48, 48] in [-1, 1].

    Raises
    ------
    UserError
        A prompt is not one of the world's.
    """
    from pydit.demo import render

    if not isinstance(indices, torch.Tensor):
        indices = torch.tensor([index_of(prompt) for prompt in indices], dtype=torch.long)
    return render.draw(render.sample_scenes(indices.to(device), generator))


def _main(argv: list[str] | None = None) -> None:
    import argparse

    from pydit.demo import render

    parser = argparse.ArgumentParser(prog="python -m pydit.demo.world",
                                     description="Draw a contact sheet of the world.")
    parser.add_argument("--sheet", required=True, help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    prompts = sample_prompts(7 * len(CATEGORIES), split="train", seed=args.seed)
    images = sample_images(prompts, torch.Generator().manual_seed(args.seed))
    render.contact_sheet(images, [prompt.text for prompt in prompts], columns=len(CATEGORIES),
                         headings=tuple(c.replace("_", " ") for c in CATEGORIES)).save(args.sheet)
    print(f"wrote {args.sheet}")


if __name__ == "__main__":
    _main()
