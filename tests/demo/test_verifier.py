"""The verifier against an oracle that knows each scene: right images, wrong prompts, near misses, spoilt images.

Every rate is measured with the true scene as the judge: a "wrong" prompt is one that the scene does not meet, whatever
its text, and a spoilt image is one whose objects were touched.
"""

from collections import Counter, defaultdict
from itertools import permutations

import numpy as np
import pytest
import torch

from pydit.demo import render, verifier, world
from pydit.errors import UserError

REQUIRED = 0.99
SIZE = render.SIZE


class Sample:
    """A prompt, an image drawn for it, and its true objects: (kind, colour, left, top, width, height)."""

    def __init__(self, prompt, image, truth):
        self.prompt, self.image, self.truth = prompt, image, truth


def _samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    per_category = count // len(world.CATEGORIES)
    indices = []
    for name in world.CATEGORIES:
        pool = torch.tensor([i for i, p in enumerate(world.all_prompts()) if p.category == name])
        indices.append(pool[torch.randint(len(pool), (per_category,), generator=generator)])
    indices = torch.cat(indices)
    scenes = render.sample_scenes(indices, generator)
    images = render.to_uint8(render.draw(scenes))
    colours = list(world.COLOURS)
    result = []
    for i, index in enumerate(indices.tolist()):
        glyph = bool(scenes.is_glyph[i])
        names, (height, width) = (world.GLYPHS, render.GLYPH_PIXELS) if glyph else (world.SHAPES, (16, 16))
        truth = [(names[scenes.kind[i, j]], colours[scenes.colour[i, j]], int(scenes.x[i, j]), int(scenes.y[i, j]),
                  width, height) for j in range(4) if scenes.present[i, j]]
        result.append(Sample(world.all_prompts()[index], images[i], truth))
    return result


@pytest.fixture(scope="module", autouse=True)
def every_image_is_read_once():
    """However many prompts are asked of it: the verdict on each is made anew."""
    read, known = verifier._read, {}

    def reading(pixels):
        key = pixels.tobytes()
        if key not in known:
            known[key] = read(pixels)
        return known[key]

    verifier._read = reading
    yield
    verifier._read = read


@pytest.fixture(scope="module")
def samples():
    return _samples(1575, seed=7)


@pytest.fixture(scope="module")
def few():
    return _samples(420, seed=8)


def _met(truth, prompt):
    """The oracle: whether a scene of these true objects meets a prompt."""
    def holds(order):
        pairs = zip(order, prompt.objects, strict=True)
        if any(o[0] != item.kind or item.colour not in (None, o[1]) for o, item in pairs):
            return False
        if prompt.relation is None:
            return True
        (_, _, x, y, *_), (_, _, u, v, *_) = order
        return {"left of": u - x > abs(v - y), "right of": x - u > abs(v - y),
                "above": v - y > abs(u - x), "below": y - v > abs(u - x)}[prompt.relation]

    return len(truth) == len(prompt.objects) and any(holds(order) for order in permutations(truth))


def _rates(pairs, expected):
    """Share of right decisions per category of the prompt, for (image, prompt) pairs."""
    right = defaultdict(list)
    for image, prompt in pairs:
        right[prompt.category].append(verifier.verify(image, prompt).ok == expected)
    return {name: float(np.mean(values)) for name, values in right.items()}


def _noisy(image, deviation, generator):
    return (image + generator.normal(0, deviation, image.shape)).round().clip(0, 255).astype(np.uint8)


