"""The demo world: what its prompts mean, which are held out, and that images show what their scenes say."""

import hashlib
import math
from collections import Counter

import pytest
import torch

from pydit.demo import render, world
from pydit.errors import UserError


def _draw(count, seed, split="train"):
    generator = torch.Generator().manual_seed(seed)
    indices = world.sample_indices(count, split=split, generator=generator)
    scenes = render.sample_scenes(indices, generator)
    return [world.all_prompts()[i] for i in indices.tolist()], scenes


def test_prompts_are_the_ones_the_teacher_was_trained_on():
    """Prompts, their order and the split are part of the committed teacher: its figures are void if they change."""
    listing = "\n".join(f"{p.text}|{p.category}|{world.split_of(p)}" for p in world.all_prompts())
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "a9c96979f112bebf"


def test_prompts_are_short_and_distinct():
    texts = [p.text for p in world.all_prompts()]
    assert len(set(texts)) == len(texts)
    assert max(len(text.split()) for text in texts) <= 10
    assert {word for text in texts for word in text.split()} == set(world.VOCABULARY)


def test_prompts_say_what_they_require():
    cross, ring = world.Item("cross"), world.Item("ring")
    assert world.parse("three crosses").objects == (cross, cross, cross)
    assert world.parse("two red rings").objects == (world.Item("ring", "red"),) * 2
    assert world.parse("a ring  left of a cross") == world.Prompt("a ring left of a cross", "position", (ring, cross),
                                                                  "left of")
    blue_ring, red_cross = world.Item("ring", "blue"), world.Item("cross", "red")
    assert world.parse("a blue ring and a red cross").objects == (blue_ring, red_cross)
    assert world.parse("the letter A in green").objects == (world.Item("A", "green"),)
    assert world.parse("a digit 7").category == "glyph"


@pytest.mark.parametrize("text", ["", "five circles", "a red circle above a blue square", "the letter B",
                                  "a circle and a circle"])
def test_a_text_outside_the_grammar_is_refused(text):
    with pytest.raises(UserError, match=r"prompt: expected one of .* got "):
        world.parse(text)


def test_every_category_holds_out_enough_prompts():
    held_out = Counter(p.category for p in world.all_prompts() if world.split_of(p) == "held_out")
    total = Counter(p.category for p in world.all_prompts())
    assert set(held_out) == set(world.CATEGORIES)
    assert min(held_out.values()) >= 8
    assert 0.15 < sum(held_out.values()) / sum(total.values()) < 0.20
    assert all(0.10 < held_out[c] / total[c] < 0.25 for c in world.CATEGORIES)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_samples_stay_in_their_split_and_are_balanced(split):
    prompts = world.sample_prompts(700, split=split, seed=3)
    assert {world.split_of(p) for p in prompts} == {split}
    assert set(Counter(p.category for p in prompts).values()) == {100}
    indices = world.sample_indices(7000, split=split, generator=torch.Generator().manual_seed(0))
    drawn = [world.all_prompts()[i] for i in indices.tolist()]
    assert {world.split_of(p) for p in drawn} == {split}
    assert all(850 < count < 1150 for count in Counter(p.category for p in drawn).values())


def test_sampled_prompts_depend_on_the_seed_alone():
    first = world.sample_prompts(70, split="held_out", seed=1)
    assert first == world.sample_prompts(70, split="held_out", seed=1)
    assert first != world.sample_prompts(70, split="held_out", seed=2)
    assert first[:30] == world.sample_prompts(30, split="held_out", seed=1)


def test_no_prompt_repeats_before_all_have_come():
    pool = sum(p.category == "single_object" and world.split_of(p) == "held_out" for p in world.all_prompts())
    prompts = world.sample_prompts(7 * pool, split="held_out", seed=5)
    assert len({p.text for p in prompts if p.category == "single_object"}) == pool


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="split: expected 'train' or 'held_out', got 'test'"):
        world.sample_prompts(1, split="test", seed=0)


def test_images_depend_on_the_seed_alone():
    prompts = world.sample_prompts(21, split="train", seed=0)
    one, two = (world.sample_images(prompts, torch.Generator().manual_seed(seed)) for seed in (4, 5))
    assert one.shape == (21, 3, render.SIZE, render.SIZE) and one.dtype == torch.float32
    assert one.min() >= -1 and one.max() <= 1
    again = world.sample_images(torch.tensor([world.index_of(p) for p in prompts]), torch.Generator().manual_seed(4))
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_no_images_for_no_prompts():
    assert world.sample_images([], torch.Generator()).shape == (0, 3, render.SIZE, render.SIZE)


def test_a_foreign_prompt_is_refused():
    with pytest.raises(UserError, match="prompt: expected one of"):
        world.sample_images([world.Prompt("a cube", "single_object", (world.Item("cube"),))], torch.Generator())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_images_on_cuda_are_those_of_their_scenes():
    generator = torch.Generator("cuda").manual_seed(0)
    indices = world.sample_indices(256, split="train", generator=generator)
    scenes = render.sample_scenes(indices, generator)
    on_cpu = render.Scenes(**{name: value.cpu() for name, value in vars(scenes).items()})
    assert (render.draw(scenes).cpu() - render.draw(on_cpu)).abs().max() < 1e-6
    assert world.sample_images(indices, generator, "cuda").device.type == "cuda"