def _blurred(image, sigma):
    radius = int(4 * sigma) + 1
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(image.astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    rows = sum(k * padded[i:i + SIZE] for i, k in enumerate(kernel))
    return sum(k * rows[:, i:i + SIZE] for i, k in enumerate(kernel)).round().clip(0, 255).astype(np.uint8)


# Right images --------------------------------------------------------------------------------------------------------


def test_rendered_images_meet_their_prompts(samples):
    rates = _rates([(s.image, s.prompt) for s in samples], True)
    assert set(rates) == set(world.CATEGORIES) and min(rates.values()) >= REQUIRED, rates


@pytest.mark.parametrize("spoil", [
    pytest.param(lambda image, rng: _noisy(image, 6, rng), id="noise"),
    pytest.param(lambda image, rng: _noisy(_blurred(image, 0.7), 6, rng), id="soft edges and noise"),
    pytest.param(lambda image, rng: np.roll(image, rng.integers(-1, 2, 2), (0, 1)), id="a pixel off"),
    pytest.param(lambda image, rng: ((image.astype(float) + np.roll(image, 1, 1)) / 2).round().astype(np.uint8),
                 id="half a pixel off"),
])
def test_what_a_model_leaves_behind_is_tolerated(few, spoil):
    rng = np.random.default_rng(0)
    rates = _rates([(spoil(s.image, rng), s.prompt) for s in few], True)
    assert min(rates.values()) >= 0.98, rates


def test_a_few_stray_pixels_are_tolerated():
    sample = _samples(7, seed=1)[0]
    image = sample.image.copy()
    corner = next(c for c in ((1, 1), (1, 45), (45, 1), (45, 45)) if (image[c] == render.BACKGROUND).all())
    image[corner[0]:corner[0] + 2, corner[1]:corner[1] + 2] = 0
    assert verifier.verify(image, sample.prompt).ok


def test_objects_in_neighbouring_cells_are_told_apart():
    """The world keeps them eight pixels apart; a model may not."""
    image = np.empty((SIZE, SIZE, 3))
    image[:] = render.BACKGROUND
    for kind, colour, x in (("circle", "red", 8), ("diamond", "blue", 24)):
        cover = render.shape_masks()[world.SHAPES.index(kind)].numpy()[..., None]
        image[16:32, x:x + 16] += cover * (np.array(world.COLOURS[colour]) - render.BACKGROUND)
    image = image.round().astype(np.uint8)
    assert verifier.verify(image, "a circle left of a diamond").ok
    assert verifier.verify(image, "a blue diamond and a red circle").ok


def test_a_glyph_whose_corners_come_apart_is_read():
    """Drop the pixels at which the strokes of an X touch."""
    index = torch.tensor([world.index_of("a black letter X")])
    scenes = render.sample_scenes(index, torch.Generator().manual_seed(0))
    image = render.to_uint8(render.draw(scenes))[0]
    top, left = int(scenes.y[0, 0]) + 2, int(scenes.x[0, 0]) + 2
    for row, column in ((8, 4), (20, 4), (8, 16), (20, 16)):  # between rows 1 and 2, and 4 and 5, of the bitmap
        image[top + row - 1:top + row, left + column - 1:left + column + 1] = render.BACKGROUND
        image[top + row:top + row + 1, left + column - 1:left + column + 1] = render.BACKGROUND
    assert verifier.components(np.abs(image.astype(int) - render.BACKGROUND).sum(2) > 200).max() > 1
    assert verifier.verify(image, "the letter X").ok


def test_detected_objects_are_the_true_ones(few):
    for sample in few:
        found = verifier.read_scene(sample.image)
        assert Counter((o.kind, o.colour) for o in found) == Counter(t[:2] for t in sample.truth)
        for kind, colour, x, y, width, height in sample.truth:
            assert any((o.kind, o.colour) == (kind, colour) and abs(o.centre[0] - x - width / 2) <= 1
                       and abs(o.centre[1] - y - height / 2) <= 1 for o in found)


# Wrong prompts -------------------------------------------------------------------------------------------------------


def test_wrong_prompts_are_rejected(samples):
    rng = np.random.default_rng(1)
    prompts = world.all_prompts()
    pairs = []
    for sample in samples:
        # Half from the same category, so that not all are trivially wrong.
        pool = [p for p in prompts if p.category == sample.prompt.category] if rng.random() < 0.5 else prompts
        wrong = [p for p in (pool[i] for i in rng.integers(len(pool), size=2)) if not _met(sample.truth, p)]
        pairs += [(sample.image, p) for p in wrong]
    rates = _rates(pairs, False)
    assert len(pairs) > 2500 and min(rates.values()) >= REQUIRED, rates


def _similar(asked, items):
    """A cheap bound: prompts about glyphs and shapes never mix, and two objects of two share a kind at least."""
    glyphs = {kind in world.GLYPHS for kind in (*(a.kind for a in asked), *(o[0] for o in items))}
    return len(glyphs) == 1 and (len(items) != 2 or any(a.kind == o[0] for a in asked for o in items))


def _near_misses(truth):
    """Prompts that differ from the scene in one thing: {what: prompts}."""
    result = defaultdict(list)
    items = [o[:2] for o in truth]
    for prompt in world.all_prompts():
        asked = prompt.objects
        if abs(len(asked) - len(items)) > 1 or not (_similar(asked, items) and not _met(truth, prompt)):
            continue
        if len(asked) == len(items):
            # The best assignment of asked to true objects, as mismatches in (kinds, colours).
            wrong = min((sum(a.kind != o[0] for a, o in zip(asked, order, strict=True)),
                         sum(a.colour not in (None, o[1]) for a, o in zip(asked, order, strict=True)))
                        for order in permutations(items))
            if wrong == (0, 0):
                result["relation"].append(prompt)
            elif wrong == (1, 0) or (wrong[1] == 0 and prompt.category == "counting"):
                result["glyph" if prompt.category == "glyph" else "shape"].append(prompt)
            elif wrong[0] == 0 and (wrong[1] == 1 or prompt.category == "counting"):
                result["colour"].append(prompt)
            elif wrong == (0, 2) and prompt.category == "color_attr":
                result["binding"].append(prompt)
        elif abs(len(asked) - len(items)) == 1 and len(set(items)) == 1 and \
                all(a.kind == items[0][0] and a.colour in (None, items[0][1]) for a in asked):
            result["count"].append(prompt)
    return result


def test_near_misses_are_rejected(samples):
    rng = np.random.default_rng(2)
    pairs = defaultdict(list)
    for sample in samples[::5]:
        for what, prompts in _near_misses(sample.truth).items():
            chosen = rng.choice(len(prompts), min(4, len(prompts)), replace=False)
            pairs[what] += [(sample.image, prompts[i]) for i in chosen]
    rates = {what: 1 - np.mean([verifier.verify(*pair).ok for pair in group]) for what, group in pairs.items()}
    assert {what: len(group) >= 40 for what, group in pairs.items()} == dict.fromkeys(
        ("shape", "colour", "count", "relation", "glyph", "binding"), True)
    assert min(rates.values()) >= REQUIRED, rates


def test_an_object_too_many_is_rejected(few):
    """An extra object in a free quarter, of the same kind or of another."""
    rng = np.random.default_rng(3)
    donors = [s for s in few if s.prompt.category == "single_object"]
    accepted, tried = 0, 0
    for sample in few:
        donor = donors[rng.integers(len(donors))]
        x, y = donor.truth[0][2:4]
        if any(x < u + w + 4 and u < x + 20 and y < v + h + 4 and v < y + 20 for _, _, u, v, w, h in sample.truth):
            continue
        image = sample.image.copy()
        image[y:y + 16, x:x + 16] = donor.image[y:y + 16, x:x + 16]
        accepted += verifier.verify(image, sample.prompt).ok
        tried += 1
    assert tried > 100 and accepted <= (1 - REQUIRED) * tried


# Spoilt images -------------------------------------------------------------------------------------------------------


def _cut_out(sample, rng):
    """A patch of background of 7x7 pixels (8x8 for the larger glyphs) on one object, where it covers some ink."""
    _, _, x, y, width, height = sample.truth[rng.integers(len(sample.truth))]
    side = 7 if width == 16 else 8
    ink = np.abs(sample.image.astype(int) - render.BACKGROUND).sum(2) > 150
    places = [(u, v) for u in range(x, x + width - side + 1) for v in range(y, y + height - side + 1)
              if ink[v:v + side, u:u + side].mean() > 0.4]
    u, v = places[rng.integers(len(places))]
    image = sample.image.copy()
    image[v:v + side, u:u + side] = render.BACKGROUND
    return image


def _painted(sample, rng):
    """The lower half of one object in another colour."""
    _, colour, x, y, width, height = sample.truth[rng.integers(len(sample.truth))]
    other = rng.choice([c for c in world.COLOURS if c != colour])
    image = sample.image.astype(float)
    part = image[y + height // 2:y + height, x:x + width]
    toward = np.array(world.COLOURS[colour], float) - render.BACKGROUND
    cover = (part - render.BACKGROUND) @ toward / (toward @ toward)
    part[:] = render.BACKGROUND + cover[..., None] * (np.array(world.COLOURS[other], float) - render.BACKGROUND)
    return image.round().clip(0, 255).astype(np.uint8)


def _shuffled(sample, rng):
    """Tiles of 12x12 pixels in another order: every object spans several."""
    tiles = sample.image.reshape(4, 12, 4, 12, 3).swapaxes(1, 2).reshape(16, 12, 12, 3)
    return tiles[rng.permutation(16)].reshape(4, 4, 12, 12, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)


def _halves(sample, rng):
    """Left and right of a cut through the middle of one object change places."""
    _, _, x, _, width, _ = sample.truth[rng.integers(len(sample.truth))]
    return np.roll(sample.image, -(x + width // 2), 1)


SPOILT = {
    "heavy noise": lambda s, rng: _noisy(s.image, 60, rng),
    "cut-out": _cut_out,
    "two colours": _painted,
    "shuffled tiles": _shuffled,
    "swapped halves": _halves,
    "blur 2": lambda s, rng: _blurred(s.image, 2.0),
    "blur 3": lambda s, rng: _blurred(s.image, 3.0),
    "blur 5": lambda s, rng: _blurred(s.image, 5.0),
    "faded": lambda s, rng: (s.image * 0.4 + np.array(render.BACKGROUND) * 0.6).round().astype(np.uint8),
    "inverted": lambda s, rng: 255 - s.image,
    "empty": lambda s, rng: np.full_like(s.image, 0) + np.array(render.BACKGROUND, np.uint8),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_images_are_rejected(few, how):
    rng = np.random.default_rng(4)
    rates = _rates([(SPOILT[how](s, rng), s.prompt) for s in few], False)
    assert np.mean(list(rates.values())) >= REQUIRED, rates


# Interface -----------------------------------------------------------------------------------------------------------


def test_reasons_name_what_is_wrong():
    sample = next(s for s in _samples(70, seed=9) if s.prompt.relation == "left of")
    first, second = (item.kind for item in sample.prompt.objects)
    swapped = verifier.verify(sample.image, f"a {second} left of a {first}")
    assert not swapped and swapped.reason == f"the {second} is not left of the {first}"
    assert verifier.verify(sample.image, f"a {first}").reason.startswith("expected 1 object, found ")
    assert "blurred" in verifier.verify(_blurred(sample.image, 2.0), sample.prompt).reason
    assert verifier.verify(sample.image, sample.prompt).reason.startswith("found ")


def test_pil_images_are_read_like_arrays():
    from PIL import Image

    sample = _samples(7, seed=2)[1]
    assert verifier.read_scene(Image.fromarray(sample.image)) == verifier.read_scene(sample.image)


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3), np.uint8), np.zeros((SIZE, SIZE, 3), np.float32),
                                   np.zeros((SIZE, SIZE), np.uint8)])
def test_other_images_are_refused(image):
    with pytest.raises(UserError, match=r"image: expected uint8 \[48, 48, 3\], got "):
        verifier.verify(image, "a circle")


def test_components_match_a_flood_fill():
    rng = np.random.default_rng(5)
    for density in (0.1, 0.3, 0.5, 0.8):
        mask = rng.random((20, 31)) < density
        labels = verifier.components(mask)
        expected = np.zeros(mask.shape, int)
        for start in zip(*np.nonzero(mask), strict=True):
            if expected[start]:
                continue
            stack, number = [start], expected.max() + 1
            while stack:
                y, x = stack.pop()
                if 0 <= y < 20 and 0 <= x < 31 and mask[y, x] and not expected[y, x]:
                    expected[y, x] = number
                    stack += [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        assert (labels > 0).tolist() == mask.tolist()
        pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == expected.max() == labels.max()