def test_scenes_fulfil_their_prompts():
    prompts, scenes = _draw(1400, seed=1)
    names = list(world.COLOURS)
    for i, prompt in enumerate(prompts):
        count = int(scenes.present[i].sum())
        assert count == len(prompt.objects) and bool(scenes.present[i, :count].all())
        assert bool(scenes.is_glyph[i]) == (prompt.category == "glyph")
        kinds = world.GLYPHS if prompt.category == "glyph" else world.SHAPES
        for j, item in enumerate(prompt.objects):
            assert kinds[scenes.kind[i, j]] == item.kind
            assert item.colour in (None, names[scenes.colour[i, j]])
        x, y = scenes.x[i].tolist(), scenes.y[i].tolist()
        if prompt.relation == "left of":
            assert x[1] - x[0] >= 24 and y[0] == y[1]
        if prompt.relation == "right of":
            assert x[0] - x[1] >= 24 and y[0] == y[1]
        if prompt.relation == "above":
            assert y[1] - y[0] >= 24 and x[0] == x[1]
        if prompt.relation == "below":
            assert y[0] - y[1] >= 24 and x[0] == x[1]


def test_objects_keep_their_distance_and_stay_inside():
    prompts, scenes = _draw(1400, seed=2)
    for i, prompt in enumerate(prompts):
        height, width = render.GLYPH_PIXELS if prompt.category == "glyph" else (render.SHAPE_PIXELS,) * 2
        boxes = [(int(scenes.x[i, j]), int(scenes.y[i, j])) for j in range(len(prompt.objects))]
        assert all(0 <= x <= render.SIZE - width and 0 <= y <= render.SIZE - height for x, y in boxes)
        for j, (x, y) in enumerate(boxes):
            assert all(max(abs(x - u), abs(y - v)) >= render.SHAPE_PIXELS + 8 for u, v in boxes[:j])


def test_what_a_prompt_leaves_open_varies():
    generator = torch.Generator().manual_seed(0)
    scenes = render.sample_scenes(torch.full((3000,), world.index_of("a circle")), generator)
    assert set(scenes.colour[:, 0].tolist()) == set(range(len(world.COLOURS)))
    assert set(scenes.x[:, 0].tolist()) == set(scenes.y[:, 0].tolist()) == {0, 8, 16, 24, 32}
    scenes = render.sample_scenes(torch.full((3000,), world.index_of("a circle left of a ring")), generator)
    assert len(set(map(tuple, scenes.colour[:, :2].tolist()))) == len(world.COLOURS) ** 2


# Shapes as inequalities in float64, written independently of the renderer: (x, y) from the middle of the box.
_INSIDE = {
    "circle": lambda x, y: math.hypot(x, y) < 7,
    "square": lambda x, y: -6.5 < x < 6.5 and -6.5 < y < 6.5,
    "triangle": lambda x, y: -6.5 < y < 6.5 and abs(x) / 7.25 < (y + 6.5) / 13,
    "cross": lambda x, y: min(abs(x), abs(y)) < 2.25 and max(abs(x), abs(y)) < 7,
    "diamond": lambda x, y: abs(x) + abs(y) < 7.5,
    "ring": lambda x, y: 3.75 < math.hypot(x, y) < 7.25,
}


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_rendered_shape_is_the_shape(shape):
    prompt = world.parse(f"a red {shape}")
    generator = torch.Generator().manual_seed(0)
    scenes = render.sample_scenes(torch.tensor([world.index_of(prompt)]), generator)
    image = (render.draw(scenes)[0].double() + 1) * 127.5
    left, top = int(scenes.x[0, 0]), int(scenes.y[0, 0])
    fine = [(i + 0.5) / 12 for i in range(12)]
    for row in range(render.SIZE):
        for column in range(render.SIZE):
            share = 0.0
            if 0 <= row - top < 16 and 0 <= column - left < 16:
                hits = [_INSIDE[shape](column - left - 8 + u, row - top - 8 + v) for u in fine for v in fine]
                share = sum(hits) / len(hits)
            for channel in range(3):
                expected = share * world.COLOURS["red"][channel] + (1 - share) * render.BACKGROUND[channel]
                assert abs(float(image[channel, row, column]) - expected) < 12, (row, column, channel)


def test_a_glyph_is_its_bitmap():
    generator = torch.Generator().manual_seed(0)
    scenes = render.sample_scenes(torch.tensor([world.index_of("the letter L in black")]), generator)
    image = render.draw(scenes)[0].mean(0)
    dark = (image < 0).nonzero()
    top, left = int(scenes.y[0, 0]) + 2, int(scenes.x[0, 0]) + 2
    expected = {(top + r, left + c) for r in range(28) for c in range(20) if c < 4 or r >= 24}
    assert {tuple(p) for p in dark.tolist()} == expected


def test_glyphs_differ_in_several_dots():
    masks = render.glyph_masks().flatten(1)
    differences = (masks[:, None] != masks[None]).sum(2) / 16
    assert (differences + 99 * torch.eye(len(masks))).min() >= 3


def test_contact_sheet(tmp_path):
    from PIL import Image

    world._main(["--sheet", str(tmp_path / "sheet.png"), "--seed", "1"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(sheet.convert("RGB").resize((200, 200)).getcolors(1 << 20)) > 20
